"""Graphs are read before they are loaded: operators beyond the lists, weights beyond the bundle, damage."""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import AttributeProto, FunctionProto, GraphProto, ModelProto, NodeProto, TensorProto, helper

from cosmos_runtime import Bundle, BundleError, describe_file, graph_operators, load
from cosmos_runtime import graph_file as reader
from cosmos_runtime.graph_file import read_graph

from .tiny_bundles import graph_spec, make_manifest

Fault = Callable[[ModelProto], None]


@pytest.fixture
def spoil(bundle_path: Path) -> Callable[..., Path]:
    """Changes the graph of a bundle and seals the bundle again, as a forger would."""

    def change(fault: Fault, **manifest: Any) -> Path:
        path = bundle_path / "model.onnx"
        model = onnx.load(path, load_external_data=False)
        fault(model)
        path.write_bytes(model.SerializeToString())
        seal(bundle_path, **manifest)
        return bundle_path

    return change


def seal(folder: Path, **changes: Any) -> None:
    files = {p.name: describe_file(p) for p in sorted(folder.iterdir()) if p.is_file() and p.name != "manifest.json"}
    (folder / "manifest.json").write_text(make_manifest(files, 257, **changes).to_json(), encoding="utf-8")


def refused(path: Path, words: str) -> None:
    """Both ways in refuse the bundle, in one line."""
    for opens in (Bundle.open, load):
        with pytest.raises(BundleError, match=words) as caught:
            opens(path)
        assert "\n" not in str(caught.value)


def external(model: ModelProto) -> TensorProto:
    return next(tensor for tensor in model.graph.initializer if tensor.external_data)


def move_to(location: str) -> Fault:
    def change(model: ModelProto) -> None:
        for entry in external(model).external_data:
            if entry.key == "location":
                entry.value = location

    return change


def entry(key: str, value: str) -> Fault:
    def change(model: ModelProto) -> None:
        tensor = external(model)
        kept = [(e.key, e.value) for e in tensor.external_data if e.key != key]
        del tensor.external_data[:]
        for name, text in [*kept, (key, value)]:
            tensor.external_data.add(key=name, value=text)

    return change


def node(operator: str, domain: str = "") -> NodeProto:
    made: NodeProto = helper.make_node(operator, ["some_ids"], ["unused"], domain=domain)
    return made


def add(made: NodeProto) -> Fault:
    return lambda model: model.graph.node.append(made)


def in_a_branch(made: NodeProto, depth: int = 1) -> NodeProto:
    """A node inside If inside If, and so on."""
    for _ in range(depth):
        branch = GraphProto(name="branch")
        branch.node.append(made)
        made = helper.make_node("If", ["some_ids"], ["unused"], then_branch=branch, else_branch=GraphProto(name="none"))
    return made


def in_a_list_of_graphs(made: NodeProto) -> NodeProto:
    holder: NodeProto = helper.make_node("Scan", ["some_ids"], ["unused"])
    attribute = AttributeProto(name="bodies", type=AttributeProto.GRAPHS)
    attribute.graphs.add(name="body").node.append(made)
    holder.attribute.append(attribute)
    return holder


def with_tensor(place: str) -> Fault:
    """External data of another folder, in one of the places where a graph may have a tensor."""

    def change(model: ModelProto) -> None:
        outside = TensorProto(name="outside", data_type=TensorProto.FLOAT, data_location=TensorProto.EXTERNAL)
        outside.external_data.add(key="location", value="../outside")
        made = node("Constant")
        if place == "attribute":
            made.attribute.append(AttributeProto(name="value", type=AttributeProto.TENSOR, t=outside))
        elif place == "attribute's list":
            made.attribute.append(AttributeProto(name="values", type=AttributeProto.TENSORS, tensors=[outside]))
        elif place == "sparse attribute":
            sparse = onnx.SparseTensorProto(values=outside)
            made.attribute.append(AttributeProto(name="v", type=AttributeProto.SPARSE_TENSOR, sparse_tensor=sparse))
        elif place == "sparse initializer":
            model.graph.sparse_initializer.add(indices=outside)
        else:
            branch = GraphProto(name="branch", initializer=[outside])
            made = helper.make_node("If", ["some_ids"], ["unused"], then_branch=branch)
        model.graph.node.append(made)

    return change


@pytest.mark.parametrize(
    "made",
    [
        node("Steal", "com.evil"),
        node("EPContext", "com.microsoft"),
        node("PyOp", "ai.onnx.contrib"),
        node("TreeEnsemble", "ai.onnx.ml"),
        in_a_branch(node("Steal", "com.evil")),
        in_a_branch(node("Steal", "com.evil"), depth=3),
        in_a_list_of_graphs(node("Steal", "com.evil")),
    ],
    ids=["custom", "contrib", "extensions", "ml", "branch", "deep branch", "graphs"],
)
def test_operators_beyond_the_runtimes_list(spoil: Callable[..., Path], made: NodeProto) -> None:
    refused(spoil(add(made)), r"model\.onnx: uses the operator .*custom operators are never loaded")


