"""The graph of role `full_sequence`: token ids (B, T) in, logits (B, T, V) of all of them out. Nothing is remembered,
but by capability heads what they keep from call to call."""

import threading

import numpy as np

from cosmos_runtime.arrays import Floats, TokenIds
from cosmos_runtime.binding import LoadedGraph
from cosmos_runtime.bundle import Bundle
from cosmos_runtime.device_stream import HostStream, Stream
from cosmos_runtime.heads import Diagnosis, HeadBinding, MemoryBank, has_heads
from cosmos_runtime.manifest import GraphSpec, Role


class FullSequenceGraph:
    """A loaded full-sequence graph, of which `at_once` runs are computed at a time."""

    def __init__(
        self, loaded: LoadedGraph, spec: GraphSpec, bundle: Bundle, stream: Stream | None = None, *, at_once: int = 2
    ) -> None:
        self._long_runs = threading.BoundedSemaphore(at_once)
        self.spec, self.stream = spec, stream or HostStream()
        self._loaded, self._bundle = loaded, bundle

    def all_logits(self, ids: TokenIds) -> Floats:
        """Logits (B, T, V) of every position of ids (B, T), with a memory of one call."""
        return self.call(ids, self.new_memory(len(ids), calls=1))[0]

    def new_memory(self, batch: int, calls: int | None = None) -> MemoryBank | None:
        """As in `DecoderGraph`."""
        manifest = self._bundle.manifest
        return MemoryBank(self.spec, manifest, batch, calls, self.stream) if has_heads(manifest) else None

    def call(self, ids: TokenIds, bank: MemoryBank | None) -> tuple[Floats, list[Diagnosis]]:
        """Logits (B, T, V) of every position of ids (B, T), and what the heads found of each row; `bank` has the calls
        before."""
        binding = self._loaded.new_binding(str(self._bundle.path))
        logits = np.empty((*ids.shape, self._bundle.manifest.vocab_size), self.spec.output(Role.LOGITS).dtype)
        binding.bind_input(self.spec.input(Role.TOKENS).name, ids)
        binding.bind_output(self.spec.output(Role.LOGITS).name, logits)
        if bank is None:
            with self._long_runs:
                binding.run()
            return logits, []
        heads = HeadBinding(self.spec, self._bundle.manifest, binding, bank, slice(0, len(ids)))
        heads.prepare(self.stream)
        with self._long_runs:
            binding.run()
        heads.done()
        return logits, [heads.diagnosis(row) for row in range(len(ids))]
