"""Bundles of programs that PyTorch runs: every recipe, geometry and set of capabilities is proven, at all sizes."""

from __future__ import annotations

import json
import warnings
import zipfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cosmos_export.checkpoint import Checkpoint, save_checkpoint
from cosmos_export.config import CosmosAdvancedConfig
from cosmos_export.errors import ExportError, RecipeError
from cosmos_export.model.loading import load_decoder, random_checkpoint
from cosmos_export.model.tensors_read import tensors_read
from cosmos_export.onnx.weights import WeightReader
from cosmos_export.parity.source import checkpoint_of
from cosmos_export.parity.verify import Effort, verify_bundle
from cosmos_export.pipeline import ExportedBundle, export_bundle
from cosmos_export.recipe import INDUCTOR, ExportRecipe
from cosmos_export.resources import demo_checkpoint, recipe_names
from cosmos_export.torch_programs import build, pt2, torchscript
from cosmos_export.torch_programs.sessions import eager_session, load_session
from cosmos_runtime import CAPABILITIES, MANIFEST_NAME, PT2, TORCHSCRIPT, Bundle, generate

from .head_bundles import export_heads, heads_checkpoint, heads_config

# Compiled packages take a compiler and its time; they have tests of their own.
RECIPES = [name for f in (TORCHSCRIPT, PT2) for name in recipe_names(f) if ExportRecipe.load(name).dialect != INDUCTOR]
DECODERS = ["torchscript-fp32", "torchscript-portable-fp32", "pt2-fp32"]
WHOLE = ["torchscript-full-sequence", "pt2-full-sequence"]
FILES = {TORCHSCRIPT: "model.pt", PT2: "model.pt2"}

NARROW: dict[str, Any] = {
    "dim": 20,
    "n_layers": 1,
    "n_heads": 4,
    "n_kv_heads": 2,
    "head_dim": 6,
    "hidden_dim": 28,
    "vocab_size": 50,
    "max_sequence_length": 24,
}


def checkpoint_with(factor: float = 6.0, **changes: Any) -> Checkpoint:
    """Random weights, larger than usual, so that attention is not uniform."""
    checkpoint = random_checkpoint(CosmosAdvancedConfig(**{**NARROW, **changes}), name="narrow", seed=1)
    tensors = {n: checkpoint.tensor(n) * (factor if checkpoint.tensor(n).dim() > 1 else 1) for n in checkpoint.names}
    return Checkpoint.from_tensors(checkpoint.config, tensors, {"kind": "preset", "location": "narrow"})


def export(
    checkpoint: Checkpoint, out: Path, recipe: str, effort: Effort = Effort.FULL, **options: Any
) -> ExportedBundle:
    return export_bundle(checkpoint, out, ExportRecipe.load(recipe), effort=effort, **options)


@pytest.fixture(scope="module")
def narrow() -> Checkpoint:
    return checkpoint_with()


@pytest.fixture(scope="module", params=DECODERS)
def decoder(
    request: pytest.FixtureRequest, narrow: Checkpoint, tmp_path_factory: pytest.TempPathFactory
) -> ExportedBundle:
    return export(narrow, tmp_path_factory.mktemp("decoder") / request.param, request.param, Effort.OFF)


# What is proven


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_is_proven(recipe: str, tmp_path: Path) -> None:
    bundle = export(checkpoint_with(3.0), tmp_path / "bundle", recipe)
    assert bundle.report is not None
    assert bundle.report.passed
    assert {case.length for case in bundle.report.cases} >= {1, 2, 7, 16, 23, 24}
    assert all(stored.passed and stored.expected == 13 for stored in bundle.report.stored)
    again = Bundle.open(bundle.path).manifest
    assert again.parity == bundle.report.digest()


GEOMETRIES: dict[str, dict[str, int]] = {
    "as many key heads as query heads": {"n_kv_heads": 4, "head_dim": 16},
    "one head": {"n_heads": 1, "n_kv_heads": 1, "head_dim": 2, "vocab_size": 3},
    "one key head, two layers": {"n_heads": 6, "n_kv_heads": 1, "n_layers": 2},
    "two positions": {"max_sequence_length": 2},
    "fewer positions than a trace likes": {"max_sequence_length": 4},
}


@pytest.mark.parametrize(
    ("recipe", "geometry"),
    [
        *(("torchscript-fp32", geometry) for geometry in GEOMETRIES),
        ("pt2-fp32", "one head"),
        ("pt2-fp32", "two positions"),
        ("pt2-fp32", "fewer positions than a trace likes"),
    ],
)
def test_every_geometry_is_proven(recipe: str, geometry: str, tmp_path: Path) -> None:
    bundle = export(checkpoint_with(**GEOMETRIES[geometry]), tmp_path / "bundle", recipe)
    assert bundle.report is not None
    assert bundle.report.passed
    assert max(case.length for case in bundle.report.cases) == bundle.manifest.max_sequence_length


