"""The configuration: published names and defaults, carried keys, and refusals that name the cure."""

import copy
import difflib
import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cosmos_export.config import (
    SECTIONS,
    CosmosAdvancedConfig,
    MemoryConfig,
    ReasoningConfig,
    SafetyConfig,
)
from cosmos_export.errors import ConfigError
from cosmos_export.model import CosmosDecoder
from cosmos_export.resources import demo_checkpoint, preset_names, preset_path

PUBLISHED = {
    "dim": 1024,
    "n_layers": 8,
    "head_dim": 128,
    "hidden_dim": 4096,
    "n_heads": 16,
    "n_kv_heads": 4,
    "norm_eps": 1e-5,
    "vocab_size": 32000,
    "rope_theta": 10000.0,
    "max_sequence_length": 8192,
    "dropout": 0.1,
    "activation_dropout": 0.0,
    "attention_dropout": 0.0,
}
PUBLISHED_GROUPS = {
    "reasoning": {
        "thinking_depth": 3,
        "reasoning_steps": 5,
        "extended_thinking": False,
        "multi_path_exploration": 3,
        "consistency_checks": 3,
    },
    "memory": {"working_memory_size": 2048, "episodic_memory": True},
    "safety": {
        "safety_level": "high",
        "content_filtering": True,
        "toxicity_detection": True,
        "bias_mitigation": True,
        "privacy_protection": True,
        "adversarial_defense": True,
        "jailbreak_prevention": True,
        "ethical_guidelines": True,
    },
    "evaluation": {
        "self_correction": True,
        "confidence_estimation": True,
        "answer_verification": True,
        "quality_scoring": True,
        "verification_depth": 2,
        "confidence_threshold": 0.8,
    },
    "generation": {"temperature": 0.7, "top_p": 0.9, "top_k": 50, "repetition_penalty": 1.1, "max_tokens": 2048},
    "learning": {},
}


def canonical(values: Any) -> str:
    return json.dumps(values, sort_keys=True)


def test_defaults_are_the_published_ones() -> None:
    config = CosmosAdvancedConfig()
    assert {name: getattr(config, name) for name in PUBLISHED} == PUBLISHED
    for group, settings in PUBLISHED_GROUPS.items():
        assert {name: getattr(getattr(config, group), name) for name in settings} == settings


def test_to_dict_names_every_published_setting() -> None:
    values = CosmosAdvancedConfig().to_dict()
    assert set(values) == {*PUBLISHED, *PUBLISHED_GROUPS}
    assert all(set(settings) <= set(values[group]) for group, settings in PUBLISHED_GROUPS.items())


def test_keywords_replace_defaults() -> None:
    config = CosmosAdvancedConfig(dim=256, n_heads=8, n_kv_heads=8, vocab_size=1000)
    assert {name: getattr(config, name) for name in PUBLISHED} == {
        **PUBLISHED,
        "dim": 256,
        "n_heads": 8,
        "n_kv_heads": 8,
        "vocab_size": 1000,
    }


def test_fields_are_assignable() -> None:
    config = CosmosAdvancedConfig()
    config.n_heads = 32
    config.n_kv_heads = 8
    assert (config.n_heads, config.n_kv_heads, config.queries_per_kv_head) == (32, 8, 4)
    assert config == CosmosAdvancedConfig(n_heads=32, n_kv_heads=8)
    assert CosmosAdvancedConfig().n_heads == 16


def _assign_old_name(config: CosmosAdvancedConfig) -> None:
    config.max_seq_length = 512


@pytest.mark.parametrize(
    "use",
    [
        lambda: CosmosAdvancedConfig(max_seq_length=512),
        lambda: CosmosAdvancedConfig.from_dict({"max_seq_length": 512}),
        lambda: CosmosAdvancedConfig.from_dict({"max_sequence_length": 512, "max_seq_length": 512}),
        lambda: _assign_old_name(CosmosAdvancedConfig()),
        lambda: CosmosAdvancedConfig().max_seq_length,
    ],
    ids=["constructor", "from_dict", "from_dict beside the new name", "assignment", "read"],
)
def test_the_old_length_name_is_refused_with_the_new_one(use: Callable[[], Any]) -> None:
    with pytest.raises(ConfigError, match=r"max_seq_length.*max_sequence_length"):
        use()


