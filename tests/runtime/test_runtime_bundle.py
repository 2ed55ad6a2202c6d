"""Opening a bundle finds what is missing, cut or outside; hashing finds what was altered."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cosmos_runtime import Bundle, BundleError, bundle, load, session

from .tiny_bundles import chain, encode, successor_table, write_bundle


def test_open(bundle_path: Path) -> None:
    bundle = Bundle.open(str(bundle_path))
    assert bundle.path == bundle_path
    assert sorted(bundle.manifest.files) == ["model.onnx", "model.onnx.data", "tokenizer.json"]
    assert bundle.file("model.onnx") == bundle_path / "model.onnx"
    with pytest.raises(BundleError, match="'other' is not listed"):
        bundle.file("other")


def test_hashes_of_an_untouched_bundle(bundle_path: Path) -> None:
    heard: list[tuple[str, int, int]] = []
    bundle = Bundle.open(bundle_path)
    bundle.check_hashes(lambda *progress: heard.append(progress))
    size = sum(entry.size for entry in bundle.manifest.files.values())
    assert {name for name, _, _ in heard} == set(bundle.manifest.files)
    assert [done for _, done, _ in heard] == sorted(done for _, done, _ in heard)
    assert heard[-1][1:] == (size, size)


def test_flipped_bit(bundle_path: Path) -> None:
    data = bundle_path / "model.onnx.data"
    content = bytearray(data.read_bytes())
    content[100] ^= 1
    data.write_bytes(content)
    bundle = Bundle.open(bundle_path)
    with pytest.raises(BundleError, match=r"model\.onnx\.data: altered"):
        bundle.check_hashes()


def test_file_removed_after_opening(bundle_path: Path) -> None:
    bundle = Bundle.open(bundle_path)
    (bundle_path / "model.onnx").unlink()
    with pytest.raises(BundleError, match=r"model\.onnx: listed in manifest\.json but missing"):
        bundle.check_hashes()


def test_missing_file(bundle_path: Path) -> None:
    (bundle_path / "tokenizer.json").unlink()
    with pytest.raises(BundleError, match=r"tokenizer\.json: listed in manifest\.json but missing"):
        Bundle.open(bundle_path)


def test_truncated_file(bundle_path: Path) -> None:
    data = bundle_path / "model.onnx.data"
    size = data.stat().st_size
    os.truncate(data, size - 1)
    with pytest.raises(BundleError, match=f"expected {size} bytes, got {size - 1}"):
        Bundle.open(bundle_path)


def test_link_out_of_the_folder(bundle_path: Path, tmp_path: Path) -> None:
    data = bundle_path / "model.onnx.data"
    data.rename(tmp_path / "elsewhere")
    data.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BundleError, match="a symbolic link that leaves the bundle"):
        Bundle.open(bundle_path)


def test_link_inside_the_folder(bundle_path: Path) -> None:
    data = bundle_path / "model.onnx.data"
    data.rename(bundle_path / "shared")
    data.symlink_to("shared")
    Bundle.open(bundle_path).check_hashes()


def test_folder_reached_through_a_link(bundle_path: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(bundle_path)
    Bundle.open(tmp_path / "link").check_hashes()


def test_link_to_itself(bundle_path: Path) -> None:
    data = bundle_path / "model.onnx.data"
    data.unlink()
    data.symlink_to(data)
    with pytest.raises(BundleError, match="missing"):
        Bundle.open(bundle_path)


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo], ids=["folder", "pipe"])
def test_what_is_not_a_regular_file(bundle_path: Path, make: Callable[[Path], None]) -> None:
    data = bundle_path / "model.onnx.data"
    data.unlink()
    make(data)
    with pytest.raises(BundleError, match="expected a regular file"):
        Bundle.open(bundle_path)


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no such folder; expected a bundle"):
        Bundle.open(tmp_path / "nothing")


def test_folder_without_manifest(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"has no manifest\.json"):
        Bundle.open(tmp_path)


def test_manifest_that_is_not_utf8(bundle_path: Path) -> None:
    (bundle_path / "manifest.json").write_bytes(b"\xff\xfe")
    with pytest.raises(BundleError, match="cannot be read"):
        Bundle.open(bundle_path)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("m.pt", "PyTorch file"), ("m.pt2", "PyTorch file"), ("m.onnx", "bare ONNX graph"), ("m.zip", "single file")],
)
def test_file_instead_of_folder(tmp_path: Path, name: str, kind: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(BundleError, match=rf"expected a bundle: the folder with manifest\.json.* got a {kind}"):
        Bundle.open(tmp_path / name)


def test_file_of_a_bundle_instead_of_its_folder(bundle_path: Path) -> None:
    with pytest.raises(BundleError, match=f"give its folder instead: {bundle_path}"):
        Bundle.open(bundle_path / "model.onnx")


def replace(path: Path, by: Path) -> None:
    """What an export does to a bundle that is in use: the folder's name goes to another folder, the old one goes."""
    path.rename(path.with_name("old"))
    by.rename(path)
    shutil.rmtree(path.with_name("old"))


