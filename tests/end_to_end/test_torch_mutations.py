"""The gates bite on programs that PyTorch runs: faults of the weights are made in the finished file, faults of the
program while it is traced, and a size that a trace would keep does not get past the export."""

from __future__ import annotations

import itertools
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cosmos_export.checkpoint import Checkpoint
from cosmos_export.errors import CosmosExportError, ExportError, ParityError
from cosmos_export.model import in_place_attention
from cosmos_export.model.in_place_attention import InPlaceAttention
from cosmos_export.model.rope import rotary_tables
from cosmos_export.onnx import programs
from cosmos_export.parity.gates import Verdict
from cosmos_export.parity.report import ParityReport
from cosmos_export.parity.verify import Effort, verify_bundle
from cosmos_export.pipeline import ExportedBundle, export_bundle
from cosmos_export.recipe import ExportRecipe
from cosmos_export.torch_programs.products import OUTPUT_PROJECTION
from cosmos_runtime import MANIFEST_NAME, CosmosRuntimeError, describe_file

RECIPES = ["torchscript-fp32", "pt2-fp32"]
Mutation = Callable[[pytest.MonkeyPatch], None]
TRUE_INIT = InPlaceAttention.__init__


def export(checkpoint: Checkpoint, out: Path, recipe: str, effort: Effort = Effort.FULL) -> ExportedBundle:
    return export_bundle(checkpoint, out, ExportRecipe.load(recipe), effort=effort)


@pytest.fixture(scope="module", params=RECIPES)
def bundle(
    request: pytest.FixtureRequest, small_checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory
) -> ExportedBundle:
    """Proven by itself: what fails below fails for its fault."""
    return export(small_checkpoint, tmp_path_factory.mktemp("torch") / request.param, request.param)


# Faults of the weights


def _one_weight(values: np.ndarray) -> None:
    values[3, 5] += 0.05


def _one_ulp(values: np.ndarray) -> None:
    values[0, 0] = np.nextafter(values[0, 0], np.float32(np.inf))


def _not_a_number(values: np.ndarray) -> None:
    values[1, 1] = np.nan


def _one_position_late(values: np.ndarray) -> None:
    values[1:] = values[:-1].copy()


@pytest.mark.parametrize(
    ("tensor", "perturb", "logits_show_it"),
    [
        pytest.param("layers.1.feed_forward.w2.weight", _one_weight, True, id="one weight"),
        pytest.param("tok_embeddings.weight", _one_weight, True, id="one weight of the tied embedding"),
        pytest.param("layers.0.attention.q_proj.weight", _not_a_number, True, id="NaN"),
        pytest.param("layers.0.attention.q_proj.weight", _one_ulp, False, id="one weight by one rounding"),
        pytest.param("rope.cos", _one_position_late, True, id="cosines one position late"),
    ],
)
def test_a_fault_of_the_weights_fails(
    tensor: str,
    perturb: Callable[[np.ndarray], None],
    logits_show_it: bool,
    bundle: ExportedBundle,
    small_checkpoint: Checkpoint,
    tmp_path: Path,
) -> None:
    report = verify_bundle(_with_fault(bundle, small_checkpoint, tmp_path, tensor, perturb), small_checkpoint)
    assert not report.passed
    named = {problem.split()[0] for problem in report.stored_problems}
    assert named <= {tensor, OUTPUT_PROJECTION}
    assert named
    assert bool(_failed(report)) == logits_show_it


def _with_fault(
    bundle: ExportedBundle, checkpoint: Checkpoint, tmp_path: Path, tensor: str, perturb: Callable[[np.ndarray], None]
) -> Path:
    """A copy of the bundle, sealed again, in which the bytes of one tensor are others."""
    folder = tmp_path / "faulty"
    shutil.copytree(bundle.path, folder)
    (spec,) = bundle.manifest.graphs.values()
    stored = _stored(checkpoint, tensor)
    changed = stored.copy()
    perturb(changed)
    _replace_record(folder / spec.file, stored.tobytes(), changed.tobytes())
    files = {**bundle.manifest.files, spec.file: describe_file(folder / spec.file)}
    (folder / MANIFEST_NAME).write_text(replace(bundle.manifest, files=files).to_json(), encoding="utf-8")
    return folder


def _stored(checkpoint: Checkpoint, tensor: str) -> np.ndarray:
    if tensor != "rope.cos":
        return checkpoint.tensor(tensor).numpy()
    config = checkpoint.config
    cos, _ = rotary_tables(config.head_dim, config.rope_theta, config.max_sequence_length, torch.float32)
    return cos.numpy()


def _replace_record(file: Path, old: bytes, new: bytes) -> None:
    """Writes the archive anew, with the one record that is `old` as `new`."""
    with zipfile.ZipFile(file) as archive:
        contents = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    (record,) = [name for name, content in contents.items() if content == old]
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, content in contents.items():
            archive.writestr(name, new if name == record else content)