def test_the_old_name_in_a_file_names_the_file_too(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"max_seq_length": 4}')
    with pytest.raises(ConfigError, match="max_sequence_length") as caught:
        CosmosAdvancedConfig.from_file(path)
    assert str(path) in str(caught.value)


def test_a_misspelt_keyword_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match=r"'n_head'.*'n_heads'"):
        CosmosAdvancedConfig(n_head=4)


def test_a_misspelt_assignment_is_refused_with_the_nearest_name() -> None:
    config = CosmosAdvancedConfig()
    with pytest.raises(ConfigError, match=r"'vocab_sise'.*'vocab_size'"):
        config.vocab_sise = 5
    with pytest.raises(ConfigError, match=r"'thinking_dept'.*'thinking_depth'"):
        config.reasoning.thinking_dept = 5


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"safety": {"safty_level": "low"}}, r"no setting 'safety.safty_level'; did you mean 'safety.safety_level'"),
        ({"safety": {"content_filterng": False, "mine": 1}}, r"'safety.content_filterng'.*'safety.content_filtering'"),
        ({"reasoning": {"Mode": "reflexion"}}, r"'reasoning.Mode'.*'reasoning.mode'"),
        ({"generation": {"temprature": 0.1}}, r"'generation.temprature'.*'generation.temperature'"),
        ({"memory": {"working_memory_sise": 1}}, r"'memory.working_memory_sise'.*'memory.working_memory_size'"),
    ],
)
@pytest.mark.parametrize("build", [CosmosAdvancedConfig.from_dict, lambda values: CosmosAdvancedConfig(**values)])
def test_a_misspelt_setting_of_a_group_is_refused(
    build: Callable[[dict[str, Any]], Any], values: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        build(values)


def test_a_misspelt_setting_is_refused_when_a_group_is_assigned() -> None:
    config = CosmosAdvancedConfig()
    with pytest.raises(ConfigError, match=r"'safety\.safty_level'.*'safety\.safety_level'"):
        config.safety = {"safty_level": "low"}


def test_a_misspelt_name_in_a_file_is_refused_with_the_file(tmp_path: Path) -> None:
    for values, meant in [({"n_head": 4}, "'n_heads'"), ({"safty": {"safety_level": "low"}}, "'safety'")]:
        (tmp_path / "config.json").write_text(json.dumps(values))
        with pytest.raises(ConfigError, match=meant) as caught:
            CosmosAdvancedConfig.from_file(tmp_path / "config.json")
        assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("group", SECTIONS)
def test_a_name_beside_the_one_it_resembles_is_carried(group: str) -> None:
    """As whoever wrote it knows both; and a file that this version saved loads whatever else is in it."""
    known = SECTIONS[group]().to_dict()
    values = known | {f"{name}_": 1 for name in known}
    config = CosmosAdvancedConfig.from_dict({group: values, "dims": 1, "dim": 64})
    assert config.to_dict()[group] == values
    assert config.dims == 1


def test_published_names_are_not_taken_for_each_other(oracle: Path) -> None:
    """Any part of a published file loads, whichever settings are left out."""
    published = json.loads((oracle / "config.json").read_text(encoding="utf-8"))
    for name, value in published.items():
        assert canonical(CosmosAdvancedConfig.from_dict({name: value}).to_dict()[name]) == canonical(value)
        for key in value if isinstance(value, dict) else ():
            assert CosmosAdvancedConfig.from_dict({name: {key: value[key]}}).to_dict()[name][key] == value[key]


def test_a_name_that_resembles_nothing_is_refused_with_all_names() -> None:
    with pytest.raises(ConfigError) as caught:
        CosmosAdvancedConfig(zzzz=1)
    assert all(name in str(caught.value) for name in PUBLISHED)


def test_a_name_that_does_not_exist_cannot_be_read() -> None:
    with pytest.raises(AttributeError, match="no_such_setting"):
        _ = CosmosAdvancedConfig().no_such_setting
    with pytest.raises(AttributeError, match="no_such_setting"):
        _ = CosmosAdvancedConfig().safety.no_such_setting


def test_groups_may_be_dicts_or_objects() -> None:
    settings = {"mode": "reflexion", "thinking_depth": 7}
    expected = ReasoningConfig(mode="reflexion", thinking_depth=7)
    assigned = CosmosAdvancedConfig()
    assigned.reasoning = settings
    for config in (CosmosAdvancedConfig(reasoning=settings), CosmosAdvancedConfig(reasoning=expected), assigned):
        assert isinstance(config.reasoning, ReasoningConfig)
        assert config.reasoning == expected
        assert config.reasoning.reasoning_steps == 5


@pytest.mark.parametrize("value", [None, "high", 3, ["mode"]])
def test_a_group_that_is_no_object_is_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"safety.*expected"):
        CosmosAdvancedConfig.from_dict({"safety": value})


