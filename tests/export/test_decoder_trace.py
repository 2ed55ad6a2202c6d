"""The decoder graph of every recipe: its signature, and the same logits however the tokens are handed over."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx.reference import ReferenceEvaluator

from cosmos_export.checkpoint import Checkpoint
from cosmos_export.config import CosmosAdvancedConfig
from cosmos_export.errors import CosmosExportError, RecipeError
from cosmos_export.model.loading import load_decoder, random_checkpoint
from cosmos_export.onnx.quantize import Quantization
from cosmos_export.onnx.signature import graph_spec
from cosmos_export.parity.arithmetic import float32_activations
from cosmos_export.parity.verify import Effort
from cosmos_export.pipeline import export_bundle
from cosmos_export.progress import Silent
from cosmos_export.recipe import ExportRecipe
from cosmos_export.resources import recipe_names
from cosmos_runtime import DECODER, DEVICE_LOOP, Bundle

MakeConfig = Callable[..., CosmosAdvancedConfig]


def _is_here(recipe: ExportRecipe) -> bool:
    """Those of half precision, and told lengths instead of a mask, are in test_half_precision and test_device_loop."""
    return DECODER in recipe.graphs and DEVICE_LOOP not in recipe.graphs and recipe.activations == "float32"


DECODERS = [name for name in recipe_names("onnx") if _is_here(ExportRecipe.load(name))]
# One that is not offered: zero points, of an odd number of blocks.
ASYMMETRIC = "4 bits, asymmetric"
EMBEDDING = "tok_embeddings.weight"

Cache = list[np.ndarray]


class Notes(Silent):
    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)


class Decoder:
    """A recipe's decoder graph with float32 activations, fed by hand; and the eager model that it must equal."""

    def __init__(self, folder: Path, recipe: ExportRecipe, checkpoint: Checkpoint) -> None:
        notes = Notes()
        export_bundle(checkpoint, folder, recipe, effort=Effort.OFF, progress=notes)
        self.said = notes.said
        self.folder, self.recipe, self.checkpoint = folder, recipe, checkpoint
        self.config = checkpoint.config
        self.spec = Bundle.open(folder).manifest.graph(DECODER)
        self.path = folder / self.spec.file
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        with float32_activations(folder) as copy:
            self.session = ort.InferenceSession(copy / self.spec.file, options, providers=["CPUExecutionProvider"])
        self.eager = load_decoder(recipe.as_computed(checkpoint))
        self.past = [t.name for t in self.spec.inputs if t.role.startswith("past")]

    def cache(self, batch: int, length: int = 24, fill: float = 0.0) -> Cache:
        shape = (batch, self.config.n_kv_heads, length, self.config.head_dim)
        return [np.full(shape, fill, np.float32) for _ in self.past]

    def step(
        self, ids: np.ndarray, cache: Cache, mask: np.ndarray | None = None, offsets: list[int] | None = None
    ) -> tuple[np.ndarray, Cache]:
        """Logits and the cache after `ids`; `offsets` None leaves that input out."""
        feeds = {"input_ids": ids, "attention_mask": mask, **dict(zip(self.past, cache, strict=True))}
        if offsets is not None:
            feeds["logit_offsets"] = np.array(offsets)
        logits, *after = self.session.run(None, feeds)
        return logits, after

    def append(self, ids: np.ndarray, before: int, cache: Cache) -> tuple[np.ndarray, Cache]:
        """Logits (B, T, V) of rows of equal length on top of `before` tokens."""
        batch, length = ids.shape
        return self.step(ids, cache, np.ones((batch, before + length), np.int64), list(range(length))[::-1])

    @torch.inference_mode()
    def expected(self, ids: np.ndarray) -> np.ndarray:
        return self.eager(torch.from_numpy(ids)).numpy()


def recipe_called(name: str) -> ExportRecipe:
    if name != ASYMMETRIC:
        return replace(ExportRecipe.load(name), calibration=None)
    form = Quantization(bits=4, block_size=32, symmetric=False, accuracy_level=4)
    return replace(recipe_called("cpu-int4"), quantization=form)


@pytest.fixture(scope="module")
def decoders(wide_checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Decoder]:
    """The decoder of a recipe, exported when it is first asked for."""
    folder = tmp_path_factory.mktemp("decoders")
    made: dict[str, Decoder] = {}

    def decoder(name: str) -> Decoder:
        if name not in made:
            made[name] = Decoder(folder / name, recipe_called(name), wide_checkpoint)
        return made[name]

    return decoder


@pytest.fixture(params=[*DECODERS, ASYMMETRIC])
def decoder(request: Any, decoders: Callable[[str], Decoder]) -> Decoder:
    return decoders(request.param)


