"""Export recipes: one TOML file a deployment target (`configs/exports/`), checked before anything is traced."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

from cosmos_export.calibration.plan import CalibrationPlan
from cosmos_export.checkpoint import EMBEDDING, Checkpoint
from cosmos_export.config import CosmosAdvancedConfig
from cosmos_export.errors import RecipeError
from cosmos_export.model.capabilities.stored_names import FUSION as FUSION_MODULE
from cosmos_export.onnx.fused_attention import HEAD_DIM_MULTIPLE
from cosmos_export.onnx.head_matrices import is_wide
from cosmos_export.onnx.quantize import INT8_ACTIVATIONS, Quantization
from cosmos_export.onnx.signature import PACKED_PROJECTIONS
from cosmos_export.resources import DEFAULT_RECIPES, recipe_path
from cosmos_export.small_files import read_small_text
from cosmos_runtime import DECODER, DEVICE_LOOP, FULL_SEQUENCE, GRAPH_FORMATS, ONNX, PT2, TORCHSCRIPT, quoted

# A precision is how weights are stored; a floating-point one is also what is computed with.
FLOAT_PRECISIONS = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
# PyTorch's dynamic quantisation is coarser than 8 bits elsewhere, and has a name of its own.
INT8_DYNAMIC = "int8-dynamic"
PRECISIONS = (*FLOAT_PRECISIONS, "int8", "int4", INT8_DYNAMIC)
ACTIVATIONS = tuple(FLOAT_PRECISIONS.values())
# What a bundle's graphs are, and the operators that they may be made of: standard ONNX, or ONNX Runtime's own besides;
# PyTorch's, with products by oneDNN or, in 8 bits, by FBGEMM, or compiled for the machine at hand.
ONEDNN, FBGEMM, INDUCTOR = "onednn", "fbgemm", "inductor"
DIALECTS = {ONNX: ("portable", "ort"), TORCHSCRIPT: ("aten", ONEDNN, FBGEMM), PT2: ("aten", INDUCTOR)}
GRAPHS = (FULL_SEQUENCE, DECODER, DEVICE_LOOP)
# Opset 20 is the oldest that the traced operators need; 23 is the newest that torch translates to.
OPSETS = range(20, 24)

# Matrices that can be quantised in a way of their own, by the name of the projection.
PROJECTIONS = ("qkv_proj", "o_proj", "w1_w3", "w2")
# Those that dynamic quantisation takes. Not w2: a few of its inputs are far larger than the rest, and one range for a
# whole tensor leaves 7 bits of nothing to these (of the demo model's divergence, 0.0082 of 0.0087 nats were w2's).
DYNAMICALLY_QUANTIZED = ("q_proj", "k_proj", "v_proj", "o_proj", "w1", "w3")
# The same for all wide matrices of the capability heads, and for those of their fusion, which all that they give goes
# through.
HEADS, FUSION = "heads", "fusion"
# A recipe has a kilobyte or two.
_LARGEST_FILE = 1 << 20
# What a calibration's tokens and epochs can be: beyond, it would never end.
_CALIBRATION_RANGES = {"tokens": (1, 10**9), "epochs": (0, 1000)}
BITS, BLOCK_SIZES, ACCURACY_LEVELS = (4, 8), (16, 32, 64, 128, 256), (0, 1, 4)


@dataclass(frozen=True)
class ExportRecipe:
    """What to make of a model: number format, operator dialect, which graphs in which format; for ONNX, which opset.

    `quantization` is how the projections and the capability heads' wide matrices are stored, unless `overrides` names
    another way for one of them, for all of the heads, or for the fusion of these;
    `embedding` is how the tied table is. None means in the type of the activations.
    `activations` is the type that is computed with, and that the cache, the rotary tables and the scales of quantised
    matrices have; logits are always float32. `calibration` says how quantised matrices are fitted to the model's text;
    None means that each is rounded by itself.
    """

    name: str
    description: str
    precision: str
    dialect: str
    opset: int | None
    graphs: tuple[str, ...]
    quantization: Quantization | None = None
    embedding: Quantization | None = None
    overrides: Mapping[str, Quantization] = field(default_factory=dict)
    activations: str = "float32"
    calibration: CalibrationPlan | None = None
    format: str = ONNX

    @classmethod
    def load(cls, name: str) -> Self:
        """The recipe called `name` in `configs/exports`, or the file that `name` is the path of (`*.toml`).

        Raises RecipeError when there is none, or when it asks for what this version cannot make.
        """
        path = Path(name) if name.endswith(".toml") else recipe_path(name)
        try:
            values = tomllib.loads(read_small_text(path, _LARGEST_FILE))
        except RecursionError:
            raise RecipeError(f"recipe {path} cannot be read as TOML: nested too deep") from None
        except (OSError, ValueError) as error:
            raise RecipeError(f"recipe {path} cannot be read as TOML: {error}") from None
        return cls(**_checked(path, values))

    @classmethod
    def from_manifest(cls, values: Mapping[str, Any]) -> Self:
        """The recipe that a manifest recorded with `to_dict`."""
        return cls(**_checked(Path(values["name"]), {k: v for k, v in values.items() if k != "name"}))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, for the manifest; what is not quantised is left out."""
        values = {**asdict(self), "graphs": list(self.graphs)}
        return {key: value for key, value in values.items() if value not in (None, {})}

    def form_of(self, source: str) -> Quantization | None:
        """How the checkpoint tensor (or packed projection) `source` is quantised; None for not at all."""
        if source == EMBEDDING:
            return self.embedding
        if is_wide(source):
            of_heads = self.overrides.get(HEADS, self.quantization)
            return self.overrides.get(FUSION, of_heads) if source.startswith(f"{FUSION_MODULE}.") else of_heads
        projection = source.split(".")[-2] if source.count(".") else ""
        for packed, parts in PACKED_PROJECTIONS.items():
            projection = packed if projection in parts else projection
        return self.overrides.get(projection, self.quantization) if projection in PROJECTIONS else None

    @property
    def branches(self) -> bool:
        """Whether graphs compute what only some runs want in branches. A branch is a question of the host's, for which
        a GPU would have to stop; ONNX Runtime's own operators in float32 are for CPUs."""
        return self.dialect == "ort" and self.activations == "float32"

    def rounds_rows(self, source: str) -> bool:
        """Whether a checkpoint tensor becomes a matrix of PyTorch's dynamic quantisation."""
        return self.dialect == FBGEMM and source.split(".")[-2:-1] in ([name] for name in DYNAMICALLY_QUANTIZED)

    def fuses_attention(self, config: CosmosAdvancedConfig) -> bool:
        """Whether the decoder's attention is ONNX Runtime's own operator: not in every dialect, nor at every width."""
        return self.dialect == "ort" and config.head_dim % HEAD_DIM_MULTIPLE == 0

    def as_computed(self, checkpoint: Checkpoint) -> Checkpoint:
        """The checkpoint that a bundle of this recipe computes with: each tensor as it is after rounding."""
        from cosmos_export.onnx.weights import WeightReader

        reader = WeightReader(checkpoint, self)
        stored = {n: replace(t, read=partial(reader.effective, n)) for n, t in checkpoint.stored.items()}
        return replace(checkpoint, stored=stored, head_layout="interleave")

    @property
    def _without_cache(self) -> str:
        return DEFAULT_RECIPES[self.format][False]

    def check_fits(self, config: CosmosAdvancedConfig, *, causal: bool) -> None:
        """Raises RecipeError when this recipe cannot be made of a model of this configuration."""
        if DECODER in self.graphs and not causal:
            raise RecipeError(
                f"recipe {self.name} has a key/value cache, and a model without causal mask cannot have one: "
                f"a token that is cached could not see those after it. Use --recipe {self._without_cache}"
            )
        if DECODER in self.graphs and config.max_sequence_length < 2:
            raise RecipeError(
                f"recipe {self.name} has a key/value cache, which a model with max_sequence_length "
                f"{config.max_sequence_length} has no use for. Use --recipe {self._without_cache}"
            )
        if self.embedding is not None and config.dim % self.embedding.block_size:
            raise RecipeError(
                f"recipe {self.name} quantises the embedding in blocks of {self.embedding.block_size}, which does not "
                f"divide dim {config.dim}; use a recipe with another embedding.block_size"
            )


