"""`cosmos-export verify`: prove a bundle again, wherever it has been since."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TextIO

import click

from cosmos_export.cli.group import EXIT_ERROR


@click.command("verify")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--checkpoint",
    type=click.Path(path_type=Path),
    help="The checkpoint it was made from; default: where the manifest says that was.",
)
@click.option("--quick", is_flag=True, help="Only sequences of up to 256 tokens.")
@click.option(
    "--layers",
    is_flag=True,
    help="One layer of the model in memory at a time; default where the whole model in float64 would not fit.",
)
@click.option(
    "--text",
    type=click.File(encoding="utf-8"),
    help="Also measure divergence and perplexity on this file; default for a quantised bundle: text it writes itself.",
)
@click.option("--provider", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True, help="Device.")
@click.option(
    "--trusted",
    is_flag=True,
    help="Don't compare hashes first: for a bundle that somebody you know has altered. A PyTorch program can do "
    "anything that you can.",
)
@click.option(
    "--json",
    "json_path",
    metavar="FILE",
    help="Where to write the whole report; '-' prints it instead of the table. Default: BUNDLE.parity.json.",
)
def verify_command(
    bundle: Path,
    checkpoint: Path | None,
    quick: bool,
    layers: bool,
    text: TextIO | None,
    provider: str,
    trusted: bool,
    json_path: str | None,
) -> None:
    """Compare BUNDLE with its PyTorch model in float64.

    The files are hashed, each stored tensor is compared bit for bit, and the runtime's logits are compared over
    batches and lengths up to the maximum. Exits with 0 when all of it holds and 1 when anything does not.

    \b
    Examples:
      cosmos-export verify bundles/demo-fp32
      cosmos-export verify my-bundle --checkpoint my-model --json report.json
      cosmos-export verify a-large-bundle --layers
    """
    if quick and layers:
        raise click.UsageError("--quick and --layers each say how much to compare: give one of them.")
    from cosmos_export.cli.stages import shown_progress
    from cosmos_export.cli.terminal import print_report
    from cosmos_export.parity.source import checkpoint_of
    from cosmos_export.parity.verify import Effort, verify_bundle
    from cosmos_runtime import Bundle

    with shown_progress() as progress:
        opened = Bundle.open(bundle)
        if not trusted:
            progress.stage("Hashing the bundle's files")
            opened.check_hashes(lambda _, done, total: progress.update(done, total))
        report = verify_bundle(
            bundle,
            checkpoint_of(opened.manifest, checkpoint),
            causal=opened.manifest.model["causal"],
            effort=Effort.LAYERS if layers else Effort.QUICK if quick else Effort.FULL,
            provider=provider,
            text=text.read() if text else None,
            trusted=True,  # hashed above, or declared so
            progress=progress,
        )
    document = json.dumps(report.to_dict(), indent=2)
    if json_path == "-":
        click.echo(document)
    else:
        written = Path(json_path) if json_path else Path(f"{bundle.resolve()}.parity.json")
        written.write_text(document + "\n", encoding="utf-8")
        print_report(report)
        click.echo(f"{'PASS' if report.passed else 'FAIL'} {bundle}: {report.summary()}; report in {written}")
    if not report.passed:
        sys.exit(EXIT_ERROR)
