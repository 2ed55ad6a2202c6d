"""examples/train_demo.py: a short training on made-up text gives a whole, loadable checkpoint and an honest figure."""

from __future__ import annotations

import importlib.util
import json
import math
import random
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import click.testing
import pytest
import torch
from tokenizers import Tokenizer
from torch import nn

from cosmos_export.checkpoint import Checkpoint
from cosmos_export.config import CosmosAdvancedConfig
from cosmos_export.model import CosmosDecoder

SCRIPT = Path(__file__).parents[2] / "examples" / "train_demo.py"
TINY = {
    "dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "head_dim": 8, "hidden_dim": 64, "vocab_size": 320,
    "max_sequence_length": 32, "dropout": 0.1,
}  # fmt: skip


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_demo", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up by name
    spec.loader.exec_module(module)
    return module


train_demo = load_script()


class Trained(NamedTuple):
    result: click.testing.Result
    out: Path
    text: Path
    config: Path


def made_up_text(words: int) -> str:
    """Sentences of a few words in random order: easy to learn, impossible to learn by heart."""
    source = random.Random(0)
    vocabulary = ("the", "quiet", "river", "carries", "bright", "leaves", "past", "sleeping", "stones", "to", "the sea")
    return "".join(source.choice(vocabulary) + source.choice("    \n") for _ in range(words))


def invoke(text: Path, config: Path, out: Path, *options: str) -> click.testing.Result:
    small = ["--steps", "60", "--batch-size", "8", "--eval-every", "20", "--learning-rate", "0.005", "--device", "cpu"]
    arguments = [str(text), "--config", str(config), "--out", str(out), *small, *options]
    return click.testing.CliRunner().invoke(train_demo.main, arguments)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("train_demo")
    text, config, out = folder / "rivers.txt", folder / "tiny.json", folder / "new" / "checkpoint"
    text.write_text(made_up_text(4000), encoding="utf-8")
    config.write_text(json.dumps(TINY), encoding="utf-8")
    return Trained(invoke(text, config, out), out, text, config)


def figure(text: str) -> float:
    match = re.search(r"([\d.]+) nats per (?:held-out )?character", text)
    assert match, text
    return float(match.group(1))


def test_folder_is_complete_and_small(trained: Trained) -> None:
    assert trained.result.exit_code == 0, trained.result.output
    assert {p.name for p in trained.out.iterdir()} == train_demo.CHECKPOINT_FILES
    assert [p.name for p in trained.out.parent.iterdir()] == ["checkpoint"]  # nothing left beside it


def test_checkpoint_opens_and_its_weights_give_the_figure_of_the_readme(trained: Trained) -> None:
    checkpoint = Checkpoint.open(trained.out)
    model = CosmosDecoder(checkpoint.config).eval()
    names = model.state_dict().keys()
    model.load_state_dict({n: torch.as_tensor(checkpoint.tensor(n)) for n in names})
    assert all(p.dtype == torch.float32 for p in model.parameters())

    text = trained.text.read_text(encoding="utf-8")
    held_out = text[-(len(text) // 10) :]
    tokens = Tokenizer.from_file(str(trained.out / "tokenizer.json")).encode(held_out).ids
    again = train_demo.HeldOutText(torch.tensor(tokens), len(held_out), checkpoint.config.max_sequence_length)

    assert again.nats_per_character(model) == pytest.approx(figure((trained.out / "README.md").read_text()), abs=1e-4)
    assert figure(trained.result.output) == figure((trained.out / "README.md").read_text())
    assert figure(trained.result.output) < 0.8 * math.log(checkpoint.config.vocab_size) * len(tokens) / len(held_out)


def test_readme_says_how_to_get_the_figure_again(trained: Trained) -> None:
    readme = (trained.out / "README.md").read_text(encoding="utf-8")
    assert "rivers.txt --out checkpoint --config tiny.json --steps 60 --batch-size 8" in readme
    assert "last 10%" in readme
    assert torch.__version__ in readme
    assert str(trained.text.parent) not in readme


@pytest.mark.parametrize("text", ["plain words", "مرحبا بالعالم", "👩‍🚀 naïve\r\n\t", "\x00\u2028  two  spaces ", ""])
def test_tokenizer_gives_back_any_text(trained: Trained, text: str) -> None:
    tokenizer = Tokenizer.from_file(str(trained.out / "tokenizer.json"))
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_existing_folder_is_kept_unless_overwrite(trained: Trained) -> None:
    before = {p.name: p.read_bytes() for p in trained.out.iterdir()}
    refused = invoke(trained.text, trained.config, trained.out)
    assert refused.exit_code == 1
    assert "--overwrite" in refused.output
    assert {p.name: p.read_bytes() for p in trained.out.iterdir()} == before


def test_overwrite_replaces_a_checkpoint_but_no_other_folder(trained: Trained, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("an old one", encoding="utf-8")
    replaced = invoke(trained.text, trained.config, tmp_path, "--overwrite", "--steps", "2")
    assert replaced.exit_code == 0, replaced.output
    assert Checkpoint.open(tmp_path).config.dim == TINY["dim"]

    (tmp_path / "thesis.txt").write_text("years of work", encoding="utf-8")
    refused = invoke(trained.text, trained.config, tmp_path, "--overwrite", "--steps", "2")
    assert refused.exit_code == 1
    assert "thesis.txt" in refused.output
    assert (tmp_path / "thesis.txt").exists()


def test_problems_are_one_clear_line(trained: Trained, tmp_path: Path) -> None:
    latin = tmp_path / "latin.txt"
    latin.write_bytes("caf\xe9 ".encode("latin-1") * 1000)
    short = tmp_path / "short.txt"
    short.write_text("too short to train on", encoding="utf-8")
    for text, expected in ((latin, "not UTF-8"), (short, "longer text")):
        result = invoke(text, trained.config, tmp_path / "out")
        assert result.exit_code == 1
        assert expected in result.output
        errors = [line for line in result.output.splitlines() if line.startswith("Error:")]
        assert len(errors) == 1
        assert result.output.splitlines()[-1] == errors[0]
    assert not (tmp_path / "out").exists()


class Uniform(nn.Module):
    """Predicts 300 tokens alike."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return torch.zeros(*inputs.shape, 300)


@pytest.mark.parametrize("count", [2, 5, 8, 9, 10, 13, 14, 50])
@pytest.mark.parametrize("window", [1, 7, 8])
def test_evaluation_scores_every_token_but_the_first_once(count: int, window: int) -> None:
    exam = train_demo.HeldOutText(torch.arange(count), characters=4, window=window)
    scored = exam.targets[exam.targets != train_demo.NOT_SCORED]
    assert scored.tolist() == list(range(1, count))
    context = (torch.arange(window) + 1).expand_as(exam.targets)[1:][exam.targets[1:] != train_demo.NOT_SCORED]
    assert (context > window // 2 - 1).all()
    assert exam.nats_per_character(Uniform()) == pytest.approx((count - 1) * math.log(300) / 4, rel=1e-5)


def test_demo_config_is_the_documented_geometry() -> None:
    config = CosmosAdvancedConfig.from_file(train_demo.DEMO_CONFIG).validate()
    parameters = sum(p.numel() for p in CosmosDecoder(config).parameters())
    assert 2.5e6 < parameters < 2.65e6
    assert parameters * 4 < 11e6  # the folder stays below 12 MB