def test_groups_are_not_shared_between_configurations() -> None:
    first, second = CosmosAdvancedConfig(), CosmosAdvancedConfig()
    first.memory.working_memory_size = 1
    first.generation.stop_sequences.append("x")
    assert second.memory == MemoryConfig()
    assert second.generation.stop_sequences == []


def test_the_caller_keeps_its_dict() -> None:
    values = {"persona": {"tone": ["kind"]}, "safety": {"mine": [1]}}
    before = copy.deepcopy(values)
    config = CosmosAdvancedConfig.from_dict(values)
    config.persona["tone"].append("changed")
    config.safety.mine.append(2)
    config.to_dict()["persona"]["tone"].append("changed too")
    assert values == before
    assert config.to_dict()["persona"] == {"tone": ["kind", "changed"]}


def test_carried_keys_come_out_as_they_went_in() -> None:
    values = {
        "zebra": None,
        "vocab_size": 96,
        "planning": {"a": [1, {"b": 2.5}]},
        "reasoning": {"scratchpad_enabled": True, "mode": "reflexion"},
        "window_size": 4096,
        "dim": 64,
        "عربي": "نص",
    }
    result = CosmosAdvancedConfig.from_dict(values).to_dict()
    assert list(result)[: len(values)] == list(values)
    assert {k: result[k] for k in values if k != "reasoning"} == {k: v for k, v in values.items() if k != "reasoning"}
    assert result["reasoning"] == {**ReasoningConfig().to_dict(), **values["reasoning"]}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


def _is_foreign(key: str) -> bool:
    """Whether no setting could be meant by it: near misses are refused, and have tests of their own."""
    return not difflib.get_close_matches(key.lower(), [*PUBLISHED, *SECTIONS], cutoff=0.85)


@given(st.dictionaries(st.text(max_size=6).filter(_is_foreign), JSON, max_size=4))
def test_any_foreign_key_is_carried(values: dict[str, Any]) -> None:
    result = CosmosAdvancedConfig.from_dict(values).to_dict()
    assert list(result)[: len(values)] == list(values)
    assert {k: result[k] for k in values} == values
    assert CosmosAdvancedConfig.from_dict(result).to_dict() == result


@pytest.mark.parametrize("key", ["extra", "_key_order", "to_dict", "validate", "__class__", "queries_per_kv_head"])
@pytest.mark.parametrize("value", [{"a": 1}, 5])
def test_foreign_keys_named_like_a_member_are_carried_too(key: str, value: Any) -> None:
    result = CosmosAdvancedConfig.from_dict({key: value, "dim": 64}).to_dict()
    assert result[key] == value
    assert list(result)[:2] == [key, "dim"]
    assert result.keys() - {key} == CosmosAdvancedConfig().to_dict().keys()


