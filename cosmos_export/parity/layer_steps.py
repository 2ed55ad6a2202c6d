"""Within a layer: each step alone, from the norm to the down projection, on float64's own values.

B  batch    T  tokens of a case    P  positions before a case    K  key/value heads    E  head_dim
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from onnx import ModelProto
from torch import Tensor

from cosmos_export.onnx.slices import LayerSteps
from cosmos_export.parity import metrics
from cosmos_export.parity.gates import PIECE_GATES, Arithmetic, Verdict, judge
from cosmos_export.parity.layered import LayerComparison, PieceRun, in_arithmetic, lanes_of, torch_type
from cosmos_export.parity.report import Measurement, gate_share
from cosmos_export.parity.slice_runs import open_slice
from cosmos_export.parity.streamed_model import apart

ATTENTION = "rotary and attention"


@dataclass(frozen=True)
class Step:
    """A part of a layer: the values of the graph that it takes and gives."""

    name: str
    takes: tuple[str, ...]
    gives: tuple[str, ...]


@dataclass(frozen=True)
class StepResult:
    """One value that a step gives, alone on float64's own input, in the case that is nearest to its gate."""

    step: Step
    value: str
    case: str
    measurement: Measurement

    @property
    def verdict(self) -> Verdict:
        return self.measurement.verdict


@dataclass(frozen=True)
class StepRun:
    """A step that was run alone: its slice, and for each case what it took and what it should have given."""

    step: Step
    slice: ModelProto
    taken: list[dict[str, NDArray[np.float32]]]
    expected: list[dict[str, NDArray[np.float64]]]
    cached: list[list[NDArray[np.float64]]]
    """Keys and values (B, P + T, K, E) of each case, where the step has a cache."""


def steps_of(values: LayerSteps) -> list[Step]:
    """The steps of a layer in their order."""
    v = values
    return [
        Step("norm before attention", (v.hidden,), (v.normed,)),
        Step("q, k, v projections", (v.normed,), _once(v.query, v.key, v.value)),
        Step(ATTENTION, _once(v.query, v.key, v.value), (v.attended,)),
        Step("output projection, residual", (v.hidden, v.attended), (v.middle,)),
        Step("norm before feed-forward", (v.middle,), (v.normed_middle,)),
        Step("gate, up projections", (v.normed_middle,), _once(v.gate, v.up)),
        Step("activation", _once(v.gate, v.up), (v.activated,)),
        Step("down projection, residual", (v.middle, v.activated), (v.output,)),
    ]


def compare_steps(comparison: LayerComparison, run: PieceRun) -> tuple[list[StepResult], dict[Step, StepRun]]:
    """Runs every step of a layer alone, and judges what it gives; keys and values in the cache besides."""
    if run.layer is None:
        raise ValueError(f"{run.name} has no steps")
    values = comparison.graph.steps(run.layer)
    exact = _Inside(comparison, run, values, torch.float64, [x.double() for x in run.inputs])
    eager = _Inside(comparison, run, values, torch_type(run.arithmetic), run.inputs)
    results: list[StepResult] = []
    runs: dict[Step, StepRun] = {}
    for step in steps_of(values):
        if set(step.gives) & set(step.takes):
            continue  # a fault that short-circuits a layer leaves nothing to run
        caches = comparison.graph.cache_outputs(run.layer) if step.name == ATTENTION else []
        model = comparison.graph.cut(step.takes, [*step.gives, *caches])
        session = open_slice(
            in_arithmetic(model, run.arithmetic), comparison.graph.folder, provider=comparison.provider
        )
        taken = [{name: exact.values[name][i].astype(np.float32) for name in step.takes} for i in exact.cases]
        found = [
            comparison.runner.run(session, case, given, [run.layer])
            for case, given in zip(comparison.cases, taken, strict=True)
        ]
        expected = [{name: exact.values[name][i] for name in step.gives} for i in exact.cases]
        cached = [
            [x[i].double().numpy() for x in (exact.keys, exact.cached_values)] if caches else [] for i in exact.cases
        ]
        runs[step] = StepRun(step, model, taken, expected, cached)
        results += [_result(comparison, run, step, n, _given(n, found, exact, eager)) for n in step.gives]
        results += [
            _result(comparison, run, step, f"cached {part}", _cached(comparison, name, part, found, exact, eager))
            for part, name in zip(("keys", "values"), caches, strict=False)
        ]
    return results, runs


