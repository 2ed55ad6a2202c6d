"""Work of many kinds for one session, done alone and by many threads at once; and what is still alive behind it."""

import faulthandler
import gc
import queue
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from cosmos_runtime import InputError, Sampling, Session, generate, generate_batch, generate_text, score
from cosmos_runtime.batch_generation import BatchGeneration
from cosmos_runtime.binding import GraphBinding
from cosmos_runtime.cache import KeyValueCache
from cosmos_runtime.decoder_graph import Appender, Stepper
from cosmos_runtime.decoding import CachedDecoder, FullSequenceDecoder
from cosmos_runtime.generation import Generation
from cosmos_runtime.heads import MemoryBank, has_heads
from cosmos_runtime.lookup import SpeculatingDecoder

THREADS = 32
# A deadlock fails with the stacks of all threads, long before the test runner's own limit.
PATIENCE = 120.0
# What a request makes and nobody needs after it.
OF_A_REQUEST = (
    Appender,
    BatchGeneration,
    CachedDecoder,
    FullSequenceDecoder,
    Generation,
    GraphBinding,
    KeyValueCache,
    MemoryBank,
    SpeculatingDecoder,
    Stepper,
)

Result = Any


@dataclass(frozen=True)
class Job:
    """`run` gives the same whenever it is done. Where there is `whole`, `run` is cut short: it gives a beginning of it,
    as long as the moment wants."""

    name: str
    run: Callable[[], Result]
    whole: Callable[[], list[int]] | None = None

    def alone(self) -> Result:
        return (self.whole or self.run)()

    def agrees(self, found: Result, alone: Result) -> bool:
        return bool(found == (alone if self.whole is None else alone[: len(found)]))


def jobs(session: Session, seed: int, *, each: int = 3) -> list[Job]:
    """`each` of every kind that the session's model can do, with inputs of many lengths."""
    found = []
    for kind, (can, make) in KINDS.items():
        for at in range(each if can(session) else 0):
            rng = random.Random(f"{seed} {kind} {at}")
            job = make(session, rng)
            found.append(Job(f"{kind} {at} of seed {seed}", job.run, job.whole))
    return found


def disagreements(work: Sequence[Job], *, rounds: int = 2, threads: int = THREADS) -> list[str]:
    """Does every job alone, then `rounds` times among those of many threads. What was not the same."""
    alone = [job.alone() for job in work]
    wrong: list[str] = []

    def do(job: Job, expected: Result) -> None:
        found = job.run()
        if not job.agrees(found, expected):
            wrong.append(f"{job.name}: {found!r}, and alone {expected!r}")

    tasks = [(job, expected) for job, expected in zip(work, alone, strict=True)] * rounds
    random.Random(len(tasks)).shuffle(tasks)
    at_once([lambda job=job, expected=expected: do(job, expected) for job, expected in tasks], threads)
    return wrong


def at_once(tasks: Sequence[Callable[[], object]], threads: int = THREADS) -> None:
    """Has threads that begin together do the tasks. Raises what the first failing one raised, or for a deadlock."""
    waiting: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
    for task in tasks:
        waiting.put(task)
    errors: list[BaseException] = []
    start = threading.Barrier(threads)

    def work() -> None:
        start.wait()
        try:
            while not errors:
                waiting.get_nowait()()
        except queue.Empty:
            return
        except BaseException as error:
            errors.append(error)

    workers = [threading.Thread(target=work, daemon=True, name=f"caller {at}") for at in range(threads)]
    for worker in workers:
        worker.start()
    end = time.monotonic() + PATIENCE
    for worker in workers:
        worker.join(max(end - time.monotonic(), 0))
    stuck = [worker.name for worker in workers if worker.is_alive()]
    if stuck:
        faulthandler.dump_traceback(file=sys.__stderr__, all_threads=True)
        raise AssertionError(f"still at work after {PATIENCE} s: {', '.join(stuck)}; stacks are on stderr")
    if errors:
        raise errors[0]


