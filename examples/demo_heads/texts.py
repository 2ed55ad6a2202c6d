"""What the heads are shown beside ordinary text: broken text, and broken vectors, all made of the text itself.

B  batch    T  sequence    D  dim    V  vocab_size
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from tokenizers import Tokenizer
from torch import Tensor

# Kinds of a window, by number. What is wrong with the last three is known, because it was done here.
ORDINARY, SHUFFLED, RANDOM, LOOPED = range(4)

LONGEST_LOOP = 12  # tokens
NOISE = (0.25, 1.0)  # of a perturbed vector, in standard deviations of the vectors' entries


class Windows(NamedTuple):
    """Pieces of text: inputs and targets (B, T), the targets one token later, and the kind (B,) of each."""

    inputs: Tensor
    targets: Tensor
    kinds: Tensor


@dataclass(frozen=True)
class Corpus:
    """The training tokens (N,), and which of the V tokens may follow a whole word or a whole line."""

    tokens: Tensor
    begins_word: Tensor
    begins_line: Tensor

    @classmethod
    def of(cls, tokens: list[int], tokenizer: Tokenizer) -> Corpus:
        texts = [tokenizer.decode([token]) for token in range(tokenizer.get_vocab_size())]
        begins_word = torch.tensor([not text[:1].isalnum() for text in texts])
        return cls(torch.tensor(tokens), begins_word, torch.tensor([text[:1] == "\n" for text in texts]))

    def windows(self, count: int, length: int, broken: float) -> Windows:
        """`count` random windows of `length` tokens, a share `broken` of which is of one of the broken kinds."""
        starts = torch.randint(len(self.tokens) - length, (count, 1))
        tokens = self.tokens[starts + torch.arange(length + 1)]  # (B, T + 1)
        kinds = torch.where(torch.rand(count) < broken, torch.randint(SHUFFLED, LOOPED + 1, (count,)), ORDINARY)
        tokens = torch.stack([self._broken(row, int(kind)) for row, kind in zip(tokens, kinds, strict=True)])
        return Windows(tokens[:, :-1], tokens[:, 1:], kinds)

    def _broken(self, row: Tensor, kind: int) -> Tensor:
        if kind == SHUFFLED:
            return row[torch.randperm(len(row))]
        if kind == RANDOM:
            return torch.randint(len(self.begins_word), row.shape)
        if kind == LOOPED:
            return row[torch.arange(len(row)) % int(torch.randint(1, LONGEST_LOOP + 1, ()))]
        return row


def perturbed(vectors: Tensor) -> Tensor:
    """Vectors (..., D) with Gaussian noise, each with a strength of its own."""
    weakest, strongest = NOISE
    strength = weakest + (strongest - weakest) * torch.rand(*vectors.shape[:-1], 1)
    return vectors + strength * vectors.std() * torch.randn_like(vectors)
