"""The graphs that choose a decoder's next tokens where its logits are: on the device, without asking the host.

    B  batch    L  cache length    V  vocab_size    C  candidates    G  groups of a vocabulary, of so many tokens each

A step of the loop is one run of the decoder and one of a sampler; the sampler writes the next tokens and positions to
where the decoder reads its inputs. A sampler has no weights, so that each way to sample is a graph of its own, and all
of them stand beside one copy of the model in the device's memory. Every operator has a CUDA kernel, and no shape is
computed, so that a step can be captured as a CUDA graph. Random operators would repeat themselves in one: uniform
numbers are an input, one for each position.

What they choose is what `cosmos_runtime.sampling` chooses from the same logits and the same uniform numbers. On a GPU
the runtime has kernels of its own in their place (`sampling_kernels`), unless it is told to use none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import ArrayLike

from cosmos_export.config import CosmosAdvancedConfig
from cosmos_export.onnx.signature import BATCH, CACHE_LENGTH, LOGITS
from cosmos_runtime import SAMPLER, GraphSpec, Role, TensorSpec

# The newest version of each operator used here that ONNX Runtime's CUDA provider has kernels for.
OPSET, IR_VERSION = 18, 10

# At most so many of the likeliest tokens are kept where top-k limits them.
CANDIDATES = 64


@dataclass(frozen=True)
class SamplerKind:
    """A way to choose: the likeliest token, one of the top k (and of their nucleus), any with its probability; or one
    of the nucleus of any top k, which can do all of it and takes longest."""

    choice: str
    penalises: bool

    @property
    def name(self) -> str:
        """The graph's name in a bundle."""
        return f"{SAMPLER}.{self.choice}{'.penalty' if self.penalises else ''}"


KINDS = tuple(SamplerKind(c, penalises) for c in ("greedy", "top_k", "any", "nucleus") for penalises in (False, True))


def write_samplers(folder: Path, config: CosmosAdvancedConfig) -> dict[str, GraphSpec]:
    """Writes every sampler for a model's vocabulary into a bundle's folder; their specs by name."""
    specs = {kind.name: sampler_spec(kind, config.vocab_size) for kind in KINDS}
    for kind in KINDS:
        ir.save(sampler(kind, config.vocab_size), folder / specs[kind.name].file)
    return specs


def sampler_spec(kind: SamplerKind, vocab_size: int) -> GraphSpec:
    """Signature of a sampler. A tensor is called what its role is, except the logits, which are the decoder's."""
    candidates = min(CANDIDATES, vocab_size)
    inputs = [
        TensorSpec(LOGITS, Role.LOGITS, "float32", (BATCH, vocab_size)),
        _tensor(Role.TOKENS, "int64", BATCH, 1),
        _tensor(Role.LAST_INDEX, "int32", BATCH),
        _tensor(Role.HISTORY, "int64", BATCH, CACHE_LENGTH),
        _tensor(Role.LIMIT, "int32", BATCH),
        _tensor(Role.GOES_ON, "bool", vocab_size),
        _tensor(Role.EARLIEST, "int32", BATCH),
    ]
    outputs = [
        _tensor(Role.NEXT_TOKENS, "int64", BATCH, 1),
        _tensor(Role.NEXT_LAST_INDEX, "int32", BATCH),
        _tensor(Role.NEXT_HISTORY, "int64", BATCH, CACHE_LENGTH),
        _tensor(Role.CHOSEN_LOGIT, "float32", BATCH, 1),
    ]
    if kind.penalises:
        inputs += [_tensor(Role.PENALTY, "float32", BATCH, 1), _tensor(Role.SEEN, "float32", BATCH, vocab_size)]
        outputs += [_tensor(Role.NEXT_SEEN, "float32", BATCH, vocab_size)]
    if kind.choice != "greedy":
        inputs += [
            _tensor(Role.SHARPNESS, "float64", BATCH, 1),
            _tensor(Role.UNIFORMS, "float64", BATCH, CACHE_LENGTH),
        ]
    if kind.choice == "top_k":
        inputs += [_tensor(Role.RANK_BIAS, "float64", BATCH, candidates), _tensor(Role.TOP_P, "float64", BATCH, 1)]
    if kind.choice == "nucleus":
        inputs += [_tensor(Role.TOP_K, "int64", BATCH, 1), _tensor(Role.TOP_P, "float64", BATCH, 1)]
    return GraphSpec(file=f"{kind.name}.onnx", opset=OPSET, inputs=tuple(inputs), outputs=tuple(outputs))


