"""What all commands share: how an error or Ctrl-C ends the program."""

from typing import Any

import click

from cosmos_runtime.errors import CosmosRuntimeError
from cosmos_runtime.quoting import shown

EXIT_ERROR = 1
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells count


class RuntimeGroup(click.Group):
    """A group whose commands end with one line "error: ..." and exit code 1, or 130 after Ctrl-C."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command and turn the package's errors into an exit code."""
        try:
            return super().invoke(ctx)
        except CosmosRuntimeError as error:
            click.echo(f"error: {shown(' '.join(str(error).split()))}", err=True)
            ctx.exit(EXIT_ERROR)
        except KeyboardInterrupt:
            click.echo("\ninterrupted", err=True)
            ctx.exit(EXIT_INTERRUPTED)
