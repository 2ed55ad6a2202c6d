"""What the commands show when they have worked: the tables of a parity report."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from cosmos_export.parity.gates import Arithmetic, Verdict
from cosmos_export.parity.quality import Quality
from cosmos_export.parity.report import CaseResult, ParityReport, gate_share

_COLOURS = {Verdict.PASS: "green", Verdict.AMBIGUOUS: "yellow", Verdict.FAIL: "bold red"}


def console(*, stderr: bool = False) -> Console:
    """A console that never breaks a line of its own accord when its output is piped."""
    return Console(stderr=stderr, highlight=False, soft_wrap=True)


def print_report(report: ParityReport, *, stderr: bool = False) -> None:
    """The table of a report: one line a case, the measurement nearest to its gate."""
    out = console(stderr=stderr)
    table = Table(title=f"{report.bundle} against the eager model in float64 (largest errors, in logits)")
    table.title_justify = "left"
    table.add_column("case", no_wrap=True)
    for heading in ("error", "eager", "allowed", "of gate"):
        table.add_column(heading, justify="right", no_wrap=True, min_width=7)
    table.add_column("verdict", no_wrap=True, min_width=9)
    if report.layer_by_layer:
        _print_pieces(out, report)
        table.title = f"{report.bundle}: its pieces chained, against float64 all the way (largest errors, in logits)"
    for arithmetic in dict.fromkeys(case.arithmetic for case in report.cases):
        table.add_section()
        if arithmetic is not Arithmetic.FLOAT32:
            table.add_row(f"[dim]{arithmetic}:[/]")
        for case in report.cases:
            if case.arithmetic is arithmetic:
                table.add_row(*_cells(case))
    out.print(table)
    if report.count(Verdict.AMBIGUOUS):
        out.print("AMBIGUOUS: a best token changed where the reference's lead is less than the gate's tolerance")
    colour = "bold red" if report.stored_problems else "green"
    expected = sum(s.expected for s in report.stored)
    out.print(f"stored tensors: [{colour}]{report.stored_equal} of {expected}[/] {report.stored_kind}")
    for problem in report.stored_problems[:8]:
        out.print(problem, style="red", markup=False)
    if report.quality is not None:
        _print_quality(out, report.quality)
    for skipped in report.skipped:
        out.print(f"not run: {skipped.name}: {skipped.reason}")


def _print_pieces(out: Console, report: ParityReport) -> None:
    """One line a piece of a model that was compared layer by layer: the case nearest to its gate."""
    table = Table(title=f"{report.bundle} layer by layer: each piece alone, on float64's own input")
    table.title_justify = "left"
    table.add_column("piece", no_wrap=True, min_width=16)
    table.add_column("worst case", no_wrap=True)
    for heading in ("error", "allowed", "of gate"):
        table.add_column(heading, justify="right", no_wrap=True, min_width=7)
    table.add_column("verdict", no_wrap=True, min_width=7)
    for arithmetic in dict.fromkeys(piece.arithmetic for piece in report.pieces):
        table.add_section()
        if arithmetic is not Arithmetic.FLOAT32:
            table.add_row(f"[dim]{arithmetic}[/]")
        for piece in report.pieces:
            if piece.arithmetic is arithmetic:
                found = piece.measurement
                numbers = (f"{found.error:.1e}", f"{found.allowed:.1e}")
                verdict = f"[{_COLOURS[piece.verdict]}]{piece.verdict}[/]"
                table.add_row(piece.name, piece.case, *numbers, f"{gate_share(found):.1%}", verdict)
    out.print(table)


def _print_quality(out: Console, quality: Quality) -> None:
    verdict = {True: "[green]PASS[/]", False: "[bold red]FAIL[/]", None: "not gated"}[quality.passed]
    out.print(
        f"against the model before rounding, {quality.tokens} tokens of {quality.text}: "
        f"mean KL divergence {quality.mean_kl_divergence:.2g} nats (99.9 %: {quality.kl_divergence_999:.2g}), "
        f"same best token {quality.top1_agreement:.1%}, "
        f"perplexity {quality.perplexity:.2f} ({quality.model_perplexity:.2f} before): {verdict}"
    )


def _cells(case: CaseResult) -> tuple[str, ...]:
    worst = case.worst
    notes = [str(case.verdict)]
    if case.nonfinite:
        notes.append(f"{case.nonfinite} NaN or Inf")
    elif case.top1_changes:
        notes.append(f"{case.top1_changes} changed")
    return (
        case.name,
        f"{worst.error:.1e}",
        f"{worst.eager_error:.1e}",
        f"{worst.allowed:.1e}",
        f"{gate_share(worst):.1%}",
        f"[{_COLOURS[case.verdict]}]{', '.join(notes)}[/]",
    )
