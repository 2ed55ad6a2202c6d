"""Of all tests: where several processes share them (`make test`), each has a processor of its own.

Otherwise every session, and every command that a test starts, would compute with as many threads as there are cores,
and threads that wait for each other would take the time of those that compute.
"""

import os


def pytest_configure() -> None:
    worker = os.environ.get("PYTEST_XDIST_WORKER", "").removeprefix("gw")
    if worker and hasattr(os, "sched_setaffinity"):  # Linux; elsewhere the system shares them out
        processors = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {processors[int(worker) % len(processors)]})
