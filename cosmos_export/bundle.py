"""Writes bundles whole: beside the target, checked, sealed with a manifest, then renamed into place."""

from __future__ import annotations

import contextlib
import errno
import os
import platform
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cosmos_export.checkpoint import CONFIG, TOKENIZER, Checkpoint
from cosmos_export.config import GEOMETRY, CosmosAdvancedConfig
from cosmos_export.errors import CosmosExportError, TargetError
from cosmos_export.folders import (
    PARITY_SCRATCH,
    abandoned_folders,
    claimed_folder,
    clear_abandoned,
    exchange,
    sync,
    sync_entry,
)
from cosmos_export.hashing import described_meanwhile
from cosmos_export.model.capabilities import diagnostic_settings, entries_read
from cosmos_export.model.loading import parameter_count
from cosmos_export.onnx.signature import weights_file
from cosmos_export.progress import Progress, Silent
from cosmos_export.recipe import ExportRecipe
from cosmos_runtime import (
    MANIFEST_NAME,
    ONNX,
    FileEntry,
    GraphSpec,
    Manifest,
    __version__,
    check_graphs,
    describe_file,
    graph_operators,
)

if TYPE_CHECKING:
    import onnx_ir as ir

# What logits are read from, as a manifest says it: the decoder's hidden states, or what the capability heads make of a
# row's last one.
LM_HEAD, FUSED_HEAD = "lm", "fused"

# What was installed at export, for whoever has to make the same bundle again.
_RECORDED_PACKAGES = ("torch", "onnx", "onnxscript", "onnx-ir", "onnxruntime", "onnxruntime-gpu", "numpy", "tokenizers")

# Smaller initializers stay inside the graph file: a separate read and page for each would cost more than it saves.
_EXTERNAL_FROM_BYTES = 1024


# What a disk says that has no room left, for this user or in one file.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

# A bundle that makes room for another, in a folder of `claimed_folder`.
_REPLACED = "replaced"


