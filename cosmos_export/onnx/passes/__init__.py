"""Graph passes, one a file. Each takes and changes an `onnx_ir.Model` and says truthfully whether it did.

A pass states what it matches, what it leaves behind, and its precondition; it leaves everything else alone, and running
it twice changes nothing the second time.
"""

from __future__ import annotations

import onnx_ir as ir

from cosmos_export.onnx.passes.name_by_module import NameByModule
from cosmos_export.onnx.passes.share_tied_projection import ShareTiedProjection
from cosmos_export.onnx.passes.store_transposed import StoreTransposed

__all__ = ["NameByModule", "ShareTiedProjection", "StoreTransposed", "run_passes"]


def run_passes(model: ir.Model) -> ir.Model:
    """All passes of the portable dialect, in their order."""
    # The tied projection first: what it leaves of the transposes are those of matrices that nothing else reads.
    return ir.passes.Sequential(NameByModule(), ShareTiedProjection(), StoreTransposed())(model).model
