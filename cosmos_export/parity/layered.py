"""Parity without the whole model in memory: embedding, each layer, final norm and logits, one after another.

    B  batch    T  tokens of a case    D  dim    V  vocab_size

For each piece its tensors are read once. The stored ones are compared with what the recipe makes of them, the eager
model's piece computes in float64 and in the bundle's arithmetic, the bundle's own piece (a slice of its graph) computes
with ONNX Runtime, and all of it is let go. Every piece is judged twice:

- alone, on float64's own input, so that a fault is found where it is;
- in a chain, each piece on what the one before it gave, so that at the end there are the logits of the running graph,
  the eager model's in the same arithmetic, and float64's, compared by the gates of a whole model.

Where the bundle has capability heads, they take the place of the last piece, one after another (`layered_heads`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from onnx import ModelProto
from torch import Tensor

from cosmos_export.checkpoint import EMBEDDING, Checkpoint
from cosmos_export.onnx.quantize import INT8_ACTIVATIONS
from cosmos_export.onnx.signature import ROTARY_COS, ROTARY_SIN, parts_of, quantized_part, source_of
from cosmos_export.onnx.slices import FINAL_NORM, SlicedGraph, stored_array
from cosmos_export.onnx.weights import WeightReader, as_array
from cosmos_export.parity import metrics
from cosmos_export.parity.arithmetic import arithmetics_of, in_arithmetic, torch_type
from cosmos_export.parity.cases import Skipped
from cosmos_export.parity.compared_logits import case_result
from cosmos_export.parity.gates import LOGIT_GATES, PIECE_GATES, Arithmetic, judge
from cosmos_export.parity.layer_cases import LayerCase, build_layer_cases, random_row
from cosmos_export.parity.layered_heads import HeadComparison, HeadRun
from cosmos_export.parity.quality import Prediction, Quality, quality_of
from cosmos_export.parity.reference import round_to_int8
from cosmos_export.parity.report import CaseResult, Measurement, PieceResult, gate_share
from cosmos_export.parity.slice_runs import CaseRunner, open_slice
from cosmos_export.parity.stored import StoredTensors, difference, judged, wanted_tensors
from cosmos_export.parity.stored_heads import compare_heads
from cosmos_export.parity.streamed_heads import RoundInput
from cosmos_export.parity.streamed_model import Lane, Matrix, Rounding, StreamedModel, StreamedWeights
from cosmos_export.progress import Progress
from cosmos_export.recipe import ExportRecipe
from cosmos_runtime import GraphSpec

EMBEDDING_PIECE, NORM_PIECE, LOGITS_PIECE = "embedding", "final norm", "logits"


@dataclass(frozen=True)
class LayeredResult:
    """What comparing layer by layer found."""

    stored: StoredTensors
    pieces: list[PieceResult]
    cases: list[CaseResult]
    skipped: list[Skipped]
    quality: Quality | None


@dataclass
class _Chain:
    """The hidden states (B, T, D) of every case in one arithmetic: what the bundle's own pieces gave each other, and
    what the eager model's did."""

    arithmetic: Arithmetic
    bundle: list[NDArray[np.float32]] = field(default_factory=list)
    eager: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class PieceRun:
    """What one piece computed in one arithmetic, for each case: hidden states (B, T, D), or logits (B, T, V)."""

    name: str
    layer: int | None
    arithmetic: Arithmetic
    weights: Mapping[str, Matrix]
    slice: ModelProto
    inputs: list[Tensor]
    """What went into the piece alone; nothing goes into the embedding."""
    exact: list[Tensor]
    """What float64 makes of these inputs."""
    bundle: list[NDArray[np.float32]]
    """What the bundle's piece makes of them."""
    exact_chain: list[Tensor]
    eager_chain: list[Tensor]


def compare_layers(
    graph: Path,
    spec: GraphSpec,
    checkpoint: Checkpoint,
    recipe: ExportRecipe,
    progress: Progress,
    *,
    causal: bool = True,
    provider: str = "cpu",
    with_quality: bool = False,
    text: Sequence[LayerCase] | None = None,
    capabilities: Sequence[str] | None = None,
) -> LayeredResult:
    """Compares a bundle's `graph` with the model of `checkpoint`, a piece of it in memory at a time: a plain decoder,
    or one with the heads of `capabilities` behind it.

    `with_quality` also measures the distance from the model before rounding, on `text` or on random tokens.
    Raises ExportError where the graph cannot be cut at its layers or its heads.
    """
    return LayerComparison(
        graph, spec, checkpoint, recipe, progress, causal, provider, with_quality, text, capabilities
    ).run()