@contextlib.contextmanager
def staged_folder(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A folder beside `target` to build a bundle in; it becomes `target` when the block ends without an exception.

    With an exception it is removed and `target` is as it was; what a killed export of `target` left behind is removed
    first. Raises TargetError when `target` exists (a bundle may be replaced with `overwrite`, anything else never),
    cannot be made, or the disk is full.
    """
    _clear_up_after_the_killed(target)
    _check_target(target, overwrite)
    with contextlib.ExitStack() as stack:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            staging = stack.enter_context(claimed_folder(target.parent, _prefix(target)))
        except OSError as error:
            raise TargetError(f"{target} cannot be written: {error.strerror} ({error.filename})") from None
        try:
            yield staging
            staging.chmod(0o755)  # it was made private
            sync(staging)
            _put_in_place(staging, target, overwrite)
        except OSError as error:
            if not _is_full(error):
                raise
            raise _disk_full(target, error) from error


def write_graph(
    folder: Path,
    graph: str,
    file: str,
    model: ir.Model,
    *,
    external_from: int | None = None,
    progress: Progress | None = None,
) -> dict[str, FileEntry]:
    """Writes one graph and its weights, tensor by tensor as they are read; those of fewer than `external_from` bytes
    into the graph's file. `progress` hears of every tensor's bytes.

    Returns the size and hash of the file of weights, by its name; the manifest has them so without reading it again.
    """
    import onnx_ir as ir  # which who opens a PyTorch program has no use for

    smallest = _EXTERNAL_FROM_BYTES if external_from is None else external_from
    sizes = [value.const_value.nbytes for g in model.graphs() for value in g.initializers.values() if value.const_value]
    total, progress = sum(size for size in sizes if size > smallest), progress or Silent()
    weights = weights_file(graph)
    with _unwrapped(), described_meanwhile(folder / weights) as entry:
        ir.save(
            model,
            folder / file,
            external_data=weights,
            size_threshold_bytes=smallest,
            callback=lambda _, written: progress.wrote(written.offset, total),
        )
    progress.wrote(total, total)
    described = entry.result()
    return {} if described is None else {weights: described}


@contextlib.contextmanager
def _unwrapped() -> Iterator[None]:
    """onnx_ir has an error of its own around one that reading a tensor raised, which is what the user has to see."""
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, CosmosExportError):
            cause = cause.__cause__ or cause.__context__
        if cause is None:
            raise
        raise cause from None


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
    described: Mapping[str, FileEntry] | None = None,
) -> Manifest:
    """Writes the manifest over every file of `folder`, with no parity result yet, and returns it.

    `capabilities` are those of a model with heads; None is the plain decoder. `described` are files that were hashed
    while they were written.
    """
    files = {path.name: path for path in sorted(folder.iterdir()) if path.name != MANIFEST_NAME}
    manifest = manifest_of(name, checkpoint, recipe, graphs, files, causal, capabilities, described)
    check_graphs(folder, manifest)  # what this runtime would refuse is not worth shipping
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
    described: Mapping[str, FileEntry] | None = None,
) -> Manifest:
    """What a manifest says of these graphs of a checkpoint, with no parity result; `files` by their names in it, the
    entries of some `described` already."""
    graph_files = [path for file, path in files.items() if file.endswith(".onnx")]
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
        files={file: (described or {}).get(file) or describe_file(path) for file, path in files.items()},
        parity=None,
        capabilities=_heads(checkpoint.config, capabilities),
        graph_format=recipe.format,
        operators=graph_operators(graph_files) if recipe.format == ONNX else None,
    )


def record_parity(folder: Path, manifest: Manifest, parity: Mapping[str, Any] | None) -> Manifest:
    """Writes the manifest again, with what verification found."""
    manifest = replace(manifest, parity=parity)
    _write_manifest(folder, manifest)
    return manifest


def _write_manifest(folder: Path, manifest: Manifest) -> None:
    (folder / MANIFEST_NAME).write_bytes(manifest.to_json().encode())  # its digest is of these bytes


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


def _prefix(target: Path) -> str:
    return f".{target.name}.partial-"


def _clear_up_after_the_killed(target: Path) -> None:
    """Removes the unfinished folders of exports that were killed. One may have been so between the two renames of
    `_put_in_place`: then the old bundle comes back."""
    for folder in abandoned_folders(target.parent, _prefix(target)):
        old = folder / _REPLACED
        if (old / MANIFEST_NAME).is_file() and not target.exists() and not target.is_symlink():
            old.rename(target)
        shutil.rmtree(folder, ignore_errors=True)
    clear_abandoned(target.parent, PARITY_SCRATCH)


def _put_in_place(staging: Path, target: Path, overwrite: bool) -> None:
    """Renames `staging` to `target`. A bundle that was there swaps places with it, and is removed as what is staged is;
    who has its files open, keeps them."""
    _check_target(target, overwrite)  # someone else may have been faster
    if not target.exists():
        staging.rename(target)
    elif not exchange(staging, target):
        _replace_in_two_steps(staging, target)
    with contextlib.suppress(OSError):  # the bundle is in its place; not every file system has its folders synced
        sync_entry(target.parent)


def _replace_in_two_steps(staging: Path, target: Path) -> None:
    """The old bundle moves aside first, and back if the rename fails."""
    with claimed_folder(target.parent, _prefix(target)) as folder:
        aside = folder / _REPLACED
        target.rename(aside)
        try:
            staging.rename(target)
        except BaseException:
            aside.rename(target)
            raise


def _is_full(error: OSError) -> bool:
    """Whether an error says that the disk took no more; numpy's says it in words alone."""
    return error.errno in _FULL or (error.errno is None and "requested and" in str(error))


def _disk_full(target: Path, error: OSError) -> TargetError:
    reason = error.strerror or f"{os.strerror(errno.ENOSPC)} (bytes: {error})"
    return TargetError(
        f"{target} cannot be written: {reason}; free some room there, or give another --out. Nothing was left behind"
    )
