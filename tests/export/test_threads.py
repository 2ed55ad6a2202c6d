"""Work on small tensors in threads: in order, and under the caller's modes."""

from __future__ import annotations

import pytest
import torch

from cosmos_export.model.loading import preset_checkpoint
from cosmos_export.threads import map_in_threads


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_results_come_in_order() -> None:
    assert list(map_in_threads(lambda item: item * item, range(40))) == [item * item for item in range(40)]


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_threads_compute_in_the_callers_modes(mode) -> None:
    def modes(_: int) -> tuple[bool, bool]:
        return torch.is_inference_mode_enabled(), torch.is_grad_enabled()

    with mode():
        assert set(map_in_threads(modes, range(8))) == {modes(0)}


def test_random_weights_are_drawn_in_inference_mode_as_outside() -> None:
    checkpoint = preset_checkpoint("beginner")
    outside = checkpoint.tensor("tok_embeddings.weight")
    with torch.inference_mode():
        assert torch.equal(checkpoint.tensor("tok_embeddings.weight"), outside)
