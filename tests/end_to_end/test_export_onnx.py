"""The whole way through the command line: a checkpoint becomes a bundle, the bundle becomes text."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

from cosmos_export import pipeline
from cosmos_export.checkpoint import Checkpoint, save_checkpoint
from cosmos_export.cli import main as export_main
from cosmos_export.model.loading import load_decoder
from cosmos_export.parity.verify import verify_bundle
from cosmos_export.pipeline import export_bundle
from cosmos_export.resources import demo_checkpoint, recipe_names
from cosmos_runtime import Bundle, load
from cosmos_runtime.cli import main as run_main

ORACLE = Path(__file__).resolve().parents[3] / "shared" / "oracle" / "tiny"


def export(*arguments: object) -> Result:
    return CliRunner().invoke(export_main, ["onnx", *map(str, arguments)], catch_exceptions=False)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model's bundle, exported without a --checkpoint as a newcomer would."""
    out = tmp_path_factory.mktemp("demo") / "bundle"
    result = export("--out", out, "--verify", "quick")
    assert result.exit_code == 0, result.output
    last = result.stdout.splitlines()[-1]
    assert str(out) in last
    assert "equal float64 within the gate" in last
    return out


def test_the_demo_prints_text_like_its_corpus(demo):
    result = CliRunner().invoke(
        run_main, ["generate", str(demo), "--prompt", "ROMEO:", "--seed", "1", "--max-new-tokens", "120", "--json"]
    )
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert len(answer["tokens"]) == 120
    words = [word.strip(".,;:!?'\n").lower() for word in answer["text"].split()]
    common = {"the", "and", "to", "of", "i", "you", "my", "a", "that", "in", "is", "not", "with", "me", "it", "be"}
    assert sum(word in common for word in words) / len(words) > 0.15, answer["text"]
    assert any(line.rstrip().endswith(":") and line[:-1].strip().isupper() for line in answer["text"].splitlines())


def test_greedy_tokens_are_those_of_the_eager_model(demo):
    session = load(demo)
    model = load_decoder(Checkpoint.open(demo_checkpoint()))
    ids = session.tokenizer.encode("First Citizen:\n")
    from cosmos_runtime import generate

    expected = list(ids)
    with torch.inference_mode():
        for _ in range(64):
            expected.append(int(model(torch.tensor([expected]))[0, -1].argmax()))
    assert list(generate(session, ids, max_new_tokens=64)) == expected[len(ids) :]


def test_the_bundle_is_whole_and_says_what_was_proven(demo):
    bundle = Bundle.open(demo)
    bundle.check_hashes()
    manifest = bundle.manifest
    assert set(manifest.files) == {
        "config.json",
        "genai.onnx",
        "genai_config.json",
        "model.onnx",
        "model.onnx.data",
        "tokenizer.json",
    }
    assert manifest.parity is not None
    assert manifest.parity["passed"] is True
    assert manifest.parity["longest_sequence"] == 256
    assert any("256" in skipped["reason"] for skipped in manifest.parity["skipped"])
    assert {"torch", "onnx", "onnxruntime", "python"} <= set(manifest.versions)
    # Weights once: the tied embedding and the rotary tables are in the file a single time.
    parameters, tables = manifest.model["parameters"], 2 * 512 * 16
    assert (parameters + tables) * 4 * 0.99 < manifest.files["model.onnx.data"].size < (parameters + tables) * 4 * 1.02


def test_verify_proves_it_again_and_writes_a_report(demo, tmp_path):
    report_file = tmp_path / "report.json"
    result = CliRunner().invoke(export_main, ["verify", str(demo), "--quick", "--json", str(report_file)])
    assert result.exit_code == 0, result.output
    assert "PASS" in result.stdout
    report = json.loads(report_file.read_text())
    assert report["passed"] is True
    assert report["stored_tensors"]["equal"] == report["stored_tensors"]["expected"] > 0
    assert all(m["error"] <= m["allowed"] for case in report["cases"] for m in case["measurements"])


def test_verify_refuses_an_altered_bundle(small_bundle, tmp_path):
    import shutil

    folder = tmp_path / "altered"
    shutil.copytree(small_bundle.path, folder)
    data = bytearray((folder / "model.onnx.data").read_bytes())
    data[1000] ^= 1
    (folder / "model.onnx.data").write_bytes(data)
    result = CliRunner().invoke(export_main, ["verify", str(folder)])
    assert result.exit_code == 1
    assert "model.onnx.data: altered" in result.stderr


def test_verify_against_another_checkpoint_fails_and_names_the_tensors(small_bundle, small_checkpoint, tmp_path):
    other = {n: small_checkpoint.tensor(n).clone() for n in small_checkpoint.names}
    other["layers.1.norm2.weight"][4] += 0.25
    save_checkpoint(tmp_path / "other", small_checkpoint.config, other)
    arguments = ["verify", str(small_bundle.path), "--checkpoint", str(tmp_path / "other"), "--json", "-"]
    result = CliRunner().invoke(export_main, arguments)
    assert result.exit_code == 1
    report = json.loads(result.stdout)
    assert report["passed"] is False
    assert "layers.1.norm2.weight" in report["stored_tensors"]["problems"][0]


