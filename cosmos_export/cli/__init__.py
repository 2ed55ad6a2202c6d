"""`cosmos-export`: registers the commands, no more. One file a command; heavy imports happen inside them."""

from __future__ import annotations

import click

from cosmos_export.cli.diff import diff_command
from cosmos_export.cli.generate import generate_command
from cosmos_export.cli.group import ExportGroup
from cosmos_export.cli.onnx import onnx_command
from cosmos_export.cli.pt2 import pt2_command
from cosmos_export.cli.sign import sign_command
from cosmos_export.cli.torchscript import torchscript_command
from cosmos_export.cli.verify import verify_command


@click.group(cls=ExportGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="cosmos-export", prog_name="cosmos-export")
def main() -> None:
    """Export Cosmos Advanced checkpoints to bundles that are proven equal to the model.

    `onnx` makes bundles that `cosmos-run` and ONNX Runtime run without PyTorch; `torchscript` and `pt2` make programs
    that load with PyTorch alone. `verify` and `generate` take bundles of every format.

    \b
    Examples:
      cosmos-export onnx                                        # the demo model
      cosmos-export onnx --checkpoint my-model --out my-bundle
      cosmos-export torchscript --checkpoint my-model            # for torch.jit.load, from Python or C++
      cosmos-export pt2 --checkpoint my-model                    # for torch.export.load
      cosmos-export verify my-bundle
      cosmos-export sign my-bundle --key private.pem
      cosmos-run generate my-bundle --prompt "Once upon a time"
    """


main.add_command(onnx_command)
main.add_command(torchscript_command)
main.add_command(pt2_command)
main.add_command(verify_command)
main.add_command(diff_command)
main.add_command(generate_command)
main.add_command(sign_command)
