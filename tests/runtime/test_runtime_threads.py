"""One session, many threads: every result is the one it gives alone, and nothing of a request lives on."""

import gc
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cosmos_runtime import (
    FULL_SEQUENCE,
    BatchGeneration,
    CosmosRuntimeError,
    Generation,
    InputError,
    Sampling,
    Session,
    Tokenizer,
    decoder_graph,
    device_stream,
    generate,
    generate_batch,
    generate_text,
    load,
    score,
)
from cosmos_runtime.arrays import Floats, TokenIds
from cosmos_runtime.batch_decoding import CachedBatchDecoder
from cosmos_runtime.binding import GraphBinding
from cosmos_runtime.decoder_graph import Appender, DecoderGraph
from cosmos_runtime.decoding import new_decoder
from cosmos_runtime.device_stream import CudaStream
from cosmos_runtime.generation import new_continuation
from cosmos_runtime.threads import runs_at_once

from .tiny_decoders import VOCAB_SIZE
from .under_load import alive, at_once, disagreements, jobs


@pytest.mark.parametrize("graph", ["decoder", FULL_SEQUENCE])
@pytest.mark.parametrize(("seed", "threads"), [(0, 1), (1, 1), (2, 2)])
def test_each_result_is_the_one_it_gives_alone(decoder_path: Path, graph: str, seed: int, threads: int) -> None:
    session = load(decoder_path, graph=graph, threads=threads)
    assert disagreements(jobs(session, seed)) == []


def test_sessions_of_one_bundle_at_once(decoding: Session, recomputing: Session) -> None:
    assert disagreements([*jobs(decoding, 3, each=2), *jobs(recomputing, 3, each=2)]) == []


# What is left


@pytest.fixture
def nothing_left() -> Iterator[Callable[[], Counter[str]]]:
    """What is alive now and was not before the test, with nobody collecting cycles: whatever is in one counts."""
    gc.collect()
    before = alive()
    gc.disable()
    yield lambda: alive() - before
    gc.enable()


def begin_all(session: Session) -> list[Any]:
    """Something of each kind that holds a cache, two tokens on."""
    begun = [
        generate(session, [1, 2, 3], max_new_tokens=20),
        generate(session, [1, 2, 1, 2, 1, 2], max_new_tokens=20, speculate=4),
        generate_text(session, "a", max_new_tokens=20, sampling=Sampling(seed=1)),
        generate_batch(session, [[1], [2, 3]], max_new_tokens=20),
    ]
    for one in begun:
        next(one), next(one)
    return begun


@pytest.mark.parametrize("name", ["decoding", "recomputing"])
@pytest.mark.parametrize("end", ["exhaust", "close", "stop", "drop"])
def test_nothing_of_a_request_lives_on(
    name: str, end: str, request: pytest.FixtureRequest, nothing_left: Callable[[], Counter[str]]
) -> None:
    begun = begin_all(request.getfixturevalue(name))
    assert len(nothing_left()) > 2
    if end == "drop":
        del begun
        assert nothing_left() == {}
        return
    for one in begun:
        list(one) if end == "exhaust" else getattr(one, end)()
        if end == "stop":
            list(one)
    left = nothing_left()
    assert set(left) <= {"Generation", "BatchGeneration"}  # which the test itself still has
    del begun, one
    assert nothing_left() == {}


