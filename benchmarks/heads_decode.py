"""How fast a model with all capability heads decodes beside the plain decoder of the same backbone.

One process, both bundles, alternating rounds: a fresh decoder, a prompt, then token after token. With diagnostics, and
without, as `generate` runs by default.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import numpy as np
from numpy.typing import NDArray

from benchmarks.report import environment
from cosmos_export.model.loading import preset_checkpoint
from cosmos_export.parity.verify import Effort
from cosmos_export.pipeline import export_bundle
from cosmos_export.recipe import ExportRecipe
from cosmos_export.resources import preset_names
from cosmos_runtime import CAPABILITIES, Session, load, new_decoder

PLAIN, HEADS, DIAGNOSED = "plain decoder", "all capabilities", "all capabilities, with diagnostics"


@dataclass(frozen=True)
class Speed:
    """Medians over the rounds: of the time of a token, and of the plain decoder's over it in the same round."""

    variant: str
    ms_a_token: float
    ratio: float
    lowest: float
    highest: float
    ms_of_rounds: list[float]


@click.command(help=(__doc__ or "").partition("\n")[0])
@click.option("--preset", type=click.Choice(preset_names()), default="advanced", show_default=True)
@click.option("--recipe", default="cpu-int4", show_default=True)
@click.option("--plain", type=click.Path(path_type=Path, exists=True), help="A plain bundle that is there already.")
@click.option("--heads", type=click.Path(path_type=Path, exists=True), help="And one with all capabilities.")
@click.option("--prompt", type=click.IntRange(min=1), default=128, show_default=True, help="Tokens.")
@click.option("--tokens", type=click.IntRange(min=1), default=63, show_default=True, help="Timed, behind the prompt.")
@click.option("--rounds", type=click.IntRange(min=1), default=9, show_default=True)
@click.option("--threads", type=click.IntRange(min=1), default=2, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="Write the results to this JSON file.")
def main(
    preset: str,
    recipe: str,
    plain: Path | None,
    heads: Path | None,
    prompt: int,
    tokens: int,
    rounds: int,
    threads: int,
    out: Path | None,
) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        plain_session = load(plain or _exported(Path(scratch, "plain"), preset, recipe), threads=threads)
        heads_session = load(heads or _exported(Path(scratch, "heads"), preset, recipe, CAPABILITIES), threads=threads)
        speeds = list(_measure(plain_session, heads_session, prompt, tokens, rounds))
    for speed in speeds:
        spread = f"{speed.lowest:.3f} to {speed.highest:.3f}"
        click.echo(
            f"{speed.variant}: {speed.ms_a_token:.2f} ms a token, {speed.ratio:.3f} of the plain speed ({spread})"
        )
    if out is not None:
        sizes = {"prompt": prompt, "tokens": tokens, "rounds": rounds}
        what = {"model": preset, "recipe": recipe, **sizes, **environment(threads, {})}
        out.write_text(json.dumps({**what, "results": [asdict(speed) for speed in speeds]}, indent=1) + "\n", "utf-8")


def _exported(out: Path, preset: str, recipe: str, capabilities: tuple[str, ...] | None = None) -> Path:
    checkpoint = preset_checkpoint(preset, capabilities=capabilities)
    loaded = ExportRecipe.load(recipe)
    return export_bundle(checkpoint, out, loaded, capabilities=capabilities, effort=Effort.OFF).path


def _measure(plain: Session, heads: Session, prompt: int, tokens: int, rounds: int) -> Iterator[Speed]:
    variants = {PLAIN: (plain, False), HEADS: (heads, False), DIAGNOSED: (heads, True)}
    ids = np.random.default_rng(0).integers(0, plain.manifest.vocab_size, prompt + tokens)
    for session, diagnostics in variants.values():  # warm up
        _ms_a_token(session, ids, prompt, diagnostics=diagnostics)
    taken: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(rounds):
        for name in variants if number % 2 else reversed(variants):
            session, diagnostics = variants[name]
            taken[name].append(_ms_a_token(session, ids, prompt, diagnostics=diagnostics))
    for name, times in taken.items():
        ratios = [base / each for base, each in zip(taken[PLAIN], times, strict=True)]
        yield Speed(name, statistics.median(times), statistics.median(ratios), min(ratios), max(ratios), times)


def _ms_a_token(session: Session, ids: NDArray[np.int64], prompt: int, *, diagnostics: bool) -> float:
    """Of the tokens behind the first `prompt` of ids (N,), by a decoder of their own."""
    decoder = new_decoder(session, len(ids), diagnostics=diagnostics)
    decoder.prefill(ids[:prompt])
    start = time.perf_counter()
    for token in ids[prompt:].tolist():
        decoder.decode_one_token(token)
    return 1e3 * (time.perf_counter() - start) / (len(ids) - prompt)


if __name__ == "__main__":
    main()
