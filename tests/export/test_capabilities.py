"""The heads against a plain second writing of the reference (`plain_heads`), over configurations of every kind."""

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from cosmos_export.config import CosmosAdvancedConfig
from cosmos_export.errors import ConfigError
from cosmos_export.model import CosmosAdvancedModel
from cosmos_export.model.capabilities import MemoryState, capability_set, diagnostic_settings, model_score_specs
from cosmos_runtime import (
    CAPABILITIES,
    EVALUATION_CHECKS,
    SAFETY_CHECKS,
    SAFETY_LEVELS,
    nested_diagnostics,
    score_specs,
)

from . import plain_heads
from .capability_models import lively_model, random_vectors, same_report, small_config

MODES = ["chain_of_thought", "tree_of_thoughts", "self_consistency", "reflexion", "analogical", "of_my_own"]
DIM = 16


def switches(names: tuple[str, ...]) -> st.SearchStrategy[dict[str, bool]]:
    return st.fixed_dictionaries({name: st.booleans() for name in names})


configurations = st.builds(
    small_config,
    dim=st.sampled_from([8, 24, DIM]),
    reasoning=st.fixed_dictionaries(
        {
            "mode": st.sampled_from(MODES),
            "extended_thinking": st.booleans(),
            "thinking_depth": st.integers(1, 4),
            "reasoning_steps": st.integers(1, 4),
            "multi_path_exploration": st.integers(1, 4),
            "consistency_checks": st.integers(1, 4),
        }
    ),
    memory=st.fixed_dictionaries({"working_memory_size": st.integers(0, 8), "episodic_memory": st.booleans()}),
    safety=switches(SAFETY_CHECKS).flatmap(
        lambda on: st.sampled_from(SAFETY_LEVELS).map(lambda level: {**on, "safety_level": level})
    ),
    evaluation=switches(EVALUATION_CHECKS).flatmap(
        lambda on: st.tuples(st.integers(1, 4), st.floats(0, 1)).map(
            lambda pair: {**on, "verification_depth": pair[0], "confidence_threshold": pair[1]}
        )
    ),
)
capability_sets = st.sets(st.sampled_from(CAPABILITIES)).map(capability_set)


def enhance_in_turn(
    model: CosmosAdvancedModel, calls: list[tuple[Tensor, Tensor]], capabilities: tuple[str, ...]
) -> list[tuple[Tensor, Tensor | None, list[dict[str, Any]]]]:
    """Vectors (B, D), blocked (B,) and reports (B) of a sequence of calls, and checks what every call has to hold."""
    state: MemoryState | None = model.new_memory(len(calls[0][0])).state if "memory" in capabilities else None
    group, results = diagnostic_settings(model.config, capabilities), []
    for vectors, queries in calls:
        enhanced = model.enhance(vectors, queries, capabilities, state)
        state = enhanced.memory
        arrays = {name: tensor.numpy() for name, tensor in enhanced.scores.items()}
        reports = [nested_diagnostics(arrays, group, row) for row in range(len(vectors))]
        results.append((enhanced.vector, enhanced.blocked, reports))
    return results


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    config=configurations,
    capabilities=capability_sets,
    rows=st.integers(1, 3),
    length=st.integers(1, 9),
    seed=st.integers(0, 1000),
)
@torch.inference_mode()
def test_heads_are_what_the_reference_says(
    config: CosmosAdvancedConfig, capabilities: tuple[str, ...], rows: int, length: int, seed: int
) -> None:
    model = lively_model(config, seed=seed, capabilities=capabilities)
    state = model.state_dict()
    calls = [
        (random_vectors(rows, config.dim, seed + 2 * call), random_vectors(rows, config.dim, seed + 2 * call + 1))
        for call in range(length)
    ]
    banks = [plain_heads.Bank() for _ in range(rows)]
    for (vectors, queries), (given_vectors, blocked, reports) in zip(
        calls, enhance_in_turn(model, calls, capabilities), strict=True
    ):
        for row in range(rows):
            vector, report = plain_heads.enhance(state, config, vectors[row], queries[row], capabilities, banks[row])
            same_report(reports[row], report, tolerance=1e-9)
            assert (vector is None) == (blocked is not None and bool(blocked[row]))
            if vector is not None:
                torch.testing.assert_close(given_vectors[row], vector, rtol=1e-9, atol=1e-9)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(config=configurations, capabilities=capability_sets, rows=st.integers(1, 4))
