"""Checkpoint folders: read tensor by tensor from where they lie, written as safetensors (cosmos_reference, section 8).

A folder holds `config.json` and either `model.safetensors` (or shards with `model.safetensors.index.json`) or
`pytorch_model.bin`; `tokenizer.json` is optional. Opening one reads names and shapes; a tensor's bytes are mapped when
it is asked for, so weights that nobody asks for (`learning_engine.*`: 8 GB at dim 1024) are never read.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from safetensors.torch import save_file
from torch import Tensor

from cosmos_export.checkpoint_checks import check_rotary_tables
from cosmos_export.config import CosmosAdvancedConfig
from cosmos_export.errors import CheckpointError
from cosmos_export.model.head_layout import check_head_layout, tile_to_interleave
from cosmos_export.weight_files import FLOATING_POINT, SAFETENSORS, StoredTensor, stored_tensors

if TYPE_CHECKING:
    from cosmos_export.onnx.quantize import QuantizedMatrix

CONFIG, INFO, TOKENIZER = "config.json", "model_info.json", "tokenizer.json"

# The two names of the one tied tensor; only the first is kept.
EMBEDDING, TIED_OUTPUT = "tok_embeddings.weight", "output.weight"


@dataclass(frozen=True)
class Checkpoint:
    """A configuration and its weights by name, read on demand, query heads in the model's order.

    `origin` says where it came from, for manifests: `{"kind": "checkpoint" | "preset", "location": ...}`.
    """

    config: CosmosAdvancedConfig
    stored: Mapping[str, StoredTensor]
    origin: Mapping[str, Any]
    tokenizer: Path | None = None
    head_layout: str = field(default="interleave")
    calibrated: Mapping[str, QuantizedMatrix] = field(default_factory=dict)
    """Quantised forms that stand for tensors of these names, where a recipe quantises them."""

    @classmethod
    def open(cls, folder: str | Path, *, head_layout: str = "interleave") -> Self:
        """Opens a checkpoint folder.

        `head_layout="tile"` reads a checkpoint whose query heads are in the published `repeat` order.
        Raises CheckpointError when a file is missing, unreadable or unsafe, ConfigError when config.json is wrong.
        """
        check_head_layout(head_layout)
        folder = Path(folder)
        if not folder.is_dir():
            raise CheckpointError(f"no checkpoint folder at {folder}: expected a folder with {CONFIG} and weights")
        config = CosmosAdvancedConfig.from_file(folder / CONFIG).validate()
        tokenizer = folder / TOKENIZER
        stored = _with_one_embedding(stored_tensors(folder), folder)
        check_rotary_tables({name: tensor.shape for name, tensor in stored.items()}, config, str(folder))
        return cls(
            config=config,
            stored=stored,
            origin={"kind": "checkpoint", "location": str(folder.resolve()), "head_layout": head_layout},
            tokenizer=tokenizer if tokenizer.exists() or tokenizer.is_symlink() else None,
            head_layout=head_layout,
        )

    @classmethod
    def from_tensors(cls, config: CosmosAdvancedConfig, tensors: Mapping[str, Tensor], origin: dict[str, Any]) -> Self:
        """A checkpoint whose tensors are in memory: presets with random weights, models built in a program."""
        stored = {n: StoredTensor(tuple(t.shape), t.dtype, lambda t=t: t) for n, t in tensors.items()}  # type: ignore[misc]
        return cls(config.validate(), stored, origin)

    @property
    def names(self) -> list[str]:
        """Names of all tensors that are stored, in the checkpoint's order."""
        return list(self.stored)

    def tensor(self, name: str) -> Tensor:
        """Reads one tensor, in its stored dtype. Raises CheckpointError when there is none of that name."""
        if name not in self.stored:
            raise CheckpointError(f"{self.origin.get('location')}: no tensor {name!r} in this checkpoint")
        tensor = self.stored[name].read()
        return tile_to_interleave(name, tensor, self.config) if self.head_layout == "tile" else tensor

    def require(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raises CheckpointError that lists every tensor of `shapes` that is missing, misshapen or not of numbers."""
        problems = [problem for name, shape in shapes.items() if (problem := self._problem(name, shape))]
        if problems:
            raise CheckpointError(
                f"{self.origin.get('location')}: the weights do not fit {CONFIG}: {_listed(problems, '; ')}. "
                f"Check that {CONFIG} belongs to these weights"
            )

    def refuse_unknown(self, known: Collection[str], ignored_prefixes: tuple[str, ...]) -> None:
        """Raises CheckpointError that lists every stored tensor that is neither `known` nor to be ignored."""
        unknown = [name for name in self.stored if name not in known and not name.startswith(ignored_prefixes)]
        if unknown:
            raise CheckpointError(
                f"{self.origin.get('location')}: a model of this {CONFIG} has no use for: {_listed(unknown, ', ')}. "
                f"Check that {CONFIG} belongs to these weights, or remove those tensors"
            )

    def _problem(self, name: str, shape: tuple[int, ...]) -> str | None:
        stored = self.stored.get(name)
        if stored is None:
            return f"{name} is missing"
        if stored.shape != shape:
            return f"{name} has shape {stored.shape}, expected {shape}"
        if stored.dtype not in FLOATING_POINT:
            return f"{name} has dtype {stored.dtype}, expected a floating-point one of 16, 32 or 64 bits"
        return None


def save_checkpoint(
    folder: str | Path, config: CosmosAdvancedConfig, state: Mapping[str, Tensor], tokenizer: Path | None = None
) -> None:
    """Writes a checkpoint folder: config.json, model.safetensors, model_info.json and, if given, tokenizer.json.

    The tied output projection is stored once, as the embedding. The weights are written beside their place and then
    take it, so a model may be saved where it was loaded from, which its tensors are still mapped to.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config.save(folder / CONFIG)
    tensors = {n: t.detach().cpu().contiguous() for n, t in state.items() if n != TIED_OUTPUT}
    if EMBEDDING not in tensors and TIED_OUTPUT in state:
        tensors[EMBEDDING] = state[TIED_OUTPUT].detach().cpu().contiguous()
    _write_weights(folder / SAFETENSORS, tensors)
    parameters = sum(t.numel() for t in tensors.values())
    info = {"model_type": "CosmosAdvanced", "version": "3.0.0", "total_parameters": parameters}
    (folder / INFO).write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")
    if tokenizer is not None and tokenizer.resolve() != (folder / TOKENIZER).resolve():
        (folder / TOKENIZER).write_bytes(tokenizer.read_bytes())


def _write_weights(path: Path, tensors: dict[str, Tensor]) -> None:
    partial = path.with_name(f"{path.name}.partial")
    try:
        save_file(tensors, partial, metadata={"format": "pt"})
        partial.chmod(0o644)  # safetensors makes it private; the rest of the folder is not
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _listed(items: list[str], separator: str, limit: int = 8) -> str:
    more = [f"and {len(items) - limit} more"] if len(items) > limit else []
    return separator.join(items[:limit] + more)


def _with_one_embedding(stored: dict[str, StoredTensor], folder: Path) -> dict[str, StoredTensor]:
    """One entry for the tied embedding, whichever of its two names the file holds."""
    if TIED_OUTPUT not in stored:
        return stored
    if EMBEDDING in stored and not _equal(stored[EMBEDDING], stored[TIED_OUTPUT]):
        raise CheckpointError(
            f"{folder}: {TIED_OUTPUT} differs from {EMBEDDING}, but this model's output projection is its "
            f"embedding. An untied model cannot be represented"
        )
    return {EMBEDDING: stored[TIED_OUTPUT], **{n: t for n, t in stored.items() if n != TIED_OUTPUT}}


def _equal(a: StoredTensor, b: StoredTensor) -> bool:
    """Whether two tensors hold the same values; of the same bytes, none is read."""
    if a.place is not None and a.place == b.place:
        return True
    return (a.shape, a.dtype) == (b.shape, b.dtype) and torch.equal(a.read(), b.read())
