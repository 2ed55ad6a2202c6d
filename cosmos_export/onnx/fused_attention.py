"""Attention as one operator of ONNX Runtime: com.microsoft::GroupQueryAttention does the rotary embedding, appends to
the cache and attends (https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md).

    B  batch    T  new tokens    N  tokens in all    L  cache length    K  key/value heads    E  head_dim
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cosmos_export.config import CosmosAdvancedConfig
from cosmos_export.model.rope import RotaryTable

# The operator's rotary kernels work on 16 channels at a time.
HEAD_DIM_MULTIPLE = 16


class FusedAttention:
    """An `Attend` for tracing: puts the operator into the graph, one a layer; `cache` then holds its outputs.

    `last_index` (B,) int32 is a row's tokens less one, the new ones included, with padding on the right; `total` ()
    int32 the longest row's tokens; `cache` is key and value (B, K, L, E) of every layer. Where a caller binds a cache's
    input and output to one buffer, it is written in place. The rotary table must have the type that queries have.
    """

    def __init__(
        self,
        config: CosmosAdvancedConfig,
        rotary: RotaryTable,
        last_index: Tensor,
        total: Tensor,
        cache: Sequence[Tensor],
    ) -> None:
        self.config, self.rotary, self.cache = config, rotary, list(cache)
        self.last_index, self.total = last_index, total

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query (B, T, H*E), key and value (B, T, K*E) to (B, T, H*E)."""
        past = self.cache[2 * layer : 2 * layer + 2]
        outputs = torch.onnx.ops.symbolic_multi_out(
            "com.microsoft::GroupQueryAttention",
            (query, key, value, *past, self.last_index, self.total, self.rotary.cos, self.rotary.sin),
            attrs={
                "num_heads": self.config.n_heads,
                "kv_num_heads": self.config.n_kv_heads,
                "scale": self.config.head_dim**-0.5,
                "do_rotary": 1,
                "rotary_interleaved": 0,
            },
            dtypes=(query.dtype, key.dtype, value.dtype),
            shapes=(query.shape, past[0].shape, past[1].shape),
            version=1,
        )
        # A symbolic operator's outputs are on the CPU, wherever the skeleton is.
        attended, *self.cache[2 * layer : 2 * layer + 2] = (output.to(query.device) for output in outputs)
        return attended
