"""Exports of checkpoints that need not fit into memory: what is held at a time, and what is never read. On a small
model; the rules are about tensors, whatever their size."""

import json
import os
import sys
import threading
import weakref
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from cosmos_export.checkpoint import Checkpoint
from cosmos_export.cli import main
from cosmos_export.config import CosmosAdvancedConfig
from cosmos_export.onnx.weights import ANNOUNCING
from cosmos_export.parity.verify import Effort
from cosmos_export.pipeline import export_bundle
from cosmos_export.progress import Silent
from cosmos_export.recipe import ExportRecipe
from cosmos_runtime import Bundle

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))  # as where a script lies is, when it is run

from make_synthetic_checkpoint import write_checkpoint  # noqa: E402

# Large enough for every part of a quantised matrix to be in the file of weights, as in large models.
CONFIG = CosmosAdvancedConfig(
    dim=128, n_layers=3, head_dim=32, hidden_dim=256, n_heads=8, n_kv_heads=2, vocab_size=160, max_sequence_length=64
)
UNUSED = "learning_engine.synthetic."


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in bfloat16, several shards, half of its bytes unused."""
    folder = tmp_path_factory.mktemp("synthetic") / "model"
    write_checkpoint(folder, CONFIG, torch.bfloat16, shard_bytes=300_000, unused_bytes=900_000)
    return folder


@dataclass
class Readings:
    """Counts what is read of a checkpoint, and how many of its tensors are in memory."""

    times: Counter[str] = field(default_factory=Counter)
    alive: set[str] = field(default_factory=set)
    most: int = 0

    def watch(self, checkpoint: Checkpoint) -> Checkpoint:
        watched = {
            name: replace(stored, read=partial(self._read, name, stored.read))
            for name, stored in checkpoint.stored.items()
        }
        return replace(checkpoint, stored=watched)

    def _read(self, name: str, read: Any) -> Tensor:
        self.times[name] += 1
        # A view of a numpy array keeps the array alive through its storage: whoever holds rows holds the tensor.
        array = read().float().numpy().copy()
        self.alive.add(name)
        weakref.finalize(array, self.alive.discard, name)
        self.most = max(self.most, len(self.alive))
        return torch.from_numpy(array)


RECIPES = ["cpu-fp32", "cpu-int4-quick", "cpu-int8", "portable-fp32", "cuda-bf16", "cpu-fp16"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_tensor_is_read_once_and_let_go_before_the_next_but_one(folder: Path, tmp_path: Path, recipe: str) -> None:
    readings = Readings()
    checkpoint = readings.watch(Checkpoint.open(folder))
    export_bundle(checkpoint, tmp_path / "out", ExportRecipe.load(recipe), effort=Effort.OFF)
    used = [name for name in checkpoint.names if not name.startswith(UNUSED)]
    assert readings.times == Counter(used)
    assert any(name.startswith(UNUSED) for name in checkpoint.names)
    assert readings.most <= 2  # of a packed matrix, the next part is read while the last one is in hand
    assert not readings.alive


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks at /proc/self/fd")
def test_the_disk_is_told_of_what_will_be_read_and_of_nothing_else(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: set[tuple[str, int, int]] = set()

    def advise(descriptor: int, start: int, length: int, advice: int) -> None:
        assert advice == os.POSIX_FADV_WILLNEED
        told.add((os.readlink(f"/proc/self/fd/{descriptor}"), start, length))

    monkeypatch.setattr(os, "posix_fadvise", advise)
    checkpoint = Checkpoint.open(folder)
    export_bundle(checkpoint, tmp_path / "out", ExportRecipe.load("cpu-int8"), effort=Effort.OFF)
    for thread in threading.enumerate():
        if thread.name == ANNOUNCING:
            thread.join()
    places = {name: stored.place for name, stored in checkpoint.stored.items() if not name.startswith(UNUSED)}
    extents = {(str(place.path), place.start, place.length) for place in places.values()}  # type: ignore[attr-defined]
    assert told < extents
    assert len(extents - told) == 1  # the first one is simply read
    name, place = next(iter(places.items()))
    with place.path.open("rb") as file:  # type: ignore[attr-defined]
        file.seek(place.start)  # type: ignore[attr-defined]
        data = file.read(place.length)  # type: ignore[attr-defined]
    assert data == checkpoint.tensor(name).view(torch.uint8).numpy().tobytes()


def test_opening_and_refusing_read_nothing(folder: Path, tmp_path: Path) -> None:
    readings = Readings()
    checkpoint = readings.watch(Checkpoint.open(folder))
    with pytest.raises(Exception, match="does not divide dim"):
        export_bundle(
            replace(checkpoint, config=replace(CONFIG, dim=127)), tmp_path / "out", ExportRecipe.load("cpu-int4-quick")
        )
    assert not readings.times


def test_the_bundle_is_the_one_that_whole_matrices_give(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pieces of a few rows or all at once: the same bytes."""
    recipe = ExportRecipe.load("cpu-int4-quick")
    hashes = []
    for name, values in (("whole", 1 << 40), ("rows", 1)):
        monkeypatch.setattr("cosmos_export.onnx.weights._VALUES_AT_ONCE", values)
        monkeypatch.setattr("cosmos_export.onnx.quantize._VALUES_AT_ONCE", values)
        export_bundle(Checkpoint.open(folder), tmp_path / name, recipe, effort=Effort.OFF)
        hashes.append({file: entry.sha256 for file, entry in Bundle.open(tmp_path / name).manifest.files.items()})
    assert hashes[0] == hashes[1]
    assert "model.onnx.data" in hashes[0]


