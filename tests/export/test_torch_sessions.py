"""One way to open what this project makes: whatever computes, sessions give the model's numbers."""

import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cosmos_export.bundle import manifest_of
from cosmos_export.checkpoint import Checkpoint, save_checkpoint
from cosmos_export.config import CosmosAdvancedConfig
from cosmos_export.errors import CheckpointError, ConfigError
from cosmos_export.model.loading import load_decoder, load_model, random_checkpoint
from cosmos_export.parity.verify import Effort
from cosmos_export.pipeline import ExportedBundle, export_bundle
from cosmos_export.recipe import ExportRecipe
from cosmos_export.torch_programs import sessions
from cosmos_export.torch_programs.sessions import eager_session, load_session
from cosmos_runtime import (
    CAPABILITIES,
    MANIFEST_NAME,
    Bundle,
    BundleError,
    InputError,
    ProviderError,
    Sampling,
    Session,
    TokenizerError,
    describe_file,
    generate,
    generate_batch,
    generate_text,
    new_decoder,
    score,
)

from ..runtime.tiny_bundles import byte_tokenizer  # noqa: TID252
from .capability_models import lively_model, same_report, small_config
from .conftest import TINY

PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 3]]
FORMATS = {"torchscript": "torchscript-fp32", "pt2": "pt2-fp32", "onnx": "cpu-fp32"}
FILES = {"torchscript": "model.pt", "pt2": "model.pt2"}


def larger(checkpoint: Checkpoint, **changes: Any) -> Checkpoint:
    """Weights so large that attention is not uniform, and the best token no matter of rounding."""
    tensors = {n: checkpoint.tensor(n) * (10 if checkpoint.tensor(n).dim() > 1 else 1) for n in checkpoint.names}
    return Checkpoint.from_tensors(checkpoint.config, tensors, {"kind": "preset", "location": "larger"}, **changes)


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return larger(random_checkpoint(CosmosAdvancedConfig(**TINY), name="tiny", seed=2))


