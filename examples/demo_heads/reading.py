"""How the heads that text is read through are trained: reasoning, memory, and the fusion of all capabilities.

    B  batch    T  sequence    N  B * T calls, or rows    D  dim    V  vocab_size    k  entries read

The backbone is frozen. The vectors that it gives for a window are, one position after the other, what the heads see in
a sequence of calls; only the working memory reads other positions than its own, and `bank_readings` does that for all
calls at once. The plain decoder is the teacher: whatever set of capabilities runs, the vector that comes out should
predict what the plain one does.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cosmos_export.model import CosmosAdvancedModel
from cosmos_export.model.capabilities.memory import MemorySystem
from cosmos_export.model.capabilities.reasoning import ReasoningEngine
from cosmos_export.model.capabilities.working_memory import WorkingMemory

from .predictions import divergence
from .texts import Corpus

WINDOWS = 2  # of max_sequence_length tokens, in one step
BROKEN = 0.15  # share of windows that are not ordinary text
SLOT_KEPT = 0.75  # how often the slot of a capability holds what the capability gives, and not the representation
MODES = {"cot": 0.5, "tot": 0.25, "self_consistency": 0.25}  # how often a step trains each mode of reasoning
EXTENDED = 0.2  # how often the chain of thoughts follows it
SLOT_LOSS = 0.1  # weight of how well a slot reads by itself: what it holds is then in the plain vector's language


class Calls(NamedTuple):
    """What is known of the calls of a step, one row a call: the vectors and queries (N, D), the plain decoder's logits
    (N, V), the next tokens (N,), the kind (N,) of their text, and how surprising (N,) the token just read was: the
    probability that it did not have."""

    vectors: Tensor
    query: Tensor
    plain: Tensor
    targets: Tensor
    kinds: Tensor
    surprise: Tensor


@torch.no_grad()
def random_calls(model: CosmosAdvancedModel, corpus: Corpus) -> tuple[Tensor, Calls]:
    """The vectors of random windows, (B, T, D), and what is known of them."""
    windows = corpus.windows(WINDOWS, model.config.max_sequence_length, BROKEN)
    hidden = model.hidden_states(windows.inputs)
    plain = model.logits(hidden)  # (B, T, V)
    expected = plain[:, :-1].softmax(-1).gather(-1, windows.inputs[:, 1:, None]).squeeze(-1)  # (B, T - 1)
    surprise = 1.0 - F.pad(expected, (1, 0))
    query = hidden[:, :1].expand_as(hidden)
    kinds = windows.kinds[:, None].expand_as(windows.inputs)
    return hidden, Calls(*(t.flatten(0, 1) for t in (hidden, query, plain, windows.targets, kinds, surprise)))


def reading_losses(model: CosmosAdvancedModel, hidden: Tensor, calls: Calls) -> tuple[dict[str, Tensor], Tensor]:
    """Losses by name, and the vectors (N, D) that the fusion gave."""
    first_call = torch.randint(hidden.shape[1] // 2, (len(hidden),))
    vectors, memory = calls.vectors, memory_vectors(model.memory_system, hidden, first_call)
    reasoning = reasoning_vectors(model.reasoning_engine, vectors)
    with torch.no_grad():
        safety, _ = model.safety_system.eval()(vectors)
    slots = {"reasoning": reasoning, "memory": memory, "safety": safety}
    fused = model.capability_fusion(vectors, **{name: sometimes(slot, vectors) for name, slot in slots.items()})
    alone = {name: SLOT_LOSS * divergence(model, calls.plain, slots[name]) for name in ("reasoning", "memory")}
    return {"fused": divergence(model, calls.plain, fused), **alone}, fused


def sometimes(vectors: Tensor, otherwise: Tensor) -> Tensor:
    """Row by row, `vectors` (N, D) or, as when its capability is off, `otherwise`."""
    return torch.where(torch.rand(len(vectors), 1) < SLOT_KEPT, vectors, otherwise)


def reasoning_vectors(engine: ReasoningEngine, vectors: Tensor) -> Tensor:
    """The vectors (N, D) of one of the modes, drawn by chance."""
    mode = list(MODES)[int(torch.multinomial(torch.tensor(list(MODES.values())), 1))]
    output, _ = engine.get_submodule(mode)(vectors)
    if torch.rand(()) < EXTENDED:
        output, _ = engine.cot(output)
    return output


def memory_vectors(memory: MemorySystem, hidden: Tensor, first_call: Tensor) -> Tensor:
    """The memory head's vectors (N, D) of all calls, in the order of hidden (B, T, D)."""
    working, rows = bank_readings(memory.working_memory, hidden, first_call).flatten(0, 1), hidden.flatten(0, 1)
    memories = (working, torch.zeros_like(rows), memory.semantic_memory(rows), memory.procedural_memory(rows))
    return memory.memory_fusion(torch.cat(memories, dim=-1))


def bank_readings(memory: WorkingMemory, hidden: Tensor, first_call: Tensor) -> Tensor:
    """What the working memory gives in each call of a sequence of calls, all at once: (B, T, D) to (B, T, D).

    Row b's calls begin at position first_call[b] (B,) with an empty bank; a call reads what the calls before it stored.
    """
    queries, keys = (F.normalize(project(hidden), dim=-1) for project in (memory.query_proj, memory.key_proj))
    position = torch.arange(hidden.shape[1])
    stored = (position < position[:, None]) & (position >= first_call[:, None, None])  # (B, T, T)
    best = torch.where(stored, queries @ keys.mT, -1e4).topk(memory.entries_read, dim=-1)  # (B, T, k)
    found = memory.value_proj(hidden)[torch.arange(len(hidden))[:, None, None], best.indices]  # (B, T, k, D)
    remembered = (best.values.softmax(-1)[..., None] * found).sum(2)
    return torch.where(stored.any(-1, keepdim=True), remembered, 0.0)
