"""The C++ example is built with the libtorch of the torch wheel, and prints the tokens that Python generates."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from cosmos_export.checkpoint import Checkpoint
from cosmos_export.parity.verify import Effort
from cosmos_export.pipeline import export_bundle
from cosmos_export.recipe import ExportRecipe
from cosmos_export.resources import demo_checkpoint
from cosmos_export.torch_programs.sessions import eager_session, load_session
from cosmos_runtime import CAPABILITIES, Session, generate

SOURCE = Path(__file__).parents[2] / "examples" / "cpp"
NEW_TOKENS = 96
PROMPTS = [[813], [813, 25, 198, 352], [(37 * place + 11) % 1024 for place in range(130)]]

# PyTorch's own word on the type of torchscript-int8's matrices.
DEPRECATION = "quantized tensor creation functions that produce tensors with dtype torch.quint8"


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example, built."""
    if shutil.which("cmake") is None:
        pytest.skip("no cmake in PATH")
    if not any(shutil.which(name) for name in (os.environ.get("CXX", "c++"), "c++", "g++", "clang++")):
        pytest.skip("no C++ compiler in PATH")
    build = tmp_path_factory.mktemp("cpp")
    for step in (("-S", SOURCE, "-B", build, f"-DCMAKE_PREFIX_PATH={torch.__path__[0]}"), ("--build", build)):
        done = run("cmake", *step)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "warning" not in (done.stdout + done.stderr).lower()
    return build / "cosmos_decode"


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return Checkpoint.open(demo_checkpoint())


@pytest.fixture(scope="module")
def bundle(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = ExportRecipe.load("torchscript-fp32")
    return export_bundle(checkpoint, tmp_path_factory.mktemp("bundles") / "demo", recipe, effort=Effort.OFF).path


def continued(program: Path, bundle: Path, prompt: list[int]) -> list[int]:
    """What the example prints, with as many threads as PyTorch has here, so that sums are the same."""
    options = ("--max-new-tokens", str(NEW_TOKENS), "--threads", str(torch.get_num_threads()))
    done = run(program, *options, bundle, *map(str, prompt))
    assert (done.returncode, [line for line in done.stderr.splitlines() if DEPRECATION not in line]) == (0, [])
    return [int(token) for token in done.stdout.split()]


def greedy(session: Session, prompt: list[int]) -> list[int]:
    return list(generate(session, prompt, max_new_tokens=NEW_TOKENS))


@pytest.mark.parametrize("prompt", PROMPTS, ids=len)
def test_greedy_tokens_are_those_of_python(
    program: Path, checkpoint: Checkpoint, bundle: Path, prompt: list[int]
) -> None:
    tokens = continued(program, bundle, prompt)
    assert tokens == greedy(load_session(bundle), prompt) == greedy(eager_session(checkpoint), prompt)
    assert len(set(tokens)) > 8  # not one word again and again


@pytest.mark.parametrize("recipe", ["torchscript-portable-fp32", "torchscript-bf16", "torchscript-int8"])
def test_other_recipes_with_a_cache(program: Path, checkpoint: Checkpoint, recipe: str, tmp_path: Path) -> None:
    bundle = export_bundle(checkpoint, tmp_path / "bundle", ExportRecipe.load(recipe), effort=Effort.OFF).path
    assert continued(program, bundle, PROMPTS[1]) == greedy(load_session(bundle), PROMPTS[1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected a bundle and at least one token id"),
        (["BUNDLE"], "expected a bundle and at least one token id"),
        (["BUNDLE", "5", "seven"], "token id: expected a number from 0 to 1023, got 'seven'"),
        (["BUNDLE", "5x"], "token id: expected a number from 0 to 1023, got '5x'"),
        (["BUNDLE", "1024"], "token id: expected a number from 0 to 1023, got '1024'"),
        (["BUNDLE", "-1"], "token id: expected a number from 0 to 1023, got '-1'"),
        (["--max-new-tokens", "0", "BUNDLE", "5"], "--max-new-tokens: expected a number from 1 to"),
        (["--max-new-tokens", "511", "BUNDLE", "5", "7"], "expected at most 512 tokens, got 2 of the prompt and 511"),
        (["--threads", "many", "BUNDLE", "5"], "--threads: expected a number from 1 to"),
        (["BUNDLE", "5", "--threads"], "--threads: expected a number behind it"),
        (["--temperature", "1", "BUNDLE", "5"], "--temperature: no such option"),
    ],
)
def test_wrong_arguments(program: Path, bundle: Path, arguments: list[str], message: str) -> None:
    done = run(program, *(bundle if argument == "BUNDLE" else argument for argument in arguments))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"cosmos_decode: {message}")
    assert "usage: cosmos_decode" in done.stderr


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "expected a bundle of `cosmos-export torchscript`, cannot read"),
        ({"manifest.json": b"{}"}, 'manifest.json: expected "activations" in it'),
        ({"manifest.json": None}, "model.pt: no such file"),
        ({"manifest.json": None, "model.pt": b"no program"}, "PytorchStreamReader failed"),
    ],
)
def test_a_bundle_that_cannot_be_read(
    program: Path, bundle: Path, files: dict[str, bytes | None], message: str, tmp_path: Path
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes((bundle / name).read_bytes() if content is None else content)
    done = run(program, tmp_path, "5")
    assert (done.returncode, done.stdout) == (1, "")
    assert message in done.stderr
    assert "usage" not in done.stderr


def test_heads_are_refused(program: Path, checkpoint: Checkpoint, tmp_path: Path) -> None:
    recipe = ExportRecipe.load("torchscript-portable-fp32")
    bundle = export_bundle(checkpoint, tmp_path / "bundle", recipe, capabilities=CAPABILITIES, effort=Effort.OFF)
    done = run(program, bundle.path, "5")
    assert (done.returncode, done.stdout) == (1, "")
    assert "expected a plain decoder with a cache, which takes 4 arguments, got one that takes 9" in done.stderr
