"""Capability heads without the whole model in memory: one head after another, cut out of the bundle's graph.

    B  batch    K  calls of a case    N = K B  rows of a case's calls    T  tokens    D  dim    V  vocab_size

What comes behind the final norm is cut into pieces (`onnx.head_slices`): what a call begins with, reasoning, working,
semantic and procedural memory and their fusion, safety, the fusion of all, evaluation, and the logits. The same two
questions are asked of each as of a layer:

- alone, on float64's own input (vectors, and the memory's state before the call): does it give the vectors, scores and
  state that the eager module does in float64? Rows that decide otherwise near a threshold are AMBIGUOUS, as when the
  whole is verified (`head_rows`);
- in a chain, each piece on what the one before it gave, with the state that calls leave each other: do logits and
  scores of the running graph equal those of float64 all the way?

A head's tensors are read for its piece alone. Only the working memory knows of other calls, so it is run call by call;
all others are run on the rows of all calls at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from onnx import ModelProto
from torch import Tensor

from cosmos_export.onnx.head_signature import PAST_QUERY
from cosmos_export.onnx.head_slices import (
    CALL_PIECE,
    KEYS,
    LOGITS_PIECE,
    NORMED,
    QUERY,
    REPRESENTATION,
    VALUES,
    WORKING,
    HeadPiece,
    head_pieces,
)
from cosmos_export.parity.arithmetic import in_arithmetic, torch_type
from cosmos_export.parity.gates import LOGIT_GATES, Arithmetic, Verdict
from cosmos_export.parity.head_cases import HeadCase, build_head_cases, token_by_token
from cosmos_export.parity.head_logits import HeadLogits
from cosmos_export.parity.head_rows import Row, RowComparison, array_of, nearness, rows_between, worst_of
from cosmos_export.parity.head_streams import (
    Compute,
    Stream,
    Values,
    call_begins,
    drawn,
    in_type,
    remembering,
    together,
)
from cosmos_export.parity.heads_reference import Choice
from cosmos_export.parity.layer_cases import one_token_each
from cosmos_export.parity.quality import Prediction
from cosmos_export.parity.report import CaseResult, Measurement, PieceResult
from cosmos_export.parity.slice_runs import open_slice
from cosmos_export.parity.streamed_heads import RoundInput, StreamedHeads
from cosmos_export.parity.streamed_model import Matrix

if TYPE_CHECKING:
    from cosmos_export.parity.layered import LayerComparison

# A head decides by thresholds, to whose both sides few rows of real calls lie; rows cost next to nothing here.
_DRAWN_ROWS = 64


@dataclass
class _Chain:
    """The bundle's own way through its heads in one arithmetic, and the eager model's. The bundle's values have the
    graph's names."""

    arithmetic: Arithmetic
    bundle: Stream
    eager: Stream


@dataclass(frozen=True)
class HeadRun:
    """One piece of the heads that was run alone, on the rows of one case: its slice, what it is fed with, and what it
    should have given, by the graph's names."""

    piece: str
    arithmetic: Arithmetic
    slice: ModelProto
    taken: dict[str, Any]
    expected: dict[str, NDArray[Any]]


