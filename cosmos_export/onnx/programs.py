"""What is traced: one module a graph, around the one model. Each knows what its inputs and outputs mean, in the order
of its `GraphSpec`; what they are called is `signature`'s.

    B  batch    T  new tokens    N  tokens in all    L  cache length    K  kv heads    E  head_dim    V  vocabulary
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cosmos_export.model.backbone import CosmosBackbone
from cosmos_export.model.cached_attention import CachedAttention
from cosmos_export.model.in_place_attention import InPlaceAttention
from cosmos_export.onnx.fused_attention import FusedAttention

Attention = Literal["standard", "fused", "in_place"]


class FullSequenceProgram(nn.Module):
    """input_ids (B, T) to logits (B, T, V)."""

    def __init__(self, model: CosmosBackbone) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        (input_ids,) = inputs
        return (self.model.logits(self.model.hidden_states(input_ids)),)


class DecoderProgram(nn.Module):
    """Prefill and decode: T new tokens on top of a cache, in place, logits of the positions that are asked for.

    Inputs: input_ids (B, T); attention_mask (B, N), 1 for the tokens that a row has, padding on the right, N the
    longest row's; logit_offsets (n,), how far before its last token each wanted position of a row lies; then key and
    value cache (B, K, L, E) of every layer. Outputs: logits (B, n, V), then the caches with the new tokens in them.
    A row's new tokens are its last ones. More than one new token on top of a filled cache wants B = 1.
    `attention` is in standard operators, in ONNX Runtime's own one, or in place, which ONNX cannot say.
    """

    def __init__(self, model: CosmosBackbone, *, attention: Attention = "standard") -> None:
        super().__init__()
        self.model, self.attention = model, attention

    def forward(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        input_ids, attention_mask, logit_offsets, *cache = inputs
        attend = self._attention(input_ids, attention_mask, cache)
        hidden = self.model.hidden_states(input_ids, attend)  # (B, T, D)
        wanted = pick(hidden, attention_mask, logit_offsets)  # (B, n, D)
        return (self.model.logits(wanted).to(torch.float32), *attend.cache)

    def _attention(
        self, input_ids: Tensor, attention_mask: Tensor, cache: list[Tensor]
    ) -> FusedAttention | CachedAttention | InPlaceAttention:
        if self.attention == "in_place":
            return InPlaceAttention(self.model.rope, attention_mask, input_ids.shape[1], cache)
        lengths = attention_mask.sum(1)
        if self.attention == "standard":
            return CachedAttention(self.model.rope, lengths, input_ids.shape[1], cache)
        total = torch.full((), attention_mask.shape[1], dtype=torch.int32, device=attention_mask.device)
        return FusedAttention(self.model.config, self.model.rope, (lengths - 1).to(torch.int32), total, cache)


class DecoderByLengthsProgram(nn.Module):
    """The same decoder, told lengths instead of a mask: what a loop on a device steps with.

    Inputs: input_ids (B, T); last_index (B,) int32, a row's tokens less one, the new ones included, padding on the
    right; total_length () int32, the longest row's tokens; logit_rows (n,), which rows of the hidden states (B * T, D)
    get logits; then key and value cache (B, K, L, E) of every layer. Outputs: logits (n, V), then the caches.
    Nothing here computes a shape or reads a mask, so every operator of the graph is one of the device's own.
    """

    def __init__(self, model: CosmosBackbone, *, attention: Attention = "standard") -> None:
        super().__init__()
        self.model, self.attention = model, attention

    def forward(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        input_ids, last_index, total_length, logit_rows, *cache = inputs
        attend: FusedAttention | CachedAttention
        if self.attention == "fused":
            attend = FusedAttention(self.model.config, self.model.rope, last_index, total_length, cache)
        else:
            attend = CachedAttention(self.model.rope, last_index.to(torch.int64) + 1, input_ids.shape[1], cache)
        hidden = self.model.hidden_states(input_ids, attend)  # (B, T, D)
        wanted = F.embedding(logit_rows, hidden.flatten(0, 1))  # (n, D): a Gather of whole rows
        return (self.model.logits(wanted).to(torch.float32), *attend.cache)


def pick(hidden: Tensor, attention_mask: Tensor, offsets: Tensor) -> Tensor:
    """The rows of `hidden` (B, T, D) that lie `offsets` (n,) before each batch row's last token: (B, n, D).

    With right padding a row's last token of a prefill is where its mask ends; when decoding it is the only one.
    """
    batch, length, _ = hidden.shape
    before = attention_mask.shape[1] - length  # tokens of the longest row that were there already
    last = (attention_mask.sum(1) - 1 - before).clamp(min=0)  # (B,)
    position = (last[:, None] - offsets).clamp(min=0)  # (B, n)
    first_of_row = torch.arange(batch, device=hidden.device)[:, None] * length
    return F.embedding(first_of_row + position, hidden.flatten(0, 1))  # a Gather of whole rows
