"""examples/train_demo_heads.py: a short training gives a whole checkpoint with the backbone as it was, and the parts
that training and measuring stand on do what they say."""

from __future__ import annotations

import itertools
import random
import re
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import click.testing
import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer

from cosmos_export.checkpoint import Checkpoint, save_checkpoint
from cosmos_export.config import CosmosAdvancedConfig
from cosmos_export.model import CosmosAdvancedModel, CosmosDecoder
from cosmos_export.model.capabilities.fusion import CapabilityFusion
from cosmos_export.model.loading import load_decoder, load_model
from cosmos_runtime import CAPABILITIES, LABELS, THRESHOLDS

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))  # as where a script lies is, when it is run

import train_demo_heads  # noqa: E402
from demo_heads import exam, reading, safety, sentences, starting_points, storage, texts  # noqa: E402
from demo_heads.safety_examples import COLUMNS  # noqa: E402
from train_demo import NOT_SCORED, train_tokenizer  # noqa: E402

TINY = {
    "dim": 32, "n_layers": 1, "n_heads": 4, "n_kv_heads": 2, "head_dim": 8, "hidden_dim": 64, "vocab_size": 300,
    "max_sequence_length": 32,
}  # fmt: skip


class Trained(NamedTuple):
    result: click.testing.Result
    out: Path
    text: Path
    backbone: Path


def made_up_text(words: int) -> str:
    source = random.Random(0)
    vocabulary = ("the", "quiet", "river", "carries", "bright", "leaves", "past", "sleeping", "stones", "to", "the sea")
    return "".join(source.choice(vocabulary) + source.choice("    \n") for _ in range(words))


def invoke(text: Path, checkpoint: Path, out: Path, *options: str) -> click.testing.Result:
    small = ["--steps", "24", "--safety-steps", "4", "--compared-windows", "2"]
    arguments = [str(text), "--checkpoint", str(checkpoint), "--out", str(out), *small, *options]
    return click.testing.CliRunner().invoke(train_demo_heads.main, arguments)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("train_demo_heads")
    text, backbone, out = folder / "rivers.txt", folder / "backbone", folder / "new" / "checkpoint"
    text.write_text(made_up_text(3000), encoding="utf-8")
    torch.manual_seed(0)
    config = CosmosAdvancedConfig(**TINY)
    train_tokenizer(made_up_text(500), 290).save(str(folder / "tokenizer.json"))
    save_checkpoint(backbone, config, CosmosDecoder(config).state_dict(), folder / "tokenizer.json")
    (backbone / "README.md").write_text("# A backbone\n", encoding="utf-8")
    return Trained(invoke(text, backbone, out), out, text, backbone)


@pytest.fixture(scope="module")
def model() -> CosmosAdvancedModel:
    """Random weights, large enough for scores to spread and for retrieved memories to matter."""
    torch.manual_seed(1)
    made = CosmosAdvancedModel(CosmosAdvancedConfig(**TINY)).eval().requires_grad_(False)
    for name, parameter in made.named_parameters():
        if parameter.dim() > 1 and "skill" not in name:
            parameter.mul_(3.0)
    return made.freeze()


def test_the_checkpoint_has_the_backbone_as_it_was_and_every_head_in_float16(trained: Trained) -> None:
    assert trained.result.exit_code == 0, trained.result.output
    before, after = Checkpoint.open(trained.backbone), Checkpoint.open(trained.out)
    model = CosmosAdvancedModel(after.config)
    assert set(after.names) == set(model.state_dict())
    for name in after.names:
        tensor = after.tensor(name)
        if name in before.names:
            assert torch.equal(tensor, before.tensor(name))
        else:
            assert tensor.dtype == torch.float16
            assert tensor.isfinite().all()
    assert load_model(after).capabilities == CAPABILITIES
    ids = torch.arange(8)[None]
    assert torch.equal(load_decoder(after)(ids), load_decoder(before)(ids))
    assert [p.name for p in trained.out.parent.iterdir()] == ["checkpoint"]  # nothing left beside it


