"""What the runtime checks of bundles with capability heads, before it runs them."""

from typing import Any

import numpy as np
import pytest

from cosmos_runtime import BundleError, CosmosRuntimeError, FileEntry, GraphSpec, InputError, Manifest, Role, TensorSpec
from cosmos_runtime.cache import KeyValueCache
from cosmos_runtime.device_stream import HostStream
from cosmos_runtime.head_signature import check_heads
from cosmos_runtime.heads import MemoryBank, memory_slots
from cosmos_runtime.validation import finite_array

from .tiny_bundles import make_manifest
from .tiny_decoders import DECODER

SETTINGS = {
    "memory": {"episodes": True},
    "safety": {"level": "high", "checks": ["adversarial_defense"]},
}
HEADS = {"names": ["memory", "safety"], "settings": SETTINGS, "memory": {"size": 2048, "least": 5}}
SCORES = {
    "memory.calls": "int64",
    "safety.confidence": "float32",
    "safety.factuality": "float32",
    "safety.attack": "float32",
    "safety.is_safe": "bool",
    "output_blocked": "bool",
}
BANK = ("b", "m", 8)


def manifest(**changes: Any) -> Manifest:
    files = {name: FileEntry(1, "0" * 64) for name in ("model.onnx", "g.onnx")}
    made = make_manifest(files, 7, graphs={"full_sequence": graph()}, capabilities={**HEADS, **changes})
    return Manifest.from_json(made.to_json())


def _logits() -> TensorSpec:
    return TensorSpec("logits", "logits", "float32", ("b", "t", 7))


def graph(*more: TensorSpec, without: str = "") -> GraphSpec:
    """A full-sequence graph of a model with memory and safety."""
    inputs = [
        TensorSpec("ids", Role.TOKENS, "int64", ("b", "t")),
        TensorSpec("keys", Role.PAST_MEMORY_KEYS, "float32", BANK),
        TensorSpec("values", Role.PAST_MEMORY_VALUES, "float32", BANK),
        TensorSpec("calls", Role.MEMORY_CALLS, "int64", ("b",)),
    ]
    outputs = [
        _logits(),
        TensorSpec("new keys", Role.PRESENT_MEMORY_KEYS, "float32", BANK),
        TensorSpec("new values", Role.PRESENT_MEMORY_VALUES, "float32", BANK),
        *(TensorSpec(name, Role.SCORE, dtype, ("b",)) for name, dtype in SCORES.items()),
    ]
    kept = [tensor for tensor in outputs if tensor.name != without]
    return GraphSpec("g.onnx", 20, tuple(inputs), (*kept, *more))


def test_a_graph_that_has_what_its_capabilities_call_for_is_accepted() -> None:
    check_heads(graph(), manifest())


def test_a_missing_score_is_named() -> None:
    with pytest.raises(BundleError, match=r"score 'safety\.attack': .* the graph gives None"):
        check_heads(graph(without="safety.attack"), manifest())


def test_a_score_that_nobody_calls_for_is_named() -> None:
    more = TensorSpec("safety.pii", Role.SCORE, "float32", ("b", 10))
    with pytest.raises(BundleError, match=r"score 'safety\.pii': the capabilities call for None"):
        check_heads(graph(more), manifest())


def test_a_score_of_another_type_is_named() -> None:
    wrong = TensorSpec("safety.is_safe", Role.SCORE, "float32", ("b",))
    with pytest.raises(BundleError, match=r"safety\.is_safe"):
        check_heads(graph(wrong, without="safety.is_safe"), manifest())


def test_state_that_does_not_come_out_is_refused() -> None:
    with pytest.raises(BundleError, match="both 'past_memory_keys' and 'present_memory_keys'"):
        check_heads(graph(without="new keys"), manifest())


def test_state_that_comes_out_otherwise_is_refused() -> None:
    wrong = TensorSpec("new keys", Role.PRESENT_MEMORY_KEYS, "float16", BANK)
    with pytest.raises(BundleError, match="expected the type and shape of keys"):
        check_heads(graph(wrong, without="new keys"), manifest())


