"""This project's runtime on one of its bundles."""

from __future__ import annotations

from collections.abc import Iterator

import cosmos_runtime


class Engine:
    """The public API and nothing else. The cache is made for each request, so `context` has no use here."""

    def __init__(self, *, threads: int, context: int, bundle: str) -> None:
        self._session = cosmos_runtime.load(bundle, threads=threads)

    def generate(self, prompt: list[int], max_new_tokens: int) -> Iterator[int]:
        return cosmos_runtime.generate(self._session, prompt, max_new_tokens=max_new_tokens)
