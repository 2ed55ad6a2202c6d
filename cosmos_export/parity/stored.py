"""Are the numbers in a bundle the checkpoint's numbers? Each stored tensor is compared bit for bit.

Outputs alone cannot tell: an embedding row that no case reads, or one weight that moved by a rounding, changes no logit
beyond a gate. What is stored has to be equal, whatever it changes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from cosmos_export.checkpoint import Checkpoint
from cosmos_export.model.loading import skeleton
from cosmos_export.onnx.signature import ROTARY_COS, ROTARY_SIN, source_of
from cosmos_export.onnx.weights import initializer_reader


@dataclass(frozen=True)
class StoredTensors:
    """How many of the model's tensors a bundle holds unchanged, and what is wrong with the others."""

    expected: int
    equal: int
    problems: tuple[str, ...]

    @property
    def passed(self) -> bool:
        return not self.problems and self.equal == self.expected


def compare_stored(graph: Path, checkpoint: Checkpoint) -> StoredTensors:
    """Compares every weight and rotary table in a graph's file (and its external data) with the checkpoint's."""
    wanted = {*skeleton(checkpoint.config).state_dict(), ROTARY_COS, ROTARY_SIN}
    problems = dict(_problems(ir.load(graph), checkpoint, wanted))
    problems |= {source: f"{source} is not in the graph" for source in wanted - problems.keys()}
    wrong = tuple(problem for problem in problems.values() if problem)
    return StoredTensors(expected=len(wanted), equal=len(wanted) - len(wrong), problems=wrong)


def _problems(model: ir.Model, checkpoint: Checkpoint, wanted: set[str]) -> Iterator[tuple[str, str | None]]:
    """(source, what is wrong with its initializer or None) for each initializer that holds a tensor of the model."""
    for name, value in model.graph.initializers.items():
        source, _ = source_of(name)
        if source in wanted and value.const_value is not None:
            yield source, _difference(name, value.const_value.numpy(), initializer_reader(name, checkpoint)().numpy())


def _difference(name: str, stored: np.ndarray, expected: np.ndarray) -> str | None:
    if stored.shape != expected.shape or stored.dtype != expected.dtype:
        return f"{name} is {stored.dtype} {stored.shape}, expected {expected.dtype} {expected.shape}"
    # As bits: NaN equals itself, and 0.0 does not pass for -0.0.
    differing = np.flatnonzero(stored.view(np.uint32) != expected.view(np.uint32))
    if not len(differing):
        return None
    index = tuple(int(i) for i in np.unravel_index(differing[0], stored.shape))
    values = f"{stored[index]!r}, expected {expected[index]!r}"
    return f"{name} differs in {len(differing)} of {stored.size} values, first at {index}: {values}"
