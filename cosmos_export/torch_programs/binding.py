"""Programs that PyTorch runs, as the runtime's sessions run a graph: tensors bound by name, then computed in place.

Everything lies in the host's memory; PyTorch computes on the buffers that the session made.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cosmos_export.torch_programs.calling import Argument, arguments, results, with_defaults
from cosmos_runtime import CosmosRuntimeError, GraphSpec, Memory

Program = Callable[..., Tensor | Sequence[Tensor]]
"""`cosmos_export.torch_programs.calling` says what it takes and gives."""


class TorchGraph:
    """A program that has been loaded, or the eager one: a `cosmos_runtime.LoadedGraph`."""

    def __init__(self, program: Program, spec: GraphSpec) -> None:
        self._program, self._spec = program, spec

    def new_binding(self, place: str) -> TorchBinding:
        """Nothing bound yet; errors name `place`."""
        return TorchBinding(self._program, self._spec, place)


class TorchBinding:
    """A program's tensors bound to buffers on the host: a `cosmos_runtime.Binding`."""

    def __init__(self, program: Program, spec: GraphSpec, place: str) -> None:
        self._program, self._spec, self._place = program, spec, place
        self._inputs: dict[str, Tensor] = {}
        self._outputs: dict[str, Tensor] = {}
        self._owners: dict[str, object] = {}  # of memory that tensors only point to
        self._cancelled = False
        self.graph_seconds = 0.0

    def bind_input(self, name: str, array: NDArray[Any]) -> None:
        """Read `name` from a contiguous array."""
        self._inputs[name] = torch.from_numpy(array)

    def bind_output(self, name: str, array: NDArray[Any]) -> None:
        """Write `name` into a contiguous array."""
        self._outputs[name] = torch.from_numpy(array)

    def bind_in_place(self, source: str, target: str, memory: Memory) -> None:
        """Read input `source` from, and write output `target` into, the same memory."""
        self._owners[source] = memory.owner
        self._inputs[source] = self._outputs[target] = _tensor_at(memory)

    def run(self) -> None:
        """Compute. Raises: CosmosRuntimeError where PyTorch fails, or the results have other shapes than was bound."""
        start = time.perf_counter()
        if self._cancelled:
            raise CosmosRuntimeError(f"{self._place}: cancelled")
        found = results(self._call(self._arguments()), self._spec)
        for name, tensor in found.items():
            bound = self._outputs[name]
            if bound.shape != tensor.shape:
                raise CosmosRuntimeError(
                    f"{self._place}: {name}: expected shape {tuple(bound.shape)}, the program gave "
                    f"{tuple(tensor.shape)}; export the bundle again"
                )
            bound.copy_(tensor)
        self.graph_seconds += time.perf_counter() - start

    def cancel(self) -> None:
        """Make every later run fail; PyTorch ends the one in progress."""
        self._cancelled = True

    def _arguments(self) -> list[Argument]:
        tokens = next(iter(self._inputs.values()))
        return arguments(with_defaults(self._inputs, tokens, self._spec), self._spec)

    @torch.inference_mode()
    def _call(self, given: list[Argument]) -> Tensor | Sequence[Tensor]:
        try:
            return self._program(*given)
        except Exception as error:  # whatever a program raises
            reason = str(error).strip().splitlines()[-1:] or [type(error).__name__]
            raise CosmosRuntimeError(f"{self._place}: PyTorch failed: {reason[0]}") from error


def _tensor_at(memory: Memory) -> Tensor:
    """The tensor that lies at an address of the host."""
    dtype: torch.dtype = getattr(torch, memory.dtype)
    count = int(np.prod(memory.shape))
    if not count:
        return torch.empty(memory.shape, dtype=dtype)
    buffer = (ctypes.c_uint8 * (count * dtype.itemsize)).from_address(memory.address)
    return torch.frombuffer(buffer, dtype=dtype).view(memory.shape)
