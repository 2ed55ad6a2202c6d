"""Next-token logits of a model with capability heads along a text: every token is a call, and is remembered.

T  tokens    V  vocab_size
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cosmos_export.model.cosmos import CosmosAdvancedModel
from cosmos_export.parity.calls import CallSequence, Found, step_by_step
from cosmos_export.parity.cases import Case, TokenIds
from cosmos_export.parity.heads_reference import run_calls
from cosmos_runtime import Sampling, Session, new_decoder, sample


class Predictions(NamedTuple):
    """Logits (T - 1, V) of the tokens of a row after its first, and where (T - 1,) the output was blocked."""

    logits: NDArray[np.floating]
    blocked: NDArray[np.bool_]


def predictions_of_bundle(session: Session, row: TokenIds) -> Predictions:
    """Of a bundle, step by step."""
    return _predictions(step_by_step(session, _token_by_token(row)))


def predictions_of_model(model: CosmosAdvancedModel, row: TokenIds) -> Predictions:
    """Of the eager model."""
    return _predictions([call.found for call in run_calls(model, _token_by_token(row))])


def write_row(session: Session, start: int, length: int, seed: int) -> TokenIds:
    """A row of so many tokens that the model writes at temperature 1. A blocked output has equal logits for all tokens:
    the row goes on with any."""
    decoder = new_decoder(session, length)
    sampling = Sampling(seed=seed)
    draw, ids = sampling.generator(), [start]
    logits = decoder.prefill(np.array(ids))
    while len(ids) < length:
        ids.append(sample(logits, ids, sampling, draw))
        logits = decoder.decode_one_token(ids[-1])
    return np.array(ids, np.int64)


def _token_by_token(row: TokenIds) -> CallSequence:
    ends = tuple((end,) for end in range(1, len(row)))
    return CallSequence(Case(f"1 x {len(row)} tokens", row[None]), ends, step_by_step)


def _predictions(calls: list[Found]) -> Predictions:
    logits = np.concatenate([call.logits[:, -1] for call in calls])
    blocked = [call.scores["output_blocked"] for call in calls if "output_blocked" in call.scores]
    return Predictions(logits, np.concatenate(blocked) if blocked else np.zeros(len(logits), bool))
