"""The public model's folders: saved and loaded, in part, and refused by the names of what does not fit."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from cosmos_export.checkpoint import Checkpoint, StoredTensor, save_checkpoint
from cosmos_export.config import CosmosAdvancedConfig
from cosmos_export.errors import CheckpointError
from cosmos_export.model import CosmosAdvancedModel
from cosmos_export.model.capabilities.stored_names import UNUSED_PREFIXES
from cosmos_export.model.loading import load_decoder, load_model, preset_checkpoint, random_checkpoint
from cosmos_runtime import CAPABILITIES

from .capability_models import lively_model, small_config

OFF = {f"use_{name}": False for name in CAPABILITIES}
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8, 2, 8, 1, 8], [0, 22, 5, 7, 5, 5, 3, 1]])


@pytest.fixture
def model() -> CosmosAdvancedModel:
    """Blocks nothing, so that every capability shows."""
    return lively_model(small_config(safety={"safety_level": "medium"}), seed=1)


def test_a_saved_model_loads_and_equals_itself(tmp_path: Path, model: CosmosAdvancedModel) -> None:
    model.save_pretrained(tmp_path)
    again = CosmosAdvancedModel.from_pretrained(tmp_path, dtype=torch.float64)
    assert again.config == model.config
    assert not again.training
    assert not any(parameter.requires_grad for parameter in again.parameters())
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    torch.testing.assert_close(again(IDS)[0], model(IDS)[0], rtol=1e-12, atol=1e-12)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors", "model_info.json"}
    assert CosmosAdvancedModel.from_pretrained(tmp_path)(IDS)[0].dtype == torch.float32


def test_a_saved_oracle_loads_and_equals_itself(tmp_path: Path, oracle: Path) -> None:
    """What was carried in config.json is carried on; weights that nothing reads are left behind."""
    model = CosmosAdvancedModel.from_pretrained(oracle)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == json.loads((oracle / "config.json").read_text())
    assert not [name for name in load_file(tmp_path / "model.safetensors") if name.startswith(UNUSED_PREFIXES)]
    again = CosmosAdvancedModel.from_pretrained(tmp_path)
    torch.testing.assert_close(again(IDS)[0], model(IDS)[0])


def test_a_model_may_be_saved_where_it_was_loaded_from(tmp_path: Path, model: CosmosAdvancedModel) -> None:
    """Its tensors are mapped from the file that is replaced."""
    model.float().save_pretrained(tmp_path)
    for _ in range(2):
        CosmosAdvancedModel.from_pretrained(tmp_path).save_pretrained(tmp_path)
    again = CosmosAdvancedModel.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in model.state_dict().items())
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors", "model_info.json"}


@torch.inference_mode()
def test_some_capabilities_of_a_checkpoint(oracle: Path) -> None:
    whole = CosmosAdvancedModel.from_pretrained(oracle)
    part = CosmosAdvancedModel.from_pretrained(oracle, capabilities=["memory"])
    flags = {**OFF, "use_memory": True}
    torch.testing.assert_close(part(IDS, **flags)[0], whole(IDS, **flags)[0])


def test_the_plain_decoder_of_such_a_checkpoint_still_loads(tmp_path: Path, model: CosmosAdvancedModel) -> None:
    model.save_pretrained(tmp_path)
    decoder = load_decoder(Checkpoint.open(tmp_path), dtype=torch.float64)
    torch.testing.assert_close(decoder(IDS)[:, :-1], model(IDS)[0][:, :-1])


def changed(
    model: CosmosAdvancedModel, folder: Path, change: Callable[[dict[str, Tensor]], Any], config: CosmosAdvancedConfig
) -> Path:
    state = dict(model.state_dict())
    change(state)
    save_checkpoint(folder, config, state)
    return folder


def test_missing_tensors_are_listed_by_name(tmp_path: Path, model: CosmosAdvancedModel) -> None:
    def remove(state: dict[str, Tensor]) -> None:
        del state["memory_system.procedural_memory.skill_library.49.0.bias"]
        del state["capability_fusion.4.weight"]

    with pytest.raises(CheckpointError) as caught:
        CosmosAdvancedModel.from_pretrained(changed(model, tmp_path, remove, model.config))
    assert "memory_system.procedural_memory.skill_library.49.0.bias is missing" in str(caught.value)
    assert "capability_fusion.4.weight is missing" in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_unknown_tensors_are_listed_by_name(tmp_path: Path, model: CosmosAdvancedModel) -> None:
    names = ["layers.1.norm1.weight", "reasoning_engine.cot.step_encoder.5.weight", "lm_head.weight"]

    def add(state: dict[str, Tensor]) -> None:
        state.update({name: torch.ones(3) for name in names})

    with pytest.raises(CheckpointError) as caught:
        CosmosAdvancedModel.from_pretrained(changed(model, tmp_path, add, model.config))
    assert all(name in str(caught.value) for name in names)
    load_decoder(Checkpoint.open(tmp_path))  # it asks for what it needs, and for nothing else


def test_tensors_of_another_configuration_are_listed(tmp_path: Path, model: CosmosAdvancedModel) -> None:
    other = small_config(reasoning={"reasoning_steps": 4})
    changed(model, tmp_path, lambda state: None, other)
    with pytest.raises(CheckpointError, match=r"no use for: .*\.step_encoder\.4\.weight"):
        CosmosAdvancedModel.from_pretrained(tmp_path)
    other.reasoning.reasoning_steps = 6
    other.save(tmp_path / "config.json")
    with pytest.raises(CheckpointError, match=r"step_encoder\.5\.weight is missing.*shape \(16, 80\), expected"):
        CosmosAdvancedModel.from_pretrained(tmp_path)


def test_a_plain_decoders_checkpoint_lacks_the_heads(tiny_checkpoint: Checkpoint) -> None:
    with pytest.raises(CheckpointError, match=r"reasoning_engine\.cot\.step_encoder\.0\.weight is missing"):
        load_model(tiny_checkpoint)


def test_weights_that_nothing_reads_are_never_read(model: CosmosAdvancedModel) -> None:
    def refuse() -> Tensor:
        raise AssertionError("a tensor that no capability needs was read")

    unused = {f"{prefix}x": StoredTensor((1 << 40,), torch.float32, refuse) for prefix in UNUSED_PREFIXES}
    checkpoint = Checkpoint.from_tensors(model.config, model.state_dict(), {"location": "here"})
    stored = {**checkpoint.stored, **unused}
    loaded = load_model(Checkpoint(model.config, stored, checkpoint.origin), dtype=torch.float64)
    torch.testing.assert_close(loaded(IDS)[0], model(IDS)[0], rtol=1e-12, atol=1e-12)
    heads = {n: StoredTensor(t.shape, t.dtype, refuse) if "_system." in n else t for n, t in stored.items()}
    load_model(Checkpoint(model.config, heads, checkpoint.origin), capabilities=("reasoning",))


def test_random_checkpoints_repeat_and_share_the_backbone() -> None:
    config = small_config()
    first, second = (random_checkpoint(config, name="x", seed=4, capabilities=CAPABILITIES) for _ in range(2))
    plain = random_checkpoint(config, name="x", seed=4)
    assert first.names == second.names
    assert all(torch.equal(first.tensor(name), second.tensor(name)) for name in first.names)
    assert all(torch.equal(first.tensor(name), plain.tensor(name)) for name in plain.names)
    assert random_checkpoint(config, name="x", capabilities=()).names == [*plain.names, *_fusion_names()]


def _fusion_names() -> list[str]:
    return [f"capability_fusion.{layer}.{part}" for layer in (0, 1, 4) for part in ("weight", "bias")]


@torch.inference_mode()
def test_untrained_heads_block_nothing() -> None:
    """A preset at its default safety level has to say something, or nothing of it could be tried."""
    model = load_model(preset_checkpoint("beginner", capabilities=CAPABILITIES))
    _, reports = model(torch.arange(64).view(8, 8), return_diagnostics=True)
    assert model.config.safety.safety_level == "high"
    assert all(report["is_safe"] and not report["safety"]["interventions"] for report in reports)
