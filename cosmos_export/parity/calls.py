"""Sequences of calls of a model with capability heads: what a bundle is tried with, and how it computes them.

    B  batch    T  sequence    M  slots of the working memory    D  dim    V  vocab_size

A call is a run that the heads look at, and remember: a whole sequence, a prompt, one more token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cosmos_export.config import CosmosAdvancedConfig
from cosmos_export.parity.cases import QUICK_LENGTH, Case, Skipped, TokenIds, build_cases
from cosmos_export.parity.stepwise import STEPWISE_LENGTH, pieces
from cosmos_runtime import DECODER, Diagnosis, Session, new_batch_decoder, new_decoder

# Longer than what a decoder takes in one piece.
LONG_PROMPT = 520


class Found(NamedTuple):
    """What a call gave: logits (B, n, V) of the last n positions of each row, and scores (B, ...) by name."""

    logits: NDArray[np.floating]
    scores: dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Entries:
    """A working memory as earlier calls could have left it: keys of unit length and values (B, M, D), and the calls."""

    keys: NDArray[np.float32]
    values: NDArray[np.float32]
    calls: int


@dataclass(frozen=True)
class CallSequence:
    """Calls one after another: in call k, row b has the first `ends[k][b]` of its tokens `case.input_ids` (B, T)."""

    case: Case
    ends: tuple[tuple[int, ...], ...]
    run: Callable[[Session, CallSequence], list[Found]]
    all_positions: bool = False  # logits of every position, or of each row's last one
    before: Entries | None = None


def build_sequences(
    config: CosmosAdvancedConfig, capabilities: Sequence[str], graphs: Sequence[str], *, quick: bool
) -> tuple[list[CallSequence], list[Skipped]]:
    """What a bundle of this model is tried with; `quick` leaves out long sequences."""
    cases, skipped = build_cases(config, quick=quick)
    sequences = [_one_call(case) for case in cases]
    sequences.append(_growing(config, rows=3, calls=9))
    if "memory" in capabilities and config.memory.working_memory_size:
        sequences.append(_with_full_memory(config))
    if DECODER in graphs:
        sequences += _stepwise(config, quick=quick)
        sequences += _unequal_rows(config)
    return sequences, skipped


def _one_call(case: Case) -> CallSequence:
    batch, length = case.input_ids.shape
    return CallSequence(case, ((length,) * batch,), whole_sequences, all_positions=True)


def _growing(config: CosmosAdvancedConfig, rows: int, calls: int) -> CallSequence:
    """Every call sees one token more: more calls than the memory reads entries."""
    calls = min(calls, config.max_sequence_length)
    longest = min(calls + 3, config.max_sequence_length)
    ids = np.random.default_rng(3).integers(0, config.vocab_size, (rows, longest))
    ends = tuple((longest - calls + 1 + call,) * rows for call in range(calls))
    return CallSequence(Case(f"{rows} x {longest} in {calls} calls", ids), ends, whole_sequences, all_positions=True)


def _with_full_memory(config: CosmosAdvancedConfig) -> CallSequence:
    """Calls that each put their entry where the oldest one was."""
    rows, size = 2, config.memory.working_memory_size
    draw = np.random.default_rng(4)
    keys, values = draw.standard_normal((2, rows, size, config.dim)).astype(np.float32)
    keys /= np.linalg.norm(keys, axis=-1, keepdims=True)
    growing = _growing(config, rows, calls=3)
    name = f"{rows} rows, memory of {size} full"
    return CallSequence(
        Case(name, growing.case.input_ids),
        growing.ends,
        whole_sequences,
        all_positions=True,
        before=Entries(keys, values, calls=size + 2),
    )


def _stepwise(config: CosmosAdvancedConfig, *, quick: bool) -> list[CallSequence]:
    """One row through the cache: token by token, in uneven pieces, and behind a prompt of several pieces."""
    draw = np.random.default_rng(1)
    length = min(STEPWISE_LENGTH, config.max_sequence_length)
    ids = draw.integers(0, config.vocab_size, (1, length))
    ways = {f"1 x {length} {way}": (ids, sizes) for way, sizes in pieces(length).items()}
    if config.max_sequence_length > LONG_PROMPT and not (quick and LONG_PROMPT > QUICK_LENGTH):
        longer = draw.integers(0, config.vocab_size, (1, LONG_PROMPT + 4))
        ways[f"1 x {LONG_PROMPT + 4} prefill+decode"] = (longer, [LONG_PROMPT, 1, 1, 1, 1])
    return [
        CallSequence(Case(name, row), tuple((int(end),) for end in np.cumsum(sizes)), step_by_step)
        for name, (row, sizes) in ways.items()
    ]


def _unequal_rows(config: CosmosAdvancedConfig) -> list[CallSequence]:
    """Three rows decoded together behind prompts of unequal lengths."""
    length = min(STEPWISE_LENGTH // 2, config.max_sequence_length)
    prompts = [max(1, length // part) for part in (8, 2, 3)]
    steps = length - max(prompts)
    if not steps:
        return []
    ids = np.random.default_rng(2).integers(0, config.vocab_size, (3, length))
    ends = tuple(tuple(prompt + step for prompt in prompts) for step in range(steps + 1))
    return [CallSequence(Case(f"3 x {length} unequal rows", ids), ends, side_by_side)]


def whole_sequences(session: Session, sequence: CallSequence) -> list[Found]:
    """Each call by itself, with the memory that the calls before have left."""
    ids: TokenIds = sequence.case.input_ids
    before = sequence.before
    memory = session.new_memory(len(ids), None if before else len(sequence.ends))
    if before is not None:
        memory.restore(before.keys, before.values, before.calls)
    found = []
    for ends in sequence.ends:
        logits, diagnoses = session.call(ids[:, : ends[0]], memory=memory)
        found.append(_found(logits, diagnoses))
    return found


def step_by_step(session: Session, sequence: CallSequence) -> list[Found]:
    """One row (1, T) through a decoder; the first call is its prompt."""
    row = sequence.case.input_ids[0]
    decoder = new_decoder(session, len(row), len(sequence.ends))
    found, start = [], 0
    for (end,) in sequence.ends:
        piece = row[start:end]
        if not start:
            logits = decoder.prefill(piece)
        else:
            logits = decoder.decode_one_token(int(piece[0])) if len(piece) == 1 else decoder.decode(piece)[-1]
        found.append(_found(logits[None, None], [decoder.diagnosis]))
        start = end
    return found


def side_by_side(session: Session, sequence: CallSequence) -> list[Found]:
    """All rows in one batch: their prompts, then a token of each at a time."""
    ids = sequence.case.input_ids
    rows = list(range(len(ids)))
    decoder = new_batch_decoder(session, len(ids), ids.shape[1], len(sequence.ends))
    prompts = []
    for row in rows:
        logits = decoder.prefill(row, ids[row, : sequence.ends[0][row]])
        prompts.append(_found(logits[None, None], [decoder.diagnosis(row)]))
    found = [_stacked(prompts)]
    for ends in sequence.ends[1:]:
        logits = decoder.decode(rows, [int(ids[row, end - 1]) for row, end in zip(rows, ends, strict=True)])
        found.append(_found(logits[:, None], [decoder.diagnosis(row) for row in rows]))
    return found


def _found(logits: NDArray, diagnoses: Sequence[Diagnosis | None]) -> Found:
    """Copies: what a session gives may be valid until its next run."""
    rows = [diagnosis.scores for diagnosis in diagnoses if diagnosis is not None]
    names = rows[0] if rows else {}
    return Found(logits.copy(), {name: np.stack([row[name] for row in rows]) for name in names})


def _stacked(rows: Sequence[Found]) -> Found:
    names = rows[0].scores
    scores = {name: np.concatenate([row.scores[name] for row in rows]) for name in names}
    return Found(np.concatenate([row.logits for row in rows]), scores)
