"""Names nodes after the module they come from, and drops what the trace noted beside them."""

from __future__ import annotations

import ast
import itertools

import onnx_ir as ir

_SCOPES = "pkg.torch.onnx.name_scopes"


class NameByModule(ir.passes.InPlacePass):
    """Nodes get the name of their module; the trace's metadata goes.

    Before:  node_linear_3 {stack_trace: "File /home/...", name_scopes: "['', 'layers.0', ...]"}
    After:   layers.0.attention.o_proj/MatMul

    The metadata is most of a small graph's bytes, and shows paths of the build machine to everyone who gets the bundle.
    The name of the module is what a reader of a profile or a failure needs of it.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        traced = [node for node in model.graph if node.metadata_props]
        taken = {node.name for node in model.graph if not node.metadata_props}
        for node in traced:
            node.name = _unique(f"{_module(node)}/{node.op_type}", taken)
            taken.add(node.name)
        cleared = [_clear(holder) for holder in _holders(model)]
        return ir.passes.PassResult(model, any(cleared))


def _module(node: ir.Node) -> str:
    """The innermost module's path, such as layers.0.attention; what belongs to no module is the model's."""
    scopes = ast.literal_eval(node.metadata_props.get(_SCOPES, "[]"))
    modules = [scope for scope in scopes[:-1] if scope and not scope.startswith("_")]
    return modules[-1].removeprefix("model.") if modules else "model"


def _unique(name: str, taken: set[str | None]) -> str:
    """`name`, or the first of name_1, name_2, ... that no node has."""
    candidates = (f"{name}_{i}" if i else name for i in itertools.count())
    return next(candidate for candidate in candidates if candidate not in taken)


def _holders(model: ir.Model) -> list[ir.Model | ir.Graph | ir.Node | ir.Value]:
    """Everything that a trace can have left notes on."""
    holders: list[ir.Model | ir.Graph | ir.Node | ir.Value] = [model, model.graph, *model.graph]
    holders += [*model.graph.inputs, *model.graph.initializers.values()]
    return holders + [output for node in model.graph for output in node.outputs]


def _clear(holder: ir.Model | ir.Graph | ir.Node | ir.Value) -> bool:
    """Removes the notes on `holder`; True if there were any."""
    had = bool(holder.metadata_props)
    holder.metadata_props.clear()
    return had
