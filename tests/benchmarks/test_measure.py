"""Who is paired with whom, and which way a ratio points."""

import pytest

pytest.importorskip("torch")

from benchmarks.engines import OURS
from benchmarks.measure import Results, pairs_of, prompt
from benchmarks.process import Variant
from benchmarks.report import rows

OUR_INT4 = Variant(OURS, "int4", "int4")
Q4_0 = Variant("llama_cpp", "int4", "q4_0")
BUILDER = Variant("genai", "int4", "its builder's int4")
F32 = Variant("llama_cpp", "fp32", "f32")
OUR_INT8 = Variant(OURS, "int8", "int8")
TORCHSCRIPT = Variant("torchscript", "fp32", "fp32")
PT2 = Variant("pt2", "fp32", "fp32")
EAGER = Variant("transformers_eager", "fp32", "fp32")


def test_ours_meets_each_other_engine_of_its_class_alone() -> None:
    assert pairs_of([OUR_INT4, Q4_0, BUILDER]) == [[OUR_INT4, Q4_0], [OUR_INT4, BUILDER]]


def test_without_an_opponent_or_without_ours_a_variant_is_measured_alone() -> None:
    assert pairs_of([F32, OUR_INT8]) == [[F32], [OUR_INT8]]


def test_a_ratio_above_one_says_that_ours_is_better() -> None:
    results = Results()
    for speed, milliseconds in ((100.0, 20.0), (90.0, 40.0), (110.0, 30.0)):
        results.add_pair(
            OUR_INT4,
            Q4_0,
            {"decode_tok_s": 2 * speed, "prefill_long_ms": milliseconds},
            {"decode_tok_s": speed, "prefill_long_ms": 3 * milliseconds},
        )
    assert results.ratio(OUR_INT4.key, Q4_0.key, "decode_tok_s") == {"median": 2, "lowest": 2, "highest": 2}
    assert results.ratio(OUR_INT4.key, Q4_0.key, "prefill_long_ms") == {"median": 3, "lowest": 3, "highest": 3}
    assert results.ratio(OUR_INT4.key, BUILDER.key, "decode_tok_s") is None


def test_both_sides_of_a_pair_get_the_same_prompt_and_pairs_share_no_beginning() -> None:
    assert prompt(16, 1000, 0) == prompt(16, 1000, 0)
    assert len({tuple(prompt(length, 1000, seed)[:4]) for length in (16, 128) for seed in (0, 1)}) == 4


def test_without_the_runtime_the_first_of_this_projects_engines_meets_the_others() -> None:
    assert pairs_of([EAGER, PT2, TORCHSCRIPT]) == [[TORCHSCRIPT, EAGER], [TORCHSCRIPT, PT2]]


def test_a_row_is_compared_to_ours_of_its_class() -> None:
    results = Results()
    results.add_pair(TORCHSCRIPT, EAGER, {"decode_tok_s": 30.0}, {"decode_tok_s": 20.0})
    shown = {row["variant"]: row for row in rows([TORCHSCRIPT, EAGER, Q4_0], results)}
    assert shown[EAGER.key]["compared_to"] == TORCHSCRIPT.key
    assert shown[EAGER.key]["times_ours_is_better"]["decode_tok_s"]["median"] == 1.5
    assert [key for key, row in shown.items() if row["ours"]] == [TORCHSCRIPT.key]
    assert "compared_to" not in shown[TORCHSCRIPT.key] | shown[Q4_0.key]
