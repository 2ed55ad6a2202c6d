"""On an NVIDIA GPU: bundles are proven there, the device loop chooses what the host loop chooses, and what cannot be
done is said. Skipped, with the reason, where there is none."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from cosmos_export.checkpoint import Checkpoint
from cosmos_export.config import CosmosAdvancedConfig
from cosmos_export.model.loading import random_checkpoint
from cosmos_export.parity.verify import Effort, verify_bundle
from cosmos_export.pipeline import ExportedBundle, export_bundle
from cosmos_export.recipe import ExportRecipe
from cosmos_export.resources import demo_checkpoint
from cosmos_runtime import (
    KERNELS_NAME,
    CosmosRuntimeError,
    ProviderError,
    Sampling,
    decode_kernels,
    generate,
    generate_batch,
    load,
    new_decoder,
)
from cosmos_runtime.cuda_graph import device
from cosmos_runtime.kernel_graph import KernelBinding
from cosmos_runtime.kernel_spec import MOST_ROWS
from cosmos_runtime.whole_step import whole_step_launch

RECIPES = ("cuda-fp16", "cuda-bf16", "cuda-int8", "cuda-int4")


def _missing() -> str | None:
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        return "this onnxruntime has no CUDA provider"
    try:
        return None if ctypes.CDLL("libcuda.so.1").cuInit(0) == 0 else "there is no NVIDIA GPU"
    except OSError:
        return "there is no NVIDIA driver"


MISSING = _missing()
needs_gpu = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return Checkpoint.open(demo_checkpoint())


@pytest.fixture(scope="module")
def exported(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory):
    """The demo's bundle of a recipe, made when it is first asked for."""
    made: dict[str, ExportedBundle] = {}

    def export(recipe: str) -> ExportedBundle:
        if recipe not in made:
            out = tmp_path_factory.mktemp("cuda") / recipe
            made[recipe] = export_bundle(checkpoint, out, ExportRecipe.load(recipe), effort=Effort.OFF)
        return made[recipe]

    return export


@needs_gpu
@pytest.mark.parametrize("recipe", [*RECIPES, "cpu-fp16", "portable-fp32"])
def test_bundles_are_proven_on_the_gpu(recipe: str, exported, checkpoint: Checkpoint) -> None:
    report = verify_bundle(exported(recipe).path, checkpoint, provider="cuda")
    assert report.passed, report.summary()
    assert report.longest == checkpoint.config.max_sequence_length


# How far below the best logit a token may lie that a loop chose greedily, as a share of the logits' range: kernels for
# another batch or cache length round differently, so that near ties change (see the gates of parity).
NEAR_TIE = {"cuda-fp16": 2e-3, "cuda-bf16": 2e-2, "cuda-int8": 2e-3, "cuda-int4": 2e-3}


@needs_gpu
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_token_of_a_greedy_loop_is_the_best_one(recipe: str, exported) -> None:
    """By the logits of one pass over the whole text, of rows of unequal length that were decoded together."""
    session = load(exported(recipe).path, provider="cuda")
    prompts = [[5, 6, 7], list(range(30)), [9]]
    for prompt, answer in zip(prompts, generate_batch(session, prompts, max_new_tokens=60).run(), strict=True):
        logits = session.logits([*prompt, *answer])[0, len(prompt) - 1 : -1]
        chosen = np.take_along_axis(logits, np.array(answer)[:, None], 1)[:, 0]
        assert np.all(logits.max(1) - chosen <= NEAR_TIE[recipe] * np.ptp(logits, 1))


@needs_gpu
@pytest.mark.parametrize("sampling", [Sampling.greedy(), Sampling(top_k=20, top_p=0.9, seed=5), Sampling(seed=2)])
def test_the_loop_and_the_host_begin_alike(sampling: Sampling, exported) -> None:
    """Until a near tie, which float16 seldom meets in a dozen tokens. What samplers choose is tested by itself."""
    session = load(exported("cuda-fp16").path, provider="cuda")
    on_host = list(generate(session, [5, 6, 7], max_new_tokens=12, sampling=sampling, device_loop=False))
    assert list(generate(session, [5, 6, 7], max_new_tokens=12, sampling=sampling)) == on_host


