"""The whole model against an independent implementation's float64 logits and diagnostics: every case of the oracle."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.lib.npyio import NpzFile

from cosmos_export.model import CosmosAdvancedModel

from .capability_models import same_report

CASES = [
    "backbone",
    "backbone_published",
    "backbone_tile",
    "reasoning_chain_of_thought",
    "reasoning_tree_of_thoughts",
    "reasoning_self_consistency",
    "reasoning_reflexion",
    "reasoning_analogical",
    "reasoning_extended",
    "memory_fresh",
    "memory_8_calls",
    "safety_medium",
    "safety_high",
    "safety_strict",
    "evaluation",
    "all_medium",
    "all_medium_4_calls",
]
ROWS = [[0], [1], [2], [0, 1, 2], [2, 0]]


@pytest.fixture(scope="module")
def cases(oracle: Path) -> dict[str, dict[str, Any]]:
    return {case["tag"]: case for case in json.loads((oracle / "cases.json").read_text(encoding="utf-8"))}


@pytest.fixture(scope="module")
def expected(oracle: Path) -> NpzFile:
    return np.load(oracle / "expected_logits.npz")


def load(oracle: Path, case: dict[str, Any], dtype: torch.dtype) -> CosmosAdvancedModel:
    model = CosmosAdvancedModel.from_pretrained(
        oracle, head_layout=case["head_layout"], causal=case["causal"], dtype=dtype
    )
    model.config.reasoning.mode = case["reasoning_mode"]
    model.config.reasoning.extended_thinking = case["extended_thinking"]
    model.config.safety.safety_level = case["safety_level"]
    return model


def test_no_case_is_left_out(cases: dict[str, Any]) -> None:
    assert sorted(cases) == sorted(CASES)


@torch.inference_mode()
@pytest.mark.parametrize("tag", CASES)
def test_logits_and_diagnostics_of_every_call(oracle: Path, cases: dict[str, Any], expected: NpzFile, tag: str) -> None:
    """Rows alone and together; the bank of a sequence of calls may be as large as the model's or as the sequence."""
    case = cases[tag]
    model, calls, ids = load(oracle, case, torch.float64), case["calls"], torch.from_numpy(expected["input_ids"])
    for rows in ROWS:
        memory = model.new_memory(len(rows), capacity=None if len(rows) == 1 else calls)
        for call in range(calls):
            seen = ids[rows, : ids.shape[1] - calls + 1 + call]
            logits, reports = model(seen, **case["flags"], return_diagnostics=True, memory=memory)
            wanted = np.stack([expected[f"{tag}/row{row}/call{call}"] for row in rows])
            np.testing.assert_allclose(logits.numpy(), wanted, rtol=0, atol=1e-9)
        for row, report in zip(rows, reports if len(rows) > 1 else [reports], strict=True):
            same_report(report, case["diagnostics_last_call"][row], tolerance=1e-6)


@torch.inference_mode()
@pytest.mark.parametrize("tag", ["all_medium", "safety_strict"])
def test_float32_is_close_and_converts_to_the_same_model(
    oracle: Path, cases: dict[str, Any], expected: NpzFile, tag: str
) -> None:
    """float32 loses nothing of this checkpoint's weights, so `.double()` has to give the float64 model, derived tables
    and all."""
    model, ids = load(oracle, cases[tag], torch.float32), torch.from_numpy(expected["input_ids"])
    wanted = np.stack([expected[f"{tag}/row{row}/call0"] for row in range(len(ids))])
    np.testing.assert_allclose(model(ids, **cases[tag]["flags"])[0].numpy(), wanted, rtol=0, atol=2e-5)
    np.testing.assert_allclose(model.double()(ids, **cases[tag]["flags"])[0].numpy(), wanted, rtol=0, atol=1e-9)


def test_a_case_is_no_other_case(expected: NpzFile) -> None:
    """Were two cases the same numbers, a capability that is never called would pass."""
    last = {tag: expected[f"{tag}/row0/call0"][-1] for tag in CASES if tag != "safety_strict"}
    same = [
        {first, second}
        for first in last
        for second in last
        if first < second and np.allclose(last[first], last[second])
    ]
    # A mode without any returns its input, and so does reflexion, as with reasoning off; a first call has no memories.
    direct = ("backbone", "reasoning_reflexion", "reasoning_analogical")
    assert all(pair <= set(direct) or pair == {"memory_fresh", "memory_8_calls"} for pair in same)
