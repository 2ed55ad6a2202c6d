"""Which query heads share a key/value head, and how a checkpoint of the published order becomes ours.

    H  query heads    K  key/value heads    G  H / K    E  head_dim    D  dim

"interleave": query head h reads key/value head h // G (repeat_interleave). The model's order.
"tile": query head h reads key/value head h % K (repeat), as the published code had it. The same model after its query
heads, which are rows of q_proj and columns of o_proj, change places.
"""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor

from cosmos_export.config import CosmosAdvancedConfig
from cosmos_export.errors import ConfigError

HeadLayout = Literal["interleave", "tile"]


def check_head_layout(layout: str) -> None:
    """Raises ConfigError unless `layout` is one of the two."""
    if layout not in get_args(HeadLayout):
        raise ConfigError(f"head_layout must be one of {', '.join(get_args(HeadLayout))}, got {layout!r}")


def tile_to_interleave(name: str, tensor: Tensor, config: CosmosAdvancedConfig) -> Tensor:
    """A tensor of a "tile" checkpoint in the model's order; only q_proj and o_proj change. Same shape, a copy."""
    heads = (config.queries_per_kv_head, config.n_kv_heads, config.head_dim)  # head g * K + k, stored as (G, K, E)
    if name.endswith("attention.q_proj.weight"):
        return tensor.unflatten(0, heads).transpose(0, 1).flatten(0, 2)  # (H*E, D)
    if name.endswith("attention.o_proj.weight"):
        return tensor.unflatten(1, heads).transpose(1, 2).flatten(1, 3)  # (D, H*E)
    return tensor
