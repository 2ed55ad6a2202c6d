"""`cosmos-run`: look into exported bundles and generate text with them. Commands are registered here, no more."""

import click

from cosmos_runtime.cli.generate import generate_command
from cosmos_runtime.cli.group import RuntimeGroup
from cosmos_runtime.cli.inspect import inspect_command


@click.group(cls=RuntimeGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="cosmos-export", prog_name="cosmos-run")
def main() -> None:
    """Run bundles made by cosmos-export, without PyTorch.

    A bundle is a folder with a manifest.json, ONNX graphs and, where the model has one, a tokenizer.

    \b
    Examples:
      cosmos-run inspect bundles/demo --check
      cosmos-run generate bundles/demo --prompt "Once upon a time"
    """


main.add_command(generate_command)
main.add_command(inspect_command)
