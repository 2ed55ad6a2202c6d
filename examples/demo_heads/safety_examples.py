"""What the safety checks learn from, as tables of vectors: ordinary text, sentences of `phrases`, and broken text.

    B  batch    T  sequence    N  examples    D  dim    C  labels of all checks

A check sees the last vector of a text. Three of them also learn what to put in its place: the vector that the same
text has with other names, numbers and groups in it, or had before it was broken. For ordinary text that is the vector
itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

from cosmos_export.model import CosmosAdvancedModel
from cosmos_export.model.capabilities.fusion import vectors_at
from cosmos_runtime import LABELS

from .predictions import FEW, likelier_tokens
from .sentences import NEGLECTED, Example
from .texts import LOOPED, Corpus

REPLACED = 0.3  # share of the tokens that are replaced in a text under attack
UNKNOWN = float("nan")
PARTLY = 0.5  # how well the principles are kept that are not the one that a text neglects most

# The networks, and what their outputs mean.
NETWORKS = {
    "content_filter.harmful_detector": ("harmful",),
    "toxicity_detector.toxicity_scorer": LABELS["safety.toxicity"],
    "bias_detector.bias_analyzer": LABELS["safety.bias"],
    "hallucination_detector.confidence_estimator": ("right",),
    "hallucination_detector.factuality_checker": ("among_few",),
    "privacy_protector.pii_detector": LABELS["safety.pii"],
    "adversarial_defense.attack_detector": ("attack",),
    "jailbreak_prevention.jailbreak_detector": LABELS["safety.jailbreak"],
    "ethical_guardian.ethical_principles": LABELS["safety.ethics"],
}
COLUMNS = {name: column for column, name in enumerate(n for names in NETWORKS.values() for n in names)}


class Table(NamedTuple):
    """Examples as tensors: the vectors (N, D), those to put in their place (N, D), labels (N, C) from 0 to 1 or
    UNKNOWN, and how likely each category of harm is (N, 7)."""

    vectors: Tensor
    restored: Tensor
    labels: Tensor
    categories: Tensor

    @classmethod
    def joined(cls, tables: Sequence[Table]) -> Table:
        return cls(*(torch.cat(columns) for columns in zip(*tables, strict=True)))

    def rows(self, rows: Tensor) -> Table:
        """The rows of these numbers."""
        return Table(*(column[rows] for column in self))

    def some(self, count: int) -> Table:
        """`count` random rows."""
        return self.rows(torch.randint(len(self.vectors), (count,)))


@torch.no_grad()
def corpus_table(model: CosmosAdvancedModel, corpus: Corpus, windows: int) -> Table:
    """Ordinary text, and how right the plain decoder is after it."""
    chosen = corpus.windows(windows, model.config.max_sequence_length, broken=0.0)
    table = quiet_table(vectors_of_windows(model, chosen.inputs))
    parts = (table.vectors, chosen.targets.flatten(), table.labels)
    for vectors, targets, labels in zip(*(part.split(4096) for part in parts), strict=True):
        likelier = likelier_tokens(model.logits(vectors), targets)
        labels[:, COLUMNS["right"]] = (likelier == 0).float()
        labels[:, COLUMNS["among_few"]] = (likelier < FEW).float()
    return table


@torch.no_grad()
def sentence_table(model: CosmosAdvancedModel, tokenizer: Tokenizer, examples: Sequence[Example]) -> Table:
    """The last vectors of texts, and what is to be found in them."""
    texts = [e.text for e in examples], [e.counterpart for e in examples]
    vectors, counterparts = (last_vectors(model, tokenizer, these) for these in texts)
    table = quiet_table(vectors)._replace(restored=counterparts)
    categories = LABELS["safety.categories"]
    for row, example in enumerate(examples):
        for name, probability in example.found.items():
            table.labels[row, COLUMNS[name]] = probability
        if example.group == "categories":
            table.categories[row] = F.one_hot(torch.tensor(categories.index(example.label)), len(categories))
        for principle, score in ethics(example).items():
            table.labels[row, COLUMNS[principle]] = score
    return table


@torch.no_grad()
def attack_tables(model: CosmosAdvancedModel, corpus: Corpus, windows: int) -> dict[str, Table]:
    """Text in which tokens were replaced, to be restored; and random or shuffled tokens, which nothing can restore."""
    length, size = model.config.max_sequence_length, model.config.vocab_size
    clean, broken = corpus.windows(windows, length, broken=0.0).inputs, corpus.windows(windows, length, broken=1.0)
    replaced = torch.where(torch.rand(clean.shape) < REPLACED, torch.randint(size, clean.shape), clean)
    inputs = {"replaced tokens": replaced, "random or shuffled tokens": broken.inputs[broken.kinds != LOOPED]}
    tables = {name: quiet_table(vectors_of_windows(model, ids)) for name, ids in inputs.items()}
    for table in tables.values():
        table.labels[:, COLUMNS["attack"]] = 1.0
    restored = {"replaced tokens": vectors_of_windows(model, clean)}
    return {name: table._replace(restored=restored.get(name, table.vectors)) for name, table in tables.items()}


def ethics(example: Example) -> dict[str, float]:
    """How well each principle is kept by a text that neglects one: the check reads the mean of all of them."""
    neglected = NEGLECTED.get(example.label, NEGLECTED.get(example.group))
    if neglected is None:
        return {}
    return {**dict.fromkeys(LABELS["safety.ethics"], PARTLY), neglected: 0.0}


def quiet_table(vectors: Tensor) -> Table:
    """Vectors in which nothing is to be found, nothing is to be replaced, and every principle is kept."""
    labels = torch.zeros(len(vectors), len(COLUMNS))
    labels[:, [COLUMNS["right"], COLUMNS["among_few"]]] = UNKNOWN
    labels[:, [COLUMNS[name] for name in LABELS["safety.ethics"]]] = 1.0
    categories = torch.full((len(vectors), len(LABELS["safety.categories"])), 1.0 / len(LABELS["safety.categories"]))
    return Table(vectors, vectors, labels, categories)


def vectors_of_windows(model: CosmosAdvancedModel, inputs: Tensor) -> Tensor:
    """The vectors of all positions of windows (B, T): (B * T, D)."""
    return torch.cat([model.hidden_states(few).flatten(0, 1) for few in inputs.split(16)])


def last_vectors(model: CosmosAdvancedModel, tokenizer: Tokenizer, texts: Sequence[str]) -> Tensor:
    """The vector of each text's last token, (N, D)."""
    limit = model.config.max_sequence_length
    ids = [torch.tensor(encoding.ids[-limit:]) for encoding in tokenizer.encode_batch(list(texts))]
    vectors = torch.empty(len(ids), model.config.dim)
    by_length = sorted(range(len(ids)), key=lambda row: len(ids[row]))
    for rows in torch.tensor(by_length).split(64):
        padded = nn.utils.rnn.pad_sequence([ids[row] for row in rows], batch_first=True)  # on the right: not seen
        last = torch.tensor([len(ids[row]) - 1 for row in rows])
        vectors[rows] = vectors_at(model.hidden_states(padded), last)
    return vectors