def test_save_and_from_file_round_trip(tmp_path: Path) -> None:
    values = {"persona": {"name": "عربي"}, "dim": 64, "safety": {"safety_level": "low", "mine": 1}}
    config = CosmosAdvancedConfig.from_dict(values)
    config.save(tmp_path / "config.json")
    again = CosmosAdvancedConfig.from_file(tmp_path / "config.json")
    assert again == config
    assert list(again.to_dict()) == list(config.to_dict())
    assert "عربي" in (tmp_path / "config.json").read_text(encoding="utf-8")


def test_the_published_file_survives_load_and_save(oracle: Path, tmp_path: Path) -> None:
    published = json.loads((oracle / "config.json").read_text(encoding="utf-8"))
    CosmosAdvancedConfig.from_file(oracle / "config.json").save(tmp_path / "config.json")
    saved = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert canonical(saved) == canonical(published)
    assert list(saved) == list(published)


def test_the_published_file_is_accepted_as_keywords(oracle: Path) -> None:
    published = json.loads((oracle / "config.json").read_text(encoding="utf-8"))
    config = CosmosAdvancedConfig(**published)
    assert canonical(config.to_dict()) == canonical(published)
    assert config.n_heads == published["n_heads"]
    assert config.window_size == published["window_size"]
    assert config.reasoning.internal_monologue is True


def test_assigned_carried_values_are_saved(tmp_path: Path) -> None:
    config = CosmosAdvancedConfig.from_dict({"window_size": 1, "safety": {"mine": 1}})
    config.window_size = 2
    config.safety.mine = 3
    config.safety.safety_level = "low"
    config.save(tmp_path / "config.json")
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["window_size"] == 2
    assert saved["safety"] == {**SafetyConfig().to_dict(), "mine": 3, "safety_level": "low"}


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "no model configuration"), ("{", "JSON"), ("[1]", "JSON object"), (b"\xff\xfe{", "JSON")],
    ids=["missing", "not JSON", "not an object", "not UTF-8"],
)
def test_a_file_that_is_no_configuration_is_refused(tmp_path: Path, content: str | bytes | None, words: str) -> None:
    path = tmp_path / "config.json"
    if content is not None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ConfigError, match=words) as caught:
        CosmosAdvancedConfig.from_file(path)
    assert str(path) in str(caught.value)


SIZES = ["dim", "n_layers", "head_dim", "hidden_dim", "n_heads", "n_kv_heads", "vocab_size", "max_sequence_length"]


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("value", [0, -2, True, 2.0, "2", None])
def test_a_size_must_be_a_positive_integer(name: str, value: Any) -> None:
    config = CosmosAdvancedConfig(**{name: value})
    with pytest.raises(ConfigError, match=f"{name} must be a positive integer, got {value!r}"):
        config.validate()


@pytest.mark.parametrize("name", ["norm_eps", "rope_theta"])
@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf"), True, "1e-5", None])
def test_eps_and_theta_must_be_positive_and_finite(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=name):
        CosmosAdvancedConfig(**{name: value}).validate()


@pytest.mark.parametrize("name", ["dropout", "activation_dropout", "attention_dropout"])
@pytest.mark.parametrize("value", [-0.1, 1, 1.5, float("nan"), False, "0.1", None])
def test_dropout_must_be_a_probability(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"{name} must be"):
        CosmosAdvancedConfig(**{name: value}).validate()


def test_limits_of_what_is_valid() -> None:
    config = CosmosAdvancedConfig(
        **dict.fromkeys(SIZES, 1) | {"head_dim": 2}, dropout=0, attention_dropout=0.999, norm_eps=1e-12, rope_theta=1
    )
    assert config.validate() is config


