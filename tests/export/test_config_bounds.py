"""Sizes and files beyond any model: named with their bound, before anything is allocated."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from cosmos_export.config import CosmosAdvancedConfig
from cosmos_export.config_checks import decoder_parameters
from cosmos_export.errors import ConfigError, RecipeError
from cosmos_export.model import CosmosAdvancedModel, CosmosDecoder
from cosmos_export.model.loading import parameter_count
from cosmos_export.recipe import ExportRecipe
from cosmos_export.resources import preset_names, preset_path

RECIPE = 'description = ""\ndialect = "ort"\nopset = 20\n'
QUANTISED = "[quantization]\nbits = 8\nblock_size = 32\nsymmetric = true\naccuracy_level = 4\n"
BOUNDS = {
    "dim": 2**16,
    "n_layers": 2**10,
    "n_heads": 2**10,
    "n_kv_heads": 2**10,
    "head_dim": 2**10,
    "hidden_dim": 2**20,
    "vocab_size": 2**22,
    "max_sequence_length": 2**24,
}


@pytest.mark.parametrize("name", BOUNDS)
def test_a_size_has_a_bound(name: str) -> None:
    others = {"dim": 2, "n_layers": 1, "n_heads": 1, "n_kv_heads": 1, "head_dim": 2, "hidden_dim": 2, "vocab_size": 2}
    others |= {"max_sequence_length": 2}
    heads = {"n_heads": BOUNDS[name]} if name == "n_kv_heads" else {}
    CosmosAdvancedConfig(**{**others, **heads, name: BOUNDS[name]}).validate()
    with pytest.raises(ConfigError, match=f"{name} must be at most {BOUNDS[name]}, got {BOUNDS[name] + 2}"):
        CosmosAdvancedConfig(**{**others, **heads, name: BOUNDS[name] + 2}).validate()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"dim": 10**5000}, "dim must be at most 65536, got <int of 16610 bits>"),
        ({"n_heads": -(10**5000)}, "n_heads must be a positive integer, got <int"),
        ({"head_dim": 3 * 10**5000}, "head_dim must be at most 1024"),
        ({"vocab_size": [[1]]}, r"vocab_size must be a positive integer, got \[\[1\]\]"),
        (
            {"dim": 65536, "hidden_dim": 2**20, "n_layers": 1024},
            r"decoder of 2.1e\+14 parameters, expected at most 1e\+12",
        ),
        ({"max_sequence_length": 2**24}, "max_sequence_length 16777216 times head_dim 128 / 2 is a rotary table of"),
        ({"rope_theta": 1e-300}, "rope_theta must be from 1e-30 to 1e"),
        ({"norm_eps": 1e300}, "norm_eps must be from 1e-30 to 1e"),
        ({"reasoning": {"reasoning_steps": 10**9}}, "reasoning.reasoning_steps must be at most 256, got 1000000000"),
        ({"evaluation": {"verification_depth": 10**9}}, "evaluation.verification_depth must be at most 256"),
        ({"memory": {"working_memory_size": 10**12}}, "memory.working_memory_size must be at most 1048576"),
        ({"safety": {"safety_level": {"a": 1}}}, "safety.safety_level must be one of low, medium, high, strict, got"),
        ({"generation": {"temperature": float("nan")}}, "generation.temperature: expected 0 or more, got nan"),
        ({"generation": {"top_k": "50"}}, "generation.top_k: expected"),
        ({"generation": {"top_p": 0}}, "generation.top_p: expected"),
        ({"generation": {"repetition_penalty": None}}, "generation.repetition_penalty: expected"),
        ({"generation": {"max_tokens": -1}}, "generation.max_tokens must be an integer from 0"),
        ({"generation": {"min_tokens": True}}, "generation.min_tokens must be an integer from 0"),
        ({"generation": {"stop_sequences": "END"}}, "generation.stop_sequences must be a list of strings, got 'END'"),
        ({"generation": {"stop_ids": [32000]}}, "generation.stop_ids must be token ids from 0 to 31999"),
        ({"generation": {"mine": float("inf")}}, "generation must hold plain JSON values: Infinity is not JSON"),
        ({"generation": {"mine": {1, 2}}}, "generation must hold plain JSON values"),
    ],
)
@pytest.mark.parametrize("build", [lambda config: config.validate(), CosmosDecoder, CosmosAdvancedModel])
def test_what_cannot_be_built_is_refused_before_anything_is_allocated(
    settings: dict[str, Any], words: str, build: Any
) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        build(CosmosAdvancedConfig(**settings))
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("name", preset_names())
def test_parameters_are_counted_as_the_model_has_them(name: str) -> None:
    config = CosmosAdvancedConfig.from_file(preset_path(name))
    assert decoder_parameters(config) == parameter_count(config)


def test_carried_settings_may_hold_what_python_writes(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"planning": {"depth": Infinity, "x": [NaN]}, "dim": 64}')
    config = CosmosAdvancedConfig.from_file(tmp_path / "config.json").validate()
    config.save(tmp_path / "again.json")
    assert '"depth": Infinity' in (tmp_path / "again.json").read_text()


def test_many_settings_are_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({f"n_layer{i}": 0 for i in range(50_000)}))
    with pytest.raises(ConfigError, match="50000 settings, expected at most 1000"):
        CosmosAdvancedConfig.from_file(tmp_path / "config.json")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("a = " + "[" * 10**5, "nested too deep"),
        ("a = " + "9" * 5000, "4300 digits"),
        (b"\xff", "can't decode byte 0xff"),
        (b"\xef\xbb\xbfopset = 1", "byte order mark"),
        ("opset = 20\nopset = 21", "overwrite"),
        (b"\0" * (2 << 20), "2097152 bytes, expected at most 1048576"),
        (RECIPE + 'precision = ["fp32"]\ngraphs = ["decoder"]', "precision must be"),
        (RECIPE.replace("20", "nan") + 'precision = "fp32"\ngraphs = ["decoder"]', "opset must be"),
        (RECIPE + f'precision = "fp32"\ngraphs = {list(range(50_000))}', "graphs must be a list of at least one of"),
        (
            f'{RECIPE}precision = "int8"\ngraphs = ["decoder"]\n{QUANTISED}[calibration]\ntokens = 1\nepochs = 1001',
            "calibration.epochs must be at most 1000, got 1001",
        ),
    ],
    ids=range(10),
)
def test_hostile_recipes(tmp_path: Path, content: str | bytes, words: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(RecipeError, match=words) as caught:
        ExportRecipe.load(str(path))
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 500


def test_a_pipe_is_no_recipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "mine.toml")
    with pytest.raises(RecipeError, match="no regular file"):
        ExportRecipe.load(str(tmp_path / "mine.toml"))
