"""Typed access to a JSON document, with errors that name the key that is wrong."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from cosmos_runtime.errors import BundleError

_LONGEST_QUOTE = 80


def parse_object(text: str, document: str) -> "Fields":
    """Parse `text` as one JSON object.

    Stricter than `json.loads`: a key given twice and the non-JSON constants NaN and Infinity are refused,
    because each would let two readers of one file see two different things.

    Raises: BundleError naming `document`.
    """
    try:
        values = json.loads(text, object_pairs_hook=_without_duplicates, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{document}: not valid JSON: {error}; export the bundle again") from error
    if not isinstance(values, dict):
        raise BundleError(f"{document}: expected a JSON object, got {_quote(values)}; export the bundle again")
    return Fields(values, document)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)!r} is given twice")
    return values


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def _quote(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST_QUOTE else text[:_LONGEST_QUOTE] + "..."


@dataclass(frozen=True)
class Fields:
    """One JSON object and where it stands: `document` and the dotted `path` in it ("" at the root)."""

    values: Mapping[str, Any]
    document: str
    path: str = ""

    def fail(self, key: str, expected: str, given: object) -> NoReturn:
        """Raise the BundleError for `key`."""
        raise BundleError(
            f"{self.document}: {self._path_of(key)}: expected {expected}, got {_quote(given)}; export the bundle again"
        )

    def value(self, key: str) -> Any:
        """The value of a required key, of any type."""
        if key not in self.values:
            raise BundleError(f"{self.document}: {self._path_of(key)}: missing; export the bundle again")
        return self.values[key]

    def text(self, key: str, *, pattern: str = r"(?s).+", expected: str = "a non-empty string") -> str:
        """A string that matches `pattern` as a whole; `expected` says so in words."""
        value = self.value(key)
        if not isinstance(value, str) or re.fullmatch(pattern, value) is None:
            self.fail(key, expected, value)
        return value

    def integer(self, key: str, *, minimum: int = 0) -> int:
        """An integer, at least `minimum`."""
        value = self.value(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
            self.fail(key, f"an integer, at least {minimum}", value)
        return value

    def boolean(self, key: str) -> bool:
        """true or false."""
        value = self.value(key)
        if not isinstance(value, bool):
            self.fail(key, "true or false", value)
        return value

    def object(self, key: str) -> "Fields":
        """A nested object."""
        value = self.value(key)
        if not isinstance(value, dict):
            self.fail(key, "an object", value)
        return Fields(value, self.document, self._path_of(key))

    def optional_object(self, key: str) -> "Fields | None":
        """A nested object or null; the key itself is required."""
        return None if self.value(key) is None else self.object(key)

    def objects(self, key: str) -> "tuple[Fields, ...]":
        """A non-empty list of objects."""
        value = self.value(key)
        if not isinstance(value, list) or not value or not all(isinstance(item, dict) for item in value):
            self.fail(key, "a non-empty list of objects", value)
        return tuple(Fields(item, self.document, f"{self._path_of(key)}[{i}]") for i, item in enumerate(value))

    def children(self) -> "dict[str, Fields]":
        """Every value of this object, each of which must be an object itself."""
        return {key: self.object(key) for key in self.values}

    def check_keys(self, pattern: str, expected: str) -> None:
        """Check that every key matches `pattern` as a whole; `expected` says so in words."""
        for key in self.values:
            if re.fullmatch(pattern, key) is None:
                self.fail(key, expected, key)

    def texts(self) -> dict[str, str]:
        """This object as a mapping of strings to strings."""
        return {key: self.text(key, pattern=r"(?s).*", expected="a string") for key in self.values}

    def as_dict(self) -> dict[str, Any]:
        """A shallow copy of the plain values."""
        return dict(self.values)

    def _path_of(self, key: str) -> str:
        return f"{self.path}.{key}" if self.path else key
