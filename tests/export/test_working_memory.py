"""The bank of earlier calls: a ring of any number of slots, per row, without entries and with too many."""

from typing import Any

import pytest
import torch
from torch import Tensor

from cosmos_export.errors import ConfigError
from cosmos_export.model.capabilities.working_memory import MemoryBank, MemoryState, WorkingMemory, entries_read

from .capability_models import random_vectors

DIM, SIZE = 12, 8


@pytest.fixture
def memory() -> WorkingMemory:
    torch.manual_seed(0)
    return WorkingMemory(DIM, SIZE).double().requires_grad_(False)


def empty(batch: int, capacity: int = SIZE) -> MemoryState:
    return MemoryBank.empty(batch, capacity, DIM, dtype=torch.float64, device=torch.device("cpu")).state


def in_turn(memory: WorkingMemory, inputs: list[Tensor], state: MemoryState) -> tuple[list[Tensor], MemoryState]:
    outputs = []
    for x in inputs:
        output, state = memory(x, state)
        outputs.append(output)
    return outputs, state


def recalled(memory: WorkingMemory, x: Tensor, stored: list[Tensor]) -> Tensor:
    """What `x` (D,) recalls from the inputs that are stored, as the reference says it."""
    similarity = torch.stack([torch.cosine_similarity(memory.query_proj(x), memory.key_proj(y), dim=0) for y in stored])
    best = similarity.topk(min(5, len(stored)))
    return best.values.softmax(0) @ torch.stack([memory.value_proj(stored[i]) for i in best.indices.tolist()])


def test_an_empty_bank_gives_zeros(memory: WorkingMemory) -> None:
    output, state = memory(random_vectors(3, DIM, 0), empty(3))
    assert torch.equal(output, torch.zeros(3, DIM, dtype=torch.float64))
    assert state.calls.tolist() == [1, 1, 1]


def test_fewer_entries_than_are_read_and_more_than_there_is_room_for(memory: WorkingMemory) -> None:
    """Call n recalls from the last 8 of the calls before it, whatever slot they are in."""
    inputs = [random_vectors(2, DIM, call) for call in range(21)]
    outputs, state = in_turn(memory, inputs, empty(2))
    for call, output in enumerate(outputs[1:], start=1):
        for row in range(2):
            stored = [x[row] for x in inputs[max(0, call - SIZE) : call]]
            torch.testing.assert_close(output[row], recalled(memory, inputs[call][row], stored))
    assert state.calls.tolist() == [21, 21]


def test_the_oldest_entry_is_the_one_that_is_lost(memory: WorkingMemory) -> None:
    inputs = [random_vectors(1, DIM, call) for call in range(SIZE + 1)]
    _, full = in_turn(memory, inputs[:SIZE], empty(1))
    _, over = in_turn(memory, inputs[SIZE:], full)
    changed = (over.keys != full.keys).any(-1)[0].tolist()
    assert changed == [True] + [False] * (SIZE - 1)
    torch.testing.assert_close(over.values[0, 0], memory.value_proj(inputs[SIZE][0]))


@pytest.mark.parametrize("capacity", [5, 6, 8])
def test_a_sequence_of_few_calls_needs_few_slots(memory: WorkingMemory, capacity: int) -> None:
    inputs = [random_vectors(2, DIM, call) for call in range(capacity + 1)]
    few, _ = in_turn(memory, inputs, empty(2, capacity))
    many, _ = in_turn(memory, inputs, empty(2, SIZE))
    for output, expected in zip(few, many, strict=True):
        torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)


def test_rows_may_have_made_different_numbers_of_calls(memory: WorkingMemory) -> None:
    """As in a batch of sequences of unequal lengths: none, fewer than are read, more than there is room for."""
    states = [
        in_turn(memory, [random_vectors(1, DIM, 50 * row + c) for c in range(row)], empty(1))[1] for row in (0, 3, 11)
    ]
    joined = MemoryState(*(torch.cat(parts) for parts in zip(*states, strict=True)))
    x = random_vectors(3, DIM, 1000)
    together, after = memory(x, joined)
    for row, state in enumerate(states):
        alone, its_after = memory(x[row : row + 1], state)
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-12, atol=1e-12)
        for mine, its in zip(after, its_after, strict=True):
            torch.testing.assert_close(mine[row : row + 1], its, rtol=1e-12, atol=1e-12)


