"""Settings of the capability heads: what can be built, and what each message says."""

from typing import Any

import pytest

from cosmos_export.config import CosmosAdvancedConfig
from cosmos_export.errors import ConfigError
from cosmos_runtime import EVALUATION_CHECKS, SAFETY_CHECKS

COUNTS = [
    "reasoning.thinking_depth",
    "reasoning.reasoning_steps",
    "reasoning.multi_path_exploration",
    "reasoning.consistency_checks",
    "evaluation.verification_depth",
]
SWITCHES = [
    "reasoning.extended_thinking",
    "memory.episodic_memory",
    *(f"safety.{name}" for name in SAFETY_CHECKS),
    *(f"evaluation.{name}" for name in EVALUATION_CHECKS),
]


def with_setting(name: str, value: Any) -> CosmosAdvancedConfig:
    group, setting = name.split(".")
    return CosmosAdvancedConfig(**{group: {setting: value}})


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("value", [0, -1, True, 2.0, "2", None])
def test_a_count_must_be_a_positive_integer(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"{name} must be a positive integer, got {value!r}"):
        with_setting(name, value).validate()
    with_setting(name, 1).validate()


@pytest.mark.parametrize("name", SWITCHES)
@pytest.mark.parametrize("value", [0, 1, "true", None])
def test_a_switch_must_be_true_or_false(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"{name} must be true or false, got {value!r}"):
        with_setting(name, value).validate()
    with_setting(name, False).validate()


@pytest.mark.parametrize("value", ["none", "HIGH", "", None, 3, ["high"]])
def test_the_safety_level_must_be_a_known_one(value: Any) -> None:
    with pytest.raises(ConfigError, match="safety.safety_level must be one of low, medium, high, strict, got"):
        with_setting("safety.safety_level", value).validate()


@pytest.mark.parametrize("level", ["low", "medium", "high", "strict"])
def test_safety_levels(level: str) -> None:
    with_setting("safety.safety_level", level).validate()


@pytest.mark.parametrize("value", [-1, True, 2.5, "8", None])
def test_the_working_memory_must_have_a_size(value: Any) -> None:
    with pytest.raises(ConfigError, match="memory.working_memory_size must be an integer, 0 .* got"):
        with_setting("memory.working_memory_size", value).validate()
    with_setting("memory.working_memory_size", 0).validate()


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan"), True, "0.8", None])
def test_the_confidence_threshold_must_be_a_probability(value: Any) -> None:
    with pytest.raises(ConfigError, match="evaluation.confidence_threshold must be a number from 0 to 1, got"):
        with_setting("evaluation.confidence_threshold", value).validate()
    for limit in (0, 1, 0.8):
        with_setting("evaluation.confidence_threshold", limit).validate()


@pytest.mark.parametrize("mode", ["graph_of_thoughts", "deductive", "", "of my own"])
def test_an_unknown_reasoning_mode_is_direct_and_no_error(mode: str) -> None:
    with_setting("reasoning.mode", mode).validate()


@pytest.mark.parametrize("mode", [None, 3, ["chain_of_thought"]])
def test_a_reasoning_mode_must_be_a_name(mode: Any) -> None:
    with pytest.raises(ConfigError, match="reasoning.mode must be the name of a mode"):
        with_setting("reasoning.mode", mode).validate()


def test_all_problems_of_all_groups_are_listed() -> None:
    config = CosmosAdvancedConfig(
        reasoning={"reasoning_steps": 0}, safety={"safety_level": "x"}, evaluation={"self_correction": 1}, dim=0
    )
    with pytest.raises(ConfigError) as caught:
        config.validate()
    for part in ("dim must", "reasoning.reasoning_steps", "safety.safety_level", "evaluation.self_correction"):
        assert part in str(caught.value)


def test_settings_that_no_head_reads_are_not_checked() -> None:
    config = CosmosAdvancedConfig.from_dict(
        {"memory": {"retrieval_speed": 7}, "safety": {"harm_prevention_threshold": "x"}, "planning": None}
    )
    assert config.validate().memory.retrieval_speed == 7
