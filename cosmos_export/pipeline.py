"""The way of the data, one call an arrow:

    checkpoint ──► model (eager, as a skeleton) ──► traced program ──► graph passes ──► bundle ──► parity
        └───────────────────────────── float64 reference ───────────────────────────────────────────┘

Nothing flows back: a later stage never edits an earlier one's object. The bundle is built beside its target and takes
its place only when it has been proven, so a failed export leaves nothing behind.

What an export may do without (verification, calibration, other formats) is imported where it is done.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from cosmos_export.bundle import record_parity, seal, staged_folder, write_companions, write_graph
from cosmos_export.calibration.plan import MOST_PARAMETERS
from cosmos_export.checkpoint import Checkpoint
from cosmos_export.checkpoint_checks import check_tokenizer
from cosmos_export.config import CosmosAdvancedConfig
from cosmos_export.errors import ParityError
from cosmos_export.garbage import uncollected
from cosmos_export.model.capabilities import capability_set
from cosmos_export.model.loading import parameter_count
from cosmos_export.onnx.fused_attention import HEAD_DIM_MULTIPLE
from cosmos_export.onnx.genai import write_genai
from cosmos_export.onnx.passes import run_passes
from cosmos_export.onnx.signature import graph_spec
from cosmos_export.onnx.trace import trace, traceable
from cosmos_export.onnx.weights import attach_weights, require_weights
from cosmos_export.parity.effort import Effort
from cosmos_export.progress import Progress, Silent
from cosmos_export.recipe import ExportRecipe
from cosmos_export.stopwatch import CALIBRATING, SEALING, TRACING, VERIFYING, WRITING, Stopwatch
from cosmos_runtime import DECODER, DEVICE_LOOP, ONNX, TORCHSCRIPT, FileEntry, GraphSpec, Manifest

if TYPE_CHECKING:
    from cosmos_export.parity.report import ParityReport

# The signatures of the graphs or programs, and what is known already of files: their sizes and hashes.
_Written = tuple[dict[str, GraphSpec], dict[str, FileEntry]]


@dataclass(frozen=True)
class ExportedBundle:
    """A finished export: where it is, what its manifest says, what was proven (None when that was switched off), and
    where the seconds went: reading, quantising and writing the weights, and the rest, each counted once."""

    path: Path
    manifest: Manifest
    report: ParityReport | None
    seconds: Mapping[str, float] = field(default_factory=dict)


def export_bundle(
    checkpoint: Checkpoint,
    out: str | Path,
    recipe: ExportRecipe,
    *,
    causal: bool = True,
    capabilities: Iterable[str] | None = None,
    effort: Effort = Effort.FULL,
    calibration_text: Path | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> ExportedBundle:
    """Exports a checkpoint to a bundle at `out` and proves it equal to the model.

    With `capabilities` it is the model with these heads (with an empty list, their fusion alone); with None the plain
    decoder. Where the recipe asks for a calibration, it is on `calibration_text`, or on text that the model writes.
    Raises RecipeError, TargetError, CheckpointError or ExportError, and ParityError (its `report` says where) when the
    bundle is not equal to the model; in every case `out` is as it was before.
    """
    out, progress = Path(out), progress or Silent()
    heads = None if capabilities is None else capability_set(capabilities)
    recipe.check_fits(checkpoint.config, causal=causal)
    with uncollected():  # what builds the first skeleton imports a good part of PyTorch
        require_weights(checkpoint, heads)  # before anything is traced
    check_tokenizer(checkpoint.tokenizer, checkpoint.config.vocab_size)
    recipe = _for_heads(recipe, heads, progress)
    stopwatch = Stopwatch()
    # What is not otherwise counted is sealing: hashing, and, when the block ends, waiting until all is on the disk.
    with stopwatch.during(SEALING), staged_folder(out, overwrite=overwrite) as folder:
        with stopwatch.during(CALIBRATING):
            checkpoint, recipe = _calibrated(checkpoint, recipe, heads, calibration_text, progress)
        manifest = _build(folder, out.name, checkpoint, recipe, causal, heads, progress, stopwatch)
        report = None
        if effort is not Effort.OFF:
            from cosmos_export.parity.verify import verify_bundle

            with stopwatch.during(VERIFYING):
                report = verify_bundle(
                    folder,
                    checkpoint,
                    causal=causal,
                    effort=effort,
                    trusted=True,  # its files were hashed a moment ago
                    progress=progress,
                )
            if not report.passed:
                raise ParityError(f"the exported graph is not equal to the model: {report.summary()}", report)
            manifest = record_parity(folder, manifest, report.digest())
    return ExportedBundle(out, manifest, report, stopwatch.by_kind())


def _build(
    folder: Path,
    name: str,
    checkpoint: Checkpoint,
    recipe: ExportRecipe,
    causal: bool,
    heads: Sequence[str] | None,
    progress: Progress,
    stopwatch: Stopwatch,
) -> Manifest:
    written = _torch_program if recipe.format != ONNX else _onnx_graphs
    graphs, described = written(folder, checkpoint, recipe, causal, heads, progress, stopwatch)
    progress.stage("Sealing the bundle")
    write_companions(folder, checkpoint)
    return seal(folder, name, checkpoint, recipe, graphs, causal, heads, described)


def _torch_program(
    folder: Path,
    checkpoint: Checkpoint,
    recipe: ExportRecipe,
    causal: bool,
    heads: Sequence[str] | None,
    progress: Progress,
    stopwatch: Stopwatch,
) -> _Written:
    from cosmos_export.torch_programs.build import write_torch_program

    if recipe.format == TORCHSCRIPT:
        from cosmos_export.torch_programs.torchscript import EXPLAINED

        progress.note(EXPLAINED)
    progress.stage(f"Tracing and writing the {recipe.graphs[0]} program")
    with stopwatch.during(TRACING):
        return write_torch_program(folder, checkpoint, recipe, causal=causal, capabilities=heads), {}


def _onnx_graphs(
    folder: Path,
    checkpoint: Checkpoint,
    recipe: ExportRecipe,
    causal: bool,
    heads: Sequence[str] | None,
    progress: Progress,
    stopwatch: Stopwatch,
) -> _Written:
    config, loop = checkpoint.config, DEVICE_LOOP in recipe.graphs
    fused = _fuses_attention(recipe, config, progress)
    model = traceable(config, recipe.activations, causal=causal, fused_attention=fused, capabilities=heads)
    specs = {
        graph: graph_spec(
            graph,
            config,
            recipe.opset,
            activations=recipe.activations,
            by_lengths=loop,
            capabilities=heads,
            on_demand=recipe.branches,
        )
        for graph in recipe.graphs
        if graph != DEVICE_LOOP
    }
    described: dict[str, FileEntry] = {}
    for graph, spec in specs.items():
        progress.stage(f"Tracing the {graph} graph")
        with stopwatch.during(TRACING), uncollected():
            program = run_passes(trace(model, graph, spec, fused_attention=fused), recipe)
        attach_weights(program, checkpoint, recipe, heads, stopwatch)
        progress.stage(f"Writing {spec.file} and its weights")
        with stopwatch.during(WRITING):
            smallest = _smallest_apart(loop)
            described |= write_graph(folder, graph, spec.file, program, external_from=smallest, progress=progress)
    if loop:
        from cosmos_export.onnx.device_loop import write_samplers

        _write_kernels(folder, specs[DECODER].file, config, recipe, progress)
        specs |= write_samplers(folder, config)
    elif DECODER in specs and fused and heads is None:
        write_genai(folder, specs[DECODER].file, config)
    return specs, described


def _smallest_apart(loop: bool) -> int | None:
    """From how many bytes on a weight lies outside the graph's file; None for what is usual."""
    if not loop:
        return None
    from cosmos_export.onnx.decode_kernels import EXTERNAL_FROM_BYTES

    return EXTERNAL_FROM_BYTES


