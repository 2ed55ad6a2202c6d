"""The examples for users: the usage guide runs all of them (see test_guides), so here only that it does."""

import re
from pathlib import Path

import pytest

from .guide import blocks
from .guide_run import ROOT

EXAMPLES = ("first_test", "every_capability", "export_and_run", "error_handling")


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_is_run_by_the_guide_and_shows_its_output(name: str) -> None:
    runs = [b for b in blocks(ROOT / "docs" / "USAGE_GUIDE.md") if b.code == f"python examples/{name}.py\n"]
    assert [b.output is not None and not b.fails for b in runs] == [True]


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_is_short_and_says_how_it_is_run(name: str) -> None:
    lines = Path(ROOT, "examples", f"{name}.py").read_text(encoding="utf-8").splitlines()
    assert len(lines) < 80
    assert any(re.fullmatch(rf"    python examples/{name}\.py.*", line) for line in lines)
