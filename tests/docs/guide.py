"""A guide as a program: its code blocks in order, and what it says they print.

- ```` ```bash ````: commands, run by bash with -e. ```` ```bash install ````: commands that need the network or a
  compiler, which are only checked for what they name.
- ```` ```python ````: statements; all of a guide share their names.
- ```` ```text ```` right after one of these: lines of what it prints, in their order. `...` stands for anything in a
  line, and a line of its own for any lines. A last line that names an error says that the block fails.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

_FENCE = re.compile(r"^```(?P<info>[^`\n]*)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)
_HEADING = re.compile(r"^(#+) ", re.MULTILINE)
_ERROR = re.compile(r"^([Ee]rror:|[\w.]+Error:)")


@dataclass(frozen=True)
class Block:
    """A code block, the line that it begins in, and the block of output that follows it (None without one)."""

    language: str
    code: str
    line: int
    output: str | None = None

    @property
    def fails(self) -> bool:
        """Whether the guide shows an error."""
        return self.output is not None and _ERROR.match(self.output.splitlines()[-1]) is not None

    def first_missing_from(self, printed: str) -> str | None:
        """The first line that the guide shows and `printed` has not, after those above it."""
        rest = iter(line.rstrip() for line in printed.splitlines())
        shown = [line for line in (self.output or "").splitlines() if line.strip() not in ("", "...")]
        return next((line for line in shown if not any(map(_pattern(line).fullmatch, rest))), None)


def _pattern(line: str) -> re.Pattern[str]:
    return re.compile(".*".join(re.escape(part) for part in line.rstrip().split("...")))


def blocks(guide: Path) -> list[Block]:
    """The code blocks of a guide. Raises AssertionError for an output that is no block's."""
    text = guide.read_text(encoding="utf-8")
    found: list[Block] = []
    for match in _FENCE.finditer(text):
        language, code = match["info"].strip(), match["body"]
        line = text[: match.start()].count("\n") + 1
        if language == "text":
            before = found.pop()
            assert before.output is None, f"{guide.name}:{line}: output of no block"
            found.append(replace(before, output=code))
        else:
            found.append(Block(language, code, line))
    return found


def prose(guide: Path) -> str:
    """The guide without its code blocks."""
    return _FENCE.sub("", guide.read_text(encoding="utf-8"))


def section(guide: Path, heading: str) -> str:
    """The text below the heading that has `heading` in it, up to the next one."""
    parts = re.split(r"^#+ (.*)$", prose(guide), flags=re.MULTILINE)
    found = [text for title, text in zip(parts[1::2], parts[2::2], strict=True) if heading in title]
    assert len(found) == 1, f"{guide.name}: {len(found)} headings with {heading}"
    return found[0]


def heading_levels(guide: Path) -> list[int]:
    """How deep each heading is: the guide's outline, in whatever language."""
    return [len(marks) for marks in _HEADING.findall(prose(guide))]
