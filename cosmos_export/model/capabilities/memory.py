"""Memory head (cosmos_reference, section 5): four memories, fused.

B  batch    D  dim
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cosmos_export.config import CosmosAdvancedConfig
from cosmos_export.model.capabilities.layers import Scores, perceptron
from cosmos_export.model.capabilities.procedural_memory import ProceduralMemory
from cosmos_export.model.capabilities.semantic_memory import SemanticMemory
from cosmos_export.model.capabilities.working_memory import MemoryState, WorkingMemory


class MemorySystem(nn.Module):
    """Working, episodic, semantic and procedural memory. The episodic one is empty, as no episode ever ends."""

    def __init__(self, config: CosmosAdvancedConfig) -> None:
        super().__init__()
        self.working_memory = WorkingMemory(config.dim, config.memory.working_memory_size)
        self.semantic_memory = SemanticMemory(config.dim)
        self.procedural_memory = ProceduralMemory(config.dim)
        self.memory_fusion = perceptron(4 * config.dim, 2 * config.dim, config.dim, norm=True)

    def forward(self, x: Tensor, state: MemoryState) -> tuple[Tensor, Scores, MemoryState]:
        """x (B, D) to (B, D), "memory.calls" (B,) int64 with this call in it, and the bank after it."""
        working, state = self.working_memory(x, state)
        memories = (working, torch.zeros_like(x), self.semantic_memory(x), self.procedural_memory(x))
        return self.memory_fusion(torch.cat(memories, dim=-1)), {"memory.calls": state.calls}, state
