"""The soak without this project's runtime: does ONNX Runtime alone grow when many threads ask it for changing lengths?

Threads share one session of a decoder bundle's graph. Each request has caches, a binding and lengths of its own, takes
one prompt and a few steps, and drops everything. Prints one line of JSON, with readings as `soak_worker` has them.

    python -m benchmarks.soak_engine bundles/demo --callers 32
    GLIBC_TUNABLES=glibc.malloc.tcache_count=0 python -m benchmarks.soak_engine bundles/demo --callers 32
"""

from __future__ import annotations

import json
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import click
import numpy as np
import onnxruntime

from benchmarks.soak import growth
from benchmarks.soak_worker import reading, trim
from cosmos_runtime import DECODER, Bundle, Role

LONGEST_PROMPT, MOST_STEPS, EVERY = 480, 16, 50
PROMPTS_AT_ONCE = 2  # as the runtime has it with few cores: activations are what takes memory


class Engine:
    """A session that takes requests."""

    def __init__(self, bundle: Path) -> None:
        opened = Bundle.open(bundle)
        self._graph, self._vocab_size = opened.manifest.graphs[DECODER], opened.manifest.vocab_size
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.enable_mem_pattern, options.log_severity_level = False, 3
        file = opened.file(self._graph.file)
        self._session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        self._prompts = threading.BoundedSemaphore(PROMPTS_AT_ONCE)

    def request(self, number: int) -> None:
        """A prompt of some length, then some steps; the same for the same number."""
        rng = random.Random(number)
        length, steps = rng.randint(1, LONGEST_PROMPT), rng.randint(1, MOST_STEPS)
        binding, names = self._session.io_binding(), {tensor.role: tensor.name for tensor in self._graph.inputs}
        kept = self._caches(binding, length + steps)
        logits, offsets = np.zeros((1, 1, self._vocab_size), np.float32), np.zeros(1, np.int64)
        _bind(binding.bind_output, self._graph.output(Role.LOGITS).name, logits)
        _bind(binding.bind_input, names[Role.LOGIT_OFFSETS], offsets)
        ids = np.array([[rng.randrange(self._vocab_size) for _ in range(length)]])
        for step in range(steps):
            mask = np.ones((1, length + step), np.int64)
            _bind(binding.bind_input, names[Role.TOKENS], ids)
            _bind(binding.bind_input, names[Role.ATTENTION_MASK], mask)
            with self._prompts if step == 0 else nullcontext():
                self._session.run_with_iobinding(binding)
            ids = logits[0].argmax(-1, keepdims=True)
        del kept

    def _caches(self, binding: onnxruntime.IOBinding, length: int) -> list[np.ndarray]:
        found = []
        for past, present in (("PAST_KEY", "PRESENT_KEY"), ("PAST_VALUE", "PRESENT_VALUE")):
            inputs = [tensor for tensor in self._graph.inputs if tensor.role == Role[past]]
            outputs = [tensor for tensor in self._graph.outputs if tensor.role == Role[present]]
            for source, target in zip(inputs, outputs, strict=True):
                cache = np.zeros((1, source.shape[1], length, source.shape[3]), source.dtype)
                _bind(binding.bind_input, source.name, cache)
                _bind(binding.bind_output, target.name, cache)
                found.append(cache)
        return found


def _bind(bind: object, name: str, array: np.ndarray) -> None:
    bind(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)  # type: ignore[operator]


@click.command(help=(__doc__ or "").partition("\n")[0])
@click.argument("bundle", type=click.Path(path_type=Path, exists=True))
@click.option("--generations", type=click.IntRange(min=200), default=1000, show_default=True)
@click.option("--callers", type=click.IntRange(min=1), default=32, show_default=True, help="Threads that ask.")
def main(bundle: Path, generations: int, callers: int) -> None:
    engine, readings = Engine(bundle), [reading(0)]
    with ThreadPoolExecutor(callers) as pool:
        for start in range(0, generations, EVERY):
            list(pool.map(engine.request, range(start, start + EVERY)))
            readings.append(reading(start + EVERY))
    trim()
    slope, error = growth(readings, "allocated")
    result = {"callers": callers, "growth_a_1000": round(slope), "error": round(error)}
    click.echo(json.dumps({**result, "trimmed": reading(generations), "readings": readings}))


if __name__ == "__main__":
    main()
