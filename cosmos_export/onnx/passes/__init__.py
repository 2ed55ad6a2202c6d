"""Graph passes, one a file. Each takes and changes an `onnx_ir.Model` and says truthfully whether it did.

A pass states what it matches, what it leaves behind, and its precondition; it leaves everything else alone, and running
it twice changes nothing the second time.
"""

from __future__ import annotations

import onnx_ir as ir

from cosmos_export.onnx.passes.compute_in_branches import ComputeInBranches
from cosmos_export.onnx.passes.fuse_skip_norm import FuseSkipNorm
from cosmos_export.onnx.passes.multiply_by_rows import MultiplyByRows
from cosmos_export.onnx.passes.name_by_module import NameByModule
from cosmos_export.onnx.passes.pack_projections import PackProjections
from cosmos_export.onnx.passes.quantize_embedding import QuantizeEmbedding
from cosmos_export.onnx.passes.quantize_heads import QuantizeHeads
from cosmos_export.onnx.passes.quantize_projections import QuantizeProjections
from cosmos_export.onnx.passes.scores_on_demand import ScoresOnDemand
from cosmos_export.onnx.passes.share_tied_projection import ShareTiedProjection
from cosmos_export.onnx.passes.skip_unchosen import SkipUnchosen
from cosmos_export.onnx.passes.store_transposed import StoreTransposed
from cosmos_export.onnx.passes.write_memory_last import WriteMemoryLast
from cosmos_export.recipe import ExportRecipe
from cosmos_runtime import DEVICE_LOOP

__all__ = [
    "ComputeInBranches",
    "FuseSkipNorm",
    "MultiplyByRows",
    "NameByModule",
    "PackProjections",
    "QuantizeEmbedding",
    "QuantizeHeads",
    "QuantizeProjections",
    "ScoresOnDemand",
    "ShareTiedProjection",
    "SkipUnchosen",
    "StoreTransposed",
    "WriteMemoryLast",
    "run_passes",
]


def run_passes(model: ir.Model, recipe: ExportRecipe) -> ir.Model:
    """All passes of a recipe, in their order."""
    return ir.passes.Sequential(*_passes(recipe))(model).model


def _passes(recipe: ExportRecipe) -> list[ir.passes.InPlacePass]:
    # The passes that deal with the tied table come first: the transposes they leave are of matrices nothing else reads.
    common = [NameByModule(), QuantizeEmbedding(recipe), ShareTiedProjection(), StoreTransposed(), WriteMemoryLast()]
    fused = [PackProjections(), FuseSkipNorm()] if recipe.dialect == "ort" else []
    branches = [ScoresOnDemand(), SkipUnchosen(), ComputeInBranches()] if recipe.branches else []
    by_rows = [MultiplyByRows()] if DEVICE_LOOP in recipe.graphs else []
    return [*common, *fused, *branches, QuantizeProjections(recipe), QuantizeHeads(recipe), *by_rows]
