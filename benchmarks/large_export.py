"""Exports a large checkpoint and says what that takes: peak memory of the whole process, and where its seconds go,
beside the seconds that copying the same checkpoint takes.

    python -m benchmarks.large_export                                        # makes 7 B in bfloat16: 17 GB of disk
    python -m benchmarks.large_export --checkpoint my-model --recipe cpu-int8
    python -m benchmarks.large_export --make "--like advanced --dtype float32" --recipe cpu-fp32

Copying and exporting both begin with the checkpoint out of the page cache and end when all is on the disk; copies are
removed one by one. The export is `cosmos-export onnx --verify off --json` in a process of its own; its peak is the
operating system's figure for that process (ru_maxrss), pages of mapped files included. The last line is one line of
JSON; the same goes to benchmarks/results/large_export.json.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.process import ROOT
from benchmarks.report import environment

RESULTS = Path(__file__).parent / "results" / "large_export.json"
MAKE = ROOT / "examples" / "make_synthetic_checkpoint.py"
_PATH = click.Path(exists=True, file_okay=False, path_type=Path)


@click.command(help=(__doc__ or "").partition("\n\n")[0].replace("\n", " "))
@click.option("--checkpoint", type=_PATH, help="Instead of a synthetic one.")
@click.option("--make", default="--like 7b", show_default=True, help="Options of make_synthetic_checkpoint.py.")
@click.option("--recipe", default="cpu-int4", show_default=True)
@click.option("--scratch", type=_PATH, default=None, help="Where there is room; default: the system's for such files.")
def main(checkpoint: Path | None, make: str, recipe: str, scratch: Path | None) -> None:
    with tempfile.TemporaryDirectory(prefix="large-export-", dir=scratch) as place:
        if checkpoint is None:
            checkpoint = Path(place, "checkpoint")
            subprocess.run([sys.executable, str(MAKE), str(checkpoint), *shlex.split(make)], check=True)
        size = sum(path.stat().st_size for path in checkpoint.iterdir())
        click.echo(f"copying {size / 1e9:.2f} GB ...", err=True)
        copy_s = _copied(checkpoint, Path(place, "copy"))
        click.echo(f"exporting with {recipe} ...", err=True)
        export = _exported(checkpoint, Path(place, "bundle"), recipe)
    others = export["wall_s"] - export["seconds"].get("quantising", 0.0)
    result = {
        "benchmark": "large_export",
        "recipe": recipe,
        "made": None if checkpoint.name != "checkpoint" else make,
        "checkpoint_bytes": size,
        "copy_s": copy_s,
        **export,
        "without_quantising_s": others,
        "times_copying": others / copy_s,
        **environment(torch.get_num_threads(), {}),
    }
    _print(result)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    click.echo(json.dumps(result))


def _copied(source: Path, target: Path) -> float:
    """Seconds of copying a folder's files to the disk; each copy is removed before the next, off the clock."""
    _out_of_cache(source)
    target.mkdir()
    seconds = 0.0
    for path in sorted(source.iterdir()):
        began = time.perf_counter()
        shutil.copyfile(path, target / path.name)
        with (target / path.name).open("rb") as file:
            os.fsync(file.fileno())
        seconds += time.perf_counter() - began
        (target / path.name).unlink()
    return seconds


def _exported(checkpoint: Path, out: Path, recipe: str) -> dict[str, Any]:
    """Peak memory, bytes of the bundle and seconds of one export, in all and by kind."""
    _out_of_cache(checkpoint)
    command = [sys.executable, "-m", "cosmos_export.cli", "onnx", "--checkpoint", str(checkpoint), "--out", str(out)]
    command += ["--recipe", recipe, "--verify", "off", "--json"]
    began = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        printed = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    wall = time.perf_counter() - began
    if process.returncode:
        raise click.ClickException(f"the export ended with {process.returncode}")
    return {
        "wall_s": wall,
        "cpu_s": usage.ru_utime + usage.ru_stime,
        "peak_rss_bytes": usage.ru_maxrss * 1024,  # kilobytes on Linux
        "bundle_bytes": sum(path.stat().st_size for path in out.iterdir()),
        "seconds": json.loads(printed)["seconds"],
    }


def _out_of_cache(folder: Path) -> None:
    """Asks the system to forget the pages of these files, so that nobody finds in memory what another one read."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())  # pages that are not yet on the disk are not forgotten
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _print(result: dict[str, Any]) -> None:
    table = Table(title=f"{result['checkpoint_bytes'] / 1e9:.2f} GB to {result['bundle_bytes'] / 1e9:.2f} GB")
    table.add_column("")
    table.add_column("", justify="right")
    table.add_row("peak memory of the process", f"{result['peak_rss_bytes'] / 1e9:.2f} GB")
    table.add_row("copying the checkpoint", f"{result['copy_s']:.1f} s")
    table.add_row("export, whole process", f"{result['wall_s']:.1f} s")
    for kind, seconds in result["seconds"].items():
        table.add_row(f"  {kind}", f"{seconds:.1f} s")
    table.add_row("  start and end of the process", f"{result['wall_s'] - sum(result['seconds'].values()):.1f} s")
    table.add_row("without quantising", f"{result['without_quantising_s']:.1f} s")
    table.add_row("that is, times copying", f"{result['times_copying']:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