class _Inside:
    """What the eager model computes within a layer, by the names of the graph's values."""

    def __init__(
        self,
        comparison: LayerComparison,
        run: PieceRun,
        values: LayerSteps,
        dtype: torch.dtype,
        inputs: Sequence[Tensor],
    ) -> None:
        lanes = lanes_of(comparison.cases, inputs)
        taken, given = dict[str, Tensor](), dict[str, Tensor]()

        def watch(name: str, x: Tensor, y: Tensor) -> None:
            taken[name], given[name] = x, y

        rounding = (
            comparison.rounding if run.arithmetic is Arithmetic.INT8_ACTIVATIONS and dtype != torch.float64 else None
        )
        layer = run.layer or 0
        more = {} if rounding is None else {"round_input": rounding}
        comparison.model.layer(layer, run.weights, lanes, dtype, watch=watch, **more)
        attend = comparison.model.attend(layer, lanes, dtype)
        q, k, v = (given[f"attention.{name}"] for name in ("q_proj", "k_proj", "v_proj"))
        attend(layer, q, k, v)
        self.keys, self.cached_values = attend.keys, attend.values
        gate, up = given["feed_forward.w1"], given["feed_forward.w3"]
        found = {
            values.hidden: taken["norm1"],
            values.normed: given["norm1"],
            **_side_by_side(
                {values.query: [], values.key: [], values.value: []},
                zip((values.query, values.key, values.value), (q, k, v), strict=True),
            ),
            values.attended: taken["attention.o_proj"],
            values.middle: taken["norm2"],
            values.normed_middle: given["norm2"],
            **_side_by_side({values.gate: [], values.up: []}, zip((values.gate, values.up), (gate, up), strict=True)),
            values.activated: taken["feed_forward.w2"],
            values.output: given[""],
        }
        self.values = {name: [x.double().numpy() for x in apart(value[0], lanes)] for name, value in found.items()}
        self.cases = range(len(lanes))


def _side_by_side(parts: dict[str, list[Tensor]], named: Iterator[tuple[str, Tensor]] | zip) -> dict[str, Tensor]:
    """Packed projections are one value, whose columns are theirs one after another."""
    for name, tensor in named:
        parts[name].append(tensor)
    return {name: torch.cat(tensors, dim=-1) for name, tensors in parts.items()}


Found = Sequence[Mapping[str, NDArray]]
# Of one case, (B, T, ...) each: what the slice gave, what float64 does, and the eager model.
Values = Iterator[tuple[NDArray, NDArray, NDArray]]


def _given(name: str, found: Found, exact: _Inside, eager: _Inside) -> Values:
    yield from zip((values[name] for values in found), exact.values[name], eager.values[name], strict=True)


def _cached(comparison: LayerComparison, name: str, part: str, found: Found, exact: _Inside, eager: _Inside) -> Values:
    """Keys or values (B, T, K, E) of the cases' tokens, as they lie in the cache."""
    for i, case in enumerate(comparison.cases):
        both = [(x.keys if part == "keys" else x.cached_values)[i].double().numpy() for x in (exact, eager)]
        stored = np.moveaxis(found[i][name], 1, 2)[:, case.past : case.length]
        yield stored, both[0][:, case.past :], both[1][:, case.past :]


def _result(comparison: LayerComparison, run: PieceRun, step: Step, value: str, values: Values) -> StepResult:
    """Of the case that is nearest to its gate."""
    measured = [
        (case.name, _measure(run.arithmetic, *(array[case.computed] for array in arrays)))
        for case, arrays in zip(comparison.cases, values, strict=True)
    ]
    return StepResult(step, value, *max(measured, key=lambda pair: gate_share(pair[1])))


def _measure(arithmetic: Arithmetic, actual: NDArray, exact: NDArray, eager: NDArray) -> Measurement:
    error, eager_error = metrics.max_abs_error(actual, exact), metrics.max_abs_error(eager, exact)
    allowed = PIECE_GATES[arithmetic].allowed(eager_error, metrics.value_range(exact))
    return Measurement("all", error, eager_error, allowed, judge(error, allowed, None))


def _once(*names: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(names))
