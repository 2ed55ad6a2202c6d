"""Does a session grow? Thousands of generations with changing inputs, by one caller and by many, and their memory.

Each series runs in a fresh process without PyTorch (`soak_worker.py`). The growth is the slope of a straight line
through the readings behind the warm-up; beside it stands what the caches of as many generations take, which is what a
leak of them would cost. The last line is one line of JSON; the same goes to benchmarks/results/soak.json, the plot
beside it.

    python -m benchmarks.soak [--generations 2000] [--bundle FOLDER]
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np

from benchmarks.process import ROOT
from benchmarks.report import environment

RESULTS = Path(__file__).parent / "results" / "soak.json"
MEBI = 1 << 20
# Share of the generations that come before the line is fitted: buffers reach their size, threads get their heaps.
WARM_UP = 0.2
# What leaks can be in, and that with the free memory that the C library keeps for later.
MEASURED = ("allocated", "anonymous")


class Series(NamedTuple):
    """How many threads ask, and what the process's environment has besides."""

    name: str
    callers: int
    environment: dict[str, str]


SERIES = (
    Series("one caller", 1, {}),
    Series("32 callers", 32, {}),
    Series("32 callers, MALLOC_ARENA_MAX=2", 32, {"MALLOC_ARENA_MAX": "2"}),
    # glibc counts the freed blocks that each thread keeps for itself among those that are allocated.
    Series("32 callers, no thread caches", 32, {"GLIBC_TUNABLES": "glibc.malloc.tcache_count=0"}),
)


@click.command(help=(__doc__ or "").partition("\n")[0])
@click.option("--generations", type=click.IntRange(min=20), default=2000, show_default=True)
@click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True, help="Threads that compute.")
@click.option("--bundle", type=click.Path(path_type=Path, exists=True), help="Default: the demo's decoder.")
@click.option(
    "--out", type=click.Path(path_type=Path), default=RESULTS, show_default=True, help="JSON; plot beside it."
)
def main(generations: int, threads: int, bundle: Path | None, out: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        place = bundle or _export(Path(scratch, "demo"))
        rows = [_run(series, place, generations, threads) for series in SERIES]
    click.echo(table(rows))
    result = {"benchmark": "soak", "generations": generations, **environment(threads, {}), "series": rows}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    plot(rows, out.with_suffix(".png"))
    click.echo(json.dumps({**result, "series": [{**row, "readings": None} for row in rows]}))


def growth(readings: list[dict[str, int]], what: str) -> tuple[float, float]:
    """Slope of `what` a 1,000 generations behind the warm-up, and its standard error."""
    steady = [r for r in readings if r["generation"] > WARM_UP * readings[-1]["generation"]]
    places = np.array([r["generation"] / 1000 for r in steady])
    (slope, _), covariance = np.polyfit(places, [float(r[what]) for r in steady], 1, cov=True)
    return float(slope), float(np.sqrt(covariance[0, 0]))


def table(rows: list[dict[str, Any]]) -> str:
    """What `docs/UNDER_LOAD.md` shows."""
    lines = [
        "| | loaded | steady | at the end | trimmed | growth a 1,000: allocated | with free heap | caches of 1,000 |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        sizes = (row[key] / MEBI for key in ("loaded", "steady", "end", "trimmed"))
        cells = [f"{size:.1f}" for size in sizes]
        for what in MEASURED:
            slope = row["growth"][what]
            cells.append(f"{slope['bytes'] / MEBI:+.2f} ± {slope['error'] / MEBI:.2f}")
        lines.append(f"| {row['name']} | {' | '.join(cells)} | {row['caches'] / MEBI:,.0f} |")
    return "\n".join([*lines, "", "MiB of the process's anonymous memory; steady: the median behind the warm-up."])


def plot(rows: list[dict[str, Any]], path: Path) -> bool:
    """Memory over generations, and the fitted lines; False without matplotlib."""
    try:
        import matplotlib as mpl
    except ImportError:
        return False
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(9, 5), layout="constrained")
    for row, colour in zip(rows, ("#1f6f54", "#c0653a", "#5b6bb0", "#8a6d1c"), strict=True):
        numbers = [reading["generation"] for reading in row["readings"]]
        for what, style in (("anonymous", ".-"), ("allocated", ":")):
            sizes = [reading[what] / MEBI for reading in row["readings"]]
            label = f"{row['name']}: {what}, {row['growth'][what]['bytes'] / MEBI:+.2f} MiB a 1,000"
            axis.plot(numbers, sizes, style, color=colour, linewidth=1, markersize=3, label=label)
    axis.axvspan(0, WARM_UP * rows[0]["readings"][-1]["generation"], color="#eef0f2", label="warm-up")
    caches = max(row["caches"] for row in rows) / MEBI
    axis.set(title=f"Memory of one session; a leak of every cache would be {caches:,.0f} MiB a 1,000 generations")
    axis.set(xlabel="generations", ylabel="MiB", ylim=(0, None))
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(fontsize=8, loc="outside lower center", ncols=2)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return True


def _export(folder: Path) -> Path:
    command = [
        sys.executable,
        "-m",
        "cosmos_export.cli",
        "onnx",
        "--head",
        "lm",
        "--out",
        str(folder),
        "--verify",
        "off",
    ]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return folder


def _run(series: Series, bundle: Path, generations: int, threads: int) -> dict[str, Any]:
    click.echo(f"{series.name}: {generations:,} generations", err=True)
    worker = (sys.executable, "-m", "benchmarks.soak_worker", str(bundle))
    options = {"generations": generations, "every": max(generations // 40, 1), "callers": series.callers}
    arguments = [f"--{name}={value}" for name, value in {**options, "threads": threads}.items()]
    variables = {**os.environ, **series.environment}
    done = subprocess.run(
        [*worker, *arguments], cwd=ROOT, env=variables, check=True, stdout=subprocess.PIPE, encoding="utf-8"
    )
    return row_of(series, json.loads(done.stdout), generations)


def row_of(series: Series, found: dict[str, Any], generations: int) -> dict[str, Any]:
    """What a worker found, as the results have it."""
    readings = found["readings"]
    slopes = {what: dict(zip(("bytes", "error"), growth(readings, what), strict=True)) for what in MEASURED}
    steady = [r["anonymous"] for r in readings if r["generation"] > WARM_UP * generations]
    return {
        "name": series.name,
        "callers": series.callers,
        "loaded": readings[0]["anonymous"],
        "steady": float(np.median(steady)),
        "end": readings[-1]["anonymous"],
        "trimmed": found["trimmed"]["anonymous"],
        "growth": slopes,
        "growth_python_blocks": growth(readings, "python_blocks")[0],
        "caches": 1000 * found["caches_bytes"] / generations,
        "left": found["left"],
        "kinds": found["kinds"],
        "readings": readings,
    }


if __name__ == "__main__":
    main()
