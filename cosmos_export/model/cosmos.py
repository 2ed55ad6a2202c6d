"""The public model: the backbone, its capability heads, and their fusion (cosmos_reference, section 3).

    B  batch    T  sequence    D  dim    M  slots of the memory bank    V  vocab_size

Every row of a batch is computed as if it were alone, and what one row decides (a block, a correction) is a selection,
so that the model that is trained and called is the one that is exported.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from cosmos_export.config import CosmosAdvancedConfig
from cosmos_export.errors import ConfigError
from cosmos_export.model.backbone import CosmosBackbone
from cosmos_export.model.capabilities import (
    MemoryBank,
    MemoryState,
    capability_set,
    diagnostic_settings,
    entries_read,
    model_score_specs,
)
from cosmos_export.model.capabilities.evaluation import EvaluationSystem
from cosmos_export.model.capabilities.fusion import CapabilityFusion, replace_vectors_at, vectors_at
from cosmos_export.model.capabilities.layers import Scores
from cosmos_export.model.capabilities.memory import MemorySystem
from cosmos_export.model.capabilities.reasoning import ReasoningEngine
from cosmos_export.model.capabilities.safety import SafetySystem
from cosmos_export.model.capabilities.semantic_memory import SemanticMemory
from cosmos_export.model.capabilities.weight_sources import CONCEPT_HEADS
from cosmos_runtime import CAPABILITIES, nested_diagnostics

Diagnostics = dict[str, Any]


class Enhanced(NamedTuple):
    """What the heads make of a row's last hidden state.

    `vector` (B, D) replaces it; `blocked` (B,) bool marks rows whose logits are all zero, None where this
    configuration blocks none; `scores` are the tensors of `model_score_specs`, in that order; `memory` is the bank
    after this call, None without the memory capability.
    """

    vector: Tensor
    blocked: Tensor | None
    scores: Scores
    memory: MemoryState | None

    def placed(self, hidden: Tensor, last: Tensor) -> Tensor:
        """The hidden states (B, T, D) that logits are read from: `vector` at position `last` (B,) of each row, and
        zeros, which give zero logits, in blocked rows."""
        hidden = replace_vectors_at(hidden, last, self.vector)
        return hidden if self.blocked is None else torch.where(self.blocked[:, None, None], 0.0, hidden)


class CosmosAdvancedModel(CosmosBackbone):
    """`logits, diagnostics = model(input_ids)`: input_ids (B, T) integers below V, logits (B, T, V).

    `capabilities` are the heads that the model has, all four unless told otherwise. `causal=False` lets every position
    see all others, as the published forward pass did.
    Raises ConfigError when the configuration cannot be built, or for a capability that there is not.
    """

    def __init__(
        self, config: CosmosAdvancedConfig, *, causal: bool = True, capabilities: Iterable[str] = CAPABILITIES
    ) -> None:
        self.capabilities = capability_set(capabilities)
        _check_concept_heads(config.validate(), self.capabilities)
        super().__init__(config, causal=causal)
        if "reasoning" in self.capabilities:
            self.reasoning_engine = ReasoningEngine(config)
        if "memory" in self.capabilities:
            self.memory_system = MemorySystem(config)
        if "safety" in self.capabilities:
            self.safety_system = SafetySystem(config)
        if "evaluation" in self.capabilities:
            self.evaluation_system = EvaluationSystem(config)
        self.capability_fusion = CapabilityFusion(config.dim)

    def forward(
        self,
        input_ids: Tensor,
        use_reasoning: bool = True,
        use_memory: bool = True,
        use_learning: bool = False,
        use_safety: bool = True,
        use_evaluation: bool = True,
        examples: Sequence[Any] | None = None,
        return_diagnostics: bool = False,
        memory: MemoryBank | None = None,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, Diagnostics | list[Diagnostics] | None]:
        """Logits (B, T, V) and, with `return_diagnostics`, the report of the row, or a list with one a row.

        `memory` (see `new_memory`) carries what earlier calls stored, and is updated; without it a call starts from an
        empty bank. `lengths` (B,) says how many tokens of each row count, in a batch padded on the right: the heads
        read a row's last one; logits beyond it mean nothing.
        Raises ConfigError for ids, lengths or a bank that do not fit, and for learning from `examples`.
        """
        _refuse_learning(use_learning, examples)
        flags = (use_reasoning, use_memory, use_safety, use_evaluation)
        chosen = self._chosen([name for name, used in zip(CAPABILITIES, flags, strict=True) if used])
        hidden = self.hidden_states(input_ids)
        last = self._last_positions(input_ids, lengths)
        bank = self._bank_for(input_ids.shape[0], memory) if "memory" in chosen else None
        enhanced = self.enhance(vectors_at(hidden, last), hidden[:, 0], chosen, bank.state if bank else None)
        if bank is not None and enhanced.memory is not None:
            bank.state = enhanced.memory
        logits = self.logits(enhanced.placed(hidden, last))
        return logits, self._report(enhanced.scores, chosen, input_ids.shape[0]) if return_diagnostics else None

    def enhance(
        self,
        representation: Tensor,
        query: Tensor,
        capabilities: Sequence[str] = CAPABILITIES,
        memory: MemoryState | None = None,
    ) -> Enhanced:
        """What the heads make of each row's last hidden state: a pure function of tensors, and what programs trace.

        `representation` and `query` (B, D) are the normed hidden states of a row's last and first token; `memory` is
        the bank before this call, which the memory capability needs.
        """
        slots: dict[str, Tensor] = {}
        scores: Scores = {}
        if "reasoning" in capabilities:
            slots["reasoning"], scores = self.reasoning_engine(representation)
        if "memory" in capabilities:
            slots["memory"], found, memory = self.memory_system(representation, memory)
            scores |= found
        if "safety" in capabilities:
            slots["safety"], found = self.safety_system(representation)
            scores |= found
        vector = self.capability_fusion(representation, **slots)
        if "evaluation" in capabilities:
            vector, found = self.evaluation_system(vector, query)
            scores |= found
        ordered = {spec.name: scores[spec.name] for spec in model_score_specs(self.config, capabilities)}
        return Enhanced(vector, scores.get("output_blocked"), ordered, memory if "memory" in capabilities else None)

    def new_memory(self, batch: int, capacity: int | None = None) -> MemoryBank:
        """An empty working memory for a sequence of calls with `batch` rows.

        `capacity` is in entries, at most `working_memory_size`, which it is by default; a sequence of fewer calls
        needs no more entries than calls.
        """
        size = self.config.memory.working_memory_size
        slots = size if capacity is None else max(entries_read(size), min(capacity, size))
        weight = self.tok_embeddings.weight
        return MemoryBank.empty(batch, slots, self.config.dim, dtype=weight.dtype, device=weight.device)

    def freeze(self) -> Self:
        """Computes once what depends on weights alone (see `SemanticMemory`); loading does it. Training undoes it."""
        for module in self.modules():
            if isinstance(module, SemanticMemory):
                module.freeze()
        return self

    @torch.no_grad()
    def generate(
        self, input_ids: Tensor, max_new_tokens: int | None = None, **options: Any
    ) -> tuple[Tensor, Diagnostics | list[Diagnostics]]:
        """Continues each row of `input_ids` (B, T), one whole forward pass a token; see
        `cosmos_export.model.generation.generate`, which has the options and says what comes back."""
        from cosmos_export.model.generation import generate

        return generate(self, input_ids, max_new_tokens, **options)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        head_layout: str = "interleave",
        causal: bool = True,
        dtype: torch.dtype = torch.float32,
        capabilities: Iterable[str] = CAPABILITIES,
    ) -> CosmosAdvancedModel:
        """The model of a checkpoint folder, in evaluation mode, its parameters without gradients.

        `head_layout="tile"` and `causal=False` are for checkpoints of the published code.
        Raises CheckpointError that lists tensors which are missing, misshapen or unknown; ConfigError.
        """
        from cosmos_export.checkpoint import Checkpoint
        from cosmos_export.model.loading import load_model

        checkpoint = Checkpoint.open(folder, head_layout=head_layout)
        return load_model(checkpoint, causal=causal, dtype=dtype, capabilities=capabilities)

    def save_pretrained(self, folder: str | Path, tokenizer: Path | None = None) -> None:
        """Writes a checkpoint folder that `from_pretrained` reads: config.json, model.safetensors, model_info.json."""
        from cosmos_export.checkpoint import save_checkpoint

        save_checkpoint(folder, self.config, self.state_dict(), tokenizer)

    def _chosen(self, wanted: Iterable[str]) -> tuple[str, ...]:
        chosen = capability_set(wanted)
        absent = [name for name in chosen if name not in self.capabilities]
        if absent:
            raise ConfigError(
                f"this model has no {' and no '.join(absent)}: it was built with capabilities "
                f"{self.capabilities or 'none'}; pass {', '.join(f'use_{name}=False' for name in absent)}"
            )
        return chosen

    def _last_positions(self, input_ids: Tensor, lengths: Tensor | None) -> Tensor:
        """Where each row's last token is, (B,) int64."""
        batch, longest = input_ids.shape
        if lengths is None:
            return torch.full((batch,), longest - 1, device=input_ids.device)
        if not self.causal:
            raise ConfigError("lengths: without a causal mask, padding changes every position; call rows one by one")
        if lengths.shape != (batch,) or not ((lengths >= 1) & (lengths <= longest)).all():
            raise ConfigError(f"lengths: expected {batch} numbers from 1 to {longest}, got {lengths.tolist()}")
        return lengths.to(input_ids.device, torch.int64) - 1

    def _bank_for(self, batch: int, memory: MemoryBank | None) -> MemoryBank:
        if memory is None:
            return self.new_memory(batch, capacity=1)
        keys, wanted = memory.state.keys, self.tok_embeddings.weight
        least = entries_read(self.config.memory.working_memory_size)
        fits = keys.shape[0] == batch and keys.shape[1] >= least and keys.shape[2] == self.config.dim
        if not fits or keys.dtype != wanted.dtype or keys.device != wanted.device:
            raise ConfigError(
                f"memory: expected a bank of {batch} rows, at least {least} entries and dim {self.config.dim}, "
                f"{wanted.dtype} on {wanted.device}, got shape {tuple(keys.shape)}, {keys.dtype} on {keys.device}; "
                f"make one with model.new_memory({batch})"
            )
        return memory

    def _report(
        self, scores: Mapping[str, Tensor], capabilities: Sequence[str], batch: int
    ) -> Diagnostics | list[Diagnostics]:
        settings = diagnostic_settings(self.config, capabilities)
        arrays = {name: tensor.detach().cpu().numpy() for name, tensor in scores.items()}
        reports = [nested_diagnostics(arrays, settings, row) for row in range(batch)]
        return reports[0] if batch == 1 else reports


def _check_concept_heads(config: CosmosAdvancedConfig, capabilities: Sequence[str]) -> None:
    if "memory" in capabilities and isinstance(config.dim, int) and config.dim % CONCEPT_HEADS:
        raise ConfigError(
            f"the memory capability's concept attention has {CONCEPT_HEADS} heads: dim must be a multiple of "
            f"{CONCEPT_HEADS}, got {config.dim}; build the model without it: capabilities=('reasoning', ...)"
        )


def _refuse_learning(use_learning: bool, examples: Sequence[Any] | None) -> None:
    if use_learning and examples:
        raise ConfigError(
            "learning from examples is not supported: the learning engine is not part of this model. "
            "Leave examples out (use_learning alone does nothing, as published)"
        )