def test_a_replaced_bundle_keeps_its_session(tmp_path: Path) -> None:
    """Logits and tokenizer stay those of the bundle that was loaded, though neither's file has a name any more."""
    path = write_bundle(tmp_path / "bundle", chain("abc"))
    session = load(path, threads=1)
    before = session.logits([1, 2, 3])
    other = write_bundle(tmp_path / "other", chain("xyz"), vocab_size=257, table=successor_table(257, chain("cba")))
    (other / "tokenizer.json").write_text("{}")  # another session's tokenizer, which cannot even be read
    replace(path, other)
    assert (session.logits([1, 2, 3]) == before).all()
    assert session.tokenizer.decode(encode("abc")) == "abc"
    with pytest.raises(BundleError, match=r"tokenizer\.json: expected \d+ bytes"):
        Bundle.open(path)


def test_a_bundle_that_was_replaced_before_it_was_loaded(tmp_path: Path) -> None:
    path = write_bundle(tmp_path / "bundle", chain("abc"))
    opened = Bundle.open(path)
    replace(path, write_bundle(tmp_path / "other", chain("cba")))
    with pytest.raises(BundleError, match="was replaced or removed since it was opened; open the bundle again"):
        load(opened)


def test_a_bundle_that_is_replaced_while_it_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The manifest of the one and the files of the other: that is read again, and is one bundle."""
    path = write_bundle(tmp_path / "bundle", chain("abc"))
    other = write_bundle(tmp_path / "other", chain("cba"), tokenizer=False)
    read = bundle.read_manifest

    def read_and_replace(folder: Path) -> bytes:
        raw = read(folder)
        if other.exists():
            replace(path, other)
        return raw

    monkeypatch.setattr(bundle, "read_manifest", read_and_replace)
    assert Bundle.open(path).manifest.tokenizer is None


def test_a_bundle_that_is_replaced_while_it_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph of the one might compute with the weights of the other."""
    path, other = write_bundle(tmp_path / "bundle", chain("abc")), write_bundle(tmp_path / "other", chain("cba"))
    create = session.create_inference_session

    def create_and_replace(*arguments: Any, **options: Any) -> Any:
        made = create(*arguments, **options)
        replace(path, other)
        return made

    monkeypatch.setattr(session, "create_inference_session", create_and_replace)
    with pytest.raises(BundleError, match="was replaced or removed since it was opened"):
        load(path)


def test_held_files_are_let_go(bundle_path: Path) -> None:
    import gc

    gc.collect()
    before = len(os.listdir("/dev/fd"))
    bundles = [Bundle.open(bundle_path) for _ in range(20)]
    assert len(os.listdir("/dev/fd")) >= before + 20
    del bundles
    gc.collect()
    assert len(os.listdir("/dev/fd")) <= before
