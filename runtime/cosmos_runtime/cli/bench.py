"""`cosmos-run bench`: how fast a bundle is on this machine."""

import json
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from cosmos_runtime.bench import Result


@click.command("bench")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--prompt-tokens", type=click.IntRange(min=1), default=128, show_default=True, help="Prompt's length.")
@click.option("--new-tokens", type=click.IntRange(min=2), default=128, show_default=True, help="Answer's length.")
@click.option("--repeat", type=click.IntRange(min=1), default=5, show_default=True, help="Runs, after one to warm up.")
@click.option("--provider", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True, help="Device.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads; default: the physical cores there are.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a summary.")
def bench_command(
    bundle: Path,
    prompt_tokens: int,
    new_tokens: int,
    repeat: int,
    provider: str,
    threads: int | None,
    as_json: bool,
) -> None:
    """Measure how fast BUNDLE runs here.

    Generates greedily from random prompts. The host's share of a step is what choosing tokens and bookkeeping add to
    the time spent inside ONNX Runtime.

    \b
    Examples:
      cosmos-run bench bundles/demo
      cosmos-run bench bundles/demo --prompt-tokens 512 --threads 2 --json
    """
    from cosmos_runtime.bench import measure
    from cosmos_runtime.session import load
    from cosmos_runtime.threads import thread_count

    start = time.perf_counter()
    session = load(bundle, provider=provider, threads=threads)
    load_s = time.perf_counter() - start
    result = measure(session, prompt_tokens=prompt_tokens, new_tokens=new_tokens, repeat=repeat)
    if as_json:
        setting = {"bundle": session.manifest.name, "provider": provider, "threads": thread_count(threads)}
        click.echo(json.dumps({**setting, "load_s": load_s, **asdict(result)}))
    else:
        click.echo("\n".join(_summary(load_s, result)))


def _summary(load_s: float, result: "Result") -> Iterator[str]:
    yield f"load      {load_s:.2f} s"
    yield (
        f"prefill   {result.prefill_tokens_per_second:,.1f} tok/s "
        f"({result.prompt_tokens} tokens in {result.prefill_ms:.1f} ms)"
    )
    yield (
        f"decode    {result.decode_tokens_per_second:,.1f} tok/s (a token: median {result.ms_per_token_median:.2f} ms, "
        f"{result.ms_per_token_min:.2f} to {result.ms_per_token_max:.2f})"
    )
    yield f"host      {result.host_us_per_token:.0f} µs a token, {result.host_share:.1%} of the step"
    if result.peak_memory_mb is not None:
        yield f"memory    {result.peak_memory_mb:,.0f} MB at most"
