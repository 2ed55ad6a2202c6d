"""How likely a model finds a text: the log-probability of each token after those before it."""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cosmos_runtime.arrays import Floats, TokenIds
from cosmos_runtime.decoder_graph import DecoderGraph
from cosmos_runtime.decoding import new_decoder
from cosmos_runtime.errors import InputError
from cosmos_runtime.heads import has_heads
from cosmos_runtime.session import Session
from cosmos_runtime.validation import token_row

# Logits are (T, V): a long text goes through the model in pieces of this many tokens where the graph keeps a cache, and
# through the float64 log-softmax in smaller ones.
_CHUNK = 256
_SOFTMAX_CHUNK = 16


@dataclass(frozen=True)
class Score:
    """Natural log-probabilities (T-1,) float64 of the ids (T,) but the first, which nothing predicts."""

    ids: list[int]
    log_probabilities: npt.NDArray[np.float64]

    @property
    def total(self) -> float:
        """Log-probability of the whole, given its first token."""
        return float(self.log_probabilities.sum())

    @property
    def mean_nats(self) -> float:
        """Mean negative log-probability a predicted token."""
        return -self.total / len(self.log_probabilities)

    @property
    def perplexity(self) -> float:
        """exp(mean_nats): among how many tokens the model seems to choose at each place; inf beyond what fits."""
        try:
            return math.exp(self.mean_nats)
        except OverflowError:
            return math.inf


def score(session: Session, ids_or_text: str | npt.ArrayLike) -> Score:
    """Score a text, or token ids (T,), of at least two tokens.

    Raises: InputError for what the model cannot take, TokenizerError for text where the bundle has no tokenizer.
    """
    manifest = session.manifest
    if not manifest.model["causal"]:
        raise InputError("score: expected a causal model; one that sees the tokens to come predicts nothing")
    if has_heads(manifest):
        raise InputError(
            "score: expected a plain decoder: capability heads speak at the end of a call alone; export with --head lm"
        )
    given = session.tokenizer.encode(ids_or_text) if isinstance(ids_or_text, str) else ids_or_text
    ids = token_row(given, vocab_size=manifest.vocab_size, max_sequence_length=manifest.max_sequence_length)
    if len(ids) < 2:
        raise InputError(f"score: expected at least 2 tokens, got {len(ids)}: nothing predicts the first one")
    return Score(ids.tolist(), _log_probabilities(session, ids))


def log_softmax_at(logits: Floats, targets: TokenIds) -> npt.NDArray[np.float64]:
    """log softmax (T,), in float64, of logits (T, V) at one target (T,) of each row."""
    found = np.empty(len(targets), np.float64)
    for start in range(0, len(targets), _SOFTMAX_CHUNK):
        part = slice(start, start + _SOFTMAX_CHUNK)
        rows = logits[part].astype(np.float64)
        rows -= rows.max(axis=1, keepdims=True)
        at_target = np.take_along_axis(rows, targets[part, None], axis=1)[:, 0]
        found[part] = at_target - np.log(np.exp(rows, out=rows).sum(axis=1))
    return found


def _log_probabilities(session: Session, ids: TokenIds) -> npt.NDArray[np.float64]:
    inputs, targets = ids[:-1], ids[1:]
    decoder = new_decoder(session, len(inputs), diagnostics=False)
    size = _CHUNK if isinstance(session.graph, DecoderGraph) else len(inputs)
    found = [
        log_softmax_at(decoder.decode(inputs[start : start + size]), targets[start : start + size])
        for start in range(0, len(inputs), size)
    ]
    return np.concatenate(found)
