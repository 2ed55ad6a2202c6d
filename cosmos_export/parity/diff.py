"""Where does a bundle leave its model? The first layer, and the step in it.

Twice over, and both against float64 with the weights that the bundle computes with:

- in the whole graph, with the hidden state after each layer as an output: error by layer, as it grows;
- each piece alone, on float64's own input, so that a fault in layer 3 is not blamed on layer 4, and in a layer that is
  wrong alone each of its steps.

The reference is read one layer at a time (`layered`), so this works for models of any size; only the whole graph needs
a session with all of the bundle's weights, which ONNX Runtime maps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from cosmos_export.checkpoint import Checkpoint
from cosmos_export.errors import ParityUnavailableError
from cosmos_export.parity import metrics
from cosmos_export.parity.calibrated import with_stored_levels
from cosmos_export.parity.gates import LOGIT_GATES, Arithmetic, Verdict, judge
from cosmos_export.parity.layer_steps import StepResult, StepRun, compare_steps
from cosmos_export.parity.layered import LayerComparison, PieceRun, in_arithmetic
from cosmos_export.parity.layered_heads import HeadRun
from cosmos_export.parity.report import Measurement, PieceResult, gate_share
from cosmos_export.parity.reporting import capabilities_of
from cosmos_export.parity.slice_runs import open_slice
from cosmos_export.parity.stored import StoredTensors, judged, wanted_tensors
from cosmos_export.progress import Progress, Silent
from cosmos_export.recipe import ExportRecipe
from cosmos_runtime import ONNX, Bundle, choose_graph


@dataclass(frozen=True)
class Setting:
    """How ONNX Runtime is told to run the graph."""

    provider: str = "cpu"
    threads: int = 0  # ONNX Runtime's own choice
    optimization: str = "all"

    def __str__(self) -> str:
        threads = f"{self.threads} thread{'s' * (self.threads != 1)}" if self.threads else "threads as it likes"
        return f"{self.provider}, optimisation {self.optimization}, {threads}"


@dataclass(frozen=True)
class PieceDiff:
    """One piece in one arithmetic: its value in the whole graph, it alone, and its steps where it is wrong."""

    name: str
    arithmetic: Arithmetic
    in_graph: Measurement
    case: str
    alone: PieceResult
    steps: tuple[StepResult, ...] = ()

    @property
    def wrong_step(self) -> StepResult | None:
        """The first step that is wrong alone."""
        return next((step for step in self.steps if step.verdict is Verdict.FAIL), None)


@dataclass(frozen=True)
class Changed:
    """What a setting changes against the first one: the largest differences by piece, (name, difference)."""

    setting: Setting
    differences: tuple[tuple[str, float], ...] = ()
    beyond: str | None = None
    """The first piece after which the graph leaves the model under this setting."""
    error: str | None = None
    """Why it could not be run."""

    @property
    def first(self) -> str | None:
        """The first piece whose numbers are others; None where all are equal bit for bit."""
        return next((name for name, difference in self.differences if difference), None)


@dataclass(frozen=True)
class DiffReport:
    """Everything that was compared."""

    bundle: str
    setting: Setting
    pieces: tuple[PieceDiff, ...]
    stored: StoredTensors
    settings: tuple[Changed, ...] = ()
    heads_chained: bool = False
    """Whether there are capability heads: behind the final norm, "in the graph" is then of their pieces chained."""

    @property
    def first_alone(self) -> PieceDiff | None:
        """The first piece that is wrong by itself: where the fault is."""
        return next((piece for piece in self.pieces if piece.alone.verdict is Verdict.FAIL), None)

    @property
    def first_in_graph(self) -> PieceDiff | None:
        """The first piece after which the running graph is beyond its gate: where the fault shows."""
        return next((piece for piece in self.pieces if piece.in_graph.verdict is Verdict.FAIL), None)

    @property
    def equal(self) -> bool:
        """Nothing beyond a gate, and every stored tensor equal."""
        beyond = any(changed.beyond is not None for changed in self.settings)
        return self.first_alone is None and self.first_in_graph is None and not beyond and self.stored.passed

    def summary(self) -> str:
        """One sentence."""
        if self.equal:
            kinds = len({piece.name for piece in self.pieces})
            share = max(gate_share(p.in_graph) for p in self.pieces)
            return f"no difference: {kinds} pieces equal float64 within the gate (largest error {share:.0%} of it)"
        sentences = []
        alone, shown = self.first_alone, self.first_in_graph
        if alone is not None:
            step = alone.wrong_step
            where = "" if step is None else f", in its {step.step.name}"
            sentences.append(f"{alone.name} is wrong{where}")
        if alone is None and shown is not None:
            sentences.append(
                f"every piece alone is right, and the whole graph leaves the model at {shown.name}: what ONNX Runtime "
                f"makes of pieces together; compare --optimization off"
            )
        sentences += [f"with {c.setting}, the graph leaves the model at {c.beyond}" for c in self.settings if c.beyond]
        if self.stored.problems:
            sentences.append(f"stored tensors differ: {self.stored.problems[0]}")
        return "; ".join(sentences)

    def to_dict(self) -> dict[str, Any]:
        """The whole report as JSON values; an infinite error becomes null."""
        return {
            "equal": self.equal,
            "bundle": self.bundle,
            "summary": self.summary(),
            "setting": vars(self.setting),
            "first_alone": None if self.first_alone is None else self.first_alone.name,
            "first_in_graph": None if self.first_in_graph is None else self.first_in_graph.name,
            "stored_problems": list(self.stored.problems),
            "heads_chained": self.heads_chained,
            "pieces": [_piece_dict(piece) for piece in self.pieces],
            "settings": [_changed_dict(changed) for changed in self.settings],
        }


@dataclass(frozen=True)
class Fault:
    """What a reproduction is made of: the first wrong piece or, where one was found, the first wrong step of it."""

    what: str
    comparison: ObservedComparison
    run: PieceRun | HeadRun
    step: StepRun | None
    case: str
    measurement: Measurement


@dataclass(frozen=True)
class Diff:
    """A report, and the fault behind it, if there is one."""

    report: DiffReport
    fault: Fault | None


def diff_bundle(
    bundle: Bundle,
    checkpoint: Checkpoint,
    *,
    causal: bool = True,
    settings: Sequence[Setting] = (Setting(),),
    progress: Progress | None = None,
) -> Diff:
    """Compares a bundle with its model piece by piece, and the first of `settings` with the others.

    Raises ParityUnavailableError for a bundle of a PyTorch program, ExportError for a graph that cannot be cut.
    """
    progress, manifest = progress or Silent(), bundle.manifest
    if manifest.graph_format != ONNX:
        raise ParityUnavailableError(
            f"{manifest.name} is a {manifest.graph_format} program, and diff cuts ONNX graphs; export the checkpoint "
            f"with `cosmos-export onnx` and look there, or use `cosmos-export verify` on this bundle"
        )
    recipe, (_, spec) = ExportRecipe.from_manifest(manifest.recipe), choose_graph(manifest)
    graph = bundle.file(spec.file)
    if recipe.calibration is not None and not checkpoint.calibrated:
        checkpoint = with_stored_levels(checkpoint, graph, recipe)
    comparison = ObservedComparison(
        graph, spec, checkpoint, recipe, progress, causal, settings[0].provider, False, None, capabilities_of(manifest)
    )
    comparison.run()
    progress.stage("Running the whole graph with its hidden states as outputs")
    pieces = _pieces(comparison, settings[0])
    changed = _settings(comparison, settings, progress) if len(settings) > 1 else []
    wanted = wanted_tensors(checkpoint, comparison.capabilities)
    report = DiffReport(
        bundle=manifest.name,
        setting=settings[0],
        pieces=tuple(pieces),
        stored=judged(comparison.compared, wanted),
        settings=tuple(changed),
        heads_chained=comparison.heads is not None,
    )
    return Diff(report, comparison.fault)


@dataclass
class _Streams:
    """By piece: float64's values and the eager model's in the bundle's arithmetic, of every case."""

    exact: list[Tensor] = field(default_factory=list)
    eager: list[Tensor] = field(default_factory=list)


