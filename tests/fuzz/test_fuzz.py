"""A few seconds of fuzzing, the same attacks every time; `python -m tests.fuzz` goes on for longer."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from .driver import Arena, Attack, Victim
from .edits import ByteEdit
from .subjects import SUBJECTS, attacks

EXAMPLES = {"decoder": 100, "external": 100, "exported": 80, "safetensors": 10, "shards": 8, "pickle": 8}


@pytest.fixture(scope="module")
def victims() -> Iterator[dict[str, Victim]]:
    """One process of each kind: it outlives what it refuses."""
    found = {kind: Victim(kind) for kind in ("bundle", "checkpoint")}
    yield found
    for victim in found.values():
        victim.close()


@pytest.fixture(params=SUBJECTS)
def arena(request: pytest.FixtureRequest, tmp_path: Path, victims: dict[str, Victim]) -> tuple[str, Arena]:
    name: str = request.param
    SUBJECTS[name].make(tmp_path / "subject")
    return name, Arena(tmp_path / "subject", victims[SUBJECTS[name].kind])


def test_altered_files_end_in_typed_errors(arena: tuple[str, Arena]) -> None:
    name, place = arena
    assert str(place.meet()) == "works :", "what is not altered works"

    @settings(
        max_examples=EXAMPLES[name],
        derandomize=True,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(attacks(place.folder, SUBJECTS[name].kind))
    def attacked(attack: Attack) -> None:
        ending = place.ending_of(attack)
        assert ending.acceptable, str(ending)

    attacked()
    assert str(place.meet()) == "works :", "every edit was undone"


def test_what_kills_or_stops_a_process_is_seen(tmp_path: Path) -> None:
    """The driver itself: an untyped error, a death and a hang are told apart, and the next one is met again."""
    victim = Victim("bundle", timeout=60)
    missing = victim.meet(tmp_path / "nothing")
    assert (missing.kind, missing.error) == ("refused", "BundleError")
    assert victim.meet(Path("\0")).kind == "untyped"
    process = victim.process
    process.kill()
    assert victim.meet(tmp_path / "nothing").kind == "died"
    assert victim.meet(tmp_path / "nothing").kind == "refused"
    victim.timeout = 0
    process = victim.process
    assert victim.meet(tmp_path / "nothing").kind == "hung"
    assert process.returncode is not None
    victim.close()


def test_byte_edits_fit_any_size() -> None:
    for kind in ("flip", "put", "insert", "truncate", "extend", "cut", "splice"):
        edit = ByteEdit(kind, 0.5, 0.9, b"ab")
        assert isinstance(edit(b""), bytes)
        assert edit(b"0123456789") != b"0123456789"
