"""Fuzzes for as long as it is told to, and keeps what it finds:

    python -m tests.fuzz                                   # 10 minutes, every subject
    python -m tests.fuzz --minutes 60 --subject exported --seed 7

Each finding is printed once, with the first attack that led to it; the folder that did it is kept in --out (by default
build/fuzz), so that `cosmos-run inspect --check FOLDER` or an export shows it again. Ends with 1 where there was any.
"""

import argparse
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, seed, settings

from .driver import Arena, Attack, Ending, Victim
from .subjects import SUBJECTS, attacks

_BATCH = 100


class Findings:
    """What was met: how often each ending came, and the first attack of each cause."""

    def __init__(self, out: Path) -> None:
        self.endings: Counter[str] = Counter()
        self.causes: Counter[str] = Counter()
        self._out = out

    def note(self, subject: str, folder: Path, attack: Attack, ending: Ending) -> None:
        """Counts an ending, and keeps and prints the first of its cause."""
        self.endings[f"{subject} {ending.kind}"] += 1
        if ending.acceptable:
            return
        cause = f"{subject}: {ending.cause}"
        self.causes[cause] += 1
        if self.causes[cause] > 1:
            return
        kept = self._out / f"{len(self.causes):03d}-{subject}-{ending.kind}"
        shutil.copytree(folder, kept)
        (kept / "FINDING.txt").write_text(f"{attack!r}\n\n{ending}\n", encoding="utf-8", errors="backslashreplace")
        print(f"\n{cause}\n  {ending.message[:300]}\n  kept in {kept}", flush=True)


def fuzz(name: str, minutes: float, first_seed: int, findings: Findings) -> None:
    """Attacks one subject until its time is over."""
    until = time.monotonic() + 60 * minutes
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "subject"
        SUBJECTS[name].make(folder)
        victim = Victim(SUBJECTS[name].kind)
        arena = Arena(folder, victim)
        batch = first_seed
        while time.monotonic() < until:
            _attack_once(arena, name, batch, until, findings)
            batch += 1
        victim.close()


def _attack_once(arena: Arena, name: str, number: int, until: float, findings: Findings) -> None:
    """One batch of attacks, the same ones for the same number."""

    @seed(number)
    @settings(
        max_examples=_BATCH,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(attacks(arena.folder, SUBJECTS[name].kind))
    def batch(attack: Attack) -> None:
        if time.monotonic() < until:
            with arena.edited(attack):
                findings.note(name, arena.folder, attack, arena.meet())

    batch()


def main() -> int:
    """Parses the command line, fuzzes, and prints how often each ending came."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__, formatter_class=_Plain)
    parser.add_argument("--minutes", type=float, default=10, help="in all (default: 10)")
    parser.add_argument("--subject", choices=sorted(SUBJECTS), action="append", help="default: every one, in turn")
    parser.add_argument("--seed", type=int, default=0, help="of the first batch (default: 0)")
    parser.add_argument("--out", type=Path, default=Path("build/fuzz"), help="for findings (default: build/fuzz)")
    given_options = parser.parse_args()
    names = given_options.subject or list(SUBJECTS)
    shares = sum(SUBJECTS[name].share for name in names)
    shutil.rmtree(given_options.out, ignore_errors=True)
    findings = Findings(given_options.out)
    for name in names:
        fuzz(name, given_options.minutes * SUBJECTS[name].share / shares, given_options.seed, findings)
    print("\n".join(f"{count:7d}  {ending}" for ending, count in sorted(findings.endings.items())))
    print(f"{sum(findings.endings.values())} attacks, {len(findings.causes)} findings")
    return 1 if findings.causes else 0


class _Plain(argparse.RawDescriptionHelpFormatter):
    """Help as it is written above."""


if __name__ == "__main__":
    sys.exit(main())
