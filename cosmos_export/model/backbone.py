"""The transformer that every Cosmos model stands on (cosmos_reference, section 2).

    B  batch    T  sequence    D  dim    F  hidden_dim    V  vocab_size    S  max_sequence_length

Parameter names are the checkpoint's own, so a state dict needs no translation.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cosmos_export.config import CosmosAdvancedConfig
from cosmos_export.errors import ConfigError, PromptError
from cosmos_export.model.attention import Attend, FullSequenceAttention, GroupedQueryAttention
from cosmos_export.model.rope import RotaryTable
from cosmos_export.model.token_ids import check_token_ids, check_token_tensor


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis (arXiv:1910.07467), in at least float32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., D)."""
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class FeedForward(nn.Module):
    """w2(silu(w1 x) * w3 x): the SwiGLU of arXiv:2002.05202, no biases."""

    def __init__(self, config: CosmosAdvancedConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.dim, config.hidden_dim, bias=False)
        self.w2 = nn.Linear(config.hidden_dim, config.dim, bias=False)
        self.w3 = nn.Linear(config.dim, config.hidden_dim, bias=False)
        self.dropout = nn.Dropout(config.activation_dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        return self.w2(self.dropout(F.silu(self.w1(x)) * self.w3(x)))  # inside: (B, T, F)


class DecoderLayer(nn.Module):
    """Pre-norm residual block: attention, then feed-forward."""

    def __init__(self, config: CosmosAdvancedConfig, layer: int) -> None:
        super().__init__()
        self.norm1 = RMSNorm(config.dim, config.norm_eps)
        self.attention = GroupedQueryAttention(config, layer)
        self.norm2 = RMSNorm(config.dim, config.norm_eps)
        self.feed_forward = FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        x = x + self.dropout(self.attention(self.norm1(x), attend))
        return x + self.dropout(self.feed_forward(self.norm2(x)))


class CosmosBackbone(nn.Module):
    """Embedding, decoder layers, final norm, and the tied output projection.

    `causal=False` lets every position see all others, as the published forward pass did.
    Raises ConfigError when the configuration cannot be built.
    """

    def __init__(self, config: CosmosAdvancedConfig, *, causal: bool = True) -> None:
        super().__init__()
        self.config, self.causal = config.validate(), causal
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)
        self.rope = RotaryTable(config.head_dim, config.rope_theta, config.max_sequence_length)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Random weights, of the deviations that `initial_deviation` gives."""
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, initial_deviation(name, self.config))

    def hidden_states(self, input_ids: Tensor, attend: Attend | None = None) -> Tensor:
        """input_ids (B, T) to the normed hidden states (B, T, D); `attend` defaults to the full sequence.

        Raises PromptError for ids of a wrong rank, length or type, or beyond the vocabulary.
        """
        if attend is None:
            attend = self.full_sequence_attention(input_ids)
            check_token_ids(input_ids, self.config.vocab_size)
        x = self.dropout(self.tok_embeddings(input_ids))
        for layer in self.layers:
            x = layer(x, attend)
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) to (..., V): the output projection is the embedding itself."""
        return F.linear(hidden, self.tok_embeddings.weight)

    def full_sequence_attention(self, input_ids: Tensor) -> FullSequenceAttention:
        """The strategy for a call that sees whole sequences. Raises PromptError for ids of a wrong rank, type or
        length, ConfigError where the rotary table is shorter than the configuration says by now."""
        check_token_tensor(input_ids)
        length, limit = input_ids.shape[1], self.config.max_sequence_length
        if not torch.jit.is_tracing() and not 0 < length <= limit:  # a trace would keep the answer, not the question
            raise PromptError(f"sequence of {length} tokens, expected at least 1, and max_sequence_length is {limit}")
        if limit > self.rope.length:
            raise ConfigError(
                f"the rotary table has {self.rope.length} positions, and max_sequence_length is {limit} now; "
                f"build the model anew with this configuration"
            )
        dropout = self.config.attention_dropout if self.training else 0.0
        return FullSequenceAttention(self.rope, length, causal=self.causal, dropout=dropout)


def initial_deviation(name: str, config: CosmosAdvancedConfig) -> float:
    """Of a matrix before training: 0.02, and 1/sqrt(2 * n_layers) of that where a residual branch ends (GPT-2)."""
    return 0.02 * ((2 * config.n_layers) ** -0.5 if name.endswith(("o_proj.weight", "w2.weight")) else 1.0)
