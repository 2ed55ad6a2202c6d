"""Continues rows of token ids with a bundle's program, in a process where this project's packages cannot be imported.

    python torch_alone.py BUNDLE GRAPH NEW_TOKENS < batches.json > tokens.json

`batches.json` is a list of batches, each a list of rows of ids; what is printed has the new tokens of every row. Rows
of a whole-sequence program must be of one length. Everything that it knows of the program is in `manifest.json`.

B  batch    T  new tokens    N  tokens in all    n  wanted positions    V  vocabulary
"""

import json
import sys
import warnings
from collections.abc import Callable
from importlib import import_module
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import Any

BLOCKED = ("cosmos_export", "cosmos_runtime")


class Blocker(MetaPathFinder):
    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> None:
        if fullname.partition(".")[0] in BLOCKED:
            raise ImportError(f"{fullname} is blocked")


sys.meta_path.insert(0, Blocker())
# What PyTorch says of TorchScript at every use of it.
warnings.filterwarnings("ignore", message=r".*`torch\.jit\.\w+` is (deprecated|not supported)")

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

Program = Callable[..., Tensor | tuple[Tensor, ...]]
CACHE = {"past_key", "past_value", "present_key", "present_value"}


def check_blocked() -> None:
    for name in BLOCKED:
        try:
            import_module(name)
        except ImportError:
            continue
        raise AssertionError(f"{name} can be imported")


def load(file: Path) -> Program:
    program: Program = torch.export.load(file).module() if file.suffix == ".pt2" else torch.jit.load(file)
    return program


def call(program: Program, graph: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The results by name. The cache is one argument, a list, where its first tensor stands; it does not come back."""
    arguments: list[Tensor | list[Tensor]] = []
    cache: list[Tensor] = []
    for tensor in graph["inputs"]:
        if tensor["role"] not in CACHE:
            arguments.append(inputs[tensor["name"]])
            continue
        if not cache:
            arguments.append(cache)
        cache.append(inputs[tensor["name"]])
    returned = program(*arguments)
    names = [tensor["name"] for tensor in graph["outputs"] if tensor["role"] not in CACHE]
    return dict(zip(names, (returned,) if isinstance(returned, Tensor) else returned, strict=True))


def zeros(graph: dict[str, Any], sizes: dict[str, int]) -> dict[str, Tensor]:
    """What is kept from call to call, before the first one: the cache, and the state of capability heads."""
    kept = [tensor for tensor in graph["inputs"] if tensor["role"].startswith(("past_", "memory_"))]
    return {
        tensor["name"]: torch.zeros(
            [sizes.get(axis, axis) for axis in tensor["shape"]], dtype=getattr(torch, tensor["dtype"])
        )
        for tensor in kept
    }


def keep(graph: dict[str, Any], state: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    """Puts the state after a call in the place of the one before it, and counts the call."""
    presents = {tensor["role"]: tensor["name"] for tensor in graph["outputs"]}
    for tensor in graph["inputs"]:
        if tensor["role"] == "memory_calls":
            state[tensor["name"]] += 1
        elif tensor["role"].startswith("past_") and tensor["role"] not in CACHE:
            state[tensor["name"]] = found[presents[tensor["role"].replace("past_", "present_")]]


def with_cache(
    program: Program, graph: dict[str, Any], state: dict[str, Tensor], rows: list[list[int]], count: int
) -> Tensor:
    """(B, count): a prefill of rows of any lengths, then one token a row and call."""
    lengths = torch.tensor([len(row) for row in rows])
    ids = torch.zeros(len(rows), int(lengths.max()), dtype=torch.int64)  # (B, T), padding on the right
    for row, tokens in enumerate(rows):
        ids[row, : len(tokens)] = torch.tensor(tokens)
    offsets, ends_call, chosen = torch.tensor([0]), torch.tensor([True]), []
    for _ in range(count):
        mask = (torch.arange(int(lengths.max())) < lengths[:, None]).to(torch.int64)  # (B, N)
        told = {"input_ids": ids, "attention_mask": mask, "logit_offsets": offsets, "ends_call": ends_call}
        found = call(program, graph, {**told, **state})
        keep(graph, state, found)
        ids = found["logits"][:, 0].argmax(-1, keepdim=True)
        lengths = lengths + 1
        chosen.append(ids)
    return torch.cat(chosen, 1)


def whole_sequences(
    program: Program, graph: dict[str, Any], state: dict[str, Tensor], rows: list[list[int]], count: int
) -> Tensor:
    """(B, count): the whole sequence again for every token."""
    ids = torch.tensor(rows)
    for _ in range(count):
        found = call(program, graph, {"input_ids": ids, **state})
        keep(graph, state, found)
        ids = torch.cat([ids, found["logits"][:, -1].argmax(-1, keepdim=True)], 1)
    return ids[:, -count:]


def main(folder: Path, name: str, count: int) -> None:
    check_blocked()
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    graph = manifest["graphs"][name]
    program = load(folder / graph["file"])
    slots = ((manifest.get("capabilities") or {}).get("memory") or {}).get("size", 0)
    continued = []
    with torch.inference_mode():
        for rows in json.load(sys.stdin):
            sizes = {"batch": len(rows), "cache_length": max(map(len, rows)) + count, "memory_slots": slots}
            run = with_cache if name == "decoder" else whole_sequences
            continued.append(run(program, graph, zeros(graph, sizes), rows, count).tolist())
    assert not any(module.partition(".")[0] in BLOCKED for module in sys.modules)
    print(json.dumps(continued))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
