"""Export recipes: found by name or path, and refused with the key and the value that are wrong."""

import json
from pathlib import Path
from typing import Any

import pytest

from cosmos_export.errors import RecipeError
from cosmos_export.recipe import ExportRecipe
from cosmos_export.resources import DEFAULT_RECIPE, recipe_names

GOOD = {"description": "'''test'''", "precision": "'fp32'", "dialect": "'portable'", "opset": "21"} | {
    "graphs": "['full_sequence']"
}


def write(folder: Path, **changes: str | None) -> Path:
    """A good recipe, its values replaced by TOML text; None leaves a key out."""
    path = folder / "mine.toml"
    lines = [f"{key} = {value}" for key, value in {**GOOD, **changes}.items() if value is not None]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_fp32_is_the_default_and_portable() -> None:
    recipe = ExportRecipe.load("fp32")
    assert DEFAULT_RECIPE == "fp32"
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
