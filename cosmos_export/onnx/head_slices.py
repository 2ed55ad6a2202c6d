"""Where the capability heads of a bundle's graph begin and end: the values between which each head is cut out.

    B  batch    T  sequence    D  dim    M  slots of the memory bank    n  wanted positions    V  vocab_size

Found by the weights that a value depends on, as the borders of layers are (`slices`): the fusion reads the slots of all
heads side by side, the memory's fusion those of its memories, and the vector that takes the place of the last hidden
state is what a choice, the last before the logits, puts there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from cosmos_export.errors import ExportError
from cosmos_export.model.capabilities import is_of_heads
from cosmos_export.onnx.head_signature import PAST_CALLS, PAST_MEMORY, PRESENT_MEMORY, PRESENT_QUERY
from cosmos_export.onnx.slices import SlicedGraph
from cosmos_runtime import Role

# What goes from piece to piece, by names of its own: vectors (B, D), the bank (B, M, D) and its calls (B,).
REPRESENTATION, QUERY = "representation", "query"
REASONING, WORKING, SEMANTIC, PROCEDURAL = "reasoning", "working memory", "semantic memory", "procedural memory"
MEMORY, SAFETY, FUSED, VECTOR = "memory", "safety", "fused", "vector"
BLOCKED = "output_blocked"
KEYS, VALUES = "memory keys", "memory values"
KEYS_BEFORE, VALUES_BEFORE, CALLS_BEFORE = "memory keys before", "memory values before", "calls before"
NORMED, LOGITS = "normed", "logits"

# The pieces, in their order.
CALL_PIECE, FUSION_PIECE, EVALUATION_PIECE, LOGITS_PIECE = "call", "capability fusion", "evaluation", "logits"
MEMORY_FUSION_PIECE = "memory fusion"


@dataclass(frozen=True)
class HeadPiece:
    """A part of the heads: what it takes and gives, each as the value of the graph by its name here."""

    name: str
    takes: Mapping[str, str]
    gives: Mapping[str, str]
    scores: tuple[str, ...] = field(default=())
    """Those of `gives` that are scores."""


def head_pieces(graph: SlicedGraph, capabilities: Sequence[str]) -> list[HeadPiece]:
    """The pieces of a graph behind its final norm, in an order in which each finds what it takes.

    A head that gives its input on as it is, and no scores, is none. Raises ExportError where the heads cannot be told
    apart.
    """
    return _Heads(graph, capabilities).pieces()


class _Heads:
    def __init__(self, graph: SlicedGraph, capabilities: Sequence[str]) -> None:
        self.graph, self.capabilities = graph, capabilities
        self.outputs = [tensor.name for tensor in graph.spec.outputs]
        self.inputs = [tensor.name for tensor in graph.spec.inputs]
        slots = self._side_by_side("capability_fusion.0.weight", 5)
        self.representation, self.reasoning, self.memory, _, self.safety = slots
        self.fused = graph.first_after(["capability_fusion.4.weight", "capability_fusion.4.bias"])
        self.query = self._query()
        self.vector = self._vector()

    def pieces(self) -> list[HeadPiece]:
        found = [self._call()]
        x = {REPRESENTATION: self.representation}
        if "reasoning" in self.capabilities:
            found.append(self._piece(REASONING, x, {REASONING: self.reasoning}))
        if "memory" in self.capabilities:
            found += self._memories(x)
        if "safety" in self.capabilities:
            found.append(self._piece(SAFETY, x, {SAFETY: self.safety}))
        slots = {REASONING: self.reasoning, MEMORY: self.memory, SAFETY: self.safety}
        found.append(self._piece(FUSION_PIECE, x | slots, {FUSED: self.fused}))
        if "evaluation" in self.capabilities:
            takes = {FUSED: self.fused} | ({} if self.query is None else {QUERY: self.query})
            found.append(self._piece(EVALUATION_PIECE, takes, {VECTOR: self.vector}))
        takes = {NORMED: self.graph.normed, VECTOR: self.vector} | self._named([BLOCKED])
        logits = next(t.name for t in self.graph.spec.outputs if t.role == Role.LOGITS)
        return [*(piece for piece in found if piece.gives), HeadPiece(LOGITS_PIECE, takes, {LOGITS: logits})]

    def _call(self) -> HeadPiece:
        gives = {REPRESENTATION: self.representation} | ({} if self.query is None else {QUERY: self.query})
        return HeadPiece(CALL_PIECE, {NORMED: self.graph.normed}, gives)

    def _memories(self, x: Mapping[str, str]) -> list[HeadPiece]:
        working, _, semantic, procedural = self._side_by_side("memory_system.memory_fusion.0.weight", 4)
        names = (KEYS_BEFORE, VALUES_BEFORE, CALLS_BEFORE)
        inputs = (PAST_MEMORY.format(part="keys"), PAST_MEMORY.format(part="values"), PAST_CALLS)
        state = {name: given for name, given in zip(names, inputs, strict=True) if given in self.inputs}
        kept = {KEYS: PRESENT_MEMORY.format(part="keys"), VALUES: PRESENT_MEMORY.format(part="values")}
        kept = {name: given for name, given in kept.items() if given in self.outputs}
        parts = {WORKING: working, SEMANTIC: semantic, PROCEDURAL: procedural}
        return [
            self._piece(WORKING, {**x, **state}, {WORKING: working, **kept}, scores_of="memory"),
            self._piece(SEMANTIC, x, {SEMANTIC: semantic}),
            self._piece(PROCEDURAL, x, {PROCEDURAL: procedural}),
            self._piece(MEMORY_FUSION_PIECE, {**x, **parts}, {MEMORY: self.memory}),
        ]

    def _piece(
        self, name: str, takes: Mapping[str, str], gives: Mapping[str, str], scores_of: str | None = None
    ) -> HeadPiece:
        scores = [s for s in self.outputs if s.startswith(f"{scores_of or name}.")]
        if name == SAFETY:
            scores += [s for s in self.outputs if s == BLOCKED]
        new = {own: value for own, value in gives.items() if value not in takes.values()}
        return HeadPiece(name, dict(takes), {**new, **self._named(scores)}, tuple(scores))

    def _named(self, outputs: Sequence[str]) -> dict[str, str]:
        return {name: name for name in outputs if name in self.outputs}

    # Finding values

    def _side_by_side(self, weight: str, count: int) -> tuple[str, ...]:
        """The values that a matrix meets as one."""
        operator, parts = self.graph.written_by(self.graph.taken_by_product(weight))
        if operator != "Concat" or len(parts) != count:
            raise self._unknown(f"{weight} does not meet {count} vectors side by side")
        return parts

    def _query(self) -> str | None:
        """What the evaluation has beside the vector; None where nothing reads it."""
        if PRESENT_QUERY in self.outputs:
            return PRESENT_QUERY
        if "evaluation" not in self.capabilities:
            return None
        results = [name for name in self.outputs if name.startswith("evaluation.")]
        for value in dict.fromkeys(v for result in results for v in self.graph.before(result)):
            operator, parts = self.graph.written_by(value)
            if operator == "Concat" and len(parts) == 2 and parts[0] == self.fused:
                return parts[1]
        return None

    def _vector(self) -> str:
        """What is put in the place of the last hidden state."""
        logits = next(t.name for t in self.graph.spec.outputs if t.role == Role.LOGITS)
        for value in reversed(self.graph.before(logits)):
            operator, parts = self.graph.written_by(value)
            if operator == "Where" and self._of_heads(parts[1]) and not self._of_heads(parts[2]):
                shaped, read = self.graph.written_by(parts[1])
                if shaped == "Unsqueeze":
                    return read[0]
        raise self._unknown("nothing takes the place of the last hidden state")

    def _of_heads(self, value: str) -> bool:
        return any(map(is_of_heads, self.graph.depends_on(value)))

    def _unknown(self, problem: str) -> ExportError:
        return ExportError(
            f"{self.graph.folder}: {problem}, so the capability heads cannot be told apart. The graph is not one that "
            f"this version writes; export the bundle again"
        )
