"""Ids that a model has no embedding for: an error that names the id, its place and the vocabulary."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.export import Dim

from cosmos_export.errors import ConfigError, PromptError
from cosmos_export.model import CosmosAdvancedModel, CosmosDecoder
from cosmos_export.model.backbone import CosmosBackbone
from cosmos_export.model.loading import random_checkpoint, skeleton
from cosmos_export.parity.verify import Effort
from cosmos_export.pipeline import export_bundle
from cosmos_export.recipe import ExportRecipe
from cosmos_export.torch_programs.sessions import eager_session, load_session
from cosmos_runtime import InputError, Session, generate

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


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        (None, "expected a tensor .* of int64, got None"),
        ([[1, 2]], r"expected a tensor .*, got \[\[1, 2\]\]"),
        (np.array([[1, 2]]), "expected a tensor"),
        (torch.ones(1, 2, dtype=torch.bool), "must be int64 or int32, got torch.bool"),
        (torch.full((1, 2), float("nan")), "must be int64 or int32, got torch.float32"),
        (torch.ones(2, dtype=torch.int64), r"must be \(batch, sequence\), got shape \(2,\)"),
        (torch.ones(1, 1, 2, dtype=torch.int64), r"must be \(batch, sequence\), got shape \(1, 1, 2\)"),
        (torch.ones(0, 2, dtype=torch.int64), r"of at least one token, got shape \(0, 2\)"),
        (torch.ones(1, 0, dtype=torch.int64), "0 tokens, expected at least 1|at least one token"),
        (torch.ones(1, 33, dtype=torch.int64), "33 tokens"),
        (torch.tensor([[2**63 - 1]]), "got 9223372036854775807 in row 0"),
        (torch.tensor([[-(2**63)]]), "got -9223372036854775808 in row 0"),
    ],
)
def test_prompts_that_the_eager_model_cannot_take(model: CosmosBackbone, ids: Any, words: str) -> None:
    if isinstance(model, CosmosAdvancedModel):
        with pytest.raises(PromptError, match=words):
            model.generate(ids, max_new_tokens=1)
    with pytest.raises(InputError, match=words) as caught:
        model(ids)
    assert isinstance(caught.value, PromptError)
    assert isinstance(caught.value, ConfigError), "what it was before sessions had a word for it"


@pytest.mark.parametrize("most", [None, "1", 1.0, -1, True, float("nan")])
def test_lengths_that_the_eager_model_cannot_take(most: Any) -> None:
    model = CosmosAdvancedModel(small_config(vocab_size=VOCABULARY, generation={"max_tokens": 1})).eval()
    if most is None:
        assert model.generate(torch.ones(1, 1, dtype=torch.int64), most)[0].shape == (1, 2)
        return
    with pytest.raises(InputError, match="max_new_tokens must be 0 or more, got"):
        model.generate(torch.ones(1, 1, dtype=torch.int64), most)


def test_a_rotary_table_shorter_than_the_maximum(model: CosmosBackbone) -> None:
    before = model.config.max_sequence_length
    model.config.max_sequence_length = before + 1
    try:
        with pytest.raises(ConfigError, match="rotary table has 32 positions, and max_sequence_length is 33 now"):
            model(torch.ones(1, before + 1, dtype=torch.int64))
    finally:
        model.config.max_sequence_length = before


@pytest.fixture(scope="module")
def sessions(tmp_path_factory: pytest.TempPathFactory) -> list[Session]:
    """Of a model, as it is, as a TorchScript program and as an ONNX bundle."""
    checkpoint = random_checkpoint(small_config(vocab_size=VOCABULARY), name="small")
    folder = tmp_path_factory.mktemp("kinds")
    for recipe in ("torchscript-full-sequence", "fp32"):
        export_bundle(checkpoint, folder / recipe, ExportRecipe.load(recipe), effort=Effort.OFF)
    return [eager_session(checkpoint), *(load_session(bundle) for bundle in sorted(folder.iterdir()))]


@pytest.mark.parametrize(
    "ids", [[], [[1], [1, 2]], [1.5], [True], None, [2**70], [-1], [VOCABULARY], [0] * 33, [[[1]]], "ab"], ids=str
)
def test_sessions_of_every_kind_refuse_with_the_same_words(ids: Any, sessions: list[Session]) -> None:
    words = []
    for session in sessions:
        with pytest.raises(InputError) as caught:
            session.logits(ids)
        words.append(str(caught.value))
        with pytest.raises(InputError) as caught:
            generate(session, ids, max_new_tokens=1)
        words.append(str(caught.value))
    assert words[:2] == words[2:4] == words[4:]


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
