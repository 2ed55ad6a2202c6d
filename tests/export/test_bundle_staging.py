"""Bundles appear whole: a staged folder takes its target's place at the end, or leaves no trace."""

import errno
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from cosmos_export.bundle import staged_folder
from cosmos_export.errors import TargetError
from cosmos_export.folders import PARITY_SCRATCH, claimed_folder, clear_abandoned, exchange
from cosmos_runtime.manifest import MANIFEST_NAME


def stage(target: Path, files: dict[str, str], error: BaseException | None = None, overwrite: bool = False) -> None:
    """Builds a folder of `files`; with an error, fails half-way."""
    with staged_folder(target, overwrite=overwrite) as folder:
        for name, text in files.items():
            (folder / name).write_text(text)
        if error is not None:
            raise error


def contents(folder: Path) -> dict[str, str]:
    """Every file below a folder, hidden ones too: relative name and text; folders end in a slash."""
    return {
        str(p.relative_to(folder)) + ("/" if p.is_dir() else ""): p.read_text() if p.is_file() else ""
        for p in sorted(folder.rglob("*"))
    }


def make_bundle(target: Path, text: str = "old") -> Path:
    target.mkdir()
    (target / MANIFEST_NAME).write_text(text)
    (target / f"{text}.onnx").write_text(text)
    return target


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    with staged_folder(target) as folder:
        (folder / MANIFEST_NAME).write_text("new")
        (folder / "graphs").mkdir()
        (folder / "graphs" / "model.onnx").write_text("graph")
        assert not target.exists()
        assert folder.parent == tmp_path
    assert contents(tmp_path) == {
        "bundle/": "",
        f"bundle/{MANIFEST_NAME}": "new",
        "bundle/graphs/": "",
        "bundle/graphs/model.onnx": "graph",
    }
    assert target.stat().st_mode & 0o777 == 0o755


def test_missing_parents_are_made(tmp_path: Path) -> None:
    with staged_folder(tmp_path / "a" / "b" / "bundle") as folder:
        (folder / "x").write_text("x")
    assert (tmp_path / "a" / "b" / "bundle" / "x").read_text() == "x"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_an_exception_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error):
        stage(tmp_path / "bundle", {"half": "written"}, error())
    assert contents(tmp_path) == {}


def test_an_exception_leaves_the_old_bundle(tmp_path: Path) -> None:
    target = make_bundle(tmp_path / "bundle")
    before = contents(tmp_path)
    with pytest.raises(RuntimeError):
        stage(target, {MANIFEST_NAME: "new"}, RuntimeError(), overwrite=True)
    assert contents(tmp_path) == before


def test_an_existing_bundle_is_refused_before_any_work(tmp_path: Path) -> None:
    target = make_bundle(tmp_path / "bundle")
    before = contents(tmp_path)
    with pytest.raises(TargetError, match=r"exists already.*--overwrite"), staged_folder(target):
        pytest.fail("the block must not run")
    assert contents(tmp_path) == before


def test_overwrite_replaces_a_bundle(tmp_path: Path) -> None:
    target = make_bundle(tmp_path / "bundle")
    with staged_folder(target, overwrite=True) as folder:
        (folder / MANIFEST_NAME).write_text("new")
        assert (target / MANIFEST_NAME).read_text() == "old"
    assert contents(tmp_path) == {"bundle/": "", f"bundle/{MANIFEST_NAME}": "new"}


def test_overwrite_of_nothing_is_fine(tmp_path: Path) -> None:
    with staged_folder(tmp_path / "bundle", overwrite=True) as folder:
        (folder / MANIFEST_NAME).write_text("new")
    assert contents(tmp_path / "bundle") == {MANIFEST_NAME: "new"}


def _a_folder(target: Path) -> None:
    target.mkdir()
    (target / "thesis.txt").write_text("precious")


def _a_file(target: Path) -> None:
    target.write_text("precious")


def _a_link_to_a_bundle(target: Path) -> None:
    target.symlink_to(make_bundle(target.parent / "elsewhere"), target_is_directory=True)


def _a_dangling_link(target: Path) -> None:
    target.symlink_to(target.parent / "nowhere")


