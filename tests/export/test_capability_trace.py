"""The heads as torch.export sees them: on the meta device, batch and bank dynamic, with used weights only."""

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from cosmos_export.config import CosmosAdvancedConfig
from cosmos_export.model import CosmosAdvancedModel
from cosmos_export.model.capabilities import MemoryState, capability_set, model_score_specs
from cosmos_export.model.loading import model_skeleton
from cosmos_runtime import CAPABILITIES

from .capability_models import lively_model, random_vectors, small_config

DIM = 16
SETS = [(), ("reasoning",), ("memory",), ("safety",), ("evaluation",), ("memory", "evaluation"), CAPABILITIES]
MODES = ["chain_of_thought", "tree_of_thoughts", "self_consistency", "reflexion", "direct"]


class Heads(nn.Module):
    """representation, query (B, D) and the bank, in one tuple, to the vector, the scores and the bank."""

    def __init__(self, model: CosmosAdvancedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        representation, query, *bank = inputs
        state = MemoryState(*bank) if bank else None
        enhanced = self.model.enhance(representation, query, self.model.capabilities, state)
        # The bank's calls are among the scores already.
        return (enhanced.vector, *enhanced.scores.values(), *(enhanced.memory or ())[:2])


def export(model: CosmosAdvancedModel, device: str) -> ExportedProgram:
    dtype = model.tok_embeddings.weight.dtype
    batch, slots = Dim("batch", min=1), Dim("slots", min=5)
    inputs = [torch.zeros(2, DIM, dtype=dtype, device=device) for _ in range(2)]
    shapes: list[dict[int, Dim]] = [{0: batch}, {0: batch}]
    if "memory" in model.capabilities:
        inputs += [torch.zeros(2, 7, DIM, dtype=dtype, device=device) for _ in range(2)]
        inputs += [torch.zeros(2, dtype=torch.int64, device=device)]
        shapes += [{0: batch, 1: slots}, {0: batch, 1: slots}, {0: batch}]
    return torch.export.export(Heads(model), (tuple(inputs),), dynamic_shapes=(tuple(shapes),), strict=False)


@pytest.mark.parametrize("capabilities", SETS, ids="+".join)
def test_every_set_traces_without_weights(capabilities: tuple[str, ...]) -> None:
    model = model_skeleton(small_config(), capabilities=capabilities)
    program = export(model, "meta")
    outputs = program.graph_signature.user_outputs
    assert len(outputs) == 1 + len(model_score_specs(model.config, capabilities)) + 2 * ("memory" in capabilities)


@pytest.mark.parametrize("capabilities", SETS, ids="+".join)
@pytest.mark.parametrize(("batch", "slots"), [(1, 5), (2, 7), (3, 40)])
def test_a_traced_program_is_the_model(capabilities: tuple[str, ...], batch: int, slots: int) -> None:
    """At batches and banks of other sizes than the traced ones, some rows blocked or corrected, the ring come round."""
    model = lively_model(small_config(), seed=2, capabilities=capabilities)
    program = export(model, "cpu").module()
    inputs = [random_vectors(batch, DIM, seed) for seed in range(2)]
    if "memory" in capabilities:
        bank = random_vectors(2 * batch * slots, DIM, 2).view(2, batch, slots, DIM)
        inputs += [nn.functional.normalize(bank[0], dim=-1), bank[1], torch.arange(batch) * slots]
    with torch.inference_mode():
        given, expected = program(tuple(inputs)), Heads(model)(tuple(inputs))
    assert len(given) == len(expected)
    for mine, its in zip(given, expected, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-12, atol=1e-12)


def used_weights(program: ExportedProgram) -> set[str]:
    """Names of parameters and buffers that some operator of the program takes."""
    signature = program.graph_signature
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    placeholders = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    return {target.removeprefix("model.") for name, target in names.items() if placeholders[name].users}


def test_a_traced_memory_has_the_derived_weights_and_not_their_sources() -> None:
    used = used_weights(export(model_skeleton(small_config(), capabilities=("memory",)), "meta"))
    semantic = {name.rpartition("semantic_memory.")[2] for name in used if ".semantic_memory." in name}
    assert {"concept_keys.weight", "concept_values.weight", "concept_query.weight", "concept_query.bias"} < semantic
    assert not semantic & {"concept_embeddings", "concept_attention.in_proj_weight", "concept_attention.in_proj_bias"}
    assert not [name for name in used if "skill_library" in name]
    procedural = {name.rpartition("procedural_memory.")[2] for name in used if ".procedural_memory." in name}
    assert {"skills_in.weight", "skills_in.bias", "skills_out.weight", "skill_biases"} < procedural


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("extended", [False, True])
def test_a_traced_mode_has_its_own_weights_only(mode: str, extended: bool) -> None:
    config = small_config(reasoning={"mode": mode, "extended_thinking": extended})
    used = used_weights(export(model_skeleton(config, capabilities=("reasoning",)), "meta"))
    parts = {name.split(".")[1] for name in used if name.startswith("reasoning_engine.")}
    own = {"chain_of_thought": "cot", "tree_of_thoughts": "tot", "direct": None}.get(mode, mode)
    assert parts == {part for part in (own, "cot" if extended else None) if part}


def test_a_switched_off_check_has_no_weights() -> None:
    config = small_config(safety={"privacy_protection": False}, evaluation={"self_correction": False})
    used = used_weights(export(model_skeleton(config), "meta"))
    assert not [name for name in used if "privacy_protector" in name or "self_correction" in name]


@pytest.mark.parametrize("level", ["medium", "high"])
def test_only_a_level_that_blocks_has_a_mask(level: str) -> None:
    config = small_config(safety={"safety_level": level})
    model = model_skeleton(config, capabilities=("safety",))
    vectors = torch.empty(2, DIM, device="meta")
    enhanced = model.enhance(vectors, vectors, ("safety",))
    assert (enhanced.blocked is not None) == (level == "high")
    assert ("output_blocked" in enhanced.scores) == (level == "high")


def count_products(program: ExportedProgram) -> int:
    products = {"aten.linear.default", "aten.matmul.default", "aten.mm.default", "aten.addmm.default"}
    return sum(str(node.target) in products for node in program.graph.nodes)


def test_the_memory_is_a_few_large_products() -> None:
    """Fifty skills of two layers each are not a hundred products."""
    program = export(model_skeleton(small_config(), capabilities=("memory",)), "meta")
    assert 0 < count_products(program) < 25


class Whole(nn.Module):
    """The public model as a program: ids (B, T) to logits (B, T, V)."""

    def __init__(self, model: CosmosAdvancedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids)[0]


@pytest.mark.parametrize("config", [small_config(), small_config(memory={"working_memory_size": 0})])
def test_the_public_call_traces_too(config: CosmosAdvancedConfig) -> None:
    model = lively_model(config, capabilities=capability_set(CAPABILITIES))
    ids = torch.randint(23, (3, 6), generator=torch.Generator().manual_seed(0))
    shapes = ({0: Dim("batch", min=1), 1: Dim("sequence", min=2, max=32)},)
    program = torch.export.export(Whole(model), (ids,), dynamic_shapes=shapes, strict=False).module()
    longer = torch.randint(23, (5, 9), generator=torch.Generator().manual_seed(1))
    for given in (ids, longer, longer[:1]):
        torch.testing.assert_close(program(given), model(given)[0], rtol=1e-10, atol=1e-10)
