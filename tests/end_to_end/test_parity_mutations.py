"""The gates bite: a bundle with one fault in it must not pass, and each fault here is one that exporters make.

Faults of the graph are made by exporting a model whose code is changed while it is traced; the reference runs
afterwards, on the code as it is. Faults of the weights are made in the bundle's own bytes.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor

from cosmos_export import bundle as bundles
from cosmos_export.checkpoint import Checkpoint
from cosmos_export.model import attention, backbone
from cosmos_export.model.attention import FullSequenceAttention, grouped_query_attention
from cosmos_export.model.loading import skeleton
from cosmos_export.onnx.passes import run_passes
from cosmos_export.onnx.signature import graph_spec
from cosmos_export.onnx.trace import trace
from cosmos_export.onnx.weights import attach_weights
from cosmos_export.parity.gates import Verdict
from cosmos_export.parity.report import ParityReport
from cosmos_export.parity.verify import verify_bundle
from cosmos_export.pipeline import ExportedBundle
from cosmos_export.recipe import ExportRecipe

GRAPH = "full_sequence"
Mutation = Callable[[pytest.MonkeyPatch], None]


def test_without_a_fault_the_same_way_of_exporting_passes(small_checkpoint, recipe, tmp_path, monkeypatch):
    report = _export_and_verify(small_checkpoint, recipe, tmp_path, monkeypatch, lambda _: None)
    assert report.passed
    assert all(stored.passed for stored in report.stored)


def _query_positions_off_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries turned by the angle of the position before theirs; turning queries and keys alike would be no fault."""

    def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        before = (torch.arange(x.shape[1], device=x.device) - 1).clamp(min=0)
        return true_rotate(x, *((cos[before], sin[before]) if x.shape[2] == 6 else (cos, sin)))

    true_rotate = attention.rotate
    monkeypatch.setattr(attention, "rotate", rotate)