@pytest.fixture(scope="module")
def bundles(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> dict[str, ExportedBundle]:
    folder = tmp_path_factory.mktemp("bundles")
    return {
        name: export_bundle(checkpoint, folder / name, ExportRecipe.load(recipe), effort=Effort.OFF)
        for name, recipe in FORMATS.items()
    }


@pytest.fixture(params=["eager", *FORMATS])
def session(request: pytest.FixtureRequest, checkpoint: Checkpoint, bundles: dict[str, ExportedBundle]) -> Session:
    if request.param == "eager":
        return eager_session(checkpoint)
    threads = 1 if request.param == "onnx" else None
    return load_session(bundles[request.param].path, threads=threads)


# What sessions compute


def test_logits_are_the_models(session: Session, checkpoint: Checkpoint) -> None:
    model, draw = load_decoder(checkpoint, dtype=torch.float64), np.random.default_rng(0)
    for batch, length in [(1, 1), (3, 1), (2, 7), (1, 63), (2, 64)]:
        ids = draw.integers(0, 96, (batch, length))
        logits = session.logits(ids)
        assert logits.dtype == np.float32
        expected = model(torch.from_numpy(ids)).numpy()
        np.testing.assert_allclose(logits, expected, rtol=0, atol=2e-5 * np.ptp(expected))


def greedy_tokens(checkpoint: Checkpoint, prompt: list[int], count: int) -> list[int]:
    """Without a cache: the whole sequence anew for every token."""
    model, ids = load_decoder(checkpoint), list(prompt)
    for _ in range(count):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


def test_greedy_tokens_are_the_models(session: Session, checkpoint: Checkpoint) -> None:
    for prompt in PROMPTS:
        assert list(generate(session, prompt, max_new_tokens=20)) == greedy_tokens(checkpoint, prompt, 20)


def test_rows_of_unequal_lengths_are_those_alone(session: Session) -> None:
    together = generate_batch(session, PROMPTS, max_new_tokens=12).run()
    assert together == [list(generate(session, prompt, max_new_tokens=12)) for prompt in PROMPTS]


def test_sampled_tokens_follow_from_their_seed(session: Session, checkpoint: Checkpoint) -> None:
    def sampled(of: Session, seed: int) -> list[int]:
        return list(generate(of, [1, 2], max_new_tokens=20, sampling=Sampling(temperature=1.5, top_k=40, seed=seed)))

    assert sampled(session, 3) == sampled(session, 3) == sampled(eager_session(checkpoint), 3)
    assert sampled(session, 3) != sampled(session, 4)


def test_speculation_changes_no_token(session: Session) -> None:
    prompt = [1, 2, 3, 1, 2, 3, 1, 2]
    plain = list(generate(session, prompt, max_new_tokens=40))
    assert list(generate(session, prompt, max_new_tokens=40, speculate=4)) == plain


def test_a_decoder_goes_back_and_on(session: Session) -> None:
    decoder = new_decoder(session, 20)
    first = decoder.prefill(np.arange(8)).copy()
    decoder.decode(np.array([9, 10, 11]))
    decoder.rewind(8)
    again = decoder.decode(np.array([9]))[-1].copy()
    np.testing.assert_allclose(again, session.logits([*range(8), 9])[0, -1], rtol=0, atol=1e-4)
    np.testing.assert_allclose(first, session.logits([*range(8)])[0, -1], rtol=0, atol=1e-4)


def test_long_prompts_go_in_pieces(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = np.random.default_rng(1).integers(0, 96, (2, 50))
    whole = session.logits(ids)
    monkeypatch.setattr("cosmos_runtime.decoder_graph.CHUNK", 16)
    np.testing.assert_allclose(session.logits(ids), whole, rtol=0, atol=1e-4)


def test_scores_are_the_models(session: Session, checkpoint: Checkpoint) -> None:
    ids = np.random.default_rng(2).integers(0, 96, 30)
    logits = load_decoder(checkpoint, dtype=torch.float64)(torch.from_numpy(ids)[None])[0, :-1]
    expected = torch.log_softmax(logits, -1)[torch.arange(29), torch.from_numpy(ids)[1:]].sum().item()
    assert score(session, ids).total == pytest.approx(expected, abs=1e-3)


def test_ids_that_a_model_cannot_take_are_refused_alike(session: Session) -> None:
    for ids, words in [([96], "96"), ([[]], "at least"), ([0] * 65, "65")]:
        with pytest.raises(InputError, match=words):
            session.logits(ids)


def test_whole_sequences_without_a_mask(checkpoint: Checkpoint, tmp_path: Path) -> None:
    recipe = ExportRecipe.load("torchscript-full-sequence")
    bundle = export_bundle(checkpoint, tmp_path / "bundle", recipe, causal=False, effort=Effort.OFF)
    ids = np.random.default_rng(3).integers(0, 96, (3, 11))
    expected = load_decoder(checkpoint, causal=False)(torch.from_numpy(ids)).numpy()
    for session in (load_session(bundle.path), eager_session(checkpoint, causal=False)):
        np.testing.assert_allclose(session.logits(ids), expected, rtol=0, atol=1e-4)
        assert session.manifest.model["causal"] is False
    assert np.abs(eager_session(checkpoint).logits(ids) - expected).max() > 0.1, "the mask matters"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_an_eager_session_computes_in_the_type_that_is_asked_for(checkpoint: Checkpoint, dtype: str) -> None:
    session = eager_session(checkpoint, dtype=dtype)
    ids, exact = [[1, 2, 3, 4, 5]], eager_session(checkpoint).logits([[1, 2, 3, 4, 5]])
    error = np.abs(session.logits(ids) - exact).max()
    assert 0 < error < 0.1 * np.ptp(exact)
    assert {tensor.dtype for tensor in session.manifest.graphs["decoder"].inputs[3:]} == {dtype}
    assert len(list(generate(session, [1, 2], max_new_tokens=5))) == 5


def test_an_eager_session_finds_the_checkpoints_tokenizer(tmp_path: Path, checkpoint: Checkpoint) -> None:
    with pytest.raises(TokenizerError, match="no tokenizer"):
        eager_session(checkpoint).tokenizer  # noqa: B018
    wide = larger(random_checkpoint(CosmosAdvancedConfig(**{**TINY, "vocab_size": 257}), name="bytes"))
    save_checkpoint(tmp_path / "model", wide.config, {name: wide.tensor(name) for name in wide.names})
    byte_tokenizer().save(str(tmp_path / "model" / "tokenizer.json"))
    opened = Checkpoint.open(tmp_path / "model")
    bundle = export_bundle(opened, tmp_path / "bundle", ExportRecipe.load("torchscript-fp32"), effort=Effort.OFF)
    texts = [
        "".join(generate_text(s, "ab", max_new_tokens=8)) for s in (eager_session(opened), load_session(bundle.path))
    ]
    assert texts[0] == texts[1] != ""


# Capability heads


@pytest.fixture(scope="module")
def heads_checkpoint() -> Checkpoint:
    config = small_config(n_layers=2, safety={"safety_level": "medium"}, memory={"working_memory_size": 4})
    tensors = {name: tensor.float() for name, tensor in lively_model(config, seed=5).state_dict().items()}
    return Checkpoint.from_tensors(config, tensors, {"kind": "preset", "location": "lively"})


@pytest.fixture(scope="module")
def heads_bundle(heads_checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out, recipe = tmp_path_factory.mktemp("heads") / "bundle", ExportRecipe.load("torchscript-fp32")
    return export_bundle(heads_checkpoint, out, recipe, capabilities=CAPABILITIES, effort=Effort.OFF).path


@pytest.fixture(params=["eager", "torchscript"])
def heads(request: pytest.FixtureRequest, heads_checkpoint: Checkpoint, heads_bundle: Path) -> Session:
    if request.param == "eager":
        return eager_session(heads_checkpoint, capabilities=CAPABILITIES)
    return load_session(heads_bundle)


def test_a_call_gives_the_models_nested_report(heads: Session, heads_checkpoint: Checkpoint) -> None:
    model, ids = load_model(heads_checkpoint), np.array([[3, 1, 4, 1], [5, 9, 2, 6]])
    output = heads.call(ids)
    logits, expected = model(torch.from_numpy(ids), return_diagnostics=True)
    np.testing.assert_allclose(output.logits, logits.numpy(), rtol=0, atol=1e-4)
    same_report(output.diagnostics, expected, tolerance=1e-4)
    alone, _ = model(torch.from_numpy(ids[:1]), return_diagnostics=True)
    np.testing.assert_allclose(heads.call(ids[0]).logits, alone.numpy(), rtol=0, atol=1e-4)


def test_the_memory_goes_from_call_to_call(heads: Session, heads_checkpoint: Checkpoint) -> None:
    """More calls than it has room for."""
    model, ids = load_model(heads_checkpoint), np.random.default_rng(4).integers(0, 23, (2, 12))
    memory, bank = heads.new_memory(2), model.new_memory(2)
    for end in range(4, 12):
        output = heads.call(ids[:, :end], memory=memory)
        logits, expected = model(torch.from_numpy(ids[:, :end]), memory=bank, return_diagnostics=True)
        np.testing.assert_allclose(output.logits, logits.numpy(), rtol=0, atol=1e-4)
        same_report(output.diagnostics, expected, tolerance=1e-4)
    assert memory.calls.tolist() == [8, 8]
    assert np.abs(heads.call(ids).logits - output.logits[:, -1:]).max() > 1e-3, "the memory matters"


def test_generation_is_the_models_with_its_reports(heads: Session, heads_checkpoint: Checkpoint) -> None:
    model = load_model(heads_checkpoint)
    for prompt in PROMPTS:
        generation = generate(heads, prompt, max_new_tokens=9, diagnostics=True)
        tokens = list(generation)
        ids, expected = model.generate(torch.tensor([prompt]), 9, temperature=0.0, repetition_penalty=1.0)
        assert isinstance(expected, dict)
        assert [*prompt, *tokens] == ids[0].tolist()
        for given, wanted in zip(generation.diagnostics, expected["generation_steps"], strict=True):
            same_report(given, wanted, tolerance=1e-4)


def test_rows_with_heads_are_those_alone(heads: Session) -> None:
    batch = generate_batch(heads, PROMPTS, max_new_tokens=7, diagnostics=True)
    batch.run()
    for prompt, row in zip(PROMPTS, batch.rows, strict=True):
        alone = generate(heads, prompt, max_new_tokens=7, diagnostics=True)
        assert list(alone) == row.tokens
        for given, wanted in zip(row.diagnostics, alone.diagnostics, strict=True):
            same_report(given, wanted, tolerance=1e-4)


@pytest.mark.parametrize("names", [(), ("memory",), ("evaluation", "reasoning")], ids=str)
def test_an_eager_session_has_the_heads_that_are_asked_for(
    names: tuple[str, ...], heads_checkpoint: Checkpoint
) -> None:
    """In the model's order, whatever theirs."""
    session = eager_session(heads_checkpoint, capabilities=names)
    ids = np.array([[3, 1, 4]])
    output = session.call(ids)
    model = load_model(heads_checkpoint, capabilities=names)
    logits, report = model(
        torch.from_numpy(ids), return_diagnostics=True, **{f"use_{n}": n in names for n in CAPABILITIES}
    )
    np.testing.assert_allclose(output.logits, logits.numpy(), rtol=0, atol=1e-4)
    same_report(output.diagnostics, report, tolerance=1e-4)
    assert session.manifest.capabilities is not None
    assert session.manifest.capabilities["names"] == [name for name in CAPABILITIES if name in names]


def test_heads_that_a_checkpoint_has_not_are_refused(checkpoint: Checkpoint) -> None:
    with pytest.raises(CheckpointError, match="safety_system"):
        eager_session(checkpoint, capabilities=("safety",))
    with pytest.raises(ConfigError, match="planning"):
        eager_session(checkpoint, capabilities=("planning",))
    with pytest.raises(ConfigError, match="float32, float16, bfloat16, got 'float8'"):
        eager_session(checkpoint, dtype="float8")


# What is refused before it is loaded


@pytest.fixture(params=["torchscript", "pt2"])
def altered(request: pytest.FixtureRequest, bundles: dict[str, ExportedBundle], tmp_path: Path) -> Path:
    """One weight has another bit; the size is the same."""
    folder = tmp_path / "altered"
    shutil.copytree(bundles[request.param].path, folder)
    file = folder / FILES[request.param]
    data = bytearray(file.read_bytes())
    weight = bundles["onnx"].path.joinpath("model.onnx.data").read_bytes()[:64]
    assert data.count(weight) == 1
    data[data.index(weight) + 40] ^= 1
    file.write_bytes(data)
    return folder


def never(path: Path) -> Any:
    raise KeyboardInterrupt(f"{path} was loaded")


@pytest.fixture
def nothing_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "load_torchscript", never)
    monkeypatch.setattr(sessions, "load_program", never)


@pytest.mark.usefixtures("nothing_loads")
def test_an_altered_program_is_refused_before_it_is_loaded(altered: Path) -> None:
    with pytest.raises(BundleError, match=r"model\.pt2?: altered"):
        load_session(altered)
    with pytest.raises(KeyboardInterrupt, match="was loaded"):
        load_session(altered, trusted=True)


@pytest.mark.usefixtures("nothing_loads")
def test_every_file_is_looked_at(bundles: dict[str, ExportedBundle], tmp_path: Path) -> None:
    """A tokenizer or a configuration that was altered makes no better program."""
    folder = tmp_path / "altered"
    shutil.copytree(bundles["torchscript"].path, folder)
    config = folder / "config.json"
    config.write_text(config.read_text().replace("96", "69", 1))
    with pytest.raises(BundleError, match=r"config\.json: altered"):
        load_session(folder)


@pytest.mark.usefixtures("nothing_loads")
@pytest.mark.parametrize("name", ["torchscript", "pt2"])
def test_another_device_is_refused_before_anything_is_loaded(name: str, bundles: dict[str, ExportedBundle]) -> None:
    with pytest.raises(ProviderError, match=rf"'cuda': sessions over a {name} bundle run on the CPU.*cuda-fp16"):
        load_session(bundles[name].path, provider="cuda")


@pytest.mark.parametrize("threads", [0, -1])
@pytest.mark.parametrize("name", FORMATS)
def test_a_wrong_number_of_threads_is_refused(name: str, threads: int, bundles: dict[str, ExportedBundle]) -> None:
    with pytest.raises(InputError, match="threads"):
        load_session(bundles[name].path, threads=threads)


@pytest.mark.parametrize("name", ["torchscript", "pt2"])
def test_threads_are_pytorchs_own(name: str, bundles: dict[str, ExportedBundle]) -> None:
    before = torch.get_num_threads()
    try:
        load_session(bundles[name].path, threads=2)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_a_file_that_is_no_program_is_a_damaged_bundle(bundles: dict[str, ExportedBundle], tmp_path: Path) -> None:
    """Sealed as it is: nothing else can tell."""
    for name, file in FILES.items():
        folder = tmp_path / name
        shutil.copytree(bundles[name].path, folder)
        (folder / file).write_bytes(b"no program at all")
        manifest = bundles[name].manifest
        files = {**manifest.files, file: describe_file(folder / file)}
        (folder / MANIFEST_NAME).write_text(replace(manifest, files=files).to_json(), encoding="utf-8")
        with pytest.raises(
            BundleError, match=rf"{re.escape(file)}: PyTorch .* cannot load what.*made.*export the checkpoint again"
        ):
            load_session(folder)


def test_a_bundle_that_is_opened_is_taken_as_it_is(bundles: dict[str, ExportedBundle]) -> None:
    for name in FORMATS:
        session = load_session(Bundle.open(bundles[name].path), threads=1)
        assert session.manifest.graph_format == name
        assert session.provider == "cpu"


def test_an_eager_session_is_described_as_a_bundle_would_be(
    checkpoint: Checkpoint, bundles: dict[str, ExportedBundle]
) -> None:
    eager, exported = eager_session(checkpoint).manifest, bundles["torchscript"].manifest
    assert eager.model == exported.model
    assert eager.graphs == exported.graphs
    assert eager.files == {}
    again = manifest_of("eager", checkpoint, ExportRecipe.load("torchscript-fp32"), eager.graphs, {}, causal=True)
    assert again.generation == eager.generation
