"""A report's facts that do not depend on how a bundle was compared."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import onnxruntime

from cosmos_export.checkpoint import Checkpoint
from cosmos_export.parity.report import CaseResult, ParityReport
from cosmos_export.parity.stored import StoredTensors
from cosmos_export.recipe import ExportRecipe
from cosmos_runtime import Manifest


def report_of(
    manifest: Manifest,
    checkpoint: Checkpoint,
    provider: str,
    *,
    stored: Sequence[StoredTensors],
    cases: Sequence[CaseResult],
    **more: Any,
) -> ParityReport:
    """The report of a bundle of this manifest that was run on `provider`; `more` are other fields of the report."""
    return ParityReport(
        bundle=manifest.name,
        source=dict(manifest.source),
        precision=ExportRecipe.from_manifest(manifest.recipe).precision,
        provider=provider,
        versions={"onnxruntime": onnxruntime.__version__, "torch": version("torch")},
        max_sequence_length=checkpoint.config.max_sequence_length,
        stored=tuple(stored),
        cases=tuple(cases),
        **more,
    )


def capabilities_of(manifest: Manifest) -> tuple[str, ...] | None:
    """The capability heads of a bundle; None for a plain decoder."""
    return None if manifest.capabilities is None else tuple(manifest.capabilities["names"])
