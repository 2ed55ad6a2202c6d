"""What comes out: a table, a plot, and JSON with the machine, the versions and the commit."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.engines import KINDS, OUR_ENGINES, OURS
from benchmarks.measure import Results, base_of
from benchmarks.process import ROOT, Variant

# Metric, heading, factor to the unit shown, digits.
COLUMNS = (
    ("load_s", "load\ns", 1.0, 2),
    ("first_token_s", "first\ntoken s", 1.0, 2),
    ("prefill_short_ms", "prefill\n{short} ms", 1.0, 0),
    ("prefill_long_ms", "prefill\n{long} ms", 1.0, 0),
    ("decode_tok_s", "decode\ntok/s", 1.0, 1),
    ("decode_deep_tok_s", "at {deep}\ntok/s", 1.0, 1),
    ("peak_rss", "peak\nMB", 1e-6, 0),
    ("peak_rss_deep", "at {deep}\nMB", 1e-6, 0),
)
# Beside those of the engines, which their own processes tell.
PACKAGES = ("torch", "onnxruntime", "numpy", "gguf", "llama-cpp-python")


def rows(variants: list[Variant], results: Results) -> list[dict[str, Any]]:
    """One row a variant: medians, their spread, and the ratios to ours of the same class."""
    return [_row(variant, variants, results) for variant in variants]


def _row(variant: Variant, variants: list[Variant], results: Results) -> dict[str, Any]:
    ours = base_of(v for v in variants if v.precision == variant.precision)
    samples = results.samples.get(variant.key, {})
    row: dict[str, Any] = {
        "variant": variant.key,
        "engine": KINDS[variant.engine].title,
        "ours": variant.engine in OUR_ENGINES,
        "precision": variant.precision,
        "label": variant.label,
        "median": {metric: results.median(variant.key, metric) for metric in samples},
        "samples": samples,
        "idle_processor_share": results.idle.get(variant.key),
    }
    if ours is not None and ours is not variant:
        row["compared_to"] = ours.key
        ratios = results.ratios.get((ours.key, variant.key), {})
        row["times_ours_is_better"] = {metric: results.ratio(ours.key, variant.key, metric) for metric in ratios}
    return row


def print_table(rows: list[dict[str, Any]], sizes: dict[str, int]) -> None:
    """Medians; below each number, how many times better what the row is compared to is, in the pairs of the two."""
    bases = {KINDS[row["compared_to"].partition("/")[0]].title for row in rows if "compared_to" in row}
    better = f", and how many times better {' or '.join(sorted(bases))} is" if bases else ""
    table = Table(title=f"The same weights in every engine: medians{better}")
    table.add_column("engine")
    for _, heading, _, _ in COLUMNS:
        table.add_column(heading.format(**sizes), justify="right")
    for precision in dict.fromkeys(row["precision"] for row in rows):
        table.add_section()
        for row in rows:
            if row["precision"] == precision:
                table.add_row(f"{row['engine']}\n  {row['label']}", *(_cell(row, *column) for column in COLUMNS))
    Console(highlight=False, width=max(100, Console().width)).print(table)


def _cell(row: dict[str, Any], metric: str, _heading: str, factor: float, digits: int) -> str:
    value = row["median"].get(metric)
    text = "-" if value is None else f"{value * factor:,.{digits}f}"
    ratio = row.get("times_ours_is_better", {}).get(metric)
    return f"{text}\n{ratio['median']:.2f}x" if ratio else text


def print_roofline(rooflines: dict[str, Any]) -> None:
    """Limit and share reached, by bundle and context; nothing where this runtime took no part."""
    if not rooflines["bundles"]:
        return
    bandwidth = rooflines["bandwidth_bytes_s"] / 1e9
    table = Table(title=f"Bandwidth limit of decoding: {bandwidth:.1f} GB/s read, by all threads")
    for heading in ("bundle", "context", "weights MB", "cache MB", "limit tok/s", "measured", "reached"):
        table.add_column(heading, justify="right")
    for entry in rooflines["bundles"]:
        megabytes = [f"{entry[key] / 1e6:,.1f}" for key in ("weight_bytes", "cache_bytes")]
        speeds = [f"{entry[key]:.1f}" for key in ("limit_tok_s", "measured_tok_s")]
        table.add_row(entry["precision"], str(entry["positions"]), *megabytes, *speeds, f"{entry['share']:.0%}")
    Console(highlight=False).print(table)


def plot(rows: list[dict[str, Any]], rooflines: dict[str, Any], sizes: dict[str, int], path: Path) -> bool:
    """Bars of decoding speed at both contexts, with each class's bandwidth limit; False without matplotlib."""
    try:
        import matplotlib as mpl
    except ImportError:
        return False
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    panels = (("decode_tok_s", sizes["short"]), ("decode_deep_tok_s", sizes["deep"]))
    figure, axes = plt.subplots(1, 2, figsize=(11, 0.42 * len(rows) + 1.4), sharey=True, layout="constrained")
    for (metric, length), axis, deep in zip(panels, axes, (False, True), strict=True):
        _bars(axis, rows, metric)
        _limits(axis, rows, [e for e in rooflines["bundles"] if e["deep"] is deep])
        axis.set(title=f"Decoding behind a prompt of {length}", xlabel="tokens a second (grey line: bandwidth limit)")
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return True


def _bars(axis: Any, rows: list[dict[str, Any]], metric: str) -> None:
    values = [row["median"].get(metric) or 0.0 for row in rows]
    names = [f"{row['engine']}, {row['label']}" for row in rows]
    bars = axis.barh(names, values, color=[_colour(row) for row in rows])
    axis.bar_label(bars, fmt="%.1f", padding=3, fontsize=8)
    axis.margins(x=0.12)
    axis.locator_params(axis="x", nbins=6)
    if not axis.yaxis_inverted():
        axis.invert_yaxis()
    axis.spines[["top", "right"]].set_visible(False)


def _colour(row: dict[str, Any]) -> str:
    """Green what is this project's, the runtime darkest; grey the others."""
    if row["engine"] == KINDS[OURS].title:
        return "#1f6f54"
    return "#7fb59f" if row["ours"] else "#b8bec4"


def _limits(axis: Any, rows: list[dict[str, Any]], entries: list[dict[str, Any]]) -> None:
    for entry in entries:
        places = [i for i, row in enumerate(rows) if row["precision"] == entry["precision"]]
        axis.vlines(entry["limit_tok_s"], min(places) - 0.5, max(places) + 0.5, color="#6b7178", linewidth=1)


def environment(threads: int, versions: dict[str, str]) -> dict[str, Any]:
    """The machine, the versions of what was compared, the commit and the date."""
    return {
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "cpu": _cpu_name(),
        "processors": os.cpu_count(),
        "memory_gb": _memory_gb(),
        "system": f"{platform.system()} {platform.machine()}",
        "threads": threads,
        "python": platform.python_version(),
        "versions": {package: found for package in PACKAGES if (found := _version(package))} | versions,
    }


def commit() -> str:
    """What is checked out, as git describes it."""
    described = ["git", "describe", "--always", "--dirty"]
    return subprocess.run(described, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _memory_gb() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)
    except (ValueError, OSError):
        return None
