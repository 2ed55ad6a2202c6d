"""Sizes and hashes of files, read in pieces so that a file larger than memory is no trouble."""

import hashlib
from collections.abc import Callable
from pathlib import Path

from cosmos_runtime.manifest import FileEntry

_PIECE_BYTES = 1 << 20


def sha256_of(path: Path, on_bytes: Callable[[int], None] | None = None) -> str:
    """SHA-256 of a file in lower-case hexadecimal; `on_bytes` hears the size of each piece that was read."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_PIECE_BYTES):
            digest.update(piece)
            if on_bytes is not None:
                on_bytes(len(piece))
    return digest.hexdigest()


def describe_file(path: Path) -> FileEntry:
    """The manifest entry (size, SHA-256) of a file as it is now."""
    return FileEntry(size=path.stat().st_size, sha256=sha256_of(path))
