"""Token ids are checked before they are looked up: PyTorch's own answer names no id, and on a GPU ends the process."""

from __future__ import annotations

import torch
from torch import Tensor

from cosmos_export.errors import ConfigError

_INTEGERS = (torch.int64, torch.int32)  # what an embedding takes


def check_token_ids(input_ids: Tensor, vocab_size: int) -> None:
    """Raises ConfigError where some of `input_ids` (B, T) are no integers from 0 to `vocab_size` - 1.

    A traced graph has no such check, nor have ids without values (meta device).
    """
    if input_ids.dtype not in _INTEGERS:
        raise ConfigError(f"input_ids must be int64 or int32, got {input_ids.dtype}")
    if input_ids.is_meta or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return
    beyond = (input_ids < 0) | (input_ids >= vocab_size)
    if beyond.any():
        row, position = beyond.nonzero()[0].tolist()
        raise ConfigError(
            f"input_ids: expected ids from 0 to {vocab_size - 1} (vocab_size {vocab_size}), got "
            f"{int(input_ids[row, position])} in row {row} at position {position}; "
            f"encode the text with this model's own tokenizer"
        )
