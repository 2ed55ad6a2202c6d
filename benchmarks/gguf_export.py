"""A Cosmos checkpoint as a GGUF file of architecture `llama`, for llama.cpp.

llama.cpp turns neighbouring channels (2i, 2i + 1) of a head where Cosmos turns (i, i + E/2): rows of the query and key
projections change places so that both turn the same ones. There is no vocabulary: token ids go in and come out.

    python -m benchmarks.gguf_export CHECKPOINT OUT_FOLDER --type f32 --type q4_0 --type q8_0

A float32 file that is in OUT_FOLDER already is taken as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click
import numpy as np
import numpy.typing as npt

from benchmarks.llama_names import tensor_names

if TYPE_CHECKING:
    from cosmos_export.checkpoint import Checkpoint
    from cosmos_export.config import CosmosAdvancedConfig

Array = npt.NDArray[np.float32]

# Enumerators of llama_ftype. "q4_0" is what llama-quantize makes of it: the tied embedding, being the output
# projection, becomes q6_K (q8_0 where its rows are no multiple of 256). "q4_0-pure" has it in 4 bits, too.
FILE_TYPES = {"q4_0": 2, "q4_0-pure": 2, "q8_0": 7}
TYPES = ("f32", *FILE_TYPES)


def interleave(rows: Array, heads: int) -> Array:
    """Rows (H*E, D) of a projection: a head's row i + s * E/2 becomes its row 2i + s. A copy."""
    halves = rows.reshape(heads, 2, -1, rows.shape[-1])  # (H, 2, E/2, D)
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows.shape)


def deinterleave(rows: Array, heads: int) -> Array:
    """The inverse of `interleave`."""
    pairs = rows.reshape(heads, -1, 2, rows.shape[-1])  # (H, E/2, 2, D)
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows.shape)


def gguf_tensors(checkpoint: Checkpoint) -> Iterator[tuple[str, Array]]:
    """Every tensor under its GGUF name, float32, query and key rows in llama.cpp's order."""
    config = checkpoint.config
    heads = {"attention.q_proj.weight": config.n_heads, "attention.k_proj.weight": config.n_kv_heads}
    for name, gguf_name, _ in tensor_names(config.n_layers):
        tensor = checkpoint.tensor(name).float().numpy()
        turned = next((count for suffix, count in heads.items() if name.endswith(suffix)), None)
        yield gguf_name, tensor if turned is None else interleave(tensor, turned)


def write_gguf(checkpoint: Checkpoint, path: Path) -> None:
    """Writes the checkpoint in float32."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    _add_settings(writer, checkpoint.config)
    for name, tensor in gguf_tensors(checkpoint):
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_settings(writer: object, config: CosmosAdvancedConfig) -> None:
    settings = {
        "add_name": "cosmos",
        "add_file_type": 0,
        "add_block_count": config.n_layers,
        "add_context_length": config.max_sequence_length,
        "add_embedding_length": config.dim,
        "add_feed_forward_length": config.hidden_dim,
        "add_head_count": config.n_heads,
        "add_head_count_kv": config.n_kv_heads,
        "add_key_length": config.head_dim,
        "add_value_length": config.head_dim,
        "add_rope_dimension_count": config.head_dim,
        "add_rope_freq_base": config.rope_theta,
        "add_layer_norm_rms_eps": config.norm_eps,
        "add_vocab_size": config.vocab_size,
        "add_tokenizer_model": "no_vocab",
    }
    for method, value in settings.items():
        getattr(writer, method)(value)


def quantize(source: Path, target: Path, file_type: str, threads: int = 2) -> None:
    """Quantises a float32 GGUF by llama.cpp's own code. Raises RuntimeError where it refuses."""
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread, params.pure = FILE_TYPES[file_type], threads, file_type.endswith("-pure")
    status = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), params)
    if status != 0:
        raise RuntimeError(f"llama_model_quantize returned {status} for {file_type}")


@click.command(help=(__doc__ or "").partition("\n")[0])
@click.argument("checkpoint", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.argument("out", type=click.Path(path_type=Path, file_okay=False))
@click.option("--type", "types", type=click.Choice(TYPES), multiple=True, default=("f32",), show_default=True)
def main(checkpoint: Path, out: Path, types: tuple[str, ...]) -> None:
    from cosmos_export.checkpoint import Checkpoint

    out.mkdir(parents=True, exist_ok=True)
    full = out / "f32.gguf"
    if not full.is_file():
        _whole(full, lambda path: write_gguf(Checkpoint.open(checkpoint), path))
    for file_type in (t for t in types if t != "f32"):
        _whole(out / f"{file_type}.gguf", lambda path, t=file_type: quantize(full, path, t))


def _whole(path: Path, write: Callable[[Path], None]) -> None:
    """A file that is interrupted while it is written never gets its name."""
    unfinished = path.with_suffix(".partial")
    write(unfinished)
    unfinished.replace(path)


if __name__ == "__main__":
    main()
