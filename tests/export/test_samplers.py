"""The sampler graphs, and the kernels in their place on a GPU, choose what the runtime's own sampling function chooses,
from the same logits and numbers."""

import ctypes
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from cosmos_export.onnx.device_loop import CANDIDATES, KINDS, SamplerKind, sampler, sampler_spec
from cosmos_export.onnx.signature import LOGITS
from cosmos_runtime import Role, Sampling, sample
from cosmos_runtime.continuation import Continuation, Limits
from cosmos_runtime.device_sampling import parameters, sampler_for
from cosmos_runtime.device_slot import _NEXT
from cosmos_runtime.device_stream import CudaStream, DeviceArray
from cosmos_runtime.sampling_kernels import SamplingKernels

LENGTH, PROMPT = 48, 12
SPECS = {kind.name: sampler_spec(kind, 1000) for kind in KINDS}


def _gpu() -> bool:
    try:
        return "CUDAExecutionProvider" in ort.get_available_providers() and ctypes.CDLL("libcuda.so.1").cuInit(0) == 0
    except OSError:
        return False


needs_gpu = pytest.mark.skipif(not _gpu(), reason="no GPU that onnxruntime can use")
CPU, CUDA, KERNELS = "CPUExecutionProvider", "CUDAExecutionProvider", "kernels"
# A run of a sampler: its outputs by name, from its inputs by name.
Run = Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]


