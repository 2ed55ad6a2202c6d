"""What an ONNX graph file asks for, read without ONNX and before ONNX Runtime sees it: operators, external data, and
the shapes of the tables that it looks rows up in.

A graph file is a protobuf message (https://github.com/onnx/onnx/blob/main/onnx/onnx.proto). Only the few fields that
lead to a node or to a tensor's place are followed, everything else is stepped over by its length, so that inline
weights cost nothing. The reader is stricter than protobuf: what two readers could understand in two ways is refused.
"""

import mmap
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from cosmos_runtime.errors import BundleError

# ONNX's own operators; the empty string is another name of this domain.
ONNX_DOMAIN = "ai.onnx"

# Field numbers of onnx.proto.
_MODEL = {"graph": 7, "training_info": 20, "functions": 25}
_GRAPH = {"node": 1, "initializer": 5, "sparse_initializer": 15}
_NODE = {"input": 1, "op_type": 4, "attribute": 5, "domain": 7}
_ATTRIBUTE = {"t": 5, "g": 6, "tensors": 10, "graphs": 11, "sparse_tensor": 22, "sparse_tensors": 23}
_TENSOR = {"dims": 1, "name": 8, "external_data": 13}
_SPARSE_TENSOR = {"values": 1, "indices": 2}
_ENTRY = {"key": 1, "value": 2}

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_FIXED_SIZES = {_FIXED64: 8, _FIXED32: 4}
# The largest number that one byte says, as most tags and lengths are; a byte beyond stands for one that is not there.
_ONE_BYTE, _NO_BYTE = 0x7F, 0x80
_LARGEST_TAG = (1 << 32) - 1
_LARGEST_DIMENSION = (1 << 63) - 1
_LONGEST_VARINT = 10

# A branch in a branch in a branch: exported models have one level.
_DEEPEST_SUBGRAPH = 16
# A model of 80 layers in standard operators has some hundred thousand; a file that has more would take minutes to read.
_MOST_FIELDS = 4_000_000

# Operators whose inputs are kept: they look up rows of a table by token or by position.
TABLE_READERS = frozenset({"Gather", "GatherBlockQuantized", "GroupQueryAttention"})

_EXTERNAL_KEYS = ("location", "offset", "length", "checksum")


@dataclass(frozen=True)
class ExternalData:
    """Where a tensor's bytes lie: `length` bytes (None: as many as its shape needs) of a file, from `offset` on."""

    tensor: str
    location: str
    offset: int
    length: int | None


@dataclass(frozen=True)
class GraphContents:
    """The operators (domain, name) of a graph file's nodes, those of branches and loops included, and the places of all
    its external tensors. Of the graph outside branches and loops also the shapes of its initializers, and its
    `TABLE_READERS` with the names of their inputs ("" for one that is left out)."""

    operators: set[tuple[str, str]] = field(default_factory=set)
    external: list[ExternalData] = field(default_factory=list)
    initializers: dict[str, tuple[int, ...]] = field(default_factory=dict)
    readers: list[tuple[str, list[str]]] = field(default_factory=list)


