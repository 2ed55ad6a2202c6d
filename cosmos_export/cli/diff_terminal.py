"""What `cosmos-export diff` shows: error by layer as bars in the terminal and as a picture, the steps of a wrong layer,
and what settings of ONNX Runtime change.
"""

from __future__ import annotations

import math
from pathlib import Path

from rich.console import Console
from rich.table import Table

from cosmos_export.cli.terminal import console
from cosmos_export.parity.diff import DiffReport, PieceDiff
from cosmos_export.parity.gates import Arithmetic, Verdict
from cosmos_export.parity.report import Measurement, gate_share

_BAR = 16  # characters, for shares of the gate from a thousandth to a thousand times
_COLOURS = {Verdict.PASS: "green", Verdict.AMBIGUOUS: "yellow", Verdict.FAIL: "bold red"}


def print_diff(report: DiffReport) -> None:
    """The tables of a report."""
    out = console()
    for arithmetic in dict.fromkeys(piece.arithmetic for piece in report.pieces):
        _print_pieces(out, report, arithmetic)
    wrong = report.first_alone
    if wrong is not None and wrong.steps:
        _print_steps(out, wrong)
    for problem in report.stored.problems[:8]:
        out.print(problem, style="red", markup=False)
    if report.settings:
        _print_settings(out, report)
    if report.heads_chained:
        out.print("capability heads, behind the final norm: in the graph stands for their pieces chained")


def _print_pieces(out: Console, report: DiffReport, arithmetic: Arithmetic) -> None:
    table = Table(title=f"{report.bundle}, {arithmetic}: error against float64, as a share of what is allowed")
    table.title_justify = "left"
    table.add_column("piece", no_wrap=True, min_width=10)
    for heading in ("in the graph", "alone"):
        table.add_column(heading, no_wrap=True, min_width=_BAR + 8)
    table.add_column("verdict", no_wrap=True, min_width=7)
    for piece in report.pieces:
        if piece.arithmetic is arithmetic:
            alone = piece.alone.measurement
            table.add_row(piece.name, _bar(piece.in_graph), _bar(alone), _verdict(piece))
    out.print(table)


def _verdict(piece: PieceDiff) -> str:
    if piece.alone.verdict is Verdict.FAIL:
        return f"[{_COLOURS[Verdict.FAIL]}]WRONG[/]"
    return "[yellow]follows[/]" if piece.in_graph.verdict is Verdict.FAIL else "[green]right[/]"


def _bar(measurement: Measurement) -> str:
    """A bar on a logarithmic scale whose middle is the gate."""
    share = gate_share(measurement)
    colour = _COLOURS[measurement.verdict]
    filled = 0 if share <= 0 else _BAR if math.isinf(share) else round(_BAR * (math.log10(share) + 3) / 6)
    filled = min(max(filled, 1 if share > 0 else 0), _BAR)
    number = "inf" if math.isinf(share) else f"{share:.2g}"
    return f"[{colour}]{'█' * filled}[/][dim]{'·' * (_BAR - filled)}[/] {number}"


def _print_steps(out: Console, piece: PieceDiff) -> None:
    table = Table(title=f"{piece.name} step by step, each alone on float64's values")
    table.title_justify = "left"
    table.add_column("step", no_wrap=True)
    table.add_column("value", no_wrap=True)
    for heading in ("error", "allowed"):
        table.add_column(heading, justify="right", no_wrap=True, min_width=7)
    table.add_column("verdict", no_wrap=True, min_width=7)
    for step in piece.steps:
        found = step.measurement
        word = "WRONG" if step.verdict is Verdict.FAIL else "right"
        table.add_row(
            step.step.name,
            step.value,
            f"{found.error:.1e}",
            f"{found.allowed:.1e}",
            f"[{_COLOURS[step.verdict]}]{word}[/]",
        )
    out.print(table)


def _print_settings(out: Console, report: DiffReport) -> None:
    table = Table(title=f"Against {report.setting}: the first piece with other numbers")
    table.title_justify = "left"
    table.add_column("setting", no_wrap=True)
    table.add_column("first", no_wrap=True)
    table.add_column("at the end", justify="right", no_wrap=True)
    table.add_column("beyond the gate", no_wrap=True)
    for changed in report.settings:
        if changed.error is not None:
            table.add_row(str(changed.setting), f"[red]not run: {changed.error}[/]", "", "")
            continue
        last = f"{changed.differences[-1][1]:.1e}" if changed.first else "0"
        beyond = f"[{_COLOURS[Verdict.FAIL]}]{changed.beyond}[/]" if changed.beyond else "[green]no[/]"
        table.add_row(str(changed.setting), changed.first or "none: equal bit for bit", last, beyond)
    out.print(table)


def plot_diff(report: DiffReport, path: Path) -> None:
    """Draws error by piece, in the graph and alone, with what is allowed. Raises ModuleNotFoundError for matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    arithmetics = list(dict.fromkeys(piece.arithmetic for piece in report.pieces))
    figure, all_axes = pyplot.subplots(
        1, len(arithmetics), figsize=(6.5 * len(arithmetics), 4), squeeze=False, layout="constrained"
    )
    for axes, arithmetic in zip(all_axes[0], arithmetics, strict=True):
        pieces = [piece for piece in report.pieces if piece.arithmetic is arithmetic]
        places = range(len(pieces))
        axes.plot(places, _drawn([p.in_graph.error for p in pieces]), "o-", label="in the graph")
        axes.plot(places, _drawn([p.alone.measurement.error for p in pieces]), "s-", label="alone")
        axes.plot(places, [p.in_graph.allowed for p in pieces], "--", color="tab:blue", label="allowed in the graph")
        axes.plot(
            places, [p.alone.measurement.allowed for p in pieces], "--", color="tab:orange", label="allowed alone"
        )
        for at, piece in enumerate(pieces):
            if piece.alone.verdict is Verdict.FAIL:
                axes.axvline(at, color="red", alpha=0.4)
        axes.set_yscale("log")
        axes.set_xticks(places, [piece.name for piece in pieces], rotation=60, ha="right", fontsize=7)
        axes.set_ylabel("largest error against float64")
        axes.set_title(f"{report.bundle}, {arithmetic}")
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _drawn(errors: list[float]) -> list[float]:
    """A logarithmic scale has no zero, and no infinity."""
    return [error if 0 < error < math.inf else math.nan for error in errors]
