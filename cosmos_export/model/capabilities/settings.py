"""Which capabilities run, and what of the configuration their scores and reports follow from."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from cosmos_export.config import CosmosAdvancedConfig
from cosmos_export.errors import ConfigError
from cosmos_runtime import CAPABILITIES, EVALUATION_CHECKS, SAFETY_CHECKS, ScoreSpec, score_specs


def capability_set(names: Iterable[str]) -> tuple[str, ...]:
    """The capabilities of these names, in the order in which they run, each once.

    Raises ConfigError for a name that is none.
    """
    names = (names,) if isinstance(names, str) else tuple(names)
    for name in names:
        if name not in CAPABILITIES:
            raise ConfigError(f"no capability {name!r}; there is: {', '.join(CAPABILITIES)}")
    return tuple(name for name in CAPABILITIES if name in names)


def diagnostic_settings(config: CosmosAdvancedConfig, capabilities: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Settings of score tensors and reports (`cosmos_runtime.scores` has their form): plain values, ready for JSON."""
    safety, evaluation = config.safety, config.evaluation
    groups: dict[str, dict[str, Any]] = {
        "reasoning": {
            "mode": config.reasoning.mode,
            "extended": config.reasoning.extended_thinking,
            "thoughts": config.reasoning.reasoning_steps,
            "branches": config.reasoning.multi_path_exploration,
        },
        "memory": {"episodes": config.memory.episodic_memory},
        "safety": {"level": safety.safety_level, "checks": [c for c in SAFETY_CHECKS if getattr(safety, c)]},
        "evaluation": {
            "rounds": evaluation.verification_depth,
            "checks": [c for c in EVALUATION_CHECKS if getattr(evaluation, c)],
            "confidence_threshold": evaluation.confidence_threshold,
        },
    }
    return {name: groups[name] for name in capability_set(capabilities)}


def model_score_specs(config: CosmosAdvancedConfig, capabilities: Iterable[str]) -> tuple[ScoreSpec, ...]:
    """Every score tensor of a model of this configuration with these capabilities, in the order of its heads."""
    return score_specs(diagnostic_settings(config, capabilities))
