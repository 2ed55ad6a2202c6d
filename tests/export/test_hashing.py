"""A file's hash is known when it is written, however it was written."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cosmos_export.hashing import described_meanwhile
from cosmos_runtime import describe_file


def at_once(path: Path) -> None:
    path.write_bytes(bytes(range(256)) * 50_000)


def in_pieces_with_pauses(path: Path) -> None:
    with path.open("wb") as file:
        for piece in range(5):
            time.sleep(0.01)
            file.write(bytes([piece]) * 100_000)


def with_gaps(path: Path) -> None:
    """As external data are: each tensor begins at a page."""
    with path.open("wb") as file:
        for place in range(0, 1 << 20, 1 << 16):
            file.seek(place)
            file.write(b"tensor")


def nothing_into_it(path: Path) -> None:
    path.touch()


@pytest.mark.parametrize("write", [at_once, in_pieces_with_pauses, with_gaps, nothing_into_it])
def test_it_is_that_of_the_file(write: Callable[[Path], None], tmp_path: Path) -> None:
    path = tmp_path / "weights"
    with described_meanwhile(path) as entry:
        time.sleep(0.01)
        write(path)
    assert entry.result() == describe_file(path)


def test_no_file_has_none(tmp_path: Path) -> None:
    with described_meanwhile(tmp_path / "weights") as entry:
        pass
    assert entry.result() is None


def test_who_fails_to_write_hears_of_that_and_waits_for_nothing(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    with pytest.raises(OSError, match="full"), described_meanwhile(path):
        path.write_bytes(b"half")
        raise OSError("full")
