"""How fast decoding could be: bytes that a token must read, over the bandwidth at which memory can be read."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.process import POOLS

BUFFER_BYTES = 1 << 30
REPEATS = 5
# A row of these is read per token, not the table: embeddings, rotary cosines and sines, by position of the input.
_ROW_INPUTS = {
    "Gather": {0},
    "GatherBlockQuantized": {0, 2, 3},
    "GroupQueryAttention": {7, 8},
    "RotaryEmbedding": {2, 3},
}

# Several ways to read a large buffer on all threads; the fastest of them counts.
_READ = """
import json, sys, time, torch
size, repeats, threads = map(int, sys.argv[1:])
torch.set_num_threads(threads)
x = torch.ones(size // 4)
m, v = x.view(-1, 4096), torch.ones(4096)
ways = [x.sum, x.amax, lambda: torch.dot(x, x), lambda: torch.mv(m, v)]
def seconds(way):
    start = time.perf_counter(); way(); return time.perf_counter() - start
for way in ways: way()
print(json.dumps(size / min(seconds(way) for _ in range(repeats) for way in ways)))
"""


def read_bandwidth(threads: int) -> float:
    """Bytes a second, the best of five readings of 1 GiB; in a process of its own, so that the memory goes back."""
    command = [sys.executable, "-c", _READ, str(BUFFER_BYTES), str(REPEATS), str(threads)]
    environment = {**os.environ, **dict.fromkeys(POOLS, str(threads))}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout))


def weight_bytes(bundle: Path) -> int:
    """Bytes of a bundle's weights that one token reads: those that a product or a norm uses, each once."""
    import onnx

    manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    model = onnx.load(bundle / manifest["graphs"]["decoder"]["file"], load_external_data=False)
    used = {
        name
        for node in model.graph.node
        for position, name in enumerate(node.input)
        if position not in _ROW_INPUTS.get(node.op_type, ())
    }
    return sum(_bytes(tensor) for tensor in model.graph.initializer if tensor.name in used)


def _bytes(tensor: Any) -> int:
    import onnx

    bits = {onnx.TensorProto.UINT4: 4, onnx.TensorProto.INT4: 4}.get(tensor.data_type)
    if bits is None:
        bits = 8 * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    return math.prod(tensor.dims) * bits // 8


def cache_bytes(bundle: Path, positions: int) -> int:
    """Bytes of keys and values that a token reads behind `positions` others."""
    manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    model, sizes = manifest["model"], {"float32": 4, "float16": 2, "int8": 1, "uint8": 1}
    caches = [t for t in manifest["graphs"]["decoder"]["inputs"] if t["role"] in ("past_key", "past_value")]
    return sum(positions * model["n_kv_heads"] * model["head_dim"] * sizes[t["dtype"]] for t in caches)


def limits(bundle: Path, bandwidth: float, positions: int) -> dict[str, float]:
    """The limit in tok/s at a context of `positions`, and what it is made of."""
    weights, cache = weight_bytes(bundle), cache_bytes(bundle, positions)
    return {
        "positions": positions,
        "weight_bytes": weights,
        "cache_bytes": cache,
        "limit_tok_s": bandwidth / (weights + cache),
        "limit_tok_s_weights_alone": bandwidth / weights,
    }
