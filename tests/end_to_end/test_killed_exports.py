"""An export that is killed at any step leaves the old bundle or the new one, whole; the next one clears up after it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cosmos_export.bundle import staged_folder
from cosmos_export.parity.verify import Effort
from cosmos_runtime import Bundle, check_bundle, generate, load

from .killed_export import POINTS, export

SCRIPT = Path(__file__).with_name("killed_export.py")


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Where the exports were that ended too soon, and what is told of them."""
    folder = tmp_path_factory.mktemp("ended")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, str(SCRIPT), str(folder)], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    return folder, json.loads(result.stdout)


def source_of(bundle: Path) -> str:
    """Which export a bundle is of, once every byte of it is known to be right."""
    checked = check_bundle(bundle)
    assert checked.good, checked.findings
    return str(Bundle.open(bundle).manifest.source["location"])


@pytest.mark.parametrize("point", POINTS)
def test_a_killed_export_leaves_one_whole_bundle_and_the_next_clears_up(
    ended: tuple[Path, dict[str, Any]], point: str
) -> None:
    folder = ended[0] / "kill" / point
    assert ended[1]["kill"][point] == signal.SIGKILL
    assert source_of(folder / "bundle") == ("tiny-2" if point == "swapped" else "tiny-1")
    assert len(os.listdir(folder)) == 2, "killed: there is something to clear up"
    export(folder / "bundle", 3, Effort.OFF)
    assert os.listdir(folder) == ["bundle"]
    assert source_of(folder / "bundle") == "tiny-3"
    assert len(list(generate(load(folder / "bundle", threads=1), [1, 2], max_new_tokens=3))) == 3


def test_at_every_change_on_the_disk_there_is_one_whole_bundle(ended: tuple[Path, dict[str, Any]]) -> None:
    """What a kill at any moment would leave: before each file that is made, renamed, synced or removed."""
    changes = ended[1]["watch"]
    sources = []
    for number in range(len(changes)):
        place = ended[0] / "watch" / str(number)
        sources.append(source_of(place / "bundle"))
        with staged_folder(place / "bundle", overwrite=True) as folder:
            (folder / "manifest.json").write_text("{}")
        assert os.listdir(place) == ["bundle"], changes[number]
    swap = next(number for number, change in enumerate(changes) if change == "exchange")
    assert sources == ["tiny-1"] * (swap + 1) + ["tiny-2"] * (len(changes) - swap - 1)
    assert swap > 10, changes
    kinds = {change.split()[0] for change in changes}
    assert {"open", "os.mkdir", "fsync", "exchange", "os.remove"} <= kinds


def test_a_disk_that_takes_no_more_keeps_the_old_bundle(ended: tuple[Path, dict[str, Any]]) -> None:
    folder, error = ended[0] / "full", ended[1]["full"]
    assert error.startswith(f"{folder}/bundle cannot be written: "), error
    assert error.endswith("; free some room there, or give another --out. Nothing was left behind")
    assert os.listdir(folder) == ["bundle"]
    assert source_of(folder / "bundle") == "tiny-1"


def test_an_export_over_a_bundle_in_use(tmp_path: Path) -> None:
    """The running session stays what it was; who opens the place again has the new model."""
    path = tmp_path / "bundle"
    export(path, 1, Effort.OFF)
    session = load(path, threads=1)
    before = list(generate(session, [5, 6, 7], max_new_tokens=8))
    logits = session.logits([1, 2, 3])
    export(path, 2, Effort.OFF)
    assert list(generate(session, [5, 6, 7], max_new_tokens=8)) == before
    assert (session.logits([1, 2, 3]) == logits).all()
    assert session.manifest.source["location"] == "tiny-1"
    again = load(path, threads=1)
    assert again.manifest.source["location"] == "tiny-2"
    assert (again.logits([1, 2, 3]) != logits).any()
