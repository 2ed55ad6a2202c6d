"""Compares decoding on a CPU: this runtime, this project's TorchScript and pt2, other engines, all on the same weights.

First it proves on the demo checkpoint that all of them print the same greedy tokens in float32. Then, in alternating
pairs: load time, start of a process to its first token, prefill, decoding at a short and a long context, peak memory.
Last, how near decoding comes to the limit that memory bandwidth sets. The last line is one line of JSON.

    python -m benchmarks.cpu_decode [--quick]
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click

from benchmarks.engines import KINDS, OURS
from benchmarks.measure import FULL, QUICK, Bench, Plan, Results, pairs_of
from benchmarks.prepare import PRECISIONS, Workshop
from benchmarks.process import EngineFailureError, Variant
from benchmarks.proof import prove
from benchmarks.report import environment, plot, print_roofline, print_table, rows
from benchmarks.roofline import limits, read_bandwidth
from cosmos_export.checkpoint import Checkpoint, save_checkpoint
from cosmos_export.model.loading import preset_checkpoint
from cosmos_export.resources import demo_checkpoint, preset_names

RESULTS = Path(__file__).parent / "results"
QUICK_PAIRS, QUICK_PRECISIONS = 2, ("fp32", "int4")
_FOLDER = click.Path(path_type=Path, exists=True, file_okay=False)


def _assignments(_context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    pairs = [value.partition("=") for value in values]
    if wrong := [name for name, _, value in pairs if not value]:
        raise click.BadParameter(f"expected NAME=VALUE, got {wrong[0]!r}", param=parameter)
    return {name: value for name, _, value in pairs}


@click.command(help=(__doc__ or "").partition("\n\n    python")[0])
@click.option(
    "--preset", type=click.Choice(preset_names()), default="advanced", show_default=True, help="Random weights."
)
@click.option("--checkpoint", type=_FOLDER, help="A checkpoint folder, instead of a preset.")
@click.option("--threads", type=click.IntRange(min=1), default=2, show_default=True)
@click.option("--pairs", type=click.IntRange(min=1), help="Alternating pairs.  [default: 5; 2 with --quick]")
@click.option(
    "--precision", "precisions", type=click.Choice(PRECISIONS), multiple=True, help="Only these.  [default: all]"
)
@click.option("--engine", "engines", type=click.Choice(list(KINDS)), multiple=True, help="Only these.  [default: all]")
@click.option("--quick", is_flag=True, help="A smoke test on the demo checkpoint; its figures mean nothing.")
@click.option(
    "--bundle",
    "bundles",
    multiple=True,
    callback=_assignments,
    help="PRECISION=FOLDER of a bundle of the same weights.",
)
@click.option(
    "--openvino", multiple=True, callback=_assignments, help="PRECISION=FOLDER by optimum-intel; demo=FOLDER."
)
@click.option("--python", "pythons", multiple=True, callback=_assignments, help="ENGINE=INTERPRETER to run it with.")
@click.option(
    "--scratch", type=click.Path(path_type=Path, file_okay=False), help="Keeps and reuses other engines' files."
)
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), default=RESULTS, help="Folder of the results.")
def main(**options: Any) -> None:
    with ExitStack() as stack:
        scratch = options.pop("scratch") or Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="cosmos-bench-"))
        )
        try:
            result = _run(scratch.resolve(), **options)
        except EngineFailureError as error:
            raise click.ClickException(str(error)) from None
    click.echo(json.dumps(result))
    if result["failures"]:
        raise SystemExit(1)


def _run(
    scratch: Path,
    *,
    preset: str,
    checkpoint: Path | None,
    threads: int,
    pairs: int | None,
    precisions: tuple[str, ...],
    engines: tuple[str, ...],
    quick: bool,
    bundles: dict[str, str],
    openvino: dict[str, str],
    pythons: dict[str, str],
    out: Path,
) -> dict[str, Any]:
    started = time.perf_counter()
    chosen = engines or tuple(KINDS)
    common: dict[str, Any] = {"threads": threads, "say": click.echo, "engines": chosen, "pythons": pythons}
    openvino_of_demo = _paths({"fp32": openvino.pop("demo")} if "demo" in openvino else {})
    demo = Workshop(demo_checkpoint(), scratch / "demo", exact=True, openvino=openvino_of_demo, **common)
    verdicts = _prove(demo, scratch)
    folder = demo_checkpoint() if quick else _checkpoint(scratch, preset, checkpoint)
    if quick and not bundles:
        bundles = {"fp32": str(demo.bundle("fp32"))}
    paths = {"bundles": _paths(bundles), "openvino": _paths(openvino)}
    shop = Workshop(folder, scratch / _name(folder), **paths, **common)
    plan = _plan(folder, threads, pairs, quick)
    wanted = precisions or (QUICK_PRECISIONS if quick else PRECISIONS)
    classes = tuple(precision for precision in PRECISIONS if precision in wanted)
    variants = shop.variants(classes, pure=not quick, builder=not quick)
    click.echo("measuring read bandwidth")
    bandwidth = read_bandwidth(threads)
    results = _measure(shop, variants, plan)
    bandwidth = max(bandwidth, read_bandwidth(threads))
    rooflines = _rooflines(shop, variants, results, plan, bandwidth)
    result = {
        "benchmark": "cpu_decode",
        "model": "demo" if quick else preset if checkpoint is None else checkpoint.name,
        **environment(threads, results.versions),
        "seconds": round(time.perf_counter() - started, 1),
        "plan": dataclasses.asdict(plan),
        "same_greedy_tokens": [verdict.to_dict() for verdict in verdicts],
        "failures": results.failures,
        "rows": rows(variants, results),
        "roofline": rooflines,
    }
    _publish(result, out, "cpu_decode_quick" if quick else "cpu_decode")
    return result


def _prove(demo: Workshop, scratch: Path) -> list[Any]:
    variants = demo.variants(("fp32",), builder=False)
    verdicts = prove(Checkpoint.open(demo_checkpoint()), variants, scratch, demo.threads, click.echo)
    if not verdicts or not all(verdict.passed for verdict in verdicts):
        raise click.ClickException("the engines do not compute the same model; nothing is compared")
    return verdicts


def _checkpoint(scratch: Path, preset: str, checkpoint: Path | None) -> Path:
    """The given checkpoint folder, or the preset's random weights, saved once for all engines."""
    if checkpoint is not None:
        return checkpoint.resolve()
    folder = scratch / f"checkpoint-{preset}"
    if not folder.is_dir():
        random = preset_checkpoint(preset)
        save_checkpoint(folder, random.config, {name: random.tensor(name) for name in random.names})
    return folder


