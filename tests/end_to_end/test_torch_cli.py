"""The commands on programs that PyTorch runs: what they print, what they refuse, and how they end."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from cosmos_export.checkpoint import Checkpoint, save_checkpoint
from cosmos_export.cli import main as export_main
from cosmos_export.config import CosmosAdvancedConfig
from cosmos_export.model.loading import random_checkpoint
from cosmos_export.resources import recipe_names
from cosmos_export.torch_programs import build
from cosmos_runtime import ONNX, PT2, TORCHSCRIPT, BundleError, load
from cosmos_runtime.cli import main as run_main

from ..runtime.tiny_bundles import byte_tokenizer  # noqa: TID252

FILES = {TORCHSCRIPT: "model.pt", PT2: "model.pt2"}
formats = pytest.mark.parametrize("graph_format", [TORCHSCRIPT, PT2])


def export(*arguments: object) -> Result:
    return CliRunner().invoke(export_main, [*map(str, arguments)], catch_exceptions=False)


def help_of(command: str) -> str:
    """On a line so long that no name is broken."""
    result = CliRunner().invoke(export_main, [command, "--help"], terminal_width=4000)
    assert result.exit_code == 0
    return " ".join(result.stdout.split())


def run(*arguments: object) -> Result:
    return CliRunner().invoke(run_main, [*map(str, arguments)], catch_exceptions=False)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder with a tokenizer."""
    config = CosmosAdvancedConfig(
        dim=24, n_layers=1, n_heads=4, n_kv_heads=2, head_dim=6, hidden_dim=32, vocab_size=257, max_sequence_length=32
    )
    checkpoint, folder = random_checkpoint(config, name="small", seed=4), tmp_path_factory.mktemp("model") / "small"
    larger = {n: checkpoint.tensor(n) * (8 if checkpoint.tensor(n).dim() > 1 else 1) for n in checkpoint.names}
    save_checkpoint(folder, config, larger)
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def bundles(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder, found = tmp_path_factory.mktemp("bundles"), {}
    for graph_format in FILES:
        found[graph_format] = folder / graph_format
        result = export(graph_format, "--checkpoint", model, "--out", found[graph_format])
        assert result.exit_code == 0, result.output
        last = result.stdout.splitlines()[-1]
        assert str(found[graph_format]) in last
        assert "equal float64 within the gate" in last
        assert result.stderr.count("deprecated") == (graph_format == TORCHSCRIPT), "said once, in our words"
    return found


# Proven again


@formats
def test_verify_proves_it_again_and_writes_a_report(
    graph_format: str, bundles: dict[str, Path], tmp_path: Path
) -> None:
    result = export("verify", bundles[graph_format], "--json", tmp_path / "report.json")
    assert result.exit_code == 0, result.output
    assert "PASS" in result.stdout
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["passed"] is True
    assert report["stored_tensors"]["equal"] == report["stored_tensors"]["expected"] == 13
    assert report["versions"]["torch"]
    assert {case["length"] for case in report["cases"]} >= {1, 2, 7, 31, 32}
    assert all(m["error"] <= m["allowed"] for case in report["cases"] for m in case["measurements"])


@formats
def test_verify_against_another_checkpoint_fails_and_names_the_tensors(
    graph_format: str, bundles: dict[str, Path], model: Path, tmp_path: Path
) -> None:
    opened = Checkpoint.open(model)
    other = {name: opened.tensor(name).clone() for name in opened.names}
    other["layers.0.norm2.weight"][4] += 0.25
    save_checkpoint(tmp_path / "other", opened.config, other)
    result = export("verify", bundles[graph_format], "--checkpoint", tmp_path / "other", "--json", "-")
    assert result.exit_code == 1
    report = json.loads(result.stdout)
    assert report["passed"] is False
    assert "layers.0.norm2.weight" in report["stored_tensors"]["problems"][0]


@formats
def test_an_altered_bundle_is_refused(graph_format: str, bundles: dict[str, Path], tmp_path: Path) -> None:
    folder, file = tmp_path / "altered", FILES[graph_format]
    shutil.copytree(bundles[graph_format], folder)
    data = bytearray((folder / file).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / file).write_bytes(data)
    for arguments in (("verify", folder), ("generate", folder, "--prompt", "a")):
        result = export(*arguments)
        assert result.exit_code == 1
        assert f"{file}: altered" in result.stderr
        assert "Traceback" not in result.output
    assert not (tmp_path / "altered.parity.json").exists()


def test_an_altered_bundle_can_be_declared_trusted(bundles: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "altered"
    shutil.copytree(bundles["torchscript"], folder)
    config = folder / "config.json"
    config.write_text(config.read_text().replace(" ", "\t", 1))  # the same size, and the same meaning
    assert export("verify", folder, "--quick").exit_code == 1
    assert export("verify", folder, "--quick", "--trusted").exit_code == 0


@formats
def test_another_device_is_refused(graph_format: str, bundles: dict[str, Path]) -> None:
    result = export("verify", bundles[graph_format], "--provider", "cuda", "--json", "-")
    assert result.exit_code == 1
    assert f"sessions over a {graph_format} bundle run on the CPU" in result.stderr
    assert result.stdout == ""


def test_a_failed_proof_leaves_nothing_and_exits_with_1(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file holds the numbers of another checkpoint."""
    write = build.write_torch_program

    def with_a_fault(folder: Path, checkpoint: Checkpoint, *rest: object, **options: object) -> object:
        wrong = {n: checkpoint.tensor(n) * (1.01 if n.endswith("v_proj.weight") else 1) for n in checkpoint.names}
        faulty = Checkpoint.from_tensors(checkpoint.config, wrong, dict(checkpoint.origin))
        return write(folder, faulty, *rest, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(build, "write_torch_program", with_a_fault)
    result = export("torchscript", "--checkpoint", model, "--out", tmp_path / "bundle")
    assert result.exit_code == 1
    assert "FAIL" in result.stderr
    assert "error: the exported graph is not equal to the model" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_export_prints_json_alone(model: Path, tmp_path: Path) -> None:
    arguments = ("--checkpoint", model, "--out", tmp_path / "bundle", "--verify", "quick", "--json")
    result = export("torchscript", *arguments)
    answer = json.loads(result.stdout)
    assert answer["bundle"] == str(tmp_path / "bundle")
    assert answer["parity"]["passed"] is True


# The runtime without PyTorch


@formats
def test_the_runtime_says_what_to_do(graph_format: str, bundles: dict[str, Path]) -> None:
    with pytest.raises(BundleError, match=rf"is a {graph_format} bundle, which needs PyTorch.*cosmos-export onnx"):
        load(bundles[graph_format])
    commands = (("generate", "--prompt", "a"), ("score", "--text", "ab"), ("bench",))
    for command, *options in commands:
        result = run(command, bundles[graph_format], *options)
        assert result.exit_code == 1, result.output
        assert f"is a {graph_format} bundle, which needs PyTorch" in result.stderr
        assert "`cosmos-export onnx`" in result.stderr
        assert "Traceback" not in result.output
        assert len([line for line in result.stderr.splitlines() if line]) == 1


def test_what_the_runtime_names_is_there() -> None:
    """Its message sends people to `cosmos_export.load_session`."""
    import cosmos_export
    from cosmos_export.torch_programs.sessions import load_session

    assert cosmos_export.load_session is load_session


@formats
def test_inspect_shows_the_format(graph_format: str, bundles: dict[str, Path]) -> None:
    result = run("inspect", bundles[graph_format])
    assert result.exit_code == 0, result.output
    assert graph_format in result.stdout
    assert FILES[graph_format] in result.stdout
    assert json.loads(run("inspect", bundles[graph_format], "--json").stdout)["graph_format"] == graph_format


def test_one_generate_for_all(bundles: dict[str, Path], model: Path) -> None:
    """The checkpoint itself, TorchScript and pt2 continue a prompt alike; sampled, too."""
    for options in (("--greedy",), ("--temperature", "1.2", "--seed", "5")):
        arguments = ("--prompt", "ab", "--max-new-tokens", "12", "--json", *options)
        results = [export("generate", place, *arguments) for place in (model, *bundles.values())]
        assert [result.exit_code for result in results] == [0] * 3, [result.output for result in results]
        tokens = [json.loads(result.stdout)["tokens"] for result in results]
        assert len(tokens[0]) == 12
        assert tokens[0] == tokens[1] == tokens[2]


# Wrong arguments


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("torchscript", "--recipe", "cpu-fp32"), "--recipe cpu-fp32 is for `cosmos-export onnx`"),
        (("torchscript", "--recipe", "pt2-fp32"), "--recipe pt2-fp32 is for `cosmos-export pt2`"),
        (("pt2", "--recipe", "torchscript-fp32"), "--recipe torchscript-fp32 is for `cosmos-export torchscript`"),
        (("onnx", "--recipe", "torchscript-fp32"), "--recipe torchscript-fp32 is for `cosmos-export torchscript`"),
        (("pt2", "--calibration-text", "x"), "--calibration-text"),
        (("torchscript", "--capabilities", "planning"), "--capabilities planning: expected 'none', or some of"),
        (("pt2", "--checkpoint", "a", "--preset", "beginner"), "give one of them"),
    ],
)
def test_wrong_arguments_end_with_2(
    arguments: tuple[str, ...], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = export(*arguments)
    assert result.exit_code == 2, result.output
    assert words in result.stderr
    assert "Traceback" not in result.output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("torchscript", "--no-causal", "--recipe", "torchscript-fp32"), "Use --recipe torchscript-full-sequence"),
        (("pt2", "--no-causal", "--recipe", "pt2-fp32"), "Use --recipe pt2-full-sequence"),
        (("pt2", "--recipe", "pt2-int3"), "there is no export recipe 'pt2-int3'"),
        (("torchscript", "--checkpoint", "nowhere"), "no checkpoint folder at nowhere"),
    ],
)
def test_what_cannot_be_made_ends_with_1(
    arguments: tuple[str, ...], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = export(*arguments)
    assert result.exit_code == 1, result.output
    assert words in result.stderr
    assert "Traceback" not in result.output
    assert list(tmp_path.iterdir()) == []


# Help


@formats
def test_help_names_the_recipes_of_its_format_alone(graph_format: str) -> None:
    text = help_of(graph_format)
    mine = recipe_names(graph_format)
    assert ", ".join(mine) in text
    assert f"default: {graph_format}-fp32, with --no-causal {graph_format}-full-sequence" in text
    others = [name for name in recipe_names() if name not in mine]
    assert not [name for name in others if re.search(rf"(?<![-\w]){name}(?![-\w])", text.partition("--recipe")[2])]
    for option in ("--checkpoint", "--preset", "--capabilities", "--head-layout", "--verify", "--overwrite", "--json"):
        assert option in text
    assert "--calibration" not in text


@pytest.mark.parametrize(
    ("graph_format", "words"),
    [
        (TORCHSCRIPT, ("torch.jit.load", "torch::jit::load in C++", "deprecated", "cosmos-export pt2")),
        (PT2, ("torch.export.load", "without this package", "any prompt, batch")),
        (ONNX, ("cpu-fp32",)),
    ],
)
def test_help_says_what_a_file_is_for(graph_format: str, words: tuple[str, ...]) -> None:
    text = help_of(graph_format)
    assert all(word in text for word in words), text


def test_help_is_fast() -> None:
    """Nothing heavy is imported for it; one interpreter for all commands."""
    code = (
        "import sys\n"
        "from click.testing import CliRunner\n"
        "from cosmos_export.cli import main\n"
        "for command in ([], ['onnx'], ['torchscript'], ['pt2'], ['verify'], ['generate']):\n"
        "    assert CliRunner().invoke(main, [*command, '--help']).exit_code == 0, command\n"
        "print(*sorted({'torch', 'onnx', 'numpy', 'onnxruntime', 'safetensors', 'rich'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


def test_the_group_lists_every_command() -> None:
    text = export("--help").stdout
    assert all(f"\n  {command} " in text for command in ("onnx", "torchscript", "pt2", "verify", "generate"))
