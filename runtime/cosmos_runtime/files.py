"""Sizes and hashes of files, read in pieces so that a file larger than memory is no trouble; and files held open."""

import contextlib
import hashlib
import os
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path

from cosmos_runtime.errors import BundleError
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


# Where an open file can be opened again by its number, whatever has become of its name.
_OPEN_FILES = Path("/dev/fd")


class HeldFiles:
    """The files of a folder as they are now, for whoever reads them later: small ones are held open.

    A folder may be replaced by another of the same name at any time, and a session must not take its weights from the
    one and its tokenizer from the other.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._identity = _identity(folder)
        self._open: dict[str, int] = {}

    def hold(self, names: Iterable[str]) -> None:
        """Keep files from vanishing, until this object does. Raises: BundleError where the folder has been replaced."""
        if _OPEN_FILES.is_dir():
            for name in dict.fromkeys(names):
                self._open[name] = descriptor = os.open(self._folder / name, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
                weakref.finalize(self, os.close, descriptor)
        self.check()

    def path(self, name: str) -> Path:
        """Where the file can be opened. Raises: BundleError where it went with its folder."""
        if name in self._open and not self.in_place():
            return _OPEN_FILES / str(self._open[name])
        self.check()
        return self._folder / name

    def in_place(self) -> bool:
        """Whether the folder is still the one that there was."""
        return self._identity == _identity(self._folder)

    def check(self) -> None:
        """Make sure of it. Raises: BundleError where another folder is in its place, or none."""
        if not self.in_place():
            raise BundleError(f"{self._folder}: was replaced or removed since it was opened; open the bundle again")


def _identity(path: Path) -> tuple[int, int] | None:
    with contextlib.suppress(OSError):
        status = path.stat()
        return status.st_dev, status.st_ino
    return None
