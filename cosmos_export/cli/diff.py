"""`cosmos-export diff`: where does a bundle leave its model?"""

from __future__ import annotations

import json
import sys
from itertools import product
from pathlib import Path

import click

from cosmos_export.cli.group import EXIT_ERROR

_LEVELS = ("all", "extended", "basic", "off")
_PROVIDERS = ("cpu", "cuda")


@click.command("diff")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--checkpoint",
    type=click.Path(path_type=Path),
    help="The checkpoint it was made from; default: where the manifest says that was.",
)
@click.option(
    "--optimization",
    default="all",
    show_default=True,
    metavar="LEVEL,...",
    help=f"ONNX Runtime's graph optimisations: {', '.join(_LEVELS)}. With several, they are compared with the first.",
)
@click.option(
    "--threads",
    default="0",
    show_default=True,
    metavar="N,...",
    help="Threads of ONNX Runtime, 0 for its own choice; several as above.",
)
@click.option(
    "--provider",
    default="cpu",
    show_default=True,
    metavar="NAME,...",
    help=f"Device: {', '.join(_PROVIDERS)}; several as above.",
)
@click.option(
    "--reproduce",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="Where a minimal reproduction of the first fault goes, if there is one. Default: BUNDLE.reproduction.",
)
@click.option("--plot", type=click.Path(path_type=Path), metavar="FILE.png", help="Draw error by layer (matplotlib).")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the tables.")
def diff_command(
    bundle: Path,
    checkpoint: Path | None,
    optimization: str,
    threads: str,
    provider: str,
    reproduce: Path | None,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Name the first layer where BUNDLE leaves its PyTorch model, and the step in it.

    Hidden states of the whole graph are compared with float64 layer by layer; then each layer runs alone on float64's
    own input, so that a fault is found where it is and not where it shows. Exits with 0 when nothing differs, 1 when
    something does.

    \b
    Examples:
      cosmos-export diff bundles/demo-fp32
      cosmos-export diff my-bundle --checkpoint my-model --plot errors.png
      cosmos-export diff my-bundle --optimization all,basic,off --threads 1,2
    """
    wanted = _settings(optimization, threads, provider)

    from cosmos_export.cli.diff_terminal import plot_diff, print_diff
    from cosmos_export.cli.stages import shown_progress
    from cosmos_export.parity.diff import Setting, diff_bundle
    from cosmos_export.parity.reproduction import write_reproduction
    from cosmos_export.parity.source import checkpoint_of
    from cosmos_runtime import Bundle

    if plot is not None:
        _require_matplotlib()
    with shown_progress() as progress:
        opened = Bundle.open(bundle)
        found = diff_bundle(
            opened,
            checkpoint_of(opened.manifest, checkpoint),
            causal=opened.manifest.model["causal"],
            settings=[Setting(*values) for values in wanted],
            progress=progress,
        )
    report, written = found.report, None
    if found.fault is not None:
        written = reproduce or _free(Path(f"{bundle.resolve()}.reproduction"))
        write_reproduction(written, found.fault)
    if plot is not None:
        plot_diff(report, plot)
    if as_json:
        document = report.to_dict() | {"reproduction": None if written is None else str(written)}
        click.echo(json.dumps(document, indent=2))
    else:
        print_diff(report)
        if written is not None:
            click.echo(f"reproduction of {found.fault.what if found.fault else ''}: python {written / 'reproduce.py'}")
        click.echo(f"{'EQUAL' if report.equal else 'DIFFERS'} {bundle}: {report.summary()}")
    if not report.equal:
        sys.exit(EXIT_ERROR)


def _settings(optimization: str, threads: str, provider: str) -> list[tuple[str, int, str]]:
    """Every combination, the first of each list first."""
    levels = _listed("--optimization", optimization, _LEVELS)
    providers = _listed("--provider", provider, _PROVIDERS)
    counts = [part.strip() for part in threads.split(",")]
    if not all(count.isdecimal() and int(count) <= 1024 for count in counts):
        raise click.UsageError(f"--threads {threads}: expected whole numbers from 0 to 1024 with commas between.")
    distinct = dict.fromkeys(int(count) for count in counts)
    return [(device, count, level) for device, level, count in product(providers, levels, distinct)]


def _listed(option: str, given: str, known: tuple[str, ...]) -> list[str]:
    names = list(dict.fromkeys(name.strip() for name in given.split(",")))
    unknown = [name for name in names if name not in known]
    if unknown:
        raise click.UsageError(f"{option} {given}: expected some of {', '.join(known)} with commas between.")
    return names


def _free(folder: Path) -> Path:
    """This folder, or with a number behind it where there is one already."""
    numbered = (folder.with_name(f"{folder.name}-{number}") for number in range(2, 1000))
    return folder if not folder.exists() else next(path for path in numbered if not path.exists())


def _require_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        raise click.UsageError('--plot needs matplotlib: pip install "cosmos-export[bench]"') from None
