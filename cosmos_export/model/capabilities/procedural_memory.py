"""Procedural memory (cosmos_reference, section 5): fifty skills, as two products.

    B  batch    D  dim    N  skills

A checkpoint names each skill's layers (`skill_library.7.0.weight`). The module holds them stacked, and speaks the
checkpoint's names in `state_dict` and `load_state_dict`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cosmos_export.model.capabilities.layers import distribution
from cosmos_export.model.capabilities.weight_sources import SKILLS, STACKED_SKILLS, StackedSkills


class ProceduralMemory(nn.Module):
    """The sum of what all skills make of the input, weighted by how well each fits."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.skill_selector = nn.Linear(dim, SKILLS)
        self.skills_in = nn.Linear(dim, SKILLS * dim)  # the first layers, one below the other
        self.skills_out = nn.Linear(SKILLS * dim, dim, bias=False)  # the second layers, side by side
        self.skill_biases = nn.Parameter(torch.empty(SKILLS, dim))  # theirs
        self._reset_second_layers(dim)
        self.register_state_dict_post_hook(_split_skills)
        self.register_load_state_dict_pre_hook(_stack_skills)

    @torch.no_grad()
    def _reset_second_layers(self, dim: int) -> None:
        """Each second layer as torch would make it by itself: D inputs, not the 50 D of all together."""
        for parameter in (self.skills_out.weight, self.skill_biases):
            parameter.uniform_(-(dim**-0.5), dim**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """(B, D) to (B, D)."""
        weights = distribution(self.skill_selector(x)).to(x.dtype)  # (B, N)
        inner = torch.relu(self.skills_in(x)).unflatten(-1, (SKILLS, -1))  # (B, N, D)
        weighted = (inner * weights[..., None]).flatten(1)  # (B, N*D)
        return self.skills_out(weighted) + weights @ self.skill_biases


def _split_skills(module: nn.Module, state: dict[str, Tensor], prefix: str, local_metadata: dict[str, Any]) -> None:
    """In a state dict: stacked parameters become the checkpoint's tensors."""
    for name, skills in STACKED_SKILLS.items():
        parts = skills.split(state.pop(prefix + name))
        state.update(zip((prefix + part for part in skills.names), parts, strict=True))


def _stack_skills(
    module: nn.Module,
    state: dict[str, Tensor],
    prefix: str,
    local_metadata: dict[str, Any],
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    """In a state dict to be loaded: the checkpoint's tensors become stacked ones. What is wrong is told by its name
    there, and the parameter is then loaded with itself."""
    for name, skills in STACKED_SKILLS.items():
        own = module.get_parameter(name).detach()
        tensors = {part: state.pop(prefix + part, None) for part in skills.names}
        missing = [prefix + part for part, tensor in tensors.items() if tensor is None]
        found = [tensor for tensor in tensors.values() if tensor is not None]
        misfits = [] if missing else _misfits(skills, own, found)
        missing_keys.extend(missing)
        error_msgs.extend(f"size mismatch for {prefix}{misfit}" for misfit in misfits)
        state[prefix + name] = own if missing or misfits else skills.combine(*found)


def _misfits(skills: StackedSkills, own: Tensor, tensors: list[Tensor]) -> list[str]:
    wanted = skills.split(own)[0].shape
    return [
        f"{name}: copying a param with shape {tensor.shape} from checkpoint, the shape in current model is {wanted}."
        for name, tensor in zip(skills.names, tensors, strict=True)
        if tensor.shape != wanted
    ]
