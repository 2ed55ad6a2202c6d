"""The cache: however tokens go in, the logits are those of the whole sequence, and nothing is copied."""

import weakref
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import pytest

from cosmos_runtime import CosmosRuntimeError, InputError, RewindingDecoder, Session, new_decoder
from cosmos_runtime import decoder_graph as decoder_graph_module
from cosmos_runtime.batch_decoding import CachedBatchDecoder, RowByRowDecoder, new_batch_decoder
from cosmos_runtime.cache import KeyValueCache, cache_length
from cosmos_runtime.decoder_graph import Appender, DecoderGraph
from cosmos_runtime.decoding import CachedDecoder, FullSequenceDecoder

from .tiny_decoders import HEAD_DIM, KV_HEADS, MAX_SEQUENCE_LENGTH, VOCAB_SIZE

IDS = np.random.default_rng(5).integers(0, VOCAB_SIZE, 60)


def assert_close(logits: npt.ArrayLike, expected: npt.ArrayLike) -> None:
    """Logits here are below 20; a wrong position, mask or cache entry moves them by more than 0.1."""
    np.testing.assert_allclose(logits, expected, rtol=0, atol=2e-5)


@pytest.fixture
def graph(decoding: Session) -> DecoderGraph:
    assert isinstance(decoding.graph, DecoderGraph)
    return decoding.graph


@pytest.fixture
def expected(recomputing: Session) -> np.ndarray:
    """Logits (T, V) of `IDS` from the graph without a cache."""
    return recomputing.logits(IDS)[0]


@pytest.fixture(params=["decoding", "recomputing"])
def decoder(request: pytest.FixtureRequest) -> RewindingDecoder:
    """Every kind of decoder."""
    return new_decoder(request.getfixturevalue(request.param), len(IDS))


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder_graph_module, "CHUNK", 7)


def test_logits_of_both_graphs(decoding: Session, recomputing: Session) -> None:
    ids = IDS[:40].reshape(2, 20)
    assert_close(decoding.logits(ids), recomputing.logits(ids))
    assert decoding.logits(ids).dtype == np.float32


@pytest.mark.usefixtures("small_chunks")
def test_logits_in_chunks(decoding: Session, recomputing: Session) -> None:
    ids = IDS[:40].reshape(2, 20)
    assert_close(decoding.logits(ids), recomputing.logits(ids))


def test_logits_keep_no_state(decoding: Session) -> None:
    first = decoding.logits(IDS)
    decoding.logits(IDS[::-1])
    np.testing.assert_array_equal(decoding.logits(IDS), first)


def test_which_decoder(decoding: Session, recomputing: Session) -> None:
    assert isinstance(new_decoder(decoding, 1), CachedDecoder)
    assert isinstance(new_decoder(recomputing, 1), FullSequenceDecoder)
    assert isinstance(new_batch_decoder(decoding, 1, 1), CachedBatchDecoder)
    assert isinstance(new_batch_decoder(recomputing, 1, 1), RowByRowDecoder)


def test_step_by_step(decoder: RewindingDecoder, expected: np.ndarray) -> None:
    steps = [decoder.decode_one_token(int(token)).copy() for token in IDS]
    assert_close(steps, expected)
    assert decoder.length == len(IDS)
    assert decoder.graph_seconds > 0


@pytest.mark.parametrize("pieces", [(60,), (1, 59), (59, 1), (20, 1, 1, 17, 2, 19)])
def test_any_pieces(decoder: RewindingDecoder, expected: np.ndarray, pieces: Sequence[int]) -> None:
    ends = np.cumsum(pieces)
    logits = [decoder.decode(IDS[end - size : end]).copy() for size, end in zip(pieces, ends, strict=True)]
    assert_close(np.concatenate(logits), expected)


@pytest.mark.usefixtures("small_chunks")
def test_chunks(decoder: RewindingDecoder, expected: np.ndarray) -> None:
    assert_close(decoder.prefill(IDS[:30]), expected[29])
    assert_close(decoder.decode_one_token(int(IDS[30])), expected[30])
    assert_close(decoder.decode(IDS[31:]), expected[31:])


def test_rewind(decoder: RewindingDecoder, expected: np.ndarray) -> None:
    decoder.prefill(IDS[::-1])
    decoder.rewind(0)
    decoder.prefill(IDS[:20])
    decoder.decode(np.zeros(30, np.int64))
    decoder.rewind(20)
    assert decoder.length == 20
    assert_close(decoder.decode_one_token(int(IDS[20])), expected[20])
    assert_close(decoder.decode(IDS[21:]), expected[21:])


@pytest.mark.parametrize("length", [-1, 4])
def test_rewind_forwards(decoder: RewindingDecoder, length: int) -> None:
    decoder.prefill(IDS[:3])
    with pytest.raises(InputError, match=f"length from 0 to the 3 tokens there are, got {length}"):
        decoder.rewind(length)


