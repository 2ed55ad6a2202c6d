"""How long work tells what it is doing, without knowing whether a terminal listens."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Hears the stages of a long piece of work, and how far the current one is."""

    def stage(self, title: str) -> None:
        """A new stage begins; the one before it is done."""

    def update(self, done: int, total: int) -> None:
        """`done` of `total` units of the current stage are finished."""

    def wrote(self, done: int, total: int) -> None:
        """`done` of `total` bytes of the current stage are written."""

    def note(self, text: str) -> None:
        """Something that the user should know, though it is no error."""


class Silent:
    """Tells nobody: the default of every library call."""

    def stage(self, title: str) -> None:
        pass

    def update(self, done: int, total: int) -> None:
        pass

    def wrote(self, done: int, total: int) -> None:
        pass

    def note(self, text: str) -> None:
        pass