class ObservedComparison(LayerComparison):
    """Keeps what the reference computes at each border, and looks into the pieces that are wrong."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.streams: dict[tuple[str, Arithmetic], _Streams] = {}
        self.steps: dict[tuple[str, Arithmetic], list[StepResult]] = {}
        self.fault: Fault | None = None

    def observe(self, run: PieceRun) -> None:
        key = (run.name, run.arithmetic)
        self.streams[key] = _Streams(run.exact_chain, run.eager_chain)
        result = self.pieces[-1]
        if result.verdict is not Verdict.FAIL:
            return
        found, runs = compare_steps(self, run) if run.layer is not None else ([], {})
        self.steps[key] = found
        if self.fault is None:
            wrong = next((step for step in found if step.verdict is Verdict.FAIL), None)
            if wrong is None:
                self.fault = Fault(run.name, self, run, None, result.case, result.measurement)
            else:
                what = f"{run.name}, {wrong.step.name}"
                self.fault = Fault(what, self, run, runs[wrong.step], wrong.case, wrong.measurement)

    def observe_head(self, run: HeadRun) -> None:
        result = self.pieces[-1]
        self.fault = self.fault or Fault(run.piece, self, run, None, result.case, result.measurement)

    def values(self) -> list[str]:
        """The graph's values at the borders, piece by piece."""
        last = self.runner.logits if self.capabilities is None else self.graph.normed
        return [*self.graph.hidden, last]

    def tapped(self, arithmetic: Arithmetic, setting: Setting) -> list[list[NDArray[np.float32]]]:
        """The values at the borders in the running graph: case by case, piece by piece."""
        layers = range(self.layers)
        caches = [name for layer in layers for name in self.graph.cache_outputs(layer)]
        model = in_arithmetic(self.graph.cut([], [*self.values(), *caches]), arithmetic)
        session = open_slice(
            model,
            self.graph.folder,
            provider=setting.provider,
            threads=setting.threads,
            optimization=setting.optimization,
        )
        ran = (self.runner.run(session, case, {}, layers) for case in self.cases)
        return [[found[name] for name in self.values()] for found in ran]


