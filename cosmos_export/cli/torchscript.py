"""`cosmos-export torchscript`: a checkpoint becomes a verified TorchScript file in a bundle."""

from __future__ import annotations

from typing import Any

import click

from cosmos_export.cli.exporting import export_options, run_export
from cosmos_runtime import TORCHSCRIPT


@click.command("torchscript")
@export_options(TORCHSCRIPT)
def torchscript_command(**options: Any) -> None:
    """Export a model to TorchScript and prove the file equal to it.

    The bundle's model.pt loads with torch.jit.load, or torch::jit::load in C++, without this package: prefill and
    decode for any prompt, batch and cache within the model's maximum. PyTorch calls TorchScript deprecated; its
    successor is `cosmos-export pt2`.

    \b
    Examples:
      cosmos-export torchscript
      cosmos-export torchscript --checkpoint my-model --recipe torchscript-bf16
      cosmos-export torchscript --recipe torchscript-full-sequence --capabilities memory,safety
    """
    run_export(TORCHSCRIPT, **options)
