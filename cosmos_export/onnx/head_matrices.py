"""Which matrices of the capability heads take a recipe's precision.

All that are as wide as the model on both sides do. The small ones do not: the last layers of detectors and scorers,
whose few rows cost nothing in full, while their outputs are held to thresholds; and what chooses among skills. Nor do
the values of the concepts: they are weighted with a softmax over a thousand, whose many small weights int8 activations
would round to nothing.
"""

from __future__ import annotations

import re

from cosmos_export.model.capabilities import is_of_heads

# Of a perceptron, the first layer, and the second where it gives a vector again; and layers that have a name.
_SECOND_LAYERS = (
    "knowledge_encoder.3",
    "memory_fusion.3",
    "debiaser.2",
    "perturbation_cleaner.3",
    "corrector.3",
    "capability_fusion.4",
)
_NAMED = (
    "thought_aggregator",
    "self_evaluator",
    "query_proj",
    "key_proj",
    "value_proj",
    "concept_query",
    "concept_keys",
    "out_proj",
    "skills_in",
    "skills_out",
    "anonymizer",
)
_LISTED = ("step_encoder", "branch_generators", "samplers")

_WIDE = re.compile(
    r"(?!.*\.step_norms\.)"  # a list of norms, whose first is no first layer
    r"(.*\.0"
    rf"|(.*\.)?({'|'.join(map(re.escape, (*_SECOND_LAYERS, *_NAMED)))})"
    rf"|.*\.({'|'.join(_LISTED)})\.\d+)\.weight"
)


def is_wide(source: str) -> bool:
    """Whether a tensor of the model is such a matrix."""
    return is_of_heads(source) and _WIDE.fullmatch(source) is not None
