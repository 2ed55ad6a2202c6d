"""The eager model becomes an exported program (torch.export), with its dynamic axes named."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.fx.experimental._config as _sizes
from torch import Tensor

from cosmos_export.config import CosmosAdvancedConfig
from cosmos_export.errors import ExportError
from cosmos_export.onnx.axes import dynamic_axes, dynamic_shape
from cosmos_export.quiet import quiet
from cosmos_export.torch_programs.calling import Argument, TorchProgram, arguments
from cosmos_runtime import GraphSpec, Role

TALKER = "torch.export"  # the logger of what is said while programs are made, saved and loaded
_MODEL = "program.model."  # what wrapping puts before the checkpoint's names


def export_program(
    program: TorchProgram, examples: list[Argument], spec: GraphSpec, config: CosmosAdvancedConfig
) -> torch.export.ExportedProgram:
    """A program for all sizes of the axes that `spec` names. Raises ExportError where it depends on one of them."""
    axes = dynamic_axes(spec, config)
    shapes = arguments({tensor.name: dynamic_shape(tensor, axes) for tensor in spec.inputs}, spec)
    try:
        # With a cache: one as long as what is read of it would count as another program than a longer one. Without: a
        # sequence of one token would.
        with quiet(TALKER), torch.no_grad(), _sizes.patch(backed_size_oblivious=spec.takes(Role.PAST_KEY)):  # type: ignore[attr-defined]
            return torch.export.export(program.eval(), tuple(examples), dynamic_shapes=(tuple(shapes),), strict=False)
    except Exception as error:  # torch raises many types here, none of them public
        raise ExportError(f"torch.export could not trace with dynamic {', '.join(axes)}: {error}") from error


def write_program(program: torch.export.ExportedProgram, path: Path) -> None:
    """Writes an exported program, to be loaded with `torch.export.load`."""
    with quiet(TALKER):
        torch.export.save(program, path)


def load_program(path: Path) -> torch.export.ExportedProgram:
    """A file of `write_program`."""
    with quiet(TALKER):
        return torch.export.load(path)


def runnable(program: torch.export.ExportedProgram) -> torch.fx.GraphModule:
    """The program as a module for this process: its products by oneDNN, over matrices in its own order.

    In float32 and bfloat16, on a CPU; `products.PackedLinear` says why.
    """
    module: torch.fx.GraphModule = program.module()
    for node in list(module.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)):
        x, matrix, *bias = node.args
        weight = _attribute(module, matrix)
        if weight.device.type != "cpu" or weight.dtype not in (torch.float32, torch.bfloat16):
            continue
        name = f"{matrix.target}".replace(".", "_") + "_packed"
        if not hasattr(module, name):
            module.register_buffer(
                name, torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None), persistent=False
            )
        with module.graph.inserting_before(node):
            arguments = (x, module.graph.get_attr(name), *(bias or [None]), "none", [], "")
            product = module.graph.call_function(torch.ops.mkldnn._linear_pointwise.default, arguments)
        node.replace_all_uses_with(product)
        module.graph.erase_node(node)
    module.recompile()
    return module


def _attribute(module: torch.nn.Module, node: torch.fx.Node) -> Tensor:
    owner, _, name = str(node.target).rpartition(".")
    tensor: Tensor = getattr(module.get_submodule(owner), name)
    return tensor


def stored_tensors(program: torch.export.ExportedProgram) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a loaded program by the checkpoint's names."""
    named: dict[str, Any] = {**program.state_dict, **program.constants}
    for name, tensor in named.items():
        if isinstance(tensor, Tensor) and name.startswith(_MODEL):
            yield name.removeprefix(_MODEL), tensor
