"""What of a configuration cannot be built: types, bounds, and settings that contradict each other.

The bounds are far beyond any model that was published: a size past one of them is a slip or an attack, and is named
before anything is allocated for it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from cosmos_runtime import (
    EVALUATION_CHECKS,
    LARGEST_MEMORY,
    LARGEST_VOCABULARY,
    LONGEST_SEQUENCE,
    MOST_MODULES,
    SAFETY_CHECKS,
    SAFETY_LEVELS,
    quoted,
    strict_json,
)

if TYPE_CHECKING:
    from cosmos_export.config import CosmosAdvancedConfig

# The sizes that make a model's shape, and the largest of each.
_LARGEST = {
    "dim": 2**16,
    "n_layers": 2**10,
    "n_heads": 2**10,
    "n_kv_heads": 2**10,
    "head_dim": 2**10,
    "hidden_dim": 2**20,
    "vocab_size": LARGEST_VOCABULARY,
    "max_sequence_length": LONGEST_SEQUENCE,
}
GEOMETRY = tuple(_LARGEST)
_MOST_PARAMETERS = 10**12
# A rotary table has this many angles at most: each is computed in float64, a gigabyte for all of them.
_MOST_ANGLES = 2**27
# Norms and rotary frequencies are float32 arithmetic, which has room for these and their inverses.
_SMALLEST_FLOAT, _LARGEST_FLOAT = 1e-30, 1e30

# What the capability heads are built from and read; a group's other settings are only carried.
_COUNTS = {
    "reasoning": ("thinking_depth", "reasoning_steps", "multi_path_exploration", "consistency_checks"),
    "evaluation": ("verification_depth",),
}
_SWITCHES = {
    "reasoning": ("extended_thinking",),
    "memory": ("episodic_memory",),
    "safety": SAFETY_CHECKS,
    "evaluation": EVALUATION_CHECKS,
}
_LONGEST_ANSWER = 2**31 - 1


def problems_of(config: CosmosAdvancedConfig) -> Iterator[str]:
    """Every problem: the name, what is expected, what was given."""
    sizes = list(_size_problems(config))
    yield from sizes
    yield from _number_problems(config)
    yield from _head_problems(config)
    if not sizes:
        yield from _product_problems(config)
    yield from _capability_problems(config)
    yield from _generation_problems(config)


def _size_problems(config: CosmosAdvancedConfig) -> Iterator[str]:
    for name, largest in _LARGEST.items():
        value = getattr(config, name)
        if not _is_integer(value) or value < 1:
            yield f"{name} must be a positive integer, got {quoted(value)}"
        elif value > largest:
            yield f"{name} must be at most {largest}, got {quoted(value)}"


def _number_problems(config: CosmosAdvancedConfig) -> Iterator[str]:
    for name in ("norm_eps", "rope_theta"):
        value = getattr(config, name)
        if not _is_number(value) or not 0 < value < float("inf"):
            yield f"{name} must be a positive finite number, got {quoted(value)}"
        elif not _SMALLEST_FLOAT <= value <= _LARGEST_FLOAT:
            yield f"{name} must be from {_SMALLEST_FLOAT} to {_LARGEST_FLOAT}, got {quoted(value)}"
    for name in ("dropout", "activation_dropout", "attention_dropout"):
        value = getattr(config, name)
        if not _is_number(value) or not 0 <= value < 1:
            yield f"{name} must be a probability in [0, 1), got {quoted(value)}"


def _head_problems(config: CosmosAdvancedConfig) -> Iterator[str]:
    heads, kv_heads, width = config.n_heads, config.n_kv_heads, config.head_dim
    if all(_is_integer(n) and n > 0 for n in (heads, kv_heads)) and heads % kv_heads:
        yield f"n_heads must be a multiple of n_kv_heads, got n_heads {quoted(heads)} and n_kv_heads {quoted(kv_heads)}"
    if _is_integer(width) and width > 0 and width % 2:
        yield f"head_dim must be even (rotary embedding turns pairs of channels), got {quoted(width)}"


def _product_problems(config: CosmosAdvancedConfig) -> Iterator[str]:
    """Sizes that are each within bounds, and too much together."""
    angles = config.max_sequence_length * config.head_dim // 2
    if angles > _MOST_ANGLES:
        yield (
            f"max_sequence_length {config.max_sequence_length} times head_dim {config.head_dim} / 2 is a rotary table "
            f"of {angles} angles, expected at most {_MOST_ANGLES}"
        )
    parameters = decoder_parameters(config)
    if parameters > _MOST_PARAMETERS:
        yield f"these sizes make a decoder of {parameters:.2g} parameters, expected at most {_MOST_PARAMETERS:.0e}"


def decoder_parameters(config: CosmosAdvancedConfig) -> int:
    """Parameters of the plain decoder, the tied embedding counted once, by arithmetic alone."""
    queries, keys = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    attention = 2 * config.dim * (queries + keys)
    layer = attention + 3 * config.dim * config.hidden_dim + 2 * config.dim
    return config.vocab_size * config.dim + config.n_layers * layer + config.dim


def _capability_problems(config: CosmosAdvancedConfig) -> Iterator[str]:
    for name, value in _settings_of(config, _COUNTS):
        if not _is_integer(value) or value < 1:
            yield f"{name} must be a positive integer, got {quoted(value)}"
        elif value > MOST_MODULES:
            yield f"{name} must be at most {MOST_MODULES}, got {quoted(value)}"
    for name, value in _settings_of(config, _SWITCHES):
        if not isinstance(value, bool):
            yield f"{name} must be true or false, got {quoted(value)}"
    mode: Any = config.reasoning.mode
    if not isinstance(mode, str):
        yield f"reasoning.mode must be the name of a mode, got {quoted(mode)}"
    level: Any = config.safety.safety_level
    if not isinstance(level, str) or level not in SAFETY_LEVELS:
        yield f"safety.safety_level must be one of {', '.join(SAFETY_LEVELS)}, got {quoted(level)}"
    size, threshold = config.memory.working_memory_size, config.evaluation.confidence_threshold
    if not _is_integer(size) or size < 0:
        yield f"memory.working_memory_size must be an integer, 0 (none) or more, got {quoted(size)}"
    elif size > LARGEST_MEMORY:
        yield f"memory.working_memory_size must be at most {LARGEST_MEMORY}, got {quoted(size)}"
    if not _is_number(threshold) or not 0 <= threshold <= 1:
        yield f"evaluation.confidence_threshold must be a number from 0 to 1, got {quoted(threshold)}"


def _generation_problems(config: CosmosAdvancedConfig) -> Iterator[str]:
    """A bundle's manifest carries this group to the runtime, which would refuse the bundle for what is wrong here."""
    settings: Any = config.generation
    for name in ("max_tokens", "min_tokens"):
        value = getattr(settings, name)
        if not _is_integer(value) or not 0 <= value <= _LONGEST_ANSWER:
            yield f"generation.{name} must be an integer from 0 to {_LONGEST_ANSWER}, got {quoted(value)}"
    stops: Any = settings.stop_sequences
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        yield f"generation.stop_sequences must be a list of strings, got {quoted(stops)}"
    stop_ids, vocab_size = settings.extra.get("stop_ids", []), config.vocab_size
    if _is_integer(vocab_size) and not _are_ids(stop_ids, vocab_size):
        yield f"generation.stop_ids must be token ids from 0 to {quoted(vocab_size - 1)}, got {quoted(stop_ids)}"
    yield from _sampling_problems(settings)
    try:
        strict_json(json.dumps(settings.extra))
    except (TypeError, ValueError, RecursionError) as error:
        yield f"generation must hold plain JSON values: {error}"


def _sampling_problems(settings: Any) -> Iterator[str]:
    from cosmos_runtime import InputError, Sampling  # numpy, which a configuration alone does without

    for name in ("temperature", "top_p", "top_k", "repetition_penalty"):
        try:
            Sampling(**{name: getattr(settings, name)})
        except InputError as error:
            yield f"generation.{error}"


def _are_ids(values: Any, vocab_size: int) -> bool:
    return isinstance(values, list) and all(_is_integer(value) and 0 <= value < vocab_size for value in values)


def _settings_of(config: CosmosAdvancedConfig, names: dict[str, tuple[str, ...]]) -> Iterator[tuple[str, Any]]:
    """Full names of these settings of groups, and what they are set to."""
    for group, settings in names.items():
        for setting in settings:
            yield f"{group}.{setting}", getattr(getattr(config, group), setting)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
