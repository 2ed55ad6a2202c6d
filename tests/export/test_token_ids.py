"""Ids that a model has no embedding for: an error that names the id, its place and the vocabulary."""

import pytest
import torch
from torch import nn
from torch.export import Dim

from cosmos_export.errors import ConfigError
from cosmos_export.model import CosmosAdvancedModel, CosmosDecoder
from cosmos_export.model.backbone import CosmosBackbone
from cosmos_export.model.loading import skeleton

from .capability_models import small_config

VOCABULARY = 23


@pytest.fixture(scope="module", params=["decoder", "with heads"])
def model(request: pytest.FixtureRequest) -> CosmosBackbone:
    kind = CosmosDecoder if request.param == "decoder" else CosmosAdvancedModel
    return kind(small_config(vocab_size=VOCABULARY)).eval()


@pytest.mark.parametrize("bad", [VOCABULARY, VOCABULARY + 1000, -1])
@pytest.mark.parametrize(("row", "position"), [(0, 0), (1, 2)])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_an_id_beyond_the_vocabulary_is_named(
    model: CosmosBackbone, bad: int, row: int, position: int, dtype: torch.dtype
) -> None:
    ids = torch.tensor([[0, 5, 22], [22, 1, 0]], dtype=dtype)
    model(ids)  # the first and the last id of the vocabulary are in it
    ids[row, position] = bad
    wanted = rf"from 0 to 22 \(vocab_size 23\), got {bad} in row {row} at position {position}; .*tokenizer"
    with pytest.raises(ConfigError, match=wanted):
        model(ids)


def test_ids_that_are_no_integers_are_refused(model: CosmosBackbone) -> None:
    with pytest.raises(ConfigError, match="input_ids must be int64 or int32, got torch.float32"):
        model(torch.ones(1, 3))


def test_the_rank_is_asked_for_first(model: CosmosBackbone) -> None:
    with pytest.raises(ConfigError, match="must be \\(batch, sequence\\)"):
        model(torch.tensor([1, 99]))


def test_ids_without_values_and_traced_ones_are_not_asked() -> None:
    config = small_config(vocab_size=VOCABULARY)
    meta = skeleton(config)
    assert meta(torch.empty(2, 3, dtype=torch.int64, device="meta")).shape == (2, 3, VOCABULARY)
    plain = CosmosDecoder(config).eval()
    shapes = ({0: Dim("batch", min=1), 1: Dim("sequence", min=2, max=32)},)
    program = torch.export.export(plain, (torch.ones(2, 3, dtype=torch.int64),), dynamic_shapes=shapes, strict=False)
    ids = torch.tensor([[0, 22, 4, 1]])
    torch.testing.assert_close(program.module()(ids), plain(ids))
    assert not [node for node in program.graph.nodes if "nonzero" in str(node.target) or "any" in str(node.target)]


def test_gradients_reach_the_embedding() -> None:
    model = CosmosDecoder(small_config(vocab_size=VOCABULARY))
    nn.functional.cross_entropy(model(torch.tensor([[1, 2, 3]]))[0], torch.tensor([2, 3, 4])).backward()
    assert model.tok_embeddings.weight.grad is not None