@torch.inference_mode()
def test_score_tensors_are_the_declared_ones(
    config: CosmosAdvancedConfig, capabilities: tuple[str, ...], rows: int
) -> None:
    """Names, order, shapes and dtypes, of a float32 model; the declaration needs no model."""
    model = lively_model(config, capabilities=capabilities, dtype=torch.float32)
    vectors = random_vectors(rows, config.dim, 0).float()
    state = model.new_memory(rows).state if "memory" in capabilities else None
    scores = model.enhance(vectors, vectors, capabilities, state).scores
    declared = model_score_specs(config, capabilities)
    assert list(scores) == [spec.name for spec in declared]
    for spec in declared:
        assert tuple(scores[spec.name].shape) == (rows, *spec.shape), spec
        assert scores[spec.name].dtype == getattr(torch, spec.dtype), spec
    assert declared == score_specs(diagnostic_settings(config, capabilities))


@torch.inference_mode()
def test_a_row_of_a_batch_is_the_row_alone() -> None:
    """Also where rows decide differently: some blocked, some corrected, at different rounds."""
    model = lively_model(small_config(evaluation={"verification_depth": 4}), seed=3)
    calls = [(random_vectors(24, DIM, call), random_vectors(24, DIM, 100 + call)) for call in range(3)]
    together = enhance_in_turn(model, calls, CAPABILITIES)
    for row in range(24):
        alone = enhance_in_turn(model, [(v[row : row + 1], q[row : row + 1]) for v, q in calls], CAPABILITIES)
        for (vectors, _, reports), (vector, _, report) in zip(together, alone, strict=True):
            torch.testing.assert_close(vectors[row : row + 1], vector, rtol=1e-12, atol=1e-12)
            same_report(reports[row], report[0], tolerance=1e-12)
    blocked = [int(mask.sum()) for _, mask, _ in together if mask is not None]
    assert any(0 < count < 24 for count in blocked), "every row or none is blocked: this test cannot fail"


@torch.inference_mode()
def test_rows_leave_the_rounds_one_by_one() -> None:
    """The comparison with the plain heads sees every way to end: otherwise it would prove little."""
    model = lively_model(small_config(evaluation={"verification_depth": 4}), seed=1, capabilities=("evaluation",))
    ((_, _, reports),) = enhance_in_turn(
        model, [(random_vectors(400, DIM, 0), random_vectors(400, DIM, 1))], ("evaluation",)
    )
    evaluations = [report["evaluation"] for report in reports]
    assert {len(found["iterations"]) for found in evaluations} == {1, 2, 3, 4}
    assert {found["improvements_made"] for found in evaluations} >= {0, 1, 2, 3, 4}
    assert {found["final_assessment"]["ready_for_output"] for found in evaluations} == {True, False}


@torch.inference_mode()
def test_reduced_precision_scores_are_float32() -> None:
    """A threshold is compared in the precision in which the score is given out, whatever the model's."""
    model = lively_model(small_config(), dtype=torch.bfloat16)
    vectors = random_vectors(2, DIM, 0).bfloat16()
    enhanced = model.enhance(vectors, vectors, CAPABILITIES, model.new_memory(2).state)
    assert enhanced.vector.dtype == torch.bfloat16
    floats = {tensor.dtype for tensor in enhanced.scores.values() if tensor.is_floating_point()}
    assert floats == {torch.float32}


def test_capability_sets_are_ordered_and_checked() -> None:
    assert capability_set(["evaluation", "memory", "memory"]) == ("memory", "evaluation")
    assert capability_set("safety") == ("safety",)
    assert capability_set(()) == ()
    with pytest.raises(ConfigError, match=r"no capability 'planning'.*reasoning, memory, safety, evaluation"):
        capability_set(["planning"])
