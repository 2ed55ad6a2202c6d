"""Verdicts on calls of a model with heads: what is too near to call is neither a pass nor a failure."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cosmos_export.parity.calls import Found
from cosmos_export.parity.decisions import decisions, first_differences
from cosmos_export.parity.gates import Arithmetic, Verdict
from cosmos_export.parity.heads_reference import Choice, Expected
from cosmos_export.parity.heads_verify import DECISIONS, MEMORY_CHOICE, Comparison

NEAR = 1e-6  # within what rounding may do in float32


def scores(**changes: Any) -> dict[str, np.ndarray]:
    """Of two rows: harmless, neither attacked nor private, and one round that corrects nothing."""
    values: dict[str, Any] = {
        "safety.harmful": [0.1, 0.2],
        "safety.pii": [[0.1, 0.2], [0.3, 0.1]],
        "safety.attack": [0.2, 0.1],
        "evaluation.factuality": [[0.5], [0.5]],
        "evaluation.errors": [[[0.1, 0.2]], [[0.2, 0.1]]],
        "evaluation.overall_quality": [[0.5, 0.5], [0.5, 0.5]],
    }
    names = {name.replace(".", "_"): name for name in values}
    return {name: np.array(changes.get(key, values[name])) for key, name in names.items()}


def found(given: dict[str, np.ndarray], offset: float = 0.0) -> Found:
    logits = np.linspace(-1, 1, 2 * 3 * 5).reshape(2, 3, 5) + offset
    return Found(logits, given)


def verdicts(
    actual: Found, exact: Found, eager: Found | None = None, chosen: Choice | None = None
) -> dict[str, Verdict]:
    compared = Comparison(
        Arithmetic.FLOAT32,
        [actual],
        [Expected(exact, chosen)],
        [Expected(eager or exact, chosen)],
    )
    return {measurement.positions: measurement.verdict for measurement in compared.measurements()}


def test_equal_numbers_pass() -> None:
    given = verdicts(found(scores()), found(scores()))
    assert set(given.values()) == {Verdict.PASS}
    assert {"all", "first", "last", "safety.attack", "evaluation.errors"} <= given.keys()


def test_a_score_that_is_off_fails_by_its_name() -> None:
    given = verdicts(found(scores(safety_attack=[0.2, 0.11])), found(scores()))
    assert {name for name, verdict in given.items() if verdict is Verdict.FAIL} == {"safety.attack"}


def test_logits_that_are_off_fail() -> None:
    given = verdicts(found(scores(), offset=0.01), found(scores()))
    assert given["all"] is given["last"] is Verdict.FAIL


@pytest.mark.parametrize(
    ("name", "below", "above"),
    [
        ("safety_harmful", [0.1, 0.5 - NEAR], [0.1, 0.5 + NEAR]),
        ("safety_pii", [[0.1, 0.2], [0.6 - NEAR, 0.1]], [[0.1, 0.2], [0.6 + NEAR, 0.1]]),
        ("safety_attack", [0.2, 0.7 - NEAR], [0.2, 0.7 + NEAR]),
        ("evaluation_errors", [[[0.1, 0.2]], [[0.5 - NEAR, 0.1]]], [[[0.1, 0.2]], [[0.5 + NEAR, 0.1]]]),
        ("evaluation_overall_quality", [[0.5, 0.5], [0.9 - NEAR, 0.5]], [[0.5, 0.5], [0.9 + NEAR, 0.5]]),
    ],
)
def test_a_decision_that_fell_otherwise_near_its_threshold_is_ambiguous(name: str, below: Any, above: Any) -> None:
    """Whatever followed from it; the other row is compared as usual."""
    exact, actual = found(scores(**{name: below})), found(scores(**{name: above}))
    actual.logits[1] += 100
    given = verdicts(actual, exact)
    assert given.pop(DECISIONS) is Verdict.AMBIGUOUS
    assert set(given.values()) == {Verdict.PASS}
    actual.logits[0, 0, 0] += 1
    assert verdicts(actual, exact)["all"] is Verdict.FAIL


def test_a_decision_that_fell_otherwise_far_from_its_threshold_fails() -> None:
    given = verdicts(found(scores(safety_attack=[0.2, 0.71])), found(scores(safety_attack=[0.2, 0.69])))
    assert given[DECISIONS] is Verdict.FAIL


def test_the_first_decision_counts_and_not_what_followed_from_it() -> None:
    """A vector that was made anonymous may be an attack to the check behind."""
    exact = found(scores(safety_pii=[[0.1, 0.2], [0.6 - NEAR, 0.1]]))
    actual = found(scores(safety_pii=[[0.1, 0.2], [0.6 + NEAR, 0.1]], safety_attack=[0.2, 0.99]))
    assert verdicts(actual, exact)[DECISIONS] is Verdict.AMBIGUOUS
    assert first_differences(actual.scores, exact.scores)[0] is None
    difference = first_differences(actual.scores, exact.scores)[1]
    assert difference is not None
    assert difference.name == "safety.pii"


def test_near_a_threshold_and_decided_alike_is_compared_as_usual() -> None:
    near = scores(safety_attack=[0.2, 0.7 - NEAR])
    assert set(verdicts(found(near), found(near)).values()) == {Verdict.PASS}


def test_where_rounding_takes_the_eager_model_to_the_other_side_the_bundle_may_follow() -> None:
    """As int8 activations do; and the eager model's row is then no measure of rounding."""
    exact, other = found(scores(safety_attack=[0.2, 0.69])), found(scores(safety_attack=[0.2, 0.72]), offset=5.0)
    other.logits[0] -= 5.0
    assert verdicts(other, exact, eager=other)[DECISIONS] is Verdict.AMBIGUOUS
    off = found(scores(safety_attack=[0.2, 0.69]))
    off.logits[1] += 1.0
    assert verdicts(off, exact, eager=other)["all"] is Verdict.FAIL


def choice(*similarities: float) -> Choice:
    return Choice(np.array([similarities, similarities]), read=2)


def test_a_choice_between_equals_is_ambiguous_when_numbers_differ() -> None:
    exact, actual = found(scores()), found(scores())
    actual.logits[:] += 1
    tie, clear = choice(0.9, 0.5 + NEAR, 0.5), choice(0.9, 0.5, 0.1)
    assert verdicts(actual, exact, chosen=tie) == {MEMORY_CHOICE: Verdict.AMBIGUOUS}
    assert verdicts(actual, exact, chosen=clear)["all"] is Verdict.FAIL
    assert set(verdicts(exact, exact, chosen=tie).values()) == {Verdict.PASS}


def test_what_is_not_there_is_no_rival() -> None:
    """With as many entries as are read, or fewer, all of them are."""
    nothing = float("-inf")
    assert np.isinf(choice(0.9, 0.5, nothing).lead).all()
    assert np.isinf(choice(0.9, nothing, nothing).lead).all()
    assert np.isinf(choice(0.9, 0.5).lead).all()
    assert choice(0.9, 0.5, 0.4).lead == pytest.approx(0.1)
    assert choice(0.9, 0.5, 0.4).same_entries(choice(0.9, 0.4, 0.5)).tolist() == [False, False]


def test_decisions_come_in_the_order_of_a_call() -> None:
    assert [decision.name for decision in decisions(scores())] == [
        "safety.harmful",
        "safety.pii",
        "safety.attack",
        "evaluation.errors",
        "evaluation.overall_quality",
    ]
    only_final = scores(evaluation_overall_quality=[[0.95], [0.95]])
    assert "evaluation.overall_quality" not in [decision.name for decision in decisions(only_final)]
