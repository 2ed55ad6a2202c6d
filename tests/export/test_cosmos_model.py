"""The public model: its call, what it returns, and what it refuses."""

import json
from typing import Any

import pytest
import torch

from cosmos_export.errors import ConfigError
from cosmos_export.model import CosmosAdvancedModel, CosmosDecoder
from cosmos_runtime import CAPABILITIES

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


@torch.inference_mode()
def test_only_the_last_position_is_not_the_plain_decoders(model: CosmosAdvancedModel) -> None:
    decoder = CosmosDecoder(model.config).double()
    decoder.load_state_dict({n: t for n, t in model.state_dict().items() if n in decoder.state_dict()})
    plain = decoder.eval()(IDS)
    for flags in ({}, OFF):
        logits, _ = model(IDS, **flags)
        torch.testing.assert_close(logits[:, :-1], plain[:, :-1])
        assert (logits[:, -1] - plain[:, -1]).abs().amax(-1).min() > 1e-3


@torch.inference_mode()
def test_every_flag_changes_the_last_position(model: CosmosAdvancedModel) -> None:
    everything, _ = model(IDS)
    for flag in OFF:
        logits, _ = model(IDS, **{flag: False})
        # In one row at least: one whose vector needs no correction leaves evaluation as it came.
        assert (logits[:, -1] - everything[:, -1]).abs().max() > 1e-6, flag


@torch.inference_mode()
def test_diagnostics_are_asked_for(model: CosmosAdvancedModel) -> None:
    assert model(IDS)[1] is None
    assert model(IDS[:1], **OFF, return_diagnostics=True)[1] == {}
    one = model(IDS[:1], return_diagnostics=True)[1]
    several = model(IDS, return_diagnostics=True)[1]
    assert isinstance(several, list)
    assert len(several) == 3
    same_report(one, several[0], tolerance=1e-12)
    assert list(several[0]) == ["reasoning", "memory", "safety", "is_safe", "evaluation"]
    json.dumps(several)


@torch.inference_mode()
@pytest.mark.parametrize("level", ["high", "strict"])
def test_unsafe_rows_are_blocked_at_every_position(model: CosmosAdvancedModel, level: str) -> None:
    model.config.safety.safety_level = level
    memory = block(model, everything=True).new_memory(3)
    logits, reports = model(IDS, return_diagnostics=True, memory=memory)
    assert not logits.any()
    assert [list(report) for report in reports] == [["reasoning", "memory", "safety", "is_safe", "output_blocked"]] * 3
    assert memory.calls.tolist() == [1, 1, 1], "memory runs before safety, so a blocked row is remembered"
    logits, reports = block(model, everything=False)(IDS, return_diagnostics=True)
    assert logits.any()
    assert all("output_blocked" not in report for report in reports)


@torch.inference_mode()
@pytest.mark.parametrize("level", ["low", "medium"])
def test_other_levels_only_report(model: CosmosAdvancedModel, level: str) -> None:
    model.config.safety.safety_level = level
    logits, reports = block(model, everything=True)(IDS, return_diagnostics=True)
    assert logits[:, -1].any()
    assert all(report["is_safe"] is False and "evaluation" in report for report in reports)


@torch.inference_mode()
def test_blocked_and_free_rows_share_a_batch() -> None:
    model = lively_model(small_config(), seed=2)
    ids = torch.randint(23, (40, 6), generator=torch.Generator().manual_seed(0))
    logits, reports = model(ids, return_diagnostics=True)
    blocked = torch.tensor(["output_blocked" in report for report in reports])
    assert 0 < blocked.sum() < 40
    assert torch.equal(~logits.flatten(1).any(1), blocked)
    for row in (int(blocked.nonzero()[0]), int((~blocked).nonzero()[0])):
        torch.testing.assert_close(model(ids[row : row + 1])[0][0], logits[row], rtol=1e-12, atol=1e-12)


@torch.inference_mode()
def test_a_bank_carries_over_and_a_call_without_one_starts_empty(model: CosmosAdvancedModel) -> None:
    memory = model.new_memory(3)
    first, _ = model(IDS, memory=memory)
    second, reports = model(IDS, memory=memory, return_diagnostics=True)
    assert [report["memory"]["episode_length"] for report in reports] == [2, 2, 2]
    assert (first - second).abs().max() > 1e-6
    assert torch.equal(model(IDS)[0], first)
    assert torch.equal(model(IDS, memory=model.new_memory(3))[0], first)
    before = memory.state
    model(IDS, memory=memory, use_memory=False)
    assert memory.state is before


def test_a_bank_has_the_size_that_is_asked_for_up_to_the_models(model: CosmosAdvancedModel) -> None:
    assert model.new_memory(2).capacity == 2048
    assert model.new_memory(2, capacity=9999).capacity == 2048
    assert model.new_memory(2, capacity=100).capacity == 100
    assert model.new_memory(2, capacity=1).capacity == 5
    assert model.new_memory(2).batch == 2


@pytest.mark.parametrize("wrong", ["batch", "entries", "dtype"])
def test_a_bank_that_does_not_fit_is_refused(model: CosmosAdvancedModel, wrong: str) -> None:
    memory = model.new_memory(2 if wrong == "batch" else 3, capacity=8)
    if wrong == "entries":
        memory.state = memory.state._replace(keys=memory.state.keys[:, :4], values=memory.state.values[:, :4])
    if wrong == "dtype":
        memory.state = memory.state._replace(keys=memory.state.keys.float())
    with pytest.raises(ConfigError, match=r"memory: expected a bank of 3 rows, at least 5 entries.*new_memory\(3\)"):
        model(IDS, memory=memory)