def test_the_seconds_are_told_apart(folder: Path, tmp_path: Path) -> None:
    bundle = export_bundle(
        Checkpoint.open(folder), tmp_path / "out", ExportRecipe.load("cpu-int4-quick"), effort=Effort.OFF
    )
    assert {"tracing", "reading", "quantising", "writing", "sealing"} <= bundle.seconds.keys()
    assert all(seconds > 0 for kind, seconds in bundle.seconds.items() if kind != "calibrating")


class Bytes(Silent):
    """Keeps what a stage said of its bytes."""

    def __init__(self) -> None:
        self.written: list[tuple[int, int]] = []

    def wrote(self, done: int, total: int) -> None:
        self.written.append((done, total))


def test_progress_says_how_many_bytes_of_all_are_written(folder: Path, tmp_path: Path) -> None:
    heard = Bytes()
    export_bundle(
        Checkpoint.open(folder), tmp_path / "out", ExportRecipe.load("cpu-fp32"), effort=Effort.OFF, progress=heard
    )
    totals = {total for _, total in heard.written}
    assert totals == {(tmp_path / "out" / "model.onnx.data").stat().st_size}
    done = [done for done, _ in heard.written]
    assert done == sorted(done)
    assert (done[0], done[-1]) == (0, *totals)
    assert len(done) > 10


def test_the_command_exports_and_proves_a_synthetic_checkpoint(folder: Path, tmp_path: Path) -> None:
    arguments = ["onnx", "--checkpoint", str(folder), "--out", str(tmp_path / "out"), "--recipe", "cpu-int8"]
    done = CliRunner().invoke(main, [*arguments, "--verify", "quick", "--json"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert result["parity"]["passed"]
    assert result["seconds"]["quantising"] > 0
    assert "model.onnx.data" not in done.stdout
    assert "kB" in done.stderr
    assert "/s" in done.stderr


def test_a_synthetic_checkpoint_has_the_geometry_the_shards_and_the_bytes_asked_for(
    folder: Path, tmp_path: Path
) -> None:
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.config == CONFIG
    assert len(list(folder.glob("*.safetensors"))) > 3
    assert all(path.stat().st_size < 310_000 for path in folder.glob("*.safetensors"))
    unused = [stored for name, stored in checkpoint.stored.items() if name.startswith(UNUSED)]
    assert sum(torch.Size(stored.shape).numel() * 2 for stored in unused) == pytest.approx(900_000, rel=0.1)
    again = tmp_path / "again"
    write_checkpoint(again, CONFIG, torch.bfloat16, shard_bytes=1 << 30)
    for name in Checkpoint.open(again).names:
        assert torch.equal(Checkpoint.open(again).tensor(name), checkpoint.tensor(name)), name
