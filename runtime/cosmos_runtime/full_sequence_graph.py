"""The graph of role `full_sequence`: token ids (B, T) in, logits (B, T, V) of all of them out, nothing remembered."""

from typing import TYPE_CHECKING

from cosmos_runtime.arrays import Floats, TokenIds
from cosmos_runtime.bundle import Bundle
from cosmos_runtime.errors import BundleError, CosmosRuntimeError, first_line
from cosmos_runtime.manifest import GraphSpec, Role

if TYPE_CHECKING:
    import onnxruntime


class FullSequenceGraph:
    """A loaded full-sequence graph."""

    def __init__(self, inference: "onnxruntime.InferenceSession", spec: GraphSpec, bundle: Bundle) -> None:
        self.spec = spec
        self._inference, self._bundle = inference, bundle

    def all_logits(self, ids: TokenIds) -> Floats:
        """Logits (B, T, V) of every position of ids (B, T)."""
        wanted, feeds = [self.spec.output(Role.LOGITS).name], {self.spec.input(Role.TOKENS).name: ids}
        try:
            logits: Floats = self._inference.run(wanted, feeds)[0]
        except Exception as error:  # ONNX Runtime's errors have no common base class
            raise CosmosRuntimeError(f"{self._bundle.path}: ONNX Runtime failed: {first_line(error)}") from error
        self._check_shape(logits, ids)
        return logits

    def _check_shape(self, logits: Floats, ids: TokenIds) -> None:
        expected = (*ids.shape, self._bundle.manifest.vocab_size)
        if logits.shape != expected:
            raise BundleError(
                f"{self._bundle.path}: expected logits of shape {expected}, got {logits.shape}; export the bundle again"
            )
