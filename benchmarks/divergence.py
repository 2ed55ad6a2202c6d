"""How far rounding takes each engine's next-token distributions from the float32 model's: recipes beside GGUF types.

Speeds of quantised models can be compared only where this is known. Divergences are KL(model, engine) in nats a token,
on a text that nothing was calibrated on.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.gguf_export import quantize, write_gguf
from benchmarks.report import environment
from cosmos_export.checkpoint import Checkpoint
from cosmos_export.model.loading import load_decoder
from cosmos_export.parity.metrics import kl_divergences, log_softmax
from cosmos_export.parity.verify import Effort
from cosmos_export.pipeline import export_bundle
from cosmos_export.recipe import ExportRecipe
from cosmos_export.resources import demo_checkpoint
from cosmos_runtime import Tokenizer, load

RECIPES = ("cpu-int8", "cpu-int4", "cpu-int4-quick")
GGUF_TYPES = ("q8_0", "q4_0", "q4_0-pure")

Logits = Callable[[NDArray[np.int64]], NDArray[np.float32]]
"""Token ids (T,) to logits (T, V)."""


@dataclass(frozen=True)
class Divergence:
    """One engine's distance from the float32 model."""

    engine: str
    tokens: int
    mean: float
    quantile_999: float
    same_best_token: float


@click.command(help=(__doc__ or "").partition("\n")[0])
@click.option("--checkpoint", type=click.Path(path_type=Path, exists=True, file_okay=False), help="Default: the demo.")
@click.option("--text", type=click.Path(path_type=Path, exists=True, dir_okay=False), required=True, help="UTF-8.")
@click.option("--rows", type=click.IntRange(min=1), default=12, show_default=True, help="Of 512 tokens, from its end.")
@click.option("--bundle", "bundles", multiple=True, metavar="NAME=FOLDER", help="Measure this one, too.")
@click.option("--out", type=click.Path(path_type=Path), help="Write the results to this JSON file.")
def main(checkpoint: Path | None, text: Path, rows: int, bundles: tuple[str, ...], out: Path | None) -> None:
    opened = Checkpoint.open(checkpoint or demo_checkpoint())
    ids = text_rows(opened, text, rows)
    with tempfile.TemporaryDirectory() as scratch:
        exact = [log_softmax(logits) for logits in _model_logits(opened, ids)]
        results = []
        for name, logits in _engines(opened, Path(scratch), bundles, ids.shape[1]):
            results.append(measure(name, logits, ids, exact))
            click.echo(_line(results[-1]))
    if out is not None:
        what = {
            **environment(torch.get_num_threads(), {}),
            "text": text.name,
            "results": [asdict(result) for result in results],
        }
        out.write_text(json.dumps(what, indent=1) + "\n", encoding="utf-8")


def text_rows(checkpoint: Checkpoint, text: Path, rows: int) -> NDArray[np.int64]:
    """The last tokens of a text, (R, T), T = 512 or fewer. Raises ClickException where there is no row."""
    if checkpoint.tokenizer is None:
        raise click.ClickException("the checkpoint has no tokenizer.json, and a text needs one")
    length = min(512, checkpoint.config.max_sequence_length)
    ids = Tokenizer.from_file(checkpoint.tokenizer).encode(text.read_text(encoding="utf-8"))
    whole = min(rows, len(ids) // length)
    if not whole:
        raise click.ClickException(f"{text} has {len(ids)} tokens, expected at least {length}")
    return np.array(ids[-whole * length :], np.int64).reshape(whole, length)


def measure(name: str, logits: Logits, ids: NDArray[np.int64], exact: list[NDArray]) -> Divergence:
    """Compares an engine with the model's log-probabilities (T, V) of each row; the last position has no next token."""
    divergences, same = [], []
    for row, wanted in zip(ids, exact, strict=True):
        actual = log_softmax(logits(row))[:-1]
        divergences.append(kl_divergences(wanted[:-1], actual))
        same.append(actual.argmax(-1) == wanted[:-1].argmax(-1))
    every = np.concatenate(divergences)
    agreement = float(np.concatenate(same).mean())
    return Divergence(name, len(every), float(every.mean()), float(np.quantile(every, 0.999)), agreement)


def _engines(checkpoint: Checkpoint, scratch: Path, bundles: tuple[str, ...], length: int) -> list[tuple[str, Logits]]:
    folders = {recipe: scratch / recipe for recipe in RECIPES}
    for recipe, folder in folders.items():
        click.echo(f"exporting {recipe}")
        export_bundle(checkpoint, folder, ExportRecipe.load(recipe), effort=Effort.OFF)
    folders |= {name: Path(folder) for name, folder in (bundle.split("=", 1) for bundle in bundles)}
    return [*((name, _bundle(folder)) for name, folder in folders.items()), *_llama(checkpoint, scratch, length)]


def _model_logits(checkpoint: Checkpoint, ids: NDArray[np.int64]) -> list[NDArray]:
    model = load_decoder(checkpoint)
    with torch.inference_mode():
        return [model(torch.from_numpy(row[None]))[0].numpy() for row in ids]


def _bundle(folder: Path) -> Logits:
    session = load(folder)
    return lambda ids: session.logits(ids)[0]


def _llama(checkpoint: Checkpoint, scratch: Path, length: int) -> list[tuple[str, Logits]]:
    try:
        from llama_cpp import Llama

        from benchmarks.engines.llama_cpp import silence
    except ImportError:
        click.echo("skipped: llama.cpp (llama-cpp-python is not installed)")
        return []
    silence()
    full = scratch / "f32.gguf"
    write_gguf(checkpoint, full)

    def engine(file_type: str) -> Logits:
        path = scratch / f"{file_type}.gguf"
        quantize(full, path, file_type)
        model = Llama(str(path), n_ctx=length, verbose=False, logits_all=True)

        def logits(ids: NDArray[np.int64]) -> NDArray[np.float32]:
            model.reset()
            model.eval(ids.tolist())
            return np.array(model.scores[: len(ids)])

        return logits

    return [(f"llama.cpp {file_type}", engine(file_type)) for file_type in GGUF_TYPES]


def _line(result: Divergence) -> str:
    return (
        f"{result.engine:20} mean {result.mean:.5f} nats, 99.9 % {result.quantile_999:.3f}, "
        f"same best token {result.same_best_token:.1%} of {result.tokens:,}"
    )


if __name__ == "__main__":
    main()
