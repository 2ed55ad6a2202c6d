"""What the commands show while they work: a line a stage, with a bar, and with bytes and a rate where bytes move."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from rich.console import Console
from rich.filesize import decimal
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.text import Text

from cosmos_export.progress import Silent


class _DoneColumn(ProgressColumn):
    """How much of a stage is done: units of all, or bytes of all and the rate."""

    def render(self, task: Task) -> Text:
        if task.total is None:
            return Text("")
        if not task.fields.get("counts_bytes"):
            return Text(f"{int(task.completed)}/{int(task.total)}", style="progress.download")
        return Text(_moved(int(task.completed), int(task.total), task.elapsed or 0.0), style="progress.download")


class Stages(Silent):
    """Shows each stage on a line of its own, with its seconds when it is done, and its bytes if it told of any."""

    def __init__(self, bars: Progress) -> None:
        self._bars = bars
        self._task: TaskID | None = None
        self._title, self._began, self._bytes = "", time.monotonic(), 0

    def stage(self, title: str) -> None:
        self.finish()
        self._title, self._began, self._bytes = title, time.monotonic(), 0
        self._task = self._bars.add_task(title, total=None)

    def update(self, done: int, total: int) -> None:
        if self._task is not None:
            self._bars.update(self._task, completed=done, total=total)

    def wrote(self, done: int, total: int) -> None:
        self._bytes = done
        if self._task is not None:
            self._bars.update(self._task, completed=done, total=total, counts_bytes=True)

    def note(self, text: str) -> None:
        self._bars.console.print(f"  note: {text}", style="yellow")

    def finish(self) -> None:
        if self._task is not None:
            self._bars.remove_task(self._task)
            seconds = time.monotonic() - self._began
            moved = f", {decimal(self._bytes)}, {_rate(self._bytes, seconds)}" if self._bytes else ""
            self._bars.console.print(f"  {self._title} [dim]{seconds:.1f} s{moved}[/dim]")
            self._task = None


@contextlib.contextmanager
def shown_progress() -> Iterator[Silent]:
    """A progress that is drawn on standard error: bars on a terminal, plain lines elsewhere."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), _DoneColumn(), TimeElapsedColumn())
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    with Progress(*columns, console=console, transient=True) as bars:
        stages = Stages(bars)
        yield stages
        stages.finish()


def _moved(done: int, total: int, seconds: float) -> str:
    return f"{decimal(done)} of {decimal(total)}, {_rate(done, seconds)}"


def _rate(done: int, seconds: float) -> str:
    return f"{decimal(round(done / max(seconds, 1e-3)))}/s"
