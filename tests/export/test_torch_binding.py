"""Sessions' buffers bound to a program that PyTorch runs: what is read, what is written, and what is refused."""

import gc
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cosmos_export.config import CosmosAdvancedConfig
from cosmos_export.onnx.signature import graph_spec
from cosmos_export.torch_programs.binding import TorchBinding, TorchGraph
from cosmos_runtime import DECODER, CosmosRuntimeError, GraphSpec, Memory

IDS, MASK = np.array([[1, 2]], np.int64), np.ones((1, 2), np.int64)


@pytest.fixture
def spec(tiny_config: CosmosAdvancedConfig) -> GraphSpec:
    return graph_spec(DECODER, tiny_config, None)


def writes_and_counts(ids: Tensor, mask: Tensor, offsets: Tensor, cache: list[Tensor]) -> Tensor:
    """Every cache tensor gets its place in the list; logits say what the arguments were."""
    for place, part in enumerate(cache):
        part += place + 1
    return torch.stack([ids.sum(), mask.sum(), offsets.sum()]).float().view(1, 1, 3)


class Cache:
    """Buffers of a session: memory that has an address and an owner."""

    def __init__(self, spec: GraphSpec, dtype: str = "float32", shape: Sequence[int] = (1, 2, 4, 16)) -> None:
        self.tensors = [torch.zeros(*shape, dtype=getattr(torch, dtype)) for _ in range(4)]
        self.pairs = list(zip(spec.inputs[3:], spec.outputs[1:], strict=True))

    def bind(self, binding: TorchBinding) -> None:
        for (past, present), tensor in zip(self.pairs, self.tensors, strict=True):
            dtype = str(tensor.dtype).removeprefix("torch.")
            place = Memory("cpu", dtype, tuple(tensor.shape), tensor.data_ptr(), owner=self)
            binding.bind_in_place(past.name, present.name, place)


def bound(spec: GraphSpec, program: Callable[..., Any], cache: Cache | None = None, logits: Any = None) -> TorchBinding:
    binding = TorchGraph(program, spec).new_binding("my bundle")
    binding.bind_input("input_ids", IDS)
    binding.bind_input("attention_mask", MASK)
    binding.bind_output("logits", np.zeros((1, 1, 3), np.float32) if logits is None else logits)
    (cache or Cache(spec)).bind(binding)
    return binding


def test_inputs_are_read_and_outputs_are_written_where_they_lie(spec: GraphSpec) -> None:
    logits, cache = np.zeros((1, 1, 3), np.float32), Cache(spec)
    binding = bound(spec, writes_and_counts, cache, logits)
    binding.bind_input("logit_offsets", np.array([1, 0]))
    binding.run()
    assert logits.tolist() == [[[3, 2, 1]]]
    assert [part.unique().tolist() for part in cache.tensors] == [[1], [2], [3], [4]]
    binding.run()
    assert [part.unique().tolist() for part in cache.tensors] == [[2], [4], [6], [8]], "what is bound stays bound"


def test_an_input_that_changes_in_its_place_is_read_anew(spec: GraphSpec) -> None:
    logits, ids = np.zeros((1, 1, 3), np.float32), np.array([[1, 2]])
    binding = bound(spec, writes_and_counts, logits=logits)
    binding.bind_input("input_ids", ids)
    binding.run()
    ids[0, 0] = 10
    binding.run()
    assert logits[0, 0, 0] == 12


def test_logit_offsets_that_are_left_out_are_the_last_position(spec: GraphSpec) -> None:
    logits = np.full((1, 1, 3), np.nan, np.float32)
    bound(spec, lambda ids, mask, offsets, cache: writes_and_counts(ids, mask, offsets + 7, cache), logits=logits).run()
    assert logits[0, 0, 2] == 7


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_memory_of_every_type_is_written_in_place(spec: GraphSpec, dtype: str) -> None:
    """numpy has no bfloat16: memory comes as an address."""
    cache = Cache(spec, dtype)
    seen = []

    def program(ids: Tensor, mask: Tensor, offsets: Tensor, parts: list[Tensor]) -> Tensor:
        seen.extend(parts)
        parts[0][0, 1, 2, 3] = 1.5
        return torch.zeros(1, 1, 3)

    bound(spec, program, cache).run()
    assert [part.dtype for part in seen] == [getattr(torch, dtype)] * 4
    assert [part.shape for part in seen] == [part.shape for part in cache.tensors]
    assert cache.tensors[0].nonzero().tolist() == [[0, 1, 2, 3]]
    assert float(cache.tensors[0][0, 1, 2, 3]) == 1.5


