"""Cut a stream of text at the first stop string, also where the string is spread over several pieces."""

from collections.abc import Sequence

from cosmos_runtime.errors import InputError
from cosmos_runtime.quoting import quoted


class StopFilter:
    """Passes text through, holding back what might begin a stop string.

    The stop string that is complete first wins, so the result does not depend on how the text falls into pieces.

    Raises: InputError for an empty stop string, which would match everywhere.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        listed = isinstance(stop, Sequence) and not isinstance(stop, str)
        if not listed or not all(isinstance(text, str) and text for text in stop):
            raise InputError(f"stop: expected a list of non-empty strings, got {quoted(stop)}")
        self._stop = tuple(stop)
        self._held = ""
        self.matched = False

    def push(self, text: str) -> str:
        """The text that is safe to show; after a match, "" for ever."""
        if self.matched:
            return ""
        self._held += text
        start = self._first_match()
        if start is None:
            return self._release(len(self._held) - self._possible_beginning())
        self.matched = True
        shown, self._held = self._held[:start], ""
        return shown

    def finish(self) -> str:
        """What was held back and turned out not to be a stop string."""
        return self._release(len(self._held))

    def _first_match(self) -> int | None:
        """Where the stop string that ends first starts (of those that end there, the longest)."""
        found = [(at + len(text), at) for text in self._stop if (at := self._held.find(text)) >= 0]
        return min(found)[1] if found else None

    def _possible_beginning(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        return max((_overlap(self._held, text) for text in self._stop), default=0)

    def _release(self, length: int) -> str:
        shown, self._held = self._held[:length], self._held[length:]
        return shown


def _overlap(text: str, stop: str) -> int:
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
