"""Edits of files as values: what hypothesis draws, shrinks and prints, and what is done to the bytes.

A file is edited byte by byte, or as what it is: JSON values, fields of a protobuf message, the header of a safetensors
file, the pickle in a PyTorch archive. The second kind gets past the parsers, to the code that believes them.
"""

import io
import json
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import onnx
from hypothesis import strategies as st

# Written into a JSON text as they stand: values that a reader may trip over, some of them no JSON at all.
HOSTILE_JSON = (
    *("null", "true", "false", "0", "1", "-1", "2", "7", "65", "255", "100000", "-2147483649", "2147483648"),
    *("9223372036854775807", "9223372036854775808", "1" + "0" * 30, "9" * 5000, "0.5", "-0.0", "1e308", "1e999"),
    *("1e-320", "NaN", "Infinity", "-Infinity", '""', '"x"', '"1"', '"../x"', '"/etc/passwd"', '"a/b"', '"\\u0000"'),
    *('"\\ud800"', '"\\n\\u001b[2J"', '"' + "a" * 100_000 + '"', '"عربي"', "[]", "{}", "[0]", "[null]", '[""]'),
    *('{"": null}', "[[[]]]", "[" * 70 + "]" * 70, "[" * 100_000, "[" + "0," * 10_000 + "0]", '{"a": 1, "a": 2}'),
    *("01", "'x'", ""),
)
_HOSTILE_INTEGERS = (0, 1, -1, 2, 3, 7, 127, 255, 2**16, 2**31 - 1, -(2**31), 2**31, 2**40, 2**63 - 1, -(2**63))
_HOSTILE_TEXTS = ("", "x", "embedding", "../x", "/etc/passwd", "\0", "a" * 10_000, "com.microsoft", "model.onnx", "0")

Edit = Callable[[bytes], bytes]


@dataclass(frozen=True)
class ByteEdit:
    """One edit of bytes; places are fractions of the file, so that an edit fits any size."""

    kind: str
    place: float
    other: float
    data: bytes

    def __call__(self, raw: bytes) -> bytes:
        at, to = int(self.place * len(raw)), int(self.other * len(raw))
        first, last = min(at, to), max(at, to)
        match self.kind:
            case "flip":
                bit = 1 << (self.data[0] % 8 if self.data else 0)
                return raw[:at] + bytes([raw[at] ^ bit]) + raw[at + 1 :] if raw else raw
            case "put":
                return raw[:at] + self.data + raw[at + len(self.data) :]
            case "insert":
                return raw[:at] + self.data + raw[at:]
            case "truncate":
                return raw[:at]
            case "extend":
                return raw + self.data
            case "cut":
                return raw[:first] + raw[last:]
            case _:  # splice: a piece of the file once more, elsewhere
                return raw[:at] + raw[to : to + 64] + raw[at:]


def byte_edits() -> st.SearchStrategy[Edit]:
    """One edit of bytes, or a few."""
    kinds = st.sampled_from(["flip", "put", "insert", "truncate", "extend", "cut", "splice"])
    places = st.integers(0, 999_999).map(lambda place: place / 1e6)
    one = st.builds(ByteEdit, kinds, places, places, st.binary(min_size=1, max_size=16))
    return st.lists(one, min_size=1, max_size=4).map(lambda edits: Several(tuple(edits)))


@dataclass(frozen=True)
class Several:
    """Edits one after another."""

    edits: tuple[Edit, ...]

    def __call__(self, raw: bytes) -> bytes:
        for edit in self.edits:
            raw = edit(raw)
        return raw


@dataclass(frozen=True)
class JsonEdit:
    """An edit of one value of a JSON document; `chosen` is a fraction of all its values."""

    kind: str
    chosen: float
    text: str

    def __call__(self, raw: bytes) -> bytes:
        document = json.loads(raw)
        places = list(_places(document))
        if not places:
            return self.text.encode("utf-8", "surrogatepass")
        owner, key = places[int(self.chosen * len(places))]
        mark = "?mark?"
        match self.kind:
            case "replace":
                owner[key] = mark
            case "delete":
                del owner[key]
            case "rename" if isinstance(owner, dict):
                owner[f"{key}_"] = owner.pop(key)
            case "repeat" if isinstance(owner, list):
                owner.append(owner[key])
            case "copy":  # some other value of the document
                source, name = places[zlib.crc32(self.text.encode()) % len(places)]
                owner[key] = json.loads(json.dumps(source[name]))
            case _:
                owner[key] = [owner[key]]
        text = json.dumps(document, ensure_ascii=False)
        return text.replace(json.dumps(mark), self.text).encode("utf-8", "surrogatepass")


