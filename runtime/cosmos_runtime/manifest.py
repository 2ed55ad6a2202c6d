"""`manifest.json`: the one truth of what a bundle holds, for the exporter that writes it and the runtime that reads it.

Within one `format_version`, keys may be added that an older reader can safely ignore; anything else raises the version.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any

from cosmos_runtime.bounds import LARGEST_MEMORY, LARGEST_VOCABULARY, LONGEST_SEQUENCE
from cosmos_runtime.errors import BundleError
from cosmos_runtime.head_settings import check_head_settings
from cosmos_runtime.json_fields import Fields, parse_object
from cosmos_runtime.manifest_digest import (
    DIGEST,
    NO_DIGEST,
    OPERATORS,
    SHA256,
    SHA256_WORDS,
    check_digest_field,
    with_digest,
)
from cosmos_runtime.scores import CAPABILITIES

MANIFEST_NAME = "manifest.json"
FORMAT = "cosmos-bundle"
FORMAT_VERSION = 2

# What a bundle's graphs are, and the version of the manifest that first knew it. This runtime runs ONNX; the others are
# PyTorch programs, for `cosmos_export` and for torch alone.
ONNX, TORCHSCRIPT, PT2 = "onnx", "torchscript", "pt2"
GRAPH_FORMATS = {ONNX: 1, TORCHSCRIPT: 2, PT2: 2}

# Graphs: logits of whole sequences, nothing remembered; and new tokens on top of a key/value cache.
FULL_SEQUENCE = "full_sequence"
DECODER = "decoder"
# What a recipe asks for to have decoding stay on the device: a decoder that is told lengths instead of a mask, and the
# graphs that choose its next tokens. Those are called SAMPLER with a kind, as in "sampler.greedy".
DEVICE_LOOP = "device_loop"
SAMPLER = "sampler"

DTYPES = ("bool", "int4", "uint4", "int8", "uint8", "int32", "int64", "float16", "bfloat16", "float32", "float64")

# Segments separated by "/", none of them "." or ".."; no backslash, colon (drives, streams) or control character.
_FILE_NAME = r"(?!\.{1,2}(/|$))[^/\\:\x00-\x1f\ud800-\udfff]+(/(?!\.{1,2}(/|$))[^/\\:\x00-\x1f\ud800-\udfff]+)*"
_FILE_NAME_WORDS = "a plain relative file name inside the bundle (no absolute path, '..' or backslash)"


class Role(StrEnum):
    """What a graph's tensor is for; the runtime finds tensors by role, never by name."""

    TOKENS = "tokens"
    LOGITS = "logits"
    # 1 for the tokens that a row has, new ones included; padding is on the right.
    ATTENTION_MASK = "attention_mask"
    # How far before a row's last token each wanted position lies; may be left out, then only the last.
    LOGIT_OFFSETS = "logit_offsets"
    # One a layer, in the layers' order; past and present of a layer may be one buffer.
    PAST_KEY = "past_key"
    PAST_VALUE = "past_value"
    PRESENT_KEY = "present_key"
    PRESENT_VALUE = "present_value"

    # Of a graph with capability heads. Whether the new tokens end a call of the model, or are a piece of one that goes
    # on; may be left out, then they do.
    ENDS_CALL = "ends_call"
    # Whether a run wants the scores that nothing but a report reads; may be left out, then it does. Where it does not,
    # they have no rows.
    WANTS_SCORES = "wants_scores"
    # The working memory (B, M, D) and the calls that a row has behind it (B,); the vector (B, D) of its first token.
    # Past and present of a state may be one buffer.
    PAST_MEMORY_KEYS = "past_memory_keys"
    PAST_MEMORY_VALUES = "past_memory_values"
    PRESENT_MEMORY_KEYS = "present_memory_keys"
    PRESENT_MEMORY_VALUES = "present_memory_values"
    MEMORY_CALLS = "memory_calls"
    PAST_QUERY = "past_query"
    PRESENT_QUERY = "present_query"
    # What the heads found; the name says what (`cosmos_runtime.score_specs`).
    SCORE = "score"

    # Of a decoder that is told lengths. A row's tokens less one (B,); tokens of the longest row, a scalar in the host's
    # memory; and which rows of the hidden states (B * T, D) get logits, so that these are (n, V).
    LAST_INDEX = "last_index"
    TOTAL_LENGTH = "total_length"
    LOGIT_ROWS = "logit_rows"

    # Of a sampler: what it keeps from step to step, each with its next value, and what a request sets.
    NEXT_TOKENS = "next_tokens"
    NEXT_LAST_INDEX = "next_last_index"
    HISTORY = "history"
    NEXT_HISTORY = "next_history"
    CHOSEN_LOGIT = "chosen_logit"
    SEEN = "seen"
    NEXT_SEEN = "next_seen"
    LIMIT = "limit"
    GOES_ON = "goes_on"
    PENALTY = "penalty"
    SHARPNESS = "sharpness"
    RANK_BIAS = "rank_bias"
    TOP_P = "top_p"
    TOP_K = "top_k"
    EARLIEST = "earliest"
    UNIFORMS = "uniforms"


