"""What all commands share: how an error or Ctrl-C ends the program.

Exit codes: 0 done and proven, 1 an error or a failed verification, 2 wrong arguments, 130 interrupted.
"""

from __future__ import annotations

import sys
from typing import Any, NoReturn

import click

EXIT_ERROR = 1
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells count


class ExportGroup(click.Group):
    """A group whose commands end with one line "error: ..." instead of a traceback when the user can do something."""

    def invoke(self, ctx: click.Context) -> Any:
        from cosmos_export.errors import CosmosExportError
        from cosmos_runtime import CosmosRuntimeError

        try:
            return super().invoke(ctx)
        except (CosmosExportError, CosmosRuntimeError) as error:
            fail(str(error))
        except ModuleNotFoundError as error:
            if error.name not in ("torch", "onnx", "onnxscript", "onnx_ir", "safetensors", "rich"):
                raise
            fail(f'{error.name} is not installed: exporting needs pip install "cosmos-export[export,cpu]"')
        except KeyboardInterrupt:
            click.echo("\ninterrupted; nothing was written", err=True)
            sys.exit(EXIT_INTERRUPTED)


def fail(message: str) -> NoReturn:
    """Prints one error line and ends the program."""
    from cosmos_runtime import shown

    click.echo(f"error: {shown(' '.join(message.split()))}", err=True)
    sys.exit(EXIT_ERROR)