def test_nothing_of_a_score_or_a_call_lives_on(decoding: Session, nothing_left: Callable[[], Counter[str]]) -> None:
    score(decoding, [1, 2, 3])
    decoding.logits([[1, 2], [3, 4]])
    decoder = new_decoder(decoding, 20)
    decoder.decode(np.array([1, 2, 3]))
    del decoder
    assert nothing_left() == {}


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Runs of a graph fail from the one on whose number is put in here."""
    failing, runs, run = [10**9], [0], GraphBinding.run

    def count(binding: GraphBinding) -> None:
        runs[0] += 1
        if runs[0] >= failing[0]:
            raise CosmosRuntimeError("the device is gone")
        run(binding)

    monkeypatch.setattr(GraphBinding, "run", count)
    return failing


@pytest.mark.parametrize("begin", [generate, generate_batch])
@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_failure_frees_and_ends(
    decoding: Session, failing: list[int], nothing_left: Callable[[], Counter[str]], begin: Callable[..., Any], at: int
) -> None:
    failing[0] = at
    prompts: list[Any] = [1, 2] if begin is generate else [[1, 2]]
    generation = begin(decoding, prompts, max_new_tokens=9)
    message, found = "", 0
    try:
        for _ in generation:
            found += 1
    except CosmosRuntimeError as error:
        message = str(error)
    assert (message, found) == ("the device is gone", at - 1)
    assert set(nothing_left()) == {type(generation).__name__}
    failing[0] = 10**9
    assert list(generation) == []  # it does not go on from a cache that may hold anything


# Ends that come from elsewhere


class Scripted:
    """A decoder that does something in the middle of a step, as another thread might."""

    length, graph_seconds, diagnosis = 0, 0.0, None

    def __init__(self, meanwhile: Callable[[], object], at: int) -> None:
        self._meanwhile, self._left, self.cancelled = meanwhile, at, False

    def prefill(self, ids: TokenIds) -> Floats:
        return self._logits()

    def decode_one_token(self, token_id: int) -> Floats:
        return self._logits()

    def cancel(self) -> None:
        self.cancelled = True

    def _logits(self) -> Floats:
        if self._left == 0:
            self._meanwhile()
        self._left -= 1
        return np.eye(8, dtype=np.float32)[1]


def with_script(session: Session, at: int, meanwhile: Callable[[Generation], object]) -> tuple[Generation, Scripted]:
    continuation = new_continuation(session, [1], max_new_tokens=9, min_new_tokens=0, sampling=None, stop_ids=())
    decoder = Scripted(lambda: meanwhile(generation), at)
    generation = Generation(continuation, lambda: decoder)
    return generation, decoder


@pytest.mark.parametrize("end", [Generation.stop, Generation.close])
@pytest.mark.parametrize("at", [0, 2])
def test_an_end_in_the_middle_of_a_step(session: Session, end: Callable[[Generation], None], at: int) -> None:
    generation, decoder = with_script(session, at, end)
    assert list(generation) == [1] * at
    assert generation.finish_reason == "stop"
    assert decoder.cancelled
    assert generation._decoder is None


def test_an_end_before_there_is_a_decoder(decoding: Session) -> None:
    """It comes while the cache is made: the prompt is not computed for nothing."""
    continuation = new_continuation(decoding, [1], max_new_tokens=9, min_new_tokens=0, sampling=None, stop_ids=())
    decoder = new_decoder(decoding, 10)

    def start() -> Any:
        generation.stop()
        return decoder

    generation = Generation(continuation, start)
    assert list(generation) == []
    assert decoder.length == 0


def test_an_end_of_a_batch_between_its_prompts(decoding: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = generate_batch(decoding, [[1, 2], [3], [4]], max_new_tokens=9)
    prefilled: list[int] = []
    prefill = CachedBatchDecoder.prefill

    def stop_after_one(decoder: CachedBatchDecoder, row: int, ids: TokenIds) -> Floats:
        prefilled.append(row)
        logits = prefill(decoder, row, ids)
        batch.stop()
        return logits

    monkeypatch.setattr(CachedBatchDecoder, "prefill", stop_after_one)
    assert batch.run() == [[], [], []]
    assert prefilled == [0]


def test_a_cancelled_batch_takes_no_more_prompts(decoding: Session) -> None:
    assert isinstance(decoding.graph, DecoderGraph)
    decoder = CachedBatchDecoder(decoding.graph, 2, 20)
    decoder.prefill(0, np.array([1, 2]))
    decoder.cancel()
    with pytest.raises(CosmosRuntimeError):
        decoder.prefill(1, np.array([3]))
    with pytest.raises(CosmosRuntimeError):
        decoder.decode([0], [1])


# What threads share


def test_threads_that_share_a_generation_get_each_token_once(decoding: Session) -> None:
    for seed in range(5):
        sampling = Sampling(temperature=3.0, seed=seed)
        wanted = list(generate(decoding, [1, 2], max_new_tokens=64, sampling=sampling))
        shared = generate(decoding, [1, 2], max_new_tokens=64, sampling=sampling)
        found: list[int] = []
        at_once([lambda shared=shared, found=found: found.extend(shared)] * 8, threads=8)
        assert Counter(found) == Counter(wanted)
        assert shared.tokens == wanted


def test_threads_that_share_a_batch_or_a_text(decoding: Session) -> None:
    prompts = [[1], [2, 3]]
    wanted = generate_batch(decoding, prompts, max_new_tokens=40).run()
    batch: BatchGeneration = generate_batch(decoding, prompts, max_new_tokens=40)
    at_once([batch.run] * 8, threads=8)
    assert [row.tokens for row in batch.rows] == wanted
    options: dict[str, Any] = {"max_new_tokens": 60, "sampling": Sampling(temperature=3.0, seed=1)}
    text = generate_text(decoding, "a", **options)
    at_once([lambda: list(text)] * 8, threads=8)
    assert text.text == "".join(generate_text(decoding, "a", **options))


def test_one_tokenizer_and_one_set_of_loops(bundle_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session, made = load(bundle_path, threads=1), []
    read = Tokenizer.from_file

    def slowly(*arguments: Any, **options: Any) -> Tokenizer:
        made.append(threading.get_ident())
        time.sleep(0.05)
        return read(*arguments, **options)

    monkeypatch.setattr(Tokenizer, "from_file", slowly)
    found: list[Tokenizer] = []
    at_once([lambda: found.append(session.tokenizer)] * 16, threads=16)
    assert len(made) == 1
    assert len({id(tokenizer) for tokenizer in found}) == 1


def test_prompts_take_turns(decoder_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that 32 prompts do not take memory for the activations of 32."""
    monkeypatch.setattr("cosmos_runtime.threads._usable_cores", lambda: 3)
    session = load(decoder_path, threads=1)
    running, most, lock, run = [0], [0], threading.Lock(), decoder_graph._run

    def watch(*arguments: Any, **options: Any) -> None:
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        time.sleep(0.005)
        run(*arguments, **options)
        with lock:
            running[0] -= 1

    monkeypatch.setattr(decoder_graph, "_run", watch)
    at_once([lambda: next(generate(session, [1, 2, 3], max_new_tokens=1))] * 32)
    assert most[0] == 3


