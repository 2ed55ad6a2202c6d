"""How much of a bundle to verify: by itself, so that who wants nothing of it need not import what verifies."""

from __future__ import annotations

from enum import StrEnum


class Effort(StrEnum):
    """How much to verify: every length up to the maximum, short sequences only, one layer at a time, or nothing.

    Where the model is too large to be held whole in float64, FULL and QUICK are LAYERS.
    """

    FULL = "full"
    QUICK = "quick"
    LAYERS = "layers"
    OFF = "off"