def _rotary_pairs_interleaved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Channel pairs (2i, 2i + 1), as other models have them, instead of (i, i + E/2)."""

    def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        even, odd = x[..., ::2], x[..., 1::2]
        cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
        return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)

    monkeypatch.setattr(attention, "rotate", rotate)


def _tiled_kv_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Query head h reads key/value head h % K (`repeat`) instead of h // G (`repeat_interleave`)."""

    def tiled(query: Tensor, key: Tensor, value: Tensor, *rest: object) -> Tensor:
        order = [h // 3 + 2 * (h % 3) for h in range(6)]  # where the head that reads kv head h // 3 is under `repeat`
        back = [order.index(h) for h in range(6)]
        moved = torch.stack([query[:, :, h] for h in order], dim=2)
        attended = grouped_query_attention(moved, key, value, *rest)  # type: ignore[arg-type]
        return torch.stack([attended[:, :, h] for h in back], dim=2)

    monkeypatch.setattr(attention, "grouped_query_attention", tiled)


def _wrong_scale(factor: float) -> Mutation:
    def mutate(monkeypatch: pytest.MonkeyPatch) -> None:
        def scaled(query: Tensor, *rest: object) -> Tensor:
            return grouped_query_attention(query * factor, *rest)  # type: ignore[arg-type]

        monkeypatch.setattr(attention, "grouped_query_attention", scaled)

    return mutate


def _no_causal_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    def unmasked(self: FullSequenceAttention, *args: object, causal: bool, dropout: float = 0.0) -> None:
        true_init(self, *args, causal=False, dropout=dropout)  # type: ignore[arg-type]

    true_init = FullSequenceAttention.__init__
    monkeypatch.setattr(FullSequenceAttention, "__init__", unmasked)


def _mask_one_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each query also sees the next key."""

    def leaky(self: FullSequenceAttention, query: Tensor, key: Tensor, value: Tensor, positions: Tensor) -> Tensor:
        allowed = self.positions <= positions[:, None] + 1
        return grouped_query_attention(query, key, value, allowed)

    monkeypatch.setattr(FullSequenceAttention, "_attend", leaky)


def _norm_without_eps(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self: backbone.RMSNorm, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-3) * self.weight

    monkeypatch.setattr(backbone.RMSNorm, "forward", forward)


@pytest.mark.parametrize(
    "mutate",
    [
        pytest.param(_query_positions_off_by_one, id="rotary positions off by one"),
        pytest.param(_rotary_pairs_interleaved, id="rotary pairs interleaved"),
        pytest.param(_tiled_kv_heads, id="kv heads tiled"),
        pytest.param(_wrong_scale(16**-0.5), id="scale 1/E"),
        pytest.param(_wrong_scale(1.001), id="scale off by a thousandth"),
        pytest.param(_no_causal_mask, id="no causal mask"),
        pytest.param(_mask_one_short, id="mask one short"),
        pytest.param(_norm_without_eps, id="another norm_eps"),
    ],
)
def test_a_fault_of_the_graph_fails_the_logit_gate(mutate, small_checkpoint, recipe, tmp_path, monkeypatch):
    report = _export_and_verify(small_checkpoint, recipe, tmp_path, monkeypatch, mutate)
    assert all(stored.passed for stored in report.stored), "the fault is in the graph, so the weights are still equal"
    assert report.count(Verdict.FAIL) > 0
    assert not report.passed


def _one_ulp(weights: np.ndarray) -> None:
    weights[0, 0] = np.nextafter(weights[0, 0], np.float32(np.inf))


def _one_weight(weights: np.ndarray) -> None:
    weights[3, 5] += 0.05


def _not_a_number(weights: np.ndarray) -> None:
    weights[1, 1] = np.nan


def _one_position_late(weights: np.ndarray) -> None:
    weights[1:] = weights[:-1].copy()


@pytest.mark.parametrize(
    ("tensor", "perturb", "logits_show_it"),
    [
        pytest.param("layers.1.feed_forward.w2.weight.transposed", _one_weight, True, id="one weight"),
        pytest.param("tok_embeddings.weight", _one_weight, True, id="one weight of the tied embedding"),
        pytest.param("layers.0.attention.q_proj.weight.transposed", _not_a_number, True, id="NaN"),
        pytest.param("layers.0.attention.q_proj.weight.transposed", _one_ulp, False, id="one weight by one rounding"),
        pytest.param("rope.cos", _one_position_late, True, id="cosines one position late"),
    ],
)
def test_a_fault_of_the_weights_fails(tensor, perturb, logits_show_it, small_bundle, small_checkpoint, tmp_path):
    folder = _copy_with_fault(small_bundle, tmp_path, {tensor: perturb})
    report = verify_bundle(folder, small_checkpoint)
    assert not report.passed
    assert [p.split()[0] for p in report.stored_problems] == [tensor]
    assert (report.count(Verdict.FAIL) > 0) == logits_show_it


def test_both_rotary_tables_late_changes_no_logit_but_fails(small_bundle, small_checkpoint, tmp_path):
    """Attention sees differences of positions only: the logits cannot show this fault, the stored tensors do."""
    fault = {
        "rope.cos": _table_one_position_late(np.cos),
        "rope.sin": _table_one_position_late(np.sin),
    }
    report = verify_bundle(_copy_with_fault(small_bundle, tmp_path, fault), small_checkpoint)
    assert report.count(Verdict.FAIL) == 0
    assert not report.passed
    assert {p.split()[0] for p in report.stored_problems} == {"rope.cos", "rope.sin"}


def _table_one_position_late(function: Callable[[np.ndarray], np.ndarray]) -> Callable[[np.ndarray], None]:
    def shift(table: np.ndarray) -> None:
        length, half = table.shape
        frequencies = 1 / 10000.0 ** (np.arange(half, dtype=np.float64) / half)
        table[:] = function((np.arange(length) + 1)[:, None] * frequencies)

    return shift


def test_nan_is_counted_and_never_passes(small_bundle, small_checkpoint, tmp_path):
    folder = _copy_with_fault(small_bundle, tmp_path, {"layers.0.attention.q_proj.weight.transposed": _not_a_number})
    report = verify_bundle(folder, small_checkpoint)
    assert all(case.verdict is Verdict.FAIL for case in report.cases)
    assert all(case.nonfinite > 0 for case in report.cases)
    assert report.to_dict()["cases"][0]["measurements"][0]["error"] is None, "JSON has no infinity"


def _export_and_verify(
    checkpoint: Checkpoint, recipe: ExportRecipe, folder: Path, monkeypatch: pytest.MonkeyPatch, mutate: Mutation
) -> ParityReport:
    """The pipeline's steps, with `mutate` in force while the model is traced and only then."""
    spec = graph_spec(GRAPH, checkpoint.config, recipe.opset)
    with monkeypatch.context() as patched:
        mutate(patched)
        program = trace(skeleton(checkpoint.config), GRAPH, spec)
    program = run_passes(program, recipe)
    attach_weights(program, checkpoint, recipe)
    bundles.write_graph(folder, GRAPH, spec.file, program)
    bundles.write_companions(folder, checkpoint)
    bundles.seal(folder, "mutant", checkpoint, recipe, {GRAPH: spec}, causal=True)
    return verify_bundle(folder, checkpoint)


def _copy_with_fault(bundle: ExportedBundle, tmp_path: Path, faults: dict[str, Callable[[np.ndarray], None]]) -> Path:
    """A copy of the bundle in which each named initializer was changed in place in the external data."""
    folder = tmp_path / "faulty"
    shutil.copytree(bundle.path, folder)
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    for name, perturb in faults.items():
        initializer = next(i for i in graph.initializer if i.name == name)
        entry = {e.key: e.value for e in initializer.external_data}
        values = np.memmap(
            folder / entry["location"], "float32", "r+", offset=int(entry["offset"]), shape=tuple(initializer.dims)
        )
        perturb(values)
        values.flush()
    return folder
