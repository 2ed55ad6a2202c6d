"""The Arabic guide reads from right to left, and its code from left to right, wherever HTML in Markdown is shown."""

import re

from .guide import prose
from .guide_run import ROOT

ARABIC = ROOT / "docs" / "ar" / "USAGE_GUIDE.md"
TEXT = re.compile(r'^<div dir="rtl">\n\n(.*?)\n\n</div>$', re.MULTILINE | re.DOTALL)


def test_all_text_is_marked_as_right_to_left_and_no_code_block_is() -> None:
    text = ARABIC.read_text(encoding="utf-8")
    assert not TEXT.sub("", prose(ARABIC)).strip()
    assert not [part for part in TEXT.findall(text) if "```" in part or "<div" in part]


def test_signs_at_the_ends_of_code_keep_their_side() -> None:
    """In text from right to left, a sign beside no Latin letter moves to the other side: `--out` would read `out--`."""
    text = prose(ARABIC)
    wrong = []
    for match in re.finditer(r"`([^`\n]+)`", text):
        code, before, after = match[1], text[: match.start()], text[match.end() :]
        begins = re.match("[A-Za-z]", code) or before.endswith("&lrm;")
        ends = re.search("[A-Za-z0-9]$", code) or after.startswith("&lrm;")
        wrong += [] if begins and ends else [code]
    assert not wrong


def test_no_direction_is_hidden_in_the_source() -> None:
    """Marks of direction are written as `&lrm;`, which editors show; invisible ones get into copied commands."""
    assert not re.search("[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]", ARABIC.read_text(encoding="utf-8"))