def _checked(path: Path, values: dict[str, Any]) -> dict[str, Any]:
    known = {f.name for f in fields(ExportRecipe)} - {"name"}  # a recipe is called what its file is called
    graph_format = values.get("format", ONNX)
    _check_member(path, "format", graph_format, tuple(GRAPH_FORMATS))
    required = {"description", "precision", "dialect", "graphs"} | ({"opset"} if graph_format == ONNX else set())
    known -= set() if graph_format == ONNX else {"opset", "calibration", "embedding", "overrides", "quantization"}
    unknown, missing = sorted(values.keys() - known), sorted(required - values.keys())
    if unknown or missing:
        what = f"unknown key {unknown[0]!r}" if unknown else f"missing key {missing[0]!r}"
        raise RecipeError(f"recipe {path}: {what}; a recipe has {', '.join(sorted(known))}")
    if not isinstance(values["description"], str):
        raise RecipeError(f"recipe {path}: description must be a text, got {quoted(values['description'])}")
    _check_member(path, "precision", values["precision"], PRECISIONS)
    _check_member(path, "dialect", values["dialect"], DIALECTS[graph_format])
    if graph_format == ONNX:
        _check_member(path, "opset", values["opset"], OPSETS)
    return {
        "opset": None,
        **values,
        "name": path.name.removesuffix(".toml"),
        "graphs": _graphs(path, values),
        "activations": _activations(path, values),
        **_quantization(path, values),
    }


