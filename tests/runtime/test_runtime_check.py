"""`check_bundle` and `cosmos-run check`: every flipped bit is found and its file named, and so is what is too much."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from cosmos_runtime import Bundle, BundleError, CheckedBundle, check_bundle
from cosmos_runtime.cli import main
from cosmos_runtime.manifest_digest import digest_problem

from .tiny_bundles import write_bundle


@pytest.fixture
def good(bundle_path: Path) -> Path:
    assert check_bundle(bundle_path).good
    return bundle_path


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(main, ["check", *map(str, arguments)], prog_name="cosmos-run")


def bad_files(checked: CheckedBundle) -> set[str]:
    return {finding.file for finding in checked.findings}


def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


@pytest.mark.parametrize("file", ["model.onnx", "model.onnx.data", "tokenizer.json"])
def test_a_flipped_bit_names_its_file(good: Path, file: str) -> None:
    bits = (good / file).stat().st_size * 8
    for bit in (0, bits - 1, *random.Random(file).sample(range(bits), 20)):
        flip(good / file, bit)
        assert bad_files(check_bundle(good)) == {file}
        flip(good / file, bit)
    assert check_bundle(good).good


def test_a_flipped_bit_of_the_manifest_names_it(good: Path) -> None:
    """Wherever it is: in a name, a number, a space, the digest or the name of the digest's key."""
    manifest = good / "manifest.json"
    raw, choose = manifest.read_bytes(), random.Random(0)
    for place in range(len(raw)):
        spoilt = bytearray(raw)
        spoilt[place] ^= 1 << choose.randrange(8)
        assert not _holds(bytes(spoilt)), f"byte {place}: {spoilt[place - 20 : place + 20]!r}"
    for bit in choose.sample(range(len(raw) * 8), 40):
        flip(manifest, bit)
        assert "manifest.json" in _findings(good), f"bit {bit}"
        flip(manifest, bit)
    assert check_bundle(good).good


def _holds(manifest: bytes) -> bool:
    try:
        return digest_problem(manifest, "manifest.json") is None
    except BundleError:
        return False


def _findings(folder: Path) -> str:
    """What is said, whether the manifest can be read or not."""
    result = run(folder)
    assert result.exit_code == 1
    return result.stdout + result.stderr


def test_a_flipped_bit_of_the_manifest_also_fails_the_plain_hash_check(good: Path) -> None:
    text = (good / "manifest.json").read_text()
    (good / "manifest.json").write_text(text.replace('"max_abs": 0.0', '"max_abs": 0.1'))
    with pytest.raises(BundleError, match=r"manifest\.json: altered"):
        Bundle.open(good).check_hashes()


@pytest.mark.parametrize("key", ["digest", "operators"])
def test_a_manifest_that_lost_one_of_two_keys(good: Path, key: str) -> None:
    document = json.loads((good / "manifest.json").read_text())
    del document[key]
    (good / "manifest.json").write_text(json.dumps(document))
    assert bad_files(check_bundle(good)) == {"manifest.json"}
    with pytest.raises(BundleError, match=f"manifest.json: {key}: missing"):
        Bundle.open(good)


def test_a_bundle_of_before_there_was_a_digest(good: Path) -> None:
    document = json.loads((good / "manifest.json").read_text())
    del document["digest"], document["operators"]
    (good / "manifest.json").write_text(json.dumps(document))
    checked = check_bundle(good)
    assert checked.good
    assert "has no digest of itself" in checked.notes[0]


def test_everything_that_is_wrong_is_found_at_once(good: Path, tmp_path: Path) -> None:
    flip(good / "model.onnx.data", 99)
    (good / "tokenizer.json").unlink()
    (good / "model.onnx").write_bytes(b"cut")
    (good / "notes.txt").touch()
    (good / "sub").mkdir()
    (good / "sub" / "ops.so").touch()
    (good / "link").symlink_to(tmp_path)
    problems = {finding.file: finding.problem for finding in check_bundle(good).findings}
    assert set(problems) == {"model.onnx.data", "tokenizer.json", "model.onnx", "notes.txt", "sub/ops.so", "link"}
    assert problems["model.onnx.data"].startswith("altered: expected SHA-256 ")
    assert problems["tokenizer.json"] == "listed in manifest.json but missing"
    assert problems["model.onnx"].endswith("got 3")
    assert problems["notes.txt"] == problems["link"] == "not listed in manifest.json"


def test_graphs_beyond_those_that_are_loaded_are_checked(tmp_path: Path) -> None:
    """onnxruntime-genai would load genai.onnx."""
    import onnx
    from onnx import helper

    from cosmos_runtime import Manifest, describe_file

    path = write_bundle(tmp_path / "bundle")
    model = onnx.load(path / "model.onnx", load_external_data=False)
    model.graph.node.append(helper.make_node("Steal", ["some_ids"], ["x"], domain="com.evil"))
    (path / "genai.onnx").write_bytes(model.SerializeToString())
    manifest = Manifest.from_json((path / "manifest.json").read_text())
    files = {**manifest.files, "genai.onnx": describe_file(path / "genai.onnx")}
    (path / "manifest.json").write_text(type(manifest)(**{**vars(manifest), "files": files}).to_json())
    assert bad_files(check_bundle(path)) == {"genai.onnx"}


def test_progress_counts_bytes(good: Path) -> None:
    heard: list[tuple[str, int, int]] = []
    checked = check_bundle(good, progress=lambda *now: heard.append(now))
    size = sum(entry.size for entry in Bundle.open(good).manifest.files.values())
    assert heard[-1][1:] == (size, size)
    assert checked.size == size + (good / "manifest.json").stat().st_size
    assert checked.files == 4


def test_command_on_a_good_bundle(good: Path) -> None:
    result = run(good)
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.startswith(f"{good}: good: 4 files, ")


def test_command_on_a_bad_bundle(good: Path) -> None:
    flip(good / "model.onnx.data", 5)
    result = run(good)
    assert result.exit_code == 1
    assert result.stdout.startswith("model.onnx.data: altered: expected SHA-256")
    assert result.stderr.startswith(f"error: {good}: not as it was exported: 1 bad file; ")


def test_command_with_json(good: Path) -> None:
    (good / "added").touch()
    result = run(good, "--json")
    assert result.exit_code == 1
    report = json.loads(result.stdout)
    assert report["findings"] == [{"file": "added", "problem": "not listed in manifest.json"}]
    assert (report["good"], report["signed"]) == (False, None)


@pytest.mark.parametrize(("make", "words"), [(Path.mkdir, "has no manifest.json"), (Path.touch, "expected a bundle")])
def test_command_without_a_bundle(tmp_path: Path, make: Any, words: str) -> None:
    make(tmp_path / "none")
    result = run(tmp_path / "none")
    assert result.exit_code == 1
    assert words in result.stderr
    assert result.stderr.startswith("error: ")
