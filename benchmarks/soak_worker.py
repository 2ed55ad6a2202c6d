"""Generates without end and watches its own memory; `soak.py` runs it, in a process that has nothing else.

Requests differ in length, sampling, batch and in how they end: by themselves, closed or dropped midway, stopped by
another thread, or refused. With several callers, so many threads take them from one list, and memory is read when all
have come back.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import random
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click

from cosmos_runtime import InputError, Sampling, Session, generate, generate_batch, generate_text, load, score
from cosmos_runtime.cache import KeyValueCache

MOST_NEW = 32
MOST_ROWS = 4


class Requests:
    """Makes requests; the same for the same seed."""

    def __init__(self, session: Session, seed: int) -> None:
        self._session, self._seed = session, seed
        self._vocab_size = session.manifest.vocab_size
        self._longest = session.manifest.max_sequence_length - MOST_NEW
        self._kinds = [kind for kind in KINDS if kind is not Requests.text or session.manifest.tokenizer]

    def do(self, number: int) -> str:
        """Does request `number`; what kind it was."""
        rng = random.Random(f"{self._seed} {number}")
        kind = rng.choice(self._kinds)
        kind(self, rng)
        return kind.__name__

    def whole(self, rng: random.Random) -> None:
        list(self._begin(rng))

    def speculating(self, rng: random.Random) -> None:
        ids = (self._ids(rng)[:9] * 9)[: self._longest]
        list(generate(self._session, ids, max_new_tokens=MOST_NEW, speculate=4))

    def closed(self, rng: random.Random) -> None:
        generation = self._begin(rng)
        for _ in range(rng.randint(0, 3)):
            next(generation, None)
        generation.close()

    def dropped(self, rng: random.Random) -> None:
        generation = self._begin(rng)
        next(generation)

    def stopped(self, rng: random.Random) -> None:
        generation = self._begin(rng)
        other = threading.Timer(rng.random() / 200, generation.stop)
        other.start()
        list(generation)
        other.join()

    def batch(self, rng: random.Random) -> None:
        prompts = [self._ids(rng) for _ in range(rng.randint(1, MOST_ROWS))]
        generation = generate_batch(self._session, prompts, max_new_tokens=self._new(rng), sampling=self._sampling(rng))
        if rng.random() < 0.3:
            next(generation)
            generation.close()
        generation.run()

    def text(self, rng: random.Random) -> None:
        options = {"sampling": self._sampling(rng), "stop": ["\n\n"]}
        pieces = generate_text(self._session, "To be, or not " * rng.randint(1, 9), max_new_tokens=MOST_NEW, **options)
        next(pieces) if rng.random() < 0.3 else list(pieces)

    def scored(self, rng: random.Random) -> None:
        score(self._session, [0, *self._ids(rng)])

    def refused(self, rng: random.Random) -> None:
        try:
            generate(self._session, [*self._ids(rng), self._vocab_size], max_new_tokens=1)
        except InputError:
            return
        raise AssertionError("an id beyond the vocabulary was taken")

    def _begin(self, rng: random.Random) -> Any:
        ids, sampling = self._ids(rng), self._sampling(rng)
        return generate(self._session, ids, max_new_tokens=self._new(rng), sampling=sampling)

    def _ids(self, rng: random.Random) -> list[int]:
        return [rng.randrange(self._vocab_size) for _ in range(rng.randint(1, self._longest))]

    def _new(self, rng: random.Random) -> int:
        return rng.randint(1, MOST_NEW)

    def _sampling(self, rng: random.Random) -> Sampling:
        temperature, top_k, top_p = rng.choice([0.0, 0.7, 1.0]), rng.choice([0, 40]), rng.choice([0.9, 1.0])
        return Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=rng.randrange(1 << 16))


KINDS: tuple[Callable[[Requests, random.Random], None], ...] = (
    *(Requests.whole, Requests.whole, Requests.whole, Requests.batch, Requests.text, Requests.speculating),
    *(Requests.closed, Requests.dropped, Requests.stopped, Requests.scored, Requests.refused),
)


@click.command(help=(__doc__ or "").partition("\n")[0])
@click.argument("bundle", type=click.Path(path_type=Path, exists=True))
@click.option("--generations", type=click.IntRange(min=1), default=2000, show_default=True)
@click.option("--every", type=click.IntRange(min=1), default=50, show_default=True, help="Generations a reading.")
@click.option("--callers", type=click.IntRange(min=1), default=1, show_default=True, help="Threads that ask.")
@click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True, help="Threads that compute.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--trim", "trims", is_flag=True, help="Collect garbage and trim before each reading.")
def main(bundle: Path, generations: int, every: int, callers: int, threads: int, seed: int, trims: bool) -> None:
    """Prints one line of JSON: the readings, what was done, and what is left."""
    caches = _count_caches()
    session = load(bundle, threads=threads)
    requests, kinds = Requests(session, seed), Counter[str]()
    readings = [reading(0)]
    with ThreadPoolExecutor(callers) as pool:
        for start in range(0, generations, every):
            numbers = range(start, min(start + every, generations))
            kinds.update(pool.map(requests.do, numbers) if callers > 1 else map(requests.do, numbers))
            if trims:
                trim()
            readings.append(reading(numbers.stop))
    result = {"readings": readings, "kinds": kinds, "caches_bytes": caches["bytes"], "left": left_over()}
    trim()
    click.echo(json.dumps({**result, "trimmed": reading(generations)}))


def reading(generation: int) -> dict[str, int]:
    """What the process has: bytes of memory, and Python's blocks.

    `resident` counts mapped weights, too, `anonymous` does not; `allocated` is what was asked of the C library and not
    given back, which is the part of it that a leak would be in. The rest is free memory that it keeps.
    """
    fields = dict(_status())
    return {
        "generation": generation,
        "allocated": _allocated(),
        "resident": fields["VmRSS"],
        "anonymous": fields["RssAnon"],
        "python_blocks": sys.getallocatedblocks(),
        "files": len(os.listdir("/proc/self/fd")),
    }


def left_over() -> dict[str, int]:
    """Caches and the like that are alive although every request is over; cycles are not collected before."""
    modules = ("cosmos_runtime.cache", "cosmos_runtime.binding", "cosmos_runtime.decoding", "cosmos_runtime.generation")
    alive = (type(thing) for thing in gc.get_objects() if type(thing).__module__ in modules)
    return dict(Counter(kind.__name__ for kind in alive if kind.__name__ != "OnnxGraph"))


def trim() -> None:
    """Have the C library give back what it keeps for later."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


class _HeapInfo(ctypes.Structure):
    """mallinfo(3), of all arenas."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in ("arena", "ordblks", "smblks", "hblks", "mapped", "usmblks", "fsmblks", "used", "free", "keepcost")
    )


def _allocated() -> int:
    ask = ctypes.CDLL(None).mallinfo2
    ask.restype = _HeapInfo
    info = ask()
    return int(info.used + info.mapped)


def _status() -> Iterator[tuple[str, int]]:
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition(":")
        if value.endswith("kB"):
            yield name, 1024 * int(value.split()[0])


def _count_caches() -> Counter[str]:
    """Counts the bytes of all caches that are made from now on: what 1,000 generations would lose if they leaked."""
    found, create, lock = Counter[str](), KeyValueCache.__init__, threading.Lock()

    def counted(cache: KeyValueCache, *arguments: Any) -> None:
        create(cache, *arguments)
        with lock:
            found["bytes"] += cache.size

    KeyValueCache.__init__ = counted  # type: ignore[method-assign]
    return found


if __name__ == "__main__":
    main()
