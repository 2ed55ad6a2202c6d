"""The backbone against an independent implementation's float64 logits."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from cosmos_export.checkpoint import Checkpoint
from cosmos_export.model.loading import load_decoder

CASES = ["backbone", "backbone_tile", "backbone_published"]


@torch.inference_mode()
@pytest.mark.parametrize("load_as", [torch.float64, torch.float32])
@pytest.mark.parametrize("tag", CASES)
def test_every_position_but_the_last(oracle: Path, tag: str, load_as: torch.dtype) -> None:
    """The last position is the capability head's, which the plain decoder does not have."""
    cases = {case["tag"]: case for case in json.loads((oracle / "cases.json").read_text(encoding="utf-8"))}
    expected = np.load(oracle / "expected_logits.npz")
    checkpoint = Checkpoint.open(oracle, head_layout=cases[tag]["head_layout"])
    # float32 loses nothing of this checkpoint's weights, so `.double()` has to give the same model.
    model = load_decoder(checkpoint, causal=cases[tag]["causal"], dtype=load_as).double()
    ids = expected["input_ids"]
    together = model(torch.from_numpy(ids)).numpy()
    for row in range(len(ids)):
        wanted = expected[f"{tag}/row{row}/call0"][:-1]
        alone = model(torch.from_numpy(ids[row : row + 1])).numpy()[0]
        np.testing.assert_allclose(alone[:-1], wanted, rtol=0, atol=1e-9)
        np.testing.assert_allclose(together[row, :-1], wanted, rtol=0, atol=1e-9)


def test_the_cases_differ(oracle: Path) -> None:
    """Were the three the same numbers, the test above could not tell layouts and masks apart."""
    expected = np.load(oracle / "expected_logits.npz")
    first, *others = (expected[f"{tag}/row0/call0"][:-1] for tag in CASES)
    assert all(np.abs(first - other).max() > 1e-3 for other in others)
