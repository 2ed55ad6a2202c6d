"""A bundle loaded onto a device, ready to compute logits."""

import os
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from cosmos_runtime.arrays import Floats, TokenIds
from cosmos_runtime.bundle import Bundle
from cosmos_runtime.errors import BundleError, CosmosRuntimeError, TokenizerError
from cosmos_runtime.manifest import FULL_SEQUENCE, GraphSpec, Manifest, Role
from cosmos_runtime.providers import create_inference_session, first_line
from cosmos_runtime.signature import check_full_sequence, check_signature
from cosmos_runtime.threads import thread_count
from cosmos_runtime.tokenizer import Tokenizer
from cosmos_runtime.validation import check_fixed_axes, token_batch

if TYPE_CHECKING:
    import onnxruntime


def load(bundle: Bundle | str | os.PathLike[str], *, provider: str = "cpu", threads: int | None = None) -> "Session":
    """Load a bundle (opened, or the path of its folder) onto `provider`, "cpu" or "cuda".

    `threads` defaults to the physical cores that this process may use. Contents are not hashed here: call
    `Bundle.check_hashes` after a copy or download. The weights are memory-mapped: never write into the files of a
    bundle in use; replace it with a new folder.

    Raises: BundleError, ProviderError (never another device instead), InputError for `threads`.
    """
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    graph = opened.manifest.graph(FULL_SEQUENCE)
    check_full_sequence(graph, opened.manifest.vocab_size)
    inference = create_inference_session(opened.file(graph.file), provider, thread_count(threads))
    check_signature(inference, graph)
    return Session(opened, provider, graph, inference)


class Session:
    """A loaded model; made by `load`. Logits depend on the arguments alone: a session keeps no state between calls."""

    def __init__(
        self, bundle: Bundle, provider: str, graph: GraphSpec, inference: "onnxruntime.InferenceSession"
    ) -> None:
        self.bundle = bundle
        self.provider = provider
        self._inference = inference
        self._tokens = graph.input(Role.TOKENS)
        self._logits = graph.output(Role.LOGITS)

    @property
    def manifest(self) -> Manifest:
        """The bundle's manifest."""
        return self.bundle.manifest

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The bundle's tokenizer, read on first use. Raises: TokenizerError where the bundle has none."""
        name = self.manifest.tokenizer
        if name is None:
            raise TokenizerError(
                f"{self.bundle.path}: this bundle has no tokenizer; give token ids to Session.logits or generate, "
                f"or export it again with a tokenizer"
            )
        return Tokenizer.from_file(self.bundle.file(name))

    def logits(self, input_ids: npt.ArrayLike) -> npt.NDArray[np.float32]:
        """Logits (B, T, V) of integer token ids (B, T), or of one row (T,) as a batch of one.

        Raises: InputError for ids that the model cannot take, CosmosRuntimeError where the computation fails.
        """
        ids = token_batch(
            input_ids,
            vocab_size=self.manifest.vocab_size,
            max_sequence_length=self.manifest.max_sequence_length,
        )
        check_fixed_axes(ids, self._tokens)
        logits = self._run([self._logits.name], {self._tokens.name: ids})[0]
        self._check_shape(logits, ids)
        return logits.astype(np.float32, copy=False)

    def _run(self, outputs: list[str], feeds: dict[str, npt.NDArray[Any]]) -> list[Floats]:
        try:
            return list(self._inference.run(outputs, feeds))
        except Exception as error:  # ONNX Runtime's errors have no common base class
            raise CosmosRuntimeError(f"{self.bundle.path}: ONNX Runtime failed: {first_line(error)}") from error

    def _check_shape(self, logits: Floats, ids: TokenIds) -> None:
        expected = (*ids.shape, self.manifest.vocab_size)
        if logits.shape != expected:
            raise BundleError(
                f"{self.bundle.path}: expected logits of shape {expected}, got {logits.shape}; export the bundle again"
            )
