"""Folders that appear whole, and folders for work in progress, whose rubbish the next run clears.

A process may be killed at any moment. A folder is claimed by a lock on it, which the system lets go when the process
ends, however it ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import glob
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

if sys.platform != "win32":  # there nothing is claimed, and nothing cleared
    import fcntl

# Beside a bundle that is being compared, for a copy with other arithmetic (`parity.arithmetic`).
PARITY_SCRATCH = ".cosmos-parity-"

_RANDOM = "?" * 8  # the end of a name that tempfile makes
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # <fcntl.h>, <linux/fs.h>


@contextlib.contextmanager
def claimed_folder(parent: Path, prefix: str) -> Iterator[Path]:
    """A new folder in `parent` that `clear_abandoned` leaves alone until this process ends; it goes with this block.

    Once it is moved, it stays where it was moved to. Raises OSError where no folder can be made.
    """
    folder, descriptor = _make(parent, prefix)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if descriptor is not None:
            os.close(descriptor)


def abandoned_folders(parent: Path, prefix: str) -> Iterator[Path]:
    """The folders that `claimed_folder` made in `parent` for processes that are gone, each claimed until the next."""
    for folder in sorted(parent.glob(glob.escape(prefix) + _RANDOM)):
        descriptor = _claim(folder)
        if descriptor is not None:
            try:
                yield folder
            finally:
                os.close(descriptor)


def clear_abandoned(parent: Path, prefix: str) -> None:
    """Removes the folders of processes that are gone."""
    for folder in abandoned_folders(parent, prefix):
        shutil.rmtree(folder, ignore_errors=True)


def exchange(one: Path, other: Path) -> bool:
    """Lets two folders swap names in one step, so that no moment is without either; False where the system can't.

    Raises OSError where it can and it failed.
    """
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2  # Linux: man 2 rename
    except (AttributeError, OSError, TypeError):
        return False
    if rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):  # an old kernel, or a file system without it
        return False
    raise OSError(code, os.strerror(code), str(one), None, str(other))


def require_room(folder: Path, size: int) -> None:
    """For writers that end the whole process when the disk is full, as PyTorch's do.

    Raises OSError (ENOSPC) where there are not `size` bytes left for what is written into `folder`.
    """
    free = shutil.disk_usage(folder).free
    if free < size:
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)} ({size:,} bytes needed, {free:,} free)", str(folder))


def sync(folder: Path) -> None:
    """Waits until a folder and all that is in it lie on the disk. Raises OSError, such as that of a full one."""
    for path in (*sorted(folder.rglob("*")), folder):
        sync_entry(path)


def sync_entry(path: Path) -> None:
    """Waits until a file, or the names in a folder, lie on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _make(parent: Path, prefix: str) -> tuple[Path, int | None]:
    """A new folder and its lock; another one where a process took it for abandoned before it was locked."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        if not _can_lock(parent):
            return folder, None
        descriptor = _claim(folder)
        if descriptor is not None:
            return folder, descriptor


def _claim(folder: Path) -> int | None:
    """The lock of a folder; None where another process has it, or the folder is gone, or can't be locked."""
    if sys.platform == "win32":
        return None
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    with contextlib.suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(descriptor), os.stat(folder, follow_symlinks=False)):
            return descriptor
    os.close(descriptor)
    return None


def _can_lock(folder: Path) -> bool:
    """Whether the file system has locks; some network ones have none."""
    if sys.platform == "win32":
        return False
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:  # a folder that may be written to and not read
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True
