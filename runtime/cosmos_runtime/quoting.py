"""How a value that is wrong appears in an error message: short, and never an error itself."""

_LONGEST = 80


def quoted(value: object) -> str:
    """`repr(value)`, cut to 80 characters; what the value is, where it has no repr to show."""
    try:
        text = repr(value)
    except Exception:  # an integer of more digits than Python writes, a list nested too deep, somebody's own class
        text = f"<{type(value).__name__} of {_size(value)}>"
    return text if len(text) <= _LONGEST else text[:_LONGEST] + "..."


def _size(value: object) -> str:
    return f"{value.bit_length()} bits" if isinstance(value, int) else "unknown content"
