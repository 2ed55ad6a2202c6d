"""Does decoding step by step give what the whole sequence gives? The same tokens in pieces, through the cache: alone,
and in a batch of rows whose prompts have unequal lengths.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cosmos_export.parity.cases import Case, TokenIds
from cosmos_runtime import Session, new_batch_decoder, new_decoder

STEPWISE_LENGTH = 48
# Of a long sequence, as many of the last tokens are decoded one by one.
LAST_TOKENS = 4


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


def last_logits(session: Session, input_ids: TokenIds) -> NDArray:
    """Logits (1, LAST_TOKENS + 1, V) at the end of ids (1, T): the prompt's, then of single tokens behind it."""
    row = input_ids[0]
    decoder = new_decoder(session, len(row))
    logits = [decoder.prefill(row[:-LAST_TOKENS]).copy()]
    logits += [decoder.decode_one_token(int(token)).copy() for token in row[-LAST_TOKENS:]]
    return np.array(logits)[None]


def ragged_case(vocab_size: int, limit: int, *, seed: int = 2) -> tuple[Case, list[int]]:
    """Three rows of random tokens and the unequal lengths of their prompts; the rest of each is decoded."""
    length = min(STEPWISE_LENGTH // 2, limit)
    ids = np.random.default_rng(seed).integers(0, vocab_size, (3, length))
    return Case(f"3 x {length} unequal rows", ids), [max(1, length // part) for part in (8, 2, 3)]


def ragged_logits(session: Session, input_ids: TokenIds, prompts: list[int]) -> NDArray:
    """Logits (B, T - longest prompt, V) of the last positions of ids (B, T), each row decoded beside the others.

    Rows begin unequally long, and one that reaches T is left out while the others go on.
    """
    batch, length = input_ids.shape
    decoder = new_batch_decoder(session, batch, length)
    for row, prompt in enumerate(prompts):
        decoder.prefill(row, input_ids[row, :prompt])
    at, logits = list(prompts), np.zeros((batch, length, session.manifest.vocab_size), np.float32)
    while rows := [row for row in range(batch) if at[row] < length]:
        new = decoder.decode(rows, [int(input_ids[row, at[row]]) for row in rows])
        for row, computed in zip(rows, new, strict=True):
            logits[row, at[row]] = computed
            at[row] += 1
    return logits[:, max(prompts) :]
