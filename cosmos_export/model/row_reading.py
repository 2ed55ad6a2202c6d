"""A tensor of the model some rows at a time: what the heads stack of many of the checkpoint's is never made whole."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor

from cosmos_export.checkpoint import Checkpoint
from cosmos_export.model.capabilities import weight_source


class RowReader:
    """One tensor of the model, by its name there: (N, C), or a vector (N,). What it reads is mapped while this lives.

    What is made of several of the checkpoint's tensors by more than stacking is made whole, once, in float32.
    """

    def __init__(self, checkpoint: Checkpoint, name: str) -> None:
        self._checkpoint, self._name = checkpoint, name
        self._source = weight_source(name)
        self._axis = None if self._source is None else self._source.axis

    @cached_property
    def whole(self) -> Tensor:
        """All of it, in the checkpoint's precision where that has it."""
        if self._source is None:
            return self._checkpoint.tensor(self._name)
        return self._source.read(lambda part: self._checkpoint.tensor(part).float())

    @cached_property
    def shape(self) -> tuple[int, ...]:
        if self._source is None:
            return self._checkpoint.stored[self._name].shape
        if self._axis is None:
            return tuple(self.whole.shape)
        rows, columns = self._parts[0].shape
        count = len(self._parts)
        return (rows * count, columns) if self._axis == 0 else (rows, columns * count)

    @property
    def is_stacked(self) -> bool:
        """Whether it is many of the checkpoint's matrices."""
        return self._axis is not None

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows start .. stop - 1, in the checkpoint's precision where that has them."""
        if self._axis is None:
            return self.whole[start:stop]
        if self._axis == 1:
            return torch.cat([part[start:stop] for part in self._parts], dim=1)
        each = len(self._parts[0])
        within = range(start // each, -(-stop // each))
        return torch.cat([self._parts[at][max(0, start - at * each) : stop - at * each] for at in within])

    def matrices(self, values: int) -> Iterator[Tensor]:
        """All of it in matrices one above the other: one tensor, or of a stack some rows at a time, about `values`
        numbers. Tensors that lie one above the other are mapped one after another."""
        if self._source is None or self._axis is None:
            yield self.whole
        elif self._axis == 0:
            for name in self._source.names:
                yield self._checkpoint.tensor(name)
        else:
            rows, columns = self.shape
            step = max(1, values // columns)
            yield from (self.rows(start, min(start + step, rows)) for start in range(0, rows, step))

    @cached_property
    def _parts(self) -> list[Tensor]:
        return [] if self._source is None else [self._checkpoint.tensor(name) for name in self._source.names]
