"""What a recipe's rounding costs: the bundle's next-token distributions against the unrounded model's, on real text.

Parity asks whether the graph computes what it should; this asks how far that is from the model that was trained.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from cosmos_export.checkpoint import Checkpoint
from cosmos_export.model.loading import load_decoder, load_model
from cosmos_export.parity.cases import TokenIds
from cosmos_export.parity.gates import QUALITY_GATES
from cosmos_export.parity.heads_quality import predictions_of_bundle, predictions_of_model, write_row
from cosmos_export.parity.metrics import kl_divergences, log_softmax
from cosmos_runtime import Sampling, Session, generate

# Text that the model writes itself: rows of so many tokens, each from a token drawn at random.
SAMPLED_ROWS, SAMPLED_LENGTH = 16, 128
# Text that the user names is taken in rows of so many tokens.
TEXT_LENGTH = 512


@dataclass(frozen=True)
class Quality:
    """Distance of a bundle from the float32 model, over `tokens` next-token predictions of `text`.

    Divergences are KL(model, bundle) in nats per token; perplexities are of the same text.
    """

    text: str
    tokens: int
    mean_kl_divergence: float
    kl_divergence_999: float
    top1_agreement: float
    perplexity: float
    model_perplexity: float
    passed: bool | None
    """Whether the precision's gate holds; None where there is none, or the weights are random and write no text."""


def measure_quality(
    session: Session, checkpoint: Checkpoint, rows: list[TokenIds] | None, *, causal: bool = True
) -> Quality | None:
    """Compares `session` with the float32 model on `rows` of token ids, or on text that the model writes.

    None where there is nothing to compare: both block every token.
    """
    named = rows is not None
    rows = rows if rows is not None else sampled_text(session)
    compared = list(_compared(session, checkpoint, rows, causal))
    written = "the text given" if named else "text sampled from the bundle"
    return _quality(compared, written, session.manifest.recipe["precision"], checkpoint, gated=True)


# Logits (N, V) of the bundle and of the float32 model, and the tokens (N,) that came next.
Prediction = tuple[NDArray, NDArray, TokenIds]


def quality_of(
    rows: Sequence[Prediction], text: str, precision: str, checkpoint: Checkpoint, *, gated: bool
) -> Quality | None:
    """The same of logits that are there already, row by row. `gated` says whether the precision's gate applies to such
    a text."""
    return _quality([_compare(*row) for row in rows], text, precision, checkpoint, gated=gated)


def _quality(
    compared: Sequence[tuple[NDArray, NDArray, NDArray, NDArray]],
    text: str,
    precision: str,
    checkpoint: Checkpoint,
    *,
    gated: bool,
) -> Quality | None:
    if not compared:
        return None
    divergence, same, nats, model_nats = (np.concatenate(part) for part in zip(*compared, strict=True))
    if not len(divergence):
        return None
    mean, agreement = float(divergence.mean()), float(same.mean())
    gate = QUALITY_GATES.get(precision)
    applies = gated and gate is not None and checkpoint.origin.get("kind") == "checkpoint"
    return Quality(
        text=text,
        tokens=len(divergence),
        mean_kl_divergence=mean,
        kl_divergence_999=float(np.quantile(divergence, 0.999)),
        top1_agreement=agreement,
        perplexity=float(np.exp(nats.mean())),
        model_perplexity=float(np.exp(model_nats.mean())),
        passed=mean <= gate.mean_kl_divergence and agreement >= gate.top1_agreement if applies and gate else None,
    )


def sampled_text(session: Session, *, seed: int = 0) -> list[TokenIds]:
    """Rows of token ids that the model writes at temperature 1, the same for the same bundle and seed."""
    draw = np.random.default_rng(seed)
    manifest = session.manifest
    length = min(SAMPLED_LENGTH, manifest.max_sequence_length)
    starts = draw.integers(0, manifest.vocab_size, SAMPLED_ROWS)
    write = _write if manifest.capabilities is None else write_row
    return [write(session, int(start), length, seed + row) for row, start in enumerate(starts)]


def rows_of_text(session: Session, text: str) -> list[TokenIds]:
    """A text as rows of token ids, as long as the model takes and at most `TEXT_LENGTH`; a last row of one is left out.

    Raises TokenizerError when the bundle has no tokenizer, InputError when the text is empty.
    """
    ids = np.array(session.tokenizer.encode(text), dtype=np.int64)
    length = min(TEXT_LENGTH, session.manifest.max_sequence_length)
    return [row for start in range(0, len(ids), length) if len(row := ids[start : start + length]) > 1]


def _write(session: Session, start: int, length: int, seed: int) -> TokenIds:
    written = generate(session, [start], max_new_tokens=max(1, length - 1), sampling=Sampling(seed=seed))
    return np.array([start, *written], dtype=np.int64)[:length]


@torch.inference_mode()
def _compared(
    session: Session, checkpoint: Checkpoint, rows: list[TokenIds], causal: bool
) -> Iterator[tuple[NDArray, NDArray, NDArray, NDArray]]:
    """What `_compare` gives of each row."""
    heads = session.manifest.capabilities
    if heads is None:
        decoder = load_decoder(checkpoint, causal=causal)
        for row in rows:
            exact = decoder(torch.from_numpy(row[None])).numpy()[0, :-1]
            yield _compare(session.logits(row)[0, :-1], exact, row[1:])
        return
    model = load_model(checkpoint, causal=causal, capabilities=heads["names"])
    for row in rows:
        actual, expected = predictions_of_bundle(session, row), predictions_of_model(model, row)
        told = ~(actual.blocked & expected.blocked)  # where both withhold the token there is nothing to compare
        yield _compare(actual.logits[told], expected.logits[told], row[1:][told])


def _compare(actual: NDArray, exact: NDArray, targets: TokenIds) -> tuple[NDArray, NDArray, NDArray, NDArray]:
    """(divergence, same best token, nats, the model's nats) of each target (N,), from logits (N, V)."""
    actual, exact = log_softmax(actual), log_softmax(exact)
    places = np.arange(len(targets)), targets
    same = actual.argmax(-1) == exact.argmax(-1)
    return kl_divergences(exact, actual), same, -actual[places], -exact[places]
