"""Bundles with capability heads against an independent implementation: every case of the oracle, logits and reports."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.lib.npyio import NpzFile

from cosmos_export.checkpoint import Checkpoint
from cosmos_export.torch_programs.sessions import load_session
from cosmos_runtime import CAPABILITIES, Session, new_decoder

from .head_bundles import export_heads, same_report

ORACLE = Path(__file__).resolve().parents[3] / "shared" / "oracle" / "tiny"

pytestmark = pytest.mark.skipif(not ORACLE.is_dir(), reason="the oracle of ../shared/oracle/tiny is not here")

# Of logits of magnitude 10: what rounding in float32 may do in some dozens of layers, one after another.
LOGITS, SCORES = 5e-5, 1e-5


def cases() -> list[dict[str, Any]]:
    if not ORACLE.is_dir():
        return []
    found: list[dict[str, Any]] = json.loads((ORACLE / "cases.json").read_text(encoding="utf-8"))
    return found


@pytest.fixture(scope="module")
def expected() -> NpzFile:
    return np.load(ORACLE / "expected_logits.npz")


def checkpoint_of(case: dict[str, Any]) -> Checkpoint:
    checkpoint = Checkpoint.open(ORACLE, head_layout=case["head_layout"])
    config = copy.deepcopy(checkpoint.config)
    config.reasoning.mode, config.reasoning.extended_thinking = case["reasoning_mode"], case["extended_thinking"]
    config.safety.safety_level = case["safety_level"]
    return replace(checkpoint, config=config)


def capabilities_of(case: dict[str, Any]) -> list[str]:
    return [name for name in CAPABILITIES if case["flags"][f"use_{name}"]]


def recipes_of(case: dict[str, Any]) -> list[str]:
    """A cache wants a causal mask. The portable decoder and pt2 are tried where most is at stake."""
    if not case["causal"]:
        return ["fp32", "torchscript-full-sequence"]
    return ["cpu-fp32", "torchscript-fp32", *(["portable-fp32", "pt2-fp32"] if case["calls"] > 1 else [])]


TRIALS = [(case, recipe) for case in cases() for recipe in recipes_of(case)]


@pytest.mark.parametrize(("case", "recipe"), TRIALS, ids=[f"{case['tag']}-{recipe}" for case, recipe in TRIALS])
def test_every_call_of_a_case(case: dict[str, Any], recipe: str, expected: NpzFile, tmp_path: Path) -> None:
    bundle = export_heads(
        checkpoint_of(case), tmp_path / "bundle", recipe, capabilities_of(case), causal=case["causal"]
    )
    session = load_session(bundle.path, threads=1)
    for rows in ([0], [1], [2], [0, 1, 2]):
        whole_sequences(session, case, expected, rows)
    if "decoder" in bundle.manifest.graphs:
        for row in range(3):
            token_by_token(session, case, expected, row)


def whole_sequences(session: Session, case: dict[str, Any], expected: NpzFile, rows: list[int]) -> None:
    ids, calls = expected["input_ids"], case["calls"]
    memory = session.new_memory(len(rows), calls)
    for call in range(calls):
        output = session.call(ids[rows, : ids.shape[1] - calls + 1 + call], memory=memory)
        wanted = np.stack([expected[f"{case['tag']}/row{row}/call{call}"] for row in rows])
        np.testing.assert_allclose(output.logits, wanted, rtol=0, atol=LOGITS)
    for row, diagnosis in zip(rows, output.diagnoses, strict=True):
        same_report(diagnosis.report(), case["diagnostics_last_call"][row] or {}, tolerance=SCORES)


def token_by_token(session: Session, case: dict[str, Any], expected: NpzFile, row: int) -> None:
    """The same calls through the cache: the first is a prompt, and each other one token."""
    ids, calls = expected["input_ids"][row], case["calls"]
    prompt = len(ids) - calls + 1
    decoder = new_decoder(session, len(ids), calls)
    for call in range(calls):
        logits = decoder.decode_one_token(int(ids[prompt + call - 1])) if call else decoder.prefill(ids[:prompt])
        wanted = expected[f"{case['tag']}/row{row}/call{call}"][-1]
        np.testing.assert_allclose(logits, wanted, rtol=0, atol=LOGITS)
    assert decoder.diagnosis is not None
    same_report(decoder.diagnosis.report(), case["diagnostics_last_call"][row] or {}, tolerance=SCORES)
