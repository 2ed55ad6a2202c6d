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
from cosmos_runtime import load, score
from cosmos_runtime.bench import Run, summarise
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


@pytest.mark.parametrize("command", ["generate", "inspect", "score", "bench"])
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
        ("generate", "x", "--speculate", "-1"),
        ("score", "x", "--text", "a", "--file", __file__),
        ("score", "x", "--file", "/no/such/file"),
        ("bench", "x", "--new-tokens", "1"),
        ("nonsense",),
    ],
)
def test_usage_errors(arguments: tuple[str, ...]) -> None:
    assert run(*arguments, stdin="a").exit_code == 2


def test_no_prompt_at_a_terminal(writer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "cosmos_runtime.cli.text.sys", type("S", (), {"stdin": type("T", (), {"isatty": lambda: True})})
    )
    result = run("generate", writer)
    assert result.exit_code == 2
    assert "No prompt" in result.stderr


def test_interrupt(writer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cosmos_runtime.session.Session, "logits", interrupt)
    for arguments in (("generate", writer, "--prompt", "a"), ("score", writer, "--text", "abc"), ("bench", writer)):
        result = run(*arguments, *(("--prompt-tokens", 2, "--new-tokens", 2) if arguments[0] == "bench" else ()))
        assert result.exit_code == 130
        assert result.stdout == ("a" if arguments[0] == "generate" else "")
        assert "interrupted" in result.stderr


def test_generate_speculating(decoder_path: Path) -> None:
    options = ("--prompt", "abcabcabc", "--greedy", "--max-new-tokens", 20, "--json")
    plain, speculating = (
        json.loads(run("generate", decoder_path, *options, *more).stdout) for more in ((), ("--speculate", 4))
    )
    assert speculating["tokens"] == plain["tokens"]
    result = run("generate", decoder_path, "--prompt", "a", "--temperature", 1, "--speculate", 4)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: speculate: expected greedy sampling, got temperature 1.0")


def test_generate_at_least(writer: Path) -> None:
    result = run("generate", writer, "--prompt", "a", "--min-new-tokens", 7, "--max-new-tokens", 7)
    assert "7 tokens" in result.stderr
    assert "finish reason: length" in result.stderr


@pytest.mark.parametrize("way", ["option", "file", "pipe", "dash"])
def test_score(decoder_path: Path, tmp_path: Path, way: str) -> None:
    (tmp_path / "text.txt").write_text("h€llo", encoding="utf-8")
    arguments, stdin = {
        "option": (("--text", "h€llo"), None),
        "file": (("--file", tmp_path / "text.txt"), None),
        "pipe": ((), "h€llo\n"),
        "dash": (("--text", "-"), "h€llo\n"),
    }[way]
    result = run("score", decoder_path, *arguments, "--threads", 1, stdin=stdin)
    wanted = score(load(decoder_path, threads=1), encode("h€llo"))
    assert result.exit_code == 0, result.output
    assert result.stdout == (
        f"7 tokens, log-probability {wanted.total:.4f}, {wanted.mean_nats:.4f} nats a token, "
        f"perplexity {wanted.perplexity:.4f}\n"
    )


def test_score_json(decoder_path: Path) -> None:
    report = json.loads(run("score", decoder_path, "--text", "a€", "--json", "--threads", 1).stdout)
    wanted = score(load(decoder_path, threads=1), "a€")
    assert report == {
        "tokens": encode("a€"),
        "texts": ["a", *3 * ["\ufffd"]],
        "log_probabilities": wanted.log_probabilities.tolist(),
        "total": wanted.total,
        "mean_nats": wanted.mean_nats,
        "perplexity": wanted.perplexity,
    }


def test_score_of_too_little(decoder_path: Path) -> None:
    result = run("score", decoder_path, "--text", "a")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("error: score: expected at least 2 tokens, got 1")


@pytest.mark.parametrize("name", ["decoder_path", "writer"])
def test_bench_json(name: str, request: pytest.FixtureRequest) -> None:
    options = ("--prompt-tokens", 3, "--new-tokens", 5, "--repeat", 2, "--threads", 1, "--json")
    result = run("bench", request.getfixturevalue(name), *options)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    setting = {
        key: report.pop(key) for key in ("bundle", "provider", "threads", "prompt_tokens", "new_tokens", "repeat")
    }
    assert setting == {
        "bundle": "tiny",
        "provider": "cpu",
        "threads": 1,
        "prompt_tokens": 3,
        "new_tokens": 5,
        "repeat": 2,
    }
    assert all(value > 0 for value in report.values())
    assert 0 < report["host_share"] < 1
    assert report["ms_per_token_min"] <= report["ms_per_token_median"] <= report["ms_per_token_max"]


def test_bench_summary() -> None:
    runs = [
        Run(0.5, [0.002, 0.004], [0.0015, 0.003]),
        Run(0.25, [0.001, 0.001], [0.0009, 0.0009]),
        Run(0.125, [0.003, 0.003], [0.0027, 0.0027]),
    ]
    result = summarise(100, 3, runs)
    assert result.prefill_ms == pytest.approx(250)
    assert result.prefill_tokens_per_second == pytest.approx(400)
    assert result.decode_tokens_per_second == pytest.approx(1000 / 3)
    assert (result.ms_per_token_min, result.ms_per_token_max) == pytest.approx((1, 4))
    assert result.ms_per_token_median == pytest.approx(2.5)
    assert result.host_us_per_token == pytest.approx(300)
    assert result.host_share == pytest.approx(0.3 / 2.5)


def test_bench(decoder_path: Path) -> None:
    result = run("bench", decoder_path, "--prompt-tokens", 3, "--new-tokens", 5, "--repeat", 1)
    assert result.exit_code == 0, result.output
    names = [line.split()[0] for line in result.stdout.splitlines()]
    assert names == ["load", "prefill", "decode", "host", "memory"]
    assert "(3 tokens in " in result.stdout


def test_bench_of_too_much(decoder_path: Path) -> None:
    result = run("bench", decoder_path, "--prompt-tokens", 90, "--new-tokens", 7)
    assert (result.exit_code, result.stdout) == (1, "")
    assert "bench: expected at most 96 tokens of prompt and answer, got 90 + 7" in result.stderr


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


@pytest.mark.parametrize(
    "arguments", [("-h",), ("--help",), ("generate", "-h"), ("inspect", "--help"), ("score", "-h"), ("bench", "-h")]
)
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
