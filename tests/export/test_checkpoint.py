"""Checkpoint folders: every form gives the same tensors, and every wrong one is refused by name."""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cosmos_export.checkpoint import Checkpoint, StoredTensor, save_checkpoint
from cosmos_export.config import CosmosAdvancedConfig
from cosmos_export.errors import CheckpointError, ConfigError
from cosmos_export.model.loading import load_decoder, random_checkpoint
from cosmos_export.onnx.passes import run_passes
from cosmos_export.onnx.weights import attach_weights
from cosmos_export.recipe import ExportRecipe

EMBEDDING, OUTPUT = "tok_embeddings.weight", "output.weight"
Q_PROJ = "layers.0.attention.q_proj.weight"
FP32 = ExportRecipe.load("fp32")

State = dict[str, Tensor]


def write_pickle(folder: Path, state: Any) -> None:
    torch.save(state, folder / "pytorch_model.bin")


def write_safetensors(folder: Path, state: Mapping[str, Tensor]) -> None:
    # clones: safetensors refuses names that share their bytes
    save_file({name: tensor.clone() for name, tensor in state.items()}, folder / "model.safetensors")


def write_shards(folder: Path, state: Mapping[str, Tensor], **changes: str) -> None:
    """Two shards, names alternating, and their index; `changes` replace entries of the index."""
    shards: dict[str, State] = {"model-1.safetensors": {}, "model-2.safetensors": {}}
    weight_map = {name: sorted(shards)[i % 2] for i, name in enumerate(state)}
    for name, shard in weight_map.items():
        shards[shard][name] = state[name].clone()
    for shard, tensors in shards.items():
        save_file(tensors, folder / shard)
    write_index(folder, {"weight_map": weight_map | changes})


def write_index(folder: Path, index: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


WRITERS = pytest.mark.parametrize("write", [write_pickle, write_safetensors, write_shards])


def assert_equal(checkpoint: Checkpoint, state: Mapping[str, Tensor]) -> None:
    assert set(checkpoint.names) == set(state)
    for name, tensor in state.items():
        assert checkpoint.tensor(name).dtype == tensor.dtype
        assert torch.equal(checkpoint.tensor(name), tensor), name
        assert checkpoint.stored[name].shape == tuple(tensor.shape)
        assert checkpoint.stored[name].dtype == tensor.dtype


@WRITERS
def test_every_form_gives_equal_tensors(folder: Path, state: State, write: Callable[[Path, State], None]) -> None:
    write(folder, state)
    checkpoint = Checkpoint.open(folder)
    assert_equal(checkpoint, state)
    assert checkpoint.config == CosmosAdvancedConfig.from_file(folder / "config.json")
    assert checkpoint.origin["location"] == str(folder)


def test_safetensors_are_preferred_to_a_pickle(folder: Path, state: State) -> None:
    write_safetensors(folder, state)
    write_pickle(folder, {name: tensor + 1 for name, tensor in state.items()})
    assert_equal(Checkpoint.open(folder), state)


def test_saved_checkpoints_open(tmp_path: Path, tiny_config: CosmosAdvancedConfig, state: State) -> None:
    tokenizer = tmp_path / "mine.json"
    tokenizer.write_text("{}")
    target = tmp_path / "a" / "checkpoint"
    save_checkpoint(target, tiny_config, {**state, OUTPUT: state[EMBEDDING]}, tokenizer)
    checkpoint = Checkpoint.open(target)
    assert_equal(checkpoint, state)
    assert checkpoint.config == tiny_config
    assert checkpoint.tokenizer == target / "tokenizer.json"
    info = json.loads((target / "model_info.json").read_text())
    assert info["total_parameters"] == sum(tensor.numel() for tensor in state.values())


def test_saving_keeps_an_embedding_that_has_only_its_other_name(
    tmp_path: Path, tiny_config: CosmosAdvancedConfig, state: State
) -> None:
    save_checkpoint(tmp_path, tiny_config, {**without(state, EMBEDDING), OUTPUT: state[EMBEDDING]})
    assert torch.equal(load_file(tmp_path / "model.safetensors")[EMBEDDING], state[EMBEDDING])


def test_a_checkpoint_without_a_tokenizer_has_none(folder: Path, state: State) -> None:
    write_safetensors(folder, state)
    assert Checkpoint.open(folder).tokenizer is None


def without(state: Mapping[str, Tensor], *names: str) -> State:
    return {name: tensor for name, tensor in state.items() if name not in names}


@WRITERS
@pytest.mark.parametrize("names", [(EMBEDDING,), (OUTPUT,), (EMBEDDING, OUTPUT), (OUTPUT, EMBEDDING)], ids="+".join)
def test_the_tied_embedding_is_one_tensor_under_either_name(
    folder: Path, state: State, write: Callable[[Path, State], None], names: tuple[str, ...]
) -> None:
    write(folder, {**dict.fromkeys(names, state[EMBEDDING]), **without(state, EMBEDDING)})
    assert_equal(Checkpoint.open(folder), state)


@WRITERS
def test_equal_copies_of_the_tied_embedding_are_one(
    folder: Path, state: State, write: Callable[[Path, State], None]
) -> None:
    write(folder, {**state, OUTPUT: state[EMBEDDING].clone()})
    assert_equal(Checkpoint.open(folder), state)


@WRITERS
@pytest.mark.parametrize("other", [lambda t: t + 1e-6, lambda t: t[:-1]], ids=["values", "shape"])
def test_an_untied_output_is_refused(
    folder: Path, state: State, write: Callable[[Path, State], None], other: Callable[[Tensor], Tensor]
) -> None:
    write(folder, {**state, OUTPUT: other(state[EMBEDDING]).contiguous()})
    with pytest.raises(CheckpointError, match=f"{OUTPUT} differs from {EMBEDDING}"):
        Checkpoint.open(folder)


@WRITERS
def test_tensors_that_do_not_fit_are_all_listed(
    folder: Path, state: State, write: Callable[[Path, State], None]
) -> None:
    write(
        folder,
        {
            **without(state, "norm.weight"),
            Q_PROJ: state[Q_PROJ].T.contiguous(),
            "layers.1.norm1.weight": torch.ones(32, dtype=torch.int32),
        },
    )
    with pytest.raises(CheckpointError) as caught:
        load_decoder(Checkpoint.open(folder))
    message = str(caught.value)
    assert "norm.weight is missing" in message
    assert f"{Q_PROJ} has shape (32, 64), expected (64, 32)" in message
    assert "layers.1.norm1.weight has dtype" in message
    assert "layers.0.norm1" not in message
    assert str(folder) in message


def test_many_problems_are_counted(tiny_checkpoint: Checkpoint) -> None:
    with pytest.raises(CheckpointError, match=r"and 12 more"):
        load_decoder(replace(tiny_checkpoint, stored={}))


def test_a_tensor_that_is_not_there_is_named(tiny_checkpoint: Checkpoint) -> None:
    with pytest.raises(CheckpointError, match=r"no\.such"):
        tiny_checkpoint.tensor("no.such")


@WRITERS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_load_as_float32(
    folder: Path, state: State, write: Callable[[Path, State], None], dtype: torch.dtype
) -> None:
    stored = {name: tensor.to(dtype) for name, tensor in state.items()}
    write(folder, stored)
    model = load_decoder(Checkpoint.open(folder))
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, stored[name].float()), name