def _name(folder: Path) -> str:
    """A name for what is made from a checkpoint: another one as soon as its files change."""
    stamps = sorted((p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in folder.iterdir())
    return f"measured-{hashlib.sha256(repr((str(folder), stamps)).encode()).hexdigest()[:12]}"


def _paths(folders: dict[str, str]) -> dict[str, Path]:
    return {name: Path(folder).resolve() for name, folder in folders.items()}


def _plan(folder: Path, threads: int, pairs: int | None, quick: bool) -> Plan:
    plan = Plan(pairs=pairs or (QUICK_PAIRS if quick else 5), threads=threads, **(QUICK if quick else FULL))
    limit = Checkpoint.open(folder).config.max_sequence_length
    if plan.room > limit:
        raise click.ClickException(f"{folder}: {plan.room} positions are measured, the model has {limit}")
    return plan


def _measure(shop: Workshop, variants: list[Variant], plan: Plan) -> Results:
    vocab_size = Checkpoint.open(shop.checkpoint).config.vocab_size
    bench = Bench(plan, vocab_size, shop.scratch, click.echo)
    for group in pairs_of(variants):
        bench.run(group)
    return bench.results


def _rooflines(
    shop: Workshop, variants: list[Variant], results: Results, plan: Plan, bandwidth: float
) -> dict[str, Any]:
    entries = []
    for variant in (v for v in variants if v.engine == OURS):
        for deep, metric, positions in (
            (False, "decode_tok_s", plan.short_prompt + plan.new_tokens // 2),
            (True, "decode_deep_tok_s", (plan.deep_context + plan.deep_total) // 2),
        ):
            measured = results.median(variant.key, metric) or 0.0
            limit = limits(shop.bundle(variant.precision), bandwidth, positions)
            share = measured / limit["limit_tok_s"]
            entries.append(
                {"precision": variant.precision, "deep": deep, **limit, "measured_tok_s": measured, "share": share}
            )
    return {"bandwidth_bytes_s": bandwidth, "bundles": entries}


def _publish(result: dict[str, Any], out: Path, name: str) -> None:
    plan = result["plan"]
    sizes = {"short": plan["short_prompt"], "long": plan["long_prompt"], "deep": plan["deep_context"]}
    print_table(result["rows"], sizes)
    print_roofline(result["roofline"])
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if not plot(result["rows"], result["roofline"], sizes, out / f"{name}.png"):
        click.echo("skipped: the plot (matplotlib not installed)")


if __name__ == "__main__":
    main()