def _graphs(path: Path, values: dict[str, Any]) -> tuple[str, ...]:
    graphs = values["graphs"]
    some = isinstance(graphs, list) and 0 < len(graphs) <= len(GRAPHS)
    if not some or any(graphs.count(graph) > 1 for graph in graphs):
        expected = f"a list of at least one of {', '.join(GRAPHS)}, none twice"
        raise RecipeError(f"recipe {path}: graphs must be {expected}, got {quoted(graphs)}")
    for graph in graphs:
        _check_member(path, "graphs", graph, GRAPHS)
    if DEVICE_LOOP in graphs and (DECODER not in graphs or values["dialect"] != "ort"):
        raise RecipeError(
            f"recipe {path}: graphs: {DEVICE_LOOP!r} continues a {DECODER!r} of dialect 'ort': name both, "
            f"got {graphs!r} of dialect {values['dialect']!r}"
        )
    if values.get("format", ONNX) != ONNX and (len(graphs) > 1 or DEVICE_LOOP in graphs):
        raise RecipeError(
            f"recipe {path}: graphs: a PyTorch program holds its own weights, so a bundle has one of {FULL_SEQUENCE!r} "
            f"and {DECODER!r}, got {graphs!r}"
        )
    return tuple(graphs)


def _activations(path: Path, values: dict[str, Any]) -> str:
    """What is computed with: a floating-point precision says it, a quantised one leaves the choice."""
    precision = values["precision"]
    activations: str = values.get("activations", FLOAT_PRECISIONS.get(precision, "float32"))
    _check_member(path, "activations", activations, ACTIVATIONS)
    if FLOAT_PRECISIONS.get(precision, activations) != activations:
        raise RecipeError(
            f"recipe {path}: precision {precision!r} computes with {FLOAT_PRECISIONS[precision]}, got activations "
            f"{activations!r}; leave it out"
        )
    if values.get("format", ONNX) != ONNX:
        return activations
    if activations != "float32" and values["dialect"] != "ort":
        raise RecipeError(f"recipe {path}: activations {activations!r} need dialect 'ort', got {values['dialect']!r}")
    if activations != "float32" and FULL_SEQUENCE in values["graphs"]:
        raise RecipeError(f"recipe {path}: activations {activations!r} need a {DECODER!r}; leave {FULL_SEQUENCE!r} out")
    return activations


