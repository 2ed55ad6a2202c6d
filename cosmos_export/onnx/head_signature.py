"""What a graph with capability heads takes and gives beside the decoder's tensors: its state, and its scores.

    batch B    memory_slots M    dim D

State goes in and out, like a key/value cache, and may be one buffer: the working memory's entries and, in the decoder,
the vector of each row's first token. How many calls a row has behind it goes in only, since the host counts: calls that
it does not count, nothing remembers. A score is called what `cosmos_runtime.score_specs` calls it.
"""

from __future__ import annotations

from collections.abc import Sequence

from cosmos_export.config import CosmosAdvancedConfig
from cosmos_export.model.capabilities import entries_read, model_score_specs
from cosmos_runtime import Role, TensorSpec

MEMORY_SLOTS = "memory_slots"

ENDS_CALL = "ends_call"
WANTS_SCORES = "wants_scores"
PAST_MEMORY, PRESENT_MEMORY = "past_memory.{part}", "present_memory.{part}"
PAST_CALLS = PAST_MEMORY.format(part="calls")
PAST_QUERY, PRESENT_QUERY = "past_query", "present_query"

Tensors = tuple[list[TensorSpec], list[TensorSpec]]

_MEMORY_PARTS = (
    ("keys", Role.PAST_MEMORY_KEYS, Role.PRESENT_MEMORY_KEYS),
    ("values", Role.PAST_MEMORY_VALUES, Role.PRESENT_MEMORY_VALUES),
)


def memory_slots(config: CosmosAdvancedConfig) -> int | str:
    """The memory's second axis: dynamic, unless the model has room for no more entries than a call reads."""
    size = config.memory.working_memory_size
    return MEMORY_SLOTS if size > entries_read(size) else size


def head_tensors(
    config: CosmosAdvancedConfig,
    capabilities: Sequence[str],
    *,
    batch: str,
    activations: str,
    with_query: bool,
    on_demand: bool = False,
) -> Tensors:
    """Inputs and outputs of the heads: state in the type `activations`, then scores.

    `with_query` is for graphs that do not see a row's first token in every run: they keep the evaluation's query, and
    are told whether their tokens end a call. Where scores are computed `on_demand`, a run says whether it wants them.
    """
    inputs, outputs = _memory(config, batch, activations) if "memory" in capabilities else ([], [])
    if on_demand:
        inputs = [TensorSpec(WANTS_SCORES, Role.WANTS_SCORES, "bool", (1,)), *inputs]
    if with_query:
        inputs = [TensorSpec(ENDS_CALL, Role.ENDS_CALL, "bool", (1,)), *inputs]
    if with_query and "evaluation" in capabilities:
        inputs.append(TensorSpec(PAST_QUERY, Role.PAST_QUERY, activations, (batch, config.dim)))
        outputs.append(TensorSpec(PRESENT_QUERY, Role.PRESENT_QUERY, activations, (batch, config.dim)))
    scores = model_score_specs(config, capabilities)
    return inputs, [*outputs, *(TensorSpec(s.name, Role.SCORE, s.dtype, (batch, *s.shape)) for s in scores)]


def _memory(config: CosmosAdvancedConfig, batch: str, dtype: str) -> Tensors:
    """The bank, unless the model has none, and the calls so far."""
    slots = memory_slots(config)
    parts = _MEMORY_PARTS if slots else ()
    shape = (batch, slots, config.dim)
    inputs = [TensorSpec(PAST_MEMORY.format(part=part), past, dtype, shape) for part, past, _ in parts]
    outputs = [TensorSpec(PRESENT_MEMORY.format(part=part), present, dtype, shape) for part, _, present in parts]
    return [*inputs, TensorSpec(PAST_CALLS, Role.MEMORY_CALLS, "int64", (batch,))], outputs
