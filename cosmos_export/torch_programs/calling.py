"""How a program that PyTorch runs is called: its arguments and results, in the order of its `GraphSpec`.

    logits = program(input_ids)                                                       whole sequences
    logits = program(input_ids, attention_mask, logit_offsets, past_key_values)       prefill and decode

`past_key_values` is a list with key and value cache (B, K, L, E) of every layer, as they stand in the specification;
they are written to where they lie, so nothing of them comes back. A model with capability heads takes `ends_call` and
the heads' state behind these, and gives a tuple: logits, the new state, the scores.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Self, TypeVar

import torch
from torch import Tensor, nn

from cosmos_export.model.backbone import CosmosBackbone
from cosmos_export.onnx.head_programs import program_of
from cosmos_export.onnx.signature import DEFAULT_INPUTS
from cosmos_runtime import GraphSpec, Role, TensorSpec

PAST_KEY_VALUES = "past_key_values"

_PAST = (Role.PAST_KEY, Role.PAST_VALUE)
_PRESENT = (Role.PRESENT_KEY, Role.PRESENT_VALUE)

Argument = Tensor | list[Tensor]
Value = TypeVar("Value")


class TorchProgram(nn.Module):
    """A program of `cosmos_export.onnx.programs` with these arguments and results instead of tuples of everything.

    `program` must write its cache in place.
    """

    def __init__(self, program: nn.Module, spec: GraphSpec) -> None:
        super().__init__()
        self.program, self._outputs = program, spec.outputs

    @classmethod
    def around(cls, model: CosmosBackbone, graph: str, spec: GraphSpec) -> Self:
        """The program of a graph around a model, with or without heads."""
        return cls(program_of(model, graph, spec, "in_place"), spec).eval()

    def forward(self, *arguments: Argument) -> Tensor | tuple[Tensor, ...]:
        inputs = [tensor for argument in arguments for tensor in ([argument] if _is_one(argument) else argument)]
        found = self.program(tuple(inputs))
        results = tuple(
            tensor.to(getattr(torch, spec.dtype))
            for tensor, spec in zip(found, self._outputs, strict=True)
            if spec.role not in _PRESENT
        )
        return results[0] if len(results) == 1 else results


def arguments(inputs: Mapping[str, Value], spec: GraphSpec) -> list[Value | list[Value]]:
    """What stands for each input (a tensor, as a rule), as a program wants it. Those with a default must be there, too;
    see `with_defaults`."""
    cache = [inputs[tensor.name] for tensor in spec.inputs if tensor.role in _PAST]
    ordered: list[Value | list[Value]] = []
    for tensor in spec.inputs:
        if tensor.role not in _PAST:
            ordered.append(inputs[tensor.name])
        elif cache:
            ordered.append(cache)
            cache = []
    return ordered


def argument_names(spec: GraphSpec) -> list[str]:
    """What the arguments are called: the tensors' names as Python has them, the cache `past_key_values`."""
    names = [PAST_KEY_VALUES if tensor.role in _PAST else tensor.name.replace(".", "_") for tensor in spec.inputs]
    return list(dict.fromkeys(names))


def results(returned: Tensor | Sequence[Tensor], spec: GraphSpec) -> dict[str, Tensor]:
    """What a program returned, by name."""
    tensors = [returned] if isinstance(returned, Tensor) else returned
    return dict(zip((tensor.name for tensor in returned_tensors(spec)), tensors, strict=True))


def returned_tensors(spec: GraphSpec) -> list[TensorSpec]:
    """The outputs that come back: all but the cache."""
    return [tensor for tensor in spec.outputs if tensor.role not in _PRESENT]


def with_defaults(inputs: Mapping[str, Tensor], like: Tensor, spec: GraphSpec) -> dict[str, Tensor]:
    """The inputs with those that may be left out, on the device of `like`."""
    missing = {n: v for n, v in DEFAULT_INPUTS.items() if n not in inputs and any(t.name == n for t in spec.inputs)}
    return {**inputs, **{name: torch.tensor(value, device=like.device) for name, value in missing.items()}}


def _is_one(argument: Argument) -> bool:
    return isinstance(argument, Tensor)