class LayerComparison:
    """One pass over the pieces of a model. Who wants to see more than the verdicts overrides `observe`, and for heads
    `observe_head`."""

    def __init__(
        self,
        graph: Path,
        spec: GraphSpec,
        checkpoint: Checkpoint,
        recipe: ExportRecipe,
        progress: Progress,
        causal: bool,
        provider: str,
        with_quality: bool,
        text: Sequence[LayerCase] | None,
        capabilities: Sequence[str] | None = None,
    ) -> None:
        config = checkpoint.config
        self.graph, self.recipe, self.progress, self.provider = (
            SlicedGraph.open(graph, spec),
            recipe,
            progress,
            provider,
        )
        self.runner = CaseRunner(spec, config)
        self.model = StreamedModel(config, causal=causal)
        self.weights = StreamedWeights(checkpoint, recipe)
        self.layers, self.with_quality, self.gated = config.n_layers, with_quality, text is not None
        self.capabilities = capabilities
        self.cases, self.skipped = build_layer_cases(config, cached=self.runner.cached)
        self.read = list(text or ()) if with_quality else []
        if with_quality and text is None and capabilities is not None:
            self.read = [random_row(config)]  # token by token, each of which is a call
        self.exact: list[Tensor] = []  # hidden states (B, T, D) of every case, in float64 all the way
        self.chains = [_Chain(arithmetic) for arithmetic in arithmetics_of(recipe)]
        self.before_rounding: list[Tensor] = []  # the same in the float32 model before rounding
        self.pieces: list[PieceResult] = []
        self.compared: list[tuple[str, str | None]] = []
        self.heads: HeadComparison | None = None
        self._done, self._total = 0, config.n_layers + 2

    @property
    def quality_cases(self) -> list[LayerCase]:
        """Cases of the chain that the model before rounding computes, too."""
        if not self.with_quality:
            return []
        return self.read or [case for case in self.cases if not case.past]

    @property
    def chained(self) -> list[LayerCase]:
        """Cases that pass through the chains: those of the comparison, and then those of quality alone."""
        return [*self.cases, *self.read]

    def run(self) -> LayeredResult:
        self.progress.stage("Comparing layer by layer with float64")
        self._embedding()
        self.advance()
        for layer in range(self.layers):
            self._layer(layer)
            self.advance()
        cases, quality = self._logits() if self.capabilities is None else self._heads(self.capabilities)
        stored = judged(self.compared, wanted_tensors(self.weights.checkpoint, self.capabilities))
        return LayeredResult(stored, self.pieces, cases, self.skipped, quality)

    def advance(self) -> None:
        """Tells the progress that a piece is done."""
        self._done += 1
        self.progress.update(self._done, self._total)

    def observe(self, run: PieceRun) -> None:
        """Is told of every piece when it has been judged, while its tensors are in memory."""

    def observe_head(self, run: HeadRun) -> None:
        """Is told of every head that is wrong."""

    # Pieces

    def _embedding(self) -> None:
        weights = self._read([EMBEDDING], first=True)
        self.exact = [self.model.embedded(case, weights).double() for case in self.cases]
        slice_ = self.graph.cut([], [self.graph.hidden[0]])
        for chain in self.chains:
            dtype = torch_type(chain.arithmetic)
            chain.bundle = self._run(slice_, chain.arithmetic, self.chained, [{}] * len(self.chained))
            chain.eager = [exact.to(dtype) for exact in self.exact]
            alone = zip(self.cases, chain.bundle, self.exact, chain.eager, strict=False)
            self._judge(EMBEDDING_PIECE, chain.arithmetic, alone, [0.0] * len(self.cases))
            streams = (self.exact, chain.bundle[: len(self.cases)], self.exact, chain.eager)
            self.observe(PieceRun(EMBEDDING_PIECE, None, chain.arithmetic, weights, slice_, [], *streams))
        if self.with_quality:
            original = self.weights.original([EMBEDDING])
            self.before_rounding = [self.model.embedded(case, original) for case in self.quality_cases]

    def _layer(self, layer: int) -> None:
        names = self.weights.names_of(f"layers.{layer}.")
        weights = self._read(names)
        before, after = self.graph.hidden[layer], self.graph.hidden[layer + 1]
        slice_ = self.graph.cut([before], [after, *self.graph.cache_outputs(layer)])

        def eager(
            lanes: Sequence[Lane], dtype: torch.dtype, rounding: Callable[[str], Rounding | None] = lambda _: None
        ) -> list[Tensor]:
            return self.model.layer(layer, weights, lanes, dtype, rounding)

        def bundle(
            arithmetic: Arithmetic, cases: Sequence[LayerCase], given: Sequence[NDArray]
        ) -> list[NDArray[np.float32]]:
            return self._run(slice_, arithmetic, cases, [{before: hidden} for hidden in given], after, [layer])

        self.exact = self._piece(f"layer {layer}", layer, weights, slice_, eager, bundle)
        if self.with_quality:
            original = self.weights.original(names)
            lanes = lanes_of(self.quality_cases, self.before_rounding)
            self.before_rounding = self.model.layer(layer, original, lanes, torch.float32)

    def _logits(self) -> tuple[list[CaseResult], Quality | None]:
        weights = self._read([FINAL_NORM, EMBEDDING], skip=EMBEDDING)
        exact = self._last(LOGITS_PIECE, self.runner.logits, self.model.logits, weights)
        results = [result for chain in self.chains for result in self._end_to_end(chain, exact)]
        if not self.with_quality:
            return results, None
        lanes = lanes_of(self.quality_cases, self.before_rounding)
        expected = self.model.logits(self.weights.original([FINAL_NORM, EMBEDDING]), lanes, torch.float32)
        return results, self._quality(self._predictions(expected))

    def _heads(self, capabilities: Sequence[str]) -> tuple[list[CaseResult], Quality | None]:
        """What comes behind the final norm where the logits are not the hidden state's alone."""
        weights = self._read([FINAL_NORM, EMBEDDING], skip=EMBEDDING)

        def eager(lanes: Sequence[Lane], dtype: torch.dtype, _: object = None) -> list[Tensor]:
            return self.model.normed(weights, lanes, dtype)

        exact = self._last(NORM_PIECE, self.graph.normed, lambda _, *given: eager(*given), weights)
        lanes = lanes_of(self.quality_cases, self.before_rounding)
        original = self.weights.original([FINAL_NORM, EMBEDDING]) if lanes else {}
        before = self.model.normed(original, lanes, torch.float32) if lanes else []
        wanted = wanted_tensors(self.weights.checkpoint, capabilities)
        self.compared += compare_heads(self.graph, WeightReader(self.weights.checkpoint, self.recipe), wanted)
        self.heads = HeadComparison(self, capabilities, weights, original, exact, before)
        self._total += len(self.heads.pieces) - 1
        results, predictions = self.heads.run()
        return results, self._quality(predictions) if self.with_quality else None

    def _last(
        self, name: str, value: str, eager: Callable[..., list[Tensor]], weights: Mapping[str, Matrix]
    ) -> list[Tensor]:
        """The piece behind the last layer, which gives `value`."""
        before = self.graph.hidden[-1]
        slice_ = self.graph.cut([before], [value])

        def bundle(
            arithmetic: Arithmetic, cases: Sequence[LayerCase], given: Sequence[NDArray]
        ) -> list[NDArray[np.float32]]:
            return self._run(slice_, arithmetic, cases, [{before: hidden} for hidden in given], value)

        found = self._piece(name, None, weights, slice_, partial(eager, weights), bundle)
        self.advance()
        return found

    def _piece(
        self,
        name: str,
        layer: int | None,
        weights: Mapping[str, Matrix],
        slice_: ModelProto,
        eager: Callable[..., list[Tensor]],
        bundle: Callable[[Arithmetic, Sequence[LayerCase], Sequence[NDArray]], list[NDArray[np.float32]]],
    ) -> list[Tensor]:
        """Runs a piece alone and in its chains, judges it, and gives what float64 makes of its own stream."""
        count, inputs = len(self.cases), {}
        for chain in self.chains:
            dtype = torch_type(chain.arithmetic)
            inputs[dtype] = [exact.to(dtype) for exact in self.exact]  # what a piece alone computes on
        doubles = [x.double() for rounded in inputs.values() for x in rounded]
        everything = eager(lanes_of(self.cases * (1 + len(inputs)), [*self.exact, *doubles]), torch.float64)
        alone = {dtype: everything[(i + 1) * count : (i + 2) * count] for i, dtype in enumerate(inputs)}
        for chain in self.chains:
            dtype = torch_type(chain.arithmetic)
            lanes = lanes_of(self.cases * 2, [*inputs[dtype], *chain.eager])
            both = eager(lanes, dtype, self.rounding_in(chain.arithmetic))
            given = [*(x.float().numpy() for x in inputs[dtype]), *chain.bundle]
            ran = bundle(chain.arithmetic, [*self.cases, *self.chained], given)
            measured = zip(self.cases, ran[:count], alone[dtype], both[:count], strict=True)
            added = [_span(case, a, x) for case, a, x in zip(self.cases, alone[dtype], inputs[dtype], strict=True)]
            self._judge(name, chain.arithmetic, measured, added)
            chain.bundle, chain.eager = ran[count:], both[count:]
            streams = (inputs[dtype], alone[dtype], ran[:count], everything[:count], chain.eager)
            self.observe(PieceRun(name, layer, chain.arithmetic, weights, slice_, *streams))
        return everything[:count]

    # Comparing

    def _judge(
        self,
        name: str,
        arithmetic: Arithmetic,
        measured: Iterator[tuple[LayerCase, NDArray, Tensor, Tensor]] | zip,
        ranges: Sequence[float],
    ) -> None:
        """Keeps the case of a piece that is nearest to its gate. `ranges` of zero are the values' own."""
        gates = LOGIT_GATES if name == LOGITS_PIECE else PIECE_GATES
        found: list[tuple[str, Measurement]] = []
        for (case, actual, exact, eager), span in zip(measured, ranges, strict=True):
            computed = case.computed
            given, wanted, usual = actual[computed], exact.numpy()[computed], eager.double().numpy()[computed]
            error, eager_error = metrics.max_abs_error(given, wanted), metrics.max_abs_error(usual, wanted)
            allowed = gates[arithmetic].allowed(eager_error, span or metrics.value_range(wanted))
            measurement = Measurement("all", error, eager_error, allowed, judge(error, allowed, None))
            found.append((case.name, measurement))
        case_name, worst = max(found, key=lambda pair: gate_share(pair[1]))
        self.pieces.append(PieceResult(name, arithmetic, case_name, worst))

    def _end_to_end(self, chain: _Chain, exact: Sequence[Tensor]) -> Iterator[CaseResult]:
        for case, actual, wanted, eager in zip(self.cases, chain.bundle, exact, chain.eager, strict=False):
            computed = case.computed
            yield case_result(
                case.name,
                (case.batch, case.length),
                chain.arithmetic,
                actual[computed][None],
                wanted.numpy()[computed][None],
                eager.float().numpy()[computed][None],
            )

    def _predictions(self, expected: Sequence[Tensor]) -> Iterator[Prediction]:
        """Of the bundle as it runs, whose chain is the last."""
        ran = dict(zip((id(case) for case in self.chained), self.chains[-1].bundle, strict=True))
        for case, wanted in zip(self.quality_cases, expected, strict=True):
            for row, computed in enumerate(case.computed):
                if computed.all() and len(computed) > 1:
                    tokens = case.input_ids[row, 1:]
                    yield ran[id(case)][row, :-1], wanted.numpy()[row, :-1], tokens

    def _quality(self, predictions: Iterable[Prediction]) -> Quality | None:
        named = "the text given" if self.gated else "random tokens"
        return quality_of(list(predictions), named, self.recipe.precision, self.weights.checkpoint, gated=self.gated)

    # Reading

    def _read(self, names: Sequence[str], *, first: bool = False, skip: str | None = None) -> dict[str, Matrix]:
        """These tensors as the bundle computes with them, after its stored ones of this piece were compared."""
        quantised = self.weights.quantised(names)
        reader = WeightReader(quantised, self.recipe)
        of_piece = {name for name in names if name != skip} | ({ROTARY_COS, ROTARY_SIN} if first else set())
        for name, tensor in self.graph.initializers.items():
            parts = parts_of(source_of(quantized_part(name)[0])[0])
            if of_piece.issuperset(parts):
                problem = difference(name, stored_array(tensor, self.graph.folder), as_array(reader.read(name)))
                self.compared += [(part, problem) for part in parts]
        return self.weights.computed(names, quantised)

    # Running

    def _run(
        self,
        slice_: ModelProto,
        arithmetic: Arithmetic,
        cases: Sequence[LayerCase],
        given: Sequence[dict[str, NDArray]],
        output: str | None = None,
        layers: Sequence[int] = (),
    ) -> list[NDArray[np.float32]]:
        """A value (B, T, ...) of the slice for each case: `output`, or the only one there is."""
        session = open_slice(in_arithmetic(slice_, arithmetic), self.graph.folder, provider=self.provider)
        name = output or session.get_outputs()[0].name
        pairs = zip(cases, given, strict=True)
        return [self.runner.run(session, case, values, layers)[name] for case, values in pairs]

    def rounding_in(self, arithmetic: Arithmetic) -> RoundInput:
        """How inputs of products are rounded in this arithmetic, beside its type."""
        return self.rounding if arithmetic is Arithmetic.INT8_ACTIVATIONS else lambda _: None

    def rounding(self, name: str) -> Rounding | None:
        """How the input of a product with this tensor is rounded where kernels compute with int8 activations."""
        form = self.recipe.form_of(name)
        if form is None or form.accuracy_level != INT8_ACTIVATIONS:
            return None
        return lambda x: round_to_int8(x, form.block_size)


def lanes_of(cases: Sequence[LayerCase], hidden: Sequence[Tensor]) -> list[Lane]:
    """Each case with its hidden state."""
    return [Lane(case, x) for case, x in zip(cases, hidden, strict=True)]


def _span(case: LayerCase, after: Tensor, before: Tensor) -> float:
    """The range of what a piece adds to its input (B, T, D); where it gives something else, zero."""
    if after.shape != before.shape:
        return 0.0
    return metrics.value_range((after - before.double()).numpy()[case.computed])
