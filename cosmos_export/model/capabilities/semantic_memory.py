"""Semantic memory (cosmos_reference, section 5): attention over a thousand concepts.

    B  batch    D  dim    H  heads    d  D / H    C  concepts

Keys of all heads are one matrix. Each head's query is multiplied with all of them, and its own part is read of the
result: for a few rows that costs no more than a product a head, and the keys can take a recipe's precision. Values,
which no recipe rounds (see `cosmos_export.onnx.head_matrices`), are a matrix for each head.
What depends on weights alone is computed once for inference (`freeze`): a frozen module holds the queries' projection
and the concepts' keys and values as tables, and its forward pass reads neither the embeddings nor the packed
projection. In training all of it is computed anew in each pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cosmos_export.model.capabilities.layers import in_score_precision, perceptron
from cosmos_export.model.capabilities.weight_sources import CONCEPT_HEADS, CONCEPTS, DERIVED_CONCEPTS


class ConceptAttention(nn.Module):
    """Weights in the layout of `torch.nn.MultiheadAttention`: query, key and value projections in one, then output."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)


class FrozenLinear(nn.Module):
    """A linear layer whose weights are derived from others, so no state dict has them."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("bias", bias, persistent=False)

    weight: Tensor  # (out, in)
    bias: Tensor | None  # (out,)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        return F.linear(x, self.weight, self.bias)


class ConceptValues(nn.Module):
    """What each head reads of the concepts; derived from weights, as in a `FrozenLinear`."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight, persistent=False)

    weight: Tensor  # (H, C, d)

    def forward(self, weights: Tensor) -> Tensor:
        """Shares of the concepts (B, H, C) to their values' sums (B, H, d)."""
        sums = torch.bmm(weights.transpose(0, 1), self.weight).transpose(0, 1)
        # Not `contiguous`, nor `@`: both would ask whether the batch is one, and torch.export specialise on the answer.
        return sums.clone(memory_format=torch.contiguous_format)


class SemanticMemory(nn.Module):
    """What the concepts that the input attends to make of it."""

    # Where frozen: (D, D) with a bias, (H * C, d) and (H, C, d).
    concept_query: FrozenLinear | None
    concept_keys: FrozenLinear | None
    concept_values: ConceptValues | None

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.concept_embeddings = nn.Parameter(torch.randn(CONCEPTS, dim))
        self.concept_attention = ConceptAttention(dim)
        self.knowledge_encoder = perceptron(dim, 2 * dim, dim, norm=True)
        self.concept_query = self.concept_keys = self.concept_values = None
        self.register_load_state_dict_post_hook(_refresh_after_loading)

    def forward(self, x: Tensor) -> Tensor:
        """(B, D) to (B, D)."""
        query, keys, values = self._tables()
        scores = _own(keys(query(x).unflatten(-1, (CONCEPT_HEADS, -1))))  # (B, H, C)
        weights = F.softmax(in_score_precision(scores), dim=-1).to(x.dtype)
        attended = values(weights).flatten(1)  # (B, D)
        return self.knowledge_encoder(x + self.concept_attention.out_proj(attended))

    def _tables(self) -> tuple[FrozenLinear, FrozenLinear, ConceptValues]:
        """Projections: of queries, onto the concepts' keys, and of shares onto their values."""
        if self.concept_query is not None and self.concept_keys is not None and self.concept_values is not None:
            return self.concept_query, self.concept_keys, self.concept_values
        query = FrozenLinear(self._derived("concept_query.weight"), self._derived("concept_query.bias"))
        return (
            query,
            FrozenLinear(self._derived("concept_keys.weight")),
            ConceptValues(self._derived("concept_values.weight")),
        )

    @property
    def is_frozen(self) -> bool:
        """Whether the tables stand for the weights they were computed from."""
        return self.concept_query is not None

    @torch.no_grad()
    def freeze(self) -> None:
        """Computes the tables from the weights as they are now. Training drops them again."""
        self._thaw()
        self.concept_query, self.concept_keys, self.concept_values = self._tables()

    def train(self, mode: bool = True) -> SemanticMemory:
        """Training mode computes everything from the weights, which are about to change."""
        if mode:
            self._thaw()
        super().train(mode)
        return self

    def _thaw(self) -> None:
        self.concept_query = self.concept_keys = self.concept_values = None

    def _derived(self, name: str) -> Tensor:
        return DERIVED_CONCEPTS[name].read(self.get_parameter)

    def _refresh(self) -> None:
        if self.is_frozen:
            self.freeze()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # .double() and .to() come through here: tables that were rounded to another dtype first would keep that.
        super()._apply(fn, recurse)
        self._refresh()
        return self


def _own(products: Tensor) -> Tensor:
    """Of what each head's query made with the keys of all heads (B, H, H * C), what it made with its own (B, H, C)."""
    pairs = products.unflatten(-1, (CONCEPT_HEADS, -1)).flatten(1, 2)  # (B, H * H, C)
    return pairs[:, :: CONCEPT_HEADS + 1]  # the diagonal


def _refresh_after_loading(module: nn.Module, incompatible_keys: Any) -> None:
    """The tables of weights that were replaced stand for nothing."""
    assert isinstance(module, SemanticMemory)
    module._refresh()