def test_heads_must_share_kv_heads_evenly() -> None:
    with pytest.raises(ConfigError, match=r"multiple.*16.*5"):
        CosmosAdvancedConfig(n_kv_heads=5).validate()
    with pytest.raises(ConfigError, match="multiple"):
        CosmosAdvancedConfig(n_heads=2, n_kv_heads=4).validate()


def test_head_dim_must_be_even() -> None:
    with pytest.raises(ConfigError, match=r"head_dim must be even.*15"):
        CosmosAdvancedConfig(head_dim=15).validate()


def test_all_problems_are_listed_at_once() -> None:
    config = CosmosAdvancedConfig(dim=0, n_kv_heads=3, head_dim=7, norm_eps=-1.0, dropout=2, vocab_size=1.5)
    with pytest.raises(ConfigError) as caught:
        config.validate()
    for part in ("dim must", "multiple of n_kv_heads", "head_dim must be even", "norm_eps", "dropout", "vocab_size"):
        assert part in str(caught.value)


def test_building_a_model_validates(tiny_config: CosmosAdvancedConfig) -> None:
    tiny_config.n_kv_heads = 3
    with pytest.raises(ConfigError, match="multiple"):
        CosmosDecoder(tiny_config)


PRESETS = {
    "beginner": {"dim": 256, "n_layers": 2, "n_heads": 8, "n_kv_heads": 8, "vocab_size": 1000}
    | {"max_sequence_length": 1024},
    "advanced": PUBLISHED,
    "full": {**PUBLISHED, "n_heads": 32, "n_kv_heads": 8},
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_numbers_of_the_report(name: str) -> None:
    config = CosmosAdvancedConfig.from_file(preset_path(name)).validate()
    expected = {**PUBLISHED, **PRESETS[name]}
    assert {key: getattr(config, key) for key in expected} == expected


def test_the_demo_preset_is_the_demo_checkpoint() -> None:
    preset = CosmosAdvancedConfig.from_file(preset_path("demo")).validate()
    assert preset == CosmosAdvancedConfig.from_file(demo_checkpoint() / "config.json")


def test_an_unknown_preset_is_refused_with_the_names_there_are() -> None:
    assert set(PRESETS) | {"demo"} <= set(preset_names())
    with pytest.raises(ConfigError, match="'huge'") as caught:
        preset_path("huge")
    assert all(name in str(caught.value) for name in preset_names())


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, copy.copy, replace, lambda c: pickle.loads(pickle.dumps(c))],
    ids=["deepcopy", "copy", "replace", "pickle"],
)
def test_duplicates_are_equal(duplicate: Callable[[CosmosAdvancedConfig], CosmosAdvancedConfig]) -> None:
    config = CosmosAdvancedConfig.from_dict({"zebra": 1, "dim": 64, "memory": {"mine": 2, "episodic_memory": False}})
    other = duplicate(config)
    assert other == config
    assert other is not config
    assert other.to_dict() == config.to_dict()
    other.dim = 65
    assert config.dim == 64
    assert other != config


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))], ids=["copy", "pickle"])
def test_deep_copies_share_nothing_and_keep_the_order(
    duplicate: Callable[[CosmosAdvancedConfig], CosmosAdvancedConfig],
) -> None:
    config = CosmosAdvancedConfig.from_dict({"zebra": [1], "dim": 64, "memory": {"mine": [2]}})
    other = duplicate(config)
    assert list(other.to_dict()) == list(config.to_dict())
    other.memory.mine.append(3)
    other.zebra.append(4)
    assert config.to_dict()["memory"]["mine"] == [2]
    assert config.zebra == [1]


@pytest.mark.parametrize(
    "change",
    [{"dim": 65}, {"safety": {"safety_level": "low"}}, {"window_size": 2}, {"memory": {"mine": 1}}],
    ids=["field", "group", "carried key", "carried key of a group"],
)
def test_configurations_that_differ_are_unequal(change: dict[str, Any]) -> None:
    assert CosmosAdvancedConfig.from_dict({"window_size": 1} | change) != CosmosAdvancedConfig(window_size=1)
