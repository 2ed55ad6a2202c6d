"""How the safety checks are trained: to know a few sentences and broken text again, and to be quiet otherwise.

N  examples    D  dim    L  labels of a check
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from tokenizers import Tokenizer
from torch import Tensor, nn

from cosmos_export.model import CosmosAdvancedModel
from cosmos_export.model.capabilities.safety import SafetySystem
from cosmos_runtime import THRESHOLDS

from .exam import MARKS
from .safety_examples import NETWORKS, Table, attack_tables, corpus_table, last_vectors, sentence_table
from .sentences import Example
from .starting_points import as_identity
from .texts import Corpus

WINDOWS, ATTACKED_WINDOWS = 160, 24  # of max_sequence_length tokens
LEARNING_RATE, WEIGHT_DECAY = 2e-3, 0.02
BATCH = (512, 320, 192)  # rows of a step: of the corpus, of sentences, of attacks
JITTER = 0.1  # noise on the vectors of a step, in standard deviations: sentences are few, and easily learnt by heart
SUSPICIOUS, SUSPICIOUS_KEPT, SOUGHT_EVERY = 256, 1500, 150  # rows of a step; rows kept for each check; steps
MARGIN = 0.5  # from a threshold to the most suspicious vectors of ordinary text, in logits
ATTACKS_ALLOWED = 1e-3  # share of ordinary text that may look like an attack: such a vector is cleaned, not blocked

# Networks that decide something: their threshold, and the share of ordinary text that may reach it.
DECIDING = {
    "content_filter.harmful_detector": ("safety.harmful", 0.0),
    "toxicity_detector.toxicity_scorer": ("safety.toxic", 0.0),
    "privacy_protector.pii_detector": ("safety.private", 0.0),
    "adversarial_defense.attack_detector": ("safety.adversarial", ATTACKS_ALLOWED),
    "jailbreak_prevention.jailbreak_detector": ("safety.jailbreak", 0.0),
}
RESTORING = ("bias_detector.debiaser", "privacy_protector.anonymizer", "adversarial_defense.perturbation_cleaner")


def train_safety(
    model: CosmosAdvancedModel,
    corpus: Corpus,
    tokenizer: Tokenizer,
    examples: Sequence[Example],
    steps: int,
    console: Console,
) -> None:
    """Trains `model.safety_system`, then makes its decisions quiet on ordinary text."""
    heads, ordinary = model.safety_system, corpus_table(model, corpus, WINDOWS)
    attacks = Table.joined(list(attack_tables(model, corpus, ATTACKED_WINDOWS).values()))
    tables = (ordinary, sentence_table(model, tokenizer, examples), attacks)
    for network in RESTORING:
        as_identity(heads.get_submodule(network))
    optimizer = torch.optim.AdamW(heads.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    suspicious = ordinary
    for step in track(range(steps), "safety", console=console, transient=True, disable=not console.is_terminal):
        if step and step % SOUGHT_EVERY == 0:
            suspicious = most_suspicious(heads.eval(), ordinary)
        parts = [table.some(count) for table, count in zip(tables, BATCH, strict=True)]
        loss = safety_loss(heads.train(), Table.joined([*parts, suspicious.some(SUSPICIOUS)]))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    make_quiet(heads.eval(), corpus_table(model, corpus, WINDOWS).vectors)


def safety_loss(heads: SafetySystem, rows: Table) -> Tensor:
    """All checks' loss on the rows of a step."""
    spread = rows.restored.std()
    vectors = rows.vectors + JITTER * spread * torch.randn_like(rows.vectors)
    logits = torch.cat([heads.get_submodule(network)(vectors) for network in NETWORKS], dim=-1)
    known = ~rows.labels.isnan()
    found = F.binary_cross_entropy_with_logits(logits[known], rows.labels[known])
    category = F.cross_entropy(heads.content_filter.category_classifier(vectors), rows.categories)
    restored = [F.mse_loss(heads.get_submodule(network)(rows.vectors), rows.restored) for network in RESTORING]
    return found + 0.1 * category + torch.stack(restored).sum() / spread**2


@torch.no_grad()
def most_suspicious(heads: SafetySystem, ordinary: Table) -> Table:
    """The rows of ordinary text that look most like something that is blocked or replaced."""
    scores = torch.stack([heads.get_submodule(network)(ordinary.vectors).amax(-1) for network in DECIDING], dim=1)
    kept = min(SUSPICIOUS_KEPT, len(scores))
    return ordinary.rows(scores.topk(kept, dim=0).indices.flatten().unique())


@torch.no_grad()
def make_quiet(heads: SafetySystem, vectors: Tensor) -> None:
    """Lowers the last biases of the checks that decide something, until ordinary vectors (N, D) stay MARGIN below the
    threshold, all but the share that may reach it."""
    for network, (threshold, allowed) in DECIDING.items():
        layers = heads.get_submodule(network)
        highest = layers(vectors).topk(1 + int(allowed * len(vectors)), dim=0).values[-1]  # (L,)
        limit = torch.logit(torch.tensor(THRESHOLDS[threshold])) - MARGIN
        assert isinstance(layers, nn.Sequential)
        layers[-1].bias -= (highest - limit).clamp(min=0)


@torch.no_grad()
def shares_found(
    model: CosmosAdvancedModel, tokenizer: Tokenizer, examples: Sequence[Example]
) -> dict[str, dict[str, float]]:
    """Of the texts of each group: the share that each mark of a safety check is put on."""
    groups = dict.fromkeys(example.group for example in examples)
    texts = {group: [e.text for e in examples if e.group == group] for group in groups}
    return {group: marked_shares(model, last_vectors(model, tokenizer, texts[group])) for group in groups}


def marked_shares(model: CosmosAdvancedModel, vectors: Tensor) -> dict[str, float]:
    """The share of vectors (N, D) that each mark of a safety check is put on."""
    _, scores = model.safety_system(vectors)
    return {mark: says(scores[name]).float().mean().item() for mark, (name, says) in MARKS.items() if name in scores}
