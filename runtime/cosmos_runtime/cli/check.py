"""`cosmos-run check`: whether every byte of a bundle is as it was exported, and signed."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cosmos_runtime.cli.group import EXIT_ERROR

if TYPE_CHECKING:
    from cosmos_runtime.bundle import Progress
    from cosmos_runtime.checking import CheckedBundle


@click.command("check")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--key",
    metavar="PUBLIC.pem",
    type=click.Path(path_type=Path),
    help='Also demand a signature by this key\'s owner; needs pip install "cosmos-export[sign]".',
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
def check_command(bundle: Path, key: Path | None, as_json: bool) -> None:
    """Read every file of BUNDLE and compare it with the manifest.

    For the first time that a bundle is on a machine, and whenever you doubt it. Names each file that was altered, is
    missing or was added, and graphs that ask for what a bundle may not use. Nothing is loaded and nothing is written.
    Exits with 0 when all is as it was exported, and 1 when anything is not.

    \b
    Examples:
      cosmos-run check bundles/demo
      cosmos-run check bundles/demo --key public.pem      # signed with: cosmos-export sign
    """
    from cosmos_runtime.checking import check_bundle
    from cosmos_runtime.quoting import json_text

    with _shown_progress(quiet=as_json) as progress:
        checked = check_bundle(bundle, key=key, progress=progress)
    if as_json:
        click.echo(json_text(_report(checked, key), indent=2))
    else:
        _print(checked, key)
    if not checked.good:
        sys.exit(EXIT_ERROR)


def _print(checked: "CheckedBundle", key: Path | None) -> None:
    from cosmos_runtime.bundle import CURE
    from cosmos_runtime.quoting import shown

    for finding in checked.findings:
        click.echo(shown(f"{finding.file}: {' '.join(finding.problem.split())}"))
    for note in checked.notes:
        click.echo(shown(f"note: {note}"), err=True)
    if checked.good:
        signature = "no signature was asked for (--key)" if key is None else f"signed by the owner of {key}"
        click.echo(f"{checked.path}: good: {checked.files} files, {checked.size:,} bytes; {signature}")
    else:
        wrong = len({finding.file for finding in checked.findings})
        state = "as it was exported" if key is None else "as it was exported and signed"
        click.echo(f"error: {checked.path}: not {state}: {wrong} bad file{'s' if wrong > 1 else ''}; {CURE}", err=True)


def _report(checked: "CheckedBundle", key: Path | None) -> dict[str, Any]:
    return {
        "bundle": str(checked.path),
        "good": checked.good,
        "files": checked.files,
        "bytes": checked.size,
        "signed": None if key is None else checked.signed,
        "findings": [{"file": finding.file, "problem": finding.problem} for finding in checked.findings],
        "notes": list(checked.notes),
    }


@contextmanager
def _shown_progress(quiet: bool) -> "Iterator[Progress | None]":
    """A bar on a terminal; files of a few gigabytes take their time."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    with click.progressbar(length=1, label="Reading", file=sys.stderr) as bar:

        def on_bytes(_name: str, done: int, in_all: int) -> None:
            bar.length = max(in_all, 1)
            bar.update(done - bar.pos)

        yield on_bytes
