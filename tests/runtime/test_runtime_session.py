"""Loading and logits: the provider asked for or an error, and no bad token id reaches a graph."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto

from cosmos_runtime import Bundle, BundleError, CosmosRuntimeError, InputError, ProviderError, Session, TensorSpec, load
from cosmos_runtime.decoder_graph import DecoderGraph
from cosmos_runtime.full_sequence_graph import FullSequenceGraph
from cosmos_runtime.signature import check_signature

from .tiny_bundles import MAX_SEQUENCE_LENGTH, BundleFactory, graph_spec, successor_table
from .tiny_decoders import DECODER, FULL, write_decoder_bundle


def test_logits_are_the_table_rows(session: Session) -> None:
    table = successor_table(257, {})
    logits = session.logits([[3, 4], [5, 256]])
    assert logits.dtype == np.float32
    np.testing.assert_array_equal(logits, table[[[3, 4], [5, 256]]])


def test_a_row_is_a_batch_of_one(session: Session) -> None:
    np.testing.assert_array_equal(session.logits(np.array([1, 2])), session.logits([[1, 2]]))


def test_what_a_session_tells(session: Session, bundle_path: Path) -> None:
    assert session.provider == "cpu"
    assert session.bundle == Bundle.open(bundle_path)
    assert session.manifest is session.bundle.manifest


def test_an_opened_bundle_loads(bundle_path: Path) -> None:
    assert load(Bundle.open(bundle_path), threads=1).logits([0]).shape == (1, 1, 257)


def test_float16_logits_become_float32(make_bundle: BundleFactory) -> None:
    graphs = {"full_sequence": graph_spec(257, "float16")}
    logits = load(make_bundle(onnx_dtype=TensorProto.FLOAT16, graphs=graphs), threads=1).logits([7])
    assert logits.dtype == np.float32
    assert int(logits[0, 0].argmax()) == 8


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32, np.uint64])
def test_every_integer_type_is_accepted(session: Session, dtype: type) -> None:
    np.testing.assert_array_equal(session.logits(np.array([1, 2], dtype)), session.logits([1, 2]))


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([], r"at least one token, got shape \(0,\)"),
        ([[], []], r"at least one token, got shape \(2, 0\)"),
        (np.zeros((0, 3), np.int64), "at least one token"),
        (5, r"expected shape \(T,\) or \(B, T\), got \(\)"),
        ([[[1]]], r"got \(1, 1, 1\)"),
        ([1.0, 2.0], "expected integers, got dtype float64"),
        ([True, False], "got dtype bool"),
        (["1"], "expected integers"),
        (None, "expected integers"),
        ([[1, 2], [3]], "rows of equal length"),
        ([2**70], "expected"),
        ([1, -1], r"input_ids\[1\]: expected a token id from 0 to 256, got -1"),
        ([[1, 2], [3, 257], [999, 0]], r"input_ids\[1, 1\]: .* got 257"),
        (np.array([2**64 - 1], np.uint64), r"input_ids\[0\]: .* got 18446744073709551615"),
        ([0] * (MAX_SEQUENCE_LENGTH + 1), "at most 32 tokens, got 33"),
    ],
)
def test_bad_ids(session: Session, ids: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        session.logits(ids)


def test_input_errors_are_value_errors() -> None:
    assert issubclass(InputError, ValueError)
    assert issubclass(InputError, CosmosRuntimeError)


def test_the_longest_sequence_is_accepted(session: Session) -> None:
    assert session.logits([0] * MAX_SEQUENCE_LENGTH).shape == (1, MAX_SEQUENCE_LENGTH, 257)


def test_fixed_axes_are_named(make_bundle: BundleFactory) -> None:
    session = load(make_bundle(sequence=4, graphs={"full_sequence": graph_spec(257, sequence=4)}), threads=1)
    assert session.logits([1, 2, 3, 4]).shape == (1, 4, 257)
    with pytest.raises(InputError, match="fixes the sequence size at 4, got 3"):
        session.logits([1, 2, 3])


@pytest.mark.skipif("CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="this build has CUDA")
def test_cuda_on_a_cpu_build(bundle_path: Path) -> None:
    with pytest.raises(ProviderError, match=r"cosmos-export\[gpu\]"):
        load(bundle_path, provider="cuda")


def test_silent_fallback_is_an_error(bundle_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA build on a machine without CUDA: ONNX Runtime makes a CPU session and warns."""
    create = onnxruntime.InferenceSession
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(
        onnxruntime, "InferenceSession", lambda graph, options, **_: create(graph, providers=["CPUExecutionProvider"])
    )
    with pytest.raises(ProviderError, match="could only start CPUExecutionProvider"):
        load(bundle_path, provider="cuda")


