"""What a bundle or a model writes reaches a terminal as text: nothing in it moves the cursor or renames the window."""

import contextlib
import json
import os
import subprocess
import sys
import unicodedata
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from cosmos_runtime import TensorSpec
from cosmos_runtime.cli import main
from cosmos_runtime.quoting import json_text, shown, shown_text

from .tiny_bundles import BundleFactory, chain, graph_spec

RUNTIME = Path(__file__).parents[2] / "runtime"
ESCAPES = "\x1b]0;owned\x07\x1b[2J\x9b31m\x7f\r\n\u202etxt"


def run(*arguments: Any, stdin: str | None = None) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments], input=stdin)


def assert_harmless(text: str) -> None:
    assert not [c for c in text if c != "\n" and unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp")]


@pytest.fixture
def hostile(make_bundle: BundleFactory) -> Path:
    """A bundle with escape sequences wherever its manifest takes a text."""
    token_ids = TensorSpec(ESCAPES, ESCAPES, "int64", ("batch", ESCAPES))
    return make_bundle(
        name=f"name{ESCAPES}",
        tool={"name": ESCAPES, "version": ESCAPES},
        versions={"onnx": ESCAPES},
        source={"kind": "preset", "location": ESCAPES},
        recipe={"name": ESCAPES, "precision": ESCAPES, "dialect": ESCAPES},
        generation={ESCAPES: ESCAPES},
        graphs={ESCAPES: replace(graph_spec(257), inputs=(token_ids,))},
    )


@pytest.mark.parametrize("command", [("inspect",), ("inspect", "--json"), ("check",), ("check", "--json")])
def test_a_bundles_texts_are_escaped(hostile: Path, command: tuple[str, ...]) -> None:
    result = run(command[0], hostile, *command[1:])
    assert result.exit_code == 0, result.output
    assert_harmless(result.output)
    if command == ("inspect",):
        lines = result.stdout.splitlines()
        assert lines[0].startswith(r"name\x1b]0;owned\x07\x1b[2J\x9b31m\x7f\r\n\u202etxt  (")
        assert len([line for line in lines if line.startswith("recipe ")]) == 1, "no text makes a line of its own"


def test_json_says_what_the_manifest_says(hostile: Path) -> None:
    assert json.loads(run("inspect", hostile, "--json").stdout)["name"] == f"name{ESCAPES}"


@pytest.mark.parametrize("command", [("generate", "--prompt", "a"), ("score", "--text", "ab"), ("bench",)])
def test_errors_are_escaped(hostile: Path, command: tuple[str, ...]) -> None:
    result = run(command[0], hostile, *command[1:])
    assert result.exit_code == 1
    assert "owned" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert_harmless(result.stderr)


def test_files_that_are_not_listed_are_named_without_harm(make_bundle: BundleFactory) -> None:
    path = make_bundle()
    try:
        (path / f"{ESCAPES}x".replace("/", "")).write_text("?")
    except (OSError, UnicodeError):
        pytest.skip("this file system takes no such name")
    result = run("check", path)
    assert result.exit_code == 1
    assert r"\x1b]0;owned" in result.stdout
    assert_harmless(result.output)


WRITTEN = "a\x1b[2J\tb\x9b\nc"


def test_a_pipe_gets_what_the_model_wrote(make_bundle: BundleFactory) -> None:
    result = run("generate", make_bundle(chain(WRITTEN)), "--prompt", "a", "--greedy", "--max-new-tokens", 10)
    assert result.stdout == f"{WRITTEN}\n"


def test_json_of_what_the_model_wrote(make_bundle: BundleFactory) -> None:
    options = ("--prompt", "a", "--greedy", "--max-new-tokens", 10, "--json")
    result = run("generate", make_bundle(chain(WRITTEN)), *options)
    assert_harmless(result.stdout)
    assert json.loads(result.stdout)["text"] == WRITTEN[1:]


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="there are no pseudo-terminals here")
def test_a_terminal_gets_no_control_characters(make_bundle: BundleFactory) -> None:
    command = [sys.executable, "-m", "cosmos_runtime.cli", "generate", str(make_bundle(chain(WRITTEN)))]
    options = ["--prompt", "a", "--greedy", "--max-new-tokens", "10", "--threads", "1"]
    reader, terminal = os.openpty()
    with os.fdopen(reader, "rb", closefd=True) as shown_there:
        environment = {**os.environ, "PYTHONPATH": str(RUNTIME), "PYTHONUTF8": "1"}
        done = subprocess.run([*command, *options], stdout=terminal, stderr=subprocess.PIPE, env=environment)
        os.close(terminal)
        assert done.returncode == 0, done.stderr
        given = b""
        with contextlib.suppress(OSError):  # a terminal that nobody writes to any more ends with an error
            while piece := os.read(shown_there.fileno(), 1024):
                given += piece
    assert given.decode("utf-8").replace("\r\n", "\n").expandtabs(1) == "a\\x1b[2J b\\x9b\nc\n"


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("plain é 日本 \U0001f600", "plain é 日本 \U0001f600"),
        ("\x1b[31m", r"\x1b[31m"),
        ("a\nb\tc", r"a\nb\tc"),
        ("\x00\x7f\x85\x9b", r"\x00\x7f\x85\x9b"),
        ("\u202e\u2066\u200b\ufeff", r"\u202e\u2066\u200b\ufeff"),
        ("\U000e0041", r"\U000e0041"),
        ("\udc80", r"\udc80"),
    ],
)
def test_a_line_shows_what_is_there(text: str, wanted: str) -> None:
    assert shown(text) == wanted


def test_no_control_is_forgotten() -> None:
    """Every character that Unicode calls a control, a line's end or half of one."""
    for code in range(0x110000):
        character = chr(code)
        category = unicodedata.category(character)
        if category in ("Cc", "Cs", "Zl", "Zp"):
            assert shown(character).startswith("\\"), hex(code)
            assert json_text(character)[1] == "\\", hex(code)
        if category in ("Cc", "Cs") and character not in "\n\t":
            assert shown_text(character).startswith("\\"), hex(code)


def test_a_models_text_keeps_its_lines_and_its_script() -> None:
    text = "one\ntwo\tthree \u200fعربي \u200d"
    assert shown_text(text) == text
    assert json.loads(json_text({"a": [text, "\U000e0041", 1]})) == {"a": [text, "\U000e0041", 1]}
