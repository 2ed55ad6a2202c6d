"""`cosmos-export pt2`: a checkpoint becomes a verified exported program in a bundle."""

from __future__ import annotations

from typing import Any

import click

from cosmos_export.cli.exporting import export_options, run_export
from cosmos_runtime import PT2


@click.command("pt2")
@export_options(PT2)
def pt2_command(**options: Any) -> None:
    """Export a model as a program of torch.export and prove it equal to the model.

    The bundle's model.pt2 loads with torch.export.load, without this package: prefill and decode for any prompt, batch
    and cache within the model's maximum. The manifest names its arguments and their axes.

    \b
    Examples:
      cosmos-export pt2
      cosmos-export pt2 --checkpoint my-model --out my-program
    """
    run_export(PT2, **options)