class _Payload:
    """What a malicious checkpoint holds: unpickling it runs a command."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch '{self.sentinel}'",)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_holds_code_is_refused_and_does_not_run(folder: Path, state: State, zipped: bool) -> None:
    sentinel = folder / "it-ran"
    state_with_payload = {**state, "layers.0.x": _Payload(sentinel)}
    torch.save(state_with_payload, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
        Checkpoint.open(folder)
    assert not sentinel.exists()
    torch.load(folder / "pytorch_model.bin", weights_only=False)  # the payload is a live one
    assert sentinel.exists()


@pytest.mark.parametrize(
    "content",
    [[torch.ones(2)], torch.ones(2), {"model": {EMBEDDING: torch.ones(2)}}, {EMBEDDING: [1.0]}, 3],
    ids=["list", "tensor", "nested", "numbers", "number"],
)
def test_a_pickle_of_something_else_is_refused(folder: Path, content: Any) -> None:
    write_pickle(folder, content)
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is not a plain state dict"):
        Checkpoint.open(folder)


@pytest.mark.parametrize("form", ["pytorch_model.bin", "model.safetensors"])
@pytest.mark.parametrize("kept", [0, 1, 7, 100, 0.5, -1])
def test_truncated_weights_are_refused_by_name(folder: Path, state: State, form: str, kept: float) -> None:
    write_pickle(folder, state) if form == "pytorch_model.bin" else write_safetensors(folder, state)
    content = (folder / form).read_bytes()
    (folder / form).write_bytes(content[: int(len(content) * kept) if kept == 0.5 else int(kept)])
    with pytest.raises(CheckpointError, match=form):
        Checkpoint.open(folder)


def test_a_truncated_shard_is_refused_by_name(folder: Path, state: State) -> None:
    write_shards(folder, state)
    path = folder / "model-2.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=r"model-2\.safetensors"):
        Checkpoint.open(folder)


def test_a_folder_must_hold_configuration_and_weights(tmp_path: Path, tiny_config: CosmosAdvancedConfig) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint folder"):
        Checkpoint.open(tmp_path / "absent")
    with pytest.raises(ConfigError, match=r"config\.json"):
        Checkpoint.open(tmp_path)
    tiny_config.save(tmp_path / "config.json")
    with pytest.raises(CheckpointError, match=r"no weights.*model\.safetensors.*pytorch_model\.bin"):
        Checkpoint.open(tmp_path)


def test_a_configuration_that_cannot_be_built_is_refused(
    tmp_path: Path, tiny_config: CosmosAdvancedConfig, state: State
) -> None:
    write_safetensors(tmp_path, state)
    tiny_config.n_kv_heads = 3
    tiny_config.save(tmp_path / "config.json")
    with pytest.raises(ConfigError, match="n_kv_heads"):
        Checkpoint.open(tmp_path)


def test_missing_shards_are_named(folder: Path, state: State) -> None:
    write_shards(folder, state)
    (folder / "model-2.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"1 of 2 shards are missing: model-2\.safetensors"):
        Checkpoint.open(folder)


def test_a_tensor_that_its_shard_lacks_is_named(folder: Path, state: State) -> None:
    write_shards(folder, state, **{"norm.weight2": "model-1.safetensors"})
    with pytest.raises(CheckpointError, match=r"norm\.weight2"):
        Checkpoint.open(folder)


@pytest.mark.parametrize("place", ["../other/x.safetensors", "/x.safetensors", "sub/x.safetensors", "..", "", 5, None])
def test_shards_outside_the_folder_are_refused(tmp_path: Path, state: State, place: Any) -> None:
    folder, other = tmp_path / "checkpoint", tmp_path / "other"
    folder.mkdir()
    other.mkdir()
    CosmosAdvancedConfig().save(folder / "config.json")
    save_file({"norm.weight": torch.ones(1)}, other / "x.safetensors")
    write_index(folder, {"weight_map": {"norm.weight": place}})
    with pytest.raises(CheckpointError):
        Checkpoint.open(folder)


@pytest.mark.parametrize("index", [{}, [], None, {"weight_map": []}, {"weight_map": {"a": ["b"]}}, {"weight_map": 1}])
def test_an_index_without_a_weight_map_is_refused(folder: Path, index: Any) -> None:
    write_index(folder, index)
    with pytest.raises(CheckpointError, match=r"index\.json"):
        Checkpoint.open(folder)


def test_an_index_that_is_not_json_is_refused(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"index\.json"):
        Checkpoint.open(folder)


def _refuse() -> Tensor:
    raise AssertionError("a tensor that no export needs was read")


def test_unused_tensors_are_never_read(tiny_checkpoint: Checkpoint, tiny_trace: ir.Model) -> None:
    never = StoredTensor((64, 1 << 40), torch.float32, _refuse)
    checkpoint = replace(tiny_checkpoint, stored={"learning_engine.x": never, **tiny_checkpoint.stored})
    model = load_decoder(checkpoint)
    assert torch.equal(model.tok_embeddings.weight, tiny_checkpoint.tensor(EMBEDDING))
    graph = run_passes(tiny_trace, FP32)
    attach_weights(graph, checkpoint, FP32)
    values = [value.const_value for value in graph.graph.initializers.values()]
    assert all(value is not None and value.numpy().size for value in values)


def test_opening_and_attaching_read_nothing(
    folder: Path, state: State, tiny_trace: ir.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names and shapes come from the header; bytes only when a tensor is asked for."""
    write_safetensors(folder, state)
    monkeypatch.setattr(StoredTensor, "read", property(lambda self: _refuse, lambda self, value: None), raising=False)
    checkpoint = replace(Checkpoint.open(folder))
    attach_weights(run_passes(tiny_trace, FP32), checkpoint, FP32)
    with pytest.raises(AssertionError, match="was read"):
        checkpoint.tensor(EMBEDDING)


def test_attached_weights_must_fit_the_graph(tiny_checkpoint: Checkpoint, tiny_trace: ir.Model) -> None:
    wrong = tiny_checkpoint.stored | {Q_PROJ: StoredTensor((32, 64), torch.float32, _refuse)}
    with pytest.raises(CheckpointError, match=rf"{Q_PROJ} has shape \(32, 64\), expected \(64, 32\)"):
        attach_weights(run_passes(tiny_trace, FP32), replace(tiny_checkpoint, stored=wrong), FP32)


def test_random_checkpoints_repeat_and_leave_the_generator_alone(tiny_config: CosmosAdvancedConfig) -> None:
    torch.manual_seed(5)
    first = random_checkpoint(tiny_config, name="x", seed=1)
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(1), drawn)
    second, other = random_checkpoint(tiny_config, name="x", seed=1), random_checkpoint(tiny_config, name="x", seed=2)
    assert torch.equal(first.tensor(Q_PROJ), second.tensor(Q_PROJ))
    assert not torch.equal(first.tensor(Q_PROJ), other.tensor(Q_PROJ))
