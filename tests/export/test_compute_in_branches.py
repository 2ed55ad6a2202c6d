"""What branches alone read is computed within them: what moves, what stays, and that the result is the same."""

import numpy as np
import onnx_ir as ir
import pytest

from cosmos_export.onnx.passes import ComputeInBranches, SkipUnchosen

from .hand_made_graphs import CHOOSING, assert_left_alone, choosing, operators, run, with_values

RNG = np.random.default_rng(0)
# Rows with a score above zero choose f, those with one below choose h.
CHOICES = "s = MatMul(x, g) \n c = Greater(s, z) \n n = Neg(s) \n d = Greater(n, z) \n"
SELECTIONS = "f = MatMul(r, v) \n a = Where(c, f, x) \n h = MatMul(r, w) \n b = Where(d, h, x) \n"
SHARED = CHOICES + "q = MatMul(x, w) \n r = Relu(q) \n" + SELECTIONS + "y = Add(a, b)"


def branching(body: str) -> ir.Model:
    """With a branch for each selection."""
    model = choosing(body)
    assert SkipUnchosen()(model).modified
    return with_values(model)


def then_branches(model: ir.Model) -> list[list[str]]:
    choices = [node for node in model.graph if node.op_type == "If"]
    return [[node.op_type for node in choice.attributes.get_graph("then_branch")] for choice in choices]


@pytest.mark.parametrize("signs", [(1,), (-1,), (1, -1, 1)])
def test_each_branch_computes_what_it_reads(signs: tuple[int, ...]) -> None:
    x = RNG.standard_normal((len(signs), 4)).astype(np.float32)
    x *= np.sign(x @ CHOOSING["g"]) * np.array(signs)[:, None]
    model = branching(SHARED)
    assert then_branches(model) == [["MatMul", "Where"]] * 2
    expected = run(model, x=x)
    assert ComputeInBranches()(model).modified is True
    assert then_branches(model) == [["MatMul", "Relu", "MatMul", "Where"]] * 2
    assert operators(model).count("MatMul") == 1  # the score
    np.testing.assert_array_equal(run(model, x=x), expected)
    assert_left_alone(ComputeInBranches(), model)


def test_within_branches_too() -> None:
    """A selection that is made within a branch: what both levels read is computed in the outer one."""
    body = CHOICES + "q = MatMul(x, w) \n r = Relu(q) \n f = MatMul(r, v) \n t = MatMul(f, g) \n p = Greater(t, z) \n"
    body += "m = MatMul(r, w) \n o = Where(p, m, f) \n a = Where(c, o, x) \n h = MatMul(r, v) \n b = Where(d, h, x) \n"
    model = branching(body + "y = Add(a, b)")
    x = RNG.standard_normal((5, 4)).astype(np.float32)
    expected = run(model, x=x)
    assert ComputeInBranches()(model).modified is True
    assert operators(model).count("Relu") == 0
    np.testing.assert_array_equal(run(model, x=x), expected)


@pytest.mark.parametrize(
    "body",
    [
        CHOICES + "q = MatMul(x, w) \n r = Relu(q) \n" + SELECTIONS + "e = Add(a, b) \n y = Add(e, r)",
        CHOICES + "r = Relu(x) \n f = MatMul(r, v) \n a = Where(c, f, r) \n y = Relu(a)",
    ],
    ids=["read elsewhere, too", "both branches read it"],
)
def test_what_is_needed_in_any_case_stays(body: str) -> None:
    assert_left_alone(ComputeInBranches(), branching(body))
