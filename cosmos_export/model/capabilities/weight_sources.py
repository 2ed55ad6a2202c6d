"""How parameters that the heads hold in another form than a checkpoint are made of the checkpoint's tensors.

    D  dim    H  heads of the concept attention    d  D / H    C  concepts

Skills are stacked, so that fifty of them are two products. What the concept attention computes from weights alone is
computed once: the queries' part of its packed projection, and the keys and values of the concepts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

SKILLS = 50
CONCEPTS = 1000
CONCEPT_HEADS = 8

PROCEDURAL, SEMANTIC = "memory_system.procedural_memory.", "memory_system.semantic_memory."


@dataclass(frozen=True)
class WeightSource:
    """The checkpoint tensors that a tensor of the model is made of, and how: `combine(*tensors)`.

    `axis` is that along which matrices are stacked and no more than that; None where `combine` does something else.
    """

    names: tuple[str, ...]
    combine: Callable[..., Tensor]
    axis: int | None = None

    def read(self, tensor: Callable[[str], Tensor]) -> Tensor:
        """The model's tensor; `tensor` reads one of the checkpoint's by its name."""
        return self.combine(*map(tensor, self.names))


def weight_source(name: str) -> WeightSource | None:
    """What the model's tensor of this full name is made of; None where the checkpoint has it under that very name."""
    if name.startswith(PROCEDURAL) and (local := name.removeprefix(PROCEDURAL)) in STACKED_SKILLS:
        stacked = STACKED_SKILLS[local]
        axis = stacked.axis if stacked.part.endswith(".weight") else None
        return WeightSource(tuple(PROCEDURAL + part for part in stacked.names), stacked.combine, axis)
    if name.startswith(SEMANTIC) and (local := name.removeprefix(SEMANTIC)) in DERIVED_CONCEPTS:
        derived = DERIVED_CONCEPTS[local]
        return WeightSource(tuple(SEMANTIC + part for part in derived.names), derived.combine)
    return None


@dataclass(frozen=True)
class StackedSkills:
    """A parameter of all skills, and where it comes from: names within the procedural memory."""

    part: str  # within a skill
    axis: int | None  # along which skills follow each other; None: a new first axis

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(f"skill_library.{skill}.{self.part}" for skill in range(SKILLS))

    def combine(self, *tensors: Tensor) -> Tensor:
        return torch.stack(tensors) if self.axis is None else torch.cat(tensors, self.axis)

    def split(self, stacked: Tensor) -> tuple[Tensor, ...]:
        """The inverse of `combine`: one tensor a skill, views where they can be."""
        return stacked.unbind() if self.axis is None else stacked.chunk(SKILLS, self.axis)


# By name within the procedural memory: (50 D, D), (50 D,), (D, 50 D) and (50, D).
STACKED_SKILLS = {
    "skills_in.weight": StackedSkills("0.weight", axis=0),
    "skills_in.bias": StackedSkills("0.bias", axis=0),
    "skills_out.weight": StackedSkills("2.weight", axis=1),
    "skill_biases": StackedSkills("2.bias", axis=None),
}


def query_part(packed: Tensor) -> Tensor:
    """The queries' third of a packed projection's weight (3D, D) or bias (3D,): (D, D) or (D,)."""
    return packed.chunk(3)[0]


def concept_keys(embeddings: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Keys of the concepts over sqrt(d), those of one head after those of another: (H * C, d).

    From concept embeddings (C, D) and the packed projection (3D, D), (3D,); computed in float64, given in their dtype.
    """
    keys = _projected(embeddings, weight, bias, third=1).transpose(0, 1)  # (H, C, d)
    return (keys * keys.shape[-1] ** -0.5).flatten(0, 1).to(embeddings.dtype).contiguous()


def concept_values(embeddings: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Values of the concepts, of each head: (H, C, d). Sources and precision as in `concept_keys`."""
    return _projected(embeddings, weight, bias, third=2).transpose(0, 1).to(embeddings.dtype).contiguous()


def _projected(embeddings: Tensor, weight: Tensor, bias: Tensor, third: int) -> Tensor:
    """One third of the packed projection of the concepts, in float64: (C, H, d)."""
    weight, bias = (packed.chunk(3)[third].double() for packed in (weight, bias))
    return torch.addmm(bias, embeddings.double(), weight.T).unflatten(-1, (CONCEPT_HEADS, -1))


_EMBEDDINGS, _WEIGHT, _BIAS = "concept_embeddings", "concept_attention.in_proj_weight", "concept_attention.in_proj_bias"

# By name within the semantic memory.
DERIVED_CONCEPTS = {
    "concept_query.weight": WeightSource((_WEIGHT,), query_part),
    "concept_query.bias": WeightSource((_BIAS,), query_part),
    "concept_keys.weight": WeightSource((_EMBEDDINGS, _WEIGHT, _BIAS), concept_keys),
    "concept_values.weight": WeightSource((_EMBEDDINGS, _WEIGHT, _BIAS), concept_values),
}