@pytest.mark.parametrize("make", [_a_folder, _a_file, _a_link_to_a_bundle, _a_dangling_link])
@pytest.mark.parametrize("overwrite", [False, True])
def test_what_is_no_bundle_is_never_replaced(tmp_path: Path, make: Callable[[Path], None], overwrite: bool) -> None:
    target = tmp_path / "bundle"
    make(target)
    before, was_link = contents(tmp_path), target.is_symlink()
    with pytest.raises(TargetError, match="bundle"), staged_folder(target, overwrite=overwrite):
        pytest.fail("the block must not run")
    assert contents(tmp_path) == before
    assert target.is_symlink() == was_link


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_target_that_appears_meanwhile_is_kept(tmp_path: Path, overwrite: bool) -> None:
    target = tmp_path / "bundle"

    def build() -> None:
        with staged_folder(target, overwrite=overwrite) as folder:
            (folder / MANIFEST_NAME).write_text("new")
            _a_folder(target)

    with pytest.raises(TargetError):
        build()
    assert contents(tmp_path) == {"bundle/": "", "bundle/thesis.txt": "precious"}


def test_a_parent_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(TargetError, match="cannot be written"), staged_folder(tmp_path / "file" / "bundle"):
        pytest.fail("the block must not run")
    assert contents(tmp_path) == {"file": "x"}


def test_the_old_bundle_returns_when_the_new_one_cannot_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = make_bundle(tmp_path / "bundle")
    before = contents(tmp_path)
    rename = Path.rename

    def refuse_the_new_one(self: Path, destination: Path) -> Path:
        if (self / "new.onnx").exists():
            raise OSError(28, "No space left on device")
        return rename(self, destination)

    monkeypatch.setattr(Path, "rename", refuse_the_new_one)
    monkeypatch.setattr("cosmos_export.bundle.exchange", lambda one, other: False)
    with pytest.raises(TargetError, match="No space left on device"):
        stage(target, {"new.onnx": "new"}, overwrite=True)
    assert contents(tmp_path) == before


def leave_rubbish(parent: Path, name: str) -> Path:
    """What an export leaves that was killed."""
    folder = parent / name
    folder.mkdir()
    (folder / "model.onnx.data").write_text("half")
    return folder


