"""A few seconds of fuzzing, the same attacks every time; `python -m tests.fuzz` goes on for longer."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from . import victim
from .driver import Arena, Attack, Victim
from .edits import ByteEdit
from .subjects import SUBJECTS, attacks

# Not those of a model with heads, nor whole exports: one of them takes as long as everything here.
EXAMPLES = {"decoder": 100, "external": 100, "exported": 60, "safetensors": 100, "shards": 50, "pickle": 60}


@pytest.fixture(scope="module")
def victims() -> Iterator[dict[str, Victim]]:
    """One process of each kind: it outlives what it refuses."""
    found = {kind: Victim(kind) for kind in ("bundle", "checkpoint")}
    yield found
    for each in found.values():
        each.close()


@pytest.fixture(params=EXAMPLES)
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
    """The driver itself: a death and a hang are told apart, and the next folder is met by a new process."""
    fragile = Victim("bundle", timeout=60)
    missing = fragile.meet(tmp_path / "nothing")
    assert (missing.kind, missing.error) == ("refused", "BundleError")
    process = fragile.process
    process.kill()
    assert fragile.meet(tmp_path / "nothing").kind == "died"
    assert fragile.meet(tmp_path / "nothing").kind == "refused"
    fragile.timeout = 0.1
    process = fragile.process
    process.send_signal(signal.SIGSTOP)  # it cannot answer, however long it is waited for
    assert fragile.meet(tmp_path / "nothing").kind == "hung"
    assert process.returncode is not None
    fragile.close()


def test_an_error_of_no_type_of_ours_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(folder: Path) -> None:
        raise KeyError(str(folder))

    assert victim.ending_of("bundle", tmp_path)["ending"] == "refused"
    monkeypatch.setattr(victim, "meet_bundle", fails)
    answer = victim.ending_of("bundle", tmp_path)
    assert (answer["ending"], answer["error"]) == ("untyped", "KeyError")
    assert "in fails" in answer["traceback"]


def test_byte_edits_fit_any_size() -> None:
    for kind in ("flip", "put", "insert", "truncate", "extend", "cut", "splice"):
        edit = ByteEdit(kind, 0.5, 0.9, b"ab")
        assert isinstance(edit(b""), bytes)
        assert edit(b"0123456789") != b"0123456789"
