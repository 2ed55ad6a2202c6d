"""`cosmos-run generate`: continue a prompt."""

import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import click

from cosmos_runtime.cli.text import read_text

if TYPE_CHECKING:
    from cosmos_runtime.generation import TextGeneration
    from cosmos_runtime.manifest import Manifest
    from cosmos_runtime.sampling import Sampling
    from cosmos_runtime.session import Session

_FROM_BUNDLE = "default: the bundle's own"


class OpenSession(Protocol):
    """What opens the thing that a user named."""

    def __call__(self, place: Path, *, provider: str, threads: int | None, diagnostics: bool) -> "Session":
        """A session over a bundle; `diagnostics` says whether what capability heads find is wanted."""
        ...


def new_generate_command(open_session: OpenSession, documentation: str) -> click.Command:
    """The command that continues a prompt with whatever `open_session` opens; `documentation` is its help."""

    @click.command("generate", help=documentation)
    @click.argument("bundle", type=click.Path(path_type=Path))
    @click.option(
        "--prompt", metavar="TEXT", help="Text to continue; '-' (or nothing, in a pipe) reads standard input."
    )
    @click.option(
        "--max-new-tokens", type=click.IntRange(min=1), default=200, show_default=True, help="Stop after these."
    )
    @click.option(
        "--min-new-tokens", type=click.IntRange(min=0), default=0, help="Don't let a stop token end it before."
    )
    @click.option(
        "--temperature", type=click.FloatRange(min=0), help=f"Higher is more varied, 0 is greedy; {_FROM_BUNDLE}."
    )
    @click.option(
        "--top-k", type=click.IntRange(min=0), help=f"Draw from the K likeliest tokens, 0 is all; {_FROM_BUNDLE}."
    )
    @click.option(
        "--top-p",
        type=click.FloatRange(min=0, max=1, min_open=True),
        help=f"Draw from the likeliest tokens that together reach this probability, 1 is all; {_FROM_BUNDLE}.",
    )
    @click.option(
        "--repetition-penalty",
        type=click.FloatRange(min=0, min_open=True),
        help=f"Above 1 makes tokens less likely that were there before; {_FROM_BUNDLE}.",
    )
    @click.option("--seed", type=click.IntRange(min=0), help="Repeat a run exactly; default: random, and reported.")
    @click.option("--greedy", is_flag=True, help="Always the likeliest token: the same answer every time.")
    @click.option(
        "--speculate",
        type=click.IntRange(min=0),
        default=0,
        metavar="K",
        help="Guess up to K tokens from repetition and check them at once: sooner where the answer repeats itself or "
        "its prompt (summaries, edits, code). The same answer in float32; with int8 activations it can change at a "
        "near tie. Wants --greedy. Try 8.",
    )
    @click.option("--stop", multiple=True, metavar="TEXT", help="End before this text; may be given several times.")
    @click.option(
        "--diagnostics",
        is_flag=True,
        help="Also say what the model's capability heads found (a summary; with --json everything, call by call).",
    )
    @click.option("--provider", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True, help="Device.")
    @click.option("--threads", type=click.IntRange(min=1), help="CPU threads; default: the physical cores there are.")
    @click.option("--json", "as_json", is_flag=True, help="Print one JSON object at the end instead of streaming text.")
    def command(
        bundle: Path,
        prompt: str | None,
        max_new_tokens: int,
        min_new_tokens: int,
        seed: int | None,
        greedy: bool,
        speculate: int,
        stop: tuple[str, ...],
        provider: str,
        threads: int | None,
        diagnostics: bool,
        as_json: bool,
        **overrides: Any,
    ) -> None:
        _refuse_contradiction(greedy, overrides["temperature"])
        text = read_text(prompt, "--prompt")

        from cosmos_runtime.cli.diagnostics import diagnostics_summary
        from cosmos_runtime.defaults import default_stop_ids
        from cosmos_runtime.generation import generate_text
        from cosmos_runtime.quoting import json_text, shown

        start = time.perf_counter()
        session = open_session(bundle, provider=provider, threads=threads, diagnostics=diagnostics)
        loaded = time.perf_counter()
        answer = generate_text(
            session,
            text,
            max_new_tokens=max_new_tokens,
            min_new_tokens=min_new_tokens,
            sampling=_sampling(session.manifest, seed, greedy, overrides),
            stop_ids=default_stop_ids(session.manifest),
            stop=stop,
            speculate=speculate,
            diagnostics=diagnostics,
        )
        timings = _stream(answer, echo=None if as_json else text)
        timings.load_s = loaded - start
        if as_json:
            click.echo(json_text(_report(text, answer, timings, diagnostics)))
        else:
            click.echo(_summary(answer, timings), err=True)
            if diagnostics:
                click.echo("\n".join(map(shown, diagnostics_summary(answer.diagnostics))), err=True)

    return command


