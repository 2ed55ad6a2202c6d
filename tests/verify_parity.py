"""`make verify-parity`: exports the demo, beginner and reduced advanced models, and proves each bundle from what is on
the disk, as many at a time as there are processors; bundles and reports in build/parity.

    python -m tests.verify_parity            # all of them
    python -m tests.verify_parity cpu-int8   # those with that in their names
"""

from __future__ import annotations

import os
import queue
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

PLACE = Path("build/parity")
COMMAND = str(Path(sys.executable).with_name("cosmos-export"))
CAPABILITIES = "reasoning,memory,safety,evaluation"
# Each has a model of its own in float64 beside it.
MOST_AT_ONCE = 4


class Proof(NamedTuple):
    """A recipe of a model; `heads` where it is exported with all capabilities."""

    model: str
    recipe: str
    heads: bool = False

    @property
    def name(self) -> str:
        """What the bundle and its report are called."""
        return f"{self.model}-{self.recipe}{'-heads' if self.heads else ''}"


# Every recipe for CPUs on the trained model, the default one on the geometries of the other presets. The longest comes
# first (it calibrates the heads, too), so that nobody waits for it alone.
PROOFS = (
    Proof("demo", "cpu-int4", heads=True),
    *(Proof("demo", recipe) for recipe in ("fp32", "cpu-fp32", "cpu-fp16", "cpu-int8", "cpu-int4", "cpu-int4-quick")),
    Proof("demo", "portable-fp32"),
    *(Proof("demo", recipe, heads=True) for recipe in ("cpu-fp32", "cpu-int8", "cpu-int4-quick")),
    *(Proof("demo", recipe) for recipe in ("torchscript-fp32", "torchscript-int8", "pt2-fp32")),
    Proof("demo", "torchscript-fp32", heads=True),
    Proof("beginner", "cpu-fp32"),
    Proof("beginner", "fp32", heads=True),
    Proof("advanced-reduced", "cpu-fp32"),
)


def main() -> None:
    """Proves what the arguments name, everything without any; exits with 1 as soon as one proof fails."""
    chosen = [proof for proof in PROOFS if not sys.argv[1:] or any(part in proof.name for part in sys.argv[1:])]
    PLACE.mkdir(parents=True, exist_ok=True)
    start, free = time.perf_counter(), free_processors()
    with ThreadPoolExecutor(free.qsize(), initializer=take_one, initargs=(free,)) as pool:
        runs = {pool.submit(prove, proof): proof for proof in chosen}
        for run in as_completed(runs):
            succeeded, printed = run.result()
            print(f"== {runs[run].name}\n{printed}", flush=True)
            if not succeeded:
                pool.shutdown(cancel_futures=True)
                sys.exit(f"error: {runs[run].name} is not proven")
    print(f"{len(chosen)} bundles proven in {time.perf_counter() - start:.0f} s; reports in {PLACE}")


def free_processors() -> queue.SimpleQueue[int | None]:
    """One for each proof at a time; None where the system does not let a program choose."""
    free: queue.SimpleQueue[int | None] = queue.SimpleQueue()
    here = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [None] * (os.cpu_count() or 1)
    for processor in here[:MOST_AT_ONCE]:
        free.put(processor)
    return free


def take_one(free: queue.SimpleQueue[int | None]) -> None:
    """Keeps this thread, and the commands that it starts, to a processor of their own: threads of two proofs on one
    processor would wait for each other."""
    processor = free.get()
    if processor is not None:
        os.sched_setaffinity(0, {processor})


def prove(proof: Proof) -> tuple[bool, str]:
    """Whether export and proof succeeded, and what they printed."""
    printed = ""
    for arguments in commands(proof):
        done = subprocess.run(
            [COMMAND, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"},
        )
        printed += done.stdout
        if done.returncode:
            return False, printed
    return True, printed


def commands(proof: Proof) -> tuple[list[str], list[str]]:
    """The export, which proves nothing yet, and the proof."""
    bundle = str(PLACE / proof.name)
    kind = proof.recipe.partition("-")[0]
    export = [kind if kind in ("torchscript", "pt2") else "onnx", "--recipe", proof.recipe]
    export += [] if proof.model == "demo" else ["--preset", proof.model]
    export += ["--capabilities", CAPABILITIES] if proof.heads else []
    return [*export, "--verify", "off", "--overwrite", "--out", bundle], ["verify", bundle, "--json", f"{bundle}.json"]


if __name__ == "__main__":
    main()
