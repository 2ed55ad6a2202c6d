"""Bundles with capability heads: every set, mode and level is proven, and the runtime does what the model does."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator

from cosmos_export.checkpoint import Checkpoint
from cosmos_export.errors import CheckpointError, ConfigError, RecipeError
from cosmos_export.model.loading import load_model
from cosmos_export.model.tensors_read import tensors_read
from cosmos_export.onnx.signature import parts_of, quantized_part, source_of
from cosmos_export.parity.gates import Arithmetic, Verdict
from cosmos_export.parity.verify import Effort
from cosmos_export.pipeline import ExportedBundle
from cosmos_runtime import CAPABILITIES, InputError, Session, generate, generate_batch, load, new_decoder, score

from .head_bundles import (
    MEMORY_SIZE,
    export_heads,
    exported_once,
    heads_checkpoint,
    heads_config,
    quantised,
    same_report,
)

PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 3]]
MODES = ["chain_of_thought", "tree_of_thoughts", "self_consistency", "reflexion", "analogical"]
SETS = [names for count in range(5) for names in itertools.combinations(CAPABILITIES, count)]


def of_combination(number: int) -> dict[str, Any]:
    """A mode, a level and switches, so that sixteen sets of capabilities meet all of them."""
    return {
        "mode": MODES[number % len(MODES)],
        "extended": number % 3 == 0,
        "level": ("low", "medium", "high", "strict")[number % 4],
        "all_checks": number % 2 == 0,
        "memory_size": (0, 3, 5, 6, 100)[number % 5],
        "rounds": 1 + number % 3,
        "recipe": ("cpu-fp32", "fp32", "portable-fp32")[number % 3],
    }


@pytest.mark.parametrize("number", range(len(SETS)), ids=["+".join(names) or "none" for names in SETS])
def test_every_set_of_capabilities_is_proven(number: int, tmp_path: Path) -> None:
    chosen, config = of_combination(number), heads_config(n_layers=1, max_sequence_length=16)
    config.reasoning.mode, config.reasoning.extended_thinking = chosen["mode"], chosen["extended"]
    config.safety.safety_level, config.memory.working_memory_size = chosen["level"], chosen["memory_size"]
    config.evaluation.verification_depth = chosen["rounds"]
    if not chosen["all_checks"]:
        config.safety.bias_mitigation = config.safety.jailbreak_prevention = False
        config.evaluation.quality_scoring = config.evaluation.answer_verification = False
    checkpoint = heads_checkpoint(config, SETS[number], seed=number)
    bundle = export_heads(checkpoint, tmp_path / "bundle", chosen["recipe"], SETS[number], effort=Effort.FULL)
    assert bundle.report is not None
    assert bundle.report.passed
    assert bundle.manifest.capabilities is not None
    assert bundle.manifest.capabilities["names"] == list(SETS[number])


@pytest.fixture(scope="module")
def checkpoint(lively_checkpoint: Checkpoint) -> Checkpoint:
    return lively_checkpoint


@pytest.fixture(scope="module")
def blocking_checkpoint() -> Checkpoint:
    """The first rows are not blocked, and later ones are."""
    config = heads_config()
    config.safety.safety_level = "high"
    checkpoint = heads_checkpoint(config)
    quieter = {
        "safety_system.content_filter.harmful_detector.3.bias": -2.5,
        "safety_system.toxicity_detector.toxicity_scorer.3.bias": -2.5,
        "safety_system.jailbreak_prevention.jailbreak_detector.2.bias": -2.5,
    }
    tensors = {name: checkpoint.tensor(name) + quieter.get(name, 0.0) for name in checkpoint.names}
    return Checkpoint.from_tensors(config, tensors, {"kind": "preset", "location": "quieter"})


@pytest.fixture(scope="module")
def blocking_bundle(
    blocking_checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], ExportedBundle]:
    return exported_once(blocking_checkpoint, tmp_path_factory)


@pytest.fixture(scope="module", params=["cpu-fp32", "portable-fp32", "fp32"])
def session(request: pytest.FixtureRequest, lively_bundle: Callable[[str], ExportedBundle]) -> Session:
    return load(lively_bundle(request.param).path, threads=1)


@pytest.fixture(scope="module", params=["cpu-fp32", "fp32"])
def blocking(request: pytest.FixtureRequest, blocking_bundle: Callable[[str], ExportedBundle]) -> Session:
    return load(blocking_bundle(request.param).path, threads=1)


def test_generation_is_the_eager_models(session: Session, checkpoint: Checkpoint) -> None:
    """More calls than the memory has room for: what is written in place was read before."""
    model = load_model(checkpoint)
    for prompt in PROMPTS:
        generation = generate(session, prompt, max_new_tokens=2 * MEMORY_SIZE, diagnostics=True)
        tokens = list(generation)
        ids, expected = model.generate(torch.tensor([prompt]), 2 * MEMORY_SIZE, temperature=0.0, repetition_penalty=1.0)
        assert isinstance(expected, dict)
        assert prompt + tokens == ids[0].tolist()
        assert generation.finish_reason == expected["finish_reason"] == "length"
        for given, wanted in zip(generation.diagnostics, expected["generation_steps"], strict=True):
            same_report(given, wanted, tolerance=1e-4)


def test_a_row_of_a_batch_is_the_row_alone(session: Session, blocking: Session) -> None:
    for each in (session, blocking):
        batch = generate_batch(each, PROMPTS, max_new_tokens=9, diagnostics=True)
        batch.run()
        for prompt, row in zip(PROMPTS, batch.rows, strict=True):
            alone = generate(each, prompt, max_new_tokens=9, diagnostics=True)
            assert (list(alone), alone.finish_reason) == (row.tokens, row.finish_reason)
            assert len(alone.diagnostics) == len(row.diagnostics)
            for given, wanted in zip(row.diagnostics, alone.diagnostics, strict=True):
                same_report(given, wanted, tolerance=1e-4)


def test_a_blocked_output_ends_the_row(blocking: Session, blocking_checkpoint: Checkpoint) -> None:
    model, reasons = load_model(blocking_checkpoint), set()
    for first in range(12):
        generation = generate(blocking, [first, 2], max_new_tokens=6, diagnostics=True)
        ids, expected = model.generate(torch.tensor([[first, 2]]), 6, temperature=0.0, repetition_penalty=1.0)
        assert isinstance(expected, dict)
        assert [first, 2, *generation] == ids[0].tolist()
        assert generation.finish_reason == expected["finish_reason"]
        blocked = [report.get("output_blocked", False) for report in generation.diagnostics]
        withheld = generation.finish_reason == "blocked"
        assert blocked == [False] * len(generation.tokens) + [True] * withheld
        reasons.add((generation.finish_reason, bool(generation.tokens)))
    assert {("blocked", True), ("blocked", False), ("length", True)} <= reasons, "the test saw all that can happen"


def test_blocked_rows_have_zero_logits_everywhere_and_others_have_not(blocking: Session) -> None:
    ids = [[first, 2, 3, 4] for first in range(12)]
    output = blocking.call(ids)
    blocked = [diagnosis.blocked for diagnosis in output.diagnoses]
    assert 0 < sum(blocked) < len(ids)
    assert [not row.any() for row in output.logits] == blocked
    for row, alone in enumerate(ids):
        np.testing.assert_allclose(blocking.call(alone).logits[0], output.logits[row], rtol=0, atol=1e-4)


def test_a_long_prompt_is_one_call(session: Session, blocking: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes through the cache in pieces, of which the last alone is looked at, remembered and counted."""
    ids = np.random.default_rng(0).integers(0, 23, (6, 11))
    for each in (session, blocking):
        memory, again = each.new_memory(6), each.new_memory(6)
        whole = [each.call(ids[:, : 9 + call], memory=memory) for call in range(3)]
        monkeypatch.setattr("cosmos_runtime.decoder_graph.CHUNK", 4)
        pieces = [each.call(ids[:, : 9 + call], memory=again) for call in range(3)]
        monkeypatch.undo()
        assert memory.calls.tolist() == again.calls.tolist() == [3] * 6
        for one, other in zip(whole, pieces, strict=True):
            np.testing.assert_allclose(one.logits, other.logits, rtol=0, atol=1e-4)
            for mine, theirs in zip(one.diagnoses, other.diagnoses, strict=True):
                same_report(mine.report(), theirs.report(), tolerance=1e-4)


