"""The eager model one layer at a time: a layer's tensors are read, every case goes through it, and they are let go.

    B  batch    T  tokens of a case    N  tokens of all cases    D  dim    V  vocab_size    P  positions before a case

The layer is the model's own module. Its matrices are kept as small as they are stored (levels of a quantised matrix,
bfloat16 of a bfloat16 checkpoint) and become float64 a few rows at a time, inside the product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cosmos_export.checkpoint import EMBEDDING, Checkpoint
from cosmos_export.config import CosmosAdvancedConfig
from cosmos_export.model.attention import grouped_query_attention
from cosmos_export.model.backbone import DecoderLayer, RMSNorm
from cosmos_export.model.loading import skeleton
from cosmos_export.model.rope import rotary_tables, rotate
from cosmos_export.model.row_reading import RowReader
from cosmos_export.onnx.quantize import Quantization, QuantizedMatrix, dequantize, quantize, stack_rows
from cosmos_export.onnx.slices import FINAL_NORM
from cosmos_export.parity.layer_cases import LayerCase
from cosmos_export.recipe import ExportRecipe

# Elements of a matrix that are expanded, or quantised, at a time.
_AT_ONCE = 1 << 22

Rounding = Callable[[Tensor], Tensor]


class StoredRows:
    """A matrix (N, C) in the type that it was read in."""

    def __init__(self, matrix: Tensor) -> None:
        self._matrix = matrix
        self.shape = matrix.shape

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows start .. stop - 1 as float32."""
        return self._matrix[start:stop].to(torch.float32)

    def chosen(self, ids: Tensor) -> Tensor:
        """Rows of these numbers (N,) as float32."""
        return self._matrix[ids].to(torch.float32)


class StackedRows:
    """A matrix (N, C) that is read from where it lies, some rows at a time, and rounded to a type that is computed
    with."""

    def __init__(self, matrix: RowReader, dtype: torch.dtype) -> None:
        self._matrix, self._dtype = matrix, dtype
        self.shape = torch.Size(matrix.shape)

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows start .. stop - 1 as float32."""
        stop = min(stop, self.shape[0])
        return self._matrix.rows(start, stop).to(torch.float32).to(self._dtype).to(torch.float32)

    def chosen(self, ids: Tensor) -> Tensor:
        """Rows of these numbers (N,) as float32."""
        return torch.cat([self.rows(row, row + 1) for row in ids.tolist()])


class QuantizedRows:
    """A matrix (N, C) as its levels and scales."""

    def __init__(self, matrix: QuantizedMatrix, columns: int, form: Quantization) -> None:
        self._matrix, self._columns, self._form = matrix, columns, form
        self.shape = torch.Size((len(matrix.blocks), columns))

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows start .. stop - 1 as float32."""
        return self._expanded(slice(start, stop))

    def chosen(self, ids: Tensor) -> Tensor:
        """Rows of these numbers (N,) as float32."""
        return self._expanded(ids)

    def _expanded(self, rows: slice | Tensor) -> Tensor:
        zeros = self._matrix.zero_points
        part = QuantizedMatrix(
            self._matrix.blocks[rows], self._matrix.scales[rows], None if zeros is None else zeros[rows]
        )
        return dequantize(part, self._columns, self._form)


Matrix = StoredRows | StackedRows | QuantizedRows


