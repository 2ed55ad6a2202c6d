"""Where the seconds of a long piece of work go, each counted once."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

TRACING, READING, QUANTISING, WRITING = "tracing", "reading", "quantising", "writing"
CALIBRATING, VERIFYING, SEALING = "calibrating", "verifying", "sealing"
KINDS = (CALIBRATING, TRACING, READING, QUANTISING, WRITING, VERIFYING, SEALING)


class Stopwatch:
    """Seconds by kind of work. Work within other work counts as its own kind only, so that the parts make the whole."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._kinds: list[str] = []
        self._since = 0.0

    def by_kind(self) -> dict[str, float]:
        """The seconds of what was done at all, in the order in which an export does it."""
        return {kind: self.seconds[kind] for kind in KINDS if kind in self.seconds}

    @contextlib.contextmanager
    def during(self, kind: str) -> Iterator[None]:
        """Counts the time of the block as `kind`, less that of blocks within it."""
        self._credit()
        self._kinds.append(kind)
        try:
            yield
        finally:
            self._credit()
            self._kinds.pop()

    def _credit(self) -> None:
        now = time.perf_counter()
        if self._kinds:
            self.seconds[self._kinds[-1]] = self.seconds.get(self._kinds[-1], 0.0) + now - self._since
        self._since = now
