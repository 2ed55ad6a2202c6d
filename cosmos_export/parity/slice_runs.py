"""Runs slices of a bundle's graph: alone, on hidden states that somebody else computed, piece by piece through a cache.

    B  batch    T  tokens of a case    n  tokens of a piece    D  dim    V  vocab_size    L  length of a cache

Every number goes in and comes out as float32, whatever type the graph computes with; 16 bits are a part of these.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper

from cosmos_export.config import CosmosAdvancedConfig
from cosmos_export.parity.layer_cases import LayerCase, Piece
from cosmos_runtime import GraphSpec, ProviderError, Role

Array = NDArray[np.float32]

_PROVIDERS: dict[str, tuple[str, dict[str, str]]] = {
    "cpu": ("CPUExecutionProvider", {}),
    # As the runtime has it: float32 means float32.
    "cuda": ("CUDAExecutionProvider", {"use_tf32": "0"}),
}
_LEVELS = {
    "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
    "extended": ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "basic": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "off": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
}
OPTIMIZATIONS = tuple(_LEVELS)
_FOLDER_OF_WEIGHTS = "session.model_external_initializers_file_folder_path"
_LOG_ERRORS_ONLY = 3
_HALF = (TensorProto.FLOAT16, TensorProto.BFLOAT16)


def open_slice(
    model: ModelProto, folder: Path, *, provider: str = "cpu", threads: int = 0, optimization: str = "all"
) -> ort.InferenceSession:
    """A session of a slice whose external data lie in `folder`; `threads` 0 is ONNX Runtime's own choice.

    Raises ProviderError where the provider is not there.
    """
    name, settings = _PROVIDERS[provider]
    options = ort.SessionOptions()
    options.add_session_config_entry(_FOLDER_OF_WEIGHTS, str(folder.resolve()))
    options.graph_optimization_level = _LEVELS[optimization]
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # sessions are many and short
    options.log_severity_level = _LOG_ERRORS_ONLY
    options.enable_cpu_mem_arena = False  # a layer's memory goes back before the next layer's is taken
    if name not in ort.get_available_providers():
        raise ProviderError(f"provider {provider!r}: this ONNX Runtime has {', '.join(ort.get_available_providers())}")
    if provider == "cuda":
        ort.preload_dlls()
    session = ort.InferenceSession(
        with_float32_ends(model).SerializeToString(), options, providers=[(name, settings)], enable_fallback=0
    )
    if session.get_providers()[0] != name:
        raise ProviderError(
            f"provider {provider!r}: ONNX Runtime could only start {', '.join(session.get_providers())}"
        )
    return session


def with_float32_ends(model: ModelProto) -> ModelProto:
    """The same model with a cast at each input and output of 16 bits."""
    changed = ModelProto()
    changed.CopyFrom(model)
    graph = changed.graph
    renamed: dict[str, str] = {}
    before, after = [], []
    for value in graph.input:
        if (half := value.type.tensor_type.elem_type) in _HALF:
            renamed[value.name] = f"{value.name}.half"
            before.append(helper.make_node("Cast", [value.name], [renamed[value.name]], to=half))
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    for value in graph.output:
        if value.type.tensor_type.elem_type in _HALF:
            renamed.setdefault(value.name, f"{value.name}.half")
            after.append(helper.make_node("Cast", [renamed[value.name]], [value.name], to=TensorProto.FLOAT))
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    for node in graph.node:
        _rename(node, renamed)
    nodes = [*before, *graph.node, *after]
    del graph.node[:]
    graph.node.extend(nodes)
    return changed


def _rename(node: onnx.NodeProto, renamed: dict[str, str]) -> None:
    for names in (node.input, node.output):
        for i, name in enumerate(names):
            names[i] = renamed.get(name, name)
    for attribute in node.attribute:
        for inner in attribute.g.node if attribute.type == onnx.AttributeProto.GRAPH else ():
            _rename(inner, renamed)


class CaseRunner:
    """Feeds a slice, or a whole graph, with the pieces of a case: inputs by their roles, as the runtime does."""

    def __init__(self, spec: GraphSpec, config: CosmosAdvancedConfig) -> None:
        self.spec, self.config = spec, config
        self._roles = {tensor.name: tensor.role for tensor in spec.inputs}
        self._past = [[t.name for t in spec.inputs if t.role == r] for r in (Role.PAST_KEY, Role.PAST_VALUE)]
        self._present = [[t.name for t in spec.outputs if t.role == r] for r in (Role.PRESENT_KEY, Role.PRESENT_VALUE)]
        self.logits = next(t.name for t in spec.outputs if t.role == Role.LOGITS)
        self._by_rows = spec.takes(Role.LOGIT_ROWS)

    @property
    def cached(self) -> bool:
        """Whether the graph has a key/value cache."""
        return bool(self._past[0])

    def run(
        self,
        session: ort.InferenceSession,
        case: LayerCase,
        given: dict[str, Array],
        layers: Sequence[int] = (),
        watch: Callable[[Piece, dict[str, Any]], None] | None = None,
    ) -> dict[str, Array]:
        """Every output of the slice over the tokens of a case, (B, T, ...) by name; zeros where no piece reaches.

        `given` are values of the graph (B, T, ...), of which each piece gets its part. `layers` are those whose caches
        pass from piece to piece; their outputs come as the last piece left them, (B, K, L, E). `watch` is told what a
        piece is fed with.
        """
        wanted = [output.name for output in session.get_outputs()]
        cache = self._fresh_cache(case, layers)
        found: dict[str, Array] = {}
        for piece in case.pieces:
            feed = self.feed(session, case, piece, given, cache)
            if watch is not None:
                watch(piece, feed)
            for name, value in zip(wanted, session.run(wanted, feed), strict=True):
                if name in self._present[0] or name in self._present[1]:
                    found[name] = cache[self._past_of(name)] = value
                else:
                    self._collect(found, name, value, case, piece)
        return found

    def feed(
        self,
        session: ort.InferenceSession,
        case: LayerCase,
        piece: Piece,
        given: dict[str, Array],
        state: dict[str, Any],
    ) -> dict[str, Any]:
        """What a piece of a case feeds a slice with: its part of `given`, values (B, T, ...), `state` as it is, and the
        rest by roles. A run of a graph with capability heads ends a call, and wants its scores."""
        return self.feed_of([value.name for value in session.get_inputs()], case, piece, given, state)

    def feed_of(
        self, inputs: Sequence[str], case: LayerCase, piece: Piece, given: dict[str, Array], state: dict[str, Any]
    ) -> dict[str, Any]:
        """The same for inputs of these names."""
        feed: dict[str, Any] = {}
        for name in inputs:
            if name in given:
                feed[name] = _rows(given[name], piece)
            elif name in state:
                feed[name] = state[name]
            elif name in self._past[0] or name in self._past[1]:
                feed[name] = self._zeros(case)  # of another layer, for its shape alone
            else:
                feed[name] = _FEEDS[self._roles[name]](case, piece)
        return feed

    def _fresh_cache(self, case: LayerCase, layers: Sequence[int]) -> dict[str, Array]:
        cache: dict[str, Array] = {}
        for layer in layers if self.cached else ():
            past = case.drawn_past(layer, self.config)
            for names, drawn in zip(self._past, past or (None, None), strict=True):
                cache[names[layer]] = self._zeros(case)
                if drawn is not None:
                    cache[names[layer]][:, :, : case.past] = drawn
        return cache

    def _zeros(self, case: LayerCase) -> Array:
        return np.zeros((case.batch, self.config.n_kv_heads, case.length, self.config.head_dim), np.float32)

    def cache_of(self, layer: int) -> list[tuple[str, str]]:
        """The names of a layer's past and present: of its keys, then of its values; none without a cache."""
        pairs = zip(self._past, self._present, strict=True)
        return [(past[layer], present[layer]) for past, present in pairs if past]

    def _past_of(self, present: str) -> str:
        part = 0 if present in self._present[0] else 1
        return self._past[part][self._present[part].index(present)]

    def _collect(self, found: dict[str, Array], name: str, value: Array, case: LayerCase, piece: Piece) -> None:
        value = self._by_row(name, value, case, piece)
        if value.shape[:2] != (case.batch, piece.count):
            raise ValueError(f"{name}: expected (batch {case.batch}, tokens {piece.count}, ...), got {value.shape}")
        into = found.setdefault(name, np.zeros((*case.input_ids.shape, *value.shape[2:]), np.float32))
        for row, (start, length) in enumerate(zip(piece.starts, piece.lengths, strict=True)):
            into[row, start:length] = value[row, self._places(name, piece, length - start)]

    def _by_row(self, name: str, value: Array, case: LayerCase, piece: Piece) -> Array:
        by_rows = name == self.logits and self._by_rows
        return value.reshape(case.batch, piece.count, -1) if by_rows else value

    def new_logits(self, value: Array, piece: Piece) -> list[Array]:
        """Of a piece's logits (B, n, V), those of each row's new tokens."""
        lengths = zip(piece.starts, piece.lengths, strict=True)
        return [value[row, self._places(self.logits, piece, end - start)] for row, (start, end) in enumerate(lengths)]

    def _places(self, name: str, piece: Piece, new: int) -> slice:
        """Where a row of a piece with so many new tokens has them: logits are asked for by their distance from a row's
        last token, so they stand at the right."""
        at_the_right = name == self.logits and self.cached and not self._by_rows
        return slice(piece.count - new, None) if at_the_right else slice(0, new)

    def as_piece(self, name: str, values: NDArray[Any], piece: Piece) -> NDArray[Any]:
        """Of a value (B, T, ...), what a run of this piece has to give; NaN where that is anything."""
        part = np.full((len(values), piece.count, *values.shape[2:]), np.nan, values.dtype)
        for row, (start, length) in enumerate(zip(piece.starts, piece.lengths, strict=True)):
            part[row, self._places(name, piece, length - start)] = values[row, start:length]
        return part.reshape(-1, values.shape[-1]) if name == self.logits and self._by_rows else part


