"""What a bundle is tried with: batches and lengths up to the maximum, and the ids where lookups go wrong.

B  batch    T  sequence    S  max_sequence_length    V  vocab_size
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cosmos_export.config import CosmosAdvancedConfig

TokenIds = NDArray[np.int64]

QUICK_LENGTH = 256


@dataclass(frozen=True)
class Case:
    """One batch of token ids (B, T) and what it is for."""

    name: str
    input_ids: TokenIds


@dataclass(frozen=True)
class Skipped:
    """A case that was not run, and why: a report never leaves out silently."""

    name: str
    reason: str


def build_cases(config: CosmosAdvancedConfig, *, quick: bool, seed: int = 0) -> tuple[list[Case], list[Skipped]]:
    """The cases for a model, deterministic under `seed`; `quick` leaves out sequences beyond `QUICK_LENGTH`."""
    draw = np.random.default_rng(seed)
    cases: list[Case] = []
    skipped: list[Skipped] = []
    for name, batch, length in _shapes(config.max_sequence_length):
        reason = _reason_to_skip(config, batch, length, quick)
        if reason:
            skipped.append(Skipped(name, reason))
        else:
            cases.append(Case(name, draw.integers(0, config.vocab_size, (batch, length))))
    return cases + _extreme_ids(config), skipped


def _shapes(limit: int) -> list[tuple[str, int, int]]:
    """(name, B, T) without repetitions; small odd sizes find what a traced constant hides, the last ones the limit."""
    wanted = [
        (1, 1),
        (4, 1),
        (2, 2),
        (3, 7),
        (1, 16),
        (5, 33),
        (2, 128),
        (1, limit // 2),
        (1, limit - 1),
        (1, limit),
        (2, limit),
    ]
    shapes = dict.fromkeys((batch, min(length, limit)) for batch, length in wanted if length > 0)
    return [(f"{batch} x {length} tokens", batch, length) for batch, length in shapes]


def _extreme_ids(config: CosmosAdvancedConfig) -> list[Case]:
    last, length = config.vocab_size - 1, min(24, config.max_sequence_length)
    rows = np.zeros((4, length), dtype=np.int64)
    rows[1], rows[2, ::2], rows[3, 1::2] = last, last, last
    return [Case(f"4 x {length} extreme ids", rows)]


def _reason_to_skip(config: CosmosAdvancedConfig, batch: int, length: int, quick: bool) -> str | None:
    if quick and length > QUICK_LENGTH:
        return f"quick verification stops at {QUICK_LENGTH} tokens"
    # A graph without a cache holds scores, their masked copy and their softmax at once.
    needed = 3 * 4 * batch * config.n_heads * length**2
    available = available_memory()
    if needed > available // 2:
        return f"its attention scores need {needed / 2**30:.1f} GiB, and {available / 2**30:.1f} GiB are available"
    return None


def available_memory() -> int:
    """Bytes of memory that can be had without swapping, as Linux says; elsewhere, what is physically there."""
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 1 << 33
