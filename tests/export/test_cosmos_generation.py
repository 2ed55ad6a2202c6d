"""Generation with the eager model."""

from typing import Any

import pytest
import torch
from torch import Tensor

from cosmos_export.errors import ConfigError
from cosmos_export.model import CosmosAdvancedModel
from cosmos_runtime import CAPABILITIES, InputError

from .capability_models import lively_model, same_report, small_config

OFF = {f"use_{name}": False for name in CAPABILITIES}
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8, 2, 8, 1, 8], [0, 22, 5, 7, 5, 5, 3, 1]])


@pytest.fixture
def model() -> CosmosAdvancedModel:
    """Blocks nothing, so that every capability shows."""
    return lively_model(small_config(safety={"safety_level": "medium"}), seed=1)


def block(model: CosmosAdvancedModel, *, everything: bool) -> CosmosAdvancedModel:
    """Makes every row unsafe, or none; the level decides what follows."""
    with torch.no_grad():
        for name in ("content_filter.harmful_detector.3", "jailbreak_prevention.jailbreak_detector.2"):
            model.safety_system.get_parameter(f"{name}.bias").fill_(60.0 if everything else -60.0)
        model.safety_system.toxicity_detector.toxicity_scorer[-1].bias.fill_(-60.0)
    return model


def test_greedy_generation_takes_the_best_token_of_each_call(model: CosmosAdvancedModel) -> None:
    tokens, report = model.generate(IDS[:1], 7, temperature=0, repetition_penalty=1.0)
    memory, ids = model.new_memory(1), IDS[:1]
    for _ in range(7):
        logits, diagnostics = model(ids, memory=memory, return_diagnostics=True)
        ids = torch.cat((ids, logits[:, -1].argmax(-1, keepdim=True)), dim=1)
    assert torch.equal(tokens, ids)
    assert report["num_tokens_generated"] == 7
    assert report["finish_reason"] == "length"
    assert len(report["generation_steps"]) == 7
    same_report(report["generation_steps"][-1], diagnostics, tolerance=1e-12)


def test_generated_rows_are_those_alone(model: CosmosAdvancedModel) -> None:
    tokens, reports = model.generate(IDS, 6, seed=5)
    assert isinstance(reports, list)
    for row, report in enumerate(reports):
        alone, its_report = model.generate(IDS[row : row + 1], 6, seed=5)
        assert torch.equal(tokens[row : row + 1], alone)
        assert report["finish_reason"] == its_report["finish_reason"] == "length"
    assert not torch.equal(model.generate(IDS, 6, seed=6)[0], tokens)


def test_generation_settings_are_the_configurations(model: CosmosAdvancedModel) -> None:
    model.config.generation.temperature = 0.0
    model.config.generation.repetition_penalty = 1.0
    model.config.generation.max_tokens = 3
    tokens, report = model.generate(IDS[:1])
    assert torch.equal(tokens, model.generate(IDS[:1], 3, temperature=0.0, top_k=0, top_p=1.0)[0])
    assert report["num_tokens_generated"] == 3


def test_a_blocked_row_ends_and_the_others_go_on(model: CosmosAdvancedModel) -> None:
    """A model whose filter knows one thing: how a row began."""
    model.config.safety.safety_level = "strict"
    block(model, everything=False)
    unsafe = model.safety_system.forward
    model.safety_system.forward = lambda x: _block_second(unsafe(x))  # type: ignore[method-assign]
    tokens, reports = model.generate(IDS, 4, temperature=0)
    assert [report["finish_reason"] for report in reports] == ["length", "blocked", "length"]
    assert [report["num_tokens_generated"] for report in reports] == [4, 0, 4]
    assert len(reports[1]["generation_steps"]) == 1
    assert reports[1]["generation_steps"][0]["output_blocked"] is True
    assert tokens[1, 8:].tolist() == [0, 0, 0, 0]


def _block_second(result: tuple[Tensor, dict[str, Tensor]]) -> tuple[Tensor, dict[str, Tensor]]:
    vector, scores = result
    blocked = torch.arange(len(vector)) == 1
    return vector, {**scores, "safety.is_safe": ~blocked, "output_blocked": blocked}


def test_generation_ends_at_a_stop_id_and_at_the_end_of_the_context(model: CosmosAdvancedModel) -> None:
    tokens, report = model.generate(IDS[:1], 100, temperature=0)
    assert tokens.shape == (1, 32)
    assert (report["finish_reason"], report["num_tokens_generated"]) == ("context", 24)
    answer = tokens[0, 8:].tolist()
    at, new = next((i, token) for i, token in enumerate(answer) if i > 0 and token not in answer[:i])
    stopped, report = model.generate(IDS[:1], 100, temperature=0, stop_ids=[new])
    assert torch.equal(stopped, tokens[:, : 8 + at])
    assert (report["finish_reason"], report["num_tokens_generated"]) == ("stop", at)
    same, report = model.generate(tokens, 5)
    assert torch.equal(same, tokens)
    assert report == {"num_tokens_generated": 0, "finish_reason": "context", "generation_steps": []}
    assert model.generate(IDS[:1], 0)[1]["finish_reason"] == "length"


def test_generation_takes_the_models_flags(model: CosmosAdvancedModel) -> None:
    _, report = model.generate(IDS[:1], 1, **OFF)
    assert report["generation_steps"] == [{}]


@pytest.mark.parametrize(
    ("ids", "options", "error", "words"),
    [
        (IDS[0], {}, ConfigError, r"input_ids must be \(batch, sequence\)"),
        (IDS[:, :0], {}, ConfigError, r"input_ids must be \(batch, sequence\)"),
        (IDS.repeat(1, 5), {}, ConfigError, "prompts of 40 tokens, and max_sequence_length is 32"),
        (IDS, {"max_new_tokens": -1}, ConfigError, "max_new_tokens must be 0 or more"),
        (IDS - 100, {"max_new_tokens": 0}, ConfigError, "in row 0 at position 0"),
        (IDS, {"temperature": -1.0}, InputError, "temperature"),
    ],
)
def test_generation_refuses_what_does_not_fit(
    model: CosmosAdvancedModel, ids: Tensor, options: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        model.generate(ids, **options)