def test_pieces_of_a_call_leave_a_full_memory_alone(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = np.random.default_rng(1).integers(0, 23, (2, 11))
    draw = np.random.default_rng(2)
    keys, values = draw.standard_normal((2, 2, MEMORY_SIZE, 16)).astype(np.float32)
    keys /= np.linalg.norm(keys, axis=-1, keepdims=True)

    def logits() -> np.ndarray:
        memory = session.new_memory(2)
        memory.restore(keys, values, calls=MEMORY_SIZE + 3)
        return session.call(ids, memory=memory).logits

    whole = logits()
    monkeypatch.setattr("cosmos_runtime.decoder_graph.CHUNK", 4)
    np.testing.assert_allclose(logits(), whole, rtol=0, atol=1e-4)
    assert np.abs(whole - session.call(ids).logits).max() > 1e-2, "the memory matters"


def test_what_a_session_refuses(session: Session) -> None:
    with pytest.raises(InputError, match="speculate"):
        generate(session, [1], max_new_tokens=2, speculate=4)
    with pytest.raises(InputError, match="score: expected a plain decoder"):
        score(session, [1, 2, 3])
    with pytest.raises(InputError, match="one of 2 rows, got one of 3"):
        session.call([[1], [2]], memory=session.new_memory(3))
    with pytest.raises(InputError, match="restore"):
        session.new_memory(1).restore(np.zeros((1, 2, 16)), np.zeros((1, 2, 16)), calls=2)
    decoder = new_decoder(session, 4)
    decoder.prefill(np.array([1, 2]))
    with pytest.raises(InputError, match="do not forget a call"):
        decoder.rewind(1)


def test_heads_are_decoded_by_the_host_and_that_is_said(session: Session) -> None:
    with pytest.raises(InputError, match="device_loop: expected a plain decoder.*capability heads.*chosen on the host"):
        generate(session, [1, 2], max_new_tokens=2, device_loop=True)
    assert len(list(generate(session, [1, 2], max_new_tokens=2))) == 2


def test_a_memory_does_not_lose_entries_in_silence(session: Session) -> None:
    memory = session.new_memory(1, calls=5)
    for _ in range(5):
        session.call([1, 2], memory=memory)
    with pytest.raises(InputError, match="made for 5 calls"):
        session.call([1, 2], memory=memory)


def test_a_plain_decoder_has_no_diagnostics(small_decoder: ExportedBundle) -> None:
    session = load(small_decoder.path)
    assert session.call([1, 2]).diagnostics is None
    with pytest.raises(InputError, match="plain decoder and has none"):
        generate(session, [1], max_new_tokens=1, diagnostics=True)
    with pytest.raises(InputError, match="plain decoder and remembers nothing"):
        session.new_memory(1)


# What an export holds


def sources(bundle: ExportedBundle) -> list[str]:
    """Tensors of the model that a bundle's graph has initializers for, each as often as it does."""
    model = onnx.load(bundle.path / "model.onnx", load_external_data=False)
    found = {source_of(quantized_part(tensor.name)[0])[0] for tensor in model.graph.initializer}
    return sorted(part for source in found for part in parts_of(source) if "." in part and not part.startswith("rope."))


@pytest.mark.parametrize("recipe", ["cpu-fp32", "cpu-int4"])
def test_a_bundle_holds_what_a_pass_reads_and_nothing_else(
    recipe: str, checkpoint: Checkpoint, lively_bundle: Callable[[str], ExportedBundle], tmp_path: Path
) -> None:
    if recipe == "cpu-fp32":
        bundle = lively_bundle(recipe)
    else:
        bundle = export_heads(checkpoint, tmp_path / "bundle", quantised(4))
    known = tensors_read(checkpoint.config, CAPABILITIES)
    held = [name for name in sources(bundle) if name.split(".")[0] != "model" and not name.endswith("/sizes")]
    assert [name for name in held if name in known] == sorted(known), "each once"
    assert not [name for name in held if name not in known and name.endswith((".weight", ".bias"))]
    assert not any("tree" in name or ".tot." in name or "concept_embeddings" in name for name in held)


def test_the_portable_graph_is_standard_onnx(lively_bundle: Callable[[str], ExportedBundle]) -> None:
    bundle = lively_bundle("portable-fp32")
    onnx.checker.check_model(bundle.path / "model.onnx", full_check=True)
    model = onnx.load(bundle.path / "model.onnx")
    assert {node.domain for node in model.graph.node} == {""}
    session, spec = load(bundle.path, threads=1), bundle.manifest.graphs["decoder"]
    ids = np.array([[3, 1, 4], [1, 5, 9]])
    feeds = {tensor.name: _zeros(tensor, {"batch": 2, "cache_length": 4, "memory_slots": 5}) for tensor in spec.inputs}
    feeds |= {"input_ids": ids, "attention_mask": np.ones_like(ids), "logit_offsets": np.array([0])}
    feeds["ends_call"] = np.array([True])
    names = [tensor.name for tensor in spec.outputs]
    outputs = dict(zip(names, ReferenceEvaluator(model).run(None, feeds), strict=True))
    expected = session.call(ids)
    np.testing.assert_allclose(outputs["logits"][:, 0], expected.logits[:, -1], rtol=0, atol=1e-4)
    for row, diagnosis in enumerate(expected.diagnoses):
        for name, value in diagnosis.scores.items():
            np.testing.assert_allclose(outputs[name][row], value, rtol=0, atol=1e-4, err_msg=name)


def _zeros(tensor: Any, sizes: dict[str, int]) -> np.ndarray:
    return np.zeros([sizes.get(axis, 1) if isinstance(axis, str) else axis for axis in tensor.shape], tensor.dtype)


@pytest.fixture(scope="module", params=[4, 8])
def rounded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ExportedBundle:
    checkpoint = heads_checkpoint(heads_config(dim=32, max_sequence_length=32))
    folder = tmp_path_factory.mktemp("rounded") / f"int{request.param}"
    return export_heads(checkpoint, folder, quantised(request.param), effort=Effort.FULL)


def test_heads_in_few_bits_are_proven(rounded: ExportedBundle) -> None:
    """On the same bytes with float32 activations every number is near; rounded activations cross thresholds."""
    report = rounded.report
    assert report is not None
    assert report.passed
    of_float32 = [case for case in report.cases if case.arithmetic is Arithmetic.FLOAT32]
    assert of_float32
    assert all(case.verdict is Verdict.PASS for case in of_float32)
    assert {case.arithmetic for case in report.cases} == {Arithmetic.FLOAT32, Arithmetic.INT8_ACTIVATIONS}
    assert report.quality is not None
    assert report.quality.tokens > 100


def test_skills_are_two_products(rounded: ExportedBundle) -> None:
    model = onnx.load(rounded.path / "model.onnx", load_external_data=False)
    products = [node for node in model.graph.node if node.op_type == "MatMulNBits" and "procedural" in node.name]
    sizes = [{a.name: a.i for a in node.attribute} for node in products]
    assert sorted((size["K"], size["N"]) for size in sizes) == [(32, 50 * 32), (50 * 32, 32)]


def test_a_bundle_decodes_what_it_computes_at_once(rounded: ExportedBundle) -> None:
    session = load(rounded.path, threads=1)
    assert list(generate(session, [1, 2, 3], max_new_tokens=4))
    output = session.call([[1, 2, 3], [4, 5, 6]])
    assert np.isfinite(output.logits).all()


# What an export refuses


def test_a_checkpoint_without_these_weights_is_refused_by_name(small_checkpoint: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"capability_fusion\.0\.weight.*--head lm"):
        export_heads(small_checkpoint, tmp_path / "bundle", capabilities=())
    partly = heads_checkpoint(heads_config(), ["memory"])
    with pytest.raises(CheckpointError, match=r"safety_system\.content_filter"):
        export_heads(partly, tmp_path / "bundle", capabilities=["memory", "safety"])
    assert not (tmp_path / "bundle").exists()


def test_an_unknown_capability_and_a_cache_without_a_mask_are_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no capability 'planning'"):
        export_heads(checkpoint, tmp_path / "bundle", capabilities=["planning"])
    with pytest.raises(RecipeError, match="without causal mask"):
        export_heads(checkpoint, tmp_path / "bundle", "cpu-fp32", causal=False)


def test_without_a_causal_mask_whole_sequences_are_proven(checkpoint: Checkpoint, tmp_path: Path) -> None:
    bundle = export_heads(checkpoint, tmp_path / "bundle", "fp32", causal=False, effort=Effort.FULL)
    assert bundle.report is not None
    assert bundle.report.passed


def test_without_diagnostics_the_answer_is_the_same(blocking_bundle: Callable[[str], ExportedBundle]) -> None:
    """What only a report reads is left out; what an answer depends on, a blocked row above all, is not."""
    session, blocked = load(blocking_bundle("cpu-fp32").path, threads=1), []
    for first in range(12):
        told, untold = (new_decoder(session, 12, diagnostics=wanted) for wanted in (True, False))
        np.testing.assert_array_equal(told.prefill(np.array([first, 2, 3])), untold.prefill(np.array([first, 2, 3])))
        np.testing.assert_array_equal(told.decode_one_token(4), untold.decode_one_token(4))
        assert told.diagnosis is not None
        assert untold.diagnosis is not None
        assert (
            told.diagnosis.blocked == untold.diagnosis.blocked == told.diagnosis.report().get("output_blocked", False)
        )
        blocked.append(untold.diagnosis.blocked)
        with pytest.raises(InputError, match="diagnostics=True"):
            untold.diagnosis.report()
        with pytest.raises(InputError, match="diagnostics=True"):
            _ = untold.diagnosis.scores
    assert 0 < sum(blocked) < len(blocked)


def test_generations_say_whether_they_want_diagnostics(lively_bundle: Callable[[str], ExportedBundle]) -> None:
    session = load(lively_bundle("cpu-fp32").path, threads=1)
    plain = generate_batch(session, PROMPTS, max_new_tokens=4)
    told = generate_batch(session, PROMPTS, max_new_tokens=4, diagnostics=True)
    assert plain.run() == told.run()
    assert [row.finish_reason for row in plain.rows] == [row.finish_reason for row in told.rows]
    assert all(row.diagnostics for row in told.rows)
    assert not any(row.diagnostics for row in plain.rows)
    one = generate(session, PROMPTS[2], max_new_tokens=4)
    assert list(one) == plain.rows[2].tokens
