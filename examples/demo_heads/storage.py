"""The heads among a model's weights, and how they are stored: in float16, beside a backbone that stays as it was."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import torch
from torch import nn
from train_demo import check_target

from cosmos_export.checkpoint import Checkpoint, save_checkpoint
from cosmos_export.model import CosmosAdvancedModel

HEADS = ("reasoning_engine", "memory_system", "safety_system", "evaluation_system", "capability_fusion")
STORED = torch.float16


def heads_of(model: CosmosAdvancedModel) -> dict[str, nn.Module]:
    """The modules that are not the backbone, by name."""
    return {name: model.get_submodule(name) for name in HEADS}


@torch.no_grad()
def round_heads(model: CosmosAdvancedModel) -> None:
    """Rounds the heads' weights to what is stored, so that what is measured is what is loaded."""
    for head in heads_of(model).values():
        for parameter in head.parameters():
            parameter.copy_(parameter.to(STORED))
    model.freeze()


def save(out: Path, checkpoint: Checkpoint, model: CosmosAdvancedModel, readme: str, *, overwrite: bool) -> None:
    """Writes everything beside the target, then renames: the folder appears whole or not at all."""
    out = out.resolve()
    state = {
        name: tensor.to(STORED) if name.startswith(HEADS) else checkpoint.tensor(name)
        for name, tensor in model.state_dict().items()
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".train_demo_heads_") as scratch:
        folder = Path(scratch, "checkpoint")
        save_checkpoint(folder, checkpoint.config, state, checkpoint.tokenizer)
        (folder / "README.md").write_text(readme, encoding="utf-8")
        if out.exists():
            check_target(out, overwrite)
            shutil.rmtree(out)
        folder.rename(out)