@needs_gpu
def test_requests_one_after_another_repeat_themselves(exported) -> None:
    session = load(exported("cuda-fp16").path, provider="cuda")
    first = list(generate(session, [1, 2, 3], max_new_tokens=60))
    stopped = generate(session, [4, 5], max_new_tokens=60)
    [next(stopped) for _ in range(10)]
    stopped.stop()
    assert list(generate(session, [1, 2, 3], max_new_tokens=60)) == first


@needs_gpu
def test_no_room_fails_one_request_and_the_session_lives(exported) -> None:
    session = load(exported("cuda-fp16").path, provider="cuda")
    with pytest.raises(CosmosRuntimeError, match="no room for [0-9,]+ more bytes; ask for fewer tokens or rows"):
        generate_batch(session, [[1, 2, 3]] * 200_000, max_new_tokens=500).run()
    assert len(list(generate(session, [1, 2, 3], max_new_tokens=5))) == 5


@needs_gpu
def test_a_limit_on_memory_bounds_weights_and_caches(exported) -> None:
    bundle = exported("cuda-fp16").path
    weights = (bundle / "model.onnx.data").stat().st_size
    with pytest.raises(CosmosRuntimeError, match=r"the weights: [0-9,]+ bytes are wanted.*gpu_mem_limit of 1,000,000"):
        load(bundle, provider="cuda", gpu_mem_limit=1_000_000)
    session = load(bundle, provider="cuda", gpu_mem_limit=weights + (16 << 20))
    with pytest.raises(CosmosRuntimeError, match=r"a cache of 64 x 512 tokens: .*ask for fewer tokens or rows"):
        generate_batch(session, [[1, 2, 3]] * 64, max_new_tokens=500).run()
    assert len(list(generate(session, [1, 2, 3], max_new_tokens=5))) == 5


@needs_gpu
def test_no_room_for_a_prompt_fails_one_request_and_the_session_lives(exported) -> None:
    """ONNX Runtime's own memory is what a limit leaves: too little for the activations of 16 prompts together."""
    bundle = exported("cuda-fp16").path
    room = (bundle / "model.onnx.data").stat().st_size + (24 << 20)
    session = load(bundle, provider="cuda", gpu_mem_limit=room)
    long = [[1] * 500] * 16
    with pytest.raises(CosmosRuntimeError):
        generate_batch(session, long, max_new_tokens=5, device_loop=True).run()
    assert len(list(generate(session, [1, 2, 3], max_new_tokens=5))) == 5


# A geometry that the decoding kernels take with every number of bits, longer than one part of their attention.
WIDE = CosmosAdvancedConfig(
    dim=256,
    n_layers=2,
    head_dim=64,
    hidden_dim=512,
    n_heads=4,
    n_kv_heads=2,
    vocab_size=512,
    max_sequence_length=700,
)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory):
    checkpoint = random_checkpoint(WIDE, name="wide")
    made: dict[str, ExportedBundle] = {}

    def export(recipe: str) -> ExportedBundle:
        if recipe not in made:
            out = tmp_path_factory.mktemp("wide") / recipe
            made[recipe] = export_bundle(checkpoint, out, ExportRecipe.load(recipe), effort=Effort.OFF)
        return made[recipe]

    export.checkpoint = checkpoint
    return export


@needs_gpu
@pytest.mark.parametrize("recipe", RECIPES)
def test_decoding_kernels_are_proven(recipe: str, wide) -> None:
    assert (wide(recipe).path / KERNELS_NAME).is_file()
    report = verify_bundle(wide(recipe).path, wide.checkpoint, provider="cuda")
    assert report.passed, report.summary()


