"""Names nodes after the module they come from, and drops what the trace noted beside them."""

from __future__ import annotations

import ast

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
        modified = False
        taken: dict[str, int] = {}
        for node in model.graph:
            name = _unique(f"{_module(node)}/{node.op_type}", taken) if node.metadata_props else node.name
            modified |= name != node.name or bool(node.metadata_props)
            node.name = name
            node.metadata_props.clear()
            for output in node.outputs:
                output.metadata_props.clear()
        for value in (*model.graph.inputs, *model.graph.initializers.values()):
            modified |= bool(value.metadata_props)
            value.metadata_props.clear()
        modified |= bool(model.graph.metadata_props or model.metadata_props)
        model.graph.metadata_props.clear()
        model.metadata_props.clear()
        return ir.passes.PassResult(model, modified)


def _module(node: ir.Node) -> str:
    """The innermost module's path, such as layers.0.attention; what belongs to no module is the model's."""
    scopes = ast.literal_eval(node.metadata_props.get(_SCOPES, "[]"))
    modules = [scope for scope in scopes[:-1] if scope and not scope.startswith("_")]
    return modules[-1] if modules else "model"


def _unique(name: str, taken: dict[str, int]) -> str:
    taken[name] = taken.get(name, -1) + 1
    return f"{name}_{taken[name]}" if taken[name] else name
