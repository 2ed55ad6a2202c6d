"""The eager model becomes a TorchScript file: traced, made independent of the device it was traced on, saved.

    B  batch    T  new tokens    N  tokens in all

A trace records what PyTorch did, so a size that Python looked at would stay what it was. `torch.jit.trace` warns where
that happens, and here its warning is an error.
"""

from __future__ import annotations

import contextlib
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cosmos_export.errors import ExportError
from cosmos_export.torch_programs.calling import Argument, TorchProgram, argument_names
from cosmos_export.torch_programs.products import PackedLinear
from cosmos_runtime import GraphSpec

# PyTorch says it at every class that it scripts; what a user should make of it is said once (`EXPLAINED`).
_DEPRECATED = ".*(is|are) deprecated"
EXPLAINED = (
    "PyTorch calls TorchScript deprecated: it still loads and runs these files, and works on it no more. Its successor "
    "is torch.export: `cosmos-export pt2` makes such a program of the same model, under the same proof"
)

_PROGRAM = "program.model."  # what wrapping puts before the checkpoint's names
# What PyTorch calls a matrix of dynamic quantisation, and the class of the module around it.
_FBGEMM_MATRIX, _FBGEMM_MODULE = "_packed_params", "LinearPackedParams"


def write_torchscript(program: TorchProgram, examples: list[Argument], spec: GraphSpec, path: Path) -> None:
    """Traces a program with arguments of some sizes and writes it for all sizes.

    Without `PackedLinear` in it, it is frozen: what follows from the weights is computed once. Weights keep their
    names.
    Raises ExportError where tracing would have kept a size or a decision.
    """
    with explained_once(), torch.inference_mode(False), torch.no_grad():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        try:
            traced = torch.jit.trace(program.eval(), tuple(examples), check_trace=False)
        except (torch.jit.TracerWarning, SystemError) as error:
            # int() and bool() of a tensor turn the warning into a SystemError that it is the cause of.
            warning = error.__cause__ if isinstance(error, SystemError) else error
            if not isinstance(warning, torch.jit.TracerWarning):
                raise
            where = traceback.extract_tb(error.__traceback__)[-1]
            raise ExportError(
                f"torch.jit.trace would keep a size or a decision of this example: {warning} "
                f"({where.filename}, line {where.lineno})"
            ) from error
        _name_arguments(traced, argument_names(spec))
        for module in traced.modules():
            _follow_device(module)
        if not any(_is_packed(module) for module in traced.modules()):
            named = [name for name, _ in (*traced.named_parameters(), *traced.named_buffers())]
            traced = torch.jit.freeze(traced, preserved_attrs=named)
        torch.jit.save(traced, path)


@contextlib.contextmanager
def explained_once() -> Iterator[None]:
    """Holds back PyTorch's own warnings that TorchScript, and what it quantises with, are deprecated."""
    with warnings.catch_warnings():
        for category in (DeprecationWarning, UserWarning, FutureWarning):
            warnings.filterwarnings("ignore", message=_DEPRECATED, category=category)
        yield


def load_torchscript(path: Path) -> torch.jit.ScriptModule:
    """A file of `write_torchscript` on the CPU. A TorchScript file is a program: load none that you do not trust."""
    with explained_once():
        loaded: torch.jit.ScriptModule = torch.jit.load(path, map_location="cpu")
    return loaded


def stored_tensors(module: torch.jit.ScriptModule) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a loaded program by the checkpoint's names; packed ones as they lie in the file."""
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if name.startswith(_PROGRAM):
            yield name.removeprefix(_PROGRAM), tensor
    for name, child in module.named_modules():
        name = name.removeprefix(_PROGRAM)
        if _is_packed(child):
            yield f"{name}.weight", child.stored()
            if child.bias is not None:
                yield f"{name}.bias", child.bias
        elif child.original_name == _FBGEMM_MODULE:
            matrix, _ = torch.ops.quantized.linear_unpack(getattr(child, _FBGEMM_MATRIX))
            yield f"{name.removesuffix('.' + _FBGEMM_MATRIX)}.weight", matrix


def _is_packed(module: Any) -> bool:
    return getattr(module, "original_name", "") == PackedLinear.__name__


def _name_arguments(traced: Any, names: list[str]) -> None:
    _, *arguments = traced.graph.inputs()  # the first one is the module
    for value, name in zip(arguments, names, strict=True):
        value.setDebugName(name)


def _follow_device(module: Any) -> None:
    """Where the graph of a module names the device of the trace, it asks its first tensor for one instead."""
    if not isinstance(module, torch.jit.ScriptModule) or not module._c._has_method("forward"):
        return
    graph: Any = module.graph
    fixed = [n for n in graph.findAllNodes("prim::Constant") if n.output().type().kind() == "DeviceObjType"]
    if not fixed:
        return
    tensors = [value for value in list(graph.inputs())[1:] if value.type().kind() == "TensorType"]
    if not tensors:
        raise ExportError(f"{module.original_name} makes tensors on a device of its own: no input says which")
    node = graph.create("prim::device", [tensors[0]], 1)
    node.output().setType(torch._C.DeviceObjType.get())
    graph.prependNode(node)
    for constant in fixed:
        constant.output().replaceAllUsesWith(node.output())