@needs_gpu
@pytest.mark.parametrize("recipe", RECIPES)
def test_kernels_and_onnxruntime_agree_up_to_the_last_position(recipe: str, wide) -> None:
    """Logits of single tokens behind prompts of many lengths, from the first position to the model's last."""
    ids = np.random.default_rng(3).integers(0, WIDE.vocab_size, WIDE.max_sequence_length)
    session = load(wide(recipe).path, provider="cuda")
    assert isinstance(session.graph.new_binding(), KernelBinding)
    whole = session.logits(ids)[0]
    for before in (0, 1, 127, 255, 256, 300, 511, 600, len(ids) - 3):
        decoder = new_decoder(session, len(ids))
        if before:
            decoder.prefill(ids[:before])
        for at in range(before, before + 3):
            logits = decoder.decode_one_token(int(ids[at]))
            assert np.abs(logits - whole[at]).max() <= NEAR_TIE[recipe] * np.ptp(whole[at]), at


@needs_gpu
@pytest.mark.parametrize("recipe", ["cuda-int8", "cuda-int4"])
def test_one_kernel_and_separate_ones_agree(recipe: str, wide, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits of single tokens behind a prompt, and the same tokens again: what a step left behind disturbs no other."""
    ids = np.random.default_rng(4).integers(0, WIDE.vocab_size, 340)
    launches = []

    def launch(*given):
        launches.append(whole_step_launch(*given))
        return launches[-1]

    def logits():
        session = load(wide(recipe).path, provider="cuda")
        decoder = new_decoder(session, len(ids))
        decoder.prefill(ids[:300])
        found = [decoder.decode_one_token(int(token)) for token in ids[300:]]
        return session.graph.new_binding(), np.array(found)

    monkeypatch.setattr(decode_kernels, "whole_step_launch", launch)
    binding, one = logits()
    if device(binding._kernels.stream).capability < (9, 0):
        pytest.skip("this GPU computes every step with separate kernels")
    assert launches
    assert all(launches)
    assert np.array_equal(one, logits()[1])
    monkeypatch.setattr(decode_kernels, "whole_step", lambda *_: None)
    made = len(launches)
    separate = logits()[1]
    assert len(launches) == made
    assert np.abs(one - separate).max() <= NEAR_TIE[recipe] * np.ptp(separate)


@needs_gpu
@pytest.mark.parametrize("rows", range(1, MOST_ROWS + 2))
def test_rows_do_not_disturb_each_other(rows: int, wide) -> None:
    """Each row of a batch, of any number up to one more than the kernels take, near its own best tokens."""
    session = load(wide("cuda-fp16").path, provider="cuda")
    prompts = [list(range(3 + 40 * row % 290, 6 + 60 * row % 290 + 20)) or [1] for row in range(rows)]
    for prompt, answer in zip(prompts, generate_batch(session, prompts, max_new_tokens=30).run(), strict=True):
        logits = session.logits([*prompt, *answer])[0, len(prompt) - 1 : -1]
        chosen = np.take_along_axis(logits, np.array(answer)[:, None], 1)[:, 0]
        assert np.all(logits.max(1) - chosen <= NEAR_TIE["cuda-fp16"] * np.ptp(logits, 1))


@needs_gpu
def test_kernels_can_be_switched_off(wide, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COSMOS_DECODE_KERNELS", "0")
    session = load(wide("cuda-fp16").path, provider="cuda")
    assert not isinstance(session.graph.new_binding(), KernelBinding)


@needs_gpu
def test_a_fused_float32_cache_is_refused(exported) -> None:
    with pytest.raises(ProviderError, match="no float32 kernel on CUDA"):
        load(exported("cpu-fp32").path, provider="cuda")


@pytest.mark.skipif(MISSING is None, reason="there is a GPU")
def test_without_a_gpu_it_is_an_error_before_the_first_token(exported, tmp_path: Path) -> None:
    with pytest.raises(ProviderError, match="provider 'cuda'.*provider=[\"']cpu"):
        load(exported("cuda-fp16").path, provider="cuda")
