"""Parity without the whole model in memory: embedding, each layer, final norm and logits, one after another.

    B  batch    T  tokens of a case    D  dim    V  vocab_size

For each piece its tensors are read once. The stored ones are compared with what the recipe makes of them, the eager
model's piece computes in float64 and in the bundle's arithmetic, the bundle's own piece (a slice of its graph) computes
with ONNX Runtime, and all of it is let go. Every piece is judged twice:

- alone, on float64's own input, so that a fault is found where it is;
- in a chain, each piece on what the one before it gave, so that at the end there are the logits of the running graph,
  the eager model's in the same arithmetic, and float64's, compared by the gates of a whole model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
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
from cosmos_export.parity.arithmetic import arithmetic_of, compute_in_float32
from cosmos_export.parity.cases import Skipped
from cosmos_export.parity.compared_logits import case_result
from cosmos_export.parity.gates import LOGIT_GATES, PIECE_GATES, Arithmetic, judge
from cosmos_export.parity.layer_cases import LayerCase, build_layer_cases
from cosmos_export.parity.quality import Quality, quality_of
from cosmos_export.parity.reference import round_to_int8
from cosmos_export.parity.report import CaseResult, Measurement, PieceResult, gate_share
from cosmos_export.parity.slice_runs import CaseRunner, open_slice
from cosmos_export.parity.stored import StoredTensors, difference, judged, wanted_tensors
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
) -> LayeredResult:
    """Compares a bundle's `graph`, a plain decoder, with the model of `checkpoint`, a piece of it in memory at a time.

    `with_quality` also measures the distance from the model before rounding, on `text` or on the cases' random tokens.
    Raises ExportError where the graph cannot be cut at its layers.
    """
    return LayerComparison(graph, spec, checkpoint, recipe, progress, causal, provider, with_quality, text).run()


class LayerComparison:
    """One pass over the pieces of a model. Who wants to see more than the verdicts overrides `observe`."""

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
        self.layers, self.with_quality, self.text = config.n_layers, with_quality, text
        self.with_heads = False  # whose logits are not the hidden state's: the last piece is then the final norm
        self.cases, self.skipped = build_layer_cases(config, cached=self.runner.cached)
        self.exact: list[Tensor] = []  # hidden states (B, T, D) of every case, in float64 all the way
        self.chains = [_Chain(arithmetic) for arithmetic in arithmetics_of(recipe)]
        self.before_rounding: list[Tensor] = []  # the same in the float32 model before rounding
        self.pieces: list[PieceResult] = []
        self.compared: list[tuple[str, str | None]] = []

    @property
    def quality_cases(self) -> list[LayerCase]:
        """Cases of the chain that the model before rounding computes, too."""
        if not self.with_quality:
            return []
        return list(self.text) if self.text is not None else [case for case in self.cases if not case.past]

    @property
    def chained(self) -> list[LayerCase]:
        """Cases that pass through the chains: those of the comparison, and then the text."""
        return [*self.cases, *(self.text or () if self.with_quality else ())]

    def run(self) -> LayeredResult:
        self.progress.stage("Comparing layer by layer with float64")
        total = self.layers + 2
        self._embedding()
        for layer in range(self.layers):
            self.progress.update(layer + 1, total)
            self._layer(layer)
        self.progress.update(total - 1, total)
        cases, quality = self._logits()
        self.progress.update(total, total)
        stored = judged(self.compared, wanted_tensors(self.weights.checkpoint, None))
        return LayeredResult(stored, self.pieces, cases, self.skipped, quality)

    def observe(self, run: PieceRun) -> None:
        """Is told of every piece when it has been judged, while its tensors are in memory."""

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
        names = [FINAL_NORM, EMBEDDING]
        weights = self._read(names, skip=EMBEDDING)
        name, logits = (NORM_PIECE, self.graph.normed) if self.with_heads else (LOGITS_PIECE, self.runner.logits)
        before = self.graph.hidden[-1]
        slice_ = self.graph.cut([before], [logits])

        def eager(
            lanes: Sequence[Lane], dtype: torch.dtype, rounding: Callable[[str], Rounding | None] = lambda _: None
        ) -> list[Tensor]:
            if self.with_heads:
                return self.model.normed(weights, lanes, dtype)
            return self.model.logits(weights, lanes, dtype, rounding)

        def bundle(
            arithmetic: Arithmetic, cases: Sequence[LayerCase], given: Sequence[NDArray]
        ) -> list[NDArray[np.float32]]:
            return self._run(slice_, arithmetic, cases, [{before: hidden} for hidden in given], logits)

        exact = self._piece(name, None, weights, slice_, eager, bundle)
        results = [result for chain in self.chains for result in self._end_to_end(chain, exact)]
        if not self.with_quality:
            return results, None
        lanes = lanes_of(self.quality_cases, self.before_rounding)
        expected = self.model.logits(self.weights.original(names), lanes, torch.float32)
        return results, self._quality(expected)

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
            rounding = self.rounding if chain.arithmetic is Arithmetic.INT8_ACTIVATIONS else lambda _: None
            both = eager(lanes_of(self.cases * 2, [*inputs[dtype], *chain.eager]), dtype, rounding)
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

    def _quality(self, expected: Sequence[Tensor]) -> Quality | None:
        """Of the bundle as it runs, whose chain is the last."""
        ran = dict(zip((id(case) for case in self.chained), self.chains[-1].bundle, strict=True))
        rows = []
        for case, wanted in zip(self.quality_cases, expected, strict=True):
            for row, computed in enumerate(case.computed):
                if computed.all() and len(computed) > 1:
                    tokens = case.input_ids[row, 1:]
                    rows.append((ran[id(case)][row, :-1], wanted.numpy()[row, :-1], tokens))
        named = "the text given" if self.text is not None else "random tokens"
        return quality_of(rows, named, self.recipe.precision, self.weights.checkpoint, gated=self.text is not None)

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

    def rounding(self, name: str) -> Rounding | None:
        """How the input of a product with this tensor is rounded where kernels compute with int8 activations."""
        form = self.recipe.form_of(name)
        if form is None or form.accuracy_level != INT8_ACTIVATIONS:
            return None
        return lambda x: round_to_int8(x, form.block_size)


def in_arithmetic(model: ModelProto, arithmetic: Arithmetic) -> ModelProto:
    """The slice as it is, or for the tight gate of a quantised one with products that do not round their inputs."""
    if arithmetic is not Arithmetic.FLOAT32:
        return model
    exact = ModelProto()
    exact.CopyFrom(model)
    compute_in_float32(exact.graph)
    return exact


def arithmetics_of(recipe: ExportRecipe) -> list[Arithmetic]:
    """What a bundle is compared in: its own arithmetic, and before it the tighter one where there is."""
    arithmetic = arithmetic_of(recipe)
    return [Arithmetic.FLOAT32, arithmetic] if arithmetic is Arithmetic.INT8_ACTIVATIONS else [arithmetic]


def torch_type(arithmetic: Arithmetic) -> torch.dtype:
    """What the eager model computes with in this arithmetic."""
    return {Arithmetic.FLOAT16: torch.float16, Arithmetic.BFLOAT16: torch.bfloat16}.get(arithmetic, torch.float32)


def lanes_of(cases: Sequence[LayerCase], hidden: Sequence[Tensor]) -> list[Lane]:
    """Each case with its hidden state."""
    return [Lane(case, x) for case, x in zip(cases, hidden, strict=True)]


def _span(case: LayerCase, after: Tensor, before: Tensor) -> float:
    """The range of what a piece adds to its input (B, T, D); where it gives something else, zero."""
    if after.shape != before.shape:
        return 0.0
    return metrics.value_range((after - before.double()).numpy()[case.computed])
