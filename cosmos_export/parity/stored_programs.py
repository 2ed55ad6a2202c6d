"""The same for programs that PyTorch runs: is each tensor that a file holds the checkpoint's, bit for bit?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import Tensor

from cosmos_export.checkpoint import EMBEDDING, Checkpoint
from cosmos_export.onnx.weights import WeightReader, as_array
from cosmos_export.parity.stored import StoredTensors, difference, judged, wanted_tensors
from cosmos_export.recipe import ExportRecipe
from cosmos_export.torch_programs import pt2, torchscript
from cosmos_export.torch_programs.products import OUTPUT_PROJECTION
from cosmos_runtime import TORCHSCRIPT


def compare_program(
    file: Path, checkpoint: Checkpoint, recipe: ExportRecipe, capabilities: Sequence[str] | None = None
) -> StoredTensors:
    """As `compare_stored`, of a TorchScript file or an exported program."""
    if recipe.format == TORCHSCRIPT:
        tensors = torchscript.stored_tensors(torchscript.load_torchscript(file))
    else:
        tensors = pt2.stored_tensors(pt2.load_program(file))
    wanted = wanted_tensors(checkpoint, capabilities)
    return judged(_compared(tensors, WeightReader(checkpoint, recipe), wanted), wanted)


def _compared(
    tensors: Iterator[tuple[str, Tensor]], reader: WeightReader, wanted: set[str]
) -> Iterator[tuple[str, str | None]]:
    for name, tensor in tensors:
        source = EMBEDDING if name == OUTPUT_PROJECTION else name
        if source not in wanted:
            yield name, f"{name} is in the program, and no pass of this model reads such a tensor"
        elif tensor.is_quantized:
            yield source, difference(name, as_array(tensor.dequantize()), as_array(reader.effective(source)))
        else:
            yield source, difference(name, as_array(tensor.detach()), as_array(reader.read(source)))
