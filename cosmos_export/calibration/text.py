"""The text that weights are calibrated on: what the model writes itself, or what the user names.

R  rows    T  tokens a row
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from cosmos_export.errors import CheckpointError
from cosmos_export.model.cached_attention import CachedAttention
from cosmos_export.model.decoder import CosmosDecoder


@torch.no_grad()
def sampled_text(model: CosmosDecoder, rows: int, length: int, *, seed: int = 0) -> Tensor:
    """Token ids (R, T) that the model writes at temperature 1, each row from a token drawn at random."""
    config, draw = model.config, torch.Generator().manual_seed(seed)
    ids = torch.randint(config.vocab_size, (rows, 1), generator=draw)
    cache = [torch.zeros(rows, config.n_kv_heads, length, config.head_dim) for _ in range(2 * config.n_layers)]
    for seen in range(1, length):
        attend = CachedAttention(model.rope, torch.full((rows,), seen), 1, cache)
        hidden = model.hidden_states(ids[:, -1:], attend)
        cache = attend.cache
        chances = torch.softmax(model.logits(hidden[:, -1]), dim=-1)
        ids = torch.cat([ids, torch.multinomial(chances, 1, generator=draw)], dim=1)
    return ids


def text_from_file(path: Path, tokenizer: Path | None, rows: int, length: int) -> Tensor:
    """The beginning of a UTF-8 text as token ids (R, T), at most `rows` of them.

    Raises CheckpointError when there is no tokenizer, the file cannot be read, or it is shorter than a row.
    """
    from tokenizers import Tokenizer

    if tokenizer is None:
        raise CheckpointError(f"calibration text {path} needs a tokenizer.json beside the checkpoint's weights")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"calibration text {path} cannot be read as UTF-8: {error}") from None
    # A token is seldom more than a dozen characters: what lies beyond is not read into tokens for nothing.
    ids = Tokenizer.from_file(str(tokenizer)).encode(text[: 16 * rows * length], add_special_tokens=False).ids
    if len(ids) < length:
        raise CheckpointError(f"calibration text {path} has {len(ids)} tokens, expected at least {length}")
    whole = min(rows, len(ids) // length)
    return torch.tensor(ids[: whole * length]).view(whole, length)
