"""How the evaluation heads are trained: on what is true of a vector, or was done to it.

    N  calls    D  dim    V  vocab_size

Whether the next token was the likeliest one, or among the likeliest, is known after the fact; what is wrong with a text
or with a vector is known because it was made so (`texts`). The corrector is taught by the plain decoder, as fusion is.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from cosmos_export.model import CosmosAdvancedModel
from cosmos_runtime import LABELS

from .predictions import FEW, MANY, divergence, likelier_tokens
from .reading import Calls
from .texts import LOOPED, ORDINARY, RANDOM, SHUFFLED, Corpus, perturbed

NOISY = 0.15  # share of vectors that are perturbed

Facts = dict[str, Tensor]


def evaluation_losses(model: CosmosAdvancedModel, corpus: Corpus, calls: Calls, vectors: Tensor) -> dict[str, Tensor]:
    """Losses by name, on vectors (N, D) that the fusion gave; they train the evaluation and what reasoning says of
    itself, and nothing else."""
    noisy = torch.rand(len(vectors)) < NOISY
    vectors = torch.where(noisy[:, None], perturbed(vectors), vectors).detach()
    with_query = torch.cat((vectors, calls.query), dim=-1)
    heads, facts = model.evaluation_system, facts_about(model, corpus, calls, vectors, noisy)
    correction = heads.self_correction
    uncertainty = F.softplus(heads.confidence_estimator.uncertainty_estimator(vectors)).squeeze(-1)
    return {
        "correction": divergence(model, calls.plain, correction.corrector(with_query)),
        "uncertainty": F.mse_loss(uncertainty, facts["entropy"]),
        "confidence": binary(heads.confidence_estimator.confidence_network(vectors), facts["right"]),
        "factuality": binary(heads.factuality_checker.factual_scorer(vectors), facts["among_few"]),
        "completeness": binary(heads.completeness_checker.completeness_scorer(with_query), facts["ends_line"]),
        "verification": binary(heads.answer_verifier.verification_network(with_query), facts["sound"]),
        "quality": binary(heads.quality_scorer.quality_dimensions(vectors), qualities(facts)),
        "errors": binary(correction.error_detector(vectors), errors(facts)),
        **reasoning_losses(model, calls),
    }


def reasoning_losses(model: CosmosAdvancedModel, calls: Calls) -> dict[str, Tensor]:
    """Whether the plain decoder is right, as two modes of reasoning see it: one from the vector itself, one from how
    its samples agree."""
    engine, right = model.reasoning_engine, (calls.plain.argmax(-1) == calls.targets).float()
    with torch.no_grad():
        samples = torch.cat([sample(calls.vectors).tanh() for sample in engine.self_consistency.samplers], dim=-1)
    reflexion = engine.reflexion
    return {
        "consistency": binary(engine.self_consistency.consistency_checker(samples), right),
        "reflexion": binary(reflexion.error_detector(reflexion.self_evaluator(calls.vectors)), 1.0 - right),
    }


@torch.no_grad()
def facts_about(model: CosmosAdvancedModel, corpus: Corpus, calls: Calls, vectors: Tensor, noisy: Tensor) -> Facts:
    """What is known of each vector, (N,) each, from 0 (no) to 1 (yes)."""
    logits = model.logits(vectors)
    likelier = likelier_tokens(logits, calls.targets)
    entropy = torch.distributions.Categorical(logits=logits).entropy() / math.log(logits.shape[-1])
    marks = {
        "right": likelier == 0,
        "among_few": likelier < FEW,
        "beyond_many": (likelier >= MANY) & (calls.kinds == ORDINARY) & ~noisy,
        "ends_word": corpus.begins_word[calls.targets],
        "ends_line": corpus.begins_line[calls.targets],
        "shuffled": calls.kinds == SHUFFLED,
        "random": calls.kinds == RANDOM,
        "looped": calls.kinds == LOOPED,
        "noisy": noisy,
        "sound": (calls.kinds == ORDINARY) & ~noisy,
    }
    return {name: mark.float() for name, mark in marks.items()} | {"entropy": entropy, "surprise": calls.surprise}


def qualities(facts: Facts) -> Tensor:
    """What each dimension of quality is taken to be, (N, 8)."""
    meaning = {
        "relevance": 1.0 - facts["random"],
        "coherence": (1.0 - facts["shuffled"]) * (1.0 - facts["random"]),
        "accuracy": facts["right"],
        "completeness": facts["ends_word"],
        "clarity": 1.0 - facts["entropy"],
        "conciseness": 1.0 - facts["looped"],
        "informativeness": facts["surprise"],
        "helpfulness": facts["among_few"],
    }
    return torch.stack([meaning[name] for name in LABELS["evaluation.quality"]], dim=-1)


def errors(facts: Facts) -> Tensor:
    """What each kind of error is taken to be, (N, 5)."""
    meaning = {
        "logical_error": facts["shuffled"],
        "factual_error": facts["beyond_many"],
        "consistency_error": facts["noisy"],
        "relevance_error": facts["random"],
        "formatting_error": facts["looped"],
    }
    return torch.stack([meaning[name] for name in LABELS["evaluation.errors"]], dim=-1)


def binary(logits: Tensor, facts: Tensor) -> Tensor:
    """Mean binary cross-entropy of logits, (N, 1) for facts (N,) or (N, L) for (N, L)."""
    return F.binary_cross_entropy_with_logits(logits.view_as(facts), facts)
