"""Export recipes: found by name or path, and refused with the key and the value that are wrong."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cosmos_export.calibration.plan import CalibrationPlan
from cosmos_export.config import CosmosAdvancedConfig
from cosmos_export.errors import RecipeError
from cosmos_export.onnx.quantize import Quantization
from cosmos_export.recipe import ExportRecipe
from cosmos_export.resources import DEFAULT_RECIPES, recipe_names

GOOD = {"description": "'''test'''", "precision": "'fp32'", "dialect": "'portable'", "opset": "21"} | {
    "graphs": "['full_sequence']"
}


def write(folder: Path, **changes: str | None) -> Path:
    """A good recipe, its values replaced by TOML text; None leaves a key out."""
    path = folder / "mine.toml"
    lines = [f"{key} = {value}" for key, value in {**GOOD, **changes}.items() if value is not None]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_what_is_exported_when_nobody_says_how() -> None:
    assert DEFAULT_RECIPES["onnx"] == {True: "cpu-fp32", False: "fp32"}
    for graph_format, names in DEFAULT_RECIPES.items():
        with_cache, without = ExportRecipe.load(names[True]), ExportRecipe.load(names[False])
        assert (with_cache.graphs, without.graphs) == (("decoder",), ("full_sequence",))
        assert with_cache.format == without.format == graph_format


@pytest.mark.parametrize("graph_format", ["onnx", "torchscript", "pt2"])
def test_a_recipe_says_its_format_in_its_name(graph_format: str) -> None:
    of_format = [name for name in recipe_names() if ExportRecipe.load(name).format == graph_format]
    assert recipe_names(graph_format) == of_format != []


def test_fp32_is_portable() -> None:
    recipe = ExportRecipe.load("fp32")
    assert (recipe.name, recipe.precision, recipe.dialect, recipe.opset) == ("fp32", "fp32", "portable", 20)
    assert recipe.graphs == ("full_sequence",)
    assert recipe.description


def test_every_recipe_that_is_offered_loads() -> None:
    assert [ExportRecipe.load(name).name for name in recipe_names()] == recipe_names()


def test_a_recipe_is_plain_json_for_the_manifest() -> None:
    values = ExportRecipe.load("fp32").to_dict()
    assert json.loads(json.dumps(values)) == values
    assert values["graphs"] == ["full_sequence"]


def test_a_recipe_by_path_is_named_after_its_file(tmp_path: Path) -> None:
    recipe = ExportRecipe.load(str(write(tmp_path)))
    assert recipe == ExportRecipe("mine", "test", "fp32", "portable", 21, ("full_sequence",))


@pytest.mark.parametrize("name", ["fp31", "../exports/fp32", ""])
def test_an_unknown_name_is_refused_with_the_names_there_are(name: str) -> None:
    with pytest.raises(RecipeError) as caught:
        ExportRecipe.load(name)
    assert repr(name) in str(caught.value)
    assert all(known in str(caught.value) for known in recipe_names())


@pytest.mark.parametrize("content", [b"opset = ", b"\xff", None], ids=["not TOML", "not UTF-8", "missing"])
def test_an_unreadable_file_is_refused_by_name(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "mine.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RecipeError, match="TOML") as caught:
        ExportRecipe.load(str(path))
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("key", GOOD)
def test_a_missing_key_is_named(tmp_path: Path, key: str) -> None:
    with pytest.raises(RecipeError, match=f"missing key '{key}'"):
        ExportRecipe.load(str(write(tmp_path, **{key: None})))


def test_an_unknown_key_is_named_beside_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="unknown key 'precison'") as caught:
        ExportRecipe.load(str(write(tmp_path, precison="'fp16'")))
    assert all(key in str(caught.value) for key in GOOD)


def test_a_recipe_cannot_name_itself(tmp_path: Path) -> None:
    """Its name is its file's; another one in the file would be dropped without a word."""
    with pytest.raises(RecipeError, match="name"):
        ExportRecipe.load(str(write(tmp_path, name="'other'")))


@pytest.mark.parametrize(
    ("key", "value", "given"),
    [
        ("precision", "'fp8'", "fp8"),
        ("precision", "['fp32']", "fp32"),
        ("dialect", "'Portable'", "Portable"),
        ("opset", "19", "19"),
        ("opset", "24", "24"),
        ("opset", "'20'", "'20'"),
        ("opset", "20.0", "20.0"),
        ("opset", "true", "True"),
        ("graphs", "['prefill']", "prefill"),
        ("graphs", "['full_sequence', 'decode']", "decode"),
        ("graphs", "[['full_sequence']]", "full_sequence"),
        ("graphs", "'full_sequence'", "'full_sequence'"),
        ("graphs", "[]", r"\[\]"),
        ("graphs", "3", "3"),
        ("description", "5", "5"),
    ],
)
def test_a_wrong_value_is_refused_with_key_and_value(tmp_path: Path, key: str, value: Any, given: str) -> None:
    with pytest.raises(RecipeError, match=f"{key}.*got.*{given}"):
        ExportRecipe.load(str(write(tmp_path, **{key: value})))