def json_edits() -> st.SearchStrategy[Edit]:
    """One edited value: most often replaced by a hostile one."""
    kinds = st.sampled_from(["replace", "replace", "replace", "delete", "rename", "repeat", "copy", "wrap"])
    return st.builds(
        JsonEdit, kinds, st.integers(0, 999_999).map(lambda place: place / 1e6), st.sampled_from(HOSTILE_JSON)
    )


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield value, key
        yield from _places(inner)


@dataclass(frozen=True)
class GraphEdit:
    """An edit of one field of an ONNX model's protobuf message, as large as this or as small as a bit."""

    kind: str
    chosen: float
    integer: int
    text: str

    def __call__(self, raw: bytes) -> bytes:
        model = onnx.ModelProto.FromString(raw)
        fields = list(_fields(model))
        message, field, index = fields[int(self.chosen * len(fields))]
        value = getattr(message, field.name)
        repeated = index is not None
        if self.kind == "delete":
            message.ClearField(field.name) if not repeated else value.pop(index)
        elif self.kind == "repeat" and repeated:
            value.append(value[index])
        elif field.type == field.TYPE_MESSAGE:
            (value[index] if repeated else value).Clear()
        else:
            self._put(message, field, index)
        return bytes(model.SerializeToString())

    def _put(self, message: Any, field: Any, index: int | None) -> None:
        new: Any = self.integer
        if field.cpp_type == field.CPPTYPE_STRING:
            new = self.text if field.type == field.TYPE_STRING else self.text.encode()
        elif field.cpp_type in (field.CPPTYPE_FLOAT, field.CPPTYPE_DOUBLE):
            new = float(self.integer)
        elif field.cpp_type == field.CPPTYPE_ENUM:
            new = field.enum_type.values[self.integer % len(field.enum_type.values)].number
        elif field.cpp_type == field.CPPTYPE_INT32:
            new = max(-(2**31), min(self.integer, 2**31 - 1))
        if index is None:
            setattr(message, field.name, new)
        else:
            getattr(message, field.name)[index] = new


def graph_edits() -> st.SearchStrategy[Edit]:
    """One edited field of a graph: operators, attributes, shapes, names, places of weights."""
    kinds = st.sampled_from(["put", "put", "put", "delete", "repeat"])
    places = st.integers(0, 999_999).map(lambda place: place / 1e6)
    return st.builds(GraphEdit, kinds, places, st.sampled_from(_HOSTILE_INTEGERS), st.sampled_from(_HOSTILE_TEXTS))


def _fields(message: Any) -> Iterator[tuple[Any, Any, int | None]]:
    """Every field that is set, inside out, with its place where there are several."""
    for field, value in message.ListFields():
        if isinstance(value, str | bytes) or not hasattr(value, "append"):
            yield message, field, None
            if field.type == field.TYPE_MESSAGE:
                yield from _fields(value)
            continue
        for index, item in enumerate(value):
            yield message, field, index
            if field.type == field.TYPE_MESSAGE:
                yield from _fields(item)


@dataclass(frozen=True)
class HeaderEdit:
    """An edit of a safetensors file's header, with its length put right or left as it was."""

    edit: Edit
    keeps_length: bool

    def __call__(self, raw: bytes) -> bytes:
        length = struct.unpack("<Q", raw[:8])[0]
        header = self.edit(raw[8 : 8 + length])
        return struct.pack("<Q", length if self.keeps_length else len(header)) + header + raw[8 + length :]


def header_edits() -> st.SearchStrategy[Edit]:
    """An edit of a safetensors header as JSON."""
    return st.builds(HeaderEdit, json_edits(), st.booleans())


@dataclass(frozen=True)
class ArchiveEdit:
    """An edit of the pickle in a PyTorch archive, which stays a whole archive."""

    edit: Edit

    def __call__(self, raw: bytes) -> bytes:
        old, new = zipfile.ZipFile(io.BytesIO(raw)), io.BytesIO()
        with zipfile.ZipFile(new, "w", zipfile.ZIP_STORED) as archive:
            for name in old.namelist():
                content = old.read(name)
                archive.writestr(name, self.edit(content) if name.endswith("data.pkl") else content)
        return new.getvalue()


def archive_edits() -> st.SearchStrategy[Edit]:
    """Edits of bytes of the pickle in a PyTorch archive."""
    return st.builds(ArchiveEdit, byte_edits())


def edits_of(name: str) -> st.SearchStrategy[Edit]:
    """Edits that suit a file of this name."""
    as_what_it_is = {
        ".json": json_edits(),
        ".onnx": graph_edits(),
        ".safetensors": header_edits(),
        ".bin": archive_edits(),
    }
    suffix = name[name.rfind(".") :]
    return st.one_of(as_what_it_is[suffix], byte_edits()) if suffix in as_what_it_is else byte_edits()