@pytest.mark.parametrize(
    ("provider", "message"),
    [("cdua", "did you mean 'cuda'"), ("CPU", "did you mean 'cpu'"), ("tpu-v9", "one of cpu, cuda, got 'tpu-v9'")],
)
def test_misspelt_provider(bundle_path: Path, provider: str, message: str) -> None:
    with pytest.raises(ProviderError, match=message):
        load(bundle_path, provider=provider)


def test_onnxruntime_missing(bundle_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ProviderError, match=r'pip install "cosmos-export\[cpu\]"'):
        load(bundle_path)


@pytest.mark.parametrize("threads", [0, -1, True, 1.5, "2"])
def test_bad_threads(bundle_path: Path, threads: Any) -> None:
    with pytest.raises(InputError, match="threads: expected a positive integer"):
        load(bundle_path, threads=threads)


def test_what_is_not_a_graph(make_bundle: BundleFactory) -> None:
    path = make_bundle()
    graph = path / "model.onnx"
    graph.write_bytes(b"x" * graph.stat().st_size)
    with pytest.raises(BundleError, match="ONNX Runtime cannot load it") as caught:
        load(path)
    assert "\n" not in str(caught.value)


TOKENS, LOGITS = graph_spec(257).inputs[0], graph_spec(257).outputs[0]


def spec(inputs: tuple[TensorSpec, ...] = (TOKENS,), outputs: tuple[TensorSpec, ...] = (LOGITS,)) -> dict[str, Any]:
    return {"full_sequence": type(graph_spec(257))("model.onnx", 20, inputs, outputs)}


@pytest.mark.parametrize(
    ("graphs", "message"),
    [
        (
            spec(inputs=(TensorSpec("other", "tokens", "int64", ("b", "t")),)),
            r"lists \['other'\], the graph has \['some",
        ),
        (spec(inputs=(TensorSpec("some_ids", "tokens", "int32", ("b", "t")),)), "expected int64 of rank 2, got int32"),
        (spec(inputs=(TensorSpec("some_ids", "tokens", "int64", ("b",)),)), "expected int64 of rank 2"),
        (spec(inputs=(TOKENS, TensorSpec("past", "past_key", "float32", (1,)))), "also wants past_key; upgrade"),
        (
            spec(outputs=(TensorSpec("some_logits", "logits", "float16", ("b", "t", 257)),)),
            "says float16, the graph fl",
        ),
        (spec(outputs=(TensorSpec("some_logits", "logits", "float32", ("b", "t", 9)),)), "expected 257 logits a token"),
        (spec(outputs=(TensorSpec("some_logits", "logits", "float32", ("b", 5, 257)),)), None),
        (
            spec(outputs=(TensorSpec("some_logits", "hidden", "float32", ("b", "t", 257)),)),
            "one output of role 'logits'",
        ),
    ],
)
def test_graph_that_is_not_as_the_manifest_says(
    make_bundle: BundleFactory, graphs: dict[str, Any], message: str | None
) -> None:
    path = make_bundle(graphs=graphs)
    if message is None:  # a size the graph leaves open may be promised
        load(path, threads=1)
        return
    with pytest.raises(BundleError, match=message):
        load(path, threads=1)


def test_fixed_size_that_differs(make_bundle: BundleFactory) -> None:
    path = make_bundle(sequence=4, graphs={"full_sequence": graph_spec(257, sequence=5)})
    with pytest.raises(BundleError, match="some_ids: the manifest says shape"):
        load(path, threads=1)


def test_bundle_without_the_graph(make_bundle: BundleFactory) -> None:
    with pytest.raises(BundleError, match="expected .decoder. or .full_sequence., got decode"):
        load(make_bundle(graphs={"decode": graph_spec(257)}))


def test_which_graph(decoder_path: Path, tmp_path: Path) -> None:
    assert isinstance(load(decoder_path, threads=1).graph, DecoderGraph)
    assert isinstance(load(decoder_path, threads=1, graph="full_sequence").graph, FullSequenceGraph)
    only = write_decoder_bundle(tmp_path / "decoder_only")
    assert isinstance(load(only, threads=1).graph, DecoderGraph)
    with pytest.raises(BundleError, match="expected one named 'full_sequence', got decoder"):
        load(only, threads=1, graph="full_sequence")


