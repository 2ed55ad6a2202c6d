"""One session under 32 threads, whatever computes its graph: every result is the one it gives alone."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cosmos_export.checkpoint import Checkpoint
from cosmos_export.parity.verify import Effort
from cosmos_export.pipeline import ExportedBundle, export_bundle
from cosmos_export.recipe import ExportRecipe
from cosmos_export.torch_programs.sessions import eager_session, load_session
from cosmos_runtime import Sampling, Session, generate, generate_batch, load

# Tests are no package, so that a folder beside this one has no absolute name.
from ..runtime.under_load import Job, alive, at_once, disagreements, jobs  # noqa: TID252
from .head_bundles import export_heads, heads_checkpoint, heads_config

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = [[3, 14, 15], [9] * 20, list(range(40)), [7]]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", ["small_decoder", "small_bundle", "small_int4"])
def test_plain_decoders(name: str, threads: int, request: pytest.FixtureRequest) -> None:
    bundle: ExportedBundle = request.getfixturevalue(name)
    assert disagreements(jobs(load(bundle.path, threads=threads), threads, each=2)) == []


@pytest.fixture(scope="module")
def heads() -> Checkpoint:
    return heads_checkpoint(heads_config(max_sequence_length=48))


@pytest.fixture(scope="module")
def with_heads(heads: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Session:
    return load(export_heads(heads, tmp_path_factory.mktemp("heads") / "bundle").path, threads=1)


def test_capability_heads(with_heads: Session) -> None:
    assert disagreements(jobs(with_heads, 1, each=2)) == []


@pytest.mark.parametrize("recipe", ["fp32", "torchscript-fp32"])
def test_capability_heads_otherwise(recipe: str, heads: Checkpoint, tmp_path: Path) -> None:
    session = load_session(export_heads(heads, tmp_path / "bundle", recipe).path, threads=1)
    assert disagreements(jobs(session, 1, each=1)) == []


def test_a_memory_that_threads_share(with_heads: Session) -> None:
    """Calls are made one after another: the results are those of one thread, whoever gets which."""
    alone, shared = with_heads.new_memory(1), with_heads.new_memory(1)
    wanted = Counter(with_heads.call([1, 2, 3], memory=alone).logits.tobytes() for _ in range(40))
    assert len(wanted) > 1, "what is remembered changes what comes out"
    found: list[Any] = []
    at_once([lambda: found.append(with_heads.call([1, 2, 3], memory=shared))] * 40)
    assert Counter(output.logits.tobytes() for output in found) == wanted
    assert shared.calls.tolist() == [40]


@pytest.mark.parametrize("recipe", ["torchscript-fp32", "torchscript-full-sequence", "pt2-fp32"])
def test_programs_of_pytorch(recipe: str, small_checkpoint: Checkpoint, tmp_path: Path) -> None:
    bundle = export_bundle(small_checkpoint, tmp_path / "bundle", ExportRecipe.load(recipe), effort=Effort.OFF)
    assert disagreements(jobs(load_session(bundle.path, threads=1), 2, each=2)) == []


def test_the_eager_model(small_checkpoint: Checkpoint) -> None:
    assert disagreements(jobs(eager_session(small_checkpoint, threads=1), 4, each=2)) == []


# Decoding that stays on the device, with the CPU as the device


@pytest.fixture(scope="module")
def looping(small_checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Session:
    out = tmp_path_factory.mktemp("loops") / "fp16"
    bundle = export_bundle(small_checkpoint, out, ExportRecipe.load("cuda-fp16"), effort=Effort.OFF)
    return load(bundle.path, threads=1)


def loop_jobs(session: Session) -> list[Job]:
    found = []
    for at, prompt in enumerate(PROMPTS):
        for sampling in (Sampling.greedy(), Sampling(top_k=5, seed=at), Sampling(seed=at, repetition_penalty=1.2)):
            begin = partial(generate, session, prompt, max_new_tokens=24, sampling=sampling)
            found.append(Job(f"loop {at}", partial(looped, begin)))
            found.append(Job(f"closed loop {at}", partial(closed_loop, begin, at), whole=partial(looped, begin)))
    rows = partial(generate_batch, session, PROMPTS, max_new_tokens=10)
    found.append(Job("batch", lambda: rows(device_loop=True).run()))
    found.append(Job("host", lambda: rows(device_loop=False).run()))
    return found


def looped(begin: Callable[..., Any]) -> list[int]:
    return list(begin(device_loop=True))


def closed_loop(begin: Callable[..., Any], wanted: int) -> list[int]:
    generation = begin(device_loop=True)
    for _ in range(wanted):
        next(generation)
    if wanted % 2:
        generation.close()
    tokens: list[int] = generation.tokens
    return tokens


def test_device_loops_and_the_host_at_once(looping: Session) -> None:
    work = loop_jobs(looping)
    assert disagreements([*work, *jobs(looping, 5, each=1)]) == []


def test_a_loop_that_is_dropped_leaves_its_buffers_to_the_next(looping: Session) -> None:
    begin = partial(generate, looping, [1, 2, 3], max_new_tokens=20, device_loop=True)
    wanted = list(begin())
    loops = looping.device_loops
    assert loops is not None
    loops._worker.submit(int).result()  # by now it has its buffers back
    kept = {id(slot) for slot in loops._free}
    dropped = begin()
    next(dropped)
    del dropped
    loops._worker.submit(int).result()  # nothing is left to do for it
    again = begin()
    assert list(again) == wanted
    loops._worker.submit(int).result()
    assert {id(slot) for slot in loops._free} == kept


def test_nothing_of_a_session_lives_on(small_decoder: ExportedBundle) -> None:
    gc.collect()
    before = alive()
    session = load(small_decoder.path, threads=1)
    begun = [generate(session, prompt, max_new_tokens=9) for prompt in PROMPTS]
    assert len({next(generation) for generation in begun}) > 1
    assert len(alive() - before) > 3
    del session, begun
    assert alive() - before == {}


# Memory of a process of its own


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, and asks glibc")
@pytest.mark.parametrize("callers", [1, 32])
def test_memory_comes_back(small_decoder: ExportedBundle, callers: int) -> None:
    """A leak of every third cache, or of an object a generation, would be seen."""
    worker = [sys.executable, "-m", "benchmarks.soak_worker", str(small_decoder.path)]
    options = ["--generations=700", "--every=100", f"--callers={callers}"]
    environment = {**os.environ, "MALLOC_ARENA_MAX": "2", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*worker, *options], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    first, last = found["readings"][2], found["readings"][-1]
    assert found["left"] == {}
    assert found["caches_bytes"] > 10e6
    assert sum(found["kinds"].values()) == 700
    assert last["allocated"] - first["allocated"] < 0.3 * found["caches_bytes"]
    assert last["python_blocks"] - first["python_blocks"] < 500  # fewer than one a generation
    assert last["files"] == first["files"]


def test_the_line_through_the_readings() -> None:
    sys.path.insert(0, str(ROOT))
    from benchmarks.soak import growth

    rng = np.random.default_rng(0)
    readings = [
        {"generation": n, "anonymous": int(5e6 + (0 if n < 200 else 3000 * n) + rng.normal(0, 1e4))}
        for n in range(0, 2001, 50)
    ]
    slope, error = growth(readings, "anonymous")
    assert abs(slope - 3e6) < 3 * error
    assert 0 < error < 1e5
