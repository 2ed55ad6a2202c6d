"""The graph of role `full_sequence`: token ids (B, T) in, logits (B, T, V) of all of them out. Nothing is remembered,
but by capability heads what they keep from call to call."""

from typing import TYPE_CHECKING

import numpy as np

from cosmos_runtime.arrays import Floats, TokenIds
from cosmos_runtime.binding import GraphBinding
from cosmos_runtime.bundle import Bundle
from cosmos_runtime.device_stream import HostStream, Stream
from cosmos_runtime.errors import BundleError, CosmosRuntimeError, first_line
from cosmos_runtime.heads import Diagnosis, HeadBinding, MemoryBank, has_heads
from cosmos_runtime.manifest import GraphSpec, Role

if TYPE_CHECKING:
    import onnxruntime


class FullSequenceGraph:
    """A loaded full-sequence graph."""

    def __init__(
        self, inference: "onnxruntime.InferenceSession", spec: GraphSpec, bundle: Bundle, stream: Stream | None = None
    ) -> None:
        self.spec, self.stream = spec, stream or HostStream()
        self._inference, self._bundle = inference, bundle

    def all_logits(self, ids: TokenIds) -> Floats:
        """Logits (B, T, V) of every position of ids (B, T), with a memory of one call."""
        bank = self.new_memory(len(ids), calls=1)
        return self._logits(ids) if bank is None else self.call(ids, bank)[0]

    def new_memory(self, batch: int, calls: int | None = None) -> MemoryBank | None:
        """As in `DecoderGraph`."""
        manifest = self._bundle.manifest
        return MemoryBank(self.spec, manifest, batch, calls, self.stream) if has_heads(manifest) else None

    def call(self, ids: TokenIds, bank: MemoryBank | None) -> tuple[Floats, list[Diagnosis]]:
        """Logits (B, T, V) of every position of ids (B, T), and what the heads found of each row; `bank` has the calls
        before."""
        if bank is None:
            return self._logits(ids), []
        binding, rows = GraphBinding(self._inference, str(self._bundle.path)), slice(0, len(ids))
        logits = np.empty((*ids.shape, self._bundle.manifest.vocab_size), self.spec.output(Role.LOGITS).dtype)
        binding.bind_input(self.spec.input(Role.TOKENS).name, ids)
        binding.bind_output(self.spec.output(Role.LOGITS).name, logits)
        heads = HeadBinding(self.spec, self._bundle.manifest, binding, bank, rows)
        heads.prepare(self.stream)
        binding.run()
        heads.done()
        return logits, [heads.diagnosis(row) for row in range(len(ids))]

    def _logits(self, ids: TokenIds) -> Floats:
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
