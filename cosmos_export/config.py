"""`CosmosAdvancedConfig`: the model's public configuration (cosmos_reference, section 1).

Fields are assignable at any time and are checked together when a model is built (`validate`). A saved config.json
has many keys that no forward pass reads (`planning`, `persona`, `lora_rank`, ...): they are carried, not interpreted,
and come out of `to_dict` as they went in, in their places.
"""

from __future__ import annotations

import copy
import difflib
import json
from collections.abc import Collection
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Self

from cosmos_export.config_checks import GEOMETRY as GEOMETRY
from cosmos_export.config_checks import problems_of
from cosmos_export.errors import ConfigError
from cosmos_export.small_files import read_small_text
from cosmos_runtime import quoted, strict_json

# Names that a published config.json holds and no forward pass reads. The constructor takes them, so that
# `CosmosAdvancedConfig(**json.load(f))` works, while a misspelt field is still an error.
CARRIED_NAMES = frozenset(
    {"window_size", "gradient_checkpointing", "lora_rank", "diffusion", "latent_dim"}
    | {"planning", "creativity", "search", "communication", "persona", "performance"}
    | {"integration", "analysis", "language", "education", "monitoring"}
)
RENAMED = {"max_seq_length": "max_sequence_length"}
# How alike two names are (`difflib`, 1 for equal) where one is taken for the other misspelt. No two in a group of a
# published config.json are that much alike.
_MISSPELT = 0.85
# Published files have fewer than 100 settings in a group and 10 kB in all; what is far beyond is something else.
_MOST_SETTINGS = 1000
_LARGEST_FILE = 1 << 20


class _RenamedSettingError(ConfigError, AttributeError):
    """Reading a name that was replaced: a ConfigError to the user, and "no such attribute" to hasattr."""


@dataclass
class _Section:
    """A group of settings with known fields; other keys of the same group are carried in `extra`."""

    extra: dict[str, Any] = field(default_factory=dict, repr=False, kw_only=True)

    @classmethod
    def known_names(cls) -> tuple[str, ...]:
        return tuple(f.name for f in fields(cls) if f.name != "extra")

    @classmethod
    def from_dict(cls, group: str, values: Any) -> Self:
        if not isinstance(values, dict):
            raise ConfigError(f"config group {group!r}: expected an object of settings, got {quoted(values)}")
        _refuse_misspelt(values, cls.known_names(), prefix=f"{group}.")
        known = {k: v for k, v in values.items() if k in cls.known_names()}
        return cls(**known, extra={k: copy.deepcopy(v) for k, v in values.items() if k not in known})

    def to_dict(self) -> dict[str, Any]:
        return {**{n: copy.deepcopy(getattr(self, n)) for n in self.known_names()}, **copy.deepcopy(self.extra)}

    def __setattr__(self, name: str, value: Any) -> None:
        _assign(self, name, value, (*self.known_names(), "extra"))

    def __getattr__(self, name: str) -> Any:
        return _carried_value(self, name)


@dataclass
class ReasoningConfig(_Section):
    """Which reasoning head runs, and its widths. Any unknown `mode` means "Direct": the head returns its input."""

    mode: str = "chain_of_thought"
    thinking_depth: int = 3
    reasoning_steps: int = 5
    extended_thinking: bool = False
    multi_path_exploration: int = 3
    consistency_checks: int = 3


@dataclass
class MemoryConfig(_Section):
    """Capacity of the working-memory bank, in entries, and whether episodes are kept."""

    working_memory_size: int = 2048
    episodic_memory: bool = True


@dataclass
class SafetyConfig(_Section):
    """Safety level (high and strict block unsafe rows) and a switch for each of the checks."""

    safety_level: str = "high"
    content_filtering: bool = True
    toxicity_detection: bool = True
    bias_mitigation: bool = True
    privacy_protection: bool = True
    adversarial_defense: bool = True
    jailbreak_prevention: bool = True
    ethical_guidelines: bool = True


