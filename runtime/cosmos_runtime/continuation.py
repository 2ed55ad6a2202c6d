"""One prompt, the tokens chosen for it so far, and whether it is to end: everything of a generation but the model."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, SupportsIndex, TypeAlias

import numpy as np
import numpy.typing as npt

from cosmos_runtime.arrays import Floats, TokenIds
from cosmos_runtime.errors import InputError
from cosmos_runtime.heads import Diagnosis
from cosmos_runtime.sampling import Sampling, sample
from cosmos_runtime.validation import token_count, token_id_set

FinishReason: TypeAlias = Literal["length", "context", "stop", "blocked"]


@dataclass(frozen=True)
class Limits:
    """When a continuation ends. A stop id cannot be chosen before there are `min_new_tokens`."""

    max_new_tokens: int
    min_new_tokens: int
    max_sequence_length: int
    stop_ids: frozenset[int]

    @classmethod
    def checked(
        cls,
        *,
        max_new_tokens: SupportsIndex,
        min_new_tokens: SupportsIndex,
        max_sequence_length: int,
        stop_ids: Sequence[int],
        vocab_size: int,
    ) -> "Limits":
        """Raises: InputError for a length or a stop id that cannot be."""
        longest = token_count("max_new_tokens", max_new_tokens, minimum=1)
        shortest = token_count("min_new_tokens", min_new_tokens, minimum=0)
        if shortest > longest:
            raise InputError(f"min_new_tokens: expected at most max_new_tokens, {longest}, got {shortest}")
        return cls(longest, shortest, max_sequence_length, token_id_set("stop_ids", stop_ids, vocab_size))


class Continuation:
    """`prompt` holds the prompt's ids, `tokens` the new ones so far, `sampling` the options with the seed in use.

    `finish_reason` is None while running, then "stop" (a stop id came, or the caller's wish), "length"
    (`max_new_tokens` reached), "context" (prompt and new tokens fill `max_sequence_length`) or "blocked" (the model's
    safety head withheld the next token as unsafe).
    `diagnostics`, where they are wanted, holds what the model's capability heads reported of each call so far: the one
    that `tokens[i]` was chosen from is `diagnostics[i]`, and one that ended the answer instead comes last.
    """

    def __init__(self, prompt: TokenIds, limits: Limits, sampling: Sampling, *, diagnostics: bool = False) -> None:
        self.diagnostics: list[dict[str, Any]] = []
        self.wants_diagnostics = diagnostics
        self.prompt: list[int] = prompt.tolist()
        self.tokens: list[int] = []
        self.sampling = sampling.seeded()
        self.capacity = min(len(prompt) + limits.max_new_tokens, limits.max_sequence_length)
        self._limits = limits
        self._rng = self.sampling.generator()
        self._history = np.empty(max(self.capacity, len(prompt)), np.int64)  # prompt and answer, as an array
        self._history[: len(prompt)] = prompt
        self.finish_reason: FinishReason | None = self._limit_reached()

    @property
    def prompt_ids(self) -> TokenIds:
        """The prompt (T,)."""
        return self._history[: len(self.prompt)]

    @property
    def length(self) -> int:
        """Number of tokens of prompt and answer."""
        return len(self.prompt) + len(self.tokens)

    @property
    def most_calls(self) -> int:
        """How many runs of the model it can take: one for the prompt, and one for each new token but the last."""
        return max(self.capacity - len(self.prompt), 1)

    @property
    def limits(self) -> Limits:
        """When it ends."""
        return self._limits

    def uniforms(self) -> npt.NDArray[np.float64]:
        """The numbers in [0, 1) that the remaining tokens are drawn with, as `choose` would draw them one by one."""
        return self._rng.random(self.capacity - self.length)

    def examine(self, diagnosis: Diagnosis | None) -> None:
        """Note what capability heads found (None: there are none) in the call that the next token is chosen from; a
        blocked one ends the answer."""
        if diagnosis is None:
            return
        if self.wants_diagnostics:
            self.diagnostics.append(diagnosis.report())
        if diagnosis.blocked:
            self.finish_reason = self.finish_reason or "blocked"

    def choose(self, logits: Floats) -> int | None:
        """Choose and keep the next token from its logits (V,); None where that, or `stop`, ended the answer."""
        limits = self._limits
        too_early = len(self.tokens) < limits.min_new_tokens
        excluded = tuple(limits.stop_ids) if too_early else ()
        token = sample(logits, self._history[: self.length], self.sampling, self._rng, excluded)
        return self.keep(token)

    def keep(self, token: int) -> int | None:
        """Keep the next token, chosen elsewhere; None where that, or `stop`, ended the answer."""
        if token in self._limits.stop_ids:
            self.stop()
        if self.finish_reason is not None:
            return None
        self._history[self.length] = token
        self.tokens.append(token)
        if reason := self._limit_reached():  # else untouched: another thread may be calling `stop`
            self.finish_reason = reason
        return token

    def stop(self) -> None:
        """End here. A reason that was there before stays."""
        self.finish_reason = self.finish_reason or "stop"

    def _limit_reached(self) -> FinishReason | None:
        if len(self.tokens) >= self._limits.max_new_tokens:
            return "length"
        if self.length >= self._limits.max_sequence_length:
            return "context"
        return None
