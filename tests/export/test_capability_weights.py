"""Weights that the heads hold in another form than a checkpoint: stacked skills, and what follows from concepts."""

import copy
import pickle
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from cosmos_export.model import CosmosAdvancedModel
from cosmos_export.model.capabilities import weight_source
from cosmos_export.model.capabilities.procedural_memory import ProceduralMemory
from cosmos_export.model.capabilities.semantic_memory import SemanticMemory
from cosmos_export.model.loading import model_skeleton

from . import plain_heads
from .capability_models import lively_model, random_vectors, small_config

DIM = 16
SKILL = "memory_system.procedural_memory.skill_library.7.2.weight"


@pytest.fixture
def model() -> CosmosAdvancedModel:
    return lively_model(small_config(), capabilities=("memory",))


def test_fifty_skills_in_two_products_are_fifty_skills(model: CosmosAdvancedModel) -> None:
    x, state = random_vectors(3, DIM, 0), model.state_dict()
    expected = torch.stack([plain_heads.procedural(state, row) for row in x])
    torch.testing.assert_close(model.memory_system.procedural_memory(x), expected)


@pytest.mark.parametrize("frozen", [True, False])
def test_the_concept_attention_is_torchs(model: CosmosAdvancedModel, frozen: bool) -> None:
    x, state = random_vectors(3, DIM, 0), model.state_dict()
    expected = torch.stack([plain_heads.semantic(state, row) for row in x])
    if not frozen:
        model.train().eval()
    assert model.memory_system.semantic_memory.is_frozen == frozen
    torch.testing.assert_close(model.memory_system.semantic_memory(x), expected)


def test_a_state_dict_has_the_checkpoints_names(model: CosmosAdvancedModel) -> None:
    state = model.state_dict()
    assert state[SKILL].shape == (DIM, DIM)
    assert sum(".skill_library." in name for name in state) == 200
    assert not [name for name in state if "skills_" in name or "concept_query" in name or "concept_keys" in name]
    assert state["memory_system.semantic_memory.concept_attention.in_proj_weight"].shape == (3 * DIM, DIM)


def test_a_state_dict_loads_again(model: CosmosAdvancedModel) -> None:
    other = lively_model(small_config(), capabilities=("memory",), seed=1)
    assert not torch.equal(other.state_dict()[SKILL], model.state_dict()[SKILL])
    result = other.load_state_dict(model.state_dict())
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    x = random_vectors(2, DIM, 0)
    assert torch.equal(other.memory_system.procedural_memory(x), model.memory_system.procedural_memory(x))
    # Its tables followed the weights.
    assert torch.equal(other.memory_system.semantic_memory(x), model.memory_system.semantic_memory(x))


def test_state_dict_tensors_are_the_parameters(model: CosmosAdvancedModel) -> None:
    """Not copies, as in any module: who averages or clips weights through a state dict changes the model."""
    before = model.memory_system.procedural_memory(random_vectors(1, DIM, 0))
    with torch.no_grad():
        model.state_dict()[SKILL].mul_(2)
    assert not torch.equal(model.memory_system.procedural_memory(random_vectors(1, DIM, 0)), before)


def test_missing_and_unexpected_names_are_the_checkpoints(model: CosmosAdvancedModel) -> None:
    state = model.state_dict()
    del state[SKILL]
    state["memory_system.procedural_memory.skill_library.50.0.weight"] = torch.zeros(DIM, DIM)
    with pytest.raises(RuntimeError) as caught:
        model.load_state_dict(state)
    assert SKILL in str(caught.value)
    assert "skill_library.50.0.weight" in str(caught.value)
    assert "skills_" not in str(caught.value)
    result = model.load_state_dict(state, strict=False)
    assert result.missing_keys == [SKILL]
    assert result.unexpected_keys == ["memory_system.procedural_memory.skill_library.50.0.weight"]


def test_a_skill_of_the_wrong_shape_is_named(model: CosmosAdvancedModel) -> None:
    state = model.state_dict()
    state[SKILL] = torch.zeros(DIM, DIM + 1)
    with pytest.raises(RuntimeError, match=rf"size mismatch for {SKILL}.*\[16, 17\].*\[16, 16\]"):
        model.load_state_dict(state)


def names_of_the_models_own(model: CosmosAdvancedModel) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from ((name, buffer) for name, buffer in model.named_buffers() if not name.startswith("rope."))


def test_every_tensor_of_the_model_follows_from_the_checkpoints(model: CosmosAdvancedModel) -> None:
    state, derived = model.state_dict(), 0
    for name, tensor in names_of_the_models_own(model):
        source = weight_source(name)
        derived += source is not None
        expected = state[name] if source is None else source.read(state.__getitem__)
        assert torch.equal(tensor, expected), name
    assert derived == 8


def test_shapes_are_known_without_weights() -> None:
    model, skeleton = lively_model(small_config()), model_skeleton(small_config())
    shapes = {name: tensor.shape for name, tensor in names_of_the_models_own(model)}
    assert {name: tensor.shape for name, tensor in names_of_the_models_own(skeleton)} == shapes
    assert all(tensor.is_meta for tensor in skeleton.state_dict().values())
    assert list(skeleton.state_dict()) == list(model.state_dict())


def test_training_computes_from_the_weights_and_reaches_them() -> None:
    memory = SemanticMemory(DIM).double()
    memory.eval().freeze()
    x = random_vectors(2, DIM, 0)
    frozen = memory(x)
    memory.train()
    assert not memory.is_frozen
    assert memory.concept_keys is None
    torch.testing.assert_close(memory(x), frozen)
    memory(x).square().sum().backward()
    for name in ("concept_embeddings", "concept_attention.in_proj_weight", "concept_attention.in_proj_bias"):
        assert memory.get_parameter(name).grad is not None, name


def test_converting_a_model_derives_its_tables_anew() -> None:
    memory = SemanticMemory(DIM).eval()
    memory.freeze()
    exact = SemanticMemory(DIM).double().eval()
    exact.load_state_dict({name: tensor.double() for name, tensor in memory.state_dict().items()})
    exact.freeze()
    memory.double()
    assert memory.concept_keys is not None
    assert exact.concept_keys is not None
    assert torch.equal(memory.concept_keys.weight, exact.concept_keys.weight)
    assert not torch.equal(memory.concept_keys.weight.float().double(), exact.concept_keys.weight)


def test_gradients_reach_every_skill() -> None:
    memory = ProceduralMemory(DIM)
    memory(torch.randn(4, DIM)).square().sum().backward()
    for parameter in memory.parameters():
        assert parameter.grad is not None
        assert parameter.grad.abs().sum() > 0


def test_untrained_skills_have_the_spread_of_single_layers() -> None:
    torch.manual_seed(0)
    memory, layer = ProceduralMemory(64), torch.nn.Linear(64, 64)
    for name in ("0.weight", "0.bias", "2.weight", "2.bias"):
        spread = memory.state_dict()[f"skill_library.3.{name}"].std().item()
        assert spread == pytest.approx(layer.weight.std().item(), rel=0.3), name


def test_models_can_be_copied_and_pickled(model: CosmosAdvancedModel) -> None:
    x = random_vectors(1, DIM, 0)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin.memory_system.procedural_memory(x), model.memory_system.procedural_memory(x))
        assert torch.equal(twin.memory_system.semantic_memory(x), model.memory_system.semantic_memory(x))
        assert list(twin.state_dict()) == list(model.state_dict())
