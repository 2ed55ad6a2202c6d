"""The way of the data, one call an arrow:

    checkpoint ──► model (eager, as a skeleton) ──► traced program ──► graph passes ──► bundle ──► parity
        └───────────────────────────── float64 reference ───────────────────────────────────────────┘

Nothing flows back: a later stage never edits an earlier one's object. The bundle is built beside its target and takes
its place only when it has been proven, so a failed export leaves nothing behind.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cosmos_export.bundle import record_parity, seal, staged_folder, write_companions, write_graph
from cosmos_export.checkpoint import Checkpoint
from cosmos_export.errors import ParityError
from cosmos_export.model.loading import skeleton
from cosmos_export.onnx.passes import run_passes
from cosmos_export.onnx.signature import graph_spec
from cosmos_export.onnx.trace import trace
from cosmos_export.onnx.weights import attach_weights
from cosmos_export.parity.report import ParityReport
from cosmos_export.parity.verify import Effort, verify_bundle
from cosmos_export.progress import Progress, Silent
from cosmos_export.recipe import ExportRecipe
from cosmos_runtime import Manifest


@dataclass(frozen=True)
class ExportedBundle:
    """A finished export: where it is, what its manifest says, and what was proven (None when that was switched off)."""

    path: Path
    manifest: Manifest
    report: ParityReport | None


def export_onnx(
    checkpoint: Checkpoint,
    out: str | Path,
    recipe: ExportRecipe,
    *,
    causal: bool = True,
    effort: Effort = Effort.FULL,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> ExportedBundle:
    """Exports a checkpoint to a bundle at `out` and proves it equal to the model.

    Raises TargetError, CheckpointError or ExportError, and ParityError (its `report` says where) when the bundle is not
    equal to the model; in every case `out` is as it was before.
    """
    out, progress = Path(out), progress or Silent()
    with staged_folder(out, overwrite=overwrite) as folder:
        manifest = _build(folder, out.name, checkpoint, recipe, causal, progress)
        report = None
        if effort is not Effort.OFF:
            report = verify_bundle(folder, checkpoint, causal=causal, effort=effort, progress=progress)
            if not report.passed:
                raise ParityError(f"the exported graph is not equal to the model: {report.summary()}", report)
            manifest = record_parity(folder, manifest, report.digest())
    return ExportedBundle(out, manifest, report)


def _build(
    folder: Path, name: str, checkpoint: Checkpoint, recipe: ExportRecipe, causal: bool, progress: Progress
) -> Manifest:
    model = skeleton(checkpoint.config, causal=causal)
    specs = {graph: graph_spec(graph, checkpoint.config, recipe.opset) for graph in recipe.graphs}
    for graph, spec in specs.items():
        progress.stage(f"Tracing the {graph} graph")
        program = run_passes(trace(model, graph, spec))
        attach_weights(program, checkpoint)
        progress.stage(f"Writing {spec.file} and its weights")
        write_graph(folder, graph, spec.file, program)
    progress.stage("Sealing the bundle")
    write_companions(folder, checkpoint)
    return seal(folder, name, checkpoint, recipe, specs, causal)
