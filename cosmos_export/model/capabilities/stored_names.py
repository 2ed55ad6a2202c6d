"""Names in a published checkpoint that no forward pass reads, and the module of each capability."""

from __future__ import annotations

from collections.abc import Collection, Iterable

# The module of a model that a capability is.
MODULES = {
    "reasoning": "reasoning_engine",
    "memory": "memory_system",
    "safety": "safety_system",
    "evaluation": "evaluation_system",
}

# Every model with heads has one, whichever of them it has.
FUSION = "capability_fusion"

UNUSED_PREFIXES = (
    "learning_engine.",  # 2.1 billion parameters at dim 1024, for examples that no call gives
    "reasoning_engine.mode_selector.",
    "reasoning_engine.tot.selector.",
    "reasoning_engine.reflexion.corrector.",
    "reasoning_engine.reflexion.reflection_norm.",
    "reasoning_engine.analogical.",
    "memory_system.episodic_memory.",
    "memory_system.consolidation.",
    "safety_system.hallucination_detector.consistency_checker.",
    "evaluation_system.answer_verifier.consistency_checker.",
    "evaluation_system.factuality_checker.claim_extractor.",
)


def ignored_prefixes(capabilities: Collection[str]) -> tuple[str, ...]:
    """What the names of tensors start with that a model of these capabilities has no use for."""
    return (*UNUSED_PREFIXES, *(f"{module}." for name, module in MODULES.items() if name not in capabilities))


def is_of_heads(name: str) -> bool:
    """Whether a tensor belongs to a capability head or to the fusion."""
    return name.startswith(tuple(f"{module}." for module in (FUSION, *MODULES.values())))


def has_heads(names: Iterable[str]) -> bool:
    """Whether a checkpoint with tensors of these names has capability heads."""
    return any(map(is_of_heads, names))
