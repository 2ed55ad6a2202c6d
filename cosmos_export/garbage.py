"""Work that makes many objects and leaves next to none behind goes faster when nobody looks for cycles meanwhile."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Within it, Python's cycle collector rests. What is there at the end is not looked through again: after an import
    of torch that is a million objects that live as long as the process.

    A trace takes a fifth less time, and a few megabytes more.
    """
    if not gc.isenabled():  # within another of these
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