@dataclass
class EvaluationConfig(_Section):
    """Self-evaluation: its switches, rounds and the confidence that an answer must reach."""

    self_correction: bool = True
    confidence_estimation: bool = True
    answer_verification: bool = True
    quality_scoring: bool = True
    verification_depth: int = 2
    confidence_threshold: float = 0.8


@dataclass
class GenerationConfig(_Section):
    """Sampling defaults; a bundle's manifest carries them to the runtime."""

    temperature: float = 0.7
    top_p: float = 0.9
    top_k: int = 50
    repetition_penalty: float = 1.1
    max_tokens: int = 2048
    min_tokens: int = 10
    stop_sequences: list[str] = field(default_factory=list)


@dataclass
class LearningConfig(_Section):
    """Settings of the learning engine, which no forward pass runs without examples."""

    mode: str = "in_context"


SECTIONS: dict[str, type[_Section]] = {
    "reasoning": ReasoningConfig,
    "memory": MemoryConfig,
    "safety": SafetyConfig,
    "evaluation": EvaluationConfig,
    "generation": GenerationConfig,
    "learning": LearningConfig,
}


@dataclass(init=False)
class CosmosAdvancedConfig:
    """Geometry and settings of a Cosmos Advanced model; names and defaults as published.

    `head_dim` is independent of `dim / n_heads`. A group may be given as an object or as a dict.
    Raises ConfigError for a name that does not exist (with the nearest one that does).
    """

    dim: int = 1024
    n_layers: int = 8
    head_dim: int = 128
    hidden_dim: int = 4096
    n_heads: int = 16
    n_kv_heads: int = 4
    norm_eps: float = 1e-5
    vocab_size: int = 32000
    rope_theta: float = 10000.0
    max_sequence_length: int = 8192
    dropout: float = 0.1
    activation_dropout: float = 0.0
    attention_dropout: float = 0.0
    reasoning: ReasoningConfig = field(default_factory=ReasoningConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    safety: SafetyConfig = field(default_factory=SafetyConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    learning: LearningConfig = field(default_factory=LearningConfig)
    extra: dict[str, Any] = field(default_factory=dict, repr=False)

    _key_order: ClassVar[tuple[str, ...]] = ()

    def __init__(self, **settings: Any) -> None:
        self._build(settings, carried=settings.pop("extra", {}), accepted=CARRIED_NAMES)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The configuration that a config.json's object describes; keys that are not known are carried in `extra`.

        Raises ConfigError for a key that looks like a setting which is not there, misspelt.
        """
        if not isinstance(values, dict):
            raise ConfigError(f"a model configuration must be a JSON object, got {type(values).__name__}")
        _refuse_misspelt(values, tuple(n for n in _public_names() if n != "extra"))
        config = cls.__new__(cls)
        config._build(values, carried={}, accepted=values.keys())
        # Saved files keep the order of the file they came from: a diff then shows what changed and no more.
        object.__setattr__(config, "_key_order", tuple(values))
        return config

    @classmethod
    def from_file(cls, path: str | Path) -> Self:
        """Reads a config.json. Raises ConfigError when it is missing, is not JSON, or uses a name that was replaced.

        NaN and Infinity, which Python writes and JSON has not, are read: carried settings may hold them.
        """
        path = Path(path)
        try:
            values = strict_json(read_small_text(path, _LARGEST_FILE), allow_nan=True)
        except FileNotFoundError:
            raise ConfigError(f"no model configuration at {path}: expected a config.json") from None
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path} cannot be read as a JSON model configuration: {error}") from None
        try:
            return cls.from_dict(values)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """Every setting as plain JSON values, carried keys included, in the order of the file it came from."""
        values = {n: getattr(self, n) for n in _scalar_names()}
        values |= {n: getattr(self, n).to_dict() for n in SECTIONS}
        values |= copy.deepcopy(self.extra)
        ordered = [k for k in self._key_order if k in values]
        return {k: values[k] for k in (*ordered, *(k for k in values if k not in ordered))}

    def save(self, path: str | Path) -> None:
        """Writes `to_dict` as UTF-8 JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    def validate(self) -> Self:
        """Checks the whole configuration at once and returns it.

        Raises ConfigError that lists every problem: the name, what is expected, what was given.
        """
        problems = list(problems_of(self))
        if problems:
            raise ConfigError("this configuration cannot be built: " + "; ".join(problems))
        return self

    @property
    def queries_per_kv_head(self) -> int:
        """Query heads that read one key/value head (the group size of grouped-query attention)."""
        return self.n_heads // self.n_kv_heads

    def __setattr__(self, name: str, value: Any) -> None:
        if name in RENAMED:
            raise ConfigError(f"{name!r} was replaced: use {RENAMED[name]!r}")
        if name in SECTIONS and not isinstance(value, SECTIONS[name]):
            value = SECTIONS[name].from_dict(name, value)
        _assign(self, name, value, _public_names())

    def __getattr__(self, name: str) -> Any:
        if name in RENAMED:
            raise _RenamedSettingError(f"{name!r} was replaced: use {RENAMED[name]!r}")
        return _carried_value(self, name)

    def _build(self, settings: dict[str, Any], carried: dict[str, Any], accepted: Collection[str]) -> None:
        object.__setattr__(self, "extra", copy.deepcopy(carried))
        for name in _scalar_names():
            setattr(self, name, settings.get(name, getattr(type(self), name)))
        for name, section in SECTIONS.items():
            setattr(self, name, settings.get(name, section()))
        for name in settings.keys() - {*_scalar_names(), *SECTIONS}:
            if name in RENAMED or name not in accepted:
                setattr(self, name, settings[name])  # raises, and names the field that was meant
            self.extra[name] = copy.deepcopy(settings[name])


def _scalar_names() -> tuple[str, ...]:
    return tuple(n for n in _public_names() if n not in SECTIONS and n != "extra")


def _public_names() -> tuple[str, ...]:
    return tuple(f.name for f in fields(CosmosAdvancedConfig))


def _assign(owner: Any, name: str, value: Any, known: tuple[str, ...]) -> None:
    """Sets a known field or a carried key; a misspelt name would otherwise be stored and silently do nothing."""
    carried = owner.__dict__.get("extra", {})
    if name in known:
        object.__setattr__(owner, name, value)
    elif name in carried:
        carried[name] = value
    else:
        nearest = difflib.get_close_matches(name, known, n=1)
        names = ", ".join(n for n in known if n != "extra")
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"known names: {names}"
        raise ConfigError(f"{type(owner).__name__} has no setting {quoted(name)}; {hint}")


def _refuse_misspelt(values: Collection[Any], known: tuple[str, ...], prefix: str = "") -> None:
    """Raises ConfigError for a key that is nearly a known name which is missing: carried, it would do nothing.

    Other keys that are not known are someone's own, and where both names are there the misspelt one is, too.
    """
    if len(values) > _MOST_SETTINGS:
        raise ConfigError(
            f"{prefix or 'this configuration'}: {len(values)} settings, expected at most {_MOST_SETTINGS}"
        )
    missing = [name for name in known if name not in values]
    for name in values:
        if isinstance(name, str) and name not in known and name not in RENAMED:
            for meant in difflib.get_close_matches(name.lower(), missing, n=1, cutoff=_MISSPELT):
                raise ConfigError(f"no setting {quoted(prefix + name)}; did you mean {prefix + meant!r}?")


def _carried_value(owner: Any, name: str) -> Any:
    """Attribute access to a carried key (`config.window_size`); __getattr__ runs only when no field has that name."""
    extra = owner.__dict__.get("extra", {})
    if name in extra:
        return extra[name]
    raise AttributeError(f"{type(owner).__name__} has no setting {name!r}")
