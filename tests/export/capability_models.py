"""Models with heads for tests: weights so large that scores spread over (0, 1) and decisions fall both ways."""

from typing import Any

import pytest
import torch
from torch import Tensor

from cosmos_export.config import CosmosAdvancedConfig
from cosmos_export.model import CosmosAdvancedModel
from cosmos_runtime import CAPABILITIES

# Small and odd: no two sizes alike, so that none can be taken for another.
SMALL: dict[str, Any] = {
    "dim": 16,
    "n_layers": 1,
    "n_heads": 2,
    "n_kv_heads": 1,
    "head_dim": 6,
    "hidden_dim": 20,
    "vocab_size": 23,
    "max_sequence_length": 32,
}

# A largest of many scores is nearly always high, and a mean of many nearly never: last biases that even the odds.
EVEN_ODDS = {
    "safety_system.toxicity_detector.toxicity_scorer.3.bias": -2.2,
    "safety_system.privacy_protector.pii_detector.2.bias": -2.5,
    "safety_system.jailbreak_prevention.jailbreak_detector.2.bias": -3.5,
    "evaluation_system.self_correction.error_detector.3.bias": -1.2,
    "evaluation_system.quality_scorer.quality_dimensions.2.bias": 2.2,
}


def small_config(**changes: Any) -> CosmosAdvancedConfig:
    return CosmosAdvancedConfig(**{**SMALL, **changes})


@torch.no_grad()
def lively_model(
    config: CosmosAdvancedConfig,
    *,
    seed: int = 0,
    capabilities: tuple[str, ...] = CAPABILITIES,
    causal: bool = True,
    dtype: torch.dtype = torch.float64,
) -> CosmosAdvancedModel:
    """A frozen model in evaluation mode, with random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CosmosAdvancedModel(config, capabilities=capabilities, causal=causal).to(dtype)
        for parameter in model.parameters():
            spread = 1.7 * parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.5
            parameter.normal_(1.0 if _is_norm(parameter) else 0.0, spread)
        for name, parameter in model.named_parameters():
            parameter += EVEN_ODDS.get(name, 0.0)
        model.tok_embeddings.weight.normal_()
    return model.eval().requires_grad_(False).freeze()


def _is_norm(parameter: Tensor) -> bool:
    """Norm weights start as ones, and nothing else does."""
    return parameter.dim() == 1 and bool((parameter == 1).all())


def random_vectors(rows: int, dim: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, dim, generator=generator, dtype=torch.float64)


def same_report(given: Any, expected: Any, *, tolerance: float, where: str = "report") -> None:
    """Key order, strings, booleans and types are equal; numbers are close."""
    assert type(given) is type(expected), where
    if isinstance(given, dict):
        assert list(given) == list(expected), where
        for key in given:
            same_report(given[key], expected[key], tolerance=tolerance, where=f"{where}.{key}")
    elif isinstance(given, list):
        assert len(given) == len(expected), where
        for index, pair in enumerate(zip(given, expected, strict=True)):
            same_report(*pair, tolerance=tolerance, where=f"{where}[{index}]")
    elif isinstance(given, float):
        assert given == pytest.approx(expected, rel=0, abs=tolerance), where
    else:
        assert given == expected, where
