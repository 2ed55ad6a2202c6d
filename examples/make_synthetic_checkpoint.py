"""Makes a checkpoint of any geometry with random weights: sharded safetensors, as trained checkpoints of that size are.

    python examples/make_synthetic_checkpoint.py build/7b                                 # 7 B in bfloat16, 13 GB
    python examples/make_synthetic_checkpoint.py build/small --like advanced --dtype float32
    python examples/make_synthetic_checkpoint.py build/odd --dim 512 --layers 3 --heads 8 --kv-heads 2
    python examples/make_synthetic_checkpoint.py build/heads --capabilities reasoning,memory,safety,evaluation

For tests and benchmarks: exports, quantises and verifies like a trained one, and its text is noise. The weights are
drawn and written one tensor at a time, so the checkpoint may be larger than memory. The same options and seed give the
same bytes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from hashlib import blake2b
from pathlib import Path

import click
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from cosmos_export.checkpoint import CONFIG, Checkpoint
from cosmos_export.config import CosmosAdvancedConfig
from cosmos_export.errors import ConfigError
from cosmos_export.model.capabilities import capability_set, is_of_heads
from cosmos_export.model.cosmos import CosmosAdvancedModel
from cosmos_export.model.loading import random_checkpoint
from cosmos_export.resources import preset_names, preset_path
from cosmos_export.weight_files import SAFETENSORS_INDEX, StoredTensor

SEVEN_B = CosmosAdvancedConfig(
    dim=4096,
    n_layers=32,
    head_dim=128,
    hidden_dim=11008,
    n_heads=32,
    n_kv_heads=32,
    vocab_size=32000,
    max_sequence_length=4096,
)
DTYPES = ("bfloat16", "float16", "float32")
# What no decoder reads: the published checkpoints have tensors of this prefix, more than half of their bytes.
UNUSED = "learning_engine.synthetic.{index}.weight"
UNUSED_ROWS = 1024


@click.command(help=__doc__.split("\n\n")[0])
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--like", type=click.Choice(["7b", *preset_names()]), default="7b", show_default=True)
@click.option("--dim", type=int, help="Instead of that model's.")
@click.option("--layers", "n_layers", type=int)
@click.option("--heads", "n_heads", type=int)
@click.option("--kv-heads", "n_kv_heads", type=int)
@click.option("--head-dim", type=int)
@click.option("--hidden-dim", type=int)
@click.option("--vocab-size", type=int)
@click.option("--max-length", "max_sequence_length", type=int)
@click.option("--capabilities", default="", help="Also these heads, separated by commas; all weights that they have.")
@click.option("--dtype", type=click.Choice(DTYPES), default="bfloat16", show_default=True)
@click.option("--shard-mb", type=click.IntRange(min=1), default=1000, show_default=True, help="Size of a shard.")
@click.option("--unused-mb", type=click.IntRange(min=0), default=0, show_default=True, help="Tensors nothing reads.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
def main(
    out: Path,
    like: str,
    capabilities: str,
    dtype: str,
    shard_mb: int,
    unused_mb: int,
    seed: int,
    **geometry: int | None,
) -> None:
    base = SEVEN_B if like == "7b" else CosmosAdvancedConfig.from_file(preset_path(like))
    config = replace(base, **{name: value for name, value in geometry.items() if value is not None})
    if out.exists():
        raise click.UsageError(f"{out} exists already.")
    try:
        heads = capability_set(name.strip() for name in capabilities.split(",")) if capabilities else ()
    except ConfigError as error:
        raise click.UsageError(str(error)) from None
    needed = write_checkpoint(
        out,
        config,
        getattr(torch, dtype),
        shard_bytes=shard_mb * 10**6,
        unused_bytes=unused_mb * 10**6,
        seed=seed,
        capabilities=heads,
    )
    click.echo(f"{out}: {needed / 1e9:.2f} GB of weights in {dtype}")


def write_checkpoint(
    folder: Path,
    config: CosmosAdvancedConfig,
    dtype: torch.dtype = torch.bfloat16,
    *,
    shard_bytes: int = 10**9,
    unused_bytes: int = 0,
    seed: int = 0,
    capabilities: Sequence[str] = (),
) -> int:
    """Writes a checkpoint folder with shards of about `shard_bytes`, and returns how many bytes of weights it has; with
    `capabilities` the heads of these are among them.

    A shard is held while it is written; so no more than `shard_bytes` and a tensor.
    """
    checkpoint = random_checkpoint(config, name="synthetic", seed=seed)
    if capabilities:
        checkpoint = replace(checkpoint, stored={**checkpoint.stored, **_heads(config, seed, capabilities)})
    needed = _bytes_of(checkpoint, dtype) + unused_bytes
    folder.mkdir(parents=True)
    if shutil.disk_usage(folder).free < needed:
        raise click.ClickException(f"{folder} needs {needed / 1e9:.1f} GB, and the disk has less")
    config.save(folder / CONFIG)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(_shards(_tensors(checkpoint, dtype, unused_bytes), shard_bytes)):
        name = f"model-{number + 1:05d}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, name)
    index = {"metadata": {"total_size": needed}, "weight_map": weight_map}
    (folder / SAFETENSORS_INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    return needed


def _heads(config: CosmosAdvancedConfig, seed: int, capabilities: Sequence[str]) -> dict[str, StoredTensor]:
    """All weights of the heads by their names in a checkpoint, each drawn when it is read."""
    with torch.device("meta"):
        model = CosmosAdvancedModel(config, capabilities=capabilities)
    norms = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.LayerNorm)}
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if is_of_heads(name)}
    return {
        name: StoredTensor(shape, torch.float32, partial(_drawn, f"{seed}/{name}", shape, name in norms))
        for name, shape in shapes.items()
    }


def _drawn(seed: str, shape: tuple[int, ...], is_norm: bool) -> Tensor:
    """Vectors that stay as large as they are on their way through matrices, and biases that matter."""
    if is_norm:
        return torch.ones(shape)
    generator = torch.Generator().manual_seed(int.from_bytes(blake2b(seed.encode(), digest_size=7).digest(), "little"))
    return torch.randn(shape, generator=generator) * (shape[-1] ** -0.5 if len(shape) > 1 else 0.1)


def _bytes_of(checkpoint: Checkpoint, dtype: torch.dtype) -> int:
    return sum(torch.Size(stored.shape).numel() for stored in checkpoint.stored.values()) * dtype.itemsize


def _tensors(checkpoint: Checkpoint, dtype: torch.dtype, unused_bytes: int) -> Iterator[tuple[str, Tensor]]:
    for name in checkpoint.names:
        yield name, checkpoint.tensor(name).to(dtype)
    columns = checkpoint.config.dim
    rows_left = unused_bytes // (columns * dtype.itemsize)
    for index in range(-(-rows_left // UNUSED_ROWS)):
        rows = min(UNUSED_ROWS, rows_left - index * UNUSED_ROWS)
        yield UNUSED.format(index=index), torch.zeros(rows, columns, dtype=dtype)


def _shards(tensors: Iterator[tuple[str, Tensor]], shard_bytes: int) -> Iterator[dict[str, Tensor]]:
    """The tensors in order, each shard full but for what would have been too much."""
    shard: dict[str, Tensor] = {}
    held = 0
    for name, tensor in tensors:
        if shard and held + tensor.nbytes > shard_bytes:
            yield shard
            shard, held = {}, 0
        shard[name] = tensor
        held += tensor.nbytes
    yield shard


if __name__ == "__main__":
    main()
