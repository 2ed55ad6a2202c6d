"""What is edited: tiny bundles and checkpoints, whole and valid, in a folder of their own."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from hypothesis import strategies as st

from ..runtime.tiny_bundles import byte_tokenizer, write_bundle  # noqa: TID252
from ..runtime.tiny_decoders import write_decoder_bundle  # noqa: TID252
from .driver import MANIFEST, Attack
from .edits import edits_of

TINY = {"dim": 16, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "head_dim": 8, "hidden_dim": 24, "vocab_size": 257}
TINY |= {"max_sequence_length": 32}


@dataclass(frozen=True)
class Subject:
    """A folder to make, the kind of victim that meets it, and how much of the time it gets."""

    kind: str
    make: Callable[[Path], object]
    share: int = 1


def _checkpoint(folder: Path, *, pickled: bool = False, sharded: bool = False) -> None:
    import torch

    from cosmos_export.checkpoint import save_checkpoint
    from cosmos_export.config import CosmosAdvancedConfig
    from cosmos_export.model.loading import random_checkpoint

    checkpoint = random_checkpoint(CosmosAdvancedConfig(**TINY), name="tiny")
    tensors = {name: checkpoint.tensor(name) for name in checkpoint.names}
    folder.mkdir()
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    if not pickled and not sharded:
        save_checkpoint(folder, checkpoint.config, tensors)
        return
    checkpoint.config.save(folder / "config.json")
    if pickled:
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        _save_in_shards(folder, tensors)


def _save_in_shards(folder: Path, tensors: dict) -> None:
    import json

    from safetensors.torch import save_file

    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for shard, part in parts.items():
        save_file({name: tensors[name].contiguous() for name in part}, folder / shard)
    weight_map = {name: shard for shard, part in parts.items() for name in part}
    index = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(index, encoding="utf-8")


def _exported(folder: Path, *, heads: bool = False) -> None:
    """A bundle as an export writes it, with all capability heads or none."""
    from cosmos_export.config import CosmosAdvancedConfig
    from cosmos_export.model.loading import random_checkpoint
    from cosmos_export.parity.verify import Effort
    from cosmos_export.pipeline import export_bundle
    from cosmos_export.recipe import ExportRecipe
    from cosmos_runtime import CAPABILITIES

    config = CosmosAdvancedConfig(**{**TINY, "dim": 64, "head_dim": 16}, memory={"working_memory_size": 8})
    capabilities = CAPABILITIES if heads else None
    tokenizer = folder.with_name("tokenizer.json")
    byte_tokenizer().save(str(tokenizer))
    checkpoint = replace(random_checkpoint(config, name="tiny", capabilities=capabilities), tokenizer=tokenizer)
    recipe = ExportRecipe.load("cpu-int4-quick")
    export_bundle(checkpoint, folder, recipe, capabilities=capabilities, effort=Effort.OFF)


SUBJECTS = {
    "decoder": Subject("bundle", lambda folder: write_decoder_bundle(folder, graphs=("decoder", "full_sequence"))),
    "external": Subject("bundle", write_bundle),
    "exported": Subject("bundle", _exported, share=2),
    "heads": Subject("bundle", lambda folder: _exported(folder, heads=True), share=2),
    "export": Subject("export", _checkpoint, share=2),
    "safetensors": Subject("checkpoint", _checkpoint),
    "shards": Subject("checkpoint", lambda folder: _checkpoint(folder, sharded=True)),
    "pickle": Subject("checkpoint", lambda folder: _checkpoint(folder, pickled=True)),
}


def attacks(folder: Path, kind: str) -> st.SearchStrategy[Attack]:
    """Attacks on any file of a subject's folder. A bundle's manifest is edited as often as all others together."""
    names = sorted(path.name for path in folder.iterdir())
    sealed = st.booleans() if kind == "bundle" else st.just(False)

    def on(name: str) -> st.SearchStrategy[Attack]:
        return st.builds(Attack, st.just(name), edits_of(name), st.just(False) if name == MANIFEST else sealed)

    others = st.sampled_from([name for name in names if name != MANIFEST]).flatmap(on)
    return st.one_of(others, on(MANIFEST)) if MANIFEST in names else others