def read_graph(path: Path) -> GraphContents:
    """What the graph file at `path` asks for.

    Raises: BundleError where it cannot be read, is no ONNX graph, or has parts that an exported graph never has.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Reader(path, data).read()
    except OSError as error:
        raise BundleError(f"{path}: cannot be read: {error.strerror}; copy or export the bundle again") from error
    except ValueError as error:  # mmap's word on an empty file
        raise BundleError(f"{path}: expected an ONNX graph, got an empty file; export the bundle again") from error


class _Reader:
    """One walk over one file. Messages are given as (start, end) in it."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path, self._data = path, data
        self._contents = GraphContents()
        self._fields_left = _MOST_FIELDS

    def read(self) -> GraphContents:
        graphs = 0
        for number, start, end in self._messages(0, len(self._data), _MODEL):
            if number != _MODEL["graph"]:
                part = "local functions" if number == _MODEL["functions"] else "a training graph"
                self._fail(f"has {part}, which no bundle needs")
            graphs += 1
            self._graph(start, end, 0)
        if graphs != 1:
            self._damaged(f"expected one graph, got {graphs}")
        return self._contents

    def _graph(self, start: int, end: int, depth: int) -> None:
        if depth > _DEEPEST_SUBGRAPH:
            self._fail(f"branches or loops are nested more than {_DEEPEST_SUBGRAPH} deep")
        for number, at, stop in self._messages(start, end, _GRAPH):
            if number == _GRAPH["node"]:
                self._node(at, stop, depth)
            elif number == _GRAPH["initializer"]:
                self._initializer(at, stop, depth)
            else:
                self._sparse_tensor(at, stop)

    def _initializer(self, start: int, end: int, depth: int) -> None:
        name, shape = self._tensor(start, end)
        if depth == 0:
            if name in self._contents.initializers:
                self._fail(f"the initializer {name!r} is given twice")
            self._contents.initializers[name] = shape

    def _node(self, start: int, end: int, depth: int) -> None:
        texts: dict[int, str] = {}
        inputs: list[tuple[int, int]] = []
        for number, at, stop in self._messages(start, end, _NODE):
            if number == _NODE["attribute"]:
                self._attribute(at, stop, depth)
            elif number == _NODE["input"]:
                inputs.append((at, stop))
            else:
                self._put(texts, number, at, stop, "a node's operator or domain")
        operator, domain = texts.get(_NODE["op_type"], ""), texts.get(_NODE["domain"], "")
        self._contents.operators.add((domain or ONNX_DOMAIN, operator))
        if depth == 0 and operator in TABLE_READERS:
            names = [self._text(at, stop, "the name of a node's input") for at, stop in inputs]
            self._contents.readers.append((operator, names))

    def _attribute(self, start: int, end: int, depth: int) -> None:
        for number, at, stop in self._messages(start, end, _ATTRIBUTE):
            if number in (_ATTRIBUTE["g"], _ATTRIBUTE["graphs"]):
                self._graph(at, stop, depth + 1)
            elif number in (_ATTRIBUTE["t"], _ATTRIBUTE["tensors"]):
                self._tensor(at, stop)
            else:
                self._sparse_tensor(at, stop)

    def _sparse_tensor(self, start: int, end: int) -> None:
        for _, at, stop in self._messages(start, end, _SPARSE_TENSOR):
            self._tensor(at, stop)

    def _tensor(self, start: int, end: int) -> tuple[str, tuple[int, ...]]:
        """Name and shape. A tensor with any external entry counts as external, whatever its `data_location` says."""
        names: dict[int, str] = {}
        entries: dict[str, str] = {}
        shape: list[int] = []
        for number, at, stop in self._messages(start, end, _TENSOR):
            if number == _TENSOR["name"]:
                self._put(names, number, at, stop, "a tensor's name")
            elif number == _TENSOR["dims"]:
                shape += self._dimensions(at, stop)
            else:
                self._external_entry(entries, at, stop)
        name = names.get(_TENSOR["name"], "")
        if entries:
            self._contents.external.append(self._external(name, entries))
        return name, tuple(shape)

    def _dimensions(self, start: int, end: int) -> Iterator[int]:
        """One number, or several that are packed into one field: the same bytes."""
        at = start
        while at < end:
            size, at = self._varint(at, end)
            if size > _LARGEST_DIMENSION:
                self._fail("a tensor has a negative size")
            yield size

    def _external_entry(self, entries: dict[str, str], start: int, end: int) -> None:
        texts: dict[int, str] = {}
        for number, at, stop in self._messages(start, end, _ENTRY):
            self._put(texts, number, at, stop, "an entry of external data")
        key = texts.get(_ENTRY["key"], "")
        if key not in _EXTERNAL_KEYS or key in entries:
            self._fail(f"external data: expected each of {', '.join(_EXTERNAL_KEYS)} at most once, got {key!r}")
        entries[key] = texts.get(_ENTRY["value"], "")

    def _external(self, tensor: str, entries: dict[str, str]) -> ExternalData:
        length = self._size(tensor, entries["length"]) if "length" in entries else None
        return ExternalData(tensor, entries.get("location", ""), self._size(tensor, entries.get("offset", "0")), length)

    def _size(self, tensor: str, text: str) -> int:
        if not (text.isascii() and text.isdigit() and len(text) < 20):
            self._fail(f"external data of {tensor!r}: expected a number of bytes, got {text[:40]!r}")
        return int(text)

    def _put(self, texts: dict[int, str], number: int, start: int, end: int, what: str) -> None:
        """A string that may be given once: protobuf would take the last, another reader the first."""
        if number in texts:
            self._fail(f"{what} is given twice")
        texts[number] = self._text(start, end, what)

    def _text(self, start: int, end: int, what: str) -> str:
        try:
            return self._data[start:end].decode("utf-8")
        except UnicodeDecodeError:
            return self._fail(f"{what} is not UTF-8")

    def _messages(self, start: int, end: int, wanted: dict[str, int]) -> Iterator[tuple[int, int, int]]:
        """Number, start and end of the `wanted` fields of the message from `start` to `end`; all of them are strings or
        messages, or "dims". Every field is stepped over by the rules of the wire format.
        https://protobuf.dev/programming-guides/encoding/
        """
        data, numbers, integers, at = self._data, wanted.values(), wanted.get("dims"), start
        while at < end:
            self._fields_left -= 1
            tag = data[at]
            at += 1
            if tag > _ONE_BYTE:
                tag, at = self._varint(at - 1, end)
            number, kind = tag >> 3, tag & 7
            if kind == _BYTES:
                size = data[at] if at < end else _NO_BYTE
                at += 1
                if size > _ONE_BYTE:
                    size, at = self._varint(at - 1, end)
                begin, at = at, at + size
            elif kind == _VARINT:
                begin, (_, at) = at, self._varint(at, end)
            else:
                begin, at = at, at + self._fixed_size(kind)
            if at > end:
                self._damaged("it ends in the middle of a field, as a cut file does")
            if number == 0 or tag > _LARGEST_TAG:
                self._damaged("a field without a number")
            if self._fields_left < 0:
                self._fail(f"has more than {_MOST_FIELDS:,} fields")
            if number in numbers and kind != _BYTES and not (number == integers and kind == _VARINT):
                self._damaged(f"field {number} is of wire type {kind}, expected {_BYTES}")
            if number in numbers:
                yield number, begin, at

    def _fixed_size(self, kind: int) -> int:
        if kind not in _FIXED_SIZES:
            self._damaged(f"a field of wire type {kind}")
        return _FIXED_SIZES[kind]

    def _varint(self, at: int, end: int) -> tuple[int, int]:
        """The number at `at`, seven bits a byte, lowest first, and where it ends."""
        value = shift = 0
        stop = min(end, at + _LONGEST_VARINT)
        while at < stop:
            byte = self._data[at]
            at += 1
            value |= (byte & _ONE_BYTE) << shift
            if byte <= _ONE_BYTE:
                return value, at
            shift += 7
        return self._damaged("a number without an end")

    def _damaged(self, problem: str) -> NoReturn:
        self._fail(f"ONNX Runtime cannot load it: it is no valid ONNX file: {problem}")

    def _fail(self, problem: str) -> NoReturn:
        raise BundleError(f"{self._path}: {problem}; export the bundle again")
