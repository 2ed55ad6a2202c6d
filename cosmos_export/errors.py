"""What can go wrong on the build machine: one exception a cause, all under `CosmosExportError`.

Every message says what was wrong, what was expected, what was given and what to do next.
The command line prints it as one line and exits with 1; anything else is a defect and shows its traceback.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cosmos_runtime import InputError

if TYPE_CHECKING:
    from cosmos_export.parity.report import ParityReport


class CosmosExportError(Exception):
    """Base of every error that the user can act on."""


class ConfigError(CosmosExportError, ValueError):
    """A model configuration that no model can be built from, or a name that it does not have."""


class PromptError(ConfigError, InputError):
    """Token ids that the eager model cannot take; sessions raise the InputError that it also is."""


class CheckpointError(CosmosExportError):
    """A checkpoint folder that is incomplete, unreadable, or does not fit its config.json."""


class RecipeError(CosmosExportError, ValueError):
    """An export recipe that does not exist, or asks for what the model or the tool cannot give."""


class ExportError(CosmosExportError):
    """Tracing or a graph pass did not give the graph that was asked for."""


class TargetError(CosmosExportError):
    """The folder that a bundle should be written to exists already, or cannot be written."""


class ParityError(CosmosExportError):
    """A bundle is not equal to its model within the gates; `report` holds every case that was run."""

    def __init__(self, message: str, report: ParityReport) -> None:
        super().__init__(message)
        self.report = report


class ParityUnavailableError(CosmosExportError):
    """A comparison that this bundle, or this machine, does not allow."""