def alive() -> Counter[str]:
    """How many objects of requests there are, by type; those in a cycle, too, as long as nobody collects them."""
    return Counter(type(thing).__name__ for thing in gc.get_objects() if issubclass(type(thing), OF_A_REQUEST))


def _ids(session: Session, rng: random.Random, most: int) -> list[int]:
    longest = max(session.manifest.max_sequence_length - most, 1)
    return [rng.randrange(session.manifest.vocab_size) for _ in range(rng.randint(1, longest))]


def _new(session: Session, rng: random.Random) -> int:
    return rng.randint(4, min(24, session.manifest.max_sequence_length // 2))


def _sampling(rng: random.Random) -> Sampling:
    return Sampling(
        temperature=rng.choice([0.7, 1.0, 3.0]),
        top_k=rng.choice([0, 5, 40]),
        top_p=rng.choice([0.8, 1.0]),
        repetition_penalty=rng.choice([1.0, 1.2]),
        seed=rng.randrange(1000),
    )


def _greedy(session: Session, rng: random.Random) -> Job:
    new = _new(session, rng)
    ids = _ids(session, rng, new)
    return Job("", lambda: list(generate(session, ids, max_new_tokens=new)))


def _sampled(session: Session, rng: random.Random) -> Job:
    new, sampling = _new(session, rng), _sampling(rng)
    ids = _ids(session, rng, new)
    return Job("", lambda: list(generate(session, ids, max_new_tokens=new, sampling=sampling)))


def _stopped_by_ids(session: Session, rng: random.Random) -> Job:
    new, sampling = _new(session, rng), _sampling(rng)
    ids, stop_ids = _ids(session, rng, new), rng.sample(range(session.manifest.vocab_size), 20)
    options = {"max_new_tokens": new, "min_new_tokens": 2, "stop_ids": stop_ids, "sampling": sampling}
    return Job("", lambda: list(generate(session, ids, **options)))


def _speculating(session: Session, rng: random.Random) -> Job:
    new = _new(session, rng)
    ids = (_ids(session, rng, new)[:7] * 20)[: session.manifest.max_sequence_length - new]
    most = rng.randint(1, 6)
    return Job("", lambda: list(generate(session, ids, max_new_tokens=new, speculate=most)))


def _text(session: Session, rng: random.Random) -> Job:
    new = _new(session, rng)
    prompt, sampling = rng.choice(["a", "To be, or", "é€"]), _sampling(rng)
    options = {"max_new_tokens": new, "sampling": sampling, "stop": ["e", "\x05"]}
    return Job("", lambda: "".join(generate_text(session, prompt, **options)))


def _batch(session: Session, rng: random.Random) -> Job:
    new, rows = _new(session, rng), rng.randint(1, 5)
    prompts, sampling = [_ids(session, rng, new) for _ in range(rows)], [_sampling(rng) for _ in range(rows)]
    return Job("", lambda: generate_batch(session, prompts, max_new_tokens=new, sampling=sampling).run())


def _score(session: Session, rng: random.Random) -> Job:
    ids = [1, *_ids(session, rng, 1)]
    return Job("", lambda: score(session, ids).log_probabilities.tolist())


def _logits(session: Session, rng: random.Random) -> Job:
    width = len(_ids(session, rng, 0))
    rows = range(rng.randint(1, 3))
    ids = np.array([[rng.randrange(session.manifest.vocab_size) for _ in range(width)] for _ in rows])
    return Job("", lambda: session.logits(ids).tobytes())


def _diagnostics(session: Session, rng: random.Random) -> Job:
    new = _new(session, rng)
    ids = _ids(session, rng, new)

    def run() -> Result:
        generation = generate(session, ids, max_new_tokens=new, diagnostics=True)
        return list(generation), repr(generation.diagnostics)

    return Job("", run)


def _calls(session: Session, rng: random.Random) -> Job:
    prompts = [_ids(session, rng, 1) for _ in range(4)]

    def run() -> Result:
        memory = session.new_memory(1, calls=len(prompts))
        outputs = [session.call(prompt, memory=memory) for prompt in prompts]
        return [(output.logits.tobytes(), repr(output.diagnostics)) for output in outputs]

    return Job("", run)


def _closed_midway(session: Session, rng: random.Random) -> Job:
    new, sampling = _new(session, rng), _sampling(rng)
    ids, wanted = _ids(session, rng, new), rng.randint(0, 3)
    begin = partial(generate, session, ids, max_new_tokens=new, sampling=sampling)

    def run() -> list[int]:
        generation = begin()
        for _ in range(wanted):
            next(generation)
        generation.close()
        assert generation.finish_reason == "stop"
        return generation.tokens

    return Job("", run, whole=lambda: list(begin()))


def _dropped_midway(session: Session, rng: random.Random) -> Job:
    new = _new(session, rng)
    ids, wanted = _ids(session, rng, new), rng.randint(1, 3)
    begin = partial(generate, session, ids, max_new_tokens=new)

    def run() -> list[int]:
        generation = begin()
        return [next(generation) for _ in range(wanted)]

    return Job("", run, whole=lambda: list(begin()))


def _stopped_by_a_thread(session: Session, rng: random.Random) -> Job:
    new, delay, closes = _new(session, rng), rng.choice([0.0, 0.001, 0.01]), rng.random() < 0.5
    ids = _ids(session, rng, new)
    begin = partial(generate, session, ids, max_new_tokens=new)

    def run() -> list[int]:
        generation = begin()
        other = threading.Timer(delay, generation.close if closes else generation.stop)
        other.start()
        found = list(generation)
        other.join()
        assert found == generation.tokens
        return found

    return Job("", run, whole=lambda: list(begin()))


def _batch_stopped_by_a_thread(session: Session, rng: random.Random) -> Job:
    new, delay, closes = _new(session, rng), rng.choice([0.0, 0.001, 0.01]), rng.random() < 0.5
    prompts = [_ids(session, rng, new) for _ in range(3)]
    begin = partial(generate_batch, session, prompts, max_new_tokens=new)

    def run() -> list[int]:
        generation = begin()
        other = threading.Timer(delay, generation.close if closes else generation.stop)
        other.start()
        generation.run()
        other.join()
        return generation.rows[0].tokens

    return Job("", run, whole=lambda: begin().run()[0])


def _refused(session: Session, rng: random.Random) -> Job:
    vocab_size, longest = session.manifest.vocab_size, session.manifest.max_sequence_length
    ids = rng.choice([[], [[1], [2]], [vocab_size], [-1], [1.5], [0] * (longest + 1), ["a"], [2**70]])

    def run() -> str:
        try:
            list(generate(session, ids, max_new_tokens=3))
        except InputError as error:
            return str(error)
        raise AssertionError(f"{ids} was taken")

    return Job("", run)


def _any(session: Session) -> bool:
    return True


def _plain(session: Session) -> bool:
    return not has_heads(session.manifest)


def _heads(session: Session) -> bool:
    return has_heads(session.manifest)


KINDS: dict[str, tuple[Callable[[Session], bool], Callable[[Session, random.Random], Job]]] = {
    "greedy": (_any, _greedy),
    "sampled": (_any, _sampled),
    "stop ids": (_any, _stopped_by_ids),
    "speculating": (_plain, _speculating),
    "text": (lambda session: session.manifest.tokenizer is not None, _text),
    "batch": (_any, _batch),
    "score": (_plain, _score),
    "logits": (_any, _logits),
    "diagnostics": (_heads, _diagnostics),
    "calls with a memory": (_heads, _calls),
    "closed midway": (_any, _closed_midway),
    "dropped midway": (_any, _dropped_midway),
    "stopped by a thread": (_any, _stopped_by_a_thread),
    "batch stopped by a thread": (_any, _batch_stopped_by_a_thread),
    "refused": (_any, _refused),
}
