"""Times the full-sequence graph against the eager model it was made from, on the demo checkpoint.

What is measured: seconds of one forward pass over 1 x T tokens, all logits, float32, the same number of threads on both
sides. The two take turns (A B A B ...) so that a change of the machine's speed meets both; what counts is the median of
the ratios. The last line is one line of JSON; the same goes to benchmarks/results/full_sequence.json.

    python -m benchmarks.full_sequence [--pairs 9]
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.report import environment
from cosmos_export.checkpoint import Checkpoint
from cosmos_export.model.loading import load_decoder
from cosmos_export.parity.verify import Effort
from cosmos_export.pipeline import export_bundle
from cosmos_export.recipe import ExportRecipe
from cosmos_export.resources import demo_checkpoint
from cosmos_runtime import load

RESULTS = Path(__file__).parent / "results" / "full_sequence.json"
LENGTHS = (1, 16, 128, 512)
WARM_UP = 2


@click.command(help=(__doc__ or "").partition("\n")[0])
@click.option("--pairs", type=click.IntRange(min=5), default=9, show_default=True, help="Alternating pairs a length.")
@click.option("--threads", type=click.IntRange(min=1), default=os.cpu_count() or 1, show_default=True)
def main(pairs: int, threads: int) -> None:
    checkpoint = Checkpoint.open(demo_checkpoint())
    torch.set_num_threads(threads)
    model = load_decoder(checkpoint)
    with tempfile.TemporaryDirectory() as scratch:
        bundle = export_bundle(checkpoint, Path(scratch, "demo"), ExportRecipe.load("fp32"), effort=Effort.OFF)
        session = load(bundle.path, threads=threads)
        rows = [_compare(length, model, session, checkpoint.config.vocab_size, pairs) for length in LENGTHS]
    _print(rows)
    result = {"benchmark": "full_sequence", "pairs": pairs, **environment(threads, {}), "rows": rows}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    click.echo(json.dumps(result))


def _compare(length: int, model: torch.nn.Module, session: Any, vocab_size: int, pairs: int) -> dict[str, Any]:
    ids = np.random.default_rng(0).integers(0, vocab_size, (1, length))
    tokens = torch.from_numpy(ids)
    sides = {"runtime": lambda: session.logits(ids), "eager": lambda: _forward(model, tokens)}
    for side in sides.values():
        for _ in range(WARM_UP):
            side()
    timed = [{name: _seconds(side) for name, side in sides.items()} for _ in range(pairs)]
    return {
        "tokens": length,
        "runtime_ms": 1e3 * statistics.median(t["runtime"] for t in timed),
        "eager_ms": 1e3 * statistics.median(t["eager"] for t in timed),
        "speedup": statistics.median(t["eager"] / t["runtime"] for t in timed),
        "speedup_range": [f(t["eager"] / t["runtime"] for t in timed) for f in (min, max)],
    }


@torch.inference_mode()
def _forward(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    return model(tokens)


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _print(rows: list[dict[str, Any]]) -> None:
    table = Table(title="One forward pass of the demo model, medians", title_justify="left")
    for heading in ("tokens", "this runtime, ms", "PyTorch eager, ms", "times as fast", "lowest to highest"):
        table.add_column(heading, justify="right")
    for row in rows:
        low, high = row["speedup_range"]
        times = [f"{row[side]:.2f}" for side in ("runtime_ms", "eager_ms")]
        table.add_row(str(row["tokens"]), *times, f"{row['speedup']:.2f}", f"{low:.2f} to {high:.2f}")
    Console(highlight=False).print(table)


if __name__ == "__main__":
    main()