def test_a_failed_proof_leaves_nothing_and_exits_with_1(small_checkpoint, tmp_path, monkeypatch):
    save_checkpoint(
        tmp_path / "model", small_checkpoint.config, {n: small_checkpoint.tensor(n) for n in small_checkpoint.names}
    )
    monkeypatch.setattr(pipeline, "attach_weights", _attach_with_a_fault(pipeline.attach_weights))
    result = export("--checkpoint", tmp_path / "model", "--out", tmp_path / "bundle")
    assert result.exit_code == 1
    assert "FAIL" in result.stderr
    assert "error: the exported graph is not equal to the model" in result.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]


def _attach_with_a_fault(attach):
    """Weights of a checkpoint whose value heads are a little too large."""

    def attach_scaled(model, checkpoint, *rest):
        wrong = {n: checkpoint.tensor(n) * (1.01 if n.endswith("v_proj.weight") else 1) for n in checkpoint.names}
        origin = {"kind": "preset", "location": "wrong"}
        attach(model, Checkpoint.from_tensors(checkpoint.config, wrong, origin), *rest)

    return attach_scaled


@pytest.mark.parametrize(
    ("arguments", "exit_code", "words"),
    [
        (["--preset", "gigantic"], 2, "gigantic"),
        (["--checkpoint", "nowhere"], 1, "no checkpoint folder at nowhere"),
        (["--checkpoint", "a", "--preset", "beginner"], 2, "give one of them"),
        (["--recipe", "int3"], 1, f"there are: {', '.join(recipe_names())}"),
        (["--outt", "x"], 2, "--out"),
        (["--seed", "-1"], 2, "seed"),
        (["stray"], 2, "stray"),
    ],
)
def test_wrong_arguments_end_with_one_clear_error(arguments, exit_code, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = export(*arguments)
    assert result.exit_code == exit_code
    assert words in result.stderr
    assert "Traceback" not in result.output
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_that_does_not_fit_is_named_and_nothing_is_written(small_checkpoint, tmp_path):
    tensors = {n: small_checkpoint.tensor(n) for n in small_checkpoint.names}
    tensors["layers.0.attention.k_proj.weight"] = torch.zeros(3, 48)
    del tensors["norm.weight"]
    save_checkpoint(tmp_path / "model", small_checkpoint.config, tensors)
    result = export("--checkpoint", tmp_path / "model", "--out", tmp_path / "bundle")
    assert result.exit_code == 1
    assert "norm.weight is missing" in result.stderr
    assert "k_proj.weight has shape (3, 48), expected (32, 48)" in result.stderr
    assert len([line for line in result.stderr.splitlines() if line.startswith("error:")]) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]


def test_an_existing_target_is_kept(small_bundle, small_checkpoint, recipe):
    from cosmos_export.errors import TargetError

    before = (small_bundle.path / "manifest.json").read_bytes()
    with pytest.raises(TargetError, match="exists already"):
        export_bundle(small_checkpoint, small_bundle.path, recipe)
    assert (small_bundle.path / "manifest.json").read_bytes() == before


def test_exporting_twice_gives_the_same_graph_and_weights(small_bundle, small_checkpoint, recipe, tmp_path):
    again = export_bundle(small_checkpoint, tmp_path / "again", recipe)
    assert again.manifest.files == small_bundle.manifest.files


@pytest.mark.skipif(not ORACLE.is_dir(), reason="../shared/oracle/tiny is not here")
@pytest.mark.parametrize(
    ("tag", "layout", "causal"),
    [
        ("backbone", "interleave", True),
        ("backbone_tile", "tile", True),
        ("backbone_published", "tile", False),
    ],
)
def test_the_oracle_through_onnxruntime(tag, layout, causal, recipe, tmp_path):
    checkpoint = Checkpoint.open(ORACLE, head_layout=layout)
    bundle = export_bundle(checkpoint, tmp_path / "oracle", recipe, causal=causal)
    expected = np.load(ORACLE / "expected_logits.npz")
    logits = load(bundle.path).logits(expected["input_ids"])
    gate = bundle.report.cases[0].measurements[0]
    for row, actual in enumerate(logits):
        exact = expected[f"{tag}/row{row}/call0"]
        # The last position is the capability heads' in the oracle. What float32 allows at this size: 1e-5 of the range.
        assert np.abs(actual - exact)[:-1].max() <= 1e-5 * np.ptp(exact), gate


def test_a_model_without_causal_mask_verifies_as_such(small_checkpoint, recipe, tmp_path):
    bundle = export_bundle(small_checkpoint, tmp_path / "both-ways", recipe, causal=False)
    assert bundle.manifest.model["causal"] is False
    assert not verify_bundle(bundle.path, small_checkpoint, causal=True).passed


def test_the_commands_are_installed_and_the_runtime_needs_no_torch(demo):
    blocked = "import sys; sys.modules.update(dict.fromkeys(['torch', 'onnx', 'onnxscript', 'cosmos_export']))"
    code = f"{blocked}; from cosmos_runtime.cli import main; main()"
    arguments = ["generate", str(demo), "--prompt", "KING", "--greedy", "--max-new-tokens", "3"]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("KING")
    for command in ("cosmos-export", "cosmos-run"):
        program = Path(sys.executable).parent / command
        assert subprocess.run([program, "--help"], capture_output=True, check=False).returncode == 0
