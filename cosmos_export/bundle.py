"""Writes bundles whole: beside the target, checked, sealed with a manifest, then renamed into place."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cosmos_export.checkpoint import CONFIG, TOKENIZER, Checkpoint
from cosmos_export.config import GEOMETRY, CosmosAdvancedConfig
from cosmos_export.errors import TargetError
from cosmos_export.model.capabilities import diagnostic_settings, entries_read
from cosmos_export.model.loading import parameter_count
from cosmos_export.onnx.signature import weights_file
from cosmos_export.recipe import ExportRecipe
from cosmos_runtime import MANIFEST_NAME, GraphSpec, Manifest, __version__, describe_file

if TYPE_CHECKING:
    import onnx_ir as ir

# What logits are read from, as a manifest says it: the decoder's hidden states, or what the capability heads make of a
# row's last one.
LM_HEAD, FUSED_HEAD = "lm", "fused"

# What was installed at export, for whoever has to make the same bundle again.
_RECORDED_PACKAGES = ("torch", "onnx", "onnxscript", "onnx-ir", "onnxruntime", "onnxruntime-gpu", "numpy", "tokenizers")

# Smaller initializers stay inside the graph file: a separate read and page for each would cost more than it saves.
_EXTERNAL_FROM_BYTES = 1024


@contextlib.contextmanager
def staged_folder(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A folder beside `target` to build a bundle in; it becomes `target` when the block ends without an exception.

    With an exception it is removed and `target` is as it was. Raises TargetError when `target` exists (a bundle may be
    replaced with `overwrite`, anything else never) or cannot be made.
    """
    _check_target(target, overwrite)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
    except OSError as error:
        raise TargetError(f"{target} cannot be written: {error.strerror} ({error.filename})") from None
    try:
        yield staging
        _sync(staging)
        staging.chmod(0o755)  # mkdtemp makes it private
        _put_in_place(staging, target, overwrite)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def write_graph(folder: Path, graph: str, file: str, model: ir.Model, *, external_from: int | None = None) -> None:
    """Writes one graph and its weights, tensor by tensor as they are read; those of fewer than `external_from` bytes
    into the graph's file."""
    import onnx_ir as ir  # which who opens a PyTorch program has no use for

    smallest = _EXTERNAL_FROM_BYTES if external_from is None else external_from
    ir.save(model, folder / file, external_data=weights_file(graph), size_threshold_bytes=smallest)


def write_companions(folder: Path, checkpoint: Checkpoint) -> None:
    """Writes what belongs to the model beside its graphs: config.json, and tokenizer.json where there is one."""
    checkpoint.config.save(folder / CONFIG)
    if checkpoint.tokenizer is not None:
        shutil.copyfile(checkpoint.tokenizer, folder / TOKENIZER)


def seal(
    folder: Path,
    name: str,
    checkpoint: Checkpoint,
    recipe: ExportRecipe,
    graphs: Mapping[str, GraphSpec],
    causal: bool,
    capabilities: Sequence[str] | None = None,
) -> Manifest:
    """Writes the manifest over every file of `folder`, with no parity result yet, and returns it.

    `capabilities` are those of a model with heads; None is the plain decoder.
    """
    files = {path.name: path for path in sorted(folder.iterdir()) if path.name != MANIFEST_NAME}
    manifest = manifest_of(name, checkpoint, recipe, graphs, files, causal, capabilities)
    _write_manifest(folder, manifest)
    return manifest


def manifest_of(
    name: str,
    checkpoint: Checkpoint,
    recipe: ExportRecipe,
    graphs: Mapping[str, GraphSpec],
    files: Mapping[str, Path],
    causal: bool,
    capabilities: Sequence[str] | None = None,
) -> Manifest:
    """What a manifest says of these graphs of a checkpoint, with no parity result; `files` by their names in it."""
    return Manifest(
        name=name,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        tool={"name": "cosmos-export", "version": __version__},
        versions=_installed_versions(),
        source=dict(checkpoint.origin),
        recipe=recipe.to_dict(),
        model=_model_facts(checkpoint, causal, capabilities),
        generation=checkpoint.config.generation.to_dict(),
        graphs=dict(graphs),
        tokenizer=TOKENIZER if TOKENIZER in files else None,
        files={file: describe_file(path) for file, path in files.items()},
        parity=None,
        capabilities=_heads(checkpoint.config, capabilities),
        graph_format=recipe.format,
    )


def record_parity(folder: Path, manifest: Manifest, parity: Mapping[str, Any] | None) -> Manifest:
    """Writes the manifest again, with what verification found."""
    manifest = replace(manifest, parity=parity)
    _write_manifest(folder, manifest)
    return manifest


def _write_manifest(folder: Path, manifest: Manifest) -> None:
    (folder / MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8")


def _model_facts(checkpoint: Checkpoint, causal: bool, capabilities: Sequence[str] | None) -> dict[str, Any]:
    config = checkpoint.config
    geometry = {name: getattr(config, name) for name in GEOMETRY}
    head = LM_HEAD if capabilities is None else FUSED_HEAD
    return {**geometry, "causal": causal, "head": head, "parameters": parameter_count(config, capabilities)}


def _heads(config: CosmosAdvancedConfig, capabilities: Sequence[str] | None) -> dict[str, Any] | None:
    """What a manifest says of capability heads: which there are, what their reports follow from, and how many entries
    the working memory keeps, and has room for at least."""
    if capabilities is None:
        return None
    size = config.memory.working_memory_size
    memory = {"size": size, "least": entries_read(size)} if "memory" in capabilities else None
    settings = diagnostic_settings(config, capabilities)
    return {"names": list(capabilities), "settings": settings, "memory": memory}


def _installed_versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in _RECORDED_PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    return versions


def _check_target(target: Path, overwrite: bool) -> None:
    if not target.exists() and not target.is_symlink():
        return
    replaceable = target.is_dir() and not target.is_symlink()
    if not overwrite or not replaceable:
        cure = "give another --out, or --overwrite to replace a bundle" if replaceable else "give another --out"
        raise TargetError(f"{target} exists already; {cure}")
    if any(target.iterdir()) and not (target / MANIFEST_NAME).is_file():
        raise TargetError(
            f"{target} is not a bundle (it has no {MANIFEST_NAME}), so it is not replaced; give another --out"
        )


def _sync(folder: Path) -> None:
    for path in (*folder.iterdir(), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _put_in_place(staging: Path, target: Path, overwrite: bool) -> None:
    """Renames `staging` to `target`. A bundle that is replaced moves aside first, and back if the rename fails."""
    _check_target(target, overwrite)  # someone else may have been faster
    if not target.exists():
        staging.rename(target)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent)) / "old"
    target.rename(aside)
    try:
        staging.rename(target)
    except BaseException:
        aside.rename(target)
        raise
    finally:
        shutil.rmtree(aside.parent, ignore_errors=True)