@pytest.mark.parametrize("recipe", WHOLE)
def test_a_model_of_one_position_has_no_use_for_a_cache(recipe: str, tmp_path: Path) -> None:
    checkpoint = checkpoint_with(max_sequence_length=1)
    bundle = export(checkpoint, tmp_path / "bundle", recipe)
    assert bundle.report is not None
    assert bundle.report.passed
    with pytest.raises(RecipeError, match=rf"max_sequence_length 1 has no use for.*--recipe {recipe}"):
        export(checkpoint, tmp_path / "other", recipe.replace("full-sequence", "fp32"))


@pytest.mark.parametrize("recipe", WHOLE)
def test_without_a_causal_mask_whole_sequences_are_proven(recipe: str, narrow: Checkpoint, tmp_path: Path) -> None:
    bundle = export(narrow, tmp_path / "bundle", recipe, causal=False)
    assert bundle.report is not None
    assert bundle.report.passed
    assert not verify_bundle(bundle.path, narrow, causal=True, effort=Effort.QUICK).passed
    with pytest.raises(RecipeError, match=rf"without causal mask cannot have one.*--recipe {recipe}"):
        export(narrow, tmp_path / "other", recipe.replace("full-sequence", "fp32"), causal=False)


@pytest.mark.parametrize("recipe", ["torchscript-fp32", "torchscript-fp16", "pt2-fp32"])
def test_a_checkpoint_of_float16_is_proven(recipe: str, narrow: Checkpoint, tmp_path: Path) -> None:
    halves = {name: narrow.tensor(name).half() for name in narrow.names}
    checkpoint = Checkpoint.from_tensors(narrow.config, halves, {"kind": "preset", "location": "half"})
    bundle = export(checkpoint, tmp_path / "bundle", recipe)
    assert bundle.report is not None
    assert bundle.report.passed


def test_another_order_of_query_heads_is_proven_and_proven_again(narrow: Checkpoint, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "model", narrow.config, {name: narrow.tensor(name) for name in narrow.names})
    tiled = Checkpoint.open(tmp_path / "model", head_layout="tile")
    bundle = export(tiled, tmp_path / "bundle", "torchscript-fp32")
    assert verify_bundle(bundle.path, checkpoint_of(bundle.manifest), effort=Effort.QUICK).passed
    other = verify_bundle(bundle.path, Checkpoint.open(tmp_path / "model"), effort=Effort.QUICK)
    assert {problem.split()[0].split(".")[-2] for problem in other.stored_problems} == {"q_proj", "o_proj"}


def test_weights_beyond_float16_are_refused_even_unproven(narrow: Checkpoint, tmp_path: Path) -> None:
    tensors = {name: narrow.tensor(name).clone() for name in narrow.names}
    tensors["layers.0.feed_forward.w1.weight"][2, 3] = 1e6
    loud = Checkpoint.from_tensors(narrow.config, tensors, {"kind": "preset", "location": "loud"})
    with pytest.raises(ExportError, match=r"w1\.weight has values up to 1e\+06, and float16 ends at 65504"):
        export(loud, tmp_path / "bundle", "torchscript-fp16", Effort.OFF)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("recipe", ["torchscript-fp32", "torchscript-int8", "pt2-fp32"])
def test_pytorch_says_nothing_that_would_frighten(recipe: str, narrow: Checkpoint, tmp_path: Path) -> None:
    """Its own deprecations are explained once, by a note; what it would say once a process, it says always here."""
    told = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            load_session(export(narrow, tmp_path / "bundle", recipe, Effort.QUICK).path)
    finally:
        torch.set_warn_always(told)
    assert [str(warning.message)[:200] for warning in heard] == []


# Any size


def program_of(bundle: ExportedBundle) -> Callable[..., Tensor]:
    file = bundle.path / FILES[bundle.manifest.graph_format]
    if bundle.manifest.graph_format == TORCHSCRIPT:
        return torchscript.load_torchscript(file)
    return pt2.load_program(file).module()


def empty_cache(config: CosmosAdvancedConfig, batch: int, length: int) -> list[Tensor]:
    return [torch.zeros(batch, config.n_kv_heads, length, config.head_dim) for _ in range(2 * config.n_layers)]


