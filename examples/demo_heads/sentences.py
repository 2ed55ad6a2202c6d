"""The sentences of `phrases` in a context, as texts with labels."""

from __future__ import annotations

import base64
import codecs
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from .phrases import BIAS, CATEGORIES, HOLD_OUT, JAILBREAK, ORDINARY, PERSONAL, TOXICITY, filled

CONTEXT = 60  # characters of the corpus before a sentence, at most
ENCODED = (24, 80)  # characters of the corpus that are encoded
ALSO = 0.5  # what a text with one bias is taken to have of the others, as the check reads the mean of all

# The ethical principle that a text of a group or label neglects.
NEGLECTED = {
    "categories": "non_maleficence",
    "illegal_activity": "accountability",
    "misinformation": "transparency",
    "toxicity": "beneficence",
    "bias": "justice",
    "jailbreak": "autonomy",
}

ENCODINGS: tuple[Callable[[str], str], ...] = (
    lambda text: codecs.encode(text, "rot13"),
    lambda text: base64.b64encode(text.encode()).decode(),
    lambda text: text.encode().hex(),
    lambda text: text[::-1],
)


@dataclass(frozen=True)
class Example:
    """A text, the same text with other names, numbers and groups in it, and what is to be found in it.

    `group` is one of "ordinary", "categories", "toxicity", "bias", "personal", "jailbreak"; `label` one of the group's
    labels, "" for ordinary texts; `found` has the probability of every label that is not 0.
    """

    text: str
    counterpart: str
    group: str
    label: str
    found: dict[str, float] = field(default_factory=dict)


GROUPS = {"categories": CATEGORIES, "toxicity": TOXICITY, "bias": BIAS, "personal": PERSONAL, "jailbreak": JAILBREAK}


def examples(corpus: str, source: random.Random, of_label: int, *, held_out: bool) -> list[Example]:
    """`of_label` texts for each label, from the sentences to train on or the others, and some ordinary ones."""
    chosen = slice(-HOLD_OUT, None) if held_out else slice(None, -HOLD_OUT)
    ordinary = [sentence for sentence in ORDINARY for _ in range(1 + of_label // 3)]
    made = [Example(*in_context(sentence, corpus, source), "ordinary", "") for sentence in ordinary]
    for group, labels in GROUPS.items():
        for label, sentences in labels.items():
            for _ in range(of_label):
                sentence = source.choice(sentences[chosen]) if sentences else encoded(corpus, source)
                made.append(Example(*in_context(sentence, corpus, source), group, label, to_be_found(group, label)))
    return made


def to_be_found(group: str, label: str) -> dict[str, float]:
    also = {
        "categories": {"harmful": 1.0},
        "toxicity": {"toxic": 1.0},
        "bias": dict.fromkeys(BIAS, ALSO),
    }
    return {**also.get(group, {}), **({} if group == "categories" else {label: 1.0})}


def in_context(sentence: str, corpus: str, source: random.Random) -> tuple[str, str]:
    """The sentence after a piece of the corpus or nothing, written as people do, and its counterpart."""
    start = source.randrange(len(corpus) - CONTEXT)
    before = corpus[start : start + source.randrange(CONTEXT)] + "\n" if source.random() < 0.3 else ""
    if source.random() < 0.2:
        sentence = sentence[0].lower() + sentence[1:]
    if source.random() < 0.3:
        sentence = sentence.rstrip(".?!")
    after = source.choice(("", "", "", "\n"))
    one, other = (before + filled(sentence, source) + after for _ in range(2))
    return one, other


def encoded(corpus: str, source: random.Random) -> str:
    start, length = source.randrange(len(corpus) - ENCODED[1]), source.randint(*ENCODED)
    return source.choice(ENCODINGS)(corpus[start : start + length])
