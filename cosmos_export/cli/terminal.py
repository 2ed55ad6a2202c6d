"""What the commands show: stages with a bar while they work, and the table of a parity report."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from cosmos_export.parity.gates import Arithmetic, Verdict
from cosmos_export.parity.quality import Quality
from cosmos_export.parity.report import CaseResult, ParityReport, gate_share
from cosmos_export.progress import Silent

_COLOURS = {Verdict.PASS: "green", Verdict.AMBIGUOUS: "yellow", Verdict.FAIL: "bold red"}


def console(*, stderr: bool = False) -> Console:
    """A console that never breaks a line of its own accord when its output is piped."""
    return Console(stderr=stderr, highlight=False, soft_wrap=True)


class _Stages(Silent):
    """Shows each stage on a line of its own, with its seconds when it is done."""

    def __init__(self, bars: Progress) -> None:
        self._bars = bars
        self._task: TaskID | None = None
        self._title, self._began = "", time.monotonic()

    def stage(self, title: str) -> None:
        self.finish()
        self._title, self._began = title, time.monotonic()
        self._task = self._bars.add_task(title, total=None)

    def update(self, done: int, total: int) -> None:
        if self._task is not None:
            self._bars.update(self._task, completed=done, total=total)

    def note(self, text: str) -> None:
        self._bars.console.print(f"  note: {text}", style="yellow")

    def finish(self) -> None:
        if self._task is not None:
            self._bars.remove_task(self._task)
            self._bars.console.print(f"  {self._title} [dim]{time.monotonic() - self._began:.1f} s[/dim]")
            self._task = None


@contextlib.contextmanager
def shown_progress() -> Iterator[Silent]:
    """A progress that is drawn on standard error: bars on a terminal, plain lines elsewhere."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console(stderr=True), transient=True) as bars:
        stages = _Stages(bars)
        yield stages
        stages.finish()


def print_report(report: ParityReport, *, stderr: bool = False) -> None:
    """The table of a report: one line a case, the measurement nearest to its gate."""
    out = console(stderr=stderr)
    table = Table(title=f"{report.bundle} against the eager model in float64 (largest errors, in logits)")
    table.title_justify = "left"
    table.add_column("case", no_wrap=True)
    for heading in ("error", "eager", "allowed", "of gate"):
        table.add_column(heading, justify="right", no_wrap=True, min_width=7)
    table.add_column("verdict", no_wrap=True, min_width=9)
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
