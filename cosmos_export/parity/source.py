"""Which checkpoint a bundle has to equal: the one its manifest names, unless the user names another."""

from __future__ import annotations

from pathlib import Path

from cosmos_export.checkpoint import Checkpoint
from cosmos_export.errors import CheckpointError
from cosmos_export.model.loading import preset_checkpoint
from cosmos_runtime import Manifest


def checkpoint_of(manifest: Manifest, folder: Path | None = None) -> Checkpoint:
    """Opens the checkpoint that a bundle was made from, or the one in `folder`, in the bundle's head layout.

    Raises CheckpointError when the recorded folder is no longer there.
    """
    source = manifest.source
    if folder is None and source["kind"] == "preset":
        heads = manifest.capabilities["names"] if manifest.capabilities is not None else None
        return preset_checkpoint(source["location"], int(source.get("seed", 0)), heads)
    folder = folder or Path(source["location"])
    if not folder.is_dir():
        raise CheckpointError(f"the checkpoint of this bundle is not at {folder}; say where it is with --checkpoint")
    return Checkpoint.open(folder, head_layout=source.get("head_layout", "interleave"))
