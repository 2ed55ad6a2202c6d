"""This project's TorchScript program in one of its bundles, run by PyTorch under this project's sessions."""

from __future__ import annotations

from collections.abc import Iterator

import cosmos_runtime
from cosmos_export.torch_programs.sessions import load_session


class Engine:
    """A bundle of any format, here one of a PyTorch program. As in `this_runtime`, a request makes its own cache.

    `this_runtime` hashes no files at load, so this one does not either (`trusted`): the bundle has just been made.
    """

    def __init__(self, *, threads: int, context: int, bundle: str) -> None:
        self._session = load_session(bundle, threads=threads, trusted=True)

    def generate(self, prompt: list[int], max_new_tokens: int) -> Iterator[int]:
        return cosmos_runtime.generate(self._session, prompt, max_new_tokens=max_new_tokens)
