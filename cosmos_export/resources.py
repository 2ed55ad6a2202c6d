"""Where the files lie that are defaults of the commands: model presets, export recipes, the demo checkpoint.

In a source tree they are the folders `configs/` and `checkpoints/` at its top; a wheel carries them in the package.
"""

from __future__ import annotations

from pathlib import Path

from cosmos_export.errors import ConfigError, CosmosExportError, RecipeError
from cosmos_runtime import ONNX, PT2, TORCHSCRIPT

# What is exported when nobody says how: with a key/value cache, which only a causal model can have.
DEFAULT_RECIPES = {
    ONNX: {True: "cpu-fp32", False: "fp32"},
    TORCHSCRIPT: {True: "torchscript-fp32", False: "torchscript-full-sequence"},
    PT2: {True: "pt2-fp32", False: "pt2-full-sequence"},
}

_PACKAGE = Path(__file__).resolve().parent
_ROOT = _PACKAGE / "data" if (_PACKAGE / "data").is_dir() else _PACKAGE.parent


def preset_names() -> list[str]:
    """Names of the model presets, for `--preset` and its help."""
    return _stems("configs/models", ".json")


def recipe_names(graph_format: str | None = None) -> list[str]:
    """Names of the export recipes, or of those of one format, for `--recipe` and its help."""
    names = _stems("configs/exports", ".toml")
    return names if graph_format is None else [name for name in names if _format_of(name) == graph_format]


def _format_of(name: str) -> str:
    """A recipe of a PyTorch format says so in its name, too: help texts must not read files."""
    return next((known for known in (TORCHSCRIPT, PT2) if name.startswith(f"{known}-")), ONNX)


def preset_path(name: str) -> Path:
    """The config.json of a preset. Raises ConfigError that lists the presets there are."""
    return _resource("configs/models", name, ".json", preset_names(), ConfigError, "model preset")


def recipe_path(name: str) -> Path:
    """The file of a recipe. Raises RecipeError that lists the recipes there are."""
    return _resource("configs/exports", name, ".toml", recipe_names(), RecipeError, "export recipe")


def demo_checkpoint() -> Path:
    """The folder of the trained demo model."""
    return _ROOT / "checkpoints" / "demo"


def _stems(folder: str, suffix: str) -> list[str]:
    return sorted(p.stem for p in (_ROOT / folder).glob(f"*{suffix}"))


def _resource(folder: str, name: str, suffix: str, names: list[str], error: type[CosmosExportError], what: str) -> Path:
    if name not in names:
        raise error(f"there is no {what} {name!r}; there are: {', '.join(names)}")
    return _ROOT / folder / f"{name}{suffix}"
