"""Checks of what a caller gives, on the host, before a graph sees it.

Providers differ in what they do with a bad id (an error, a wrapped index, silence), so none of them is asked.
"""

import operator
from collections.abc import Iterable
from typing import Any, SupportsIndex

import numpy as np
import numpy.typing as npt

from cosmos_runtime.arrays import TokenIds
from cosmos_runtime.errors import InputError, first_line
from cosmos_runtime.manifest import TensorSpec
from cosmos_runtime.quoting import quoted


def token_batch(input_ids: npt.ArrayLike, *, vocab_size: int, max_sequence_length: int) -> TokenIds:
    """Check token ids and return them as (B, T) int64; a (T,) row becomes a batch of one.

    Raises: InputError for another rank or dtype, an empty batch, T > max_sequence_length, an id outside [0, V).
    """
    ids = _integers(input_ids)
    if ids.ndim not in (1, 2):
        raise InputError(f"input_ids: expected shape (T,) or (B, T), got {ids.shape}")
    _check_length(ids, max_sequence_length)
    _check_range(ids, vocab_size)
    return np.ascontiguousarray(ids.reshape(-1, ids.shape[-1]), dtype=np.int64)


def token_row(prompt_ids: npt.ArrayLike, *, vocab_size: int, max_sequence_length: int) -> TokenIds:
    """Check one prompt and return it as (T,) int64. Raises: InputError, as `token_batch` does."""
    ids = _integers(prompt_ids)
    if ids.ndim != 1:
        raise InputError(f"prompt_ids: expected one prompt of shape (T,), got {ids.shape}; generate one row at a time")
    return token_batch(ids, vocab_size=vocab_size, max_sequence_length=max_sequence_length).reshape(-1)


def token_count(name: str, value: SupportsIndex, minimum: int) -> int:
    """Check a number of tokens. Raises: InputError."""
    try:
        count = operator.index(value)
    except TypeError:
        count = minimum - 1
    if count < minimum or isinstance(value, bool):
        expected = "a positive integer" if minimum else "an integer, 0 or more"
        raise InputError(f"{name}: expected {expected}, got {quoted(value)}")
    return count


def token_id_set(name: str, ids: Iterable[SupportsIndex], vocab_size: int) -> frozenset[int]:
    """Check token ids that are given as a set, such as those that end an answer. Raises: InputError."""
    expected = f"token ids from 0 to {vocab_size - 1}"
    found = []
    for token in _listed(name, ids, f"a list of {expected}"):
        if isinstance(token, bool) or not hasattr(token, "__index__") or not 0 <= token < vocab_size:
            raise InputError(f"{name}: expected {expected}, got {quoted(token)}")
        found.append(int(token))
    return frozenset(found)


def prompt_rows(prompts: Iterable[npt.ArrayLike]) -> list[npt.ArrayLike]:
    """Check that there are rows at all; each is checked by `token_row`. Raises: InputError."""
    if isinstance(prompts, str | bytes):
        raise InputError(
            f"prompts: expected a list of rows of token ids, got {quoted(prompts)}; encode each text first"
        )
    return _listed("prompts", prompts, "a list of rows of token ids")


def finite_array(name: str, given: npt.ArrayLike, shape: tuple[int, ...], dtype: str) -> npt.NDArray[Any]:
    """Check numbers that are to be copied as they are, and return them as a contiguous array of `dtype`.

    Raises: InputError for what is no array of `shape`, for numbers that are not finite or too large for `dtype`, and
    for a `dtype` that numpy has not (bfloat16).
    """
    try:
        wanted = np.dtype(dtype)
    except TypeError:
        raise InputError(f"{name}: cannot be given: this bundle keeps them as {dtype}, which numpy has not") from None
    try:
        values = np.asarray(given)
        numeric = values.dtype.kind in "iuf"
    except Exception as error:  # numpy's own, or whatever an object raises that is asked for its array
        raise InputError(f"{name}: expected an array of shape {shape}: {first_line(error)}") from error
    if not numeric or values.shape != shape:
        raise InputError(f"{name}: expected {dtype} of shape {shape}, got {values.dtype} of shape {values.shape}")
    with np.errstate(over="ignore"):
        array = np.ascontiguousarray(values, wanted)
    finite = np.isfinite(array)
    if not finite.all():
        place = tuple(map(int, np.unravel_index(int(finite.argmin()), shape)))
        raise InputError(f"{name}{list(place)}: expected a finite {dtype}, got {values[place]}")
    return array


def check_fixed_axes(ids: TokenIds, spec: TensorSpec) -> None:
    """Check (B, T) against the axes that the graph fixes. Raises: InputError naming the axis."""
    for axis, (wanted, given) in enumerate(zip(spec.shape, ids.shape, strict=True)):
        if isinstance(wanted, int) and wanted != given:
            raise InputError(
                f"input_ids: this bundle fixes the {('batch', 'sequence')[axis]} size at {wanted}, got {given}; "
                f"give ids of shape {spec.shape} or export with dynamic axes"
            )


def _listed(name: str, values: Iterable[Any], expected: str) -> list[Any]:
    try:
        return list(values)
    except TypeError:
        raise InputError(f"{name}: expected {expected}, got {quoted(values)}") from None


def _integers(input_ids: npt.ArrayLike) -> npt.NDArray[np.integer]:
    try:
        ids = np.asarray(input_ids)
    except Exception as error:  # numpy's own, or whatever an object raises that is asked for its array
        raise InputError(f"input_ids: expected rows of equal length of integers: {first_line(error)}") from error
    if ids.size == 0:
        raise InputError(f"input_ids: expected at least one token, got shape {ids.shape}")
    if ids.dtype.kind not in "iu":  # a duration, which numpy counts among the integers, is none
        what = f"{quoted(input_ids)}, no array of numbers" if ids.dtype == object else f"dtype {ids.dtype}"
        raise InputError(f"input_ids: expected integers, got {what}; give token ids such as a tokenizer's")
    return ids


def _check_length(ids: npt.NDArray[np.integer], max_sequence_length: int) -> None:
    length = ids.shape[-1]
    if length > max_sequence_length:
        raise InputError(
            f"input_ids: the model takes at most {max_sequence_length} tokens, got {length}; shorten the input"
        )


def _check_range(ids: npt.NDArray[np.integer], vocab_size: int) -> None:
    outside = (ids < 0) | (ids >= vocab_size)
    if not outside.any():
        return
    index = np.unravel_index(int(outside.argmax()), ids.shape)
    place = ", ".join(str(i) for i in index)
    raise InputError(
        f"input_ids[{place}]: expected a token id from 0 to {vocab_size - 1}, got {ids[index]}; "
        f"use the tokenizer that the model was trained with"
    )