def test_what_lies_in_unwritten_slots_does_not_matter(memory: WorkingMemory) -> None:
    state = empty(2)
    dirty = MemoryState(torch.full_like(state.keys, 3.0), torch.full_like(state.values, -7.0), state.calls)
    inputs = [random_vectors(2, DIM, call) for call in range(4)]
    clean_outputs, _ = in_turn(memory, inputs, state)
    dirty_outputs, _ = in_turn(memory, inputs, dirty)
    for output, expected in zip(dirty_outputs, clean_outputs, strict=True):
        assert torch.equal(output, expected)


def test_keys_and_queries_of_length_zero_are_no_division_by_zero(memory: WorkingMemory) -> None:
    for layer in (memory.key_proj, memory.query_proj):
        layer.weight.zero_()
        layer.bias.zero_()
    inputs = [random_vectors(1, DIM, call) for call in range(3)]
    outputs, _ = in_turn(memory, inputs, empty(1))
    torch.testing.assert_close(outputs[2], memory.value_proj(torch.cat(inputs[:2])).mean(0, keepdim=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_other_precisions_are_close(memory: WorkingMemory, dtype: torch.dtype) -> None:
    inputs = [random_vectors(2, DIM, call) for call in range(12)]
    wanted, _ = in_turn(memory, inputs, empty(2))
    state = MemoryState(*(t.to(dtype) if t.is_floating_point() else t for t in empty(2)))
    outputs, after = in_turn(memory.to(dtype), [x.to(dtype) for x in inputs], state)
    assert after.keys.dtype == after.values.dtype == dtype
    # Both calls read all there is, so no near tie decides what is read.
    for call in (1, 4):
        torch.testing.assert_close(outputs[call].double(), wanted[call], rtol=0, atol=30 * torch.finfo(dtype).eps)


def test_a_working_memory_of_size_zero_remembers_nothing() -> None:
    memory = WorkingMemory(DIM, 0)
    state = MemoryBank.empty(2, 0, DIM, dtype=torch.float32, device=torch.device("cpu")).state
    for call in range(3):
        output, state = memory(random_vectors(2, DIM, call).float(), state)
        assert not output.any()
    assert state.calls.tolist() == [3, 3]
    assert state.keys.shape == (2, 0, DIM)


@pytest.mark.parametrize(("size", "read"), [(0, 0), (1, 1), (4, 4), (5, 5), (2048, 5)])
def test_five_entries_are_read_or_all(size: int, read: int) -> None:
    assert entries_read(size) == read


def test_calls_along_rows_are_the_calls_one_after_another() -> None:
    torch.manual_seed(0)
    memory, rows, calls = WorkingMemory(8, 100).double(), 3, 9
    x = torch.randn(rows, calls, 8, dtype=torch.float64)
    state = MemoryBank.empty(rows, calls, 8, dtype=x.dtype, device=x.device).state
    expected = []
    for call in range(calls):
        found, state = memory(x[:, call], state)
        expected.append(found)
    torch.testing.assert_close(memory.along_rows(x), torch.stack(expected, dim=1), rtol=1e-12, atol=1e-12)


STATE = MemoryState(torch.zeros(2, 5, DIM), torch.zeros(2, 5, DIM), torch.zeros(2, dtype=torch.int64))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"keys": torch.zeros(2, DIM)}, r"keys and values \(B, M, D\) and calls \(B,\), got shapes \(2, 12\)"),
        ({"values": torch.zeros(2, 6, DIM)}, r"got shapes .*\(2, 6, 12\)"),
        ({"calls": torch.zeros(3, dtype=torch.int64)}, r"and \(3,\)"),
        ({"calls": torch.zeros(2)}, "calls in int64"),
        ({"values": torch.zeros(2, 5, DIM, dtype=torch.float64)}, "of one type"),
        ({"values": torch.zeros(2, 5, DIM, device="meta")}, "on meta"),
        ({"calls": [0, 0]}, "a MemoryState of three tensors, got Tensor, Tensor, list"),
    ],
)
def test_a_state_whose_tensors_do_not_belong_together(changes: dict[str, Any], words: str) -> None:
    MemoryBank(STATE)
    with pytest.raises(ConfigError, match=f"memory: expected .*{words}"):
        MemoryBank(STATE._replace(**changes))


@pytest.mark.parametrize("batch", [10**12, 2**70])
def test_more_rows_than_there_is_room_for(batch: int) -> None:
    with pytest.raises(ConfigError, match=r"memory: no room for \d+ rows of 8 entries of dim 12: .*ask for fewer rows"):
        empty(batch)


@pytest.mark.parametrize(("batch", "capacity"), [(0, 5), (-1, 5), (2, -1)])
def test_no_rows_and_less_than_no_entries(batch: int, capacity: int) -> None:
    with pytest.raises(ConfigError, match="expected at least one row and no negative capacity"):
        empty(batch, capacity)