def test_the_manifest_cannot_allow_what_the_runtime_does_not(spoil: Callable[..., Path]) -> None:
    operators = {"ai.onnx": ("Gather", "MatMul"), "com.evil": ("Steal",)}
    refused(spoil(add(node("Steal", "com.evil")), operators=operators), "uses the operator com.evil::Steal")


@pytest.mark.parametrize("domain", ["", "ai.onnx"])
def test_operators_beyond_the_manifests_list(spoil: Callable[..., Path], domain: str) -> None:
    path = spoil(add(node("Neg", domain)), operators={"ai.onnx": ("Gather", "MatMul")})
    refused(path, r"uses the operator ai\.onnx::Neg, which manifest\.json does not list")


def test_a_list_of_exactly_what_there_is(bundle_path: Path) -> None:
    operators = graph_operators([bundle_path / "model.onnx"])
    assert operators == {"ai.onnx": ("Gather", "MatMul")}
    seal(bundle_path, operators=operators)
    assert load(bundle_path, threads=1).manifest.operators == operators


@pytest.mark.parametrize(
    "location",
    ["../model.onnx.data", "/etc/passwd", "sub/model.onnx.data", "..", ".", "", "*/_ORT_MEM_ADDR_/*", "..\\x", "C:\\x"],
)
def test_weights_in_another_folder(spoil: Callable[..., Path], location: str) -> None:
    refused(spoil(move_to(location)), "expected the name of a file beside the graph")


def test_weights_in_a_file_that_is_not_listed(spoil: Callable[..., Path]) -> None:
    refused(spoil(move_to("other.data")), r"lie in 'other\.data', which manifest\.json does not list")


def test_weights_through_a_link_out_of_the_bundle(bundle_path: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    (bundle_path / "model.onnx.data").rename(secret)
    (bundle_path / "model.onnx.data").symlink_to(secret)
    refused(bundle_path, "a symbolic link that leaves the bundle")


@pytest.mark.parametrize(
    "place", ["attribute", "attribute's list", "sparse attribute", "sparse initializer", "branch's initializer"]
)
def test_weights_in_another_folder_wherever_they_are_asked_for(spoil: Callable[..., Path], place: str) -> None:
    refused(spoil(with_tensor(place)), "the weights of 'outside': expected the name of a file")


def test_external_entries_count_without_the_flag(spoil: Callable[..., Path]) -> None:
    """Another reader may not look at `data_location`."""

    def change(model: ModelProto) -> None:
        move_to("../x")(model)
        external(model).ClearField("data_location")

    refused(spoil(change), "expected the name of a file")


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("offset", str(10**9), "end at byte 1,000,"),
        ("length", str(10**15), "end at byte 1,000,000,000,"),
        ("offset", "-1", "expected a number of bytes, got '-1'"),
        ("length", "0x10", "expected a number of bytes"),
        ("length", "٣", "expected a number of bytes"),
        ("length", "9" * 30, "expected a number of bytes"),
        ("basepath", "/etc", "expected each of location, offset, length, checksum at most once, got 'basepath'"),
    ],
)
def test_extents(spoil: Callable[..., Path], key: str, value: str, words: str) -> None:
    refused(spoil(entry(key, value)), words)


def test_two_locations_of_one_tensor(spoil: Callable[..., Path]) -> None:
    def twice(model: ModelProto) -> None:
        external(model).external_data.add(key="location", value="../x")

    refused(spoil(twice), "at most once, got 'location'")


def test_two_operators_of_one_node(bundle_path: Path) -> None:
    """Protobuf takes the last of two values of one field; another reader might take the first."""
    raw = (bundle_path / "model.onnx").read_bytes()
    hidden = node("Gather").SerializeToString() + b"\x22\x03Neg"
    graph = b"\x0a" + bytes([len(hidden)]) + hidden
    (bundle_path / "model.onnx").write_bytes(raw + b"\x3a" + bytes([len(graph)]) + graph)
    seal(bundle_path)
    refused(bundle_path, "operator or domain is given twice|expected one graph, got 2")


@pytest.mark.parametrize("suffix", [".so", ".so.1", ".dll", ".DYLIB", ".pyd"])
def test_libraries_of_custom_operators(bundle_path: Path, suffix: str) -> None:
    (bundle_path / f"ops{suffix}").write_bytes(b"\x7fELF")
    seal(bundle_path)
    refused(bundle_path, "is a library of native code; custom operators are never loaded")


