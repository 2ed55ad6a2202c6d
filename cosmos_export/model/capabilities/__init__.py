"""The capability heads: reasoning, memory, safety and evaluation, and the fusion of what they give.

Each is a pure function of tensors, every row by itself, so that the eager model is what is exported.
"""

from cosmos_export.model.capabilities.settings import capability_set, diagnostic_settings, model_score_specs
from cosmos_export.model.capabilities.stored_names import has_heads, is_of_heads
from cosmos_export.model.capabilities.weight_sources import WeightSource, weight_source
from cosmos_export.model.capabilities.working_memory import MemoryBank, MemoryState, entries_read

__all__ = [
    "MemoryBank",
    "MemoryState",
    "WeightSource",
    "capability_set",
    "diagnostic_settings",
    "entries_read",
    "has_heads",
    "is_of_heads",
    "model_score_specs",
    "weight_source",
]