@pytest.mark.parametrize(("threads", "most"), [(None, 2), (1, 8), (2, 4), (3, 2), (8, 2), (100, 2)])
def test_how_many_prompts_at_once(monkeypatch: pytest.MonkeyPatch, threads: int | None, most: int) -> None:
    monkeypatch.setattr("cosmos_runtime.threads._usable_cores", lambda: 8)
    assert runs_at_once(threads) == most


def test_a_prompt_that_fails_gives_its_turn_back(decoding: Session, failing: list[int]) -> None:
    failing[0] = 1
    for _ in range(20):
        with pytest.raises(CosmosRuntimeError, match="the device is gone"):
            next(generate(decoding, [1], max_new_tokens=1))
    failing[0] = 10**9
    assert len(list(generate(decoding, [1], max_new_tokens=3))) == 3


def test_a_refused_request_disturbs_nobody(decoding: Session) -> None:
    wanted = list(generate(decoding, [1, 2], max_new_tokens=40))
    generation = generate(decoding, [1, 2], max_new_tokens=40)
    found = [next(generation)]
    for bad in ([VOCAB_SIZE], [], [[1]]):
        with pytest.raises(InputError):
            generate(decoding, bad, max_new_tokens=3)
        found.append(next(generation))
    assert found + list(generation) == wanted


# A GPU's memory is counted by threads and by the garbage collector


class NoDriver:
    def call(self, name: str, *arguments: object) -> None:
        pass


def test_what_is_collected_while_memory_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The collector may release a cache inside `reserve`, in the same thread: neither a deadlock nor a lost byte."""
    monkeypatch.setattr(device_stream, "Driver", NoDriver)
    stream = CudaStream(memory_limit=100)
    stream.reserve(80, "a cache")

    def release_inside() -> None:
        with stream._counting:
            stream.release(80)

    at_once([release_inside], threads=1)
    assert stream.memory_left == 100
    at_once([lambda: (stream.reserve(2, "a cache"), stream.release(2))] * 500)
    assert stream.memory_left == 100
    with pytest.raises(CosmosRuntimeError, match="101 bytes are wanted, and of a gpu_mem_limit of 100 there are 100"):
        stream.reserve(101, "a cache")


def test_no_work_is_given_while_a_thread_captures(monkeypatch: pytest.MonkeyPatch, decoding: Session) -> None:
    """On CUDA it would go into the graph that is captured. The lock is a stream's; here the host's runs take it."""
    monkeypatch.setattr(device_stream, "Driver", NoDriver)
    stream, captures = CudaStream(), []
    monkeypatch.setattr(device_stream.HostStream, "working", lambda host: stream.working())
    run = decoder_graph._run

    def watch(*arguments: Any, **options: Any) -> None:
        assert not captures
        run(*arguments, **options)
        assert not captures

    monkeypatch.setattr(decoder_graph, "_run", watch)

    def capture() -> None:
        with stream.capturing():
            captures.append(1)
            time.sleep(0.002)
            captures.pop()

    wanted = list(generate(decoding, [1, 2], max_new_tokens=20))
    found: list[list[int]] = []
    requests = [lambda: found.append(list(generate(decoding, [1, 2], max_new_tokens=20)))] * 12
    at_once([task for request in requests for task in (request, capture)], threads=8)
    assert found == [wanted] * 12


def test_appenders_need_no_turn_to_be_made(decoding: Session) -> None:
    """Turns are for runs: requests that wait for their next token hold none."""
    assert isinstance(decoding.graph, DecoderGraph)
    held = [generate(decoding, [1, 2, 3], max_new_tokens=9) for _ in range(40)]
    assert len({next(generation) for generation in held}) == 1
    cache = decoding.graph.new_cache(1, 8)
    assert len([Appender(decoding.graph, cache) for _ in range(40)]) == 40
