"""`cosmos-export diff` names the layer that is wrong, and the step in it: each fault here is in one place only."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from onnx import GraphProto, helper
from torch import Tensor

from cosmos_export import bundle as bundles
from cosmos_export.checkpoint import Checkpoint
from cosmos_export.cli import main
from cosmos_export.config import CosmosAdvancedConfig
from cosmos_export.errors import ParityUnavailableError, TargetError
from cosmos_export.model import attention
from cosmos_export.model.attention import FullSequenceAttention
from cosmos_export.model.loading import random_checkpoint, skeleton
from cosmos_export.onnx.passes import run_passes
from cosmos_export.onnx.signature import graph_spec
from cosmos_export.onnx.trace import trace_whole
from cosmos_export.onnx.weights import attach_weights
from cosmos_export.parity.diff import Diff, Setting, diff_bundle
from cosmos_export.parity.reproduction import write_reproduction
from cosmos_export.parity.verify import Effort
from cosmos_export.pipeline import ExportedBundle, export_bundle
from cosmos_export.recipe import ExportRecipe
from cosmos_runtime import Bundle

from .mutants import attribute_of, nodes_of, with_graph_fault, with_tensor_fault

NORM, PROJECTIONS, ATTENTION = "norm before attention", "q, k, v projections", "rotary and attention"
OUTPUT, MIDDLE_NORM, GATE = "output projection, residual", "norm before feed-forward", "gate, up projections"
DOWN = "down projection, residual"


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    """Three layers, and weights of a size with which attention is not uniform."""
    config = CosmosAdvancedConfig(
        dim=64, n_layers=3, head_dim=16, hidden_dim=80, n_heads=6, n_kv_heads=2, vocab_size=96, max_sequence_length=48
    )
    drawn = random_checkpoint(config, name="three", seed=7)
    tensors = {n: drawn.tensor(n) * (4 if drawn.tensor(n).dim() > 1 else 1) for n in drawn.names}
    return Checkpoint.from_tensors(config, tensors, {"kind": "preset", "location": "three"})


@pytest.fixture(scope="module")
def exported(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], ExportedBundle]:
    made: dict[str, ExportedBundle] = {}

    def export(recipe: str) -> ExportedBundle:
        if recipe not in made:
            out = tmp_path_factory.mktemp("diff") / recipe
            made[recipe] = export_bundle(checkpoint, out, ExportRecipe.load(recipe), effort=Effort.OFF)
        return made[recipe]

    return export


def diff(folder: Path, checkpoint: Checkpoint, **options: object) -> Diff:
    return diff_bundle(Bundle.open(folder), checkpoint, **options)  # type: ignore[arg-type]


def named(found: Diff) -> tuple[str | None, str | None]:
    """(the first wrong piece, the first wrong step in it)."""
    piece = found.report.first_alone
    if piece is None:
        return None, None
    return piece.name, None if piece.wrong_step is None else piece.wrong_step.step.name


def wrong_alone(found: Diff) -> set[str]:
    return {piece.name for piece in found.report.pieces if piece.alone.verdict == "FAIL"}


@pytest.mark.parametrize("recipe", ["fp32", "portable-fp32", "cpu-fp32", "cpu-fp16", "cpu-int4-quick", "cuda-int4"])
def test_bundles_without_a_fault_are_equal(recipe, exported, checkpoint):
    found = diff(exported(recipe).path, checkpoint)
    assert found.report.equal, found.report.summary()
    assert found.fault is None
    assert "no difference" in found.report.summary()


# Faults of a fused graph


def _in_layer(operator: str, at: int, change: Callable[[object], None]) -> Callable[[GraphProto], None]:
    return lambda graph: change(nodes_of(graph, operator)[at])


def _set(name: str, field: str, change: Callable[[float], float]) -> Callable[[object], None]:
    def mutate(node: object) -> None:
        attribute = attribute_of(node, name)  # type: ignore[arg-type]
        setattr(attribute, field, change(getattr(attribute, field)))

    return mutate


def _window(node: object) -> None:
    node.attribute.append(helper.make_attribute("local_window_size", 4))  # type: ignore[attr-defined]


def _residual_twice(node: object) -> None:
    node.input[1] = node.input[0]  # type: ignore[attr-defined]


def _swapped_cache(node: object) -> None:
    node.output[1], node.output[2] = node.output[2], node.output[1]  # type: ignore[attr-defined]


def _no_gate(graph: GraphProto) -> None:
    """The activation of layer 1 without its sigmoid."""
    node = next(n for n in graph.node if n.op_type == "Sigmoid" and n.name.startswith("layers.1."))
    node.op_type = "Identity"


_GQA, _SKIP = "GroupQueryAttention", "SkipSimplifiedLayerNormalization"


@pytest.mark.parametrize(
    ("fault", "piece", "step"),
    [
        pytest.param(_in_layer(_GQA, 1, _set("scale", "f", lambda x: x * 1.001)), "layer 1", ATTENTION, id="scale"),
        pytest.param(_in_layer(_GQA, 2, _set("do_rotary", "i", lambda _: 0)), "layer 2", ATTENTION, id="no rotary"),
        pytest.param(
            _in_layer(_GQA, 0, _set("rotary_interleaved", "i", lambda _: 1)), "layer 0", ATTENTION, id="pairs"
        ),
        pytest.param(_in_layer(_GQA, 1, _window), "layer 1", ATTENTION, id="a mask too narrow"),
        pytest.param(_in_layer(_GQA, 1, _swapped_cache), "layer 1", ATTENTION, id="keys and values swapped"),
        pytest.param(
            _in_layer(_SKIP, 2, _set("epsilon", "f", lambda _: 1e-3)), "layer 1", MIDDLE_NORM, id="norm2's eps"
        ),
        pytest.param(_in_layer(_SKIP, 1, _set("epsilon", "f", lambda _: 1e-3)), "layer 1", NORM, id="norm1's eps"),
        pytest.param(
            _in_layer(_SKIP, 5, _set("epsilon", "f", lambda _: 1e-3)), "logits", None, id="the last norm's eps"
        ),
        pytest.param(_in_layer(_SKIP, 1, _residual_twice), "layer 0", None, id="a residual twice"),
        pytest.param(_no_gate, "layer 1", "activation", id="no sigmoid"),
    ],
)
@pytest.mark.parametrize("recipe", ["cpu-fp32", "cpu-int4-quick"])
def test_a_fault_of_a_fused_graph_is_found(fault, piece, step, recipe, exported, checkpoint, tmp_path):
    found = diff(with_graph_fault(exported(recipe), tmp_path, fault), checkpoint)
    assert named(found)[0] == piece
    assert wrong_alone(found) == {piece}
    assert step is None or named(found)[1] == step
    assert not found.report.equal
    assert piece in found.report.summary()
    assert found.report.first_in_graph is not None
    assert found.report.first_in_graph.name == piece


# Faults of a standard graph, made while one layer is traced


def _off_by_one(true: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        before = (torch.arange(x.shape[1], device=x.device) - 1).clamp(min=0)
        return true(x, *((cos[before], sin[before]) if x.shape[2] == 6 else (cos, sin)))

    return rotate


def _tiled(true: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Query head h reads key/value head h % K instead of h // G."""

    def attend(query: Tensor, key: Tensor, value: Tensor, *rest: object) -> Tensor:
        order = [h // 3 + 2 * (h % 3) for h in range(6)]
        back = [order.index(h) for h in range(6)]
        moved = torch.stack([query[:, :, h] for h in order], dim=2)
        attended = true(moved, key, value, *rest)
        return torch.stack([attended[:, :, h] for h in back], dim=2)

    return attend


def _unmasked(true: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda query, key, value, allowed=None, *rest: true(query, key, value, None, *rest)


@pytest.mark.parametrize(
    ("function", "fault"),
    [
        pytest.param("rotate", _off_by_one, id="rotary positions off by one"),
        pytest.param("grouped_query_attention", _tiled, id="kv heads tiled"),
        pytest.param("grouped_query_attention", _unmasked, id="mask dropped"),
    ],
)
@pytest.mark.parametrize("layer", [0, 2])
def test_a_fault_that_was_traced_into_one_layer_is_found(function, fault, layer, checkpoint, tmp_path, monkeypatch):
    found = diff(_traced(checkpoint, tmp_path, monkeypatch, function, fault, layer), checkpoint)
    assert named(found) == (f"layer {layer}", ATTENTION)
    assert wrong_alone(found) == {f"layer {layer}"}


def _traced(
    checkpoint: Checkpoint,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    function: str,
    fault: Callable[[Callable[..., Tensor]], Callable[..., Tensor]],
    wanted: int,
) -> Path:
    """A bundle of a graph in whose layer `wanted` a function of the attention was another one."""
    recipe, true = ExportRecipe.load("fp32"), getattr(attention, function)
    call = FullSequenceAttention.__call__

    def mutated(self: FullSequenceAttention, layer: int, *values: Tensor) -> Tensor:
        with monkeypatch.context() as patched:
            if layer == wanted:
                patched.setattr(attention, function, fault(true))
            return call(self, layer, *values)

    spec = graph_spec("full_sequence", checkpoint.config, recipe.opset)
    with monkeypatch.context() as patched:
        patched.setattr(FullSequenceAttention, "__call__", mutated)
        program = trace_whole(skeleton(checkpoint.config), "full_sequence", spec)
    program = run_passes(program, recipe)
    attach_weights(program, checkpoint, recipe)
    bundles.write_graph(folder, "full_sequence", spec.file, program)
    bundles.write_companions(folder, checkpoint)
    bundles.seal(folder, "mutant", checkpoint, recipe, {"full_sequence": spec}, causal=True)
    return folder


# Faults of the weights


def _by(amount: float) -> Callable[[np.ndarray], None]:
    def change(matrix: np.ndarray) -> None:
        matrix[3, 5] += amount

    return change


def _vector(weights: np.ndarray) -> None:
    weights[4] *= 1.002


@pytest.mark.parametrize(
    ("tensor", "perturb", "piece", "step"),
    [
        ("layers.1.attention.qkv_proj.weight.transposed", _by(0.001), "layer 1", PROJECTIONS),
        ("layers.2.attention.o_proj.weight.transposed", _by(0.001), "layer 2", OUTPUT),
        ("layers.0.feed_forward.w1_w3.weight.transposed", _by(0.001), "layer 0", GATE),
        ("layers.1.feed_forward.w2.weight.transposed", _by(0.001), "layer 1", DOWN),
        ("layers.2.norm1.weight", _vector, "layer 2", NORM),
        ("layers.0.norm2.weight", _vector, "layer 0", MIDDLE_NORM),
        ("norm.weight", _vector, "logits", None),
    ],
)
def test_one_weight_is_found_in_its_step(tensor, perturb, piece, step, exported, checkpoint, tmp_path):
    found = diff(with_tensor_fault(exported("cpu-fp32"), tmp_path, tensor, perturb), checkpoint)
    assert named(found) == (piece, step)
    assert wrong_alone(found) == {piece}
    assert [problem.split()[0] for problem in found.report.stored.problems] == [tensor]


def test_one_rounding_of_one_weight_is_named_though_no_number_shows_it(exported, checkpoint, tmp_path):
    def one_ulp(matrix: np.ndarray) -> None:
        matrix[0, 0] = np.nextafter(matrix[0, 0], np.float32(np.inf))

    name = "layers.1.feed_forward.w2.weight.transposed"
    found = diff(with_tensor_fault(exported("cpu-fp32"), tmp_path, name, one_ulp), checkpoint)
    assert not found.report.equal
    assert named(found) == (None, None)
    assert f"stored tensors differ: {name}" in found.report.summary()


def test_a_level_of_a_quantised_matrix_is_found(exported, checkpoint, tmp_path):
    def one_level(blocks: np.ndarray) -> None:
        blocks[3, 0, 4] ^= 1

    name = "layers.2.feed_forward.w2.weight.blocks"
    found = diff(with_tensor_fault(exported("cpu-int4-quick"), tmp_path, name, one_level), checkpoint)
    assert named(found) == ("layer 2", DOWN)


def test_two_faults_are_both_found_and_the_first_is_named(exported, checkpoint, tmp_path):
    def both(graph: GraphProto) -> None:
        for layer in (0, 2):
            attribute_of(nodes_of(graph, _GQA)[layer], "scale").f *= 1.001

    found = diff(with_graph_fault(exported("cpu-fp32"), tmp_path, both), checkpoint)
    assert wrong_alone(found) == {"layer 0", "layer 2"}
    assert named(found) == ("layer 0", ATTENTION)


# Reproductions


@pytest.mark.parametrize("fault", ["step", "cache", "logits"])
def test_a_reproduction_runs_alone_and_shows_the_fault(fault, exported, checkpoint, tmp_path):
    change = {
        "step": _in_layer(_GQA, 1, _set("scale", "f", lambda x: x * 1.01)),
        "cache": _in_layer(_GQA, 1, _swapped_cache),
        "logits": _in_layer(_SKIP, 5, _set("epsilon", "f", lambda _: 1e-3)),
    }[fault]
    found = diff(with_graph_fault(exported("cpu-fp32"), tmp_path, change), checkpoint)
    assert found.fault is not None
    folder = tmp_path / "reproduction"
    write_reproduction(folder, found.fault)
    shutil.rmtree(tmp_path / "faulty")  # it has its own weights
    ran = _reproduce(folder)
    assert ran.returncode == 1, ran.stdout + ran.stderr
    assert "WRONG" in ran.stdout
    size = sum(path.stat().st_size for path in folder.iterdir())
    assert size < exported("cpu-fp32").path.joinpath("model.onnx.data").stat().st_size


def test_a_reproduction_with_the_fault_mended_says_right(exported, checkpoint, tmp_path):
    import onnx

    change = _in_layer(_GQA, 1, _set("scale", "f", lambda x: x * 1.01))
    found = diff(with_graph_fault(exported("cpu-fp32"), tmp_path, change), checkpoint)
    assert found.fault is not None
    write_reproduction(tmp_path / "reproduction", found.fault)
    path = tmp_path / "reproduction" / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    attribute_of(nodes_of(model.graph, _GQA)[0], "scale").f /= 1.01
    path.write_bytes(model.SerializeToString())
    ran = _reproduce(tmp_path / "reproduction")
    assert ran.returncode == 0, ran.stdout
    assert ran.stdout.splitlines()[-1] == "layer 1, rotary and attention: right"


def test_a_reproduction_overwrites_nothing(exported, checkpoint, tmp_path):
    change = _in_layer(_GQA, 1, _set("scale", "f", lambda x: x * 1.01))
    found = diff(with_graph_fault(exported("cpu-fp32"), tmp_path, change), checkpoint)
    assert found.fault is not None
    with pytest.raises(TargetError, match="another --reproduce"):
        write_reproduction(tmp_path, found.fault)


def _reproduce(folder: Path) -> subprocess.CompletedProcess[str]:
    program = (
        "import runpy, sys; sys.modules['torch'] = sys.modules['onnx'] = sys.modules['cosmos_export'] = None; "
        "runpy.run_path(sys.argv[1], run_name='__main__')"
    )
    return subprocess.run(
        [sys.executable, "-c", program, str(folder / "reproduce.py")], capture_output=True, text=True, check=False
    )


# Settings


def test_settings_are_compared_with_the_first(exported, checkpoint):
    settings = [Setting(), Setting(optimization="off"), Setting(threads=2), Setting(provider="cuda")]
    report = diff(exported("fp32").path, checkpoint, settings=settings).report
    assert report.equal
    off, threads, cuda = report.settings
    assert len(off.differences) == len(threads.differences) == 5
    assert off.beyond is None
    assert cuda.error is None or "cuda" in cuda.error


def test_a_setting_that_leaves_the_model_fails(exported, checkpoint, monkeypatch):
    """What an optimiser with a defect does to the numbers."""
    from cosmos_export.parity.diff import ObservedComparison

    true = ObservedComparison.tapped

    def tapped(self, arithmetic, setting):  # type: ignore[no-untyped-def]
        values = true(self, arithmetic, setting)
        if setting.optimization == "basic":
            for case in values:
                case[2:] = [value + 0.1 for value in case[2:]]
        return values

    monkeypatch.setattr(ObservedComparison, "tapped", tapped)
    settings = [Setting(), Setting(optimization="basic")]
    report = diff(exported("fp32").path, checkpoint, settings=settings).report
    assert not report.equal
    assert (report.settings[0].first, report.settings[0].beyond) == ("layer 1", "layer 1")
    assert "optimisation basic" in report.summary()


# Bundles of other kinds, and the command


def test_the_backbone_under_capability_heads_is_compared(lively_checkpoint, lively_bundle, tmp_path):
    checkpoint, bundle = lively_checkpoint, lively_bundle("cpu-fp32")
    assert diff(bundle.path, checkpoint).report.equal
    change = _in_layer(_GQA, 1, _set("scale", "f", lambda x: x * 1.001))
    found = diff(with_graph_fault(bundle, tmp_path, change), checkpoint)
    assert named(found) == ("layer 1", ATTENTION)
    assert found.report.heads_chained


def _without_largest(graph: GraphProto) -> None:
    """The working memory reads what is least like the input."""
    attribute_of(nodes_of(graph, "TopK")[0], "largest").i = 0


@pytest.mark.parametrize("recipe", ["cpu-fp32", "fp32"])
def test_a_fault_of_a_head_is_named(recipe, lively_bundle, lively_checkpoint, tmp_path):
    found = diff(with_graph_fault(lively_bundle(recipe), tmp_path, _without_largest), lively_checkpoint)
    assert named(found) == ("working memory", None)
    assert wrong_alone(found) == {"working memory"}
    assert found.report.first_in_graph is not None
    assert found.report.first_in_graph.name == "working memory"
    assert "working memory is wrong" in found.report.summary()
    assert found.fault is not None
    write_reproduction(tmp_path / "reproduction", found.fault)
    shutil.rmtree(tmp_path / "faulty")
    ran = _reproduce(tmp_path / "reproduction")
    assert ran.returncode == 1, ran.stdout + ran.stderr
    assert "working memory: WRONG" in ran.stdout


def test_a_pytorch_program_is_refused_with_what_to_do(checkpoint, tmp_path):
    bundle = export_bundle(checkpoint, tmp_path / "out", ExportRecipe.load("torchscript-fp32"), effort=Effort.OFF)
    with pytest.raises(ParityUnavailableError, match="cosmos-export onnx"):
        diff(bundle.path, checkpoint)


def test_the_command(tmp_path):
    runner, bundle = CliRunner(), tmp_path / "demo"
    made = runner.invoke(main, ["onnx", "--recipe", "cpu-fp32", "--out", str(bundle), "--verify", "off"])
    assert made.exit_code == 0, made.output
    equal = runner.invoke(main, ["diff", str(bundle), "--threads", "1,2"])
    assert equal.exit_code == 0, equal.output
    assert "EQUAL" in equal.output
    assert not (tmp_path / "demo.reproduction").exists()

    class Made:
        path, manifest = bundle, Bundle.open(bundle).manifest

    change = _in_layer(_GQA, 3, _set("scale", "f", lambda x: x * 1.001))
    faulty = with_graph_fault(Made, tmp_path, change)  # type: ignore[arg-type]
    differs = runner.invoke(main, ["diff", str(faulty)])
    assert differs.exit_code == 1
    assert "DIFFERS" in differs.output
    assert "layer 3 is wrong, in its rotary and attention" in differs.output
    assert (tmp_path / "faulty.reproduction" / "reproduce.py").is_file()
    again = runner.invoke(main, ["diff", str(faulty), "--json"])
    document = json.loads(again.stdout)
    assert document["first_alone"] == "layer 3"
    assert document["reproduction"].endswith("faulty.reproduction-2")


@pytest.mark.parametrize(
    "arguments", [["--optimization", "most"], ["--threads", "two"], ["--threads", "1,,2"], ["--provider", "tpu"]]
)
def test_wrong_arguments_are_named(arguments, tmp_path):
    result = CliRunner().invoke(main, ["diff", str(tmp_path), *arguments])
    assert result.exit_code == 2
    assert arguments[0] in result.output


def test_the_picture_has_every_piece(exported, checkpoint, tmp_path):
    pytest.importorskip("matplotlib")
    from cosmos_export.cli.diff_terminal import plot_diff

    path = tmp_path / "errors.png"
    plot_diff(diff(exported("cpu-int4-quick").path, checkpoint).report, path)
    assert path.read_bytes().startswith(b"\x89PNG")
