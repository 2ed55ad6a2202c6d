"""Speculation by prompt lookup: guess that text goes on as it went on before, and check the guess in one run.

A run over a few tokens costs little more than a run over one, which is mostly reading weights. So where the last
n tokens were there before, the tokens that followed them then are computed along with the next one
(https://github.com/apoorvumang/prompt-lookup-decoding; the check is that of arXiv:2211.17192 for greedy decoding).
"""

from collections import deque
from collections.abc import Sequence

import numpy as np

from cosmos_runtime.arrays import Floats, TokenIds
from cosmos_runtime.decoding import RewindingDecoder
from cosmos_runtime.heads import Diagnosis

# Lengths of the n-grams that are looked up, the most telling first.
_NGRAMS = (3, 2)


class PromptLookup:
    """Finds where the last tokens occurred before; each new token costs a few dictionary operations."""

    def __init__(self) -> None:
        self._ids: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}  # n-gram to the place behind its latest occurrence but the last

    def extend(self, ids: Sequence[int]) -> None:
        """Append tokens."""
        for token in ids:
            place = len(self._ids)
            for n in _NGRAMS:  # those that end right before this token now have one that follows
                if place >= n:
                    self._after[tuple(self._ids[place - n :])] = place
            self._ids.append(token)

    def propose(self, most: int) -> list[int]:
        """Up to `most` tokens that may come next; none where no n-gram of the end occurred before.

        A repetition that reaches the end of the text is taken to go on.
        """
        for n in _NGRAMS:
            place = self._after.get(tuple(self._ids[-n:])) if len(self._ids) >= n else None
            if place is not None:
                period = len(self._ids) - place
                return [self._ids[place + i % period] for i in range(most)]
        return []


class Budget:
    """How many tokens may be proposed, so that text which does not repeat costs next to nothing.

    The unit is the time of a step without speculation. A token that was guessed right earns one, a run pays for the
    tokens proposed in it, and every run has a small allowance: what is lost in all is at most `_START` and
    `_ALLOWANCE` a token. The costs are those measured with 4-bit weights on a CPU; with larger weights they are less.
    """

    _START, _ALLOWANCE, _MOST = 1.0, 0.02, 8.0
    _RUN, _TOKEN = 0.15, 0.25

    def __init__(self) -> None:
        self._balance = self._START

    @classmethod
    def cost(cls, proposed: int) -> float:
        """What proposing so many tokens in one run costs beyond a step without."""
        return cls._RUN + cls._TOKEN * proposed if proposed else 0.0

    def affordable(self) -> int:
        """Tokens that may be proposed now."""
        return max(int((self._balance - self._RUN) / self._TOKEN), 0)

    def pay(self, proposed: int) -> None:
        """Count a run, and the tokens proposed in it."""
        self._add(self._ALLOWANCE - self.cost(proposed))

    def earn(self) -> None:
        """Count a proposed token that was right."""
        self._add(1.0)

    def _add(self, amount: float) -> None:
        self._balance = min(self._balance + amount, self._MOST)


class SpeculatingDecoder:
    """A `Decoder` that computes logits ahead of their time, at the positions of a lookup's proposal.

    Its caller notices nothing: where the next token is the one proposed, its logits are there already; where it is
    not, what was computed too much is forgotten. The logits are the same as far as the graph computes the same for one
    token and for several: to rounding, but for some quantised kernels, which treat the two cases differently.
    """

    def __init__(self, decoder: RewindingDecoder, most: int, capacity: int) -> None:
        self._decoder, self._most, self._capacity = decoder, most, capacity
        self._lookup, self._budget = PromptLookup(), Budget()
        self._ahead: deque[tuple[int, Floats]] = deque()  # proposed tokens, and the logits (V,) after each

    @property
    def length(self) -> int:
        """Number of tokens so far."""
        return self._decoder.length - len(self._ahead)

    @property
    def graph_seconds(self) -> float:
        """Time spent inside the graph so far."""
        return self._decoder.graph_seconds

    @property
    def diagnosis(self) -> Diagnosis | None:
        """None: with capability heads every run is a call, so nothing can be tried out."""
        return None

    def prefill(self, ids: TokenIds) -> Floats:
        """Append a prompt (T,); logits (V,) of the position after it."""
        self._lookup.extend(ids.tolist())
        return self._decoder.prefill(ids)

    def decode_one_token(self, token_id: int) -> Floats:
        """Append one token; logits (V,) of the position after it."""
        self._lookup.extend((token_id,))
        if self._ahead and self._ahead[0][0] == token_id:
            self._budget.earn()
            return self._ahead.popleft()[1]
        self._decoder.rewind(self.length)
        self._ahead.clear()
        return self._compute(token_id)

    def cancel(self) -> None:
        """Make the computation in progress fail where that is possible."""
        self._decoder.cancel()

    def _compute(self, token_id: int) -> Floats:
        """One run over the token and what is proposed to follow it."""
        room = self._capacity - self._decoder.length - 1
        proposed = self._lookup.propose(min(self._most, self._budget.affordable(), room))
        self._budget.pay(len(proposed))
        if not proposed:
            return self._decoder.decode_one_token(token_id)
        logits = self._decoder.decode(np.array([token_id, *proposed]))
        self._ahead.extend(zip(proposed, logits[1:], strict=True))
        return np.asarray(logits[0])
