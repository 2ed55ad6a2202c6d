"""`cosmos-export onnx`: a checkpoint becomes a verified bundle."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cosmos_export.cli.exporting import export_options, run_export
from cosmos_runtime import ONNX

if TYPE_CHECKING:
    from cosmos_export.recipe import ExportRecipe


@click.command("onnx")
@export_options(ONNX)
@click.option(
    "--calibration",
    metavar="self|off|FILE",
    default="self",
    show_default=True,
    help="The text that 4-bit weights are fitted to, where the recipe says so: the model's own, none, or a UTF-8 file.",
)
def onnx_command(calibration: str, **options: Any) -> None:
    """Export a model to a bundle and prove the bundle equal to it.

    The bundle appears at --out only when it is proven; a failed export leaves nothing behind and exits with 1.

    \b
    Examples:
      cosmos-export onnx
      cosmos-export onnx --checkpoint my-model --out my-bundle
      cosmos-export onnx --preset beginner --out beginner-bundle --json
      cosmos-export onnx --checkpoint my-model --capabilities memory,safety
    """
    run_export(ONNX, **options, adapt=lambda recipe: _calibration(recipe, calibration))


def _calibration(recipe: ExportRecipe, wanted: str) -> tuple[ExportRecipe, Path | None]:
    """The recipe, without calibration if so wanted, and the text to calibrate on if it is not the model's own."""
    if wanted == "off":
        return replace(recipe, calibration=None), None
    if wanted == "self":
        return recipe, None
    if recipe.calibration is None:
        raise click.UsageError(f"--calibration {wanted}: recipe {recipe.name} has no calibration.")
    if not Path(wanted).is_file():
        raise click.UsageError(f"--calibration {wanted}: expected self, off, or the path of a text file.")
    return recipe, Path(wanted)
