"""Matrix products in a form that a CPU is fast with.

What lies in a TorchScript file is the plain matrix, once, whatever computes with it. `PackedLinear` is a class of
TorchScript with its own `__setstate__`: whoever loads the file, from Python or C++, gets the fast form without asking.
"""

# No "from __future__ import annotations" here: TorchScript reads annotations as they are.

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cosmos_export.errors import ExportError
from cosmos_export.model.backbone import CosmosBackbone
from cosmos_export.recipe import DYNAMICALLY_QUANTIZED
from cosmos_export.torch_programs.rows import quantize_rows

# The product with the tied embedding takes the place of the model's method; a checkpoint has no name for its matrix.
OUTPUT_PROJECTION = "logits.weight"


class PackedLinear(nn.Module):
    """x W^T + b: x (..., in), `weight` (out, in). On a CPU, once loaded, by oneDNN with W in its own order.

    In float32 and bfloat16; a matrix of another type, or on another device, stays as it is. Both operators are those
    that PyTorch's own compiler uses. `F.linear` comes down to MKL's products, which use one thread for one row on AMD's
    processors, and are slow there for a few rows.
    """

    weight: Tensor
    bias: Optional[Tensor]  # noqa: UP045 (TorchScript's own spelling)
    packed: Tensor
    is_packed: bool

    def __init__(self, weight: Tensor, bias: Optional[Tensor] = None) -> None:  # noqa: UP045
        super().__init__()
        self.weight, self.bias, self.packed, self.is_packed = weight, bias, torch.empty(0), False

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        if self.is_packed:
            return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        return F.linear(x, self.weight, self.bias)

    @torch.jit.export
    def stored(self) -> Tensor:
        """The plain matrix (out, in), as the file has it: reordering loses nothing."""
        return self.packed.to_dense() if self.is_packed else self.weight

    @torch.jit.export
    def __getstate__(self) -> tuple[Tensor, Optional[Tensor], bool]:  # noqa: UP045
        return self.stored(), self.bias, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[Tensor, Optional[Tensor], bool]) -> None:  # noqa: UP045
        weight = state[0]
        self.bias = state[1]
        self.training = state[2]
        self.is_packed = weight.device.type == "cpu" and (
            weight.dtype == torch.float32 or weight.dtype == torch.bfloat16
        )
        if self.is_packed:
            self.packed, self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, None), torch.empty(0)
        else:
            self.packed, self.weight = torch.empty(0), weight


def with_packed_products(model: CosmosBackbone) -> CosmosBackbone:
    """`model`, changed: its linear layers, and the product with the tied embedding, are `PackedLinear`."""
    for owner, name, layer in _linear_layers(model):
        bias = layer.bias.data if "bias" in dict(layer.named_parameters()) else None
        setattr(owner, name, torch.jit.script(PackedLinear(layer.weight.data, bias)))
    model.logits = torch.jit.script(PackedLinear(model.tok_embeddings.weight.data))  # type: ignore[method-assign]
    return model


def with_int8_products(model: CosmosBackbone) -> CosmosBackbone:
    """`model`, changed: most projections of its layers are FBGEMM's products in 8 bits, the others `PackedLinear`.

    A matrix has a scale a row, and its input is rounded to 7 bits at every call, in one range for the whole tensor
    ("dynamic quantisation"). Raises ExportError where PyTorch no longer has it.
    """
    try:
        from torch.ao.nn.quantized.dynamic import Linear
    except ImportError as error:
        raise ExportError(f"PyTorch {torch.__version__} has no dynamic quantisation any more: {error}") from None
    for owner, name, layer in _linear_layers(model):
        if name in DYNAMICALLY_QUANTIZED:
            rows = quantize_rows(layer.weight.data)
            quantised = Linear(layer.in_features, layer.out_features, bias_=False, dtype=torch.qint8)
            quantised.set_weight_bias(rows.as_quantized(), None)
            setattr(owner, name, quantised.eval())
    return with_packed_products(model)


def _linear_layers(model: nn.Module) -> list[tuple[nn.Module, str, nn.Linear]]:
    return [
        (owner, name, layer)
        for owner in list(model.modules())
        for name, layer in owner.named_children()
        if type(layer) is nn.Linear and "weight" in dict(layer.named_parameters())
    ]
