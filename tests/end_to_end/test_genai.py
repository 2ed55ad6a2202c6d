"""The same bundle folder opens in onnxruntime-genai and generates the same tokens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cosmos_export.onnx.genai import END_TOKEN
from cosmos_export.pipeline import ExportedBundle
from cosmos_runtime import generate, load

genai = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")


def greedy(folder: Path, prompt: list[int], new_tokens: int) -> list[int]:
    """What onnxruntime-genai generates with the folder as it is."""
    parameters = genai.GeneratorParams(model := genai.Model(str(folder)))
    parameters.set_search_options(do_sample=False, max_length=len(prompt) + new_tokens)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(prompt)
    tokens = []
    while not generator.is_done():
        generator.generate_next_token()
        tokens.append(int(generator.get_next_tokens()[0]))
    return tokens


@pytest.mark.parametrize("prompt", [[5], [7, 1, 90, 3], list(range(20))], ids=len)
def test_greedy_tokens_are_the_same(small_decoder: ExportedBundle, prompt: list[int]) -> None:
    ours = list(generate(load(small_decoder.path), prompt, max_new_tokens=24))
    until_end = ours[: ours.index(END_TOKEN) + 1] if END_TOKEN in ours else ours  # the other library ends there
    assert greedy(small_decoder.path, prompt, 24) == until_end
    assert len(until_end) > 8


def test_the_second_graph_reads_the_one_file_of_weights(small_decoder: ExportedBundle) -> None:
    files = small_decoder.manifest.files
    assert (
        json.loads((small_decoder.path / "genai_config.json").read_text())["model"]["decoder"]["filename"]
        == "genai.onnx"
    )
    assert files["genai.onnx"].size < 1.1 * files["model.onnx"].size
    assert [name for name in files if name.endswith(".data")] == ["model.onnx.data"]
