"""Text files that are read whole: configurations, recipes, indices."""

from __future__ import annotations

from pathlib import Path


def read_small_text(path: Path, largest: int) -> str:
    """The UTF-8 text of a regular file of at most `largest` bytes.

    Reading a pipe would wait for ever, and a device or a huge file would fill the memory before anyone looked at it.
    Raises OSError (FileNotFoundError where there is nothing), ValueError saying what is wrong.
    """
    size = path.stat().st_size
    if not path.is_file():
        raise ValueError("it is no regular file")
    if size > largest:
        raise ValueError(f"it has {size} bytes, expected at most {largest}")
    text = path.read_text(encoding="utf-8")
    if text.startswith("\ufeff"):
        raise ValueError("it begins with a byte order mark; save it as UTF-8 without one")
    return text