@contextmanager
def another_process(code: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """A Python process that has said "ready", and is killed with SIGKILL in the end."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                stream.close()


STAGING = """
import sys
from pathlib import Path
from cosmos_export.folders import claimed_folder
with claimed_folder(Path(sys.argv[1]), sys.argv[2]) as folder:
    (folder / "model.onnx.data").write_text("half")
    print("ready", flush=True)
    sys.stdin.read()
"""


def test_what_a_killed_export_left_is_cleared_by_the_next(tmp_path: Path) -> None:
    leave_rubbish(tmp_path, ".bundle.partial-abcdef12")
    leave_rubbish(tmp_path, f"{PARITY_SCRATCH}abcdef12")
    stage(tmp_path / "bundle", {MANIFEST_NAME: "new"})
    assert contents(tmp_path) == {"bundle/": "", f"bundle/{MANIFEST_NAME}": "new"}


def test_rubbish_goes_even_where_the_target_is_refused(tmp_path: Path) -> None:
    before = contents(make_bundle(tmp_path / "bundle"))
    leave_rubbish(tmp_path, ".bundle.partial-abcdef12")
    with pytest.raises(TargetError, match="exists already"):
        stage(tmp_path / "bundle", {})
    assert contents(tmp_path / "bundle") == before
    assert os.listdir(tmp_path) == ["bundle"]


def test_what_belongs_to_others_stays(tmp_path: Path) -> None:
    others = [".other.partial-abcdef12", ".bundle.partial-of-my-thesis", "bundle.partial-abcdef12", ".bundle.partial-"]
    for name in others:
        leave_rubbish(tmp_path, name)
    (tmp_path / ".bundle.partial-12345678").symlink_to(tmp_path / ".other.partial-abcdef12")
    stage(tmp_path / "bundle", {MANIFEST_NAME: "new"})
    assert sorted(os.listdir(tmp_path)) == sorted([*others, ".bundle.partial-12345678", "bundle"])
    assert (tmp_path / ".other.partial-abcdef12" / "model.onnx.data").read_text() == "half"


def test_an_export_that_still_runs_is_left_alone_until_it_is_killed(tmp_path: Path) -> None:
    with another_process(STAGING, tmp_path, ".bundle.partial-"):
        (running,) = os.listdir(tmp_path)
        stage(tmp_path / "bundle", {MANIFEST_NAME: "new"})
        assert sorted(os.listdir(tmp_path)) == [running, "bundle"]
        assert contents(tmp_path / running) == {"model.onnx.data": "half"}
    assert sorted(os.listdir(tmp_path)) == [running, "bundle"], "killed: it could not clear up"
    stage(tmp_path / "bundle", {MANIFEST_NAME: "newer"}, overwrite=True)
    assert contents(tmp_path) == {"bundle/": "", f"bundle/{MANIFEST_NAME}": "newer"}


def test_a_folder_is_claimed_for_as_long_as_its_block(tmp_path: Path) -> None:
    with claimed_folder(tmp_path, ".x-") as folder:
        clear_abandoned(tmp_path, ".x-")
        assert folder.is_dir()
    assert os.listdir(tmp_path) == []


def test_a_bundle_is_replaced_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No rename takes the old bundle away before the new one is there."""
    target = make_bundle(tmp_path / "bundle")
    if not exchange(make_bundle(tmp_path / "one"), make_bundle(tmp_path / "other")):
        pytest.skip("this system cannot swap two names")
    monkeypatch.setattr(Path, "rename", lambda *_: pytest.fail("two steps"))
    stage(target, {MANIFEST_NAME: "new"}, overwrite=True)
    assert contents(target) == {MANIFEST_NAME: "new"}


def test_exchange_swaps_whole_folders(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    make_bundle(tmp_path / "b")
    if exchange(tmp_path / "a", tmp_path / "b"):
        assert contents(tmp_path / "a") == {MANIFEST_NAME: "old", "old.onnx": "old"}
        assert contents(tmp_path / "b") == {}


def in_two_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a system that cannot swap names."""
    monkeypatch.setattr("cosmos_export.bundle.exchange", lambda one, other: False)


def test_overwrite_in_two_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_two_steps(monkeypatch)
    target = make_bundle(tmp_path / "bundle")
    stage(target, {MANIFEST_NAME: "new"}, overwrite=True)
    assert contents(tmp_path) == {"bundle/": "", f"bundle/{MANIFEST_NAME}": "new"}


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_kill_between_the_two_steps_loses_nothing(tmp_path: Path, overwrite: bool) -> None:
    """The next export finds the old bundle aside, and puts it back before anything else."""
    aside = tmp_path / ".bundle.partial-abcdef12"
    aside.mkdir()
    make_bundle(aside / "replaced")
    leave_rubbish(tmp_path, ".bundle.partial-21fedcba")
    with pytest.raises(TargetError if not overwrite else RuntimeError):
        stage(tmp_path / "bundle", {MANIFEST_NAME: "new"}, RuntimeError(), overwrite=overwrite)
    assert contents(tmp_path) == {"bundle/": "", f"bundle/{MANIFEST_NAME}": "old", "bundle/old.onnx": "old"}


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), OSError(errno.EDQUOT, "Disk quota exceeded")],
    ids=["full", "quota"],
)
@pytest.mark.parametrize("when", ["written", "synced"])
def test_a_full_disk_keeps_the_old_bundle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError, when: str
) -> None:
    """Some file systems find out only when the bytes go to the disk."""
    target = make_bundle(tmp_path / "bundle")
    before = contents(tmp_path)

    def fail(*_: object) -> None:
        raise error

    if when == "synced":
        monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(TargetError, match=f"bundle cannot be written: {error.strerror}; free some room there"):
        stage(target, {MANIFEST_NAME: "new"}, error if when == "written" else None, overwrite=True)
    assert contents(tmp_path) == before


def test_a_device_that_takes_only_a_part(tmp_path: Path) -> None:
    """numpy's error for it has no number; /dev/full takes no byte."""
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")

    def build() -> None:
        with staged_folder(tmp_path / "bundle"), open("/dev/full", "wb", buffering=0) as file:
            np.zeros(1 << 20).tofile(file)

    with pytest.raises(TargetError, match="No space left on device"):
        build()
    assert contents(tmp_path) == {}


def test_other_errors_are_no_full_disk(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        stage(tmp_path / "bundle", {}, FileNotFoundError(errno.ENOENT, "No such file"))
    assert contents(tmp_path) == {}


def test_everything_is_on_the_disk_before_the_name_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file and folder is synced, then renamed, then the folder with the name."""
    target, steps = tmp_path / "bundle", []
    fsync, rename = os.fsync, Path.rename
    monkeypatch.setattr(os, "fsync", lambda d: (steps.append(os.readlink(f"/proc/self/fd/{d}")), fsync(d))[1])
    monkeypatch.setattr(Path, "rename", lambda a, b: (steps.append("rename"), rename(a, b))[1])
    with staged_folder(target) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "weights").write_text("x")
        (folder / MANIFEST_NAME).write_text("new")
    expected = {str(folder), f"{folder}/sub", f"{folder}/sub/weights", f"{folder}/{MANIFEST_NAME}"}
    assert set(steps[:-2]) == expected
    assert steps[-2:] == ["rename", str(tmp_path)]