def _load(place: Path, *, provider: str, threads: int | None, diagnostics: bool) -> "Session":
    from cosmos_runtime.session import load

    return load(place, provider=provider, threads=threads)


generate_command = new_generate_command(
    _load,
    """Continue a prompt with the model in BUNDLE.

    The prompt and its continuation go to standard output as they come, one line of summary to standard error.
    Text from standard input loses one newline at its end.

    \b
    Examples:
      cosmos-run generate bundles/demo --prompt "Once upon a time"
      echo "Once upon a time" | cosmos-run generate bundles/demo --greedy --json
    """,
)


@dataclass
class _Timings:
    """Seconds of one run; `first_piece_s` and `total_s` count from the first step of the model."""

    load_s: float = 0.0
    first_piece_s: float = 0.0
    total_s: float = 0.0


def _refuse_contradiction(greedy: bool, temperature: float | None) -> None:
    if greedy and temperature:
        raise click.UsageError("--greedy means temperature 0: give --greedy or --temperature, not both.")


def _sampling(manifest: "Manifest", seed: int | None, greedy: bool, overrides: dict[str, Any]) -> "Sampling":
    """The bundle's defaults, overridden by the options that were given."""
    from cosmos_runtime.defaults import default_sampling

    given = {name: value for name, value in overrides.items() if value is not None}
    if greedy:
        given["temperature"] = 0.0
    return replace(default_sampling(manifest), seed=seed, **given)


def _stream(answer: "TextGeneration", echo: str | None) -> _Timings:
    """Run to the end; print prompt and pieces as they come unless `echo` is None.

    A terminal gets no control characters, which a model may have learned to write; a pipe or a file gets the text.
    """
    from cosmos_runtime.quoting import shown_text

    timings = _Timings()
    printable = shown_text if sys.stdout.isatty() else str
    if echo is not None:
        click.echo(printable(echo), nl=False)
    start = time.perf_counter()
    for piece in answer:
        timings.first_piece_s = timings.first_piece_s or time.perf_counter() - start
        if echo is not None:
            click.echo(printable(piece), nl=False)
    timings.total_s = time.perf_counter() - start
    if echo is not None:
        click.echo()
    return timings


def _tokens_per_second(answer: "TextGeneration", timings: _Timings) -> float:
    return len(answer.tokens) / timings.total_s if timings.total_s > 0 else 0.0


def _used_seed(answer: "TextGeneration") -> int | None:
    sampling = answer.generation.sampling
    return None if sampling.is_greedy else sampling.seed


def _summary(answer: "TextGeneration", timings: _Timings) -> str:
    seed = _used_seed(answer)
    chosen = "greedy" if seed is None else f"seed {seed}"
    speed = _tokens_per_second(answer, timings)
    return f"{len(answer.tokens)} tokens, {speed:.1f} tok/s, finish reason: {answer.finish_reason}, {chosen}"


def _report(prompt: str, answer: "TextGeneration", timings: _Timings, diagnostics: bool) -> dict[str, Any]:
    report = {
        "prompt": prompt,
        "text": answer.text,
        "prompt_tokens": answer.generation.prompt,
        "tokens": answer.tokens,
        "finish_reason": answer.finish_reason,
        "seed": _used_seed(answer),
        "timings": {**vars(timings), "tokens_per_second": _tokens_per_second(answer, timings)},
    }
    return {**report, "diagnostics": answer.diagnostics} if diagnostics else report
