"""What goes from piece to piece of the capability heads, and how a piece is run on the rows of all calls.

    B  batch    K  calls of a case    N = K B  rows of a case's calls    D  dim    M  slots of the bank    T  tokens

A stream is one way through the heads: float64's, the eager model's in some arithmetic, the bundle's. Its values are
kept case by case, (N, ...) each, the rows of the first call first.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cosmos_export.onnx.head_slices import (
    BLOCKED,
    CALLS_BEFORE,
    KEYS,
    KEYS_BEFORE,
    QUERY,
    REPRESENTATION,
    VALUES,
    VALUES_BEFORE,
)
from cosmos_export.parity.head_cases import HeadCase
from cosmos_export.parity.heads_reference import Choice

# Values (N, ...) of one case's calls by name.
Values = dict[str, Tensor]
Compute = Callable[[Values], Values]


_BANKS = {KEYS, VALUES, KEYS_BEFORE, VALUES_BEFORE}


@dataclass
class Stream:
    """One way through the heads: of each case the normed hidden states (B, T, D) of its rows, what the pieces gave, and
    what the working memory chose from."""

    cases: Sequence[HeadCase]
    normed: Sequence[Tensor]
    values: list[Values] = field(default_factory=list)
    choices: list[Choice | None] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.values = [{} for _ in self.cases]
        self.choices = [None] * len(self.cases)

    def given(self, names: Mapping[str, str]) -> list[Values]:
        """Of each case the values that are kept under the values of `names`, by its keys; those that are there."""
        return [{name: kept[key] for name, key in names.items() if key in kept} for kept in self.values]

    def keep(self, found: Sequence[Values]) -> None:
        """Keeps what a piece gave."""
        for kept, values in zip(self.values, found, strict=True):
            kept.update(values)

    def forget(self, keys: Collection[str]) -> None:
        """Lets go of values that no piece takes any more."""
        for kept in self.values:
            for key in keys:
                kept.pop(key, None)


def together(compute: Compute, given: Sequence[Values]) -> list[Values]:
    """What `compute` makes of the rows of all cases at once, case by case."""
    sizes = [len(next(iter(values.values()))) for values in given]
    found = compute({name: torch.cat([values[name] for values in given]) for name in given[0]})
    parts = {name: value.split(sizes) for name, value in found.items()}
    return [{name: part[at] for name, part in parts.items()} for at in range(len(given))]


def drawn(given: Sequence[Values], rows: int, values_of: Mapping[str, str]) -> Values:
    """So many rows more (rows, D), of which each channel is one of the given rows': as large as these, and with other
    scores, so that decisions are seen to fall both ways. Names of one value, by `values_of`, have the same rows."""
    generator, found = torch.Generator().manual_seed(rows), Values()
    for name in given[0]:
        value = values_of.get(name, name)
        if value not in found:
            vectors = torch.cat([case[name] for case in given])
            chosen = torch.randint(len(vectors), (rows, vectors.shape[-1]), generator=generator)
            found[value] = vectors.gather(0, chosen)
    return {name: found[values_of.get(name, name)] for name in given[0]}


def remembering(compute: Compute, case: HeadCase, x: Tensor, *, with_state: bool) -> tuple[Values, Values]:
    """The calls of a case one after another, x (N, D), each with the memory that the one before left: what went into
    them, (N, ...) each, and what came out. The memory itself, which is a bank a call, is kept `with_state` alone."""
    state = first_state(case, x)
    before, after = list[Values](), list[Values]()
    for representation in x.split(case.case.batch):
        before.append({REPRESENTATION: representation, **state})
        after.append(compute(before[-1]))
        state = _state_after(state, after[-1])
        if not with_state:
            before[-1], after[-1] = ({n: v for n, v in of.items() if n not in _BANKS} for of in (before[-1], after[-1]))
    return _stacked(before), _stacked(after)


def first_state(case: HeadCase, x: Tensor) -> Values:
    """The memory before a case's first call, in the type of x (N, D)."""
    batch, dim, entries = case.case.batch, x.shape[-1], case.before
    if entries is None:
        nothing = x.new_zeros(batch, case.slots, dim)
        return _named(nothing, nothing, torch.zeros(batch, dtype=torch.int64))
    keys, values = (torch.from_numpy(tensor).to(x.dtype) for tensor in (entries.keys, entries.values))
    return _named(keys, values, torch.full((batch,), entries.calls))


def _state_after(state: Values, found: Values) -> Values:
    keys, values = found.get(KEYS, state[KEYS_BEFORE]), found.get(VALUES, state[VALUES_BEFORE])
    return _named(keys, values, state[CALLS_BEFORE] + 1)


def _named(keys: Tensor, values: Tensor, calls: Tensor) -> Values:
    return {KEYS_BEFORE: keys, VALUES_BEFORE: values, CALLS_BEFORE: calls}


def _stacked(calls: Sequence[Values]) -> Values:
    return {name: torch.cat([call[name] for call in calls]) for name in calls[0]}


def call_begins(case: HeadCase, normed: Tensor) -> Values:
    """What calls begin with, (N, D) each, of normed hidden states (B, T, D): those of a row's last and first token."""
    dim = normed.shape[-1]
    last = [normed[row, end - 1] for row, _, end in case.spans()]
    first = normed[:, 0] if not case.case.past else torch.from_numpy(case.query_before(dim)).to(normed.dtype)
    return {REPRESENTATION: torch.stack(last), QUERY: first.repeat(len(case.calls), 1)}


def placed(case: HeadCase, normed: Tensor, vector: Tensor, blocked: Tensor | None) -> list[Tensor]:
    """What logits are read from, (n, D) for each row of each call with n tokens: normed hidden states (B, T, D), the
    vector (N, D) in the place of the last, or zeros where the row is blocked (N,)."""
    found = []
    for at, (row, start, end) in enumerate(case.spans()):
        hidden = normed[row, start:end].clone()
        hidden[-1] = vector[at]
        found.append(torch.zeros_like(hidden) if blocked is not None and bool(blocked[at]) else hidden)
    return found


def in_type(values: Values, dtype: torch.dtype) -> Values:
    """Numbers in another type; counts and truths as they are."""
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in values.items()}


def blocked_in(values: Values) -> Tensor | None:
    """Rows (N,) whose output is blocked; None where this configuration blocks none."""
    return values.get(BLOCKED)