@pytest.fixture
def fp32(decoders: Callable[[str], Decoder]) -> Decoder:
    return decoders("cpu-fp32")


@pytest.fixture(scope="module")
def ids() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 96, (1, 20))


def assert_equal(actual: np.ndarray, expected: np.ndarray) -> None:
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * np.ptp(expected))


# What the graph is


def declared(value: onnx.ValueInfoProto) -> tuple[str, str, tuple[int | str, ...]]:
    tensor = value.type.tensor_type
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name
    return value.name, dtype, tuple(dim.dim_param or dim.dim_value for dim in tensor.shape.dim)


def test_inputs_outputs_and_axes_are_those_of_the_signature(decoder: Decoder) -> None:
    graph = onnx.load(decoder.path, load_external_data=False).graph
    spec = graph_spec(DECODER, decoder.config, decoder.recipe.opset)
    assert spec == decoder.spec
    assert [declared(value) for value in graph.input] == [(t.name, t.dtype, t.shape) for t in spec.inputs]
    assert [declared(value) for value in graph.output] == [(t.name, t.dtype, t.shape) for t in spec.outputs]
    layers = range(decoder.config.n_layers)
    assert decoder.past == [f"past_key_values.{layer}.{part}" for layer in layers for part in ("key", "value")]


def test_operators_are_those_of_the_dialect(decoder: Decoder) -> None:
    model = onnx.load(decoder.path, load_external_data=False)
    used = [node.op_type for node in model.graph.node if node.domain == "com.microsoft"]
    domains = {node.domain for node in model.graph.node}
    assert {entry.domain for entry in model.opset_import} == domains
    assert not model.functions
    if decoder.recipe.dialect == "portable":
        assert domains == {""}
        return
    quantised = decoder.recipe.quantization is not None
    layers = decoder.config.n_layers
    assert domains == {"", "com.microsoft"}
    assert used.count("GroupQueryAttention") == layers
    # Each norm but the first has a sum before it; qkv, o, w1 and w3, w2 of a layer, and the output projection.
    assert used.count("SkipSimplifiedLayerNormalization") == 2 * layers
    assert used.count("MatMulNBits") == (4 * layers + 1 if quantised else 0)
    assert used.count("GatherBlockQuantized") == (1 if quantised else 0)
    assert sum(node.op_type == "MatMul" for node in model.graph.node) == (0 if quantised else 4 * layers)


def test_the_checker_is_content_with_standard_operators(decoders: Callable[[str], Decoder]) -> None:
    onnx.checker.check_model(decoders("portable-fp32").path, full_check=True)


def test_standard_operators_run_in_the_reference_evaluator(decoders: Callable[[str], Decoder], ids: np.ndarray) -> None:
    """onnx's own implementation of the operators, in numpy: a runtime that is none of ours."""
    decoder = decoders("portable-fp32")
    evaluator = ReferenceEvaluator(onnx.load(decoder.path))
    last = {"logit_offsets": np.array([0])}
    feeds = {"input_ids": ids[:, :6], "attention_mask": np.ones((1, 6), np.int64), **last}
    prefill, *cache = evaluator.run(None, feeds | dict(zip(decoder.past, decoder.cache(1), strict=True)))
    feeds = {"input_ids": ids[:, 6:7], "attention_mask": np.ones((1, 7), np.int64), **last}
    decode, *_ = evaluator.run(None, feeds | dict(zip(decoder.past, cache, strict=True)))
    assert_equal(np.concatenate([prefill, decode], axis=1), decoder.expected(ids[:, :7])[:, 5:])


def test_no_two_nodes_share_a_name_and_none_shows_the_build_machine(decoder: Decoder) -> None:
    names = [node.name for node in onnx.load(decoder.path, load_external_data=False).graph.node]
    assert len(set(names)) == len(names)
    content = decoder.path.read_bytes()
    assert [text for text in (".py", "stack_trace", "pkg.torch", str(decoder.folder)) if text.encode() in content] == []


