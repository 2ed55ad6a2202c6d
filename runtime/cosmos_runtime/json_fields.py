"""JSON read strictly, and typed access to a document of it, with errors that name the key that is wrong."""

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from cosmos_runtime.errors import BundleError
from cosmos_runtime.quoting import quoted

# What this project writes has fewer than 10 levels. Python's own functions (copies, comparisons, writing it again) call
# themselves for each, and run out of stack some hundreds further down.
DEEPEST_NESTING = 64
# Beyond 64 bits an integer is no size, count or id, and numpy takes none.
LARGEST_INTEGER = 2**63 - 1

_SURROGATE = re.compile("[\ud800-\udfff]")


def strict_json(text: str, *, allow_nan: bool = False) -> Any:
    """The value of a JSON text that every reader and writer can handle.

    Stricter than `json.loads`: refused are a key given twice and the non-JSON constants NaN and Infinity, which would
    let two readers of one file see two different things; numbers beyond float64; halves of characters (lone
    surrogates), which cannot be printed; and nesting deeper than `DEEPEST_NESTING`. With `allow_nan`, numbers are read
    as Python reads them.

    Raises: ValueError saying what is wrong.
    """
    numbers: dict[str, Any] = {} if allow_nan else {"parse_constant": _refuse_constant, "parse_float": _finite}
    try:
        value = json.loads(text, object_pairs_hook=_without_duplicates, **numbers)
    except RecursionError:
        raise ValueError(f"nested deeper than {DEEPEST_NESTING} levels") from None
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > DEEPEST_NESTING:
            raise ValueError(f"nested deeper than {DEEPEST_NESTING} levels")
        level = [inner for outer in level for inner in _contents(outer)]
    return value


def parse_object(text: str, document: str) -> "Fields":
    """Parse `text` as one JSON object, as `strict_json` does.

    Raises: BundleError naming `document`.
    """
    try:
        values = strict_json(text)
    except ValueError as error:
        raise BundleError(f"{document}: not valid JSON: {error}; export the bundle again") from error
    if not isinstance(values, dict):
        raise BundleError(f"{document}: expected a JSON object, got {quoted(values)}; export the bundle again")
    return Fields(values, document)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"key {quoted(twice)} is given twice")
    return values


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"{quoted(digits)[1:-1]} is beyond the range of float64")
    return number


def _contents(value: Any) -> Iterator[Any]:
    """What a list or an object holds, keys included. Raises: ValueError for a string with half a character."""
    if isinstance(value, dict):
        yield from value
        yield from value.values()
    elif isinstance(value, list):
        yield from value
    elif isinstance(value, str) and not value.isascii() and _SURROGATE.search(value):
        raise ValueError(f"{quoted(value)} has half of a surrogate pair")


@dataclass(frozen=True)
class Fields:
    """One JSON object and where it stands: `document` and the dotted `path` in it ("" at the root)."""

    values: Mapping[str, Any]
    document: str
    path: str = ""

    def fail(self, key: str, expected: str, given: object) -> NoReturn:
        """Raise the BundleError for `key`."""
        raise BundleError(
            f"{self.document}: {self._path_of(key)}: expected {expected}, got {quoted(given)}; export the bundle again"
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

    def integer(self, key: str, *, minimum: int = 0, maximum: int = LARGEST_INTEGER) -> int:
        """An integer from `minimum` to `maximum`."""
        value = self.value(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
            self.fail(key, f"an integer, at least {minimum}", value)
        if value > maximum:
            self.fail(key, f"an integer, at most {maximum}", value)
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
