"""Reasoning head (cosmos_reference, section 4): one of four modes, chosen by the configuration.

B  batch    D  dim    N  steps, branches or samples
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cosmos_export.config import CosmosAdvancedConfig
from cosmos_export.model.capabilities.layers import Scores, distribution, probabilities, probability


class ChainOfThought(nn.Module):
    """Each thought is made of the one before; all of them together make the output."""

    def __init__(self, dim: int, steps: int) -> None:
        super().__init__()
        self.step_encoder = nn.ModuleList(nn.Linear(dim, dim) for _ in range(steps))
        self.step_norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(steps))
        self.thought_aggregator = nn.Linear(steps * dim, dim)

    def forward(self, x: Tensor) -> tuple[Tensor, Scores]:
        """(B, D) to (B, D); no scores."""
        thoughts = [x]
        for encode, norm in zip(self.step_encoder, self.step_norms, strict=True):
            thoughts.append(norm(torch.relu(encode(thoughts[-1]))))
        return self.thought_aggregator(torch.cat(thoughts[1:], dim=-1)), {}


class TreeOfThoughts(nn.Module):
    """Branches side by side, weighted by how promising each is."""

    def __init__(self, dim: int, branches: int) -> None:
        super().__init__()
        self.branch_generators = nn.ModuleList(nn.Linear(dim, dim) for _ in range(branches))
        self.evaluator = nn.Linear(dim, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Scores]:
        """(B, D) to (B, D); no scores."""
        branches = torch.stack([torch.relu(generate(x)) for generate in self.branch_generators], dim=1)  # (B, N, D)
        promise = probabilities(self.evaluator(branches)).squeeze(-1)  # (B, N)
        weights = distribution(promise).to(x.dtype)
        return (weights[..., None] * branches).sum(1), {}


class SelfConsistency(nn.Module):
    """The mean of several samples, and a score of how well they agree."""

    def __init__(self, dim: int, samples: int) -> None:
        super().__init__()
        self.samplers = nn.ModuleList(nn.Linear(dim, dim) for _ in range(samples))
        self.consistency_checker = nn.Linear(samples * dim, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Scores]:
        """(B, D) to (B, D); scores: "reasoning.consistency" (B,)."""
        samples = [torch.tanh(sample(x)) for sample in self.samplers]
        consistency = probability(self.consistency_checker(torch.cat(samples, dim=-1)))
        return torch.stack(samples).mean(0), {"reasoning.consistency": consistency}


class Reflexion(nn.Module):
    """A verdict on the input, which stays as it is: correcting would need an earlier output, and there is none."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.self_evaluator = nn.Linear(dim, dim)
        self.error_detector = nn.Linear(dim, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Scores]:
        """(B, D) to itself; scores: "reasoning.error" (B,)."""
        return x, {"reasoning.error": probability(self.error_detector(self.self_evaluator(x)))}


class ReasoningEngine(nn.Module):
    """All modes have weights; `config.reasoning.mode` says which one runs, and a mode without any returns its input."""

    def __init__(self, config: CosmosAdvancedConfig) -> None:
        super().__init__()
        self.config, settings = config, config.reasoning
        self.cot = ChainOfThought(config.dim, settings.reasoning_steps)
        self.tot = TreeOfThoughts(config.dim, settings.multi_path_exploration)
        self.self_consistency = SelfConsistency(config.dim, settings.consistency_checks)
        self.reflexion = Reflexion(config.dim)

    def forward(self, x: Tensor) -> tuple[Tensor, Scores]:
        """(B, D) to (B, D), and the scores of the mode."""
        settings = self.config.reasoning
        mode = {
            "chain_of_thought": self.cot,
            "tree_of_thoughts": self.tot,
            "self_consistency": self.self_consistency,
            "reflexion": self.reflexion,
        }.get(settings.mode)
        output, scores = mode(x) if mode is not None else (x, {})
        if settings.extended_thinking:
            output, _ = self.cot(output)
        return output, scores
