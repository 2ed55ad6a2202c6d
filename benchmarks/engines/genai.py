"""onnxruntime-genai, on one of this project's bundles or on a folder of its own model builder.

The library is imported by `Engine`, not by the module: what sets the threads in its configuration does not need it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path


class Engine:
    """A folder with genai_config.json; the number of threads stands in that file (`set_threads`)."""

    def __init__(self, *, threads: int, context: int, folder: str) -> None:
        import onnxruntime_genai

        check_threads(Path(folder), threads)
        self._genai = onnxruntime_genai
        self._model = onnxruntime_genai.Model(folder)

    def generate(self, prompt: list[int], max_new_tokens: int) -> Iterator[int]:
        params = self._genai.GeneratorParams(self._model)
        length = len(prompt) + max_new_tokens
        params.set_search_options(do_sample=False, max_length=length, min_length=length)
        generator = self._genai.Generator(self._model, params)
        generator.append_tokens(prompt)
        for _ in range(max_new_tokens):
            generator.generate_next_token()
            yield int(generator.get_next_tokens()[0])


def set_threads(folder: Path, threads: int) -> None:
    """Writes the number of threads into a folder's genai_config.json."""
    path = folder / "genai_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["model"]["decoder"].setdefault("session_options", {})["intra_op_num_threads"] = threads
    path.write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def check_threads(folder: Path, threads: int) -> None:
    """Raises RuntimeError where a folder's genai_config.json asks for another number of threads."""
    config = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))
    given = config["model"]["decoder"].get("session_options", {}).get("intra_op_num_threads")
    if given != threads:
        raise RuntimeError(f"{folder}: intra_op_num_threads is {given}, expected {threads}")