@dataclass(frozen=True)
class TensorSpec:
    """One graph input or output. `shape` holds a fixed size or the name of a dynamic axis for each dimension."""

    name: str
    role: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class GraphSpec:
    """One graph of the bundle: its file and its signature. An ONNX graph has an opset."""

    file: str
    opset: int | None
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def input(self, role: str) -> TensorSpec:
        """The only input of `role`; BundleError where there is none, or more than one."""
        return self._only(self.inputs, role, "input")

    def takes(self, role: str) -> bool:
        """Whether an input has this role."""
        return any(tensor.role == role for tensor in self.inputs)

    def output(self, role: str) -> TensorSpec:
        """The only output of `role`; BundleError where there is none, or more than one."""
        return self._only(self.outputs, role, "output")

    def _only(self, tensors: tuple[TensorSpec, ...], role: str, kind: str) -> TensorSpec:
        found = [tensor for tensor in tensors if tensor.role == role]
        if len(found) != 1:
            roles = ", ".join(tensor.role for tensor in tensors)
            raise BundleError(
                f"{self.file}: expected one {kind} of role {str(role)!r}, got {len(found)} (roles: {roles})"
            )
        return found[0]


@dataclass(frozen=True)
class FileEntry:
    """Size in bytes and lower-case hexadecimal SHA-256 of one file."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """A bundle's manifest.

    `graph_format` is one of `GRAPH_FORMATS`.
    `source`, `recipe`, `model`, `generation` and `parity` are free-form beyond the keys checked here. `generation`
    holds the model's own defaults for sampling; `files` names every file of the bundle except the manifest itself.
    `capabilities` is None for a plain decoder. A model with capability heads says which (`names`), the `settings` that
    its reports follow from (`cosmos_runtime.scores`), and of its `memory` how many entries it keeps (`size`) and has
    room for at least (`least`), or null.
    `operators` names those that the ONNX graphs use, by domain: the runtime loads no graph that has others. It is None
    for PyTorch programs, and in bundles of before it was recorded.
    """

    name: str
    created: str
    tool: Mapping[str, str]
    versions: Mapping[str, str]
    source: Mapping[str, Any]
    recipe: Mapping[str, Any]
    model: Mapping[str, Any]
    generation: Mapping[str, Any]
    graphs: Mapping[str, GraphSpec]
    tokenizer: str | None
    files: Mapping[str, FileEntry]
    parity: Mapping[str, Any] | None
    capabilities: Mapping[str, Any] | None = None
    graph_format: str = ONNX
    operators: Mapping[str, tuple[str, ...]] | None = None

    @property
    def vocab_size(self) -> int:
        """V, the number of token ids the model knows."""
        return int(self.model["vocab_size"])

    @property
    def max_sequence_length(self) -> int:
        """S, the most tokens of prompt and answer together."""
        return int(self.model["max_sequence_length"])

    def graph(self, name: str) -> GraphSpec:
        """The graph called `name`; BundleError where the bundle has none."""
        if name not in self.graphs:
            raise BundleError(
                f"{MANIFEST_NAME}: graphs: expected one named {name!r}, got {', '.join(self.graphs)}; "
                f"export the bundle again with a recipe that includes it"
            )
        return self.graphs[name]

    @classmethod
    def from_json(cls, text: str) -> "Manifest":
        """Parse and check a manifest. Raises: BundleError naming the first key that is wrong."""
        fields = parse_object(text, MANIFEST_NAME)
        _check_format(fields)
        check_digest_field(fields)
        graph_format = _graph_format(fields)
        manifest = cls(
            name=fields.text("name"),
            created=_timestamp(fields, "created"),
            tool=_tool(fields.object("tool")),
            versions=fields.object("versions").texts(),
            source=_source(fields.object("source")),
            recipe=_recipe(fields.object("recipe")),
            model=_model(fields.object("model")),
            generation=fields.object("generation").as_dict(),
            graphs=_graphs(fields.object("graphs"), graph_format),
            tokenizer=_tokenizer(fields),
            files=_files(fields.object("files")),
            parity=_parity(fields.optional_object("parity")),
            capabilities=_capabilities(fields),
            graph_format=graph_format,
            operators=_operators(fields),
        )
        _check_files_listed(manifest)
        return manifest

    def to_json(self) -> str:
        """The manifest as JSON text in a stable key order, with its digest.

        Raises: BundleError for what `from_json` would refuse.
        """
        version = {"format": FORMAT, "format_version": GRAPH_FORMATS[self.graph_format]}
        try:
            document = {**version, **asdict(self), DIGEST: NO_DIGEST}
            text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        except (TypeError, ValueError) as error:
            raise BundleError(f"{MANIFEST_NAME}: cannot be written as JSON: {error}") from error
        Manifest.from_json(text)
        return with_digest(text)


def _check_format(fields: Fields) -> None:
    if fields.value("format") != FORMAT:
        fields.fail("format", repr(FORMAT), fields.value("format"))
    version = fields.integer("format_version", minimum=1)
    if version > FORMAT_VERSION:
        raise BundleError(
            f"{MANIFEST_NAME}: format_version: this runtime reads up to {FORMAT_VERSION}, got {version}; "
            f"upgrade it with: pip install --upgrade cosmos-export"
        )


def _graph_format(fields: Fields) -> str:
    if "graph_format" not in fields.values:  # bundles of before there were others have no such key
        return ONNX
    known = "|".join(GRAPH_FORMATS)
    return fields.text("graph_format", pattern=known, expected=f"one of {', '.join(GRAPH_FORMATS)}")


def _timestamp(fields: Fields, key: str) -> str:
    value = fields.text(key)
    try:
        datetime.fromisoformat(value)
    except ValueError:
        fields.fail(key, "an ISO 8601 time such as 2026-11-22T13:00:00Z", value)
    return value


def _tool(fields: Fields) -> dict[str, str]:
    return {**fields.texts(), "name": fields.text("name"), "version": fields.text("version")}


def _source(fields: Fields) -> dict[str, Any]:
    fields.text("kind", pattern="checkpoint|preset", expected="'checkpoint' or 'preset'")
    fields.text("location")
    return fields.as_dict()


def _recipe(fields: Fields) -> dict[str, Any]:
    for key in ("name", "precision", "dialect"):
        fields.text(key)
    return fields.as_dict()


def _model(fields: Fields) -> dict[str, Any]:
    fields.integer("vocab_size", minimum=1, maximum=LARGEST_VOCABULARY)
    fields.integer("max_sequence_length", minimum=1, maximum=LONGEST_SEQUENCE)
    fields.boolean("causal")
    fields.text("head")
    fields.integer("parameters")
    return fields.as_dict()


def _graphs(fields: Fields, graph_format: str) -> dict[str, GraphSpec]:
    graphs = {name: _graph(child, graph_format) for name, child in fields.children().items()}
    if not graphs:
        raise BundleError(f"{MANIFEST_NAME}: graphs: expected at least one graph, got none; export the bundle again")
    return graphs


def _graph(fields: Fields, graph_format: str) -> GraphSpec:
    return GraphSpec(
        file=_file_name(fields, "file"),
        opset=fields.integer("opset", minimum=1) if graph_format == ONNX else None,
        inputs=_tensors(fields, "inputs"),
        outputs=_tensors(fields, "outputs"),
    )


def _tensors(fields: Fields, key: str) -> tuple[TensorSpec, ...]:
    tensors = tuple(_tensor(item) for item in fields.objects(key))
    names = [tensor.name for tensor in tensors]
    if len(set(names)) != len(names):
        fields.fail(key, "tensor names that differ", names)
    return tensors


def _tensor(fields: Fields) -> TensorSpec:
    return TensorSpec(
        name=fields.text("name"),
        role=fields.text("role"),
        dtype=fields.text("dtype", pattern="|".join(DTYPES), expected=f"one of {', '.join(DTYPES)}"),
        shape=_shape(fields, "shape"),
    )


def _shape(fields: Fields, key: str) -> tuple[int | str, ...]:
    value = fields.value(key)
    if not isinstance(value, list) or not all(_is_axis(axis) for axis in value):
        fields.fail(key, "a list of sizes (integers, at least 0) and axis names (non-empty strings)", value)
    return tuple(value)


def _is_axis(axis: object) -> bool:
    if isinstance(axis, str):
        return axis != ""
    return isinstance(axis, int) and not isinstance(axis, bool) and axis >= 0


def _file_name(fields: Fields, key: str) -> str:
    return fields.text(key, pattern=_FILE_NAME, expected=_FILE_NAME_WORDS)


def _tokenizer(fields: Fields) -> str | None:
    return None if fields.value("tokenizer") is None else _file_name(fields, "tokenizer")


def _files(fields: Fields) -> dict[str, FileEntry]:
    fields.check_keys(_FILE_NAME, _FILE_NAME_WORDS)
    if MANIFEST_NAME in fields.values:
        fields.fail(MANIFEST_NAME, "every file except the manifest itself", MANIFEST_NAME)
    return {name: _file_entry(child) for name, child in fields.children().items()}


def _file_entry(fields: Fields) -> FileEntry:
    return FileEntry(size=fields.integer("size"), sha256=fields.text("sha256", pattern=SHA256, expected=SHA256_WORDS))


def _parity(fields: Fields | None) -> dict[str, Any] | None:
    if fields is None:
        return None
    fields.boolean("passed")
    return fields.as_dict()


def _capabilities(fields: Fields) -> dict[str, Any] | None:
    if fields.values.get("capabilities") is None:  # bundles of before there were any have no such key
        return None
    heads = fields.object("capabilities")
    names, settings = heads.value("names"), heads.object("settings").children()
    if not isinstance(names, list) or names != list(settings) or not set(names) <= set(CAPABILITIES):
        heads.fail("names", f"those of the settings, out of {', '.join(CAPABILITIES)}", names)
    check_head_settings(heads.object("settings"))
    memory = heads.optional_object("memory")
    if memory is not None:
        memory.integer("size", minimum=memory.integer("least"), maximum=LARGEST_MEMORY)
    return heads.as_dict()


def _operators(fields: Fields) -> dict[str, tuple[str, ...]] | None:
    if fields.values.get(OPERATORS) is None:
        return None
    by_domain = fields.object(OPERATORS)
    for domain in by_domain.values:
        names = by_domain.value(domain)
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            by_domain.fail(domain, "a list of operators' names", names)
    return {domain: tuple(names) for domain, names in by_domain.values.items()}


def _check_files_listed(manifest: Manifest) -> None:
    """Refuse a graph or tokenizer without size and hash: it would escape every check of the bundle."""
    named = {f"graphs.{name}.file": graph.file for name, graph in manifest.graphs.items()}
    if manifest.tokenizer is not None:
        named["tokenizer"] = manifest.tokenizer
    for key, file in named.items():
        if file not in manifest.files:
            raise BundleError(f"{MANIFEST_NAME}: {key}: {file!r} is not listed under files; export the bundle again")