def test_state_without_capabilities_is_refused() -> None:
    plain = make_manifest({"g.onnx": FileEntry(1, "0" * 64)}, 7, graphs={"full_sequence": graph()})
    scoreless = GraphSpec("g.onnx", 20, graph().inputs, graph().outputs[:3])
    with pytest.raises(BundleError, match="the manifest has no capabilities"):
        check_heads(scoreless, plain)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"names": ["memory"]}, r"capabilities\.names: expected those of the settings"),
        ({"names": ["memory", "planning"], "settings": {"memory": {}, "planning": {}}}, r"capabilities\.names"),
        ({"names": "memory"}, r"capabilities\.names"),
        ({"settings": None}, r"capabilities\.settings: expected an object"),
        ({"memory": {"size": 3, "least": 5}}, r"capabilities\.memory\.size: expected an integer, at least 5"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(BundleError, match=words):
        manifest(**changes)


def test_a_memory_has_as_many_slots_as_calls_within_its_bounds() -> None:
    found = manifest()
    assert [memory_slots(found, calls) for calls in (1, 5, 6, 2048, 5000)] == [5, 5, 6, 2048, 2048]
    assert memory_slots(found) == 2048
    assert memory_slots(manifest(memory=None)) == 0


# Memory that a caller gives


def bank(batch: int = 2, calls: int | None = 6) -> MemoryBank:
    return MemoryBank(graph(), manifest(), batch, calls, HostStream())


def kept(**changes: Any) -> dict[str, Any]:
    return {"keys": np.ones((2, 6, 8), np.float32), "values": np.ones((2, 6, 8)).tolist(), "calls": 6, **changes}


def with_one(value: float) -> np.ndarray:
    array = np.ones((2, 6, 8))
    array[1, 2, 3] = value
    return array


class Unwilling:
    def __array__(self, *_: object, **__: object) -> np.ndarray:
        raise RuntimeError("not today")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"keys": np.ones((2, 5, 8))},
            r"keys: expected float32 of shape \(2, 6, 8\), got .* of shape \(2, 5, 8\)",
        ),
        ({"values": np.ones((1, 6, 8))}, r"values: expected float32 of shape"),
        ({"keys": "ones"}, "keys: expected float32 of shape .*, got <U4"),
        ({"keys": None}, "keys: expected float32 of shape .*, got object"),
        ({"keys": [[1.0], [1.0, 2.0]]}, "keys: expected an array of shape"),
        ({"keys": np.ones((2, 6, 8), complex)}, "keys: .*got complex128"),
        ({"values": Unwilling()}, "values: expected an array of shape .*: not today"),
        ({"values": with_one(np.nan)}, r"values\[1, 2, 3\]: expected a finite float32, got nan"),
        ({"keys": with_one(-np.inf)}, r"keys\[1, 2, 3\]: expected a finite float32, got -inf"),
        ({"keys": with_one(1e300)}, r"keys\[1, 2, 3\]: expected a finite float32, got 1e\+300"),
        ({"calls": -1}, "calls: expected an integer, 0 or more, got -1"),
        ({"calls": 2.0}, "calls: expected an integer, 0 or more, got 2.0"),
        ({"calls": [1, 2]}, "calls: expected an integer"),
        ({"calls": 2**80}, "calls: expected at most"),
    ],
)
def test_a_memory_that_does_not_fit_is_refused_whole(changes: dict[str, Any], words: str) -> None:
    memory = bank()
    with pytest.raises(InputError, match=f"restore: {words}"):
        memory.restore(**kept(**changes))
    assert memory.calls.tolist() == [0, 0]


def test_a_memory_that_was_kept_is_put_in() -> None:
    memory = bank()
    memory.restore(**kept(calls=np.int32(9)))
    assert memory.calls.tolist() == [9, 9]


def test_a_model_without_memory_has_nothing_to_put_in() -> None:
    stateless = GraphSpec("g.onnx", 20, graph().inputs[:1], graph().outputs[:1])
    with pytest.raises(InputError, match="restore: expected a model with the memory capability"):
        MemoryBank(stateless, manifest(memory=None), 2, None, HostStream()).restore(**kept())


def test_numbers_of_a_type_that_numpy_has_not() -> None:
    """As bfloat16 is, unless another package teaches it to numpy."""
    with pytest.raises(
        InputError, match="keys: cannot be given: this bundle keeps them as float7, which numpy has not"
    ):
        finite_array("keys", [1.0], (1,), "float7")


@pytest.mark.parametrize("batch", [10**12, 2**70])
def test_more_rows_than_the_machine_has_memory(batch: int) -> None:
    with pytest.raises(CosmosRuntimeError, match="a memory of .* rows: .* bytes are wanted, and this machine has"):
        bank(batch)
    with pytest.raises(CosmosRuntimeError, match="a cache of .* tokens: .* bytes are wanted, and this machine has"):
        KeyValueCache(DECODER, batch, 96)
