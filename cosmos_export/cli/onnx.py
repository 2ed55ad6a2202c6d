"""`cosmos-export onnx`: a checkpoint becomes a verified bundle."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cosmos_export.cli.group import fail
from cosmos_export.resources import DEFAULT_RECIPES, preset_names, recipe_names
from cosmos_runtime import CAPABILITIES

if TYPE_CHECKING:
    from cosmos_export.checkpoint import Checkpoint
    from cosmos_export.recipe import ExportRecipe


@click.command("onnx")
@click.option("--checkpoint", type=click.Path(path_type=Path), help="Checkpoint folder; default: the demo model.")
@click.option("--preset", type=click.Choice(preset_names()), help="Random weights of a model preset.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of a preset's weights.")
@click.option("--out", type=click.Path(path_type=Path), help="The new bundle; default: bundles/MODEL-RECIPE.")
@click.option(
    "--recipe",
    metavar="NAME",
    help=f"What to make: {', '.join(recipe_names())}, or the path of a .toml file; "
    f"default: {DEFAULT_RECIPES[True]}, with --no-causal {DEFAULT_RECIPES[False]}.",
)
@click.option(
    "--head-layout",
    type=click.Choice(["interleave", "tile"]),
    default="interleave",
    show_default=True,
    help="Order of the checkpoint's query heads; the first published code used tile.",
)
@click.option(
    "--causal/--no-causal", default=True, show_default=True, help="Whether a token sees only those before it."
)
@click.option(
    "--capabilities",
    metavar="NAME,...",
    help=f"Export the model with these heads: {', '.join(CAPABILITIES)}, or 'none' for their fusion alone.",
)
@click.option("--head", type=click.Choice(["lm"]), help="The plain decoder, without capability heads: the default.")
@click.option(
    "--verify",
    "effort",
    type=click.Choice(["full", "quick", "off"]),
    default="full",
    show_default=True,
    help="Lengths up to the maximum, up to 256 tokens, or no proof at all.",
)
@click.option(
    "--calibration",
    metavar="self|off|FILE",
    default="self",
    show_default=True,
    help="The text that 4-bit weights are fitted to, where the recipe says so: the model's own, none, or a UTF-8 file.",
)
@click.option("--overwrite", is_flag=True, help="Replace the bundle at --out once the new one is proven.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the table.")
def onnx_command(
    checkpoint: Path | None,
    preset: str | None,
    seed: int,
    out: Path | None,
    recipe: str | None,
    head_layout: str,
    causal: bool,
    capabilities: str | None,
    head: str | None,
    effort: str,
    calibration: str,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Export a model to a bundle and prove the bundle equal to it.

    The bundle appears at --out only when it is proven; a failed export leaves nothing behind and exits with 1.

    \b
    Examples:
      cosmos-export onnx
      cosmos-export onnx --checkpoint my-model --out my-bundle
      cosmos-export onnx --preset beginner --out beginner-bundle --json
      cosmos-export onnx --checkpoint my-model --capabilities memory,safety
    """
    if checkpoint is not None and preset is not None:
        raise click.UsageError("--checkpoint and --preset each name the model: give one of them.")
    if capabilities is not None and head is not None:
        raise click.UsageError("--head lm is the decoder without capability heads: give it or --capabilities.")
    heads = None if capabilities is None else _names(capabilities)

    from cosmos_export.cli.terminal import print_report, shown_progress
    from cosmos_export.errors import ParityError
    from cosmos_export.model.capabilities import has_heads
    from cosmos_export.parity.verify import Effort
    from cosmos_export.pipeline import export_onnx
    from cosmos_export.recipe import ExportRecipe

    chosen = ExportRecipe.load(recipe or DEFAULT_RECIPES[causal])
    chosen, text = _calibration(chosen, calibration)
    source, name = _open(checkpoint, preset, seed, head_layout, heads)
    target = out or Path("bundles", f"{name}-{chosen.name}{'' if heads is None else '-heads'}")
    try:
        with shown_progress() as progress:
            if heads is None and head is None and has_heads(source.names):
                progress.note(
                    "this checkpoint has capability heads, and this is its plain decoder; "
                    "--capabilities reasoning,memory,safety,evaluation exports them, --head lm silences this note"
                )
            bundle = export_onnx(
                source,
                target,
                chosen,
                causal=causal,
                capabilities=heads,
                effort=Effort(effort),
                calibration_text=text,
                overwrite=overwrite,
                progress=progress,
            )
    except ParityError as error:
        print_report(error.report, stderr=True)
        fail(f"{error}. Nothing was written to {target}")

    proven = bundle.report.summary() if bundle.report else "NOT verified (--verify off)"
    if as_json:
        report = bundle.report.to_dict() if bundle.report else None
        click.echo(json.dumps({"bundle": str(target), "parity": report}, indent=2))
    else:
        if bundle.report:
            print_report(bundle.report)
        click.echo(f"{target}: {proven}")


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


def _names(capabilities: str) -> tuple[str, ...]:
    """The names of a list with commas."""
    names = tuple(name.strip() for name in capabilities.split(",") if name.strip())
    if names == ("none",):
        return ()
    unknown = [name for name in names if name not in CAPABILITIES]
    if unknown or not names:
        raise click.UsageError(
            f"--capabilities {capabilities}: expected 'none', or some of {', '.join(CAPABILITIES)} with commas between."
        )
    return names


def _open(
    checkpoint: Path | None, preset: str | None, seed: int, head_layout: str, heads: tuple[str, ...] | None
) -> tuple[Checkpoint, str]:
    from cosmos_export.checkpoint import Checkpoint
    from cosmos_export.model.loading import preset_checkpoint
    from cosmos_export.resources import demo_checkpoint

    if preset is not None:
        return preset_checkpoint(preset, seed, heads), preset
    folder = checkpoint or demo_checkpoint()
    return Checkpoint.open(folder, head_layout=head_layout), folder.resolve().name
