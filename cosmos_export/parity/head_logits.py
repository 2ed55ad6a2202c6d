"""The last piece behind capability heads: logits of hidden states in which a vector of the heads has its place.

B  batch    N  rows of a case's calls    n  tokens of a row    T  tokens    D  dim    V  vocab_size
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from torch import Tensor

from cosmos_export.onnx.head_signature import ENDS_CALL
from cosmos_export.onnx.head_slices import FUSED, NORMED, VECTOR, HeadPiece
from cosmos_export.parity.arithmetic import torch_type
from cosmos_export.parity.gates import Arithmetic
from cosmos_export.parity.head_cases import HeadCase
from cosmos_export.parity.head_rows import Row, RowComparison, array_of, in_positions
from cosmos_export.parity.head_streams import Stream, Values, blocked_in, in_type, placed
from cosmos_export.parity.report import Measurement
from cosmos_export.parity.streamed_heads import RoundInput
from cosmos_export.parity.streamed_model import Matrix

if TYPE_CHECKING:
    from cosmos_export.parity.layered import LayerComparison

Logits = list[list[NDArray]]
"""(n, V) of each row of each call, case by case."""

# Tried with the first case alone: whether a run ends a call is a choice, the same for all.
_NO_CALL = "of a run that ends no call"


class HeadLogits:
    """What the eager model and a slice of the bundle's graph make of hidden states, and both side by side."""

    def __init__(self, layers: LayerComparison, piece: HeadPiece, weights: Mapping[str, Matrix]) -> None:
        self.layers, self.piece, self.weights = layers, piece, weights

    def eager(
        self,
        stream: Stream,
        dtype: torch.dtype,
        rounding: RoundInput = lambda _: None,
        weights: Mapping[str, Matrix] | None = None,
    ) -> Logits:
        """Of a stream by the eager model in `dtype`, on other `weights` if they are given."""
        hidden = [
            placed(case, normed.to(dtype), vector_of(values).to(dtype), blocked_in(values))
            for case, normed, values in zip(stream.cases, stream.normed, stream.values, strict=True)
        ]
        return self._projected(hidden, rounding, weights)

    def of_bundle(self, session: ort.InferenceSession, stream: Stream) -> Logits:
        """Of a stream whose values have the graph's names, by a slice."""
        cases = zip(stream.cases, stream.normed, stream.values, strict=True)
        return [self._ran(session, *case) for case in cases]

    def alone(
        self, session: ort.InferenceSession, stream: Stream, arithmetic: Arithmetic
    ) -> Iterator[tuple[str, Measurement]]:
        """What the piece makes of float64's own hidden states and vectors, with what it was measured on."""
        dtype = torch_type(arithmetic)
        rounded = Stream(stream.cases, [normed.to(dtype) for normed in stream.normed])
        rounded.keep([in_type(values, dtype) for values in stream.values])
        by_graph = Stream(stream.cases, rounded.normed)
        by_graph.keep([self._by_graph(values) for values in rounded.values])
        exact = self.eager(rounded, torch.float64)
        eager = self.eager(rounded, dtype, self.layers.rounding_in(arithmetic))
        rows = _rows(self.of_bundle(session, by_graph), exact, eager)
        for measured in RowComparison(arithmetic, rows).measurements():
            yield f"{measured.positions} of {len(rows)} calls", measured
        if any(value.name == ENDS_CALL for value in session.get_inputs()):
            yield from self._without_a_call(session, by_graph, arithmetic)

    def _without_a_call(
        self, session: ort.InferenceSession, stream: Stream, arithmetic: Arithmetic
    ) -> Iterator[tuple[str, Measurement]]:
        """The logits of runs that end no call are those of the hidden states as they are."""
        case, normed, values = stream.cases[0], stream.normed[0], stream.values[0]
        plain = [normed[row, start:end] for row, start, end in case.spans()]
        exact = self._projected([[x.double() for x in plain]], lambda _: None)
        eager = self._projected([plain], self.layers.rounding_in(arithmetic))
        actual = [self._ran(session, case, normed, values, ends_call=False)]
        for measured in RowComparison(arithmetic, _rows(actual, exact, eager)).measurements():
            yield _NO_CALL, measured

    def _by_graph(self, values: Values) -> Values:
        takes = {name: value for name, value in self.piece.takes.items() if name != NORMED}
        return {value: vector_of(values) if name == VECTOR else values[name] for name, value in takes.items()}

    def _projected(
        self, hidden: Sequence[Sequence[Tensor]], rounding: RoundInput, weights: Mapping[str, Matrix] | None = None
    ) -> Logits:
        flat = [row for rows in hidden for row in rows]
        logits = self.layers.model.projected(weights or self.weights, torch.cat(flat), rounding)
        parts = iter(array_of(part) for part in logits.split([len(row) for row in flat]))
        return [[next(parts) for _ in rows] for rows in hidden]

    def _ran(
        self,
        session: ort.InferenceSession,
        case: HeadCase,
        normed: Tensor,
        values: Values,
        *,
        ends_call: bool = True,
    ) -> list[NDArray]:
        runner, found = self.layers.runner, list[NDArray]()
        given = {self.piece.takes[NORMED]: normed.float().numpy()}
        names = [value for name, value in self.piece.takes.items() if name != NORMED]
        of_calls = zip(*(values[name].split(case.case.batch) for name in names), strict=True)
        for call, vectors in zip(case.calls, of_calls, strict=True):
            state: dict[str, Any] = {name: array_of(vector) for name, vector in zip(names, vectors, strict=True)}
            state[ENDS_CALL] = np.array([ends_call])
            (logits,) = session.run([runner.logits], runner.feed(session, case.case, call, given, state))
            found += runner.new_logits(logits, call)
        return found


def vector_of(values: Values) -> Tensor:
    """What takes the place of the last hidden state: without an evaluation, what the fusion gave."""
    return values.get(VECTOR, values[FUSED])


def _rows(actual: Logits, exact: Logits, eager: Logits) -> list[Row]:
    cases = zip(actual, exact, eager, strict=True)
    rows = (map(in_positions, row) for case in cases for row in zip(*case, strict=True))
    return [Row(given, wanted, usual, None, None) for given, wanted, usual in rows]
