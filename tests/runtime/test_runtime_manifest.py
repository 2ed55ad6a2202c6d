"""The manifest: round trips, and refuses every wrong value by name."""

import json
from functools import reduce
from typing import Any

import pytest

from cosmos_runtime import BundleError, Manifest, Role

MISSING = object()


def step_into(node: Any, part: str) -> Any:
    return node[int(part)] if isinstance(node, list) else node[part]


def spoil(document: dict[str, Any], path: str, value: Any) -> str:
    """Set (or remove) the value at a "/"-separated path; the manifest as text."""
    *parents, last = path.split("/")
    target: Any = reduce(step_into, parents, document)
    if value is MISSING:
        del target[last]
    elif isinstance(target, list):
        target[int(last)] = value
    else:
        target[last] = value
    return json.dumps(document)


def test_round_trip(document: dict[str, Any]) -> None:
    manifest = Manifest.from_json(json.dumps(document))
    text = manifest.to_json()
    assert Manifest.from_json(text) == manifest
    assert Manifest.from_json(text).to_json() == text
    assert json.loads(text) == document


def without_digest(text: str) -> dict[str, Any]:
    """A manifest less its digest, which changes with everything else."""
    values: dict[str, Any] = json.loads(text)
    del values["digest"]
    return values


def test_keys_stand_in_the_documented_order(document: dict[str, Any]) -> None:
    expected = "format format_version name created tool versions source recipe model generation graphs tokenizer files"
    assert list(document) == [*expected.split(), "parity", "capabilities", "graph_format", "operators", "digest"]


def test_text_is_readable_utf8(document: dict[str, Any]) -> None:
    document["name"] = "كوزموس"
    assert "كوزموس" in Manifest.from_json(json.dumps(document)).to_json()


def test_free_form_sections_survive(document: dict[str, Any]) -> None:
    document["recipe"]["notes"] = {"nested": [1, None, 2.5]}
    document["parity"] = None
    document["versions"] = {}
    text = json.dumps(document)
    assert without_digest(Manifest.from_json(text).to_json()) == without_digest(text)


def test_unknown_keys_are_ignored(document: dict[str, Any]) -> None:
    expected = Manifest.from_json(json.dumps(document))
    document["added_later"] = 1
    document["graphs"]["full_sequence"]["added_later"] = 1
    assert Manifest.from_json(json.dumps(document)) == expected


def test_tensors_are_found_by_role(document: dict[str, Any]) -> None:
    graph = Manifest.from_json(json.dumps(document)).graph("full_sequence")
    assert graph.input(Role.TOKENS).name == "some_ids"
    assert graph.output("logits").shape == ("batch", "sequence", 8)
    with pytest.raises(BundleError, match="input of role 'logits', got 0"):
        graph.input(Role.LOGITS)


def test_two_tensors_of_one_role_are_ambiguous(document: dict[str, Any]) -> None:
    outputs = document["graphs"]["full_sequence"]["outputs"]
    outputs.append({**outputs[0], "name": "other"})
    with pytest.raises(BundleError, match="got 2"):
        Manifest.from_json(json.dumps(document)).graph("full_sequence").output(Role.LOGITS)


