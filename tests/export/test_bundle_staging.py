"""Bundles appear whole: a staged folder takes its target's place at the end, or leaves no trace."""

from collections.abc import Callable
from pathlib import Path

import pytest

from cosmos_export.bundle import staged_folder
from cosmos_export.errors import TargetError
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
