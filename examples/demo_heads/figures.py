"""All figures of trained heads, each measured on held-out text with the weights that are stored."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from tokenizers import Tokenizer
from train_demo import HeldOutText

from cosmos_export.model import CosmosAdvancedModel
from cosmos_runtime import CAPABILITIES

from .exam import Reading, calibrate, calibration_error, read_as_in_generation
from .safety import marked_shares, shares_found
from .safety_examples import attack_tables
from .sentences import Example
from .storage import round_heads
from .texts import Corpus

SETS = [s for size in range(len(CAPABILITIES) + 1) for s in itertools.combinations(CAPABILITIES, size)]
MODES = ("chain_of_thought", "tree_of_thoughts", "self_consistency", "reflexion", "direct")
ATTACKED_WINDOWS = 8

Shares = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Figures:
    """`whole` reads all held-out text with every capability; `calibration_error` and `accuracy` are of the half of
    its windows that confidence was not calibrated on.

    The others read the same part of it: `prompted` after a prompt of half a window, which is the first call; `sets` and
    `modes` (with and without extended thinking) from the first token on. Shares of texts are by group and by mark: of
    sentences that were trained on (`known`), of others (`unknown`), and of attacks.
    """

    whole: Reading
    calibration_error: float
    accuracy: float
    prompted: Reading
    sets: dict[tuple[str, ...], Reading]
    modes: dict[tuple[str, bool], Reading]
    known: Shares
    unknown: Shares
    attacks: Shares


def measure(
    model: CosmosAdvancedModel,
    exam: HeldOutText,
    held_out: Corpus,
    tokenizer: Tokenizer,
    texts: Mapping[bool, Sequence[Example]],
    compared_windows: int,
) -> Figures:
    """The figures of a model in evaluation mode, whose heads are rounded to what is stored and whose confidence is
    calibrated on every other window."""
    round_heads(model)
    fitted, unseen = ((exam.inputs[part], exam.targets[part]) for part in (slice(0, None, 2), slice(1, None, 2)))
    first = read_as_in_generation(model, *fitted, CAPABILITIES)
    calibrate(model, first)
    round_heads(model)
    second = read_as_in_generation(model, *unseen, CAPABILITIES)
    part = slice(None, None, -(-len(exam.inputs) // compared_windows))
    inputs, targets = exam.inputs[part], exam.targets[part]
    prompted = read_as_in_generation(model, inputs, targets, CAPABILITIES, first_call=inputs.shape[1] // 2)
    sets = {these: read_as_in_generation(model, inputs, targets, these) for these in SETS}
    modes = {}
    for mode, extended in itertools.product(MODES, (False, True)):
        with reasoning_by(model, mode, extended):
            modes[mode, extended] = read_as_in_generation(model, inputs, targets, CAPABILITIES)
    known, unknown = (shares_found(model, tokenizer, texts[held]) for held in (False, True))
    tables = attack_tables(model, held_out, ATTACKED_WINDOWS)
    attacks = {name: marked_shares(model, table.vectors) for name, table in tables.items()}
    accuracy = second.right.float().mean().item()
    return Figures(first + second, calibration_error(second), accuracy, prompted, sets, modes, known, unknown, attacks)


@contextmanager
def reasoning_by(model: CosmosAdvancedModel, mode: str, extended: bool) -> Iterator[None]:
    """The model with another mode of reasoning than its configuration's."""
    settings = model.config.reasoning
    before = settings.mode, settings.extended_thinking
    settings.mode, settings.extended_thinking = mode, extended
    try:
        yield
    finally:
        settings.mode, settings.extended_thinking = before
