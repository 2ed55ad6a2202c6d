"""The sampler graphs choose what the runtime's own sampling function chooses, from the same logits and numbers."""

import ctypes
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from cosmos_export.onnx.device_loop import CANDIDATES, KINDS, SamplerKind, sampler, sampler_spec
from cosmos_runtime import Sampling, sample
from cosmos_runtime.continuation import Continuation, Limits
from cosmos_runtime.device_sampling import parameters, sampler_for

LENGTH, PROMPT = 48, 12
SPECS = {kind.name: sampler_spec(kind, 1000) for kind in KINDS}


def _gpu() -> bool:
    try:
        return "CUDAExecutionProvider" in ort.get_available_providers() and ctypes.CDLL("libcuda.so.1").cuInit(0) == 0
    except OSError:
        return False


PROVIDERS = [
    "CPUExecutionProvider",
    pytest.param(
        "CUDAExecutionProvider", marks=pytest.mark.skipif(not _gpu(), reason="no GPU that onnxruntime can use")
    ),
]


@pytest.fixture(scope="module", params=PROVIDERS)
def sessions(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """A loaded sampler by kind and vocabulary, made when it is first asked for."""
    if request.param == "CUDAExecutionProvider":
        ort.preload_dlls()
    folder: Path = tmp_path_factory.mktemp("samplers")
    made: dict[tuple[str, int], ort.InferenceSession] = {}

    def session(kind: SamplerKind, vocab_size: int) -> ort.InferenceSession:
        key = kind.name, vocab_size
        if key not in made:
            path = folder / f"{kind.name}.{vocab_size}.onnx"
            ir.save(sampler(kind, vocab_size), path)
            onnx.checker.check_model(path, full_check=True)
            options = ort.SessionOptions()
            options.intra_op_num_threads = 1
            made[key] = ort.InferenceSession(path, options, providers=[request.param])
            assert made[key].get_providers()[0] == request.param
        return made[key]

    return session


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


def run(session: ort.InferenceSession, kind: SamplerKind, vocab_size: int, rows, logits) -> np.ndarray:
    """The tokens (steps, B) that a sampler chooses from logits (steps, B, V), fed by hand from step to step."""
    spec = sampler_spec(kind, vocab_size)
    state = {str(role): value for role, value in parameters(rows, spec, LENGTH).items()}
    chosen = []
    for step in logits:
        feeds = {tensor.name: state.get(tensor.role, step) for tensor in spec.inputs}
        outputs = dict(zip([o.name for o in session.get_outputs()], session.run(None, feeds), strict=True))
        state |= {name.removeprefix("next_"): value for name, value in outputs.items() if name.startswith("next_")}
        np.testing.assert_array_equal(
            outputs["chosen_logit"], np.take_along_axis(step, outputs["next_tokens"], 1), err_msg="no stop id is here"
        )
        chosen.append(outputs["next_tokens"][:, 0])
    return np.array(chosen)


def breaks_ties_by_id(session: ort.InferenceSession) -> bool:
    """Of equal logits at the border of the top k, CUDA's operator may keep any; the CPU's keeps the lowest ids."""
    return session.get_providers()[0] == "CPUExecutionProvider"


WAYS = {
    "sampler.greedy": Sampling.greedy(),
    "sampler.greedy.penalty": Sampling(temperature=0, repetition_penalty=1.5),
    "sampler.top_k": Sampling(temperature=0.7, top_k=50, top_p=0.9, seed=4),
    "sampler.top_k.penalty": Sampling(temperature=1.3, top_k=7, repetition_penalty=0.8, seed=4),
    "sampler.any": Sampling(temperature=1.1, seed=4),
    "sampler.any.penalty": Sampling(repetition_penalty=1.2, seed=4),
}


@pytest.mark.parametrize("vocab_size", [3, 97, 1000])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_sampler_chooses_as_the_function_does(kind: SamplerKind, vocab_size: int, sessions) -> None:
    """36 steps of 5 rows; logits in eighths, so that many are equal, and some far from the others."""
    draw = np.random.default_rng(7)
    logits = draw.normal(0, 3, (LENGTH - PROMPT, 5, vocab_size)).astype(np.float32)
    if kind.choice != "top_k" or breaks_ties_by_id(sessions(kind, vocab_size)):
        logits = np.round(logits * 8) / 8
    logits[::5] *= 20
    by_graph = [continuation(vocab_size, WAYS[kind.name], row) for row in range(5)]
    chosen = run(sessions(kind, vocab_size), kind, vocab_size, by_graph, logits)
    for row in range(5):
        by_hand = continuation(vocab_size, WAYS[kind.name], row)
        assert [by_hand.choose(step[row]) for step in logits] == chosen[:, row].tolist()


def test_rows_may_sample_differently(sessions) -> None:
    kind = SamplerKind("top_k", penalises=True)
    ways = [Sampling.greedy(), Sampling(top_k=3, seed=1), Sampling(top_k=40, top_p=0.5, repetition_penalty=1.4, seed=2)]
    logits = np.random.default_rng(0).normal(0, 2, (20, 3, 1000)).astype(np.float32)
    rows = [continuation(1000, way, 5) for way in ways]
    assert sampler_for(rows, SPECS, 1000) == kind.name
    chosen = run(sessions(kind, 1000), kind, 1000, rows, logits)
    for row, way in enumerate(ways):
        by_hand = continuation(1000, way, 5)
        assert [by_hand.choose(step[row]) for step in logits] == chosen[:, row].tolist()


def test_draws_follow_the_probabilities(sessions) -> None:
    """4,000 rows of one distribution: each token as often as its probability, within five standard errors."""
    kind, count = SamplerKind("any", penalises=False), 4000
    weights = np.array([0.5, 0.25, 0.125, 0.1, 0.025])
    spec = sampler_spec(kind, 5)
    rows = [continuation(5, Sampling(seed=row), 0) for row in range(count)]
    values = {str(role): value for role, value in parameters(rows, spec, LENGTH).items()}
    logits = np.broadcast_to(np.log(weights).astype(np.float32), (count, 5)).copy()
    tokens = sessions(kind, 5).run(["next_tokens"], {t.name: values.get(t.role, logits) for t in spec.inputs})[0]
    shares = np.bincount(tokens[:, 0], minlength=5) / count
    assert np.all(np.abs(shares - weights) < 5 * np.sqrt(weights * (1 - weights) / count))


def test_a_stop_id_is_repeated_and_a_row_at_its_limit_stays(sessions) -> None:
    kind = SamplerKind("greedy", penalises=False)
    spec = sampler_spec(kind, 10)
    rows = [continuation(10, Sampling.greedy(), 0, stop_ids=(4,))]
    state = {str(role): value for role, value in parameters(rows, spec, LENGTH).items()}
    seen = []
    for best in [3, 4, *[5] * LENGTH]:
        logits = np.zeros((1, 10), np.float32)
        logits[0, best] = 1
        outputs = sessions(kind, 10).run(None, {t.name: state.get(t.role, logits) for t in spec.inputs})
        tokens, last, history, _ = outputs
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
        (Sampling(top_k=CANDIDATES + 1), None),
        (Sampling(top_p=0.9), None),
        (Sampling(), "sampler.any"),
        (Sampling(top_k=1000, repetition_penalty=2), "sampler.any.penalty"),
    ],
)
def test_what_no_sampler_can_do_is_left_to_the_host(sampling: Sampling, name: str | None) -> None:
    assert sampler_for([continuation(1000, sampling, 0)], SPECS, 1000) == name


def test_stop_ids_that_may_not_come_too_early_are_left_to_the_host() -> None:
    limits = Limits.checked(
        max_new_tokens=9, min_new_tokens=3, max_sequence_length=LENGTH, stop_ids=(1,), vocab_size=1000
    )
    row = Continuation(np.array([1, 2]), limits, Sampling.greedy())
    assert sampler_for([row], SPECS, 1000) is None


def test_uniform_numbers_are_those_of_the_function() -> None:
    """`Continuation.uniforms` is what its generator would give one by one."""
    logits = np.random.default_rng(0).normal(0, 1, 1000).astype(np.float32)
    row, rng = continuation(1000, Sampling(seed=9), 0), Sampling(seed=9).generator()
    one_by_one = [rng.random() for _ in range(LENGTH - PROMPT)]
    np.testing.assert_array_equal(row.uniforms(), one_by_one)
    assert sample(logits, [], Sampling(seed=9), Sampling(seed=9).generator()) == continuation(
        1000, Sampling(seed=9), 0
    ).choose(logits)