def test_missing_graph_names_those_there_are(document: dict[str, Any]) -> None:
    with pytest.raises(BundleError, match="'decode', got full_sequence"):
        Manifest.from_json(json.dumps(document)).graph("decode")


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        ("format", "other", "format: expected 'cosmos-bundle'"),
        ("format", MISSING, "format: missing"),
        ("format_version", 3, "pip install --upgrade"),
        ("format_version", 0, "format_version: expected an integer"),
        ("format_version", True, "format_version: expected an integer"),
        ("format_version", "1", "format_version: expected an integer"),
        ("name", "", "name: expected a non-empty string"),
        ("name", None, "name:"),
        ("created", "yesterday", "created: expected an ISO 8601 time"),
        ("tool", [], "tool: expected an object"),
        ("tool/version", MISSING, "tool.version: missing"),
        ("versions/onnx", 1.2, "versions.onnx: expected a string"),
        ("source/kind", "magic", "source.kind: expected 'checkpoint' or 'preset'"),
        ("recipe/precision", 32, "recipe.precision:"),
        ("model/vocab_size", 0, "model.vocab_size: expected an integer, at least 1"),
        ("model/vocab_size", 8.0, "model.vocab_size:"),
        ("model/max_sequence_length", -1, "model.max_sequence_length:"),
        ("model/causal", 1, "model.causal: expected true or false"),
        ("model/parameters", -1, "model.parameters:"),
        ("generation", None, "generation: expected an object"),
        ("graphs", {}, "graphs: expected at least one graph"),
        ("graphs/full_sequence", "model.onnx", "graphs.full_sequence: expected an object"),
        ("graphs/full_sequence/file", "other.onnx", "graphs.full_sequence.file: 'other.onnx' is not listed"),
        ("graphs/full_sequence/opset", "20", "graphs.full_sequence.opset:"),
        ("graphs/full_sequence/inputs", [], "graphs.full_sequence.inputs: expected a non-empty list"),
        ("graphs/full_sequence/inputs/0", None, "graphs.full_sequence.inputs: expected a non-empty list of objects"),
        ("graphs/full_sequence/inputs/0/dtype", "long", "graphs.full_sequence.inputs[0].dtype: expected one of bool"),
        ("graphs/full_sequence/inputs/0/role", MISSING, "graphs.full_sequence.inputs[0].role: missing"),
        ("graphs/full_sequence/inputs/0/shape", "bt", "graphs.full_sequence.inputs[0].shape:"),
        ("graphs/full_sequence/inputs/0/shape", [-1], "graphs.full_sequence.inputs[0].shape:"),
        ("graphs/full_sequence/inputs/0/shape", [None], "graphs.full_sequence.inputs[0].shape:"),
        ("graphs/full_sequence/inputs/0/shape", [True], "graphs.full_sequence.inputs[0].shape:"),
        ("graphs/full_sequence/inputs/0/shape", [""], "graphs.full_sequence.inputs[0].shape:"),
        ("tokenizer", "missing.json", "tokenizer: 'missing.json' is not listed"),
        ("tokenizer", 3, "tokenizer: expected a plain relative file name"),
        ("tokenizer", MISSING, "tokenizer: missing"),
        ("files/model.onnx", {"size": 3}, "files.model.onnx.sha256: missing"),
        ("files/model.onnx/size", -1, "files.model.onnx.size:"),
        ("files/model.onnx/sha256", "0" * 63, "files.model.onnx.sha256: expected 64"),
        ("files/model.onnx/sha256", "G" * 64, "files.model.onnx.sha256:"),
        ("files/manifest.json", {"size": 1, "sha256": "0" * 64}, "files.manifest.json: expected every file except"),
        ("parity", {}, "parity.passed: missing"),
        ("parity", False, "parity: expected an object"),
    ],
)
def test_wrong_value_is_named(document: dict[str, Any], path: str, value: Any, named: str) -> None:
    with pytest.raises(BundleError) as caught:
        Manifest.from_json(spoil(document, path, value))
    assert str(caught.value).startswith("manifest.json: ")
    assert named in str(caught.value)


@pytest.mark.parametrize(
    "name",
    [
        "/etc/passwd",
        "../x",
        "a/../b",
        "a/..",
        "..",
        ".",
        "./x",
        "a//b",
        "a/",
        "",
        "C:x",
        "a\\b",
        "x\x00",
        "x\n",
    ],
)
def test_names_that_leave_the_folder_are_refused(document: dict[str, Any], name: str) -> None:
    document["files"][name] = {"size": 1, "sha256": "0" * 64}
    with pytest.raises(BundleError, match="expected a plain relative file name"):
        Manifest.from_json(json.dumps(document))


@pytest.mark.parametrize("name", ["a/b.onnx", "..x", "...", ".hidden", "a b", "نموذج.onnx"])
def test_plain_names_are_accepted(document: dict[str, Any], name: str) -> None:
    document["files"][name] = {"size": 1, "sha256": "0" * 64}
    assert name in Manifest.from_json(json.dumps(document)).files


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '{"a": NaN}', '{"a": 1, "a": 2}', "[" * 100_000, '{"a": ' + "1" * 5000 + "}"],
    ids=["empty", "cut", "list", "null", "nan", "duplicate", "deep", "long-number"],
)
def test_what_is_not_a_json_object_is_refused(text: str) -> None:
    with pytest.raises(BundleError, match=r"^manifest\.json: "):
        Manifest.from_json(text)


@pytest.mark.parametrize("value", [float("nan"), {1, 2}], ids=["nan", "set"])
def test_what_json_cannot_hold_is_not_written(document: dict[str, Any], value: Any) -> None:
    manifest = Manifest.from_json(json.dumps(document))
    manifest.recipe["x"] = value  # type: ignore[index]
    with pytest.raises(BundleError, match="cannot be written"):
        manifest.to_json()


def test_an_invalid_manifest_is_not_written(document: dict[str, Any]) -> None:
    manifest = Manifest.from_json(json.dumps(document))
    manifest.files.clear()  # type: ignore[attr-defined]
    with pytest.raises(BundleError, match="not listed"):
        manifest.to_json()