def test_every_trained_head_has_moved(trained: Trained) -> None:
    """The training reaches all parameters but those that no mode of reasoning and no text can reach."""
    after = Checkpoint.open(trained.out)
    torch.manual_seed(0)
    start = train_demo_heads.model_with_new_heads(Checkpoint.open(trained.backbone)).state_dict()
    heads = [name for name in after.names if name.startswith(storage.HEADS)]
    still = [n for n in heads if torch.equal(after.tensor(n), start[n].half())]
    biases_of_keys = "memory_system.working_memory.key_proj.bias"
    assert set(still) <= {biases_of_keys}, still


def test_the_readme_keeps_what_it_said_and_says_how_to_get_the_figures_again(trained: Trained) -> None:
    readme = (trained.out / "README.md").read_text(encoding="utf-8")
    assert readme.startswith("# A backbone\n\n## The capability heads\n")
    assert "rivers.txt --checkpoint backbone --out checkpoint --steps 24 --safety-steps 4" in readme
    assert str(trained.text.parent) not in readme
    shown = re.search(r"([\d.]+) nats per held-out token, ([+-][\d.]+%)", trained.result.output)
    assert shown is not None
    assert f"**{shown[1]} nats per token**, {shown[2]}" in readme
    assert readme.count("| all, reasoning by") == 10


def test_the_figures_are_of_the_stored_weights(trained: Trained) -> None:
    checkpoint = Checkpoint.open(trained.out)
    text = trained.text.read_text(encoding="utf-8")
    held_out = text[-int(len(text) * train_demo_heads.HELD_OUT) :]
    tokens = torch.tensor(Tokenizer.from_file(str(checkpoint.tokenizer)).encode(held_out).ids)
    windows = train_demo_heads.HeldOutText(tokens, len(held_out), checkpoint.config.max_sequence_length)
    again = exam.read_as_in_generation(load_model(checkpoint), windows.inputs, windows.targets, CAPABILITIES)
    assert again.calls == len(tokens) - 1
    assert f"{again.loss:.4f} nats per held-out token, {again.excess:+.2%}" in trained.result.output


def test_training_in_place_replaces_the_heads_and_their_section(trained: Trained, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(trained.out, tmp_path / "model"))
    result = invoke(trained.text, folder, folder, "--overwrite")
    assert result.exit_code == 0, result.output
    assert (folder / "README.md").read_text(encoding="utf-8").count("## The capability heads") == 1
    first, second = Checkpoint.open(trained.out), Checkpoint.open(folder)
    assert all(torch.equal(first.tensor(n), second.tensor(n)) for n in first.names)  # the same seed, the same weights