# Quantising recipes

FORM = "{bits = 4, block_size = 32, symmetric = false, accuracy_level = 4}"
EIGHT = "{bits = 8, block_size = 64, symmetric = true, accuracy_level = 0}"
QUANTISED = {"precision": "'int4'", "dialect": "'ort'", "opset": "23", "graphs": "['decoder']", "quantization": FORM}


def quantised(folder: Path, **changes: str | None) -> ExportRecipe:
    return ExportRecipe.load(str(write(folder, **{**QUANTISED, **changes})))


@pytest.mark.parametrize(
    ("name", "precision", "bits", "embedding_bits"),
    [
        ("cpu-fp32", "fp32", None, None),
        ("cpu-int8", "int8", 8, 8),
        ("cpu-int4", "int4", 4, 4),
        ("cpu-int4-quick", "int4", 4, 8),
    ],
)
def test_the_cpu_recipes_decode_in_their_precision(
    name: str, precision: str, bits: int | None, embedding_bits: int | None
) -> None:
    recipe = ExportRecipe.load(name)
    assert (recipe.precision, recipe.dialect, recipe.graphs) == (precision, "ort", ("decoder",))
    forms = (recipe.form_of("layers.0.feed_forward.w2.weight"), recipe.form_of("tok_embeddings.weight"))
    assert [form and form.bits for form in forms] == [bits, embedding_bits]


def test_each_matrix_has_the_form_of_its_product(tmp_path: Path) -> None:
    """Projections that one product does together are stored alike, asked for one by one or packed."""
    recipe = quantised(tmp_path, overrides=f"{{qkv_proj = {EIGHT}}}", embedding=EIGHT.replace("8", "4"))
    four, eight = Quantization(4, 32, False, 4), Quantization(8, 64, True, 0)
    expected = {
        "tok_embeddings.weight": Quantization(4, 64, True, 0),
        "layers.0.attention.q_proj.weight": eight,
        "layers.3.attention.k_proj.weight": eight,
        "layers.3.attention.v_proj.weight": eight,
        "layers.3.attention.qkv_proj.weight": eight,
        "layers.0.attention.o_proj.weight": four,
        "layers.0.feed_forward.w1.weight": four,
        "layers.0.feed_forward.w3.weight": four,
        "layers.0.feed_forward.w1_w3.weight": four,
        "layers.11.feed_forward.w2.weight": four,
        "layers.0.norm1.weight": None,
        "norm.weight": None,
        "rope.cos": None,
        "w2": None,
    }
    assert {name: recipe.form_of(name) for name in expected} == expected


def test_float32_recipes_quantise_nothing() -> None:
    recipe = ExportRecipe.load("cpu-fp32")
    assert recipe.form_of("tok_embeddings.weight") is None
    assert recipe.form_of("layers.0.attention.q_proj.weight") is None


@pytest.mark.parametrize("name", recipe_names())
def test_what_a_recipe_says_survives_the_manifest(name: str) -> None:
    recipe = ExportRecipe.load(name)
    recorded = json.loads(json.dumps(recipe.to_dict()))
    again = ExportRecipe.from_manifest(recorded)
    assert replace(again, name=name) == recipe
    assert {"quantization", "embedding"} & recorded.keys() == {
        key for key in ("quantization", "embedding") if getattr(recipe, key) is not None
    }


def test_overrides_survive_the_manifest(tmp_path: Path) -> None:
    recipe = quantised(tmp_path, overrides=f"{{w2 = {EIGHT}}}")
    again = ExportRecipe.from_manifest(json.loads(json.dumps(recipe.to_dict())))
    assert again.overrides == recipe.overrides == {"w2": Quantization(8, 64, True, 0)}
    assert again.form_of("layers.0.feed_forward.w2.weight") == Quantization(8, 64, True, 0)