def _rows(values: NDArray, piece: Piece) -> NDArray:
    """The part (B, n, ...) of `values` (B, T, ...) that a piece has; what lies beyond a row's end is zeros."""
    part = np.zeros((len(values), piece.count, *values.shape[2:]), values.dtype)
    for row, (start, length) in enumerate(zip(piece.starts, piece.lengths, strict=True)):
        part[row, : length - start] = values[row, start:length]
    return part


def _tokens(case: LayerCase, piece: Piece) -> NDArray:
    return _rows(case.input_ids, piece)


def _lengths(case: LayerCase, piece: Piece) -> NDArray:
    return case.past + np.array(piece.lengths)


def _mask(case: LayerCase, piece: Piece) -> NDArray:
    lengths = _lengths(case, piece)
    return (np.arange(lengths.max()) < lengths[:, None]).astype(np.int64)


_FEEDS: dict[str, Callable[[LayerCase, Piece], NDArray]] = {
    Role.TOKENS: _tokens,
    Role.ATTENTION_MASK: _mask,
    Role.LOGIT_OFFSETS: lambda case, piece: np.arange(piece.count, dtype=np.int64)[::-1].copy(),
    Role.LAST_INDEX: lambda case, piece: (_lengths(case, piece) - 1).astype(np.int32),
    Role.TOTAL_LENGTH: lambda case, piece: np.array(_lengths(case, piece).max(), np.int32),
    Role.ENDS_CALL: lambda case, piece: np.array([True]),
    Role.WANTS_SCORES: lambda case, piece: np.array([True]),
    Role.LOGIT_ROWS: lambda case, piece: np.arange(case.batch * piece.count, dtype=np.int64),
}
