"""This project's TorchScript and pt2 as the benchmark measures them: their bundles, and the model's own tokens."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch")

import torch

from benchmarks import proof
from benchmarks.engines import KINDS, OUR_ENGINES
from benchmarks.prepare import TORCH_RECIPES, Workshop
from benchmarks.process import Variant
from benchmarks.proof import prove
from cosmos_export.checkpoint import Checkpoint, save_checkpoint
from cosmos_export.recipe import ExportRecipe
from cosmos_export.resources import demo_checkpoint
from cosmos_runtime import Bundle

FORMATS = ("torchscript", "pt2")


def variants(checkpoint: Path, scratch: Path, engines: tuple[str, ...]) -> list[Variant]:
    """What is measured of these engines in float32."""
    return Workshop(checkpoint, scratch, 1, print, engines=engines, exact=True).variants(("fp32",))


def test_recipes_are_of_the_engines_format_and_of_the_class_they_compete_in() -> None:
    for precision, engines in TORCH_RECIPES.items():
        for engine, recipes in engines.items():
            assert engine in OUR_ENGINES
            assert engine in KINDS
            for recipe in map(ExportRecipe.load, recipes):
                assert (recipe.format, recipe.precision) == (engine, precision)
                assert recipe.name.startswith(f"{engine}-")


def test_both_formats_print_the_models_tokens(tmp_path: Path) -> None:
    found = variants(demo_checkpoint(), tmp_path, FORMATS)
    assert [variant.key for variant in found] == ["torchscript/fp32", "pt2/fp32"]
    formats = [Bundle.open(variant.options["bundle"]).manifest.graph_format for variant in found]
    assert formats == list(FORMATS)
    verdicts = prove(Checkpoint.open(demo_checkpoint()), found, tmp_path, 1, print)
    assert len(verdicts) == len(found) * len(proof.PROMPTS)
    assert [str(verdict) for verdict in verdicts if not verdict.passed] == []


def test_a_program_of_other_weights_does_not_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proof, "PROMPTS", proof.PROMPTS[:1])
    demo = Checkpoint.open(demo_checkpoint())
    tensors = {name: demo.tensor(name) for name in demo.names}
    name = next(name for name in tensors if name.endswith("layers.0.attention.k_proj.weight"))
    save_checkpoint(tmp_path / "other", demo.config, tensors | {name: torch.roll(tensors[name], 1, dims=0)})
    found = variants(tmp_path / "other", tmp_path / "scratch", ("torchscript",))
    (verdict,) = prove(demo, found, tmp_path, 1, print)
    assert not verdict.passed, str(verdict)