def test_a_graph_that_this_runtime_does_not_know(make_bundle: BundleFactory) -> None:
    with pytest.raises(InputError, match="graph: expected 'decoder' or 'full_sequence', got 'encoder'"):
        load(make_bundle(graphs={"encoder": graph_spec(257)}), graph="encoder")


def test_loading_a_decoder_says_nothing(decoder_path: Path) -> None:
    """ONNX Runtime warns of an input with a default value, which `logit_offsets` is on purpose."""
    code = f"import cosmos_runtime; cosmos_runtime.load({str(decoder_path)!r}).logits([1, 2])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert (result.stdout, result.stderr) == ("", "")


def without(tensors: tuple[TensorSpec, ...], name: str) -> tuple[TensorSpec, ...]:
    return tuple(tensor for tensor in tensors if tensor.name != name)


def changed(tensors: tuple[TensorSpec, ...], which: str, **changes: Any) -> tuple[TensorSpec, ...]:
    return tuple(replace(tensor, **changes) if tensor.name == which else tensor for tensor in tensors)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"inputs": without(DECODER.inputs, "back")}, "expected one input of role 'logit_offsets', got 0"),
        ({"inputs": without(DECODER.inputs, "mask")}, "expected one input of role 'attention_mask', got 0"),
        ({"inputs": without(DECODER.inputs, "old.k")}, r"past and present, key and value .* got \[0, 1, 1, 1\]"),
        ({"outputs": without(DECODER.outputs, "new.v")}, r"got \[1, 1, 1, 0\]"),
        ({"inputs": changed(DECODER.inputs, "mask", role="positions")}, "the graph also wants positions; upgrade"),
        ({"inputs": changed(DECODER.inputs, "mask", dtype="int32")}, "mask: expected int64 of rank 2, got int32"),
        ({"inputs": changed(DECODER.inputs, "mask", shape=("b", 8))}, "mask: expected a dynamic length"),
        ({"inputs": changed(DECODER.inputs, "ids", shape=("b", 1))}, "ids: expected a dynamic length"),
        ({"inputs": changed(DECODER.inputs, "back", shape=())}, "back: expected int64 of rank 1"),
        ({"outputs": changed(DECODER.outputs, "new.k", dtype="float16")}, "new.k: expected float32 .* as old.k is"),
        (
            {
                "inputs": changed(DECODER.inputs, "old.k", dtype="float64"),
                "outputs": changed(DECODER.outputs, "new.k", dtype="float64"),
            },
            "old.k: expected float32 or float16 or bfloat16 or int8 or uint8 of rank 4, got float64",
        ),
        (
            {
                "inputs": changed(DECODER.inputs, "old.k", shape=("b", 2, 64, 16)),
                "outputs": changed(DECODER.outputs, "new.k", shape=("b", 2, 64, 16)),
            },
            "old.k: expected fixed heads and channels and a dynamic length",
        ),
        ({"inputs": changed(DECODER.inputs, "back", name="forth")}, "inputs: the manifest lists .*'forth'"),
    ],
)
def test_a_decoder_that_is_not_as_it_should_be(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = write_decoder_bundle(tmp_path / "bundle", graphs={"decoder": replace(DECODER, **changes)})
    with pytest.raises(BundleError, match=message):
        load(path, threads=1)


def test_default_inputs_that_the_manifest_does_not_name() -> None:
    """An initializer that may be overridden is an input only where the manifest says so."""
    ids = SimpleNamespace(name="ids", type="tensor(int64)", shape=["b", "t"])
    back = SimpleNamespace(name="back", type="tensor(int64)", shape=["n"])
    scores = SimpleNamespace(name="scores", type="tensor(float)", shape=["b", "t", 257])
    session = SimpleNamespace(
        get_inputs=lambda: [ids], get_overridable_initializers=lambda: [back], get_outputs=lambda: [scores]
    )
    check_signature(session, FULL)
    named = replace(FULL, inputs=(*FULL.inputs, TensorSpec("back", "logit_offsets", "int64", ("n",))))
    check_signature(session, named)
    with pytest.raises(BundleError, match="back: the manifest says int32, the graph int64"):
        check_signature(session, replace(named, inputs=changed(named.inputs, "back", dtype="int32")))
