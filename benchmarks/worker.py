"""One engine in a process of its own: loads, says so, then measures on command.

    python -m benchmarks.worker '{"engine": "llama_cpp", "options": {...}}'

Commands and answers are lines of JSON on standard input and output; whatever the libraries print goes to standard
error. Only the standard library is imported here, so that a process's start is the engine's own.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Iterator
from typing import Any, TextIO

Reply = dict[str, Any]


class Worker:
    """Runs commands on an engine; keeps one generation open, for measuring behind a long context.

    An engine that runs ahead of its reader (`runs_ahead`) cannot be kept open: it would compute during the other side's
    turn. It fills its context anew for each measurement behind it, which is not timed.
    """

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._runs_ahead = getattr(engine, "runs_ahead", False)
        self._open: Iterator[int] = iter(())
        self._prompt: list[int] = []

    def generate(self, prompt: list[int], new_tokens: int) -> Reply:
        """Time to the first token, and from there to the last."""
        self._open = iter(())  # frees the cache of the one before
        start = time.perf_counter()
        generation = self._engine.generate(prompt, new_tokens)
        tokens = [next(generation)]
        first = time.perf_counter()
        tokens += generation
        return {"first_s": first - start, "rest_s": time.perf_counter() - first, "tokens": tokens}

    def begin(self, prompt: list[int], new_tokens: int) -> Reply:
        """Starts a generation of at most `new_tokens`, which `go_on` continues."""
        self._prompt = prompt
        if self._runs_ahead:
            return {"first_s": self.generate(prompt, 1)["first_s"]}
        self._open = iter(())
        start = time.perf_counter()
        self._open = self._engine.generate(prompt, new_tokens)
        next(self._open)
        return {"first_s": time.perf_counter() - start}

    def go_on(self, new_tokens: int) -> Reply:
        """The next tokens of the generation that is open; the first of them is not timed."""
        if self._runs_ahead:
            self._open = self._engine.generate(self._prompt, 1 + new_tokens)
            next(self._open)
        next(self._open)
        start = time.perf_counter()
        for _ in range(new_tokens - 1):
            next(self._open)
        return {"rest_s": time.perf_counter() - start}

    def status(self, distributions: list[str]) -> Reply:
        """Versions of libraries, and what every answer has: the peak of memory so far."""
        from importlib.metadata import version

        return {"versions": {name: version(name) for name in distributions}}


def main() -> None:
    answers, spec = _private_stdout(), json.loads(sys.argv[1])
    start = time.perf_counter()
    module = importlib.import_module(f"benchmarks.engines.{spec['engine']}")
    imported = time.perf_counter()
    worker = Worker(module.Engine(**spec["options"]))
    loaded = time.perf_counter()
    _answer(answers, {"import_s": imported - start, "load_s": loaded - imported})
    for line in sys.stdin:
        command = json.loads(line)
        _answer(answers, getattr(worker, command.pop("do"))(**command))


def _private_stdout() -> TextIO:
    """Standard output for answers alone; file descriptor 1 becomes standard error."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return answers


def _answer(answers: TextIO, reply: Reply) -> None:
    answers.write(json.dumps({**reply, "peak_rss": _peak_rss()}) + "\n")
    answers.flush()


def _peak_rss() -> int | None:
    """Bytes; counted from this program's start, unlike ru_maxrss, which may be the parent's."""
    try:
        with open("/proc/self/status", encoding="ascii") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return None


if __name__ == "__main__":
    main()
