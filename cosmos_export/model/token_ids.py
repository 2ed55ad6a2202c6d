"""Token ids are checked before they are looked up: PyTorch's own answer names no id, and on a GPU ends the process."""

from __future__ import annotations

import torch
from torch import Tensor

from cosmos_export.errors import PromptError
from cosmos_runtime import quoted

_INTEGERS = (torch.int64, torch.int32)  # what an embedding takes


def check_token_tensor(input_ids: Tensor) -> None:
    """Raises PromptError where `input_ids` is no tensor (B, T) of integers."""
    if not isinstance(input_ids, Tensor):
        raise PromptError(
            f"input_ids: expected a tensor (batch, sequence) of int64, got {quoted(input_ids)}; "
            f"make it one: torch.tensor([[1, 2, 3]])"
        )
    if input_ids.dim() != 2:
        raise PromptError(f"input_ids must be (batch, sequence), got shape {tuple(input_ids.shape)}")
    if input_ids.dtype not in _INTEGERS:
        raise PromptError(f"input_ids must be int64 or int32, got {input_ids.dtype}")


def check_token_ids(input_ids: Tensor, vocab_size: int) -> None:
    """Raises PromptError where some of `input_ids` (B, T) are no integers from 0 to `vocab_size` - 1, or none is there.

    A traced graph has no such check, nor have ids without values (meta device).
    """
    check_token_tensor(input_ids)
    if input_ids.is_meta or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return
    if not input_ids.numel():
        raise PromptError(
            f"input_ids must be (batch, sequence) of at least one token, got shape {tuple(input_ids.shape)}"
        )
    beyond = (input_ids < 0) | (input_ids >= vocab_size)
    if beyond.any():
        row, position = beyond.nonzero()[0].tolist()
        raise PromptError(
            f"input_ids: expected ids from 0 to {vocab_size - 1} (vocab_size {vocab_size}), got "
            f"{int(input_ids[row, position])} in row {row} at position {position}; "
            f"encode the text with this model's own tokenizer"
        )
