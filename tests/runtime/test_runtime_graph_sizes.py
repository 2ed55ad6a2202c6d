"""A manifest whose numbers its graphs contradict is refused at opening: tables, caches and memory have a size."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from cosmos_runtime import Bundle, BundleError, GraphSpec, Manifest, TensorSpec, check_bundle
from cosmos_runtime.graph_file import GraphContents, read_graph
from cosmos_runtime.graph_sizes import check_sizes

from .tiny_bundles import make_manifest
from .tiny_decoders import HEAD_DIM, KV_HEADS, MAX_SEQUENCE_LENGTH, VOCAB_SIZE, write_decoder_bundle

TRUE_NUMBERS = {"n_layers": 1, "n_kv_heads": KV_HEADS, "head_dim": HEAD_DIM}
MakeDecoder = Callable[..., Path]


@pytest.fixture
def make_decoder(tmp_path: Path) -> MakeDecoder:
    """A bundle with a decoder and a full sequence whose manifest says something else about the model."""

    def make(graph: str = "decoder", **changes: Any) -> Path:
        model = {"vocab_size": VOCAB_SIZE, "max_sequence_length": MAX_SEQUENCE_LENGTH, "causal": True, "head": "lm"}
        model |= {"parameters": 1, **TRUE_NUMBERS, **changes}
        return write_decoder_bundle(tmp_path / "bundle", graphs=(graph,), model=model)

    return make


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"max_sequence_length": MAX_SEQUENCE_LENGTH + 1}, "model.max_sequence_length 97, and 'cos' has 96 positions"),
        ({"vocab_size": VOCAB_SIZE + 1}, "model.vocab_size 258, and 'embedding' has 257 tokens"),
        ({"vocab_size": VOCAB_SIZE - 1}, "model.vocab_size 256, and 'embedding' has 257 tokens"),
        ({"n_layers": 2}, "model.n_layers 2, and its caches or memory have 1"),
        ({"n_kv_heads": 4}, "model.n_kv_heads 4, and its caches or memory have 2"),
        ({"head_dim": 32}, "model.head_dim 32, and its caches or memory have 16"),
    ],
)
def test_numbers_that_a_decoder_contradicts(make_decoder: MakeDecoder, changes: dict[str, int], words: str) -> None:
    path = make_decoder(**changes)
    with pytest.raises(BundleError, match=words) as caught:
        Bundle.open(path)
    assert str(caught.value).startswith(f"{path / 'decoder.onnx'}: manifest.json says ")
    (finding,) = check_bundle(path).findings
    assert finding.file == "decoder.onnx"
    assert words in finding.problem


@pytest.mark.parametrize("changes", [{"max_sequence_length": 97}, {"vocab_size": 258}])
def test_numbers_that_a_full_sequence_contradicts(make_decoder: MakeDecoder, changes: dict[str, int]) -> None:
    with pytest.raises(BundleError, match="positions|tokens"):
        Bundle.open(make_decoder("full_sequence", **changes))


@pytest.mark.parametrize("changes", [{}, {"max_sequence_length": 40}])
def test_numbers_that_agree(make_decoder: MakeDecoder, changes: dict[str, int]) -> None:
    """Fewer positions than the table has is a limit that somebody may set."""
    assert Bundle.open(make_decoder(**changes)).manifest.vocab_size == VOCAB_SIZE


def test_tables_by_name(tmp_path: Path) -> None:
    """Standard operators read the rotary tables in many ways; the names that exports give them say what they are."""
    _, graph, manifest = a_graph_with_memory()
    contents = GraphContents(initializers={"rope.cos": (64, 8), "rope.sin": (20, 8)})
    with pytest.raises(BundleError, match="model.max_sequence_length 32, and 'rope.sin' has 20 positions"):
        check_sizes(tmp_path, contents, graph, manifest)


def a_graph_with_memory() -> tuple[GraphContents, GraphSpec, Manifest]:
    memory = TensorSpec("keys", "past_memory_keys", "float32", ("batch", "slots", 24))
    graph = GraphSpec("model.onnx", 20, (TensorSpec("ids", "tokens", "int64", ("batch", "sequence")), memory), ())
    return GraphContents(), graph, make_manifest({}, 8, tokenizer=None)


def test_memory_of_another_width(tmp_path: Path) -> None:
    contents, graph, manifest = a_graph_with_memory()
    check_sizes(tmp_path, contents, graph, replace(manifest, model={**manifest.model, "dim": 24}))
    with pytest.raises(BundleError, match="model.dim 16, and its caches or memory have 24"):
        check_sizes(tmp_path, contents, graph, replace(manifest, model={**manifest.model, "dim": 16}))


def saved(path: Path, *initializers: TensorProto, **changes: Any) -> Path:
    """A graph of one Gather and these initializers."""
    nodes = [helper.make_node("Gather", ["table", "ids"], ["out"]), helper.make_node("Neg", ["out"], ["unused"])]
    model = helper.make_model(helper.make_graph(nodes, "g", [], [], list(initializers)), **changes)
    path.write_bytes(model.SerializeToString())
    return path


def test_shapes_and_readers(tmp_path: Path) -> None:
    table = numpy_helper.from_array(np.zeros((300, 2, 5), np.float32), "table")
    contents = read_graph(saved(tmp_path / "g.onnx", table, numpy_helper.from_array(np.float32(1), "scalar")))
    assert contents.initializers == {"table": (300, 2, 5), "scalar": ()}
    assert contents.readers == [("Gather", ["table", "ids"])]


def test_sizes_that_are_packed_into_one_field(tmp_path: Path) -> None:
    """Protobuf reads a list of numbers either way."""
    raw = saved(tmp_path / "g.onnx", TensorProto(name="table", dims=[300, 5], data_type=1)).read_bytes()
    spread, packed = b"\x08\xac\x02\x08\x05", b"\x0a\x03\xac\x02\x05"
    assert raw.count(spread) == 1
    (tmp_path / "g.onnx").write_bytes(raw.replace(spread, packed))
    assert list(onnx.load(tmp_path / "g.onnx").graph.initializer[0].dims) == [300, 5]
    assert read_graph(tmp_path / "g.onnx").initializers == {"table": (300, 5)}


@pytest.mark.parametrize(
    ("initializers", "words"),
    [
        ([TensorProto(name="table", dims=[-1])], "a tensor has a negative size"),
        ([TensorProto(name="table", dims=[1]), TensorProto(name="table", dims=[2])], "'table' is given twice"),
    ],
)
def test_shapes_that_two_readers_could_take_in_two_ways(
    tmp_path: Path, initializers: list[TensorProto], words: str
) -> None:
    with pytest.raises(BundleError, match=words):
        read_graph(saved(tmp_path / "g.onnx", *initializers))


def test_other_keys_of_the_model_are_free(make_decoder: MakeDecoder) -> None:
    path = make_decoder()
    document = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    for key in TRUE_NUMBERS:
        del document["model"][key]
    document["model"]["trained_on"] = "rhymes"
    (path / "manifest.json").write_text(json.dumps(document), encoding="utf-8")
    Bundle.open(path)
