"""Does decoding step by step give what the whole sequence gives? The same tokens in pieces, through the cache."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cosmos_export.parity.cases import Case, TokenIds
from cosmos_runtime import Session, new_decoder

STEPWISE_LENGTH = 48


def pieces(length: int) -> dict[str, list[int]]:
    """Ways to take `length` tokens in pieces: a prompt and then one by one, all one by one, uneven chunks."""
    prompt = max(1, length // 2)
    uneven = [size for size in (5, 1, 9, 2, 16, 3, 1, 7) if size <= length]
    chunks: list[int] = []
    while sum(chunks) < length:
        chunks.append(min(uneven[len(chunks) % len(uneven)], length - sum(chunks)))
    return {
        "prefill+decode": [prompt] + [1] * (length - prompt),
        "decode only": [1] * length,
        "uneven chunks": chunks,
    }


def stepwise_cases(vocab_size: int, limit: int, *, seed: int = 1) -> list[tuple[Case, list[int]]]:
    """A row of random tokens for each way to take it in pieces, and the sizes of the pieces."""
    length = min(STEPWISE_LENGTH, limit)
    ids = np.random.default_rng(seed).integers(0, vocab_size, (1, length))
    return [(Case(f"1 x {length} {way}", ids), sizes) for way, sizes in pieces(length).items()]


def stepwise_logits(session: Session, input_ids: TokenIds, sizes: list[int]) -> NDArray:
    """Logits (1, T, V) of ids (1, T), computed in pieces of `sizes` tokens."""
    row = input_ids[0]
    decoder = new_decoder(session, len(row))
    parts = []
    for size, start in zip(sizes, np.cumsum([0, *sizes]), strict=False):
        piece = row[start : start + size]
        logits = decoder.decode_one_token(int(piece[0]))[None] if size == 1 else decoder.decode(piece)
        parts.append(logits.copy())  # a decoder's logits are valid until its next call
    return np.concatenate(parts)[None]
