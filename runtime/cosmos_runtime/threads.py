"""How many threads a session should compute with."""

import os
from pathlib import Path

from cosmos_runtime.errors import InputError

_TOPOLOGY = "/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"


def thread_count(threads: int | None) -> int:
    """`threads` if given, else the number of physical cores that this process may run on.

    Two hyper-threads share one core's multipliers, so a second thread on a core adds contention, not speed.

    Raises: InputError where `threads` is not a positive integer.
    """
    if threads is None:
        return _usable_cores()
    if not isinstance(threads, int) or isinstance(threads, bool) or threads < 1:
        raise InputError(f"threads: expected a positive integer or None, got {threads!r}")
    return threads


def runs_at_once(threads: int | None) -> int:
    """How many long runs (of a prompt, of a whole sequence) a session computes at once, each with `threads`.

    More than the cores can do would end no sooner, and each takes memory for its activations. Two at least: one
    computes where the other has work for a single thread.
    """
    return max(_usable_cores() // (threads or _usable_cores()), 2)


def _usable_cores() -> int:
    if not hasattr(os, "sched_getaffinity"):  # Windows, macOS
        return os.cpu_count() or 1
    return len({_core_of(cpu) for cpu in os.sched_getaffinity(0)})


def _core_of(cpu: int) -> str:
    """A name that hyper-threads of one core share; each processor its own where the system does not tell."""
    try:
        return Path(_TOPOLOGY.format(cpu=cpu)).read_text()
    except OSError:
        return str(cpu)