def test_an_archive_that_is_written_anew_is_no_fault(
    bundle: ExportedBundle, small_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    folder = _with_fault(bundle, small_checkpoint, tmp_path, "tok_embeddings.weight", lambda _: None)
    assert verify_bundle(folder, small_checkpoint, effort=Effort.QUICK).passed


def test_a_level_of_an_8_bit_matrix_is_compared_too(gentle_checkpoint: Checkpoint, tmp_path: Path) -> None:
    """And verified against another checkpoint, whose rows round to other levels."""
    bundle = export(gentle_checkpoint, tmp_path / "int8", "torchscript-int8", Effort.OFF)
    name = "layers.1.feed_forward.w1.weight"
    tensors = {n: gentle_checkpoint.tensor(n).clone() for n in gentle_checkpoint.names}
    row = tensors[name][7]
    row[row.abs().argmin()] += 0.6 * float(row.abs().max()) / 127  # one level of one value, and no scale
    other = Checkpoint.from_tensors(gentle_checkpoint.config, tensors, dict(gentle_checkpoint.origin))
    assert verify_bundle(bundle.path, gentle_checkpoint, effort=Effort.QUICK).passed
    report = verify_bundle(bundle.path, other, effort=Effort.QUICK)
    assert [problem.split(" at ")[0] for problem in report.stored_problems] == [
        f"{name} differs in 1 of {tensors[name].numel()} values, first"
    ]


# Faults of the program


def _query_positions_off_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries turned by the angle of the position before theirs; turning queries and keys alike would be no fault."""

    def init(self: InPlaceAttention, rotary: Any, *rest: Any) -> None:
        TRUE_INIT(self, rotary, *rest)
        before = (self.positions - 1).clamp(min=0)
        angles[:] = [rotary.cos[before], rotary.sin[before]]

    def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return true_rotate(x, *(angles if next(is_query) else (cos, sin)))

    angles: list[Tensor] = []
    is_query = itertools.cycle([True, False])
    true_rotate = in_place_attention.rotate
    monkeypatch.setattr(InPlaceAttention, "__init__", init)
    monkeypatch.setattr(in_place_attention, "rotate", rotate)


def _rotary_pairs_interleaved(monkeypatch: pytest.MonkeyPatch) -> None:
    def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        even, odd = x[..., ::2], x[..., 1::2]
        cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
        return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)

    monkeypatch.setattr(in_place_attention, "rotate", rotate)


def _attention(change: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor | None]]) -> Mutation:
    """What goes into the fused operator is changed first."""

    def mutate(monkeypatch: pytest.MonkeyPatch) -> None:
        def attend(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor, enable_gqa: bool) -> Tensor:
            query, key, value, mask = change(query, key, value, attn_mask)
            return true_attend(query, key, value, attn_mask=mask, enable_gqa=enable_gqa)

        true_attend = in_place_attention.F.scaled_dot_product_attention
        monkeypatch.setattr(in_place_attention.F, "scaled_dot_product_attention", attend)

    return mutate


def _tiled(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Query head h reads key/value head h % K."""
    return query, key.repeat(1, 3, 1, 1), value.repeat(1, 3, 1, 1), mask


def _later_ones_see_more(self: InPlaceAttention, *arguments: Any) -> None:
    TRUE_INIT(self, *arguments)
    places = torch.arange(arguments[1].shape[1])
    self.allowed = (places <= self.positions[..., None] + 1)[:, None]


def _every_row_as_long_as_the_longest(self: InPlaceAttention, rotary: Any, mask: Tensor, *rest: Any) -> None:
    TRUE_INIT(self, rotary, torch.ones_like(mask), *rest)


def _places_one_late(self: InPlaceAttention, *arguments: Any) -> None:
    """A token takes the place before its own in the cache."""
    TRUE_INIT(self, *arguments)
    self.positions = (self.positions - 1).clamp(min=0)


def _init(changed: Callable[..., None]) -> Mutation:
    return lambda monkeypatch: monkeypatch.setattr(InPlaceAttention, "__init__", changed)


def _cache_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy is, and is read in this call."""

    def append(self: InPlaceAttention, part: int, new: Tensor) -> Tensor:
        new = new.transpose(1, 2)
        places = self.positions[:, None, :, None].expand(new.shape)
        return self.cache[part].scatter(2, places, new)[:, :, : self.total]

    monkeypatch.setattr(InPlaceAttention, "_append", append)


def _keys_of_another_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first layer writes its keys where the last one's lie."""

    def append(self: InPlaceAttention, part: int, new: Tensor) -> Tensor:
        return true_append(self, 2 if part == 0 else part, new)

    true_append = InPlaceAttention._append
    monkeypatch.setattr(InPlaceAttention, "_append", append)


def _logits_one_position_early(monkeypatch: pytest.MonkeyPatch) -> None:
    true_pick = programs.pick
    monkeypatch.setattr(programs, "pick", lambda hidden, mask, offsets: true_pick(hidden, mask, offsets + 1))


FAULTS: dict[str, Mutation] = {
    "query positions off by one": _query_positions_off_by_one,
    "rotary pairs interleaved": _rotary_pairs_interleaved,
    "scale off by a thousandth": _attention(lambda q, k, v, mask: (q * 1.001, k, v, mask)),
    "kv heads tiled": _attention(_tiled),
    "no mask": _attention(lambda q, k, v, _: (q, k, v, None)),
    "mask one short": _init(_later_ones_see_more),
    "lengths of rows ignored": _init(_every_row_as_long_as_the_longest),
    "tokens one place late": _init(_places_one_late),
    "cache not written": _cache_not_written,
    "keys of another layer": _keys_of_another_layer,
    "logits one position early": _logits_one_position_early,
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())
def test_a_fault_of_the_program_fails_the_logit_gate(
    fault: Mutation, small_checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reference has no part in it: its attention is another class, and it keeps no cache."""
    fault(monkeypatch)
    with pytest.raises(ParityError) as caught:
        export(small_checkpoint, tmp_path / "bundle", "torchscript-portable-fp32")
    report = caught.value.report
    assert all(stored.passed for stored in report.stored), "the fault is in the program, the weights are still equal"
    assert _failed(report)
    assert list(tmp_path.iterdir()) == []


def test_a_fault_of_an_exported_program_fails_too(
    small_checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    FAULTS["scale off by a thousandth"](monkeypatch)
    with pytest.raises(ParityError):
        export(small_checkpoint, tmp_path / "bundle", "pt2-fp32")
    assert list(tmp_path.iterdir()) == []


# Sizes that a trace would keep


def _total_as_a_number(self: InPlaceAttention, *arguments: Any) -> None:
    TRUE_INIT(self, *arguments)
    self.total = int(self.total)


def _a_decision(self: InPlaceAttention, rotary: Any, mask: Tensor, *rest: Any) -> None:
    """On values, which are other ones in every call."""
    TRUE_INIT(self, rotary, mask, *rest)
    if bool((mask.sum(1) > 1).all()):
        self.allowed = self.allowed & True


def _length_as_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    def pick(hidden: Tensor, mask: Tensor, offsets: Tensor) -> Tensor:
        last = int(hidden.shape[1]) - 1
        return hidden[:, last - offsets]

    monkeypatch.setattr(programs, "pick", pick)


KEPT: dict[str, Mutation] = {
    "the tokens in all": _init(_total_as_a_number),
    "the new tokens": _length_as_a_number,
    "a decision": _init(_a_decision),
}


@pytest.mark.parametrize("kept", KEPT.values(), ids=KEPT.keys())
@pytest.mark.parametrize("recipe", ["torchscript-fp32", "torchscript-portable-fp32"])
def test_a_trace_that_would_keep_a_size_is_refused(
    recipe: str, kept: Mutation, small_checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even unproven; the message says where."""
    kept(monkeypatch)
    with pytest.raises(ExportError, match=r"would keep a size or a decision.*Python (integer|boolean)") as caught:
        export(small_checkpoint, tmp_path / "bundle", recipe, Effort.OFF)
    assert Path(__file__).name in str(caught.value) or "in_place_attention.py" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "kept", [KEPT["the tokens in all"], KEPT["a decision"]], ids=["the tokens in all", "a decision"]
)
def test_an_exported_program_that_would_keep_a_size_is_refused(
    kept: Mutation, small_checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept(monkeypatch)
    with pytest.raises(ExportError, match="could not trace with dynamic batch, sequence, total_sequence"):
        export(small_checkpoint, tmp_path / "bundle", "pt2-fp32", Effort.OFF)
    assert list(tmp_path.iterdir()) == []


def _five_tokens_in_all(self: InPlaceAttention, *arguments: Any) -> None:
    """What a trace makes of a size in silence: the one of its example."""
    TRUE_INIT(self, *arguments)
    self.total = 5
    self.allowed = self.allowed[..., :5]


def test_a_size_that_was_kept_in_silence_does_not_pass(
    small_checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _init(_five_tokens_in_all)(monkeypatch)
    with pytest.raises((CosmosExportError, CosmosRuntimeError)):
        export(small_checkpoint, tmp_path / "bundle", "torchscript-fp32")
    assert list(tmp_path.iterdir()) == []


def _failed(report: ParityReport) -> list[str]:
    return [case.name for case in report.cases if case.verdict is Verdict.FAIL]
