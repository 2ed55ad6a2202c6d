"""An engine's process as the benchmark sees it: started, asked, watched while idle, ended."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

ROOT = Path(__file__).resolve().parent.parent

# Nothing is fetched at run time, and pools that a library makes for itself have the size that was asked for.
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
POOLS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class EngineFailureError(Exception):
    """An engine's process ended or could not do what it was asked; the text has the end of what it printed."""


@dataclass(frozen=True)
class Variant:
    """One engine on one file or folder: a column of the comparison."""

    engine: str
    precision: str  # the class in which it competes: fp32, int8, int4
    label: str
    options: Mapping[str, Any] = field(default_factory=dict)
    python: str = sys.executable

    @property
    def key(self) -> str:
        """What results are filed under."""
        return f"{self.engine}/{self.label}"


class EngineProcess:
    """A context manager: the variant's worker, loaded when the block begins, gone when it ends."""

    def __init__(self, variant: Variant, *, threads: int, context: int, log: Path) -> None:
        self.variant, self._log = variant, log
        options = {"threads": threads, "context": context, **variant.options}
        spec = json.dumps({"engine": variant.engine, "options": options})
        self._command = [variant.python, "-m", "benchmarks.worker", spec]
        self._environment = {**os.environ, **OFFLINE, **dict.fromkeys(POOLS, str(threads))}
        self.loaded: dict[str, Any] = {}

    def __enter__(self) -> Self:
        self.started = time.perf_counter()
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                self._command,
                cwd=ROOT,
                env=self._environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        try:
            self.loaded = self._answer()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Sends a command and waits for its answer. Raises EngineFailureError."""
        stdin = self._process.stdin
        assert stdin is not None
        try:
            stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            stdin.flush()
        except BrokenPipeError:
            raise self._failure() from None
        return self._answer()

    def processor_seconds(self) -> float | None:
        """What the process has used so far, to a hundredth; None where that is unknown."""
        try:
            stat = Path(f"/proc/{self._process.pid}/stat").read_text(encoding="utf-8")
        except OSError:
            return None
        user, system = stat.rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")

    def _answer(self) -> dict[str, Any]:
        stdout = self._process.stdout
        assert stdout is not None
        line = stdout.readline()
        if not line:
            raise self._failure()
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _failure(self) -> EngineFailureError:
        status = self._process.wait(timeout=60)
        tail = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-6:]
        return EngineFailureError(f"{self.variant.key}: exit status {status}: " + " | ".join(tail))

    def _end(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
