"""Table and plot of the results of `benchmarks.cuda_decode`.

python -m benchmarks.cuda_report [RESULTS.json]        prints the table, writes RESULTS.png
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

RESULTS = Path(__file__).parent / "results" / "cuda_decode.json"
COLUMNS = {
    "this runtime, fp16": "fp16 device loop",
    "int4": "int4 device loop",
    "torch.compile fp16": "torch.compile fp16",
    "transformers eager": "transformers eager fp16",
}


def table(document: dict[str, Any]) -> str:
    """Markdown: tokens a second of each engine, and this runtime's float16 against torch.compile and against the limit
    that weights and cache over the copy's bandwidth set."""
    head = ["model", "batch", "prompt", *COLUMNS, "against compiled", "of the limit"]
    lines = [f"| {' | '.join(head)} |", f"| --- | {' | '.join(['---:'] * (len(head) - 1))} |"]
    for result in document["results"]:
        speeds = [result["engines"].get(name, {}).get("tokens_per_second") for name in COLUMNS.values()]
        compiled = f"{speeds[0] / speeds[2]:.2f}" if speeds[2] else ""
        cells = [result["model"], str(result["batch"]), f"{result['prompt']:,}"]
        cells += [f"{speed:,.0f}" if speed else "" for speed in speeds]
        cells += [compiled, f"{speeds[0] / limit(document, result):.0%}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def limit(document: dict[str, Any], result: dict[str, Any]) -> float:
    """Tokens a second at which reading float16 weights once a step, and every row's cache, fills the bandwidth."""
    step = result["weight_bytes"]["fp16"] + result["cache_bytes"]
    return float(result["batch"] * document["copy_bytes_per_second"] / step)


def plot(document: dict[str, Any], path: Path) -> None:
    """One group of bars a setting that has every engine, tokens a second a row."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [r for r in document["results"] if COLUMNS["torch.compile fp16"] in r["engines"]]
    figure, axes = pyplot.subplots(figsize=(10, 4))
    width = 0.8 / len(COLUMNS)
    for at, (label, name) in enumerate(COLUMNS.items()):
        heights = [r["engines"].get(name, {}).get("tokens_per_second", 0) / r["batch"] for r in shown]
        axes.bar([x + at * width for x in range(len(shown))], heights, width, label=label)
    names = [f"{r['model']}\nbatch {r['batch']}\nprompt {r['prompt']:,}" for r in shown]
    axes.set_xticks([x + 1.5 * width for x in range(len(shown))], names, fontsize=7)
    axes.set_ylabel("tokens a second, each row")
    axes.set_title(f"Decoding on one {document['device']}")
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


@click.command()
@click.argument("results", type=click.Path(path_type=Path, exists=True), default=RESULTS)
def main(results: Path) -> None:
    """Print the table and write the plot beside the results."""
    document = json.loads(results.read_text(encoding="utf-8"))
    plot(document, results.with_suffix(".png"))
    click.echo(table(document))


if __name__ == "__main__":
    main()
