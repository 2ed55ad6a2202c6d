"""What speculation by prompt lookup gains on text that repeats its prompt, and what it costs on text that does not.

The text is given, not generated: each token is appended as if the model had chosen it, with and without speculation in
alternating pairs. So every model meets the same text, and only the time differs.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import click
import numpy as np
from numpy.typing import NDArray

from benchmarks.report import environment
from cosmos_export.model.loading import preset_checkpoint
from cosmos_export.parity.verify import Effort
from cosmos_export.pipeline import export_bundle
from cosmos_export.recipe import ExportRecipe
from cosmos_export.resources import demo_checkpoint, preset_names
from cosmos_runtime import Session, Tokenizer, load, new_decoder
from cosmos_runtime.lookup import SpeculatingDecoder

# As `generate(speculate=...)` is called in the README.
MOST = 8


@dataclass(frozen=True)
class Gain:
    """Median of the pairs' ratios: time without speculation over time with it."""

    recipe: str
    text: str
    ratio: float
    lowest: float
    highest: float
    plain_ms_a_token: float


@click.command(help=(__doc__ or "").partition("\n")[0])
@click.option("--preset", type=click.Choice(preset_names()), default="advanced", show_default=True)
@click.option("--recipe", "recipes", multiple=True, default=("cpu-fp32", "cpu-int4"), show_default=True)
@click.option("--text", type=click.Path(path_type=Path, exists=True, dir_okay=False), required=True, help="UTF-8.")
@click.option(
    "--tokens", type=click.IntRange(min=16), default=128, show_default=True, help="Prompt, and text after it."
)
@click.option("--pairs", type=click.IntRange(min=1), default=7, show_default=True)
@click.option("--threads", type=click.IntRange(min=1), default=2, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="Write the results to this JSON file.")
def main(
    preset: str, recipes: tuple[str, ...], text: Path, tokens: int, pairs: int, threads: int, out: Path | None
) -> None:
    gains = []
    texts = _texts(text, tokens)
    with tempfile.TemporaryDirectory() as scratch:
        for name in recipes:
            recipe = replace(ExportRecipe.load(name), calibration=None)
            export_bundle(preset_checkpoint(preset), Path(scratch, name), recipe, effort=Effort.OFF)
            session = load(Path(scratch, name), threads=threads)
            for kind, ids in texts.items():
                gain = _measure(session, name, kind, ids, pairs)
                gains.append(gain)
                spread = f"{gain.lowest:.2f} to {gain.highest:.2f}"
                click.echo(
                    f"{name}, {kind}: {gain.ratio:.2f} times as fast ({spread}; "
                    f"{gain.plain_ms_a_token:.2f} ms a token without)"
                )
    if out is not None:
        what = {"model": preset, **environment(threads, {}), "results": [asdict(gain) for gain in gains]}
        out.write_text(json.dumps(what, indent=1) + "\n", encoding="utf-8")


def _texts(text: Path, tokens: int) -> dict[str, NDArray[np.int64]]:
    """Token ids (2 * tokens,), prompt and what follows it, by what they do. The ids are the demo tokenizer's."""
    ids = np.array(Tokenizer.from_file(demo_checkpoint() / "tokenizer.json").encode(text.read_text(encoding="utf-8")))
    prose = ids[: 2 * tokens]
    return {
        "prose": prose,
        "no token twice": np.random.default_rng(0).permutation(1024)[: 2 * tokens],
        "a text that repeats its prompt": np.concatenate([prose[:tokens], prose[:tokens]]),
    }


def _measure(session: Session, recipe: str, kind: str, ids: NDArray[np.int64], pairs: int) -> Gain:
    _decode(session, ids, speculate=True), _decode(session, ids, speculate=False)  # warm up
    plain, ratios = [], []
    for pair in range(pairs):
        order = (False, True) if pair % 2 else (True, False)
        seconds = {speculate: _decode(session, ids, speculate=speculate) for speculate in order}
        plain.append(seconds[False])
        ratios.append(seconds[False] / seconds[True])
    each = 1e3 * statistics.median(plain) / (len(ids) // 2)
    return Gain(recipe, kind, statistics.median(ratios), min(ratios), max(ratios), each)


def _decode(session: Session, ids: NDArray[np.int64], *, speculate: bool) -> float:
    """Seconds to append the second half of ids (N,), one after another, behind the first."""
    decoder = new_decoder(session, len(ids) + MOST)
    used = SpeculatingDecoder(decoder, MOST, len(ids) + MOST) if speculate else decoder
    prompt, rest = np.split(ids, 2)
    used.prefill(prompt)
    start = time.perf_counter()
    for token in rest.tolist():
        used.decode_one_token(token)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
