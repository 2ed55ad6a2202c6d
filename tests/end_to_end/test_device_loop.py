"""Decoding that stays on the device, here with the CPU as the device: the same tokens as when the host chooses each."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from cosmos_export.checkpoint import Checkpoint
from cosmos_export.parity.verify import Effort
from cosmos_export.pipeline import ExportedBundle, export_bundle
from cosmos_export.recipe import ExportRecipe
from cosmos_runtime import (
    CosmosRuntimeError,
    InputError,
    Sampling,
    Session,
    generate,
    generate_batch,
    load,
)

PROMPT = [3, 14, 15, 92, 6]
WAYS = {
    "greedy": Sampling.greedy(),
    "defaults": Sampling(temperature=0.7, top_k=50, top_p=0.9, repetition_penalty=1.1, seed=5),
    "any": Sampling(seed=2),
    "nucleus": Sampling(temperature=1.2, top_p=0.6, seed=7),
    "long top k": Sampling(top_k=90, top_p=0.95, repetition_penalty=1.3, seed=3),
}


@pytest.fixture(scope="module")
def bundle(small_checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> ExportedBundle:
    """Proven on the CPU before it is used."""
    out = tmp_path_factory.mktemp("loops") / "fp16"
    return export_bundle(small_checkpoint, out, ExportRecipe.load("cuda-fp16"))


@pytest.fixture(scope="module")
def session(bundle: ExportedBundle) -> Session:
    return load(bundle.path, threads=1)


@pytest.mark.parametrize("way", WAYS)
def test_the_loop_chooses_what_the_host_chooses(way: str, session: Session) -> None:
    on_host = generate(session, PROMPT, max_new_tokens=100, sampling=WAYS[way], device_loop=False)
    on_device = generate(session, PROMPT, max_new_tokens=100, sampling=WAYS[way], device_loop=True)
    assert list(on_device) == list(on_host)
    assert len(on_device.tokens) == 59
    assert on_device.finish_reason == on_host.finish_reason == "context"


@pytest.mark.parametrize("new", [1, 2, 8, 9, 17])
def test_every_length_of_an_answer(new: int, session: Session) -> None:
    """Around the size of a piece, and requests one after another in the same buffers."""
    full = list(generate(session, PROMPT, max_new_tokens=30, device_loop=False))
    answer = generate(session, PROMPT, max_new_tokens=new, device_loop=True)
    assert list(answer) == full[:new]
    assert answer.finish_reason == "length"


def test_rows_of_unequal_length_end_where_they_end(session: Session) -> None:
    prompts = [[1, 2, 3], [9] * 20, [7], list(range(40))]
    on_host = generate_batch(session, prompts, max_new_tokens=50, device_loop=False)
    on_device = generate_batch(session, prompts, max_new_tokens=50, device_loop=True)
    assert on_device.run() == on_host.run()
    assert [len(row.tokens) for row in on_device.rows] == [50, 44, 50, 24]
    assert [row.finish_reason for row in on_device.rows] == ["length", "context", "length", "context"]


def test_rows_that_sample_differently(session: Session) -> None:
    few = [WAYS["defaults"], Sampling.greedy(), Sampling(temperature=1.5, top_k=3, seed=5)]
    for ways in (few, [*few[:2], WAYS["nucleus"], WAYS["any"]]):
        answers_are_the_same(session, [[1, 2, 3], [9] * 20, [7, 8], [5]][: len(ways)], ways)


def answers_are_the_same(session: Session, prompts: list[list[int]], ways: list[Sampling]) -> None:
    """Of the loop and of the host."""
    on_host = generate_batch(session, prompts, max_new_tokens=30, sampling=ways, device_loop=False).run()
    assert generate_batch(session, prompts, max_new_tokens=30, sampling=ways, device_loop=True).run() == on_host


def test_a_stop_id_ends_its_row_alone(session: Session) -> None:
    prompts = [[1, 2, 3], [9] * 20]
    free = generate_batch(session, prompts, max_new_tokens=40, device_loop=True).run()
    stop = next(token for token in free[0] if token not in free[1])
    cut = generate_batch(session, prompts, max_new_tokens=40, stop_ids=[stop], device_loop=True)
    assert cut.run() == [free[0][: free[0].index(stop)], free[1]]
    assert cut.rows[0].finish_reason == "stop"


def test_a_stop_id_does_not_come_before_the_shortest_answer(session: Session) -> None:
    free = list(generate(session, PROMPT, max_new_tokens=20, device_loop=False))
    on_host, on_device = (
        generate(session, PROMPT, max_new_tokens=20, min_new_tokens=9, stop_ids=free[1:4], device_loop=wanted)
        for wanted in (False, True)
    )
    assert list(on_device) == list(on_host)
    assert len(on_host.tokens) >= 9
    assert on_host.tokens[0] == free[0]
    assert on_host.tokens != free
    assert on_device.finish_reason == on_host.finish_reason


def test_a_prompt_may_end_with_a_stop_id(session: Session) -> None:
    first = next(generate(session, PROMPT, max_new_tokens=1, device_loop=False))
    stop = PROMPT[-1]
    assert next(generate(session, PROMPT, max_new_tokens=5, stop_ids=[stop], device_loop=True)) == first


def test_it_can_be_stopped_and_the_next_request_is_untouched(session: Session) -> None:
    full = list(generate(session, PROMPT, max_new_tokens=59, device_loop=False))
    answer = generate(session, PROMPT, max_new_tokens=59, device_loop=True)
    assert [next(answer) for _ in range(12)] == full[:12]
    answer.stop()
    assert list(answer) == []
    assert answer.finish_reason == "stop"
    closed = generate(session, PROMPT, max_new_tokens=59, device_loop=True)
    next(closed)
    closed.close()
    assert list(generate(session, PROMPT, max_new_tokens=59, device_loop=True)) == full


def test_requests_at_once_do_not_disturb_each_other(session: Session) -> None:
    prompts = [[i, i + 1, i + 2] for i in range(0, 40, 10)]
    alone = [list(generate(session, prompt, max_new_tokens=50, device_loop=False)) for prompt in prompts]
    found: list[list[int]] = [[] for _ in prompts]

    def run(at: int) -> None:
        found[at] = list(generate(session, prompts[at], max_new_tokens=50, device_loop=True))

    threads = [threading.Thread(target=run, args=(at,)) for at in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == alone


def test_logits_of_a_decoder_by_lengths_are_those_of_the_full_sequence(
    session: Session, small_bundle: ExportedBundle
) -> None:
    ids = np.random.default_rng(0).integers(0, 160, (3, 20))
    exact = load(small_bundle.path, threads=1).logits(ids)
    np.testing.assert_allclose(session.logits(ids), exact, rtol=0, atol=5e-3 * np.ptp(exact))


def test_nan_is_an_error_and_the_session_lives(bundle: ExportedBundle, tmp_path: Path) -> None:
    """A weight that is no number: the loop says so instead of printing tokens."""
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(bundle.path, broken)
    for initializer in onnx.load(broken / "model.onnx", load_external_data=False).graph.initializer:
        if initializer.name == "layers.1.feed_forward.w2.weight":
            entry = {e.key: e.value for e in initializer.external_data}
            weights = np.memmap(broken / entry["location"], "float16", "r+", int(entry["offset"]), (4,))
            weights[:] = np.nan
            weights.flush()
    session = load(broken, threads=1)
    for _ in range(2):
        with pytest.raises(CosmosRuntimeError, match="expected finite numbers, got nan in row 0.*cuda-bf16"):
            list(generate(session, PROMPT, max_new_tokens=30, device_loop=True))


def test_what_the_loop_cannot_do_is_said_when_it_is_wanted(session: Session, small_decoder: ExportedBundle) -> None:
    with pytest.raises(InputError, match="device_loop: expected a bundle.*such as cuda-fp16, got 'cpu-fp32'"):
        generate(load(small_decoder.path, threads=1), PROMPT, max_new_tokens=3, device_loop=True)
    every = range(session.manifest.vocab_size)
    with pytest.raises(InputError, match="export it again.*stop ids that are the whole.*device_loop=False"):
        generate(session, PROMPT, max_new_tokens=3, stop_ids=every, device_loop=True)
    with pytest.raises(InputError, match="no speculation"):
        generate(session, PROMPT, max_new_tokens=3, speculate=4, device_loop=True)
    assert list(generate(session, PROMPT, max_new_tokens=3, stop_ids=every)) == []


def test_a_width_that_the_fused_operator_refuses_still_loops(small_checkpoint: Checkpoint, tmp_path: Path) -> None:
    from cosmos_export.model.loading import random_checkpoint

    odd = random_checkpoint(replace(small_checkpoint.config, head_dim=12), name="odd", seed=1)
    bundle = export_bundle(odd, tmp_path / "odd", ExportRecipe.load("cuda-fp16"), effort=Effort.OFF)
    session = load(bundle.path, threads=1)
    on_host = list(generate(session, PROMPT, max_new_tokens=20, device_loop=False))
    assert list(generate(session, PROMPT, max_new_tokens=20, device_loop=True)) == on_host