def product(x: Tensor, matrix: Matrix) -> Tensor:
    """x (..., C) times the transpose of a matrix (N, C), in the type of x: (..., N)."""
    rows, columns = matrix.shape
    step = max(1, _AT_ONCE // columns)
    parts = [F.linear(x, matrix.rows(start, start + step).to(x.dtype)) for start in range(0, rows, step)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def quantize_in_parts(matrices: Iterable[Tensor], form: Quantization) -> QuantizedMatrix:
    """Matrices (N, C) one above the other as `quantize` has them, some rows at a time: what the search for scales holds
    is many times a row's size."""
    parts = (part for matrix in matrices for part in matrix.split(max(1, _AT_ONCE // matrix.shape[1])))
    return stack_rows([quantize(part.to(torch.float32), form) for part in parts])


class StreamedWeights:
    """The tensors of a checkpoint as a bundle of `recipe` computes with them, a piece of the model at a time."""

    def __init__(self, checkpoint: Checkpoint, recipe: ExportRecipe) -> None:
        self.checkpoint, self.recipe = checkpoint, recipe
        self._names = list(skeleton(checkpoint.config).state_dict())
        self._dtype = getattr(torch, recipe.activations)

    def names_of(self, prefix: str) -> list[str]:
        """The tensors of a piece of the model."""
        return [name for name in self._names if name.startswith(prefix)]

    def quantised(self, names: Sequence[str]) -> Checkpoint:
        """The checkpoint with the quantised forms of these tensors made, so that nobody makes them a second time."""
        made = dict(self.checkpoint.calibrated)
        for name in names:
            form = self.recipe.form_of(name)
            if form is not None and name not in made:
                made[name] = quantize_in_parts(RowReader(self.checkpoint, name).matrices(_AT_ONCE), form)
        return replace(self.checkpoint, calibrated=made)

    def computed(self, names: Sequence[str], quantised: Checkpoint) -> dict[str, Matrix]:
        """These tensors as the bundle computes with them; vectors are matrices of one row."""
        return {name: self._computed(name, quantised) for name in names}

    def original(self, names: Sequence[str]) -> dict[str, Matrix]:
        """These tensors before any rounding."""
        return {name: _stored(RowReader(self.checkpoint, name), torch.float32) for name in names}

    def _computed(self, name: str, quantised: Checkpoint) -> Matrix:
        form, reader = self.recipe.form_of(name), RowReader(self.checkpoint, name)
        if form is None:
            return _stored(reader, self._dtype)
        matrix = quantised.calibrated[name]
        rounded = replace(matrix, scales=matrix.scales.to(self._dtype).to(torch.float32))
        return QuantizedRows(rounded, reader.shape[1], form)


def _stored(reader: RowReader, dtype: torch.dtype) -> Matrix:
    """A tensor rounded to `dtype`; a vector is a matrix of one row."""
    if reader.is_stacked:
        return StackedRows(reader, dtype)
    tensor = reader.whole
    return StoredRows(_as_rows(_smallest(tensor.to(torch.float32).to(dtype), tensor.dtype)))


def _as_rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.dim() > 1 else tensor[None]


def _smallest(tensor: Tensor, stored: torch.dtype) -> Tensor:
    """`tensor` in the checkpoint's own type, where that is smaller and says the same."""
    if stored.itemsize >= tensor.dtype.itemsize:
        return tensor
    small = tensor.to(stored)
    return small if torch.equal(small.to(tensor.dtype), tensor) else tensor


@dataclass(frozen=True)
class Lane:
    """A case on its way through the model, and its hidden state (B, T, D)."""

    case: LayerCase
    hidden: Tensor


class StreamedModel:
    """The pieces of the eager model: embedding, one layer, final norm and logits, on weights that the caller gives.

    `round_input` says how the input of a product with a checkpoint tensor is rounded, or None.
    """

    def __init__(self, config: CosmosAdvancedConfig, *, causal: bool = True) -> None:
        self.config, self.causal = config, causal
        self._tables: dict[torch.dtype, tuple[Tensor, Tensor]] = {}

    def embedded(self, case: LayerCase, weights: Mapping[str, Matrix]) -> Tensor:
        """The embedding (B, T, D) of a case's tokens, in float32, which is exact."""
        ids = torch.from_numpy(case.input_ids)
        return weights[EMBEDDING].chosen(ids.flatten()).unflatten(0, ids.shape)

    @torch.inference_mode()
    def layer(
        self,
        layer: int,
        weights: Mapping[str, Matrix],
        lanes: Sequence[Lane],
        dtype: torch.dtype,
        round_input: Callable[[str], Rounding | None] = lambda _: None,
        watch: Callable[[str, Tensor, Tensor], None] | None = None,
    ) -> list[Tensor]:
        """The hidden states (B, T, D) of the lanes after a layer that computes in `dtype`.

        `watch` is told what goes into each module of the layer and what comes out, (1, N, ...), by its name within it.
        """
        module = self._module(layer, weights, dtype, round_input)
        if watch is not None:
            for name, part in module.named_modules():
                part.register_forward_hook(lambda _, inputs, output, name=name: watch(name, inputs[0], output))
        attend = self.attend(layer, lanes, dtype)
        x = torch.cat([lane.hidden.to(dtype).flatten(0, 1) for lane in lanes])[None]  # (1, N, D)
        return apart(module(x, attend)[0], lanes)

    @torch.inference_mode()
    def normed(self, weights: Mapping[str, Matrix], lanes: Sequence[Lane], dtype: torch.dtype) -> list[Tensor]:
        """The lanes' hidden states after the last layer, normed: (B, T, D)."""
        norm = _norm(self.config, weights[FINAL_NORM], dtype)
        return [norm(lane.hidden.to(dtype)) for lane in lanes]

    @torch.inference_mode()
    def logits(
        self,
        weights: Mapping[str, Matrix],
        lanes: Sequence[Lane],
        dtype: torch.dtype,
        round_input: Callable[[str], Rounding | None] = lambda _: None,
    ) -> list[Tensor]:
        """Logits (B, T, V) of the lanes' hidden states after the last layer."""
        x = torch.cat([normed.flatten(0, 1) for normed in self.normed(weights, lanes, dtype)])
        return apart(self.projected(weights, x, round_input), lanes)

    @torch.inference_mode()
    def projected(
        self,
        weights: Mapping[str, Matrix],
        x: Tensor,
        round_input: Callable[[str], Rounding | None] = lambda _: None,
    ) -> Tensor:
        """Logits (N, V) of normed hidden states x (N, D), in the type of x."""
        rounding = round_input(EMBEDDING)
        return product(x if rounding is None else rounding(x), weights[EMBEDDING])

    def attend(self, layer: int, lanes: Sequence[Lane], dtype: torch.dtype) -> AttendLanes:
        """What attends in a layer for these lanes."""
        return AttendLanes(self.config, layer, lanes, self._rotary(dtype), causal=self.causal)

    def _module(
        self,
        layer: int,
        weights: Mapping[str, Matrix],
        dtype: torch.dtype,
        round_input: Callable[[str], Rounding | None],
    ) -> DecoderLayer:
        with torch.device("meta"):
            module = DecoderLayer(self.config, layer).eval()
        for name, part in list(module.named_modules()):
            of = f"layers.{layer}.{name}.weight"
            if isinstance(part, nn.Linear):
                module.set_submodule(name, Product(weights[of], round_input(of)))
            elif isinstance(part, RMSNorm):
                module.set_submodule(name, _norm(self.config, weights[of], dtype))
        return module

    def _rotary(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        # As `RotaryTable` has it: float64 in a float64 model, float32 in any other.
        table = torch.float64 if dtype == torch.float64 else torch.float32
        if table not in self._tables:
            config = self.config
            self._tables[table] = rotary_tables(config.head_dim, config.rope_theta, config.max_sequence_length, table)
        return self._tables[table]


class AttendLanes:
    """An `Attend` for cases that lie one behind the other in one row of N tokens; each sees only itself.

    `keys` and `values` are afterwards those of each lane, (B, P + T, K, E).
    """

    def __init__(
        self,
        config: CosmosAdvancedConfig,
        layer: int,
        lanes: Sequence[Lane],
        rotary: tuple[Tensor, Tensor],
        *,
        causal: bool,
    ) -> None:
        self.config, self.layer, self.lanes, self.causal = config, layer, lanes, causal
        self.cos, self.sin = rotary
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query (1, N, H*E), key and value (1, N, K*E) to (1, N, H*E)."""
        parts = zip(self.lanes, *(apart(x[0], self.lanes) for x in (query, key, value)), strict=True)
        return torch.cat([self._attended(*part).flatten(0, 1) for part in parts])[None]

    def _attended(self, lane: Lane, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """(B, T, H*E)."""
        case, width = lane.case, self.config.head_dim
        query, key, value = (x.unflatten(-1, (-1, width)) for x in (query, key, value))  # (B, T, H or K, E)
        positions = torch.arange(case.past, case.length)
        cos, sin = self.cos[positions], self.sin[positions]
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        past = case.drawn_past(self.layer, self.config)
        if past is not None:
            before = [torch.from_numpy(x).to(key.dtype).transpose(1, 2) for x in past]  # (B, P, K, E)
            key, value = torch.cat([before[0], key], dim=1), torch.cat([before[1], value], dim=1)
        self.keys.append(key)
        self.values.append(value)
        allowed = torch.arange(case.length) <= positions[:, None] if self.causal else None  # (T, P + T)
        return grouped_query_attention(query, key, value, allowed).flatten(-2)


class Product(nn.Module):
    """A linear layer whose matrix is expanded while it multiplies; its input is rounded where kernels round it."""

    def __init__(self, matrix: Matrix, rounding: Rounding | None, bias: Tensor | None = None) -> None:
        super().__init__()
        self.matrix, self.rounding, self.bias = matrix, rounding, bias

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) to (..., N)."""
        y = product(x if self.rounding is None else self.rounding(x), self.matrix)
        return y if self.bias is None else y + self.bias


def _norm(config: CosmosAdvancedConfig, weight: Matrix, dtype: torch.dtype) -> RMSNorm:
    norm = RMSNorm(config.dim, config.norm_eps)
    norm.weight = nn.Parameter(weight.rows(0, 1)[0].to(dtype), requires_grad=False)
    return norm


def apart(x: Tensor, lanes: Sequence[Lane]) -> list[Tensor]:
    """Tokens (N, ...) of all lanes, lane by lane: (B, T, ...) each."""
    return list(_apart_of(x, lanes))


def _apart_of(x: Tensor, lanes: Sequence[Lane]) -> Iterator[Tensor]:
    at = 0
    for lane in lanes:
        count = lane.case.input_ids.size
        yield x[at : at + count].unflatten(0, lane.case.input_ids.shape)
        at += count
