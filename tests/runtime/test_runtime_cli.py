"""The command line: output, summaries, exit codes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import cosmos_runtime.session
from cosmos_runtime.cli import main

from .tiny_bundles import BundleFactory, chain, encode

RUNTIME = Path(__file__).parents[2] / "runtime"


def run(*arguments: Any, stdin: str | bytes | None = None) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments], input=stdin, prog_name="cosmos-run")


@pytest.fixture
def writer(make_bundle: BundleFactory) -> Path:
    """A bundle that continues "a" with "bc€", then stops, and recommends sampling with top_k 1."""
    successors = chain("abc€") | {encode("€")[-1]: 256}
    generation = {"temperature": 0.7, "top_k": 1, "stop_ids": [256], "something_else": "kept"}
    return make_bundle(successors, generation=generation)


def test_generate(writer: Path) -> None:
    result = run("generate", writer, "--prompt", "a", "--seed", 5, "--threads", 1)
    assert result.exit_code == 0, result.output
    assert result.stdout == "abc€\n"
    assert result.stderr.startswith("5 tokens, ")
    assert result.stderr.endswith("tok/s, finish reason: stop, seed 5\n")


def test_generate_json(writer: Path) -> None:
    result = run("generate", writer, "--prompt", "a", "--greedy", "--json")
    report = json.loads(result.stdout)
    assert result.stderr == ""
    timings = report.pop("timings")
    assert set(timings) == {"load_s", "first_piece_s", "total_s", "tokens_per_second"}
    assert report == {
        "prompt": "a",
        "text": "bc€",
        "prompt_tokens": encode("a"),
        "tokens": encode("bc€"),
        "finish_reason": "stop",
        "seed": None,
    }


def test_unseeded_sampling_reports_a_seed_that_repeats_it(writer: Path) -> None:
    options = ("--prompt", "a", "--temperature", 5, "--top-k", 0, "--json")
    first = json.loads(run("generate", writer, *options).stdout)
    again = json.loads(run("generate", writer, *options, "--seed", first["seed"]).stdout)
    assert first["tokens"] == again["tokens"]


@pytest.mark.parametrize("arguments", [(), ("--prompt", "-")])
def test_prompt_from_a_pipe(writer: Path, arguments: tuple[str, ...]) -> None:
    result = run("generate", writer, *arguments, "--max-new-tokens", 1, stdin="a\n")
    assert result.stdout == "ab\n"


def test_stop_text(writer: Path) -> None:
    result = run("generate", writer, "--prompt", "a", "--stop", "zz", "--stop", "c")
    assert result.stdout == "ab\n"
    assert "finish reason: stop" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--prompt", ""), "error: prompt: expected text"),
        (("--prompt", "a" * 40), "error: input_ids: the model takes at most 32 tokens, got 40"),
        (("--prompt", "a", "--stop", ""), "error: stop: expected"),
    ],
)
def test_errors_are_one_line(writer: Path, arguments: tuple[str, ...], message: str) -> None:
    result = run("generate", writer, *arguments)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith(message)
    assert result.stderr.count("\n") == 1


def test_standard_input_that_is_not_utf8(writer: Path) -> None:
    result = run("generate", writer, stdin=b"\xff\xfe")
    assert result.exit_code == 1
    assert "not UTF-8" in result.stderr


@pytest.mark.parametrize("generation", [{"temperature": "hot"}, {"top_p": 2}, {"stop_ids": [999]}, {"stop_ids": 2}])
def test_bad_defaults_are_the_bundles_fault(make_bundle: BundleFactory, generation: dict[str, Any]) -> None:
    result = run("generate", make_bundle(generation=generation), "--prompt", "a")
    assert result.exit_code == 1
    assert f"error: manifest.json: generation.{next(iter(generation))}: expected" in result.stderr


@pytest.mark.parametrize("command", ["generate", "inspect"])
def test_missing_bundle(tmp_path: Path, command: str) -> None:
    result = run(command, tmp_path / "nothing", stdin="a")
    assert result.exit_code == 1
    assert "no such folder; expected a bundle" in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate",),
        ("generate", "x", "--temperature", "-1"),
        ("generate", "x", "--top-p", "0"),
        ("generate", "x", "--provider", "tpu"),
        ("generate", "x", "--greedy", "--temperature", "0.5"),
        ("nonsense",),
    ],
)
def test_usage_errors(arguments: tuple[str, ...]) -> None:
    assert run(*arguments, stdin="a").exit_code == 2


def test_no_prompt_at_a_terminal(writer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "cosmos_runtime.cli.generate.sys", type("S", (), {"stdin": type("T", (), {"isatty": lambda: True})})
    )
    result = run("generate", writer)
    assert result.exit_code == 2
    assert "No prompt" in result.stderr


def test_interrupt(writer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cosmos_runtime.session.Session, "logits", interrupt)
    result = run("generate", writer, "--prompt", "a")
    assert result.exit_code == 130
    assert "interrupted" in result.stderr


def test_inspect(writer: Path) -> None:
    result = run("inspect", writer, "--check")
    assert result.exit_code == 0, result.output
    for part in (
        "tiny  (cosmos-export 0.1.0, 2026-11-22T13:00:00Z)",
        "66,049 parameters, vocabulary 257, sequence up to 32, head lm, causal",
        "cpu-fp32: fp32, dialect portable",
        "full_sequence: model.onnx, opset 20",
        "some_logits: float32 [batch, sequence, 257], role logits",
        "kB model.onnx.data",
        "parity      passed",
        "hashes      verified",
    ):
        assert part in result.stdout


@pytest.mark.parametrize(("parity", "verdict"), [(None, "not measured"), ({"passed": False}, "FAILED")])
def test_inspect_parity(make_bundle: BundleFactory, parity: dict[str, bool] | None, verdict: str) -> None:
    assert f"parity      {verdict}" in run("inspect", make_bundle(parity=parity)).stdout


def test_inspect_json(writer: Path) -> None:
    report = json.loads(run("inspect", writer, "--json").stdout)
    assert report.pop("hashes_checked") is False
    assert report == json.loads((writer / "manifest.json").read_text())


def test_inspect_finds_an_altered_file(writer: Path) -> None:
    data = writer / "model.onnx.data"
    data.write_bytes(bytes(data.stat().st_size))
    assert run("inspect", writer).exit_code == 0
    result = run("inspect", writer, "--check")
    assert result.exit_code == 1
    assert "model.onnx.data: altered" in result.stderr


@pytest.mark.parametrize("arguments", [("-h",), ("--help",), ("generate", "-h"), ("inspect", "--help")])
def test_help_has_an_example(arguments: tuple[str, ...]) -> None:
    result = run(*arguments)
    assert result.exit_code == 0
    assert "Examples:\n    cosmos-run " in result.stdout


def test_as_a_program(writer: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "cosmos_runtime.cli", "generate", str(writer), "--greedy"],
        input="a",
        capture_output=True,
        encoding="utf-8",
        env={**os.environ, "PYTHONPATH": str(RUNTIME), "PYTHONIOENCODING": "utf-8"},
        check=False,
        timeout=60,
    )
    assert (result.returncode, result.stdout) == (0, "abc€\n"), result.stderr
