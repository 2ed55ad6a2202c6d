"""Export recipes: one TOML file a deployment target (`configs/exports/`), checked before anything is traced."""

from __future__ import annotations

import tomllib
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

from cosmos_export.errors import RecipeError
from cosmos_export.resources import recipe_path
from cosmos_runtime import DECODER, FULL_SEQUENCE

PRECISIONS = ("fp32",)
DIALECTS = ("portable", "ort")
GRAPHS = (FULL_SEQUENCE, DECODER)
# Opset 20 is the oldest that the traced operators need; from 23 on, torch has no exporter target yet.
OPSETS = range(20, 24)


@dataclass(frozen=True)
class ExportRecipe:
    """What to make of a model: number format, operator dialect, ONNX opset and which graphs."""

    name: str
    description: str
    precision: str
    dialect: str
    opset: int
    graphs: tuple[str, ...]

    @classmethod
    def load(cls, name: str) -> Self:
        """The recipe called `name` in `configs/exports`, or the file that `name` is the path of (`*.toml`).

        Raises RecipeError when there is none, or when it asks for what this version cannot make.
        """
        path = Path(name) if name.endswith(".toml") else recipe_path(name)
        try:
            values = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise RecipeError(f"recipe {path} cannot be read as TOML: {error}") from None
        return cls(**_checked(path, values))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, for the manifest."""
        return {**asdict(self), "graphs": list(self.graphs)}


def _checked(path: Path, values: dict[str, Any]) -> dict[str, Any]:
    known = {f.name for f in fields(ExportRecipe)} - {"name"}  # a recipe is called what its file is called
    unknown, missing = sorted(values.keys() - known), sorted(known - values.keys())
    if unknown or missing:
        what = f"unknown key {unknown[0]!r}" if unknown else f"missing key {missing[0]!r}"
        raise RecipeError(f"recipe {path}: {what}; a recipe has {', '.join(sorted(known))}")
    if not isinstance(values["description"], str):
        raise RecipeError(f"recipe {path}: description must be a text, got {values['description']!r}")
    _check_member(path, "precision", values["precision"], PRECISIONS)
    _check_member(path, "dialect", values["dialect"], DIALECTS)
    _check_member(path, "opset", values["opset"], OPSETS)
    graphs = values["graphs"]
    if not isinstance(graphs, list) or not graphs or any(graphs.count(graph) > 1 for graph in graphs):
        raise RecipeError(
            f"recipe {path}: graphs must be a list of at least one of {', '.join(GRAPHS)}, none twice, got {graphs!r}"
        )
    for graph in graphs:
        _check_member(path, "graphs", graph, GRAPHS)
    return {**values, "name": path.stem, "graphs": tuple(graphs)}


def _check_member(path: Path, key: str, value: Any, allowed: Any) -> None:
    if type(value) is not type(allowed[0]) or value not in allowed:  # True and 20.0 are no opsets
        raise RecipeError(f"recipe {path}: {key} must be one of {', '.join(map(str, allowed))}, got {value!r}")