def test_problems_are_one_clear_line(trained: Trained, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("too short to train on", encoding="utf-8")
    bare = tmp_path / "bare"
    save_checkpoint(bare, CosmosAdvancedConfig(**TINY), CosmosDecoder(CosmosAdvancedConfig(**TINY)).state_dict())
    cases = ((short, trained.backbone, "longer text"), (trained.text, bare, "tokenizer.json"))
    for text, checkpoint, expected in cases:
        result = invoke(text, checkpoint, tmp_path / "out")
        assert result.exit_code == 1
        assert result.output.splitlines()[-1].startswith("Error:")
        assert expected in result.output
    refused = invoke(trained.text, trained.backbone, trained.out)
    assert "--overwrite" in refused.output
    assert not (tmp_path / "out").exists()


def test_memory_in_training_is_the_models_own_call_after_call(model: CosmosAdvancedModel) -> None:
    hidden, first_call = torch.randn(2, 12, TINY["dim"]), torch.tensor([0, 5])
    at_once = reading.memory_vectors(model.memory_system, hidden, first_call).unflatten(0, hidden.shape[:2])
    for row, first in enumerate(first_call.tolist()):
        state = model.new_memory(1, capacity=12).state
        for position in range(first, 12):
            expected, _, state = model.memory_system(hidden[row, position][None], state)
            torch.testing.assert_close(at_once[row, position][None], expected)


def test_the_exam_reads_as_the_public_call_does(model: CosmosAdvancedModel) -> None:
    tokens = torch.randint(TINY["vocab_size"], (2, 11), generator=torch.Generator().manual_seed(0))
    inputs, targets = tokens[:, :-1], tokens[:, 1:].clone()
    targets[1, 4] = NOT_SCORED
    for capabilities in ((), ("memory",), CAPABILITIES):
        flags = {f"use_{name}": name in capabilities for name in CAPABILITIES}
        bank, expected, plain, blocked = model.new_memory(2), 0.0, 0.0, 0
        for position in range(3, 10):
            logits, reports = model(inputs[:, : position + 1], memory=bank, return_diagnostics=True, **flags)
            here = targets[:, position]
            expected += F.cross_entropy(logits[:, -1], here, ignore_index=NOT_SCORED, reduction="sum").item()
            hidden = model.hidden_states(inputs[:, : position + 1])[:, -1]
            plain += F.cross_entropy(model.logits(hidden), here, ignore_index=NOT_SCORED, reduction="sum").item()
            assert isinstance(reports, list)
            pairs = zip(reports, here.tolist(), strict=True)
            blocked += sum(report.get("output_blocked", False) for report, target in pairs if target != NOT_SCORED)
        found = exam.read_as_in_generation(model, inputs, targets, capabilities, first_call=3)
        assert found.calls == 2 * 7 - 1
        assert found.loss_sum == pytest.approx(expected, rel=1e-4)
        assert found.plain_sum == pytest.approx(plain, rel=1e-4)
        assert found.marked["blocked"] == blocked


def test_calibration_makes_confidence_the_share_that_is_right(model: CosmosAdvancedModel) -> None:
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(20_000, TINY["dim"], generator=generator)
    estimator = model.evaluation_system.confidence_estimator

    def confidence() -> torch.Tensor:
        return estimator(vectors)["confidence"].squeeze(-1)

    logits = torch.logit(confidence())
    right = torch.rand(len(vectors), generator=generator) < torch.sigmoid(0.5 * logits - 1.0)

    def reading_now() -> exam.Reading:
        return exam.Reading(0.0, 0.0, confidence(), right)

    before = exam.calibration_error(reading_now())
    exam.calibrate(model, reading_now())
    after = exam.calibration_error(reading_now())
    assert before > 0.1
    assert after < 0.02
    torch.testing.assert_close(torch.logit(confidence()), 0.5 * logits - 1.0, atol=0.15, rtol=0.1)


def test_calibration_error_of_known_confidences() -> None:
    sure = exam.Reading(0.0, 0.0, torch.tensor([0.95, 0.95, 0.95, 0.95, 0.15]), torch.tensor([1, 1, 1, 0, 0]).bool())
    assert exam.calibration_error(sure) == pytest.approx((4 * 0.20 + 0.15) / 5)


def test_heads_start_from_giving_back_their_input() -> None:
    torch.manual_seed(0)
    vectors = F.normalize(torch.randn(50, 32), dim=-1) * 32**0.5 * 1.5
    fusion = CapabilityFusion(32).eval()
    starting_points.as_plain_decoder(fusion, 1.5)
    assert F.cosine_similarity(fusion(vectors), vectors).min() > 0.9
    assert (fusion(vectors).norm(dim=-1) / vectors.norm(dim=-1) - 1).abs().max() < 0.15

    corrector = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 32))
    starting_points.as_identity(corrector)
    assert torch.equal(corrector(torch.cat((vectors, torch.randn(50, 32)), dim=-1)), vectors)


