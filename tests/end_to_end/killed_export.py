"""Exports of a tiny model over an older bundle that end too soon. Run by the tests, in a process of its own:

    python killed_export.py FOLDER

FOLDER/kill/POINT/bundle was killed with SIGKILL at each of POINTS; FOLDER/watch/NUMBER is a copy of what lay on the
disk before each change to it; FOLDER/full/bundle met a disk that does not take all the weights. Prints JSON: the points
with the signal that ended the export; what the changes were; the error.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from cosmos_export import bundle as bundles
from cosmos_export import pipeline
from cosmos_export.checkpoint import Checkpoint
from cosmos_export.config import CosmosAdvancedConfig
from cosmos_export.errors import TargetError
from cosmos_export.model.loading import random_checkpoint
from cosmos_export.parity.verify import Effort
from cosmos_export.pipeline import export_bundle
from cosmos_export.recipe import ExportRecipe

CONFIG = CosmosAdvancedConfig(
    dim=32, n_layers=1, head_dim=16, hidden_dim=32, n_heads=2, n_kv_heads=1, vocab_size=64, max_sequence_length=16
)
# What Python tells of before it changes something on the disk: https://docs.python.org/3/library/audit_events.html
CHANGES = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "os.link", "os.truncate")


def checkpoint(seed: int) -> Checkpoint:
    return random_checkpoint(CONFIG, name=f"tiny-{seed}", seed=seed)


def export(out: Path, seed: int, effort: Effort = Effort.QUICK) -> None:
    export_bundle(checkpoint(seed), out, ExportRecipe.load("cpu-fp32"), effort=effort, overwrite=True)


def die(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def before(module: object, name: str) -> None:
    setattr(module, name, die)


def after(module: object, name: str) -> None:
    real: Callable[..., object] = getattr(module, name)
    setattr(module, name, lambda *a, **k: (real(*a, **k), die()))


POINTS: dict[str, Callable[[], None]] = {
    "written": lambda: after(pipeline, "write_graph"),
    "proven": lambda: before(pipeline, "record_parity"),
    "swapped": lambda: after(bundles, "exchange"),
}


def kill(folder: Path, old: Path) -> dict[str, int]:
    signals = {}
    for point, arm in POINTS.items():
        shutil.copytree(old, folder / point / "bundle")
        child = os.fork()
        if child == 0:
            arm()
            export(folder / point / "bundle", 2)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        signals[point] = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    return signals


def watch(folder: Path, old: Path) -> list[str]:
    place = folder / "watched"
    shutil.copytree(old, place / "bundle")
    changes: list[str] = []
    copying = False

    def copy(what: str) -> None:
        nonlocal copying
        if not copying:
            copying = True
            shutil.copytree(place, folder / str(len(changes)), symlinks=True)
            changes.append(what)
            copying = False

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if event in CHANGES and not (event == "open" and not _writes(arguments)):
            copy(f"{event} {arguments[0]}")

    for name in ("fsync", "replace"):
        _announce(os, name, copy)
    _announce(bundles, "exchange", copy)
    sys.addaudithook(hook)
    export(place / "bundle", 2)
    copying = True
    shutil.copytree(place, folder / str(len(changes)))
    return [*changes, "done"]


def full(folder: Path, old: Path) -> str:
    """A limit on the size of a file makes the same error as a full disk, in the same places."""
    shutil.copytree(old, folder / "bundle")
    size = (folder / "bundle" / "model.onnx.data").stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, limits[1]))
    try:
        export(folder / "bundle", 2)
    except TargetError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    return "no error"


def _announce(module: object, name: str, hear: Callable[[str], None]) -> None:
    real: Callable[..., object] = getattr(module, name)
    setattr(module, name, lambda *a, **k: (hear(name), real(*a, **k))[1])


def _writes(arguments: tuple[object, ...]) -> bool:
    _, mode, flags = arguments
    by_mode = isinstance(mode, str) and any(letter in mode for letter in "wax+")
    return by_mode or (isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)))


if __name__ == "__main__":
    place = Path(sys.argv[1])
    export(place / "old", 1, Effort.OFF)
    # Whoever watches, watches until the process ends.
    print(json.dumps({do.__name__: do(place / do.__name__, place / "old") for do in (kill, full, watch)}))