def sampler(kind: SamplerKind, vocab_size: int) -> ir.Model:
    """The graph of a sampler: from logits and what is kept from step to step to the same after one more token.

    A row whose token does not go on (a stop id) repeats it for ever; a row that has reached its limit stays there.
    """
    spec = sampler_spec(kind, vocab_size)
    graph = _Sampler(spec, vocab_size)
    graph.choose(kind)
    model_graph = ir.Graph(
        list(graph.inputs.values()),
        graph.outputs,
        nodes=graph.op.tape.nodes,
        initializers=graph.constants,
        opset_imports={"": OPSET},
        name=kind.name,
    )
    return ir.Model(model_graph, ir_version=IR_VERSION)


class _Operators:
    """`op.Add(a, b)` is a new node's output; keywords are attributes."""

    def __init__(self) -> None:
        self.tape = ir.tape.Tape()

    def __getattr__(self, op_type: str) -> Callable[..., ir.Value]:
        return lambda *inputs, **attributes: self.tape.op(op_type, inputs, attributes)


class _Sampler:
    """One sampler's graph in the making: `inputs` by role, `op` makes nodes, `constants` are its initializers."""

    def __init__(self, spec: GraphSpec, vocab_size: int) -> None:
        self.spec, self.vocab_size = spec, vocab_size
        self.inputs = {tensor.role: _value(tensor) for tensor in spec.inputs}
        self.outputs: list[ir.Value] = []
        self.constants: list[ir.Value] = []
        self.op = _Operators()

    def choose(self, kind: SamplerKind) -> None:
        """Everything: penalise, choose, and keep what the next step needs."""
        op, given = self.op, self.inputs
        last = op.Min(op.Add(given[Role.LAST_INDEX], self._constant([1], "int32")), given[Role.LIMIT])  # (B,)
        place = op.Unsqueeze(last, self._constant([1]))  # (B, 1): where the new token goes
        scores = self._held(self._penalised() if kind.penalises else given[Role.LOGITS], place)
        ways = {
            "greedy": self._likeliest,
            "top_k": self._one_of_the_top,
            "any": self._any,
            "nucleus": self._one_of_a_nucleus,
        }
        chosen = ways[kind.choice](scores, place)  # (B, 1)
        goes_on = op.Gather(given[Role.GOES_ON], given[Role.TOKENS])
        tokens = op.Where(goes_on, chosen, given[Role.TOKENS])
        self._output(Role.NEXT_TOKENS, tokens)
        self._output(Role.NEXT_LAST_INDEX, last)
        self._output(Role.NEXT_HISTORY, op.ScatterElements(given[Role.HISTORY], place, tokens, axis=1))
        # By this the host sees that a model computes NaN: then all logits of the row are.
        self._output(Role.CHOSEN_LOGIT, op.GatherElements(given[Role.LOGITS], chosen, axis=1))
        if kind.penalises:
            seen = op.ScatterElements(given[Role.SEEN], tokens, given[Role.PENALTY], axis=1)
            self._output(Role.NEXT_SEEN, seen)

    def _penalised(self) -> ir.Value:
        """Positive logits over, negative ones times the penalty of their token, which is 1 for one not yet seen."""
        op, logits, seen = self.op, self.inputs[Role.LOGITS], self.inputs[Role.SEEN]
        positive = op.Greater(logits, self._constant(0.0, "float32"))
        return op.Where(positive, op.Div(logits, seen), op.Mul(logits, seen))

    def _held(self, scores: ir.Value, place: ir.Value) -> ir.Value:
        """Next to nothing of a token that would end its row before it may end: ONNX Runtime's TopK on CUDA puts what it
        fills up with before -inf."""
        op = self.op
        early = op.Less(place, op.Unsqueeze(self.inputs[Role.EARLIEST], self._constant([1])))  # (B, 1)
        ends = op.Not(self.inputs[Role.GOES_ON])  # (V,)
        return op.Where(op.And(early, ends), self._constant(np.finfo(np.float32).min / 2, "float32"), scores)

    def _likeliest(self, scores: ir.Value, place: ir.Value) -> ir.Value:
        return self.op.ArgMax(scores, axis=1, keepdims=1)

    def _one_of_the_top(self, scores: ir.Value, place: ir.Value) -> ir.Value:
        """One of the k likeliest, k being how many ranks have no bias of -inf, and of their nucleus."""
        op, given = self.op, self.inputs
        values, ids = self._top(scores, self._candidates)  # (B, C) each
        sharpened = op.Mul(op.Cast(values, to=ir.DataType.DOUBLE), given[Role.SHARPNESS])
        probabilities = op.Softmax(op.Add(sharpened, given[Role.RANK_BIAS]), axis=1)
        before = op.CumSum(probabilities, self._constant(1), exclusive=1)
        kept = op.Where(op.Less(before, given[Role.TOP_P]), probabilities, self._constant(0.0, "float64"))
        # The running sum that is drawn from goes by id, as on the host.
        by_id, order = self._outputs("TopK", [ids, self._constant([self._candidates])], axis=1, largest=0)
        index = self._drawn(op.GatherElements(kept, order, axis=1), self._uniform(place))
        return op.GatherElements(by_id, index, axis=1)

    def _any(self, scores: ir.Value, place: ir.Value) -> ir.Value:
        return self._one_by_weight(self._weights(scores), place)

    def _one_of_a_nucleus(self, scores: ir.Value, place: ir.Value) -> ir.Value:
        """One of the k likeliest, and of the likeliest among them before which less than top_p of their weight is."""
        op, given = self.op, self.inputs
        nothing = self._constant(0.0, "float64")
        _, ids = self._top(scores, self.vocab_size)
        ranked = op.GatherElements(self._weights(scores), ids, axis=1)
        ranks = self._constant([list(range(self.vocab_size))])
        kept = op.Where(op.Less(ranks, given[Role.TOP_K]), ranked, nothing)
        table = self._in_groups(kept)
        groups, size = _groups(self.vocab_size)
        within = op.CumSum(table, self._constant(2), exclusive=1)
        of_groups = op.ReduceSum(table, self._constant([2]), keepdims=1)  # (B, G, 1)
        before = op.Add(within, op.CumSum(of_groups, self._constant(1), exclusive=1))
        wanted = op.Mul(op.ReduceSum(kept, self._constant([1]), keepdims=1), given[Role.TOP_P])  # (B, 1)
        nucleus = op.Less(op.Reshape(before, self._constant([-1, groups * size])), wanted)
        nucleus = op.Slice(nucleus, self._constant([0]), self._constant([self.vocab_size]), self._constant([1]))
        kept = op.Where(nucleus, kept, nothing)
        by_id = op.ScatterElements(kept, ids, kept, axis=1)  # every id is there, so that all is written anew
        return self._one_by_weight(by_id, place)

    def _weights(self, scores: ir.Value) -> ir.Value:
        """(B, V): 1 for the likeliest token, for others their probability over its."""
        op = self.op
        exact = op.Cast(scores, to=ir.DataType.DOUBLE)
        shifted = op.Sub(exact, op.ReduceMax(exact, self._constant([1]), keepdims=1))
        return op.Exp(op.Mul(shifted, self.inputs[Role.SHARPNESS]))

    def _in_groups(self, weights: ir.Value) -> ir.Value:
        """(B, G, size), with zeros behind the vocabulary."""
        groups, size = _groups(self.vocab_size)
        if groups * size > self.vocab_size:
            padding = self._constant([0, 0, 0, groups * size - self.vocab_size])
            weights = self.op.Pad(weights, padding, self._constant(0.0, "float64"))
        return self.op.Reshape(weights, self._constant([-1, groups, size]))

    def _one_by_weight(self, weights: ir.Value, place: ir.Value) -> ir.Value:
        """A token by its weight (B, V): first a group of neighbouring ones by its share, then one of the group."""
        op = self.op
        groups, size = _groups(self.vocab_size)
        table = self._in_groups(weights)
        weights = op.Reshape(table, self._constant([-1, groups * size]))
        reached = op.CumSum(op.ReduceSum(table, self._constant([2]), keepdims=0), self._constant(1))  # (B, G)
        target = op.Mul(self._uniform(place), self._last(reached, groups))  # (B, 1)
        group = self._count_up_to(reached, target, groups)
        before = op.Concat(self._zeros_like(target), reached, axis=1)
        members = op.Add(op.Mul(group, self._constant([[size]])), self._constant([list(range(size))]))  # (B, size)
        within = op.CumSum(op.GatherElements(weights, members, axis=1), self._constant(1))
        member = self._count_up_to(op.Add(within, op.GatherElements(before, group, axis=1)), target, size)
        chosen = op.GatherElements(members, member, axis=1)
        return op.Min(chosen, self._constant([[self.vocab_size - 1]]))  # where no weight is a number

    def _top(self, scores: ir.Value, count: int) -> tuple[ir.Value, ir.Value]:
        """Values and ids (B, count), the likeliest first, the lowest id among equals."""
        values, ids = self._outputs("TopK", [scores, self._constant([count])], axis=1)
        return values, ids

    def _uniform(self, place: ir.Value) -> ir.Value:
        """The uniform number (B, 1) of the position that is filled."""
        return self.op.GatherElements(self.inputs[Role.UNIFORMS], place, axis=1)

    def _drawn(self, weights: ir.Value, uniform: ir.Value) -> ir.Value:
        """Which of the weights (B, C) holds the share `uniform` (B, 1) of their running sum."""
        reached = self.op.CumSum(weights, self._constant(1))
        target = self.op.Mul(uniform, self._last(reached, self._candidates))
        return self._count_up_to(reached, target, self._candidates)

    def _count_up_to(self, reached: ir.Value, target: ir.Value, most: int) -> ir.Value:
        """How many of (B, n) are at most (B, 1), and no more than `most` less one: an index (B, 1)."""
        op = self.op
        below = op.Cast(op.LessOrEqual(reached, target), to=ir.DataType.INT32)
        count = op.ReduceSum(below, self._constant([1]), keepdims=1)
        return op.Cast(op.Min(count, self._constant([[most - 1]], "int32")), to=ir.DataType.INT64)

    def _last(self, values: ir.Value, width: int) -> ir.Value:
        """The last column (B, 1)."""
        return self.op.Gather(values, self._constant([width - 1]), axis=1)

    def _zeros_like(self, value: ir.Value) -> ir.Value:
        return self.op.Mul(value, self._constant(0.0, "float64"))

    @property
    def _candidates(self) -> int:
        return min(CANDIDATES, self.vocab_size)

    def _outputs(self, op_type: str, inputs: list[ir.Value], **attributes: int) -> list[ir.Value]:
        return list(self.op.tape.op_multi_out(op_type, inputs, attributes, num_outputs=2))

    def _constant(self, value: ArrayLike, dtype: str = "int64") -> ir.Value:
        name = f"constant.{len(self.constants)}"
        array = np.array(value, dtype)
        tensor = ir.tensor(array, name=name)
        constant = ir.Value(
            name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
        )
        self.constants.append(constant)
        return constant

    def _output(self, role: Role, value: ir.Value) -> None:
        spec = self.spec.output(role)
        value.name, value.shape, value.type = spec.name, ir.Shape(spec.shape), ir.TensorType(_DATA_TYPES[spec.dtype])
        self.outputs.append(value)


_DATA_TYPES = {
    "bool": ir.DataType.BOOL,
    "int32": ir.DataType.INT32,
    "int64": ir.DataType.INT64,
    "float32": ir.DataType.FLOAT,
    "float64": ir.DataType.DOUBLE,
}


def _tensor(role: Role, dtype: str, *shape: int | str) -> TensorSpec:
    return TensorSpec(str(role), role, dtype, shape)


def _value(tensor: TensorSpec) -> ir.Value:
    type_ = ir.TensorType(_DATA_TYPES[tensor.dtype])
    return ir.Value(name=tensor.name, shape=ir.Shape(tensor.shape), type=type_)


def _groups(vocab_size: int) -> tuple[int, int]:
    """About as many groups as tokens in each: the running sums of both are short."""
    size = max(1, round(vocab_size**0.5))
    return -(-vocab_size // size), size
