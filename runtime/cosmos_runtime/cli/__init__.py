"""`cosmos-run`: look into bundles, generate and score text with them, measure them. Registers commands, no more."""

import click

from cosmos_runtime.cli.bench import bench_command
from cosmos_runtime.cli.check import check_command
from cosmos_runtime.cli.generate import generate_command
from cosmos_runtime.cli.group import RuntimeGroup
from cosmos_runtime.cli.inspect import inspect_command
from cosmos_runtime.cli.score import score_command


@click.group(cls=RuntimeGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="cosmos-export", prog_name="cosmos-run")
def main() -> None:
    """Run bundles made by cosmos-export, without PyTorch.

    A bundle is a folder with a manifest.json, ONNX graphs and, where the model has one, a tokenizer.

    \b
    Examples:
      cosmos-run check bundles/demo
      cosmos-run inspect bundles/demo
      cosmos-run generate bundles/demo --prompt "Once upon a time"
      cosmos-run score bundles/demo --text "Once upon a time there was a cat."
      cosmos-run bench bundles/demo
    """


for command in (bench_command, check_command, generate_command, inspect_command, score_command):
    main.add_command(command)