def _quantization(path: Path, values: dict[str, Any]) -> dict[str, Any]:
    forms: dict[str, Any] = {k: _form(path, k, values[k]) for k in ("quantization", "embedding") if k in values}
    overrides = values.get("overrides", {})
    if not isinstance(overrides, dict):
        raise RecipeError(f"recipe {path}: overrides must be a table of projections, got {quoted(overrides)}")
    for projection in overrides:
        _check_member(path, "overrides", projection, (*PROJECTIONS, HEADS, FUSION))
    forms["overrides"] = {name: _form(path, f"overrides.{name}", value) for name, value in overrides.items()}
    given = [key for key in ("quantization", "embedding", "overrides") if forms.get(key)]
    quantised = values["precision"] not in FLOAT_PRECISIONS
    if not quantised and given:
        raise RecipeError(
            f"recipe {path}: precision {values['precision']!r} quantises nothing, got [{given[0]}]; leave it out"
        )
    if values.get("format", ONNX) != ONNX:
        _check_rows_of_8_bits(path, values["precision"], values["dialect"])
        return forms
    if quantised and "quantization" not in forms:
        raise RecipeError(f"recipe {path}: precision {values['precision']!r} needs a [quantization]")
    if quantised and values["precision"] != f"int{forms['quantization'].bits}":
        bits = forms["quantization"].bits
        raise RecipeError(
            f"recipe {path}: precision {values['precision']!r} but quantization.bits {bits}: make them agree"
        )
    if quantised and values["dialect"] != "ort":
        raise RecipeError(f"recipe {path}: quantisation needs dialect 'ort', got {values['dialect']!r}")
    if "calibration" in values:
        forms["calibration"] = _calibration(path, values["calibration"], forms)
    every = [*forms["overrides"].values(), *(forms[key] for key in ("quantization", "embedding") if key in forms)]
    if _activations(path, values) != "float32" and any(form.accuracy_level == INT8_ACTIVATIONS for form in every):
        raise RecipeError(
            f"recipe {path}: accuracy_level {INT8_ACTIVATIONS} rounds activations to 8 bits, and activations are "
            f"{values['activations']!r}; use accuracy_level 0"
        )
    if "embedding" in forms and not forms["embedding"].symmetric:
        raise RecipeError(f"recipe {path}: embedding.symmetric must be true: one table serves lookup and product")
    return forms


def _check_rows_of_8_bits(path: Path, precision: str, dialect: str) -> None:
    """PyTorch's one way to quantise: FBGEMM's products, whose matrices have a scale a row."""
    if (precision == INT8_DYNAMIC) != (dialect == FBGEMM) or precision in ("int8", "int4"):
        raise RecipeError(
            f"recipe {path}: PyTorch quantises in one way, precision {INT8_DYNAMIC!r} with dialect {FBGEMM!r}; got "
            f"{precision!r} with {dialect!r}"
        )


def _calibration(path: Path, value: Any, forms: Mapping[str, Any]) -> CalibrationPlan:
    names = {f.name for f in fields(CalibrationPlan)}
    if not isinstance(value, dict) or value.keys() != names:
        raise RecipeError(
            f"recipe {path}: calibration must have exactly {', '.join(sorted(names))}, got {quoted(value)}"
        )
    for name, (least, most) in _CALIBRATION_RANGES.items():
        if type(value[name]) is not int or value[name] < least:
            raise RecipeError(f"recipe {path}: calibration.{name} must be at least {least}, got {quoted(value[name])}")
        if value[name] > most:
            raise RecipeError(f"recipe {path}: calibration.{name} must be at most {most}, got {quoted(value[name])}")
    quantised = [forms.get("quantization"), forms.get("embedding"), *forms["overrides"].values()]
    if quantised[0] is None or not all(form is None or form.symmetric for form in quantised):
        raise RecipeError(
            f"recipe {path}: calibration is of symmetric quantisation; leave it out, or set symmetric = true"
        )
    return CalibrationPlan(**value)


def _form(path: Path, key: str, value: Any) -> Quantization:
    names = {f.name for f in fields(Quantization)}
    if not isinstance(value, dict) or value.keys() != names:
        raise RecipeError(f"recipe {path}: {key} must have exactly {', '.join(sorted(names))}, got {quoted(value)}")
    _check_member(path, f"{key}.bits", value["bits"], BITS)
    _check_member(path, f"{key}.block_size", value["block_size"], BLOCK_SIZES)
    _check_member(path, f"{key}.symmetric", value["symmetric"], (True, False))
    _check_member(path, f"{key}.accuracy_level", value["accuracy_level"], ACCURACY_LEVELS)
    return Quantization(**value)


def _check_member(path: Path, key: str, value: Any, allowed: Any) -> None:
    if type(value) is not type(allowed[0]) or value not in allowed:  # True and 20.0 are no opsets
        raise RecipeError(f"recipe {path}: {key} must be one of {', '.join(map(str, allowed))}, got {quoted(value)}")
