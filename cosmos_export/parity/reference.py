"""What a bundle must equal: the eager model in float64, and how far the bundle's arithmetic alone takes that model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from cosmos_export.checkpoint import Checkpoint
from cosmos_export.model.backbone import CosmosBackbone
from cosmos_export.model.capabilities.semantic_memory import FrozenLinear
from cosmos_export.model.loading import load_decoder
from cosmos_export.onnx.quantize import INT8_ACTIVATIONS, Quantization
from cosmos_export.parity.gates import Arithmetic
from cosmos_export.parity.overflow import Activation, near_overflow
from cosmos_export.recipe import ExportRecipe
from cosmos_export.torch_programs.rows import round_to_7_bits


class EagerReference:
    """The eager model of a checkpoint, in float64 and in the arithmetic of a bundle.

    `checkpoint` has the weights that the bundle computes with; `recipe` says which activations it rounds to 8 bits.
    """

    def __init__(self, checkpoint: Checkpoint, recipe: ExportRecipe, *, causal: bool = True) -> None:
        self._recipe = recipe
        self._eager = load_decoder(checkpoint, causal=causal)
        # The weights are read, and where the recipe rounds them rounded, once: both models have the same.
        loaded = Checkpoint.from_tensors(checkpoint.config, self._eager.state_dict(), dict(checkpoint.origin))
        self._exact = load_decoder(loaded, causal=causal, dtype=torch.float64)
        if recipe.activations != "float32":
            self._half = load_decoder(loaded, causal=causal, dtype=getattr(torch, recipe.activations))

    def near_overflow(self, rows: Iterable[NDArray[np.int64]]) -> list[Activation]:
        """Where activations come near the end of float16's range on ids (B, T), seen in float32."""
        return near_overflow(self._eager, rows)

    def exact(self, input_ids: NDArray[np.int64]) -> NDArray[np.float64]:
        """Logits (B, T, V) of ids (B, T), all arithmetic in float64."""
        return _run(self._exact, input_ids)

    def eager(self, input_ids: NDArray[np.int64], arithmetic: Arithmetic = Arithmetic.FLOAT32) -> NDArray[np.float32]:
        """Logits (B, T, V) of ids (B, T) as PyTorch computes them in that arithmetic; int8 activations in float32."""
        if arithmetic is Arithmetic.FLOAT32:
            return _run(self._eager, input_ids)
        if arithmetic is not Arithmetic.INT8_ACTIVATIONS:
            return _run(self._half, input_ids)
        with rounded_activations(self._eager, self._recipe):
            return _run(self._eager, input_ids)


@torch.inference_mode()
def _run(model: torch.nn.Module, input_ids: NDArray[np.int64]) -> NDArray:
    logits = model(torch.from_numpy(input_ids))
    return (logits if logits.dtype == torch.float64 else logits.float()).numpy()


@contextlib.contextmanager
def rounded_activations(model: CosmosBackbone, recipe: ExportRecipe) -> Iterator[None]:
    """Within it, the input of each product that `recipe` computes with int8 activations is rounded as kernels do."""
    handles = []
    for name, module in model.named_modules():
        block_size = _rounded_blocks(recipe.form_of(f"{name}.weight"))
        if recipe.rounds_rows(f"{name}.weight"):
            handles.append(module.register_forward_pre_hook(lambda _, inputs: (round_to_7_bits(inputs[0]),)))
        elif isinstance(module, nn.Linear | FrozenLinear) and block_size:
            handles.append(module.register_forward_pre_hook(_RoundInput(block_size)))
    project, head_block_size = model.logits, _rounded_blocks(recipe.embedding)
    if head_block_size:
        model.logits = lambda hidden: project(round_to_int8(hidden, head_block_size))  # type: ignore[method-assign]
    try:
        yield
    finally:
        model.__dict__.pop("logits", None)
        for handle in handles:
            handle.remove()


class _RoundInput:
    """A forward pre-hook that rounds a layer's only input."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size

    def __call__(self, module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        return (round_to_int8(inputs[0], self.block_size),)


def round_to_int8(x: Tensor, block_size: int) -> Tensor:
    """Rounds each block of the last axis to 255 levels between plus and minus its largest magnitude; same shape."""
    blocks = F.pad(x, (0, -x.shape[-1] % block_size)).unflatten(-1, (-1, block_size))
    step = (blocks.abs().amax(-1, keepdim=True) / 127).clamp(min=torch.finfo(x.dtype).tiny)
    return ((blocks / step).round() * step).flatten(-2)[..., : x.shape[-1]]


def _rounded_blocks(form: Quantization | None) -> int | None:
    """The size of the blocks in which activations are rounded before a product with such a matrix; None: not at all."""
    return form.block_size if form is not None and form.accuracy_level == INT8_ACTIVATIONS else None
