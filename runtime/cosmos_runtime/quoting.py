"""How what somebody else wrote appears: a wrong value in an error message, a bundle's texts on a terminal.

A terminal obeys what it is given: an escape sequence in a name can recolour, move, rename or answer for the user
(https://invisible-island.net/xterm/ctlseqs/ctlseqs.html), and a mark of direction can put words in another order.
"""

import json
import re
from typing import Any

_LONGEST = 80

# Controls (C0, DEL, C1), separators of lines, and marks that have no width or turn the direction of what follows.
_CONTROLS = r"\x00-\x1f\x7f-\x9f"
_UNSEEN = r"\xad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\U000e0000-\U000e007f"
_NOT_ON_ONE_LINE = re.compile(f"[{_CONTROLS}{_UNSEEN}\ud800-\udfff]")
_NOT_IN_TEXT = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def quoted(value: object) -> str:
    """`repr(value)`, cut to 80 characters; what the value is, where it has no repr to show."""
    try:
        text = repr(value)
    except Exception:  # an integer of more digits than Python writes, a list nested too deep, somebody's own class
        text = f"<{type(value).__name__} of {_size(value)}>"
    return text if len(text) <= _LONGEST else text[:_LONGEST] + "..."


def shown(text: str) -> str:
    """A text of one line, such as a name, with everything escaped that would not be seen as it is (`\\x1b`)."""
    return _NOT_ON_ONE_LINE.sub(_escaped, text)


def shown_text(text: str) -> str:
    """A text of several lines, as a model writes: newlines, tabs and marks of direction stay, other controls do not."""
    return _NOT_IN_TEXT.sub(_escaped, text)


def json_text(value: Any, indent: int | None = None) -> str:
    """`value` as JSON that people can read: other scripts as they are, what a terminal would obey as `\\u001b`."""
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    return _NOT_ON_ONE_LINE.sub(lambda found: found[0] if found[0] == "\n" else json.dumps(found[0])[1:-1], text)


def _escaped(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape").decode("ascii")


def _size(value: object) -> str:
    return f"{value.bit_length()} bits" if isinstance(value, int) else "unknown content"
