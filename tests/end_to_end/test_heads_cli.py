"""The commands on models with capability heads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from cosmos_export.cli import main as export_main
from cosmos_export.model.capabilities import has_heads
from cosmos_export.parity.source import checkpoint_of
from cosmos_runtime import Bundle
from cosmos_runtime.cli import main as run_main
from cosmos_runtime.cli.diagnostics import diagnostics_summary

from ..runtime.tiny_bundles import byte_tokenizer  # noqa: TID252
from .head_bundles import heads_checkpoint, heads_config


def export(*arguments: object) -> Result:
    return CliRunner().invoke(export_main, ["onnx", *map(str, arguments)], catch_exceptions=False)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(run_main, [*map(str, arguments)], catch_exceptions=False)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder with a tokenizer."""
    from cosmos_export.checkpoint import save_checkpoint

    folder = tmp_path_factory.mktemp("model") / "lively"
    checkpoint = heads_checkpoint(heads_config(vocab_size=257))
    save_checkpoint(folder, checkpoint.config, {name: checkpoint.tensor(name) for name in checkpoint.names})
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def bundle(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bundles") / "heads"
    names = "memory,reasoning, safety,evaluation"
    result = export("--checkpoint", model, "--capabilities", names, "--out", out, "--verify", "quick")
    assert result.exit_code == 0, result.output
    return out


def test_the_set_stands_in_the_manifest(bundle: Path) -> None:
    heads = Bundle.open(bundle).manifest.capabilities
    assert heads is not None
    assert heads["names"] == ["reasoning", "memory", "safety", "evaluation"]
    assert heads["settings"]["reasoning"]["mode"] == "chain_of_thought"
    assert heads["memory"] == {"size": 7, "least": 5}
    assert not (bundle / "genai_config.json").exists()


def test_inspect_shows_the_heads(bundle: Path, model: Path, tmp_path: Path) -> None:
    result = run("inspect", bundle)
    assert "head fused" in result.stdout
    expected = "reasoning (chain_of_thought), memory (7 entries), safety (level medium), evaluation (2 rounds)"
    assert expected in result.stdout
    assert json.loads(run("inspect", bundle, "--json").stdout)["capabilities"]["names"][0] == "reasoning"
    export("--checkpoint", model, "--capabilities", "none", "--out", tmp_path / "fusion", "--verify", "off")
    assert "none: fusion only" in run("inspect", tmp_path / "fusion").stdout


def test_generate_shows_diagnostics(bundle: Path) -> None:
    arguments = ("generate", bundle, "--prompt", "ab", "--greedy", "--max-new-tokens", 5)
    summary = run(*arguments, "--diagnostics").stderr
    assert "diagnostics of 5 calls" in summary
    for words in ("mode CoT, 5 thoughts", "5 calls remembered", "level medium", "confidence "):
        assert words in summary
    report = json.loads(run(*arguments, "--diagnostics", "--json").stdout)
    assert len(report["diagnostics"]) == len(report["tokens"]) == 5
    assert list(report["diagnostics"][0]) == ["reasoning", "memory", "safety", "is_safe", "evaluation"]
    assert [call["memory"]["episode_length"] for call in report["diagnostics"]] == [1, 2, 3, 4, 5]
    assert "diagnostics" not in json.loads(run(*arguments, "--json").stdout)


def test_a_plain_bundle_has_none_to_show(model: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    result = export("--checkpoint", model, "--head", "lm", "--out", plain, "--verify", "off")
    assert "note:" not in result.stderr
    assert Bundle.open(plain).manifest.capabilities is None
    result = run("generate", plain, "--prompt", "a", "--diagnostics")
    assert result.exit_code == 1
    assert "plain decoder and has none; export the model with --capabilities" in result.stderr


def test_heads_that_are_left_out_are_told_of(model: Path, tmp_path: Path) -> None:
    result = export("--checkpoint", model, "--out", tmp_path / "plain", "--verify", "off")
    assert result.exit_code == 0
    assert result.stderr.count("--capabilities reasoning,memory,safety,evaluation") == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--capabilities", "planning"), "--capabilities planning: expected 'none', or some of reasoning, memory"),
        (("--capabilities", ""), "expected 'none'"),
        (("--capabilities", "none,memory"), "expected 'none'"),
        (("--capabilities", "memory", "--head", "lm"), "--head lm is the decoder without capability heads"),
    ],
)
def test_wrong_arguments(arguments: tuple[str, ...], words: str) -> None:
    result = export(*arguments)
    assert result.exit_code == 2
    assert words in result.stderr


def test_a_preset_gets_random_heads_and_can_be_proven_again(tmp_path: Path) -> None:
    out = tmp_path / "preset"
    arguments = ("--preset", "beginner", "--capabilities", "memory", "--seed", 3, "--out", out, "--verify", "off")
    assert export(*arguments).exit_code == 0
    checkpoint = checkpoint_of(Bundle.open(out).manifest)
    assert has_heads(checkpoint.names)
    assert not any(name.startswith("safety_system.") for name in checkpoint.names)


# The summary


def test_a_summary_of_blocked_and_corrected_calls() -> None:
    def call(**safety: Any) -> dict[str, Any]:
        found = {"overall_safe": True, "warnings": [], "interventions": [], "safety_level": "high"}
        return {"safety": {**found, **safety}}

    reports = [
        call(interventions=["Bias mitigation applied"]),
        call(warnings=["Toxic content detected"], overall_safe=False) | {"output_blocked": True},
    ]
    first, safety, blocked = diagnostics_summary(reports)
    assert first == "diagnostics of 2 calls"
    assert "level high, unsafe in 1; warnings: Toxic content detected (1); " in safety
    assert safety.endswith("interventions: Bias mitigation applied (1)")
    assert blocked == "  blocked     the last call's output was withheld as unsafe"


def test_a_summary_of_modes() -> None:
    consistent = {"reasoning": {"consistency_score": 0.25, "mode": "Self-Consistency"}}
    doubtful = {"reasoning": {"error_detected": True, "mode": "Reflexion", "extended": True}}
    assert list(diagnostics_summary([consistent, consistent]))[1].endswith("consistency 0.25 (0.25 to 0.25)")
    assert list(diagnostics_summary([doubtful]))[1].endswith("mode Reflexion, extended, errors detected in 1")
    assert list(diagnostics_summary([{"memory": {"similar_episodes_found": 0}}]))[1].endswith("no episodes")
