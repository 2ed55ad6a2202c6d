"""How programs that PyTorch runs are called: arguments and results in the order of their specification."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from cosmos_export.config import CosmosAdvancedConfig
from cosmos_export.model import CosmosDecoder
from cosmos_export.onnx.signature import graph_spec
from cosmos_export.torch_programs.build import example_arguments
from cosmos_export.torch_programs.calling import (
    TorchProgram,
    argument_names,
    arguments,
    results,
    returned_tensors,
    with_defaults,
)
from cosmos_runtime import CAPABILITIES, DECODER, FULL_SEQUENCE, GraphSpec

from .capability_models import lively_model, small_config

MakeConfig = Callable[..., CosmosAdvancedConfig]


@pytest.fixture
def decoder_spec(tiny_config: CosmosAdvancedConfig) -> GraphSpec:
    return graph_spec(DECODER, tiny_config, None)


@pytest.fixture
def heads_spec() -> GraphSpec:
    return graph_spec(DECODER, small_config(), None, capabilities=CAPABILITIES)


def test_the_cache_is_one_argument_in_the_order_of_the_layers(decoder_spec: GraphSpec) -> None:
    given = arguments({tensor.name: tensor.name for tensor in decoder_spec.inputs}, decoder_spec)
    cache = [f"past_key_values.{layer}.{part}" for layer in range(2) for part in ("key", "value")]
    assert given == ["input_ids", "attention_mask", "logit_offsets", cache]
    assert argument_names(decoder_spec) == ["input_ids", "attention_mask", "logit_offsets", "past_key_values"]


def test_whole_sequences_need_no_more_than_their_tokens(tiny_config: CosmosAdvancedConfig) -> None:
    spec = graph_spec(FULL_SEQUENCE, tiny_config, None)
    assert arguments({"input_ids": 1}, spec) == [1]
    assert argument_names(spec) == ["input_ids"]


def test_the_state_of_heads_stands_behind_the_cache(heads_spec: GraphSpec) -> None:
    names = argument_names(heads_spec)
    assert names[3:5] == ["past_key_values", "ends_call"]
    assert set(names[5:]) == {"past_memory_keys", "past_memory_values", "past_memory_calls", "past_query"}
    assert all(name.isidentifier() for name in names)
    assert len(arguments({tensor.name: 0 for tensor in heads_spec.inputs}, heads_spec)) == len(names)


def test_an_argument_that_is_missing_is_named(decoder_spec: GraphSpec) -> None:
    with pytest.raises(KeyError, match="logit_offsets"):
        arguments({tensor.name: 0 for tensor in decoder_spec.inputs if tensor.name != "logit_offsets"}, decoder_spec)


def test_what_may_be_left_out_is_the_last_position_and_a_call_that_ends(heads_spec: GraphSpec) -> None:
    ids = torch.zeros(1, 1, dtype=torch.int64)
    filled = with_defaults({"input_ids": ids}, ids, heads_spec)
    assert {name: tensor.tolist() for name, tensor in filled.items()} == {
        "input_ids": [[0]],
        "logit_offsets": [0],
        "ends_call": [True],
    }
    assert [filled[name].dtype for name in ("logit_offsets", "ends_call")] == [torch.int64, torch.bool]


def test_what_is_given_is_no_default(decoder_spec: GraphSpec) -> None:
    offsets = torch.tensor([3, 2])
    filled = with_defaults({"logit_offsets": offsets}, offsets, decoder_spec)
    assert filled == {"logit_offsets": offsets}, "a plain decoder has no calls that end"


def test_all_but_the_cache_comes_back_by_name(decoder_spec: GraphSpec, heads_spec: GraphSpec) -> None:
    logits = torch.zeros(1)
    assert results(logits, decoder_spec) == {"logits": logits}
    names = [tensor.name for tensor in returned_tensors(heads_spec)]
    assert names[:4] == ["logits", "present_memory.keys", "present_memory.values", "present_query"]
    assert not any(name.startswith("present.") for name in names)
    many = [torch.full((1,), float(i)) for i in range(len(names))]
    assert results(many, heads_spec) == dict(zip(names, many, strict=True))


def test_results_that_are_not_as_many_as_the_specification_says_are_refused(heads_spec: GraphSpec) -> None:
    with pytest.raises(ValueError, match="zip"):
        results([torch.zeros(1)], heads_spec)


class Echo(nn.Module):
    """Gives back its inputs' sums where logits are wanted, then its cache."""

    def forward(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        ids, mask, offsets, *cache = inputs
        return (torch.stack([ids.sum(), mask.sum(), offsets.sum()]), *cache)


def test_a_program_takes_its_arguments_apart_again(decoder_spec: GraphSpec) -> None:
    cache = [torch.full((1,), float(i)) for i in range(4)]
    found = TorchProgram(Echo(), decoder_spec)(torch.tensor([[5]]), torch.tensor([[7]]), torch.tensor([9]), cache)
    assert isinstance(found, Tensor), "one result is no tuple"
    assert found.tolist() == [5, 7, 9]
    assert found.dtype == torch.float32, "the specification's"


def test_a_program_around_a_model_gives_its_logits(make_config: MakeConfig) -> None:
    config = make_config()
    model, ids = CosmosDecoder(config).eval(), torch.tensor([[3, 1, 4], [1, 5, 9]])
    whole = TorchProgram.around(model, FULL_SEQUENCE, graph_spec(FULL_SEQUENCE, config, None))
    spec = graph_spec(DECODER, config, None)
    cached = TorchProgram.around(model, DECODER, spec)
    cache = [torch.zeros(2, 2, 8, 16) for _ in range(4)]
    with torch.no_grad():
        expected = model(ids)
        assert torch.equal(whole(ids), expected)
        last = cached(ids, torch.ones_like(ids), torch.tensor([0]), cache)
    torch.testing.assert_close(last, expected[:, -1:], rtol=0, atol=1e-5)
    assert all(bool(part[:, :, :3].any()) for part in cache), "the cache is written in place"
    assert not any(bool(part[:, :, 3:].any()) for part in cache)


def test_a_program_with_heads_gives_what_they_found_by_their_names() -> None:
    config = small_config()
    spec = graph_spec(DECODER, config, None, capabilities=CAPABILITIES)
    program = TorchProgram.around(lively_model(config, dtype=torch.float32), DECODER, spec)
    with torch.no_grad():
        returned = program(*example_arguments(spec, config))
    assert isinstance(returned, tuple)
    found = results(returned, spec)
    assert {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in found.items()} == {
        tensor.name: tensor.dtype for tensor in returned_tensors(spec)
    }
    assert {name: tensor.dim() for name, tensor in found.items()} == {
        tensor.name: len(tensor.shape) for tensor in returned_tensors(spec)
    }


@pytest.mark.parametrize("limit", [2, 4, 64])
def test_examples_fit_the_model_and_no_two_sizes_are_alike(make_config: MakeConfig, limit: int) -> None:
    config = make_config(max_sequence_length=limit)
    ids, mask, offsets, cache = example_arguments(graph_spec(DECODER, config, None), config)
    assert isinstance(ids, Tensor)
    assert isinstance(mask, Tensor)
    assert isinstance(offsets, Tensor)
    sizes = (len(ids), ids.shape[1], mask.shape[1], cache[0].shape[2], len(offsets))
    assert ids.shape[1] <= mask.shape[1] <= cache[0].shape[2] <= limit
    assert bool((mask == 1).all()), "every row is as long as the longest"
    if limit == 64:
        assert len(set(sizes)) == len(sizes)
        assert 1 not in sizes
