"""What lies beside a checkpoint's weights and has to fit its config.json: the tokenizer, and rotary tables.

Both are looked at before anything is built or traced, which takes minutes for a large model.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from cosmos_export.config import CosmosAdvancedConfig
from cosmos_export.errors import CheckpointError
from cosmos_runtime import Tokenizer, TokenizerError

# What a rotary table is called, in this model's published code and in others: the last part of the tensor's name.
_ROTARY_TABLES = {"cos", "sin", "cos_cached", "sin_cached", "cos_cache", "sin_cache", "freqs_cos", "freqs_sin"}
_ROTARY_TABLES |= {"cos_table", "sin_table", "freqs_cis"}


def check_tokenizer(path: Path | None, vocab_size: int) -> None:
    """Raises CheckpointError where a tokenizer.json cannot be read, or has ids that the model has no embedding for."""
    if path is None:
        return
    try:
        Tokenizer.from_file(path, vocab_size=vocab_size)
    except TokenizerError as error:
        raise CheckpointError(str(error)) from None


def check_rotary_tables(shapes: Mapping[str, tuple[int, ...]], config: CosmosAdvancedConfig, where: str) -> None:
    """Raises CheckpointError where a stored rotary table (S, ...) ends before the configuration's longest sequence.

    The model computes its tables anew, for as many positions as config.json says; one that is shorter in the
    checkpoint says that these weights never saw the positions behind it.
    """
    longest = config.max_sequence_length
    for name, shape in shapes.items():
        positions = max((size for size in shape[:-1] if size > 1), default=1)
        if name.rpartition(".")[2] in _ROTARY_TABLES and len(shape) > 1 and positions < longest:
            raise CheckpointError(
                f"{where}: {name} is a rotary table of {positions} positions, expected at least max_sequence_length "
                f"{longest}; set max_sequence_length in config.json to what the model was trained with"
            )
