"""The eager model's capability heads one piece at a time, on weights that the caller gives.

    N  rows of all calls    D  dim    M  slots of the memory bank

A piece is the model's own module. Its matrices stay as small as they are stored and become float64 a few rows at a
time, inside the product, as those of a layer do (`streamed_model`): so what a piece takes is its stored weights, and
the fifty skills of the procedural memory, half of all heads, are not even read together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cosmos_export.config import CosmosAdvancedConfig
from cosmos_export.model.capabilities import MemoryState
from cosmos_export.model.capabilities.evaluation import EvaluationSystem
from cosmos_export.model.capabilities.fusion import CapabilityFusion
from cosmos_export.model.capabilities.layers import perceptron
from cosmos_export.model.capabilities.procedural_memory import ProceduralMemory
from cosmos_export.model.capabilities.reasoning import ReasoningEngine
from cosmos_export.model.capabilities.safety import SafetySystem
from cosmos_export.model.capabilities.semantic_memory import FrozenLinear, SemanticMemory
from cosmos_export.model.capabilities.working_memory import WorkingMemory
from cosmos_export.model.tensors_read import tensors_read
from cosmos_export.onnx.head_slices import (
    CALLS_BEFORE,
    EVALUATION_PIECE,
    FUSED,
    FUSION_PIECE,
    KEYS,
    KEYS_BEFORE,
    MEMORY,
    MEMORY_FUSION_PIECE,
    PROCEDURAL,
    QUERY,
    REASONING,
    REPRESENTATION,
    SAFETY,
    SEMANTIC,
    VALUES,
    VALUES_BEFORE,
    VECTOR,
    WORKING,
)
from cosmos_export.parity.heads_reference import Choice, choice_of
from cosmos_export.parity.streamed_model import Matrix, Product, Rounding

Values = Mapping[str, Tensor]
RoundInput = Callable[[str], Rounding | None]


@dataclass(frozen=True)
class _Module:
    """What a piece is in the model: where its tensors are, how it is built, and how it is called."""

    prefix: str
    build: Callable[[CosmosAdvancedConfig], nn.Module]
    call: Callable[[nn.Module, Values], dict[str, Tensor]]


def _with_scores(name: str, takes: str) -> Callable[[nn.Module, Values], dict[str, Tensor]]:
    def call(module: nn.Module, given: Values) -> dict[str, Tensor]:
        vector, scores = module(given[takes])
        return {name: vector, **scores}

    return call


def _remember(module: nn.Module, given: Values) -> dict[str, Tensor]:
    vector, state = module(given[REPRESENTATION], _state(given))
    return {WORKING: vector, KEYS: state.keys, VALUES: state.values, "memory.calls": state.calls}


def _fuse_memories(module: nn.Module, given: Values) -> dict[str, Tensor]:
    nothing = torch.zeros_like(given[WORKING])  # the episodic memory's
    return {MEMORY: module(torch.cat((given[WORKING], nothing, given[SEMANTIC], given[PROCEDURAL]), dim=-1))}


def _fuse(module: nn.Module, given: Values) -> dict[str, Tensor]:
    slots = {name: given.get(name) for name in (REASONING, MEMORY, SAFETY)}
    return {FUSED: module(given[REPRESENTATION], **slots)}


def _evaluate(module: nn.Module, given: Values) -> dict[str, Tensor]:
    query = given.get(QUERY, given[FUSED])  # a graph that has none reads none
    vector, scores = module(given[FUSED], query)
    return {VECTOR: vector, **scores}


def _semantic(config: CosmosAdvancedConfig) -> nn.Module:
    memory = SemanticMemory(config.dim).eval()
    memory.freeze()
    return memory


_MODULES = {
    REASONING: _Module("reasoning_engine.", ReasoningEngine, _with_scores(REASONING, REPRESENTATION)),
    WORKING: _Module(
        "memory_system.working_memory.",
        lambda config: WorkingMemory(config.dim, config.memory.working_memory_size),
        _remember,
    ),
    SEMANTIC: _Module(
        "memory_system.semantic_memory.", _semantic, lambda m, given: {SEMANTIC: m(given[REPRESENTATION])}
    ),
    PROCEDURAL: _Module(
        "memory_system.procedural_memory.",
        lambda config: ProceduralMemory(config.dim),
        lambda m, given: {PROCEDURAL: m(given[REPRESENTATION])},
    ),
    MEMORY_FUSION_PIECE: _Module(
        "memory_system.memory_fusion.",
        lambda config: perceptron(4 * config.dim, 2 * config.dim, config.dim, norm=True),
        _fuse_memories,
    ),
    SAFETY: _Module("safety_system.", SafetySystem, _with_scores(SAFETY, REPRESENTATION)),
    FUSION_PIECE: _Module("capability_fusion.", lambda config: CapabilityFusion(config.dim), _fuse),
    EVALUATION_PIECE: _Module("evaluation_system.", EvaluationSystem, _evaluate),
}


class StreamedHeads:
    """The heads of a configuration with some capabilities; `weights` of a piece are those of `names_of` it."""

    def __init__(self, config: CosmosAdvancedConfig, capabilities: Sequence[str]) -> None:
        self.config = config
        self._read = sorted(tensors_read(config, capabilities))

    def names_of(self, piece: str) -> list[str]:
        """The tensors of the model that a piece computes with."""
        return [name for name in self._read if name.startswith(_MODULES[piece].prefix)]

    @torch.inference_mode()
    def run(
        self,
        piece: str,
        weights: Mapping[str, Matrix],
        given: Values,
        dtype: torch.dtype,
        round_input: RoundInput = lambda _: None,
    ) -> dict[str, Tensor]:
        """What a piece makes of `given`, values (N, ...) by their names in `onnx.head_slices`, which it computes with
        in `dtype`: its vectors, its scores by their own names, and the memory's state after the calls."""
        return _MODULES[piece].call(self._module(piece, weights, dtype, round_input), _in(given, dtype))

    @torch.inference_mode()
    def choice(
        self,
        weights: Mapping[str, Matrix],
        given: Values,
        dtype: torch.dtype,
        round_input: RoundInput = lambda _: None,
    ) -> Choice | None:
        """What the working memory chooses from; None where it has no entries."""
        memory = self._module(WORKING, weights, dtype, round_input)
        if not isinstance(memory, WorkingMemory) or not memory.entries_read:
            return None
        given = _in(given, dtype)
        return choice_of(memory, given[REPRESENTATION], _state(given))

    def _module(
        self, piece: str, weights: Mapping[str, Matrix], dtype: torch.dtype, round_input: RoundInput
    ) -> nn.Module:
        """The module with the tensors that are read; the others stay shapes."""
        of = _MODULES[piece]
        with torch.device("meta"):
            module = of.build(self.config).eval()

        for path, part in list(module.named_modules()):
            prefix = f"{of.prefix}{path}." if path else of.prefix
            if isinstance(part, nn.Linear | FrozenLinear):
                if f"{prefix}weight" in weights:
                    bias = _tensor(weights.get(f"{prefix}bias"), 1, dtype)
                    rounding = round_input(f"{prefix}weight")
                    module.set_submodule(path, Product(weights[f"{prefix}weight"], rounding, bias))
                continue
            for name, shape in [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]:
                value = _tensor(weights.get(prefix + name), shape.dim(), dtype)
                if value is not None:
                    is_parameter = isinstance(shape, nn.Parameter)
                    setattr(part, name, nn.Parameter(value, requires_grad=False) if is_parameter else value)
        return module


def _tensor(matrix: Matrix | None, axes: int, dtype: torch.dtype) -> Tensor | None:
    """All of a small tensor; a vector is kept as a matrix of one row."""
    if matrix is None:
        return None
    whole = matrix.rows(0, matrix.shape[0]).to(dtype)
    return whole[0] if axes == 1 else whole


def _in(given: Values, dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in given.items()}


def _state(given: Values) -> MemoryState:
    x, calls = given[REPRESENTATION], given[CALLS_BEFORE]
    nothing = x.new_zeros(len(x), 0, x.shape[-1])
    return MemoryState(given.get(KEYS_BEFORE, nothing), given.get(VALUES_BEFORE, nothing), calls)
