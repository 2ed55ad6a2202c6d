"""How the logits of the next position are computed, kept apart from what is done with them."""

from typing import Protocol

import numpy as np

from cosmos_runtime.arrays import Floats, TokenIds
from cosmos_runtime.session import Session


class Decoder(Protocol):
    """Computes next-position logits (V,) for one sequence."""

    def prefill(self, ids: TokenIds) -> Floats:
        """Start with a prompt (T,); logits of the position after it."""
        ...

    def decode_one_token(self, token_id: int) -> Floats:
        """Append one token; logits of the position after it."""
        ...


class FullSequenceDecoder:
    """Runs the whole sequence again for every token: right for any bundle, at a cost that grows with the length."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._ids: TokenIds = np.empty(0, dtype=np.int64)

    def prefill(self, ids: TokenIds) -> Floats:
        """Start with a prompt (T,); logits (V,) of the position after it."""
        self._ids = ids
        logits: Floats = self._session.logits(self._ids)[0, -1]
        return logits

    def decode_one_token(self, token_id: int) -> Floats:
        """Append one token; logits (V,) of the position after it."""
        return self.prefill(np.append(self._ids, token_id))