def test_memory_without_elements_has_its_shape(spec: GraphSpec) -> None:
    """A working memory of no entries, say; its address says nothing."""
    shapes = []

    def program(ids: Tensor, mask: Tensor, offsets: Tensor, cache: list[Tensor]) -> Tensor:
        shapes.extend(tuple(part.shape) for part in cache)
        return torch.zeros(1, 1, 3)

    bound(spec, program, Cache(spec, "bfloat16", (1, 0, 16))).run()
    assert shapes == [(1, 0, 16)] * 4


def test_memory_lives_as_long_as_it_is_bound(spec: GraphSpec) -> None:
    cache = Cache(spec)
    watched = weakref.ref(cache)
    binding = bound(spec, writes_and_counts, cache)
    del cache
    gc.collect()
    assert watched() is not None
    Cache(spec).bind(binding)
    gc.collect()
    assert watched() is None, "and no longer"


def test_results_of_another_shape_are_refused(spec: GraphSpec) -> None:
    """They would be broadcast into the buffer otherwise."""
    binding = bound(spec, lambda *_: torch.zeros(1, 1, 1))
    with pytest.raises(CosmosRuntimeError, match=r"my bundle: logits: expected shape \(1, 1, 3\).*\(1, 1, 1\)"):
        binding.run()


def test_a_failure_names_the_bundle_and_its_reason(spec: GraphSpec) -> None:
    def program(*_: object) -> Tensor:
        raise RuntimeError("Traceback of TorchScript\n  many lines\nRuntimeError: no such luck\n")

    with pytest.raises(CosmosRuntimeError, match=r"^my bundle: PyTorch failed: RuntimeError: no such luck$"):
        bound(spec, program).run()


def test_a_failure_without_words_is_named_by_its_kind(spec: GraphSpec) -> None:
    def program(*_: object) -> Tensor:
        raise AssertionError

    with pytest.raises(CosmosRuntimeError, match="PyTorch failed: AssertionError"):
        bound(spec, program).run()


def test_ctrl_c_is_no_failure_of_the_program(spec: GraphSpec) -> None:
    def program(*_: object) -> Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bound(spec, program).run()


def test_what_is_cancelled_runs_no_more(spec: GraphSpec) -> None:
    calls = []

    def program(*_: object) -> Tensor:
        calls.append(1)
        return torch.zeros(1, 1, 3)

    binding = bound(spec, program)
    binding.run()
    binding.cancel()
    for _ in range(2):
        with pytest.raises(CosmosRuntimeError, match="my bundle: cancelled"):
            binding.run()
    assert len(calls) == 1


def test_no_gradients_are_kept_and_time_is_counted(spec: GraphSpec) -> None:
    weight, seen = torch.nn.Parameter(torch.ones(3)), []

    def program(*_: object) -> Tensor:
        seen.append(torch.is_inference_mode_enabled())
        return weight.view(1, 1, 3) * 2

    binding = bound(spec, program)
    assert binding.graph_seconds == 0
    binding.run()
    first = binding.graph_seconds
    binding.run()
    assert 0 < first < binding.graph_seconds
    assert seen == [True, True]


def test_bindings_of_one_graph_do_not_meet(spec: GraphSpec) -> None:
    graph, logits = TorchGraph(writes_and_counts, spec), [np.zeros((1, 1, 3), np.float32) for _ in range(2)]
    bindings = [graph.new_binding("a"), graph.new_binding("b")]
    for n, (binding, out) in enumerate(zip(bindings, logits, strict=True)):
        binding.bind_input("input_ids", IDS * (n + 1))
        binding.bind_input("attention_mask", MASK)
        binding.bind_output("logits", out)
        Cache(spec).bind(binding)
    bindings[0].cancel()
    bindings[1].run()
    assert logits[0].tolist() == [[[0, 0, 0]]]
    assert logits[1].tolist() == [[[6, 2, 0]]]
