"""The hash of a file while it is written: a second core does it meanwhile, and nobody reads the file again for it."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Event

from cosmos_runtime import FileEntry

_PIECE_BYTES = 1 << 22
_PAUSE_S = 0.005  # of one who has read all that there is so far


@contextlib.contextmanager
def described_meanwhile(path: Path) -> Iterator[Future[FileEntry | None]]:
    """What a manifest says of the file that the block writes: there when the block has ended; None if it wrote none.

    The file must not be there before, and is written from its beginning to its end.
    """
    written = Event()
    with ThreadPoolExecutor(1, "hash") as pool:
        try:
            yield pool.submit(_followed, path, written)
        finally:
            written.set()


def _followed(path: Path, written: Event) -> FileEntry | None:
    while not path.exists():
        if written.wait(_PAUSE_S) and not path.exists():
            return None
    digest, size = hashlib.sha256(), 0
    with path.open("rb", buffering=0) as file:
        complete = False
        while not complete:
            complete = written.wait(_PAUSE_S)  # before what there is by now is read
            while piece := file.read(_PIECE_BYTES):
                digest.update(piece)
                size += len(piece)
    return FileEntry(size=size, sha256=digest.hexdigest())
