"""What a bundle with capability heads must equal: the eager model in float64, call by call.

B  batch    T  sequence    M  slots of the working memory    D  dim    V  vocab_size    k  entries that are read
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from cosmos_export.checkpoint import Checkpoint
from cosmos_export.model.capabilities import MemoryState, entries_read
from cosmos_export.model.capabilities.fusion import vectors_at
from cosmos_export.model.capabilities.working_memory import WorkingMemory
from cosmos_export.model.cosmos import CosmosAdvancedModel
from cosmos_export.model.loading import load_model
from cosmos_export.onnx.weights import WeightReader
from cosmos_export.parity.calls import CallSequence, Found
from cosmos_export.parity.gates import Arithmetic
from cosmos_export.parity.reference import rounded_activations
from cosmos_export.recipe import ExportRecipe


@dataclass(frozen=True)
class Choice:
    """Similarities (B, M) of the working memory's entries in one call; minus infinity where there is none."""

    similarities: NDArray[np.floating]
    read: int

    @property
    def lead(self) -> NDArray[np.floating]:
        """How far the least similar entry that is read is ahead of the next one (B,); infinite where all are read."""
        if self.similarities.shape[1] <= self.read:
            return np.full(len(self.similarities), np.inf)
        ordered = -np.sort(-self.similarities, axis=1)
        last, next_ = ordered[:, self.read - 1], ordered[:, self.read]
        return np.where(np.isinf(next_), np.inf, last - np.where(np.isinf(next_), 0, next_))

    def error_of(self, other: Choice, row: int) -> float:
        """The largest difference of a row's similarities."""
        there = np.isfinite(self.similarities[row])
        return float(np.abs(self.similarities[row][there] - other.similarities[row][there]).max(initial=0.0))

    def same_entries(self, other: Choice) -> NDArray[np.bool_]:
        """Rows (B,) in which the other choice reads the same entries."""
        mine, theirs = (np.sort(np.argsort(-c.similarities, axis=1)[:, : self.read], axis=1) for c in (self, other))
        return (mine == theirs).all(axis=1) | np.isinf(self.lead)


@dataclass(frozen=True)
class Expected:
    """What the model makes of a call, and, with a working memory, what it chose from."""

    found: Found
    choice: Choice | None


class HeadsReference:
    """The eager model of a checkpoint with some capabilities, in float64 and in the arithmetic of a bundle.

    Its weights are those that a bundle of `recipe` computes with.
    """

    def __init__(
        self, checkpoint: Checkpoint, recipe: ExportRecipe, capabilities: Sequence[str], *, causal: bool = True
    ) -> None:
        self._recipe = recipe
        dtypes = {"exact": torch.float64, "eager": torch.float32}
        if recipe.activations != "float32":
            dtypes["half"] = getattr(torch, recipe.activations)
        self._models = {
            name: load_computed(checkpoint, recipe, capabilities, causal=causal, dtype=dtype)
            for name, dtype in dtypes.items()
        }

    def exact(self, sequence: CallSequence) -> list[Expected]:
        """Every call of a sequence, all arithmetic in float64."""
        return run_calls(self._models["exact"], sequence)

    def eager(self, sequence: CallSequence, arithmetic: Arithmetic) -> list[Expected]:
        """Every call of a sequence as PyTorch computes it in that arithmetic; int8 activations in float32."""
        if arithmetic is Arithmetic.FLOAT32:
            return run_calls(self._models["eager"], sequence)
        if arithmetic is not Arithmetic.INT8_ACTIVATIONS:
            return run_calls(self._models["half"], sequence)
        with rounded_activations(self._models["eager"], self._recipe):
            return run_calls(self._models["eager"], sequence)


def load_computed(
    checkpoint: Checkpoint, recipe: ExportRecipe, capabilities: Sequence[str], *, causal: bool, dtype: torch.dtype
) -> CosmosAdvancedModel:
    """The eager model with the weights that a bundle of `recipe` computes with: rounded where the recipe rounds."""
    model = load_model(checkpoint, causal=causal, dtype=dtype, capabilities=capabilities)
    reader = WeightReader(checkpoint, recipe)
    for name, tensor in _stored_tensors(model):
        rounded = recipe.form_of(name) is not None or recipe.rounds_rows(name)
        if recipe.activations != "float32" or rounded:
            tensor.data = reader.effective(name).to(dtype)  # a new tensor: the old one may be the checkpoint's own
    return model


def _stored_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Tensors that a graph holds under the same names, though those that only go into a table are among them."""
    yield from model.named_parameters()
    for name, buffer in model.named_buffers():
        if not name.startswith("rope."):
            yield name, buffer


@torch.inference_mode()
def run_calls(model: CosmosAdvancedModel, sequence: CallSequence) -> list[Expected]:
    """Every call of a sequence, as the eager model computes it."""
    ids = torch.from_numpy(sequence.case.input_ids)
    hidden = model.hidden_states(ids) if model.causal else None  # what comes later changes nothing before
    state = _first_state(model, sequence)
    calls = []
    for ends in sequence.ends:
        longest = max(ends)
        seen = hidden[:, :longest] if hidden is not None else model.hidden_states(ids[:, :longest])
        expected, state = _call(model, seen, torch.tensor(ends) - 1, state, sequence.all_positions)
        calls.append(expected)
    return calls


def _call(
    model: CosmosAdvancedModel, hidden: Tensor, last: Tensor, state: MemoryState | None, all_positions: bool
) -> tuple[Expected, MemoryState | None]:
    with _watched_memory(model) as chosen:
        enhanced = model.enhance(vectors_at(hidden, last), hidden[:, 0], model.capabilities, state)
    placed = enhanced.placed(hidden, last)
    logits = model.logits(placed if all_positions else vectors_at(placed, last)[:, None])
    scores = {name: tensor.numpy() for name, tensor in enhanced.scores.items()}
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return Expected(Found(logits.numpy(), scores), chosen[0] if chosen else None), enhanced.memory


def _first_state(model: CosmosAdvancedModel, sequence: CallSequence) -> MemoryState | None:
    if "memory" not in model.capabilities:
        return None
    batch, before = len(sequence.case.input_ids), sequence.before
    if before is None:
        return model.new_memory(batch, capacity=len(sequence.ends)).state
    dtype = model.tok_embeddings.weight.dtype
    keys, values = (torch.from_numpy(tensor).to(dtype) for tensor in (before.keys, before.values))
    return MemoryState(keys, values, torch.full((batch,), before.calls))


@contextlib.contextmanager
def _watched_memory(model: CosmosAdvancedModel) -> Iterator[list[Choice]]:
    """Within it, what the working memory chooses from is noted."""
    chosen: list[Choice] = []
    if "memory" not in model.capabilities or not entries_read(model.config.memory.working_memory_size):
        yield chosen
        return
    memory = model.memory_system.working_memory

    def note(module: nn.Module, inputs: tuple[Tensor, MemoryState], output: object) -> None:
        chosen.append(choice_of(memory, *inputs))

    handle = memory.register_forward_hook(note)
    try:
        yield chosen
    finally:
        handle.remove()


def choice_of(memory: WorkingMemory, x: Tensor, state: MemoryState) -> Choice:
    """What a working memory chooses from for x (B, D)."""
    query = F.normalize(memory.query_proj(x).double(), dim=-1)
    similarities = (state.keys.double() @ query[..., None]).squeeze(-1)
    filled = torch.arange(state.keys.shape[1]) < state.calls[:, None]
    return Choice(torch.where(filled, similarities, float("-inf")).numpy(), memory.entries_read)