def _write_kernels(
    folder: Path, graph_file: str, config: CosmosAdvancedConfig, recipe: ExportRecipe, progress: Progress
) -> None:
    from cosmos_export.onnx.decode_kernels import why_not, write_decode_kernels

    reason = why_not(config, recipe)
    if reason is None:
        write_decode_kernels(folder, graph_file, config, recipe)
    else:
        progress.note(f"single tokens are decoded by ONNX Runtime, more slowly than by the runtime's kernels: {reason}")


def _for_heads(recipe: ExportRecipe, heads: Sequence[str] | None, progress: Progress) -> ExportRecipe:
    """The recipe without what a model with capability heads has no use for."""
    if heads is None or DEVICE_LOOP not in recipe.graphs:
        return recipe
    progress.note("every token of a model with capability heads is a call of its own: it is chosen on the host")
    return replace(recipe, graphs=tuple(graph for graph in recipe.graphs if graph != DEVICE_LOOP))


def _calibrated(
    checkpoint: Checkpoint,
    recipe: ExportRecipe,
    heads: Sequence[str] | None,
    text: Path | None,
    progress: Progress,
) -> tuple[Checkpoint, ExportRecipe]:
    """Both with the calibration done, or without one where there is nothing to gain or no room."""
    plan = recipe.calibration
    if plan is None:
        return checkpoint, recipe
    parameters = parameter_count(checkpoint.config, heads)
    if checkpoint.origin.get("kind") == "preset":
        progress.note("random weights write no text: the weights are rounded without a calibration")
    elif parameters > MOST_PARAMETERS:
        progress.note(
            f"{parameters:,} parameters are more than a calibration takes ({MOST_PARAMETERS:,}): "
            f"each block of weights is rounded by itself. Recipe cpu-int4-quick is made for that"
        )
    else:
        from cosmos_export.calibration.calibrate import calibrate

        return replace(checkpoint, calibrated=calibrate(checkpoint, recipe, plan, text, progress, heads)), recipe
    return checkpoint, replace(recipe, calibration=None)


def _fuses_attention(recipe: ExportRecipe, config: CosmosAdvancedConfig, progress: Progress) -> bool:
    fused = recipe.fuses_attention(config)
    if recipe.dialect == "ort" and DECODER in recipe.graphs and not fused:
        progress.note(
            f"head_dim {config.head_dim} is no multiple of {HEAD_DIM_MULTIPLE}, which the fused attention wants: "
            f"attention is exported in standard operators, and decodes more slowly"
        )
    return fused
