"""What is traced of a model with capability heads: the plain programs, with the heads behind the last hidden state.

B  batch    T  new tokens    n  wanted positions    M  slots of the memory bank    D  dim    V  vocabulary
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cosmos_export.model.backbone import CosmosBackbone
from cosmos_export.model.capabilities import MemoryState
from cosmos_export.model.cosmos import CosmosAdvancedModel, Enhanced
from cosmos_export.onnx.programs import (
    Attention,
    DecoderByLengthsProgram,
    DecoderProgram,
    FullSequenceProgram,
    pick,
)
from cosmos_runtime import DECODER, GraphSpec, Role


class HeadState:
    """The heads' state among a program's inputs, in the order of `head_signature`: memory keys and values (B, M, D) and
    calls (B,), with the memory capability; the query (B, D), with evaluation and where `keeps_query`."""

    def __init__(self, model: CosmosAdvancedModel, inputs: tuple[Tensor, ...], *, keeps_query: bool) -> None:
        rest = list(inputs)
        self.query = rest.pop() if keeps_query and "evaluation" in model.capabilities else None
        self.memory = _memory(model, rest) if "memory" in model.capabilities else None
        self._has_bank = len(rest) > 1

    def outputs(self, enhanced: Enhanced, query: Tensor | None) -> tuple[Tensor, ...]:
        """The state after a call, and its scores."""
        memory = enhanced.memory
        bank = (memory.keys, memory.values) if memory is not None and self._has_bank else ()
        return (*bank, *(() if query is None else (query,)), *enhanced.scores.values())


def _memory(model: CosmosAdvancedModel, inputs: list[Tensor]) -> MemoryState:
    if len(inputs) == 3:
        return MemoryState(*inputs)
    (calls,) = inputs
    none = model.tok_embeddings.weight.new_zeros(1, 0, model.config.dim).expand(calls.shape[0], -1, -1)
    return MemoryState(none, none, calls)


class FullSequenceHeadsProgram(nn.Module):
    """Inputs: input_ids (B, T), then the memory. Outputs: logits (B, T, V), memory, scores; one run is one call."""

    def __init__(self, model: CosmosAdvancedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        input_ids, *rest = inputs
        state = HeadState(self.model, tuple(rest), keeps_query=False)
        hidden = self.model.hidden_states(input_ids)
        enhanced = self.model.enhance(hidden[:, -1], hidden[:, 0], self.model.capabilities, state.memory)
        last = torch.full_like(input_ids[:, 0], input_ids.shape[1] - 1)
        return (self.model.logits(enhanced.placed(hidden, last)), *state.outputs(enhanced, None))


class DecoderHeadsProgram(DecoderProgram):
    """The decoder, whose row's last token has the heads behind it.

    Inputs: those of `DecoderProgram`, then ends_call (1,) bool, with `on_demand` wants_scores (1,) bool, then the
    heads' state. Outputs: logits (B, n, V), the caches, the heads' state after the call, scores. The vector of the
    heads is read at offset 0 alone; a blocked row has zero logits at every wanted position. Where `ends_call` is false
    the tokens are a piece of a call that goes on: their logits are the plain decoder's, and what comes out as memory
    and scores is for nothing.
    A row's query is its first token's hidden state, taken in the run that has it and passed on in the others.
    All scores are computed here; what `wants_scores` is for is made of the traced graph (`passes.ScoresOnDemand`).
    """

    model: CosmosAdvancedModel

    def __init__(
        self, model: CosmosAdvancedModel, *, attention: Attention = "standard", on_demand: bool = False
    ) -> None:
        super().__init__(model, attention=attention)
        self._state_from = 2 * model.config.n_layers + (2 if on_demand else 1)

    def forward(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        input_ids, attention_mask, logit_offsets, *rest = inputs
        layers = 2 * self.model.config.n_layers
        cache, ends_call, state = rest[:layers], rest[layers], tuple(rest[self._state_from :])
        attend = self._attention(input_ids, attention_mask, cache)
        hidden = self.model.hidden_states(input_ids, attend)  # (B, T, D)
        given = HeadState(self.model, state, keeps_query=True)
        query = _query(hidden, attention_mask, given.query)
        representation = pick(hidden, attention_mask, torch.zeros_like(logit_offsets[:1]))[:, 0]  # (B, D)
        no_query = representation if query is None else query  # evaluation alone reads it
        enhanced = self.model.enhance(representation, no_query, self.model.capabilities, given.memory)
        wanted = pick(hidden, attention_mask, logit_offsets)  # (B, n, D)
        wanted = _placed(enhanced, wanted, logit_offsets, ends_call)
        return (self.model.logits(wanted).to(torch.float32), *attend.cache, *given.outputs(enhanced, query))


def _query(hidden: Tensor, attention_mask: Tensor, past: Tensor | None) -> Tensor | None:
    """The query (B, D) of each row: from its first token, if that is among the new ones."""
    if past is None:
        return None
    begins = attention_mask.sum(1) <= hidden.shape[1]  # (B,)
    return torch.where(begins[:, None], hidden[:, 0], past)


def _placed(enhanced: Enhanced, wanted: Tensor, offsets: Tensor, ends_call: Tensor) -> Tensor:
    """Hidden states (B, n, D) that logits are read from."""
    replaced = (offsets == 0) & ends_call  # (n,)
    wanted = torch.where(replaced[:, None], enhanced.vector[:, None], wanted)
    if enhanced.blocked is None:
        return wanted
    return torch.where((enhanced.blocked & ends_call)[:, None, None], 0.0, wanted)


def program_of(model: CosmosBackbone, graph: str, spec: GraphSpec, attention: Attention = "standard") -> nn.Module:
    """The program of one of a recipe's graphs around a model, with or without heads; `spec` says what it is told."""
    if isinstance(model, CosmosAdvancedModel):
        if graph != DECODER:
            return FullSequenceHeadsProgram(model)
        on_demand = spec.takes(Role.WANTS_SCORES)
        return DecoderHeadsProgram(model, attention=attention, on_demand=on_demand)
    if graph != DECODER:
        return FullSequenceProgram(model)
    by_lengths = spec.takes(Role.LAST_INDEX)
    return (DecoderByLengthsProgram if by_lengths else DecoderProgram)(model, attention=attention)
