"""The measurement: held-out loss where generation reads it, at the last position of each call, and what heads say.

B  batch    T  sequence    N  scored calls    D  dim    V  vocab_size
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor
from train_demo import NOT_SCORED

from cosmos_export.model import CosmosAdvancedModel
from cosmos_runtime import THRESHOLDS

Scores = Mapping[str, Tensor]

# What a call (B,) is counted for, by the scores that say so.
MARKS: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "blocked": ("output_blocked", lambda score: score),
    "debiased": ("safety.overall_bias", lambda score: score > THRESHOLDS["safety.biased"]),
    "anonymised": ("safety.pii", lambda score: score.amax(-1) > THRESHOLDS["safety.private"]),
    "cleaned": ("safety.attack", lambda score: score > THRESHOLDS["safety.adversarial"]),
    "corrected": ("evaluation.corrected", lambda score: score.any(-1)),
}


@dataclass(frozen=True)
class Reading:
    """How held-out text reads, as sums over the scored calls: the loss in nats, the plain decoder's at the same
    positions, and how many calls were marked in each way; and for each of them the final confidence (N,), empty without
    evaluation, and whether the likeliest token was the next one (N,)."""

    loss_sum: float
    plain_sum: float
    confidence: Tensor
    right: Tensor
    marked: Counter[str] = field(default_factory=Counter)

    @property
    def calls(self) -> int:
        return len(self.right)

    @property
    def loss(self) -> float:
        """In nats per token."""
        return self.loss_sum / self.calls

    @property
    def plain_loss(self) -> float:
        """The plain decoder's, in nats per token."""
        return self.plain_sum / self.calls

    @property
    def excess(self) -> float:
        """How much worse than the plain decoder, as a share of its loss; negative where it is better."""
        return self.loss_sum / self.plain_sum - 1.0

    def __add__(self, other: Reading) -> Reading:
        return Reading(
            self.loss_sum + other.loss_sum,
            self.plain_sum + other.plain_sum,
            torch.cat((self.confidence, other.confidence)),
            torch.cat((self.right, other.right)),
            self.marked + other.marked,
        )


NOTHING = Reading(0.0, 0.0, torch.empty(0), torch.empty(0, dtype=torch.bool))


@torch.no_grad()
def read_as_in_generation(
    model: CosmosAdvancedModel, inputs: Tensor, targets: Tensor, capabilities: Sequence[str], first_call: int = 0
) -> Reading:
    """Reads windows (B, T) as generation does: one call a token from position `first_call` on, each with the memory
    that the calls before it left. Scores the calls whose target (B, T) is not NOT_SCORED; one that is blocked gives
    zero logits, and has their loss.
    """
    hidden, reading = model.hidden_states(inputs), NOTHING
    memory = model.new_memory(len(inputs), capacity=inputs.shape[1]).state if "memory" in capabilities else None
    for position in range(first_call, inputs.shape[1]):
        representation, target = hidden[:, position], targets[:, position]
        enhanced = model.enhance(representation, hidden[:, 0], capabilities, memory)
        memory, scored = enhanced.memory, target != NOT_SCORED
        placed = enhanced.placed(representation[:, None], torch.zeros_like(target))[:, 0]
        logits = (model.logits(vectors)[scored] for vectors in (placed, representation))
        reading += scored_calls(*logits, target[scored], {n: s[scored] for n, s in enhanced.scores.items()})
    return reading


def scored_calls(logits: Tensor, plain: Tensor, targets: Tensor, scores: Scores) -> Reading:
    losses = (F.cross_entropy(these, targets, reduction="sum").item() for these in (logits, plain))
    marks = {mark: int(says(scores[name]).sum()) for mark, (name, says) in MARKS.items() if name in scores}
    confidence = scores["evaluation.confidence"][:, -1] if "evaluation.confidence" in scores else torch.empty(0)
    return Reading(*losses, confidence, logits.argmax(-1) == targets, Counter(marks))


def calibrate(model: CosmosAdvancedModel, reading: Reading) -> None:
    """Scales and shifts the logit of confidence so that it is the probability of being right (Platt scaling)."""
    logits, right = torch.logit(reading.confidence.double(), eps=1e-6), reading.right.double()
    scale, shift = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    optimizer = torch.optim.LBFGS([scale.requires_grad_(), shift.requires_grad_()], line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.binary_cross_entropy_with_logits(logits * scale + shift, right)
        value.backward()
        return value

    optimizer.step(loss)
    last = model.evaluation_system.confidence_estimator.confidence_network[-1]
    with torch.no_grad():
        last.weight *= scale.float()
        last.bias.mul_(scale.float()).add_(shift.float())


def calibration_error(reading: Reading, bins: int = 10) -> float:
    """Expected calibration error (arXiv:1706.04599): how far confidence is from the share of right tokens, in bins of
    equal width, on average over all calls."""
    place = (reading.confidence * bins).long().clamp(max=bins - 1)
    gap = torch.zeros(bins).index_add_(0, place, reading.confidence - reading.right.float())
    return gap.abs().sum().item() / reading.calls