def _pieces(comparison: ObservedComparison, setting: Setting) -> list[PieceDiff]:
    names = list(dict.fromkeys(piece.name for piece in comparison.pieces))
    of_heads = {} if comparison.heads is None else comparison.heads.in_chain
    found = []
    for chain in comparison.chains:
        tapped = comparison.tapped(chain.arithmetic, setting)
        for at, name in enumerate(names):
            key = (name, chain.arithmetic)
            in_chain = of_heads.get(key)
            case_name, worst = in_chain or _worst_in_graph(comparison, key, [case[at] for case in tapped])
            alone = next(p for p in comparison.pieces if (p.name, p.arithmetic) == key)
            steps = tuple(comparison.steps.get(key, ()))
            found.append(PieceDiff(name, chain.arithmetic, worst, case_name, alone, steps))
    return found


def _worst_in_graph(
    comparison: ObservedComparison, key: tuple[str, Arithmetic], values: Sequence[NDArray]
) -> tuple[str, Measurement]:
    """The case of a piece that is nearest to its gate in the running graph, whose values are one a case."""
    measured = [
        (case.name, _in_graph(key[1], values[i], comparison.streams[key], i, case.computed))
        for i, case in enumerate(comparison.cases)
    ]
    return max(measured, key=lambda pair: gate_share(pair[1]))


def _in_graph(
    arithmetic: Arithmetic, tapped: NDArray, streams: _Streams, case: int, computed: NDArray[np.bool_]
) -> Measurement:
    """A value of the running graph by the gate of a model: everything before it has rounded, on both sides."""
    exact = streams.exact[case].numpy()[computed]
    eager = streams.eager[case].double().numpy()[computed]
    error, eager_error = metrics.max_abs_error(tapped[computed], exact), metrics.max_abs_error(eager, exact)
    allowed = LOGIT_GATES[arithmetic].allowed(eager_error, metrics.value_range(exact))
    return Measurement("all", error, eager_error, allowed, judge(error, allowed, None))


def _settings(comparison: ObservedComparison, settings: Sequence[Setting], progress: Progress) -> list[Changed]:
    """The bundle as it is, under each setting, against the first."""
    progress.stage("Running the graph under other settings")
    names = list(dict.fromkeys(piece.name for piece in comparison.pieces))[: len(comparison.values())]
    arithmetic = comparison.chains[-1].arithmetic
    before = comparison.tapped(arithmetic, settings[0])
    found = []
    for done, setting in enumerate(settings[1:]):
        progress.update(done, len(settings) - 1)
        try:
            ran = comparison.tapped(arithmetic, setting)
        except Exception as error:  # ONNX Runtime's errors have no common base class
            reason = str(error).splitlines()[0]
            found.append(Changed(setting, error=reason))
            continue
        largest = [_largest(comparison, before, ran, at) for at in range(len(names))]
        judged_pieces = (
            _worst_in_graph(comparison, (name, arithmetic), [case[at] for case in ran]) for at, name in enumerate(names)
        )
        wrong = [n for n, (_, found_) in zip(names, judged_pieces, strict=True) if found_.verdict is Verdict.FAIL]
        found.append(Changed(setting, tuple(zip(names, largest, strict=True)), wrong[0] if wrong else None))
    return found


def _largest(comparison: ObservedComparison, before: list[list[NDArray]], after: list[list[NDArray]], at: int) -> float:
    pairs = zip(comparison.cases, before, after, strict=True)
    return max(metrics.max_abs_error(b[at][case.computed], a[at][case.computed]) for case, a, b in pairs)


def _piece_dict(piece: PieceDiff) -> dict[str, Any]:
    return {
        "name": piece.name,
        "arithmetic": piece.arithmetic,
        "in_graph": _finite(vars(piece.in_graph)) | {"case": piece.case},
        "alone": _finite(vars(piece.alone.measurement)) | {"case": piece.alone.case},
        "steps": [
            {"step": step.step.name, "value": step.value, "case": step.case} | _finite(vars(step.measurement))
            for step in piece.steps
        ],
    }


def _changed_dict(changed: Changed) -> dict[str, Any]:
    differences = [{"piece": name, "difference": d if np.isfinite(d) else None} for name, d in changed.differences]
    facts = {"first": changed.first, "beyond": changed.beyond, "error": changed.error}
    return vars(changed.setting) | facts | {"differences": differences}


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    return {k: None if isinstance(v, float) and not np.isfinite(v) else v for k, v in values.items()}
