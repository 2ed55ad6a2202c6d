"""A calibrated bundle is proven when it is made and again later, when only the bundle and the checkpoint are there."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
from click.testing import CliRunner

from cosmos_export.calibration.plan import CalibrationPlan
from cosmos_export.checkpoint import Checkpoint
from cosmos_export.cli import main
from cosmos_export.model.tensors_read import tensors_read
from cosmos_export.onnx.head_matrices import is_wide
from cosmos_export.parity.gates import Verdict
from cosmos_export.parity.verify import Effort, verify_bundle
from cosmos_export.pipeline import ExportedBundle, export_bundle
from cosmos_export.recipe import ExportRecipe
from cosmos_runtime import CAPABILITIES, MANIFEST_NAME, Manifest, describe_file

from .head_bundles import heads_checkpoint, heads_config


@pytest.fixture(scope="module")
def trained(gentle_checkpoint: Checkpoint) -> Checkpoint:
    """Passes for a trained model: a preset's random weights are not calibrated."""
    return replace(gentle_checkpoint, origin={"kind": "checkpoint", "location": "gentle"})


@pytest.fixture(scope="module")
def calibrated(trained: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> ExportedBundle:
    recipe = replace(ExportRecipe.load("cpu-int4"), calibration=CalibrationPlan(tokens=512, epochs=1))
    return export_bundle(trained, tmp_path_factory.mktemp("calibrated") / "bundle", recipe, effort=Effort.QUICK)


def test_it_is_proven_when_made_and_later(calibrated: ExportedBundle, trained: Checkpoint) -> None:
    later = verify_bundle(calibrated.path, trained, effort=Effort.QUICK)
    assert calibrated.report is not None
    assert calibrated.report.passed
    assert later.passed
    assert sum(s.calibrated for s in later.stored) == 15  # 7 projections in each of 2 layers, and the embedding
    assert "15 of them calibrated" in later.summary()


def test_it_differs_from_the_weights_rounded_one_by_one(
    calibrated: ExportedBundle, trained: Checkpoint, tmp_path: Path
) -> None:
    recipe = replace(ExportRecipe.load("cpu-int4"), calibration=None)
    plain = export_bundle(trained, tmp_path / "plain", recipe, effort=Effort.QUICK)
    assert plain.manifest.files["model.onnx.data"] != calibrated.manifest.files["model.onnx.data"]
    assert "calibration" not in plain.manifest.recipe
    assert "calibration" in calibrated.manifest.recipe


def test_a_row_with_a_wrong_scale_fails_later(calibrated: ExportedBundle, trained: Checkpoint, tmp_path: Path) -> None:
    folder = tmp_path / "faulty"
    folder.mkdir()
    for file in calibrated.path.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    _triple(folder, "layers.1.feed_forward.w2.weight.scales")
    report = verify_bundle(folder, trained, effort=Effort.QUICK)
    assert not report.passed
    assert any("layers.1.feed_forward.w2.weight" in problem for problem in report.stored_problems)


def test_the_command_line_takes_a_text_or_none(tmp_path: Path) -> None:
    run = CliRunner().invoke
    wrong = run(main, ["onnx", "--recipe", "cpu-int4", "--calibration", "nowhere.txt", "--out", str(tmp_path / "a")])
    assert wrong.exit_code == 2
    assert "self, off, or the path" in wrong.output
    (tmp_path / "text.txt").write_text("words")
    useless = ["--recipe", "cpu-fp32", "--calibration", str(tmp_path / "text.txt")]
    wrong = run(main, ["onnx", *useless, "--out", str(tmp_path / "a")])
    assert wrong.exit_code == 2
    assert "cpu-fp32 has no calibration" in wrong.output


def _triple(folder: Path, scales: str) -> None:
    """Makes the scales of one row three times as large, and the manifest agree."""
    path = folder / "model.onnx"
    model = onnx.load(path)
    (tensor,) = [t for t in model.graph.initializer if t.name == scales]
    values = onnx.numpy_helper.to_array(tensor).copy()
    values[0] *= 3
    tensor.CopyFrom(onnx.numpy_helper.from_array(values, scales))
    path.write_bytes(model.SerializeToString())
    manifest = Manifest.from_json((folder / MANIFEST_NAME).read_text(encoding="utf-8"))
    files = {**manifest.files, path.name: describe_file(path)}
    (folder / MANIFEST_NAME).write_text(replace(manifest, files=files).to_json(), encoding="utf-8")


@pytest.fixture(scope="module")
def with_heads() -> Checkpoint:
    return replace(heads_checkpoint(heads_config()), origin={"kind": "checkpoint", "location": "lively"})


@pytest.fixture(scope="module")
def calibrated_heads(with_heads: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> ExportedBundle:
    recipe = replace(ExportRecipe.load("cpu-int4"), embedding=None, calibration=CalibrationPlan(tokens=512, epochs=0))
    out = tmp_path_factory.mktemp("calibrated") / "heads"
    return export_bundle(with_heads, out, recipe, capabilities=CAPABILITIES, effort=Effort.OFF)


def test_heads_are_calibrated_and_proven_later(calibrated_heads: ExportedBundle, with_heads: Checkpoint) -> None:
    report = verify_bundle(calibrated_heads.path, with_heads, effort=Effort.QUICK)
    assert all(stored.passed for stored in report.stored), report.stored_problems
    assert all(case.verdict is not Verdict.FAIL for case in report.cases)
    read = tensors_read(with_heads.config, CAPABILITIES)
    assert sum(stored.calibrated for stored in report.stored) == 14 + sum(map(is_wide, read))


def test_a_row_of_a_head_with_a_wrong_scale_fails_later(
    calibrated_heads: ExportedBundle, with_heads: Checkpoint, tmp_path: Path
) -> None:
    folder = tmp_path / "faulty"
    shutil.copytree(calibrated_heads.path, folder)
    _triple(folder, "memory_system.procedural_memory.skills_out.weight.scales")
    report = verify_bundle(folder, with_heads, effort=Effort.QUICK)
    assert not report.passed
    assert any("skills_out.weight" in problem for problem in report.stored_problems)
