"""Runs a guide's blocks, one after the other, in a folder that looks like the top of the source tree."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .guide import Block

ROOT = Path(__file__).parents[2]
_READ_BY_COMMANDS = ("checkpoints", "configs", "examples")


@dataclass
class GuideRun:
    """The folder and the Python names that the blocks of one guide share, and what each block printed."""

    folder: Path
    blocks: list[Block]
    names: dict[str, Any] = field(default_factory=lambda: {"__name__": "guide"})
    results: list[tuple[bool, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name in _READ_BY_COMMANDS:
            (self.folder / name).symlink_to(ROOT / name)

    def result(self, index: int) -> tuple[bool, str]:
        """Whether a block failed, and what it printed; it runs after all those before it."""
        while len(self.results) <= index:
            block = self.blocks[len(self.results)]
            self.results.append(_RUNNERS[block.language](self, block.code))
        return self.results[index]

    def _commands(self, code: str) -> tuple[bool, str]:
        environment = {
            **os.environ,
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            "OMP_NUM_THREADS": "1",  # models this small compute no sooner with more
        }
        done = subprocess.run(
            ["bash", "-e", "-o", "pipefail", "-c", code],
            cwd=self.folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            timeout=300,
        )
        return done.returncode != 0, done.stdout

    def _statements(self, code: str) -> tuple[bool, str]:
        printed = io.StringIO()
        with contextlib.chdir(self.folder), contextlib.redirect_stdout(printed):
            try:
                exec(compile(code, "<guide>", "exec"), self.names)
            except Exception as error:
                return True, printed.getvalue() + "".join(traceback.format_exception_only(error))
        return False, printed.getvalue()

    def _nothing(self, code: str) -> tuple[bool, str]:
        return False, ""


_RUNNERS = {"bash": GuideRun._commands, "python": GuideRun._statements, "bash install": GuideRun._nothing}