def test_a_cache_does_not_grow(decoding: Session) -> None:
    decoder = new_decoder(decoding, 30)
    decoder.prefill(IDS[:32])
    for append in (lambda: decoder.decode_one_token(1), lambda: decoder.decode(IDS[:1]), lambda: decoder.prefill(IDS)):
        with pytest.raises(InputError, match="at most 32 tokens in all"):
            append()
    assert decoder.length == 32


def test_a_closed_decoder(decoding: Session) -> None:
    decoder = new_decoder(decoding, 30)
    decoder.close()
    decoder.close()
    with pytest.raises(InputError, match="at most 0 tokens"):
        decoder.decode_one_token(1)


@pytest.mark.parametrize(("tokens", "length"), [(1, 32), (32, 32), (33, 64), (MAX_SEQUENCE_LENGTH - 1, 96), (97, 97)])
def test_cache_length(tokens: int, length: int) -> None:
    assert cache_length(tokens, max_sequence_length=max(MAX_SEQUENCE_LENGTH, tokens)) == length


def test_cache_length_is_within_the_models() -> None:
    assert cache_length(33, max_sequence_length=40) == 40


def buffers(cache: KeyValueCache) -> Iterator[np.ndarray]:
    return (value.numpy() for value in cache._values)


def test_the_graph_writes_in_place(graph: DecoderGraph) -> None:
    cache = graph.new_cache(1, 30)
    assert cache.size == 2 * 4 * KV_HEADS * 32 * HEAD_DIM
    appender = Appender(graph, cache)
    appender.append(IDS[None, :9], 0, graph.new_logits(1, 1))
    written = appender.binding._binding.get_outputs()
    assert {value.data_ptr() for value in written} >= set(cache.addresses)
    for buffer in buffers(cache):
        assert buffer.shape == (1, KV_HEADS, 32, HEAD_DIM)
        assert buffer[:, :, :9].all()
        assert not buffer[:, :, 9:].any()


def test_a_row_of_a_cache(graph: DecoderGraph) -> None:
    cache = graph.new_cache(3, 30)
    Appender(graph, cache, row=1).append(IDS[None, :9], 0, graph.new_logits(1, 1))
    alone = graph.new_cache(1, 30)
    Appender(graph, alone).append(IDS[None, :9], 0, graph.new_logits(1, 1))
    for buffer, wanted in zip(buffers(cache), buffers(alone), strict=True):
        np.testing.assert_array_equal(buffer[1], wanted[0])
        assert not buffer[[0, 2]].any()


def test_a_cache_is_freed_with_its_decoder(graph: DecoderGraph, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[KeyValueCache]] = []
    new_cache = graph.new_cache

    def remember(batch: int, tokens: int) -> KeyValueCache:
        cache = new_cache(batch, tokens)
        made.append(weakref.ref(cache))
        return cache

    monkeypatch.setattr(graph, "new_cache", remember)
    decoder = CachedDecoder(graph, 30)
    decoder.prefill(IDS[:3])
    assert made[0]() is not None
    decoder.close()
    assert made[0]() is None


@pytest.mark.parametrize("name", ["decoding", "recomputing"])
@pytest.mark.usefixtures("small_chunks")
def test_rows_of_any_lengths(name: str, recomputing: Session, request: pytest.FixtureRequest) -> None:
    rows = [IDS[:30], IDS[20:23], IDS[50:60]]
    decoder = new_batch_decoder(request.getfixturevalue(name), 3, 40)
    for row, ids in enumerate(rows):
        assert_close(decoder.prefill(row, ids), recomputing.logits(ids)[0, -1])
    for going_on in ([0, 1, 2], [0, 1, 2], [1, 2], [2], [2]):
        tokens = [int(IDS[len(rows[row])]) for row in going_on]
        for row, token in zip(going_on, tokens, strict=True):
            rows[row] = np.append(rows[row], token)
        logits = decoder.decode(going_on, tokens)
        wanted = [recomputing.logits(rows[row])[0, -1] for row in going_on]
        assert_close(logits, wanted)


def test_a_cancelled_decoder(decoding: Session) -> None:
    decoder = new_decoder(decoding, 30)
    decoder.prefill(IDS[:3])
    decoder.cancel()
    for append in (lambda: decoder.decode_one_token(1), lambda: decoder.decode(IDS[:1])):
        with pytest.raises(CosmosRuntimeError, match="ONNX Runtime failed: .*terminate"):
            append()
    assert decoder.length == 3


def test_a_cancelled_batch(decoding: Session) -> None:
    decoder = new_batch_decoder(decoding, 2, 30)
    decoder.prefill(0, IDS[:3])
    decoder.prefill(1, IDS[:2])
    decoder.cancel()
    with pytest.raises(CosmosRuntimeError, match="terminate"):
        decoder.decode([0, 1], [1, 2])
    assert decoding.logits(IDS).shape == (1, 60, VOCAB_SIZE)  # others are not concerned
