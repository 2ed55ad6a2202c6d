"""When a model is verified layer by layer, and the report of that."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cosmos_export.checkpoint import Checkpoint
from cosmos_export.errors import ParityUnavailableError
from cosmos_export.model.loading import parameter_count
from cosmos_export.parity.calibrated import strayed, with_stored_levels
from cosmos_export.parity.cases import available_memory
from cosmos_export.parity.gates import QUALITY_GATES
from cosmos_export.parity.layer_cases import LayerCase, whole_rows
from cosmos_export.parity.layered import compare_layers
from cosmos_export.parity.report import ParityReport
from cosmos_export.parity.reporting import capabilities_of, report_of
from cosmos_export.progress import Progress
from cosmos_export.recipe import ExportRecipe
from cosmos_runtime import ONNX, Bundle, Manifest, Tokenizer, choose_graph

# Of a text, so many rows of so many tokens pass through every layer.
TEXT_ROWS, TEXT_LENGTH = 4, 64

# A model may take this share of the memory that is there: the rest is for what its cases compute.
_SHARE = 0.75


def too_large(manifest: Manifest, checkpoint: Checkpoint, progress: Progress) -> bool:
    """Whether the model does not fit into memory as verification holds it; says so to `progress`."""
    if manifest.graph_format != ONNX:
        return False
    needed, available = bytes_of_whole_model(checkpoint, manifest), available_memory()
    if needed <= _SHARE * available:
        return False
    progress.note(
        f"the model in float64, in the bundle's arithmetic and in a session takes about {needed / 2**30:.1f} GiB, and "
        f"{available / 2**30:.1f} GiB are available: it is compared layer by layer"
    )
    return True


def bytes_of_whole_model(checkpoint: Checkpoint, manifest: Manifest) -> int:
    """What comparing the whole graph holds at least: the model, with all weights of its capability heads, in float64
    and in float32, in 16 bits where that is computed with, and the weights of a session, mapped and as kernels want
    them."""
    activations = ExportRecipe.from_manifest(manifest.recipe).activations
    a_parameter = 8 + 4 + (0 if activations == "float32" else 2)
    stored = sum(entry.size for entry in manifest.files.values())
    return parameter_count(checkpoint.config, capabilities_of(manifest)) * a_parameter + 2 * stored


def verify_layers(
    bundle: Bundle,
    checkpoint: Checkpoint,
    *,
    causal: bool,
    provider: str,
    text: str | None,
    progress: Progress,
) -> ParityReport:
    """Compares a bundle with its model layer by layer. Raises ParityUnavailableError for what cannot be cut."""
    manifest = bundle.manifest
    _require_plain_onnx(manifest)
    recipe = ExportRecipe.from_manifest(manifest.recipe)
    _, spec = choose_graph(manifest)
    graph = bundle.file(spec.file)
    heads = capabilities_of(manifest)
    if recipe.calibration is not None and not checkpoint.calibrated:
        checkpoint = with_stored_levels(checkpoint, graph, recipe, heads)
    found = compare_layers(
        graph,
        spec,
        checkpoint,
        recipe,
        progress,
        causal=causal,
        provider=provider,
        with_quality=recipe.precision in QUALITY_GATES or text is not None,
        text=None if text is None else _rows(bundle, text),
        capabilities=heads,
    )
    stored = found.stored
    if recipe.calibration is not None:
        stored = stored.with_calibrated(len(checkpoint.calibrated), list(strayed(checkpoint, recipe, heads)))
    return report_of(
        manifest,
        checkpoint,
        provider,
        stored=[stored],
        cases=found.cases,
        skipped=tuple(found.skipped),
        quality=found.quality,
        pieces=tuple(found.pieces),
    )


def _require_plain_onnx(manifest: Manifest) -> None:
    if manifest.graph_format != ONNX:
        raise ParityUnavailableError(
            f"{manifest.name} is a {manifest.graph_format} program, which cannot be cut into layers; verify it whole, "
            f"without --layers, or export the checkpoint with `cosmos-export onnx`"
        )


def _rows(bundle: Bundle, text: str) -> Sequence[LayerCase]:
    """The first rows of a text. Raises TokenizerError where the bundle has no tokenizer, InputError for no text."""
    manifest = bundle.manifest
    if manifest.tokenizer is None:
        raise ParityUnavailableError(f"{manifest.name} has no tokenizer, so no text can be read; leave out --text")
    ids = np.array(Tokenizer.from_file(bundle.file(manifest.tokenizer)).encode(text), np.int64)
    length = min(TEXT_LENGTH, manifest.max_sequence_length, len(ids))
    rows = [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)][:TEXT_ROWS]
    if length < 2 or not rows:
        raise ParityUnavailableError("the text given has fewer than two tokens, so none can be predicted; give more")
    return [whole_rows(f"1 x {length} text", row[None]) for row in rows]
