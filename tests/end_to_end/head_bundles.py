"""Small models with capability heads, and bundles of them."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cosmos_export.checkpoint import Checkpoint
from cosmos_export.config import CosmosAdvancedConfig
from cosmos_export.onnx.quantize import Quantization
from cosmos_export.parity.verify import Effort
from cosmos_export.pipeline import ExportedBundle, export_bundle
from cosmos_export.recipe import ExportRecipe
from cosmos_runtime import CAPABILITIES

# Tests are no package, so that a folder beside this one has no absolute name.
from ..export.capability_models import lively_model, same_report, small_config  # noqa: TID252

__all__ = ["export_heads", "exported_once", "heads_checkpoint", "heads_config", "quantised", "same_report"]

# Less than the tests make calls, and more than a call reads: the memory's ring comes round.
MEMORY_SIZE = 7


def heads_config(**changes: Any) -> CosmosAdvancedConfig:
    """A geometry that the fused attention takes, at a level that blocks nothing, so that numbers are not all zero."""
    config = small_config(**{"n_layers": 2, "head_dim": 16, **changes})
    config.memory.working_memory_size = MEMORY_SIZE
    config.safety.safety_level = "medium"
    return config


def heads_checkpoint(
    config: CosmosAdvancedConfig, capabilities: Sequence[str] = CAPABILITIES, *, seed: int = 5
) -> Checkpoint:
    """Weights with which scores spread and decisions fall both ways, in float32."""
    model = lively_model(config, seed=seed, capabilities=tuple(capabilities))
    tensors = {name: tensor.float() for name, tensor in model.state_dict().items()}
    return Checkpoint.from_tensors(config, tensors, {"kind": "preset", "location": "lively"})


def export_heads(
    checkpoint: Checkpoint,
    out: Path,
    recipe: ExportRecipe | str = "cpu-fp32",
    capabilities: Sequence[str] = CAPABILITIES,
    *,
    effort: Effort = Effort.OFF,
    **options: Any,
) -> ExportedBundle:
    chosen = ExportRecipe.load(recipe) if isinstance(recipe, str) else recipe
    return export_bundle(checkpoint, out, chosen, capabilities=capabilities, effort=effort, **options)


def exported_once(checkpoint: Checkpoint, folders: pytest.TempPathFactory) -> Callable[[str], ExportedBundle]:
    """The bundle of a recipe, with all capabilities: exported at the first call, not proven."""
    made: dict[str, ExportedBundle] = {}

    def export(recipe: str) -> ExportedBundle:
        if recipe not in made:
            made[recipe] = export_heads(checkpoint, folders.mktemp("heads") / recipe, recipe)
        return made[recipe]

    return export


def quantised(bits: int, **changes: Any) -> ExportRecipe:
    """A recipe whose blocks fit into small models."""
    form = Quantization(**{"bits": bits, "block_size": 16, "symmetric": True, "accuracy_level": 4, **changes})
    recipe = ExportRecipe.load(f"cpu-int{bits}")
    embedding = replace(form, symmetric=True)
    return replace(recipe, quantization=form, embedding=embedding, overrides={}, calibration=None)
