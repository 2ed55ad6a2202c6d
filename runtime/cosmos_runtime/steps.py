"""Iterators that threads may share, and any thread may end."""

import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Generic, TypeVar

Step = TypeVar("Step")


class Steps(ABC, Iterator[Step], Generic[Step]):
    """One thread at a time takes a step; others wait for their turn. What the steps need is freed with the last one.

    That is so whichever way it ends: by itself, by `_end` from any thread, or by an error. Nobody who ends it waits for
    a step that is being taken: whoever takes that step frees.
    """

    def __init__(self) -> None:
        self._turn = threading.Lock()
        self._over = False

    def __next__(self) -> Step:
        try:
            with self._turn:
                if self._over:
                    raise StopIteration
                step = self._step()
                self._over = self._over or self._is_last()
        except BaseException:
            self._end()
            raise
        if self._over:
            self._free_unless_in_use()
        return step

    def _end(self) -> None:
        """No step begins any more."""
        self._over = True
        self._free_unless_in_use()

    def _free_unless_in_use(self) -> None:
        # Whoever has the turn comes here after it, and `_over` was set before: one of the two frees.
        if self._turn.acquire(blocking=False):
            try:
                self._free()
            finally:
                self._turn.release()

    @abstractmethod
    def _step(self) -> Step:
        """Take a step. Raises: StopIteration where there is none."""

    @abstractmethod
    def _is_last(self) -> bool:
        """Whether there is none behind the one that was just taken."""

    @abstractmethod
    def _free(self) -> None:
        """Let go of what steps need; may be called more than once."""
