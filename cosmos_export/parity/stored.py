"""Are the numbers in a bundle the checkpoint's numbers? Each stored tensor is compared bit for bit with what the recipe
makes of the checkpoint's: itself, or its quantised form.

Outputs alone cannot tell: an embedding row that no case reads, or one weight that moved by a rounding, changes no logit
beyond a gate. What is stored has to be equal, whatever it changes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir

from cosmos_export.checkpoint import Checkpoint
from cosmos_export.model.loading import skeleton
from cosmos_export.model.tensors_read import tensors_read
from cosmos_export.onnx.signature import ROTARY_COS, ROTARY_SIN, parts_of, quantized_part, source_of
from cosmos_export.onnx.weights import WeightReader, as_array
from cosmos_export.recipe import ExportRecipe


@dataclass(frozen=True)
class StoredTensors:
    """How many of the model's tensors a bundle holds as it should, and what is wrong with the others."""

    expected: int
    equal: int
    problems: tuple[str, ...]
    calibrated: int = 0
    """How many of the equal ones are equal to what a calibration made, which lies near the checkpoint's."""

    @property
    def passed(self) -> bool:
        return not self.problems and self.equal == self.expected

    def with_calibrated(self, calibrated: int, problems: Sequence[str]) -> StoredTensors:
        """These, of which so many are calibrated, less those that strayed: one problem a tensor."""
        return replace(
            self,
            equal=self.equal - len(problems),
            problems=(*self.problems, *problems),
            calibrated=calibrated - len(problems),
        )


def compare_stored(
    graph: Path, checkpoint: Checkpoint, recipe: ExportRecipe, capabilities: Sequence[str] | None = None
) -> StoredTensors:
    """Compares every weight and rotary table in a graph's file (and its external data) with the checkpoint's.

    `capabilities` are those of a model with heads, whose weights that no pass reads are not wanted; None is the plain
    decoder.
    """
    wanted = wanted_tensors(checkpoint, capabilities)
    return judged(_compared(ir.load(graph), WeightReader(checkpoint, recipe), wanted), wanted)


def wanted_tensors(checkpoint: Checkpoint, capabilities: Sequence[str] | None) -> set[str]:
    """Every weight that a pass reads, and the rotary tables."""
    config = checkpoint.config
    tensors = set(skeleton(config).state_dict()) if capabilities is None else tensors_read(config, capabilities)
    return {*tensors, ROTARY_COS, ROTARY_SIN}


def judged(compared: Iterable[tuple[str, str | None]], wanted: set[str]) -> StoredTensors:
    """The verdict on the tensors that were found, each with what is wrong or None; all of `wanted` should be there."""
    found: set[str] = set()
    wrong: dict[str, str] = {}
    for source, problem in compared:
        found.add(source)
        if problem:
            wrong.setdefault(source, problem)
    wrong |= {source: f"{source} is not in the graph" for source in sorted(wanted - found)}
    return StoredTensors(
        expected=len(wanted), equal=len(wanted) - len(wrong), problems=tuple(dict.fromkeys(wrong.values()))
    )


def _compared(model: ir.Model, reader: WeightReader, wanted: set[str]) -> Iterator[tuple[str, str | None]]:
    """(tensor of the model, what is wrong with an initializer that holds it or None)."""
    for name, value in model.graph.initializers.items():
        source, _ = source_of(quantized_part(name)[0])
        parts = parts_of(source)
        if set(parts) <= wanted and value.const_value is not None:
            problem = difference(name, value.const_value.numpy(), as_array(reader.read(name)))
            yield from ((part, problem) for part in parts)


def difference(name: str, stored: np.ndarray, expected: np.ndarray) -> str | None:
    """What is wrong with a stored tensor, in a sentence; None where every bit is as it should be."""
    if stored.shape != expected.shape or stored.dtype != expected.dtype:
        return f"{name} is {stored.dtype} {stored.shape}, expected {expected.dtype} {expected.shape}"
    # As bits: NaN equals itself, and 0.0 does not pass for -0.0.
    bits = np.dtype(f"u{stored.dtype.itemsize}")
    differing = np.flatnonzero(stored.view(bits) != expected.view(bits))
    if not len(differing):
        return None
    index = tuple(int(i) for i in np.unravel_index(differing[0], stored.shape))
    values = f"{stored[index]!r}, expected {expected[index]!r}"
    return f"{name} differs in {len(differing)} of {stored.size} values, first at {index}: {values}"