def test_weights_are_stored_once_in_their_form(decoder: Decoder) -> None:
    """Counted in bytes: nothing but the matrices in few bits, scales, zero points, norms and rotary tables."""
    graph = onnx.load(decoder.path).graph
    arrays = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
    expected = 2 * decoder.config.max_sequence_length * decoder.config.head_dim // 2 * 4
    for name in decoder.checkpoint.names:
        tensor, form = decoder.checkpoint.tensor(name), decoder.recipe.form_of(name)
        if form is None:
            expected += 4 * tensor.numel()
            continue
        rows, blocks = tensor.shape[0], -(-tensor.shape[1] // form.block_size)
        zeros = 0 if form.symmetric else -(-blocks * form.bits // 8)
        expected += rows * (blocks * (form.block_size * form.bits // 8 + 4) + zeros)
    assert sum(array.nbytes for name, array in arrays.items() if "." in name and array.dtype != np.int64) == expected


def test_the_tied_embedding_is_one_table_with_two_readers(decoder: Decoder) -> None:
    graph = onnx.load(decoder.path, load_external_data=False).graph
    holders = [t.name for t in graph.initializer if t.name.startswith(EMBEDDING)]
    form = decoder.recipe.form_of(EMBEDDING)
    assert holders == ([EMBEDDING] if form is None else [f"{EMBEDDING}.blocks", f"{EMBEDDING}.scales"])
    readers = [node.op_type for node in graph.node if holders[0] in node.input]
    assert sorted(readers) == (["Gather", "Gemm"] if form is None else ["GatherBlockQuantized", "MatMulNBits"])


# What the graph computes


def test_a_prefill_is_the_model(decoder: Decoder) -> None:
    draw = np.random.default_rng(1)
    for batch, length in ((1, 1), (1, 64), (3, 7), (2, 33)):
        ids = draw.integers(0, 96, (batch, length))
        logits, _ = decoder.append(ids, 0, decoder.cache(batch, 64))
        assert_equal(logits, decoder.expected(ids))


@pytest.mark.parametrize("sizes", [[8] + [1] * 12, [1] * 20, [5, 1, 9, 2, 3], [2, 18]], ids=str)
def test_any_pieces_are_the_model(decoder: Decoder, ids: np.ndarray, sizes: list[int]) -> None:
    cache, parts, before = decoder.cache(1), [], 0
    for size in sizes:
        logits, cache = decoder.append(ids[:, before : before + size], before, cache)
        parts.append(logits)
        before += size
    assert_equal(np.concatenate(parts, axis=1), decoder.expected(ids))


def test_a_batch_decodes_in_step(decoder: Decoder) -> None:
    rows = np.random.default_rng(2).integers(0, 96, (3, 9))
    logits, cache = decoder.append(rows[:, :6], 0, decoder.cache(3))
    parts = [logits]
    for i in range(6, 9):
        logits, cache = decoder.append(rows[:, i : i + 1], i, cache)
        parts.append(logits)
    assert_equal(np.concatenate(parts, axis=1), decoder.expected(rows))


def test_only_the_last_position_is_the_default(decoder: Decoder, ids: np.ndarray) -> None:
    expected = decoder.expected(ids)
    mask = np.ones((1, 20), np.int64)
    logits, _ = decoder.step(ids, decoder.cache(1), mask)
    assert_equal(logits, expected[:, -1:])
    logits, _ = decoder.step(ids, decoder.cache(1), mask, [0, 19, 4, 4])
    assert_equal(logits, expected[:, [19, 0, 15, 15]])


LENGTHS = [5, 9, 1, 8]


@pytest.fixture(scope="module")
def ragged() -> list[np.ndarray]:
    """Rows of `LENGTHS` tokens, and three more each."""
    draw = np.random.default_rng(3)
    return [draw.integers(0, 96, length + 3) for length in LENGTHS]


def masked(lengths: list[int]) -> np.ndarray:
    return (np.arange(max(lengths)) < np.array(lengths)[:, None]).astype(np.int64)


@pytest.mark.parametrize("padding", [0, 95])
def test_rows_of_unequal_length_are_each_as_if_alone(decoder: Decoder, ragged: list[np.ndarray], padding: int) -> None:
    """Padded on the right for the prefill, then three steps, each row at positions of its own."""
    prompts = np.full((len(LENGTHS), max(LENGTHS)), padding)
    for row, (tokens, length) in enumerate(zip(ragged, LENGTHS, strict=True)):
        prompts[row, :length] = tokens[:length]
    logits, cache = decoder.step(prompts, decoder.cache(len(LENGTHS)), masked(LENGTHS))
    steps = [logits]
    for i in range(3):
        tokens = np.array([[row[length + i]] for row, length in zip(ragged, LENGTHS, strict=True)])
        logits, cache = decoder.step(tokens, cache, masked([length + i + 1 for length in LENGTHS]))
        steps.append(logits)
    for row, (tokens, length) in enumerate(zip(ragged, LENGTHS, strict=True)):
        actual = np.concatenate([step[row] for step in steps])
        assert_equal(actual, decoder.expected(tokens[None])[0, length - 1 :])


def test_what_lies_in_the_cache_beyond_the_tokens_does_not_matter(decoder: Decoder, ids: np.ndarray) -> None:
    """A buffer that served another request; and it is left as it is, so that rewinding costs nothing."""
    first, cache = decoder.append(ids[:, :12], 0, decoder.cache(1, fill=7e3))
    second, cache = decoder.append(ids[:, 12:], 12, cache)
    assert_equal(np.concatenate([first, second], axis=1), decoder.expected(ids))
    again, _ = decoder.append(ids[:, 4:10], 4, cache)
    assert_equal(again, decoder.expected(ids)[:, 4:10])


@pytest.mark.parametrize("length", [20, 64])
def test_the_cache_may_be_of_any_length_that_holds_the_tokens(decoder: Decoder, ids: np.ndarray, length: int) -> None:
    logits, cache = decoder.append(ids, 0, decoder.cache(1, length))
    assert {part.shape for part in cache} == {(1, 2, length, 16)}
    assert_equal(logits, decoder.expected(ids))


@pytest.mark.parametrize("name", ["cpu-fp32", "cpu-int4"])
def test_past_and_present_may_be_one_buffer(name: str, decoders: Callable[[str], Decoder], ids: np.ndarray) -> None:
    decoder = decoders(name)
    buffers = [ort.OrtValue.ortvalue_from_numpy(part, "cpu", 0) for part in decoder.cache(1)]
    binding = decoder.session.io_binding()
    for tensor, buffer in zip(decoder.past, buffers, strict=True):
        binding.bind_ortvalue_input(tensor, buffer)
        binding.bind_ortvalue_output(tensor.replace("past_key_values", "present"), buffer)
    parts = []
    for start, stop in ((0, 8), *((i, i + 1) for i in range(8, 20))):
        feeds = {
            "input_ids": ids[:, start:stop],
            "attention_mask": np.ones((1, stop), np.int64),
            "logit_offsets": np.arange(stop - start)[::-1],
        }
        for tensor, array in feeds.items():
            value = ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array), "cpu", 0)
            binding.bind_ortvalue_input(tensor, value)
        binding.bind_output("logits", "cpu")  # anew, because its shape changes
        decoder.session.run_with_iobinding(binding)
        parts.append(binding.get_outputs()[len(buffers)].numpy())
    assert_equal(np.concatenate(parts, axis=1), decoder.expected(ids))
    _, cache = decoder.append(ids, 0, decoder.cache(1))
    for buffer, part in zip(buffers, cache, strict=True):
        np.testing.assert_allclose(buffer.numpy()[:, :, :20], part[:, :, :20], rtol=0, atol=1e-5 * np.abs(part).max())


# What it cannot be made of


def test_a_model_without_causal_mask_is_refused_before_anything_is_written(fp32: Decoder, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"cpu-fp32.*causal"):
        export_bundle(fp32.checkpoint, tmp_path / "bundle", fp32.recipe, causal=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "changes"),
    [("cpu-fp32", {"head_dim": 8}), ("cpu-int4", {"head_dim": 24, "n_heads": 3, "n_kv_heads": 1, "n_layers": 1})],
)
def test_heads_that_the_fused_attention_refuses_are_exported_in_standard_operators(
    name: str, changes: Mapping[str, int], make_config: MakeConfig, tmp_path: Path, ids: np.ndarray
) -> None:
    checkpoint = random_checkpoint(make_config(dim=64, hidden_dim=80, **changes), name="tiny")
    decoder = Decoder(tmp_path / "bundle", ExportRecipe.load(name), checkpoint)
    assert f"head_dim {changes['head_dim']}" in " ".join(decoder.said)
    used = {node.op_type for node in onnx.load(decoder.path, load_external_data=False).graph.node}
    assert "GroupQueryAttention" not in used
    first, cache = decoder.append(ids[:, :12], 0, decoder.cache(1))
    second, cache = decoder.append(ids[:, 12:19], 12, cache)
    third, _ = decoder.append(ids[:, 19:], 19, cache)
    assert_equal(np.concatenate([first, second, third], axis=1), decoder.expected(ids))


def test_heads_that_it_takes_need_no_note(decoder: Decoder) -> None:
    assert decoder.said == []


def test_a_model_of_one_position_has_no_use_for_a_cache(make_config: MakeConfig, tmp_path: Path) -> None:
    checkpoint = random_checkpoint(make_config(max_sequence_length=1), name="tiny")
    with pytest.raises(CosmosExportError, match="max_sequence_length"):
        export_bundle(checkpoint, tmp_path / "bundle", ExportRecipe.load("cpu-fp32"), effort=Effort.OFF)