def test_quiet_checks_leave_ordinary_vectors_alone_and_keep_their_order(model: CosmosAdvancedModel) -> None:
    ordinary = torch.randn(3000, TINY["dim"], generator=torch.Generator().manual_seed(0))
    heads = CosmosAdvancedModel(model.config, capabilities=("safety",)).eval().requires_grad_(False).safety_system
    heads.load_state_dict(model.safety_system.state_dict())
    for network in safety.DECIDING:
        heads.get_submodule(network)[-1].bias += 3.0
    before = {network: heads.get_submodule(network)(ordinary) for network in safety.DECIDING}
    safety.make_quiet(heads, ordinary)
    for network, (threshold, allowed) in safety.DECIDING.items():
        after = heads.get_submodule(network)(ordinary)
        limit = torch.logit(torch.tensor(THRESHOLDS[threshold]))
        loud, quiet = ((logits >= limit).float().mean(0).max() for logits in (before[network], after))
        assert loud > allowed >= quiet, network
        torch.testing.assert_close(after.diff(dim=0), before[network].diff(dim=0))


@pytest.mark.parametrize("kind", [texts.SHUFFLED, texts.RANDOM, texts.LOOPED])
def test_broken_windows_are_broken_in_the_way_they_say(kind: int) -> None:
    torch.manual_seed(0)
    corpus = texts.Corpus(torch.arange(5000), torch.zeros(6000, dtype=torch.bool), torch.zeros(6000, dtype=torch.bool))
    windows = corpus.windows(64, 40, broken=1.0)
    assert set(windows.kinds.tolist()) == {texts.SHUFFLED, texts.RANDOM, texts.LOOPED}
    for inputs, targets in zip(
        windows.inputs[windows.kinds == kind], windows.targets[windows.kinds == kind], strict=True
    ):
        assert torch.equal(inputs[1:], targets[:-1])
        row = torch.cat((inputs, targets[-1:]))
        span = int(row.max() - row.min())
        ordered = bool((row.diff() == 1).all())
        assert not ordered
        assert {texts.SHUFFLED: span == 40, texts.RANDOM: span > 1000, texts.LOOPED: span < texts.LONGEST_LOOP}[kind]


def test_ordinary_windows_are_the_text_itself() -> None:
    corpus = texts.Corpus(torch.arange(500), torch.zeros(500, dtype=torch.bool), torch.zeros(500, dtype=torch.bool))
    windows = corpus.windows(8, 40, broken=0.0)
    assert (windows.kinds == texts.ORDINARY).all()
    assert (windows.targets - windows.inputs == 1).all()
    assert (windows.inputs.diff(dim=1) == 1).all()


def as_pattern(sentence: str) -> re.Pattern[str]:
    """What finds a sentence of `phrases`, however it was filled in."""
    parts = re.split(r"(\{[^}]*\}|#)", sentence.rstrip(".?!"))
    patterns = {"#": r"\d"}
    chosen = [f"(?:{part[1:-1]})" if part.startswith("{") else patterns.get(part, re.escape(part)) for part in parts]
    return re.compile("".join(chosen), re.IGNORECASE)


def test_there_are_sentences_for_every_label_and_the_last_ones_are_held_out() -> None:
    corpus = made_up_text(400)
    both = [sentences.examples(corpus, random.Random(0), 40, held_out=held) for held in (False, True)]
    for group, labels in sentences.GROUPS.items():
        assert set(labels) == set(LABELS["safety.pii" if group == "personal" else f"safety.{group}"])
        for label, written in labels.items():
            seen, unseen = ([e.text for e in these if (e.group, e.label) == (group, label)] for these in both)
            if not written:  # encoded text is made, not written
                assert len(seen) == len(unseen) == 40
                continue
            *trained, held_out = (as_pattern(sentence) for sentence in written)
            assert all(any(pattern.search(text) for text in seen) for pattern in trained), label
            assert not any(held_out.search(text) for text in seen), label
            assert all(held_out.search(text) for text in unseen), label
    assert all(set(example.found) <= set(COLUMNS) for example in itertools.chain(*both))


def test_a_counterpart_differs_in_its_names_and_numbers_only() -> None:
    source = random.Random(0)
    one, other = sentences.in_context("Call {Anna|Peter} at ### ####.", made_up_text(400), source)
    assert one != other
    assert re.sub(r"anna|peter|\d", "", one, flags=re.I) == re.sub(r"anna|peter|\d", "", other, flags=re.I)
