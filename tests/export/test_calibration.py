"""Calibration: rounding that corrects itself, learning, its text, and what verification makes of the result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cosmos_export.calibration.calibrate import calibrate
from cosmos_export.calibration.learning import learn_levels
from cosmos_export.calibration.levels import Levels
from cosmos_export.calibration.plan import ROW_LENGTH, CalibrationPlan
from cosmos_export.calibration.rounding import round_with_feedback
from cosmos_export.calibration.text import sampled_text, text_from_file
from cosmos_export.checkpoint import Checkpoint
from cosmos_export.config import CosmosAdvancedConfig
from cosmos_export.errors import CheckpointError
from cosmos_export.model.decoder import CosmosDecoder
from cosmos_export.model.loading import load_decoder, random_checkpoint
from cosmos_export.onnx.quantize import Quantization, QuantizedMatrix, dequantize, quantize
from cosmos_export.onnx.weights import WeightReader
from cosmos_export.parity.calibrated import strayed
from cosmos_export.progress import Silent
from cosmos_export.recipe import ExportRecipe

INT4 = Quantization(bits=4, block_size=32, symmetric=True, accuracy_level=4)
ConfigMaker = Callable[..., CosmosAdvancedConfig]


@pytest.fixture
def checkpoint(make_config: ConfigMaker) -> Checkpoint:
    """Weights large enough for next-token distributions that are not flat."""
    config = make_config(dim=64, hidden_dim=96, n_layers=2, vocab_size=80, max_sequence_length=32)
    drawn = random_checkpoint(config, name="drawn", seed=1)
    tensors = {n: drawn.tensor(n) * (4 if drawn.tensor(n).dim() > 1 else 1) for n in drawn.names}
    return Checkpoint.from_tensors(config, tensors, {"kind": "checkpoint", "location": "drawn"})


@pytest.fixture
def recipe() -> ExportRecipe:
    return replace(ExportRecipe.load("cpu-int4"), quantization=INT4, embedding=INT4)


def output_error(weight: Tensor, rounded: Tensor, inputs: Tensor) -> float:
    return float(((rounded - weight) @ inputs.T).square().mean())


def correlated_inputs(columns: int) -> Tensor:
    mix = torch.randn(columns // 4, columns, generator=torch.Generator().manual_seed(0))
    return torch.randn(500, columns // 4, generator=torch.Generator().manual_seed(1)) @ mix


def divergence(model: CosmosDecoder, levels: dict[str, Levels], ids: Tensor) -> float:
    weights = {name: level.values() for name, level in levels.items()}
    with torch.no_grad():
        exact = torch.log_softmax(model(ids), -1)
        rounded = torch.log_softmax(torch.func.functional_call(model, weights, (ids,)), -1)
    return float((exact.exp() * (exact - rounded)).sum(-1).mean())


@pytest.mark.parametrize("columns", [64, 80])
def test_feedback_keeps_products_better_than_rounding_each_block_by_itself(columns: int) -> None:
    weight, inputs = torch.randn(24, columns), correlated_inputs(columns)
    corrected = round_with_feedback(weight, inputs.T @ inputs, INT4).values()
    alone = dequantize(quantize(weight, INT4), columns, INT4)
    assert output_error(weight, corrected, inputs) < 0.6 * output_error(weight, alone, inputs)


def test_inputs_that_have_nothing_to_do_with_each_other_correct_nothing() -> None:
    weight = torch.randn(16, 64)
    corrected = round_with_feedback(weight, torch.eye(64), INT4).values()
    torch.testing.assert_close(corrected, dequantize(quantize(weight, INT4), 64, INT4))


def test_an_input_that_is_never_there_is_no_fault() -> None:
    inputs = correlated_inputs(64)
    inputs[:, 5] = 0
    assert round_with_feedback(torch.randn(8, 64), inputs.T @ inputs, INT4).values().isfinite().all()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("columns", [64, 70])
def test_levels_are_stored_as_they_are(bits: int, columns: int) -> None:
    form = replace(INT4, bits=bits)
    levels = round_with_feedback(torch.randn(8, columns), torch.eye(columns), form)
    packed = levels.packed()
    assert torch.equal(dequantize(packed, columns, form), levels.values())
    assert torch.equal(Levels.of(packed, columns, form).steps, levels.steps)


def test_learning_brings_the_rounded_model_nearer(checkpoint: Checkpoint, recipe: ExportRecipe) -> None:
    model = load_decoder(checkpoint)
    ids = sampled_text(model, 64, 32)
    before = {
        name: Levels.of(quantize(p, INT4), p.shape[1], INT4)
        for name, p in model.named_parameters()
        if recipe.form_of(name)
    }
    after = learn_levels(model, before, ids, 6, lambda done, total: None)
    unseen = sampled_text(model, 16, 32, seed=9)
    assert divergence(model, after, unseen) < 0.9 * divergence(model, before, unseen)
    for level in after.values():
        assert torch.equal(level.steps, level.steps.round())
        assert level.steps.abs().max() <= 8


def test_a_calibration_covers_what_the_recipe_quantises_and_leaves_the_checkpoint_alone(
    checkpoint: Checkpoint, recipe: ExportRecipe
) -> None:
    before = {name: checkpoint.tensor(name).clone() for name in checkpoint.names}
    result = calibrate(checkpoint, recipe, CalibrationPlan(tokens=256, epochs=1), None, Silent())
    assert set(result) == {name for name in checkpoint.names if recipe.form_of(name)}
    assert all(torch.equal(checkpoint.tensor(name), tensor) for name, tensor in before.items())
    assert not list(strayed(replace(checkpoint, calibrated=result), recipe))


def test_the_same_checkpoint_is_calibrated_alike(checkpoint: Checkpoint, recipe: ExportRecipe) -> None:
    first, second = (calibrate(checkpoint, recipe, CalibrationPlan(128, 1), None, Silent()) for _ in range(2))
    assert all(torch.equal(first[name].blocks, second[name].blocks) for name in first)


def test_packed_projections_hold_the_calibrated_rows_of_their_parts(
    checkpoint: Checkpoint, recipe: ExportRecipe
) -> None:
    calibrated = calibrate(checkpoint, recipe, CalibrationPlan(64, 0), None, Silent())
    reader = WeightReader(replace(checkpoint, calibrated=calibrated), recipe)
    parts = [calibrated[f"layers.0.feed_forward.{name}.weight"] for name in ("w1", "w3")]
    assert torch.equal(
        reader.read("layers.0.feed_forward.w1_w3.weight.blocks"), torch.cat([part.blocks for part in parts])
    )
    assert torch.equal(
        reader.read("layers.0.feed_forward.w1_w3.weight.scales"), torch.cat([part.scales for part in parts])
    )


def exchanged_rows(matrix: QuantizedMatrix) -> QuantizedMatrix:
    return QuantizedMatrix(matrix.blocks.flip(0), matrix.scales.flip(0), None)


def doubled_scale(matrix: QuantizedMatrix) -> QuantizedMatrix:
    scales = matrix.scales.clone()
    scales[3] *= 2
    return replace(matrix, scales=scales)


def no_number(matrix: QuantizedMatrix) -> QuantizedMatrix:
    scales = matrix.scales.clone()
    scales[3, 0] = float("nan")
    return replace(matrix, scales=scales)


@pytest.mark.parametrize("fault", [exchanged_rows, doubled_scale, no_number])
def test_a_matrix_that_is_not_the_checkpoints_has_strayed(
    checkpoint: Checkpoint, recipe: ExportRecipe, fault: Callable[[QuantizedMatrix], QuantizedMatrix]
) -> None:
    calibrated = calibrate(checkpoint, recipe, CalibrationPlan(64, 0), None, Silent())
    name = "layers.1.feed_forward.w2.weight"
    faulty = replace(checkpoint, calibrated={**calibrated, name: fault(calibrated[name])})
    (problem,) = strayed(faulty, recipe)
    assert name in problem
    assert "0.5" in problem


def test_larger_models_get_less_text() -> None:
    plan = CalibrationPlan(tokens=32768, epochs=6)
    assert plan.rows(2_000_000, 512) == (32768 // ROW_LENGTH, ROW_LENGTH)
    assert plan.rows(175_000_000, 8192) == (22, ROW_LENGTH)
    assert plan.rows(10**12, 8192) == (1, ROW_LENGTH)
    assert plan.rows(1000, 16) == (2048, 16)


def test_sampled_text_is_the_models_and_the_same_for_a_seed(checkpoint: Checkpoint) -> None:
    model = load_decoder(checkpoint)
    ids = sampled_text(model, 64, 32, seed=4)
    assert ids.shape == (64, 32)
    assert torch.equal(ids, sampled_text(model, 64, 32, seed=4))
    assert not torch.equal(ids, sampled_text(model, 64, 32, seed=5))
    with torch.inference_mode():
        log_chances = torch.log_softmax(model(ids[:, :-1]), -1)
    nats = -log_chances.gather(-1, ids[:, 1:, None]).mean()
    entropy = -(log_chances.exp() * log_chances).sum(-1).mean()
    assert abs(float(nats - entropy)) < 0.1 * float(entropy)  # it is drawn from these very distributions


def test_text_needs_a_tokenizer_and_a_row(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("too short")
    with pytest.raises(CheckpointError, match=r"text\.txt.*tokenizer\.json"):
        text_from_file(text, None, 4, 16)
    tokenizer = _word_tokenizer(tmp_path)
    with pytest.raises(CheckpointError, match=r"text\.txt has 2 tokens, expected at least 16"):
        text_from_file(text, tokenizer, 4, 16)
    text.write_text("too short " * 20)
    assert text_from_file(text, tokenizer, 4, 16).shape == (2, 16)
    with pytest.raises(CheckpointError, match="cannot be read"):
        text_from_file(tmp_path / "none.txt", tokenizer, 4, 16)


def _word_tokenizer(folder: Path) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"too": 0, "short": 1}, unk_token="too"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"