def test_another_format_by_its_name(bundle_path: Path) -> None:
    """ONNX Runtime would read model.ort as its own format, which nobody has looked at."""
    (bundle_path / "model.onnx").rename(bundle_path / "model.ort")
    spec = graph_spec(257)
    seal(bundle_path, graphs={"full_sequence": type(spec)("model.ort", spec.opset, spec.inputs, spec.outputs)})
    refused(bundle_path, r"expected an ONNX graph with a name in \.onnx")


def local_function(model: ModelProto) -> None:
    model.functions.append(FunctionProto(name="Relu", domain="ai.onnx"))


def training(model: ModelProto) -> None:
    model.training_info.add()


@pytest.mark.parametrize(("fault", "words"), [(local_function, "local functions"), (training, "a training graph")])
def test_parts_that_no_export_has(spoil: Callable[..., Path], fault: Fault, words: str) -> None:
    refused(spoil(fault), words)


def test_branches_without_end(spoil: Callable[..., Path]) -> None:
    refused(spoil(add(in_a_branch(node("Neg"), depth=20))), "nested more than 16 deep")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "an empty file"),
        (b"\x08\x0a", "expected one graph, got 0"),
        (b"x" * 100, "ONNX Runtime cannot load it: it is no valid ONNX file: expected one graph, got 0"),
        (b"\x3a\x05ab", "in the middle of a field"),
        (b"\x3a", "a number without an end"),
        (b"\x3a\x80\x80\x80\x80\x80\x80\x80\x80\x80\x80\x01", "a number without an end"),
        (b"\x38\x01", "field 7 is of wire type 0"),
        (b"\x02\x00", "a field without a number"),
        (b"\x0b\x0c", "wire type 3"),
    ],
)
def test_damage(bundle_path: Path, content: bytes, words: str) -> None:
    (bundle_path / "model.onnx").write_bytes(content)
    seal(bundle_path)
    refused(bundle_path, words)


def test_more_fields_than_anyone_would_wait_for(bundle_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "_MOST_FIELDS", 20)
    refused(bundle_path, "has more than 20 fields")


def test_field_numbers_are_those_of_onnx() -> None:
    messages = {
        ModelProto: reader._MODEL,
        GraphProto: reader._GRAPH,
        NodeProto: reader._NODE,
        AttributeProto: reader._ATTRIBUTE,
        TensorProto: reader._TENSOR,
        onnx.SparseTensorProto: reader._SPARSE_TENSOR,
        onnx.StringStringEntryProto: reader._ENTRY,
    }
    for message, numbers in messages.items():
        fields = message.DESCRIPTOR.fields_by_name
        assert {name: fields[name].number for name in numbers} == numbers


def test_every_way_from_a_model_to_a_node_or_a_tensor_is_followed() -> None:
    """A field that leads to a graph, node, tensor or function, and is not read, would be a way round the check."""
    followed = {
        "ModelProto": reader._MODEL,
        "GraphProto": reader._GRAPH,
        "NodeProto": reader._NODE,
        "AttributeProto": reader._ATTRIBUTE,
        "SparseTensorProto": reader._SPARSE_TENSOR,
    }
    watched = {"GraphProto", "NodeProto", "TensorProto", "SparseTensorProto", "FunctionProto", "AttributeProto"}
    for message, numbers in followed.items():
        for field in getattr(onnx, message).DESCRIPTOR.fields:
            if field.message_type is not None and field.message_type.name in {*watched, "TrainingInfoProto"}:
                assert field.name in numbers, f"{message}.{field.name}"


def test_contents(bundle_path: Path) -> None:
    contents = read_graph(bundle_path / "model.onnx")
    model = onnx.load(bundle_path / "model.onnx", load_external_data=False)
    assert contents.operators == {("ai.onnx", n.op_type) for n in model.graph.node}
    assert [tensor.tensor for tensor in contents.external] == [t.name for t in model.graph.initializer]
    assert all(tensor.location == "model.onnx.data" for tensor in contents.external)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_damage_makes_it_crash(bundle_path: Path, data: st.DataObject) -> None:
    """Any bytes give what is in them, or a BundleError: the reader never runs past the end, or for ever."""
    raw = bytearray((bundle_path / "model.onnx").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    spoilt = bundle_path / "spoilt.onnx"
    spoilt.write_bytes(raw[: data.draw(st.integers(0, len(raw)))])
    with contextlib.suppress(BundleError):
        read_graph(spoilt)


@pytest.mark.parametrize(
    ("operators", "words"),
    [([], "expected an object"), ({"ai.onnx": "Neg"}, "a list of operators' names"), ({"ai.onnx": [1]}, "a list of")],
)
def test_a_list_that_is_none(document: dict[str, Any], operators: Any, words: str, bundle_path: Path) -> None:
    (bundle_path / "manifest.json").write_text(json.dumps({**document, "operators": operators}), encoding="utf-8")
    with pytest.raises(BundleError, match=f"operators.*{words}"):
        Bundle.open(bundle_path)