class Engine:
    """Something that samplers run on; `runs(kind, V)` is one, made when it is first asked for."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self._folder = name, folder
        self._made: dict[tuple[str, int], Run] = {}
        if name != CPU:
            ort.preload_dlls()
        self._stream = CudaStream() if name == KERNELS else None

    def runs(self, kind: SamplerKind, vocab_size: int) -> Run:
        key = kind.name, vocab_size
        if key not in self._made:
            self._made[key] = (self._kernel if self._stream else self._graph)(kind, vocab_size)
        return self._made[key]

    @property
    def breaks_ties_by_id(self) -> bool:
        """Of equal logits at the border of the top k, ONNX Runtime's operator on CUDA may keep any."""
        return self.name != CUDA

    def _graph(self, kind: SamplerKind, vocab_size: int) -> Run:
        path = self._folder / f"{kind.name}.{vocab_size}.onnx"
        ir.save(sampler(kind, vocab_size), path)
        onnx.checker.check_model(path, full_check=True)
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        session = ort.InferenceSession(path, options, providers=[self.name])
        assert session.get_providers()[0] == self.name
        names = [output.name for output in session.get_outputs()]
        return lambda feeds: dict(zip(names, session.run(None, feeds), strict=True))

    def _kernel(self, kind: SamplerKind, vocab_size: int) -> Run:
        spec, kernels = sampler_spec(kind, vocab_size), SamplingKernels(self._stream, vocab_size)

        def run(feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            arrays = {Role(t.role): DeviceArray(feeds[t.name].shape, t.dtype, "cuda") for t in spec.inputs}
            arrays[Role.CHOSEN_LOGIT] = DeviceArray((len(feeds[LOGITS]), 1), "float32", "cuda")
            for tensor in spec.inputs:
                self._stream.upload(np.ascontiguousarray(feeds[tensor.name]), arrays[Role(tensor.role)])
            launches = kernels.sampler(kind.name, spec, arrays)
            assert launches is not None
            launches.enqueue()
            # A kernel writes where it reads.
            return {t.name: self._downloaded(arrays[_NEXT.get(Role(t.role), Role(t.role))]) for t in spec.outputs}

        return run

    def _downloaded(self, array: DeviceArray) -> np.ndarray:
        return self._stream.download(array, self._stream.host_array(array.shape, array.dtype)).wait().copy()


@pytest.fixture(
    scope="module", params=[CPU, pytest.param(CUDA, marks=needs_gpu), pytest.param(KERNELS, marks=needs_gpu)]
)
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return Engine(request.param, tmp_path_factory.mktemp("samplers"))


def continuation(vocab_size: int, sampling: Sampling, seed: int, stop_ids: tuple[int, ...] = ()) -> Continuation:
    prompt = np.random.default_rng(seed).integers(0, vocab_size, PROMPT)
    limits = Limits.checked(
        max_new_tokens=LENGTH - PROMPT,
        min_new_tokens=0,
        max_sequence_length=LENGTH,
        stop_ids=stop_ids,
        vocab_size=vocab_size,
    )
    return Continuation(prompt, limits, sampling)


def run(engine: Engine, kind: SamplerKind, vocab_size: int, rows, logits) -> np.ndarray:
    """The tokens (steps, B) that a sampler chooses from logits (steps, B, V), fed by hand from step to step."""
    spec = sampler_spec(kind, vocab_size)
    state = {str(role): value for role, value in parameters(rows, spec, LENGTH).items()}
    chosen = []
    for step in logits:
        outputs = engine.runs(kind, vocab_size)({t.name: state.get(t.role, step) for t in spec.inputs})
        state |= {name.removeprefix("next_"): value for name, value in outputs.items() if name.startswith("next_")}
        if not any(row.limits.stop_ids for row in rows):  # a stop id is repeated, whatever is chosen
            expected = np.take_along_axis(step, outputs["next_tokens"], 1)
            np.testing.assert_array_equal(outputs["chosen_logit"], expected)
        chosen.append(outputs["next_tokens"][:, 0])
    return np.array(chosen)


WAYS = {
    "sampler.greedy": Sampling.greedy(),
    "sampler.greedy.penalty": Sampling(temperature=0, repetition_penalty=1.5),
    "sampler.top_k": Sampling(temperature=0.7, top_k=50, top_p=0.9, seed=4),
    "sampler.top_k.penalty": Sampling(temperature=1.3, top_k=7, repetition_penalty=0.8, seed=4),
    "sampler.any": Sampling(temperature=1.1, seed=4),
    "sampler.any.penalty": Sampling(repetition_penalty=1.2, seed=4),
    "sampler.nucleus": Sampling(temperature=0.8, top_p=0.93, seed=4),
    "sampler.nucleus.penalty": Sampling(temperature=1.4, top_k=300, top_p=0.9, repetition_penalty=1.2, seed=4),
}
RANKING = ("top_k", "nucleus")


@pytest.mark.parametrize("vocab_size", [3, 97, 1000, 40_001])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_sampler_chooses_as_the_function_does(kind: SamplerKind, vocab_size: int, engine: Engine) -> None:
    """36 steps of 5 rows; logits in eighths, so that many are equal, and some far from the others."""
    draw = np.random.default_rng(7)
    logits = draw.normal(0, 3, (LENGTH - PROMPT, 5, vocab_size)).astype(np.float32)
    if kind.choice not in RANKING or engine.breaks_ties_by_id:
        logits = np.round(logits * 8) / 8
    logits[::5] *= 20
    by_graph = [continuation(vocab_size, WAYS[kind.name], row) for row in range(5)]
    chosen = run(engine, kind, vocab_size, by_graph, logits)
    for row in range(5):
        by_hand = continuation(vocab_size, WAYS[kind.name], row)
        assert [by_hand.choose(step[row]) for step in logits] == chosen[:, row].tolist()


_CUTS = [(0, 1.0), (5, 1.0), (0, 0.6), (700, 0.95), (300, 1.0), (0, 1e-9), (10**30, 1.0)]


@pytest.mark.parametrize(
    ("kind", "ways"),
    [
        (
            SamplerKind("top_k", penalises=True),
            [Sampling(top_k=3, seed=1), Sampling(top_k=40, top_p=0.5, repetition_penalty=1.4, seed=2)],
        ),
        (SamplerKind("nucleus", penalises=False), [Sampling(top_k=k, top_p=p, seed=3) for k, p in _CUTS]),
    ],
    ids=lambda value: value.name if isinstance(value, SamplerKind) else "",
)
def test_rows_may_sample_differently(kind: SamplerKind, ways: list[Sampling], engine: Engine) -> None:
    """A greedy row beside others: the most general sampler does all that there is."""
    ways = [Sampling.greedy(), *ways]
    logits = np.random.default_rng(0).normal(0, 2, (LENGTH - PROMPT, len(ways), 1000)).astype(np.float32)
    rows = [continuation(1000, way, 5) for way in ways]
    assert sampler_for(rows, SPECS, 1000) == kind.name
    chosen = run(engine, kind, 1000, rows, logits)
    for row, way in enumerate(ways):
        by_hand = continuation(1000, way, 5)
        assert [by_hand.choose(step[row]) for step in logits] == chosen[:, row].tolist()


# Logits that a search for the largest ones may stumble over.
ODD = {
    "all equal": lambda draw, size: np.zeros(size, np.float32),
    "zeros of both signs": lambda draw, size: np.where(draw.random(size) < 0.5, 0.0, -0.0).astype(np.float32),
    "neighbours": lambda draw, size: np.float32(1) + np.arange(size)[::-1].astype(np.float32) * np.float32(2**-23),
    "two values": lambda draw, size: (draw.random(size) < 0.5).astype(np.float32),
    "all negative": lambda draw, size: -np.exp(draw.normal(0, 9, size)).astype(np.float32),
    "near each other": lambda draw, size: draw.normal(0, 1e-3, size).astype(np.float32),
    "far apart": lambda draw, size: draw.normal(0, 1e30, size).astype(np.float32),
    "few groups": lambda draw, size: ((np.arange(size) % 1024 < 90) * (1 + draw.random(size))).astype(np.float32),
    "fewer groups than candidates": lambda draw, size: ((np.arange(size) % 1024 < 3) * draw.random(size)).astype(
        np.float32
    ),
}


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("kind", [k for k in KINDS if not k.penalises], ids=lambda kind: kind.name)
def test_odd_logits(kind: SamplerKind, odd: str, engine: Engine) -> None:
    if kind.choice in RANKING and not engine.breaks_ties_by_id:
        pytest.skip("ONNX Runtime's operator may keep others of equal logits")
    draw, size = np.random.default_rng(1), 70_000
    logits = np.array([[ODD[odd](draw, size)] for _ in range(3)])
    # 0.9 of 50 equal shares would be 45 of them, give or take one by rounding.
    way = replace(WAYS[kind.name], top_p=0.93) if kind.choice in RANKING else WAYS[kind.name]
    chosen = run(engine, kind, size, [continuation(size, way, 0)], logits)[:, 0]
    by_hand = continuation(size, way, 0)
    assert [by_hand.choose(step[0]) for step in logits] == chosen.tolist()


@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_what_is_no_number_is_shown_to_the_host(kind: SamplerKind, bad: float, engine: Engine) -> None:
    """Every logit of a row, as where a model overflows; the other row is not disturbed."""
    if engine.name == CUDA and kind.choice in RANKING and np.signbit(bad):
        pytest.skip("ONNX Runtime's operator gives anything where numbers that are none are negative")
    spec = sampler_spec(kind, 1000)
    rows = [continuation(1000, WAYS[kind.name], row) for row in range(2)]
    state = {str(role): value for role, value in parameters(rows, spec, LENGTH).items()}
    logits = np.random.default_rng(0).normal(0, 2, (2, 1000)).astype(np.float32)
    logits[0] = bad
    outputs = engine.runs(kind, 1000)({t.name: state.get(t.role, logits) for t in spec.inputs})
    assert not np.isfinite(outputs["chosen_logit"][0, 0])
    assert 0 <= outputs["next_tokens"][0, 0] < 1000
    assert outputs["next_tokens"][1, 0] == continuation(1000, WAYS[kind.name], 1).choose(logits[1])


def test_draws_follow_the_probabilities(engine: Engine) -> None:
    """4,000 rows of one distribution: each token as often as its probability, within five standard errors."""
    kind, count = SamplerKind("any", penalises=False), 4000
    weights = np.array([0.5, 0.25, 0.125, 0.1, 0.025])
    spec = sampler_spec(kind, 5)
    rows = [continuation(5, Sampling(seed=row), 0) for row in range(count)]
    values = {str(role): value for role, value in parameters(rows, spec, LENGTH).items()}
    logits = np.broadcast_to(np.log(weights).astype(np.float32), (count, 5)).copy()
    tokens = engine.runs(kind, 5)({t.name: values.get(t.role, logits) for t in spec.inputs})["next_tokens"]
    shares = np.bincount(tokens[:, 0], minlength=5) / count
    assert np.all(np.abs(shares - weights) < 5 * np.sqrt(weights * (1 - weights) / count))


def test_a_stop_id_is_repeated_and_a_row_at_its_limit_stays(engine: Engine) -> None:
    kind = SamplerKind("greedy", penalises=False)
    spec = sampler_spec(kind, 10)
    rows = [continuation(10, Sampling.greedy(), 0, stop_ids=(4,))]
    state = {str(role): value for role, value in parameters(rows, spec, LENGTH).items()}
    seen = []
    for best in [3, 4, *[5] * LENGTH]:
        logits = np.zeros((1, 10), np.float32)
        logits[0, best] = 1
        outputs = engine.runs(kind, 10)({t.name: state.get(t.role, logits) for t in spec.inputs})
        tokens, last, history = (outputs[name] for name in ("next_tokens", "next_last_index", "next_history"))
        state |= {"tokens": tokens, "last_index": last, "history": history}
        seen.append((int(tokens[0, 0]), int(last[0])))
    assert [token for token, _ in seen[:4]] == [3, 4, 4, 4]
    assert [last for _, last in seen[:3]] == [PROMPT, PROMPT + 1, PROMPT + 2]
    assert seen[-1] == (4, LENGTH - 1)
    assert history[0, PROMPT:].tolist() == [3, *[4] * (LENGTH - PROMPT - 1)]


@pytest.mark.parametrize(
    ("sampling", "name"),
    [
        (Sampling.greedy(), "sampler.greedy"),
        (Sampling(top_k=CANDIDATES), "sampler.top_k"),
        (Sampling(top_k=CANDIDATES + 1), "sampler.nucleus"),
        (Sampling(top_p=0.9), "sampler.nucleus"),
        (Sampling(top_p=0.9, repetition_penalty=2), "sampler.nucleus.penalty"),
        (Sampling(), "sampler.any"),
        (Sampling(top_k=1000, repetition_penalty=2), "sampler.any.penalty"),
    ],
)
def test_the_least_sampler_that_can_choose_is_taken(sampling: Sampling, name: str) -> None:
    assert sampler_for([continuation(1000, sampling, 0)], SPECS, 1000) == name


@pytest.mark.parametrize("kind", [k for k in KINDS if k.penalises], ids=lambda kind: kind.name)
def test_a_stop_id_does_not_come_too_early(kind: SamplerKind, engine: Engine) -> None:
    """The likeliest tokens by far are stop ids; of three rows one has to be of three tokens at least, one of none."""
    stop_ids, draw = (1, 5, 40), np.random.default_rng(2)
    logits = draw.normal(0, 2, (6, 3, 97)).astype(np.float32)
    logits[..., stop_ids] += 30

    def row(shortest: int) -> Continuation:
        limits = Limits.checked(
            max_new_tokens=9, min_new_tokens=shortest, max_sequence_length=LENGTH, stop_ids=stop_ids, vocab_size=97
        )
        return Continuation(np.array([7, 2]), limits, WAYS[kind.name])

    shortest = (3, 0, 5)
    rows = [row(n) for n in shortest]
    assert sampler_for(rows, {kind.name: sampler_spec(kind, 97)}, 97) == kind.name
    chosen = run(engine, kind, 97, rows, logits)
    for index, n in enumerate(shortest):
        by_hand, tokens = row(n), chosen[:, index].tolist()
        assert [by_hand.choose(step[index]) for step in logits][:n] == tokens[:n]
        assert not set(tokens[:n]) & set(stop_ids)
        assert set(tokens[n:]) == {tokens[n]}
        assert tokens[n] in stop_ids


def test_a_bundle_of_an_earlier_version_leaves_to_the_host_what_its_samplers_cannot_do() -> None:
    earlier = {
        name: replace(spec, inputs=tuple(t for t in spec.inputs if t.role != Role.EARLIEST))
        for name, spec in SPECS.items()
        if "nucleus" not in name
    }
    limits = Limits.checked(
        max_new_tokens=9, min_new_tokens=3, max_sequence_length=LENGTH, stop_ids=(1,), vocab_size=1000
    )
    held = Continuation(np.array([1, 2]), limits, Sampling.greedy())
    assert sampler_for([held], earlier, 1000) is None
    assert sampler_for([continuation(1000, Sampling(top_p=0.9), 0)], earlier, 1000) is None
    assert sampler_for([continuation(1000, Sampling.greedy(), 0)], earlier, 1000) == "sampler.greedy"


def test_uniform_numbers_are_those_of_the_function() -> None:
    """`Continuation.uniforms` is what its generator would give one by one."""
    logits = np.random.default_rng(0).normal(0, 1, 1000).astype(np.float32)
    row, rng = continuation(1000, Sampling(seed=9), 0), Sampling(seed=9).generator()
    one_by_one = [rng.random() for _ in range(LENGTH - PROMPT)]
    np.testing.assert_array_equal(row.uniforms(), one_by_one)
    assert sample(logits, [], Sampling(seed=9), Sampling(seed=9).generator()) == continuation(
        1000, Sampling(seed=9), 0
    ).choose(logits)
