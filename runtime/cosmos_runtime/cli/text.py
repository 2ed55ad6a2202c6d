"""Text that a command works on: an option's, standard input's, or a file's."""

import sys
from pathlib import Path

import click


def read_text(given: str | None, option: str) -> str:
    """The text of `option`; standard input, less one newline at its end, where it is "-" or left out in a pipe."""
    if given is not None and given != "-":
        return given
    if given is None and sys.stdin.isatty():
        raise click.UsageError(f'No {option.lstrip("-")}: give {option} "some text", or pipe text in.')
    return _decode(sys.stdin.buffer.read(), f"{option.lstrip('-')}: standard input").removesuffix("\n")


def read_file(path: Path) -> str:
    """A file's text, as it is."""
    return _decode(path.read_bytes(), str(path))


def _decode(raw: bytes, where: str) -> str:
    """UTF-8 whatever the locale says, as the tokenizer wants it."""
    from cosmos_runtime.errors import InputError

    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{where} is not UTF-8: {error}; convert it first") from error