@torch.inference_mode()
def test_lengths_give_each_row_its_own_last_token(model: CosmosAdvancedModel) -> None:
    lengths = torch.tensor([5, 8, 1])
    logits, reports = model(IDS, lengths=lengths, return_diagnostics=True)
    for row, length in enumerate(lengths.tolist()):
        alone, report = model(IDS[row : row + 1, :length], return_diagnostics=True)
        torch.testing.assert_close(logits[row, :length], alone[0], rtol=1e-12, atol=1e-12)
        same_report(reports[row], report, tolerance=1e-12)


@pytest.mark.parametrize("lengths", [[1, 2], [0, 3, 3], [3, 9, 3], [[1], [2], [3]]])
def test_lengths_that_do_not_fit_are_refused(model: CosmosAdvancedModel, lengths: list[Any]) -> None:
    with pytest.raises(ConfigError, match="lengths: expected 3 numbers from 1 to 8"):
        model(IDS, lengths=torch.tensor(lengths))


def test_padding_needs_a_causal_mask() -> None:
    model = lively_model(small_config(), causal=False)
    with pytest.raises(ConfigError, match="lengths: without a causal mask"):
        model(IDS, lengths=torch.tensor([8, 8, 8]))


@torch.inference_mode()
def test_without_a_causal_mask_every_position_sees_the_last() -> None:
    model = lively_model(small_config(safety={"safety_level": "low"}), causal=False)
    changed = IDS.clone()
    changed[:, -1] += 1
    assert (model(IDS)[0] - model(changed % 23)[0])[:, 0].abs().max() > 1e-6


@torch.inference_mode()
@pytest.mark.parametrize("examples", [None, []])
def test_learning_without_examples_does_nothing(model: CosmosAdvancedModel, examples: list[Any] | None) -> None:
    logits, reports = model(IDS, use_learning=True, examples=examples, return_diagnostics=True)
    assert torch.equal(logits, model(IDS)[0])
    assert "learning" not in reports[0]
    assert torch.equal(logits, model(IDS, examples=[("a", "b")])[0]), "examples alone are not read"


def test_learning_from_examples_is_refused(model: CosmosAdvancedModel) -> None:
    with pytest.raises(ConfigError, match="learning from examples is not supported"):
        model(IDS, use_learning=True, examples=[(IDS, IDS)])


@torch.inference_mode()
def test_a_model_has_the_capabilities_it_is_built_with(model: CosmosAdvancedModel) -> None:
    some = CosmosAdvancedModel(model.config, capabilities=("safety", "reasoning")).double().eval()
    names = some.state_dict().keys()
    assert some.capabilities == ("reasoning", "safety")
    assert not [name for name in names if name.startswith(("memory_system", "evaluation_system"))]
    some.load_state_dict({name: tensor for name, tensor in model.state_dict().items() if name in names})
    flags = {"use_memory": False, "use_evaluation": False}
    torch.testing.assert_close(some(IDS, **flags)[0], model(IDS, **flags)[0])
    with pytest.raises(ConfigError, match=r"no memory and no evaluation.*use_memory=False, use_evaluation=False"):
        some(IDS)
    none = CosmosAdvancedModel(model.config, capabilities=()).double().eval()
    none.load_state_dict({name: t for name, t in model.state_dict().items() if name in none.state_dict()})
    torch.testing.assert_close(none(IDS, **OFF)[0], model(IDS, **OFF)[0])


def test_the_concept_attention_wants_a_dim_of_eight_heads() -> None:
    with pytest.raises(ConfigError, match=r"dim must be a multiple of 8, got 12"):
        CosmosAdvancedModel(small_config(dim=12))
    assert CosmosAdvancedModel(small_config(dim=12), capabilities=("reasoning",)).capabilities == ("reasoning",)


def test_building_validates_the_configuration() -> None:
    with pytest.raises(ConfigError, match=r"evaluation\.verification_depth must be a positive integer, got 0"):
        CosmosAdvancedModel(small_config(evaluation={"verification_depth": 0}))


@pytest.mark.parametrize("shape", [(8,), (1, 2, 3), (1, 0), (1, 33)])
def test_ids_of_a_wrong_shape_are_refused(model: CosmosAdvancedModel, shape: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="input_ids|sequence"):
        model(torch.zeros(shape, dtype=torch.int64))


def test_gradients_reach_every_weight_that_runs() -> None:
    config = small_config(safety={"safety_level": "low"}, evaluation={"verification_depth": 1})
    model = lively_model(config, dtype=torch.float32).train().requires_grad_(True)
    ids = torch.randint(23, (64, 6), generator=torch.Generator().manual_seed(0))
    memory = model.new_memory(64, capacity=8)
    loss = sum(model(ids[:, : 4 + call], memory=memory)[0][:, -1].square().mean() for call in range(3))
    loss.backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    # Scores are reports: their detectors take part in decisions only. So do modes that the configuration does not use.
    assert all(name.startswith(("safety_system.", "evaluation_system.", "reasoning_engine.")) for name in silent)
    assert not [name for name in silent if ".cot." in name or "corrector" in name or "debiaser" in name]
