"""What the commands that export have in common: their options, and the way from these to a proven bundle."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from cosmos_export.cli.group import fail
from cosmos_export.resources import DEFAULT_RECIPES, preset_names, recipe_names
from cosmos_runtime import CAPABILITIES

if TYPE_CHECKING:
    from cosmos_export.checkpoint import Checkpoint
    from cosmos_export.recipe import ExportRecipe

_PATH = click.Path(path_type=Path)

Command = TypeVar("Command", bound=Callable[..., Any])


def export_options(graph_format: str) -> Callable[[Command], Command]:
    """The options of a command that exports to one format; `run_export` takes what they were."""
    default = DEFAULT_RECIPES[graph_format]
    options = [
        click.option("--checkpoint", type=_PATH, help="Checkpoint folder; default: the demo model."),
        click.option("--preset", type=click.Choice(preset_names()), help="Random weights of a model preset."),
        click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of a preset's weights."),
        click.option("--out", type=_PATH, help="The new bundle; default: bundles/MODEL-RECIPE."),
        click.option(
            "--recipe",
            metavar="NAME",
            help=f"What to make: {', '.join(recipe_names(graph_format))}, or the path of a .toml file; "
            f"default: {default[True]}, with --no-causal {default[False]}.",
        ),
        click.option(
            "--head-layout",
            type=click.Choice(["interleave", "tile"]),
            default="interleave",
            show_default=True,
            help="Order of the checkpoint's query heads; the first published code used tile.",
        ),
        click.option(
            "--causal/--no-causal", default=True, show_default=True, help="Whether a token sees only those before it."
        ),
        click.option(
            "--capabilities",
            metavar="NAME,...",
            help=f"Export the model with these heads: {', '.join(CAPABILITIES)}, or 'none' for their fusion alone.",
        ),
        click.option(
            "--head", type=click.Choice(["lm"]), help="The plain decoder, without capability heads: the default."
        ),
        click.option(
            "--verify",
            "effort",
            type=click.Choice(["full", "quick", "layers", "off"]),
            default="full",
            show_default=True,
            help="Lengths up to the maximum, up to 256 tokens, one layer in memory at a time (done anyway where the "
            "model in float64 would not fit), or no proof at all.",
        ),
        click.option("--overwrite", is_flag=True, help="Replace the bundle at --out once the new one is proven."),
        click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the table."),
    ]

    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def run_export(
    graph_format: str,
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
    overwrite: bool,
    as_json: bool,
    adapt: Callable[[ExportRecipe], tuple[ExportRecipe, Path | None]] = lambda recipe: (recipe, None),
) -> None:
    """Exports, prints what was proven, and ends the program with 1 where it was not.

    `adapt` may change the recipe, and name a text to calibrate on.
    """
    if checkpoint is not None and preset is not None:
        raise click.UsageError("--checkpoint and --preset each name the model: give one of them.")
    if capabilities is not None and head is not None:
        raise click.UsageError("--head lm is the decoder without capability heads: give it or --capabilities.")
    heads = None if capabilities is None else _names(capabilities)

    from cosmos_export.garbage import uncollected

    with uncollected():
        from cosmos_export.cli.stages import shown_progress
        from cosmos_export.errors import ParityError
        from cosmos_export.model.capabilities import has_heads
        from cosmos_export.parity.effort import Effort
        from cosmos_export.pipeline import export_bundle
        from cosmos_export.recipe import ExportRecipe

    chosen, text = adapt(ExportRecipe.load(recipe or DEFAULT_RECIPES[graph_format][causal]))
    if chosen.format != graph_format:
        raise click.UsageError(
            f"--recipe {chosen.name} is for `cosmos-export {chosen.format}`; this command has: "
            f"{', '.join(recipe_names(graph_format))}."
        )
    source, name = _open(checkpoint, preset, seed, head_layout, heads)
    target = out or Path("bundles", f"{name}-{chosen.name}{'' if heads is None else '-heads'}")
    try:
        with shown_progress() as progress:
            if heads is None and head is None and has_heads(source.names):
                progress.note(
                    "this checkpoint has capability heads, and this is its plain decoder; "
                    "--capabilities reasoning,memory,safety,evaluation exports them, --head lm silences this note"
                )
            bundle = export_bundle(
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
        from cosmos_export.cli.terminal import print_report

        print_report(error.report, stderr=True)
        fail(f"{error}. Nothing was written to {target}")

    proven = bundle.report.summary() if bundle.report else "NOT verified (--verify off)"
    if as_json:
        report = bundle.report.to_dict() if bundle.report else None
        seconds = {kind: round(value, 3) for kind, value in bundle.seconds.items()}
        click.echo(json.dumps({"bundle": str(target), "parity": report, "seconds": seconds}, indent=2))
    else:
        if bundle.report:
            from cosmos_export.cli.terminal import print_report

            print_report(bundle.report)
        click.echo(", ".join(f"{kind} {value:.1f} s" for kind, value in bundle.seconds.items() if value >= 0.05))
        click.echo(f"{target}: {proven}")


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
