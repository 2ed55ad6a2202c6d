"""The demo model in few bits: exported through the command line, measured, run, and refused where it is too coarse."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

from cosmos_export.checkpoint import Checkpoint
from cosmos_export.cli import main as export_main
from cosmos_export.errors import ParityError
from cosmos_export.parity.gates import Verdict
from cosmos_export.parity.quality import measure_quality, sampled_text
from cosmos_export.parity.verify import Effort
from cosmos_export.pipeline import ExportedBundle, export_bundle
from cosmos_export.recipe import ExportRecipe
from cosmos_export.resources import demo_checkpoint
from cosmos_runtime import Bundle, ProviderError, load
from cosmos_runtime.cli import main as run_main

# Mean KL divergence at most, agreement at least, size at most as a share of the weights in float32.
LIMITS = {"int8": (0.005, 0.985, 0.30), "int4": (0.05, 0.90, 0.20)}


# Without calibration, which takes a minute: `test_calibrated` has a small one, `make verify-parity` the demo's.
RECIPES = {"int8": "cpu-int8", "int4": "cpu-int4-quick"}


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return Checkpoint.open(demo_checkpoint())


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """(folder, parity report as JSON) of the demo in a precision, exported when it is first asked for."""
    made = {}

    def export(precision: str) -> tuple[Path, dict]:
        if precision not in made:
            out = tmp_path_factory.mktemp("demo") / precision
            arguments = ["onnx", "--recipe", RECIPES[precision], "--verify", "quick", "--out", str(out), "--json"]
            result = CliRunner().invoke(export_main, arguments, catch_exceptions=False)
            assert result.exit_code == 0, result.output
            made[precision] = out, json.loads(result.stdout)["parity"]
        return made[precision]

    return export


@pytest.mark.parametrize("precision", LIMITS)
def test_few_bits_stay_near_the_model(precision, exported):
    folder, report = exported(precision)
    divergence, agreement, share = LIMITS[precision]
    quality = report["quality"]
    assert report["passed"] is True
    assert quality["passed"] is True
    assert quality["tokens"] > 1000
    assert 0 < quality["mean_kl_divergence"] <= divergence
    assert quality["mean_kl_divergence"] <= quality["kl_divergence_999"]
    assert agreement <= quality["top1_agreement"] < 1
    assert quality["perplexity"] == pytest.approx(quality["model_perplexity"], rel=0.05)
    assert 5 < quality["model_perplexity"] < 50, "text that the model writes itself"
    manifest = Bundle.open(folder).manifest
    assert manifest.parity["quality"] == quality
    size = sum(entry.size for name, entry in manifest.files.items() if name.endswith(".data"))
    assert size < share * 4 * manifest.model["parameters"]


@pytest.mark.parametrize("precision", LIMITS)
def test_both_arithmetics_and_pieces_of_tokens_are_proven(precision, exported):
    _, report = exported(precision)
    names = {(case["arithmetic"], case["name"]) for case in report["cases"]}
    for arithmetic in ("float32", "int8 activations"):
        ways = {name.split(" ", 3)[-1] for kind, name in names if kind == arithmetic and name.startswith("1 x 48")}
        assert ways == {"prefill+decode", "decode only", "uneven chunks"}
    assert all(case["verdict"] != "FAIL" for case in report["cases"])
    assert report["stored_tensors"]["equal"] == report["stored_tensors"]["expected"] > 0


def test_int4_writes_text_like_its_corpus(exported):
    folder, _ = exported("int4")
    arguments = ["generate", str(folder), "--prompt", "ROMEO:", "--greedy", "--max-new-tokens", "60", "--json"]
    first, second = (CliRunner().invoke(run_main, arguments, catch_exceptions=False) for _ in range(2))
    assert first.exit_code == 0, first.output
    answer = json.loads(first.stdout)
    assert answer["tokens"] == json.loads(second.stdout)["tokens"]
    assert len(answer["tokens"]) == 60
    words = [word.strip(".,;:!?'\n").lower() for word in answer["text"].split()]
    common = {"the", "and", "to", "of", "i", "you", "my", "a", "that", "in", "is", "not", "with", "me", "it", "be"}
    assert sum(word in common for word in words) / len(words) > 0.15, answer["text"]


def test_verify_proves_a_quantised_bundle_again(exported, tmp_path):
    folder, before = exported("int4")
    report = tmp_path / "report.json"
    result = CliRunner().invoke(export_main, ["verify", str(folder), "--quick", "--json", str(report)])
    assert result.exit_code == 0, result.output
    again = json.loads(report.read_text(encoding="utf-8"))
    assert again["quality"]["mean_kl_divergence"] == pytest.approx(before["quality"]["mean_kl_divergence"], rel=0.2)
    assert "KL divergence" in result.stdout


def test_four_bits_do_not_pass_for_eight(checkpoint, tmp_path):
    """The recipe says int8 and then overrides every matrix: equal to its rounded self, too far from the model."""
    coarse = "{bits = 4, block_size = 256, symmetric = true, accuracy_level = 4}"
    recipe = tmp_path / "coarse.toml"
    text = (Path(__file__).parents[2] / "configs" / "exports" / "cpu-int8.toml").read_text(encoding="utf-8")
    overrides = "".join(f"{name} = {coarse}\n" for name in ("qkv_proj", "o_proj", "w1_w3", "w2"))
    recipe.write_text(f"{text}\n[overrides]\n{overrides}", encoding="utf-8")
    with pytest.raises(ParityError, match="int8 gate") as caught:
        export_bundle(checkpoint, tmp_path / "out", ExportRecipe.load(str(recipe)), effort=Effort.QUICK)
    report = caught.value.report
    assert report.count(Verdict.FAIL) == 0
    assert not report.stored_problems
    assert report.quality.passed is False
    assert report.quality.mean_kl_divergence > LIMITS["int8"][0]
    assert [path.name for path in tmp_path.iterdir()] == ["coarse.toml"]


def test_the_quality_gate_sees_scales_that_went_wrong(exported, checkpoint, tmp_path):
    folder, _ = exported("int4")
    text = sampled_text(load(folder))[:4]
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    graph = Bundle.open(broken).file("model.onnx")
    for initializer in onnx.load(graph, load_external_data=False).graph.initializer:
        if initializer.name.startswith("layers.") and initializer.name.endswith(".scales"):
            entry = {e.key: e.value for e in initializer.external_data}
            place, shape = broken / entry["location"], tuple(initializer.dims)
            scales = np.memmap(place, "float32", "r+", offset=int(entry["offset"]), shape=shape)
            scales *= np.random.default_rng(0).uniform(0.5, 1.5, shape)
            scales.flush()
    good, bad = (measure_quality(load(f), checkpoint, text) for f in (folder, broken))
    assert good.passed is True
    assert bad.passed is False
    assert bad.mean_kl_divergence > LIMITS["int4"][0] > good.mean_kl_divergence
    assert bad.perplexity > good.perplexity


def test_a_fused_float32_cache_is_refused_on_a_gpu(small_decoder: ExportedBundle) -> None:
    """Its attention would run on the CPU in silence. Refused before onnxruntime is asked, so on any machine."""
    with pytest.raises(ProviderError, match=r"no float32 kernel on CUDA.*portable-fp32"):
        load(small_decoder.path, provider="cuda")