@torch.no_grad()
def test_no_size_of_the_trace_is_baked_in(decoder: ExportedBundle, narrow: Checkpoint) -> None:
    """Every length, with caches that are as long, one longer and as long as can be; then one token more of each row."""
    config, program, model = narrow.config, program_of(decoder), load_decoder(narrow, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    for length in range(1, 25):
        batch = (1, 3, 4)[length % 3]
        ids = torch.randint(0, 50, (batch, length), generator=generator)
        exact = model(ids)
        for size in sorted({length, min(length + 1, 24), 24}):
            cache = empty_cache(config, batch, size)
            before = length - 1
            if before:
                offsets = torch.tensor([0, before - 1]) if length % 2 else torch.arange(before)
                mask = torch.ones(batch, before, dtype=torch.int64)
                logits = program(ids[:, :before], mask, offsets, cache)
                torch.testing.assert_close(logits.double(), exact[:, before - 1 - offsets], rtol=0, atol=1e-4)
            mask = torch.ones(batch, length, dtype=torch.int64)
            logits = program(ids[:, before:], mask, torch.tensor([0]), cache)
            torch.testing.assert_close(logits.double(), exact[:, -1:], rtol=0, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("recipe", WHOLE)
def test_no_length_of_the_trace_is_baked_in(recipe: str, narrow: Checkpoint, tmp_path: Path) -> None:
    program = program_of(export(narrow, tmp_path / "bundle", recipe, Effort.OFF))
    model = load_decoder(narrow, dtype=torch.float64)
    for length in range(1, 25):
        ids = torch.randint(0, 50, ((1, 3, 4)[length % 3], length), generator=torch.Generator().manual_seed(length))
        torch.testing.assert_close(program(ids).double(), model(ids), rtol=0, atol=1e-4)


# What a bundle holds


def records(bundle: ExportedBundle) -> list[int]:
    """Bytes of each tensor that lies in a bundle's file."""
    folders = ("data",) if bundle.manifest.graph_format == TORCHSCRIPT else ("data/weights", "data/constants")
    with zipfile.ZipFile(bundle.path / FILES[bundle.manifest.graph_format]) as archive:
        names = {i.filename.partition("/")[2]: i.file_size for i in archive.infolist()}
    return sorted(n for name, n in names.items() if name.rpartition("/")[0] in folders and not name.endswith(".json"))


def sizes_of(checkpoint: Checkpoint, recipe: str, names: Any) -> list[int]:
    reader = WeightReader(checkpoint, ExportRecipe.load(recipe))
    return sorted(reader.read(name).nbytes for name in names)


@pytest.mark.parametrize("recipe", ["torchscript-fp32", "torchscript-bf16", "torchscript-portable-fp32", "pt2-fp32"])
def test_each_tensor_is_in_the_file_once(recipe: str, narrow: Checkpoint, tmp_path: Path) -> None:
    """The tied embedding, too, though two products of the program read it."""
    bundle = export(narrow, tmp_path / "bundle", recipe, Effort.OFF)
    assert records(bundle) == sizes_of(narrow, recipe, [*narrow.names, "rope.cos", "rope.sin"])
    assert set(bundle.manifest.files) == {"config.json", FILES[bundle.manifest.graph_format]}


@pytest.mark.parametrize("recipe", ["torchscript-fp32", "torchscript-full-sequence", "pt2-full-sequence"])
def test_heads_hold_what_a_pass_reads_and_nothing_else(recipe: str, tmp_path: Path) -> None:
    """No weights of other modes; of a packed projection only the part that is read."""
    checkpoint = heads_checkpoint(heads_config(n_layers=1))
    names = CAPABILITIES if recipe.startswith(TORCHSCRIPT) else ("memory",)
    bundle = export_heads(checkpoint, tmp_path / "bundle", recipe, names)
    wanted = [*tensors_read(checkpoint.config, names), "rope.cos", "rope.sin"]
    assert records(bundle) == sizes_of(checkpoint, recipe, wanted)


def test_a_tensor_that_is_a_part_of_more_memory_is_stored_alone(narrow: Checkpoint, tmp_path: Path) -> None:
    """As those of a pickled checkpoint may be."""
    tensors = {}
    for name in narrow.names:
        whole = torch.cat([narrow.tensor(name)] * 3)
        tensors[name] = whole[: len(whole) // 3]
    views = Checkpoint.from_tensors(narrow.config, tensors, {"kind": "preset", "location": "views"})
    for recipe in ("torchscript-fp32", "pt2-fp32"):
        bundle = export(views, tmp_path / recipe, recipe, Effort.OFF)
        assert records(bundle) == sizes_of(narrow, recipe, [*narrow.names, "rope.cos", "rope.sin"])


@pytest.mark.parametrize("name", [*DECODERS, *WHOLE])
def test_the_manifest_says_what_the_file_is(name: str, narrow: Checkpoint, tmp_path: Path) -> None:
    path, graph_format = export(narrow, tmp_path / "bundle", name, Effort.OFF).path, name.partition("-")[0]
    document, manifest = json.loads((path / MANIFEST_NAME).read_text()), Bundle.open(path).manifest
    assert (document["graph_format"], document["format_version"]) == (graph_format, 2), "older runtimes know ONNX only"
    assert manifest.graph_format == graph_format
    ((graph, spec),) = manifest.graphs.items()
    assert (graph, spec.file) == ("decoder" if name in DECODERS else "full_sequence", FILES[graph_format])
    assert manifest.recipe["name"] == name
    assert "opset" not in manifest.recipe
    assert manifest.versions["torch"] == version("torch")


# Capability heads


@pytest.mark.parametrize(
    ("recipe", "names"),
    [
        ("torchscript-fp32", ()),
        ("torchscript-fp32", ("memory",)),
        ("torchscript-fp32", ("safety", "evaluation")),
        ("torchscript-fp32", CAPABILITIES),
        ("torchscript-portable-fp32", ("reasoning", "memory", "evaluation")),
        ("torchscript-full-sequence", CAPABILITIES),
        ("torchscript-fp16", ("memory",)),
        ("pt2-fp32", ("memory", "evaluation")),
        ("pt2-full-sequence", ("safety",)),
    ],
    ids=lambda value: value if isinstance(value, str) else "+".join(value) or "none",
)
def test_sets_of_capabilities_are_proven(recipe: str, names: tuple[str, ...], tmp_path: Path) -> None:
    checkpoint = heads_checkpoint(heads_config(n_layers=1, max_sequence_length=16), names, seed=2)
    bundle = export_heads(checkpoint, tmp_path / "bundle", recipe, names, effort=Effort.FULL)
    assert bundle.report is not None
    assert bundle.report.passed
    assert bundle.manifest.capabilities is not None
    assert bundle.manifest.capabilities["names"] == list(names)


# An export that ends early


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, MemoryError])
def test_an_export_that_ends_early_leaves_nothing(
    error: type[BaseException], narrow: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = export(narrow, tmp_path / "bundle", "torchscript-fp32", Effort.OFF)
    before = {path.name: path.read_bytes() for path in old.path.iterdir()}
    write = build.write_torch_program

    def interrupted(folder: Path, *arguments: Any, **options: Any) -> Any:
        write(folder, *arguments, **options)
        assert (folder / "model.pt").is_file()
        raise error

    monkeypatch.setattr(build, "write_torch_program", interrupted)
    with pytest.raises(error):
        export(narrow, tmp_path / "new", "torchscript-fp32", Effort.OFF)
    with pytest.raises(error):
        export(narrow, tmp_path / "bundle", "torchscript-fp32", Effort.OFF, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    assert {path.name: path.read_bytes() for path in old.path.iterdir()} == before


# The demo model


@pytest.mark.parametrize("recipe", ["torchscript-fp32", "pt2-fp32"])
def test_greedy_tokens_are_the_eager_models(recipe: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(demo_checkpoint())
    session = load_session(export(checkpoint, tmp_path / "demo", recipe, Effort.OFF).path)
    ids = session.tokenizer.encode("First Citizen:\n")
    tokens = list(generate(session, ids, max_new_tokens=256))
    assert tokens == list(generate(eager_session(checkpoint), ids, max_new_tokens=256))
    assert len(tokens) == 256
    # What the cache has no part in: each token is the best one after all before it.
    model = load_decoder(checkpoint)
    with torch.inference_mode():
        logits = model(torch.tensor([[*ids, *tokens]]))[0, len(ids) - 1 : -1]
    assert logits.argmax(-1).tolist() == tokens


def test_int8_decodes_what_it_computes_at_once(narrow: Checkpoint, tmp_path: Path) -> None:
    session = load_session(export(narrow, tmp_path / "bundle", "torchscript-int8", Effort.OFF).path)
    ids = [1, 2, 3]
    tokens = list(generate(session, ids, max_new_tokens=8))
    assert np.isfinite(session.logits([ids + tokens])).all()
    assert len(tokens) == 8


def test_exporting_twice_gives_the_same_numbers(narrow: Checkpoint, tmp_path: Path) -> None:
    bundles = [export(narrow, tmp_path / n, "torchscript-portable-fp32", Effort.OFF) for n in ("one", "other")]
    ids = np.random.default_rng(0).integers(0, 50, (2, 9))
    first, second = (load_session(bundle.path).logits(ids) for bundle in bundles)
    np.testing.assert_array_equal(first, second)
    assert bundles[0].manifest.graphs == bundles[1].manifest.graphs
