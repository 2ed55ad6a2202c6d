"""How much text a calibration sees, and how often."""

from __future__ import annotations

from dataclasses import dataclass

# Learning costs about 8 operations a parameter, token and epoch, so the tokens go down as the model grows: to minutes
# on two cores for a model of 10^8 parameters. Fewer than a row are no text.
_PARAMETERS_TIMES_TOKENS = 10**12
ROW_LENGTH = 256
# Learning keeps six float32 numbers a parameter; beyond this many, the weights of a model are rounded one by one.
MOST_PARAMETERS = 10**9


@dataclass(frozen=True)
class CalibrationPlan:
    """`tokens` of text at most, seen `epochs` times when levels and scales are learned (0: rounding only)."""

    tokens: int
    epochs: int

    def rows(self, parameters: int, max_sequence_length: int) -> tuple[int, int]:
        """(rows, tokens a row) for a model of so many parameters."""
        length = min(ROW_LENGTH, max_sequence_length)
        tokens = min(self.tokens, _PARAMETERS_TIMES_TOKENS // parameters)
        return max(1, tokens // length), length