class HeadComparison:
    """One pass over the heads of a model whose layers have been compared: `layers`, which is told what was found."""

    def __init__(
        self,
        layers: LayerComparison,
        capabilities: Sequence[str],
        weights: Mapping[str, Matrix],
        original: Mapping[str, Matrix],
        exact: Sequence[Tensor],
        before_rounding: Sequence[Tensor],
    ) -> None:
        """`weights` are those of the logits, `original` the same before rounding. `exact` and `before_rounding` are
        normed hidden states (B, T, D), of every case that is compared in float64, and of those that quality is measured
        on in the model before rounding."""
        config, cached = layers.weights.checkpoint.config, layers.runner.cached
        self.layers, self.weights, self.original_weights = layers, weights, original
        self.heads = StreamedHeads(config, capabilities)
        self.pieces = head_pieces(layers.graph, capabilities)
        compared = build_head_cases(
            layers.cases, config, memory="memory" in capabilities, cached=cached, causal=layers.model.causal
        )
        first = len(layers.cases)
        read = [token_by_token(case, first + i, config, cached=cached) for i, case in enumerate(layers.quality_cases)]
        self.exact = Stream(compared, [exact[case.at] for case in compared])
        self.original = Stream(read, before_rounding)
        self.chains = [
            _Chain(
                chain.arithmetic,
                Stream([*compared, *read], [torch.from_numpy(chain.bundle[case.at]) for case in [*compared, *read]]),
                Stream(compared, [chain.eager[case.at] for case in compared]),
            )
            for chain in layers.chains
        ]
        self.results: list[CaseResult] = []
        self.predictions: list[Prediction] = []
        self.in_chain: dict[tuple[str, Arithmetic], tuple[str, Measurement]] = {}
        """What is nearest to its gate behind each piece of the chain, and what it is."""

    def run(self) -> tuple[list[CaseResult], list[Prediction]]:
        """The cases, and what quality is measured by."""
        for piece in self.pieces:
            slice_ = self.layers.graph.cut(list(piece.takes.values()), list(piece.gives.values()))
            if piece.name == CALL_PIECE:
                self._call(piece, slice_)
            elif piece.name == LOGITS_PIECE:
                self._logits(piece, slice_)
            else:
                self._head(piece, slice_)
            for chain in self.chains if piece.name != LOGITS_PIECE else ():
                self._note_chain(piece, chain)
            for stream in (self.exact, *(stream for chain in self.chains for stream in (chain.eager, chain.bundle))):
                stream.forget([name for key in (KEYS, VALUES) for name in (key, piece.gives.get(key, key))])
            self.layers.advance()
        return self.results, self.predictions

    # What calls begin with

    def _call(self, piece: HeadPiece, slice_: ModelProto) -> None:
        for stream in (self.exact, self.original, *(chain.eager for chain in self.chains)):
            stream.keep([call_begins(case, x) for case, x in zip(stream.cases, stream.normed, strict=True)])
        for chain in self.chains:
            dtype = torch_type(chain.arithmetic)
            session = self._open(slice_, chain.arithmetic)
            rounded = [normed.to(dtype) for normed in self.exact.normed]
            alone = [self._begun(session, piece, c, x) for c, x in zip(self.exact.cases, rounded, strict=True)]
            expected = [call_begins(case, x) for case, x in zip(self.exact.cases, rounded, strict=True)]
            self._judge(piece, chain.arithmetic, alone, [in_type(e, torch.float64) for e in expected], expected)
            pairs = zip(chain.bundle.cases, chain.bundle.normed, strict=True)
            chain.bundle.keep([_by_graph(piece, self._begun(session, piece, case, normed)) for case, normed in pairs])

    def _begun(self, session: ort.InferenceSession, piece: HeadPiece, case: HeadCase, normed: Tensor) -> Values:
        """What a slice finds at the beginning of calls, which pass the query on."""
        state: dict[str, Any] = {PAST_QUERY: case.query_before(normed.shape[-1])}
        given, calls = {piece.takes[NORMED]: normed.float().numpy()}, list[list[NDArray]]()
        for call in case.calls:
            feed = self.layers.runner.feed(session, case.case, call, given, state)
            calls.append(session.run(list(piece.gives.values()), feed))
            state = {PAST_QUERY: dict(zip(piece.gives, calls[-1], strict=True)).get(QUERY, state[PAST_QUERY])}
        found = (np.concatenate(of_calls) for of_calls in zip(*calls, strict=True))
        return {name: torch.from_numpy(values) for name, values in zip(piece.gives, found, strict=True)}

    # Heads

    def _head(self, piece: HeadPiece, slice_: ModelProto) -> None:
        names = self.heads.names_of(piece.name)
        quantised = self.layers.weights.quantised(names)
        weights = self.layers.weights.computed(names, quantised)
        given = self._through(piece, self.exact, self._eager(piece, weights, torch.float64))
        exact_choices = self._choices(piece, weights, given, torch.float64)
        self.exact.choices = exact_choices or self.exact.choices
        if piece.name != WORKING:
            given = [*given, drawn(given, _DRAWN_ROWS, piece.takes)]
        exact: dict[torch.dtype, list[Values]] = {}  # what float64 makes of inputs that were rounded to a type
        for chain in self.chains:
            dtype = torch_type(chain.arithmetic)
            rounded = [in_type(values, dtype) for values in given]
            if dtype not in exact:
                exact[dtype] = self._each(piece, self._eager(piece, weights, torch.float64), rounded)
            self._head_in(chain, piece, slice_, weights, rounded, exact[dtype])
        if self.original.cases:
            before = self.layers.weights.original(names)
            self._through(piece, self.original, self._eager(piece, before, torch.float32))

    def _head_in(
        self,
        chain: _Chain,
        piece: HeadPiece,
        slice_: ModelProto,
        weights: Mapping[str, Matrix],
        given: Sequence[Values],
        exact: Sequence[Values],
    ) -> None:
        """A head in one arithmetic: alone on `given`, of which float64 makes `exact`, and in the chain."""
        dtype, rounding = torch_type(chain.arithmetic), self.layers.rounding_in(chain.arithmetic)
        eager = self._eager(piece, weights, dtype, rounding)
        run = self._slice(self._open(slice_, chain.arithmetic), piece)
        actual = self._each(piece, run, [in_type(values, torch.float32) for values in given])
        chosen = self._choices(piece, weights, given, torch.float64)
        usually = self._choices(piece, weights, given, dtype, rounding)
        usual = self._each(piece, eager, given)
        self._judge(piece, chain.arithmetic, actual, exact, usual, chosen, usually)
        if self.layers.pieces[-1].verdict is Verdict.FAIL:
            self.layers.observe_head(self._as_run(piece, chain.arithmetic, slice_, given, actual, exact))
        taken = self._through(piece, chain.eager, eager)
        chain.eager.choices = self._choices(piece, weights, taken, dtype, rounding) or chain.eager.choices
        self._through(piece, chain.bundle, run, of_graph=True)

    def _eager(
        self,
        piece: HeadPiece,
        weights: Mapping[str, Matrix],
        dtype: torch.dtype,
        rounding: RoundInput = lambda _: None,
    ) -> Compute:
        return lambda given: self.heads.run(piece.name, weights, given, dtype, rounding)

    def _slice(self, session: ort.InferenceSession, piece: HeadPiece) -> Compute:
        """A piece of the bundle's graph as a computation, by the names of pieces."""

        def compute(given: Values) -> Values:
            state: dict[str, Any] = {piece.takes[n]: values.numpy() for n, values in given.items() if n in piece.takes}
            rows = one_token_each(len(next(iter(given.values()))))  # the rest is read for its shape
            feed = self.layers.runner.feed(session, rows, rows.pieces[0], {}, state)
            found = session.run(list(piece.gives.values()), feed)
            return {name: torch.from_numpy(values) for name, values in zip(piece.gives, found, strict=True)}

        return compute

    def _each(self, piece: HeadPiece, compute: Compute, given: Sequence[Values]) -> list[Values]:
        """Each case's rows; those of a memory by themselves, for banks may have other sizes."""
        return [compute(values) for values in given] if piece.name == WORKING else together(compute, given)

    def _through(self, piece: HeadPiece, stream: Stream, compute: Compute, *, of_graph: bool = False) -> list[Values]:
        """Takes a stream through a piece; what went in, with the memory's state, case by case."""
        names = piece.takes if of_graph else {name: name for name in piece.takes}
        given = stream.given(names)
        if piece.name == WORKING:
            pairs = zip(stream.cases, given, strict=True)
            compared = len(self.layers.cases)
            runs = [
                remembering(compute, case, values[REPRESENTATION], with_state=case.at < compared)
                for case, values in pairs
            ]
            given, found = [run[0] for run in runs], [run[1] for run in runs]
        else:
            found = together(compute, given)
        stream.keep([_by_graph(piece, values) for values in found] if of_graph else found)
        return given

    def _choices(
        self,
        piece: HeadPiece,
        weights: Mapping[str, Matrix],
        given: Sequence[Values],
        dtype: torch.dtype,
        rounding: RoundInput = lambda _: None,
    ) -> list[Choice | None]:
        """What the working memory chooses from, case by case; of another piece, nothing."""
        if piece.name != WORKING:
            return []
        return [self.heads.choice(weights, values, dtype, rounding) for values in given]

    # Logits

    def _logits(self, piece: HeadPiece, slice_: ModelProto) -> None:
        logits = HeadLogits(self.layers, piece, self.weights)
        exact = logits.eager(self.exact, torch.float64)
        for chain in self.chains:
            session = self._open(slice_, chain.arithmetic)
            alone = logits.alone(session, self.exact, chain.arithmetic)
            self.layers.pieces.append(PieceResult(piece.name, chain.arithmetic, *max(alone, key=nearness)))
            rounding = self.layers.rounding_in(chain.arithmetic)
            eager = logits.eager(chain.eager, torch_type(chain.arithmetic), rounding)
            ran = logits.of_bundle(session, chain.bundle)
            rows = [self._rows_of_chain(chain, at, ran[at], exact[at], eager[at]) for at in range(len(exact))]
            everything = [row for of_case in rows for row in of_case]
            self.in_chain[piece.name, chain.arithmetic] = worst_of(RowComparison(chain.arithmetic, everything))
            self.results += self._end_to_end(chain.arithmetic, rows)
        if self.original.cases:  # of the bundle as it runs, whose chain is the last
            self._predict(ran[len(exact) :], logits.eager(self.original, torch.float32, weights=self.original_weights))

    # Judging

    def _judge(
        self,
        piece: HeadPiece,
        arithmetic: Arithmetic,
        actual: Sequence[Values],
        exact: Sequence[Values],
        eager: Sequence[Values],
        chosen: Sequence[Choice | None] = (),
        usually: Sequence[Choice | None] = (),
    ) -> None:
        """Keeps of a piece alone the number that is nearest to its gate."""
        rows: list[Row] = []
        for at, found in enumerate(zip(actual, exact, eager, strict=True)):
            pair = (chosen[at], usually[at]) if chosen else (None, None)
            rows += rows_between(list(piece.gives), piece.scores, found, pair)
        case, worst = worst_of(RowComparison(arithmetic, rows, vectors=_vectors(piece)))
        self.layers.pieces.append(PieceResult(piece.name, arithmetic, case, worst))

    def _note_chain(self, piece: HeadPiece, chain: _Chain) -> None:
        """How far the chain is from float64 behind a piece: everything before it has rounded, on both sides."""
        rows: list[Row] = []
        for at in range(len(self.exact.cases)):
            bundle = {name: chain.bundle.values[at][value] for name, value in piece.gives.items()}
            found = [bundle, self.exact.values[at], chain.eager.values[at]]
            rows += rows_between(
                list(piece.gives), piece.scores, found, (self.exact.choices[at], chain.eager.choices[at])
            )
        compared = RowComparison(chain.arithmetic, rows, vectors=_vectors(piece), vector_gates=LOGIT_GATES)
        self.in_chain[piece.name, chain.arithmetic] = worst_of(compared)

    def _rows_of_chain(
        self, chain: _Chain, at: int, actual: list[NDArray], exact: list[NDArray], eager: list[NDArray]
    ) -> list[Row]:
        scores = [name for piece in self.pieces for name in piece.scores]
        streams = (chain.bundle, self.exact, chain.eager)
        found = [{name: stream.values[at][name] for name in scores} for stream in streams]
        pair = (self.exact.choices[at], chain.eager.choices[at])
        return list(rows_between(scores, scores, found, pair, (actual, exact, eager)))

    def _end_to_end(self, arithmetic: Arithmetic, cases: Sequence[list[Row]]) -> Iterator[CaseResult]:
        """By the gates of a whole model; the eager model's error in a case of few values is what it usually is."""
        usual: dict[str, float] = {}
        for rows in cases:
            for name, share in RowComparison(arithmetic, rows).noise_shares().items():
                usual[name] = max(usual.get(name, 0.0), share)
        for case, rows in zip(self.exact.cases, cases, strict=True):
            yield RowComparison(arithmetic, rows, usual).result(case.name, case.case.batch, case.longest)

    def _predict(self, actual: Sequence[list[NDArray]], expected: Sequence[list[NDArray]]) -> None:
        for case, given, wanted in zip(self.original.cases, actual, expected, strict=True):
            told = [a[-1].any() or w[-1].any() for a, w in zip(given, wanted, strict=True)]  # not blocked on both sides
            if any(told):
                rows = [np.stack([logits[-1] for logits in of])[told] for of in (given, wanted)]
                self.predictions.append((rows[0], rows[1], case.case.input_ids[0, 1:][told]))

    def _open(self, slice_: ModelProto, arithmetic: Arithmetic) -> ort.InferenceSession:
        model = in_arithmetic(slice_, arithmetic)
        return open_slice(model, self.layers.graph.folder, provider=self.layers.provider)

    def _as_run(
        self,
        piece: HeadPiece,
        arithmetic: Arithmetic,
        slice_: ModelProto,
        given: Sequence[Values],
        actual: Sequence[Values],
        exact: Sequence[Values],
    ) -> HeadRun:
        """Of the case whose rows are furthest from float64, the number that was judged; where a decision was, all
        scores."""
        worst = self.layers.pieces[-1].measurement.positions
        names = [worst] if worst in piece.gives else list(piece.scores)
        errors = [sum(_distance(a[name], e[name]) for name in names) for a, e in zip(actual, exact, strict=True)]
        at = int(np.argmax(errors))
        taken, rows = given[at], one_token_each(len(exact[at][names[0]]))
        state: dict[str, Any] = {piece.takes[n]: array_of(v.float()) for n, v in taken.items() if v.is_floating_point()}
        state |= {piece.takes[name]: array_of(v) for name, v in taken.items() if not v.is_floating_point()}
        inputs = {value.name: value for value in slice_.graph.input}
        feed = self.layers.runner.feed_of(list(inputs), rows, rows.pieces[0], {}, state)
        expected = {piece.gives[name]: array_of(exact[at][name]).astype(np.float64) for name in names}
        return HeadRun(piece.name, arithmetic, slice_, feed, expected)


def _distance(actual: Tensor, exact: Tensor) -> float:
    return float((actual.double() - exact.double()).abs().nan_to_num(torch.inf).max())


def _vectors(piece: HeadPiece) -> list[str]:
    return [name for name in piece.gives if name not in piece.scores]


def _by_graph(piece: HeadPiece, values: Values) -> Values:
    """What a piece gave by the names of the graph."""
    return {piece.gives[name]: value for name, value in values.items() if name in piece.gives}
