"""A fault small enough to send to somebody: the slice that is wrong, with its own weights and no others, what goes in,
what should come out, and a script that needs numpy and ONNX Runtime alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto

from cosmos_export.errors import TargetError
from cosmos_export.onnx.slices import stored_array
from cosmos_export.parity import metrics
from cosmos_export.parity.arithmetic import in_arithmetic
from cosmos_export.parity.diff import Fault
from cosmos_export.parity.layer_cases import LayerCase, Piece
from cosmos_export.parity.layered import PieceRun
from cosmos_export.parity.layered_heads import HeadRun
from cosmos_export.parity.slice_runs import open_slice, with_float32_ends

MODEL, WEIGHTS = "model.onnx", "model.onnx.data"
INPUTS, EXPECTED, ABOUT, SCRIPT = "inputs.npz", "expected.npz", "about.json", "reproduce.py"

_SCRIPT = '''"""Runs model.onnx on inputs.npz, compares what it gives with expected.npz. Needs numpy and onnxruntime."""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime

here = Path(__file__).parent
about = json.loads((here / "about.json").read_text(encoding="utf-8"))
inputs, expected = dict(np.load(here / "inputs.npz")), dict(np.load(here / "expected.npz"))
session = onnxruntime.InferenceSession(here / "model.onnx", providers=onnxruntime.get_available_providers()[-1:])
wrong = False
for name, given in zip(expected, session.run(list(expected), inputs), strict=True):
    # Where the expected value is NaN, there is padding, and anything may stand.
    asked = ~np.isnan(expected[name])
    error = np.abs(given.astype(np.float64) - expected[name])[asked]
    largest = float(error.max()) if np.isfinite(error).all() else float("inf")
    wrong |= not largest <= about["allowed"]
    print(f"{name}: largest error {largest:.3g}, allowed {about['allowed']:.3g}")
print(f"{about['what']}: {'WRONG' if wrong else 'right'}")
sys.exit(int(wrong))
'''


def write_reproduction(folder: Path, fault: Fault) -> None:
    """Writes the reproduction of a fault into a new folder. Raises TargetError where there is one already."""
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise TargetError(f"{folder} cannot be made: {error.strerror}; give another --reproduce") from None
    model, inputs, expected = _piece(fault)
    _write_model(folder, model, fault.comparison.graph.folder)
    np.savez(folder / INPUTS, **inputs)
    np.savez(folder / EXPECTED, **expected)  # type: ignore[arg-type]
    (folder / ABOUT).write_text(json.dumps(_about(fault), indent=2) + "\n", encoding="utf-8")
    (folder / SCRIPT).write_text(_SCRIPT, encoding="utf-8")


def _piece(fault: Fault) -> tuple[ModelProto, dict[str, Any], dict[str, NDArray[Any]]]:
    """The slice, and of the case that is furthest beyond its gate the run with the largest error: (model, inputs,
    expected outputs). A step finds float64's own keys and values in its cache."""
    comparison, run, step = fault.comparison, fault.run, fault.step
    if isinstance(run, HeadRun):
        return in_arithmetic(run.slice, run.arithmetic), run.taken, run.expected
    at = next(i for i, case in enumerate(comparison.cases) if case.name == fault.case)
    case, runner = comparison.cases[at], comparison.runner
    if step is not None:
        slice_, given, expected, cached = step.slice, step.taken[at], step.expected[at], step.cached[at]
    else:
        given = {_input_of(fault, run): run.inputs[at].float().numpy()} if run.inputs else {}
        slice_, expected, cached = run.slice, {_output_of(fault, run): run.exact[at].numpy()}, []
    model = in_arithmetic(slice_, run.arithmetic)
    session = open_slice(model, comparison.graph.folder, provider=comparison.provider)
    fed: list[tuple[Piece, dict[str, Any]]] = []
    layers = [] if run.layer is None else [run.layer]
    runner.run(session, case, given, layers, lambda piece, feed: fed.append((piece, feed)))
    tried = []
    for piece, feed in fed:
        wanted = {name: runner.as_piece(name, value, piece) for name, value in expected.items()}
        for (past, present), exact in zip(runner.cache_of(run.layer or 0), cached, strict=False):
            feed = feed | {past: _cache(case, piece.starts, exact, 0.0).astype(np.float32)}
            wanted[present] = _cache(case, piece.lengths, exact, np.nan)
        ran = session.run(list(wanted), feed)
        error = max(_largest(*pair) for pair in zip(ran, wanted.values(), strict=True))
        tried.append((error, feed, wanted))
    _, inputs, outputs = max(tried, key=lambda one: one[0])
    return model, inputs, outputs


def _cache(case: LayerCase, tokens: Sequence[int], exact: NDArray[np.float64], beyond: float) -> NDArray[np.float64]:
    """A cache (B, K, L, E) whose row b holds what is before the case and so many tokens of it, and `beyond` after them;
    of keys or values (B, L, K, E)."""
    cache = np.moveaxis(exact, 2, 1).copy()
    for row, count in enumerate(tokens):
        cache[row, :, case.past + count :] = beyond
    return cache


def _largest(actual: NDArray[Any], expected: NDArray[Any]) -> float:
    asked = ~np.isnan(expected)
    return metrics.max_abs_error(actual[asked], expected[asked])


def _input_of(fault: Fault, run: PieceRun) -> str:
    graph, layer = fault.comparison.graph, run.layer
    return graph.hidden[-1 if layer is None else layer]


def _output_of(fault: Fault, run: PieceRun) -> str:
    graph = fault.comparison.graph
    if run.layer is not None:
        return graph.hidden[run.layer + 1]
    return fault.comparison.values()[-1 if run.inputs else 0]


def _write_model(folder: Path, model: ModelProto, weights: Path) -> None:
    """The slice with its own weights beside it."""
    own = ModelProto()
    own.CopyFrom(with_float32_ends(model))
    for tensor in own.graph.initializer:
        if tensor.external_data:
            tensor.raw_data = stored_array(tensor, weights).tobytes()
            tensor.ClearField("external_data")
            tensor.data_location = TensorProto.DEFAULT
    onnx.save_model(
        own, folder / MODEL, save_as_external_data=True, location=WEIGHTS, size_threshold=1024, convert_attribute=False
    )
    if (folder / WEIGHTS).is_file():
        (folder / WEIGHTS).chmod(0o644)  # onnx makes it private; the rest of the folder is not


def _about(fault: Fault) -> Mapping[str, Any]:
    measured = fault.measurement
    finite = measured.error if np.isfinite(measured.error) else None
    return {
        "what": fault.what,
        "arithmetic": fault.run.arithmetic,
        "case": fault.case,
        "largest_error": finite,
        "allowed": measured.allowed,
        "eager_error": measured.eager_error,
        "reference": "the eager PyTorch model in float64, on these inputs",
    }