def test_the_name_survives_the_manifest() -> None:
    assert ExportRecipe.from_manifest(ExportRecipe.load("cpu-int4").to_dict()).name == "cpu-int4"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"quantization": None}, "int4.*quantization"),
        ({"precision": "'fp32'"}, "fp32.*quantization"),
        ({"dialect": "'portable'", "graphs": "['full_sequence']"}, "dialect 'ort'.*portable"),
        ({"quantization": "4"}, "quantization.*bits.*got 4"),
        ({"quantization": "{bits = 4}"}, "quantization.*accuracy_level.*block_size.*got"),
        ({"quantization": FORM.replace("}", ", zero = 1}")}, "quantization.*got.*zero"),
        ({"quantization": FORM.replace("bits = 4", "bits = 3")}, "quantization.bits.*4, 8.*got 3"),
        ({"quantization": FORM.replace("bits = 4", "bits = 4.0")}, r"quantization.bits.*got 4\.0"),
        ({"quantization": FORM.replace("32", "48")}, "quantization.block_size.*16, 32.*got 48"),
        ({"quantization": FORM.replace("32", "8")}, "quantization.block_size.*got 8"),
        ({"quantization": FORM.replace("false", "0")}, "quantization.symmetric.*got 0"),
        ({"quantization": FORM.replace("level = 4", "level = 2")}, "quantization.accuracy_level.*0, 1, 4.*got 2"),
        ({"embedding": EIGHT.replace("bits = 8", "bits = 16")}, "embedding.bits.*got 16"),
        ({"embedding": FORM}, "embedding.symmetric"),
        ({"overrides": "3"}, "overrides.*got 3"),
        ({"overrides": f"{{q_proj = {EIGHT}}}"}, "overrides.*qkv_proj.*got 'q_proj'"),
        ({"overrides": "{w2 = 8}"}, "overrides.w2.*got 8"),
        ({"overrides": f"{{w2 = {EIGHT.replace('64', '65')}}}"}, "overrides.w2.block_size.*got 65"),
    ],
)
def test_a_wrong_quantisation_is_refused_with_what_is_wrong(
    tmp_path: Path, changes: dict[str, str | None], words: str
) -> None:
    with pytest.raises(RecipeError, match=words):
        quantised(tmp_path, **changes)


@pytest.mark.parametrize(
    ("calibration", "quantization", "words"),
    [
        ("3", EIGHT, "calibration.*epochs, tokens.*got 3"),
        ("{tokens = 10}", EIGHT, "calibration.*epochs, tokens"),
        ("{tokens = 0, epochs = 1}", EIGHT, "calibration.tokens.*at least 1.*got 0"),
        ("{tokens = 10, epochs = 1.5}", EIGHT, "calibration.epochs.*at least 0.*got 1.5"),
        ("{tokens = 10, epochs = 1}", EIGHT.replace("true", "false"), "calibration.*symmetric"),
    ],
)
def test_a_wrong_calibration_is_refused(tmp_path: Path, calibration: str, quantization: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        quantised(tmp_path, precision="'int8'", quantization=quantization, calibration=calibration)


def test_a_calibration_survives_the_manifest() -> None:
    recipe = ExportRecipe.load("cpu-int4")
    again = ExportRecipe.from_manifest(json.loads(json.dumps(recipe.to_dict())))
    assert again.calibration == recipe.calibration == CalibrationPlan(tokens=32768, epochs=6)


@pytest.mark.parametrize("key", ["embedding", "overrides"])
def test_float32_and_portable_mean_that_nothing_is_quantised(tmp_path: Path, key: str) -> None:
    value = EIGHT if key == "embedding" else f"{{w2 = {EIGHT}}}"
    with pytest.raises(RecipeError, match=key):
        ExportRecipe.load(str(write(tmp_path, **{key: value})))


def test_a_cache_needs_a_causal_model(make_config: Callable[..., CosmosAdvancedConfig]) -> None:
    with pytest.raises(RecipeError, match=r"cpu-fp32.*causal.*fp32"):
        ExportRecipe.load("cpu-fp32").check_fits(make_config(), causal=False)
    ExportRecipe.load("fp32").check_fits(make_config(), causal=False)
    ExportRecipe.load("cpu-fp32").check_fits(make_config(), causal=True)


def test_blocks_of_the_embedding_must_divide_its_width(make_config: Callable[..., CosmosAdvancedConfig]) -> None:
    recipe = ExportRecipe.load("cpu-int4")
    with pytest.raises(RecipeError, match=r"cpu-int4.*32.*dim 48"):
        recipe.check_fits(make_config(dim=48), causal=True)
    recipe.check_fits(make_config(dim=96), causal=True)


def test_the_fusion_of_heads_can_be_stored_in_a_way_of_its_own() -> None:
    recipe = ExportRecipe.load("cpu-int4")
    fusion, skills = (
        recipe.form_of(name)
        for name in ("capability_fusion.0.weight", "memory_system.procedural_memory.skills_in.weight")
    )
    assert fusion is not None
    assert skills is not None
    assert (fusion.block_size, skills.block_size) == (64, 256)
    without = replace(recipe, overrides={"heads": skills})
    assert without.form_of("capability_fusion.4.weight") == skills
