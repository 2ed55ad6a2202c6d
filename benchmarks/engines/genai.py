"""onnxruntime-genai, on one of this project's bundles or on a folder of its own model builder.

The library is imported by `Engine`, not by the module: what writes its configuration does not need it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

# Name of the graph that `adapt_bundle` puts beside the bundle's own.
GRAPH = "genai.onnx"


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


def genai_config(model: Mapping[str, Any], *, graph: str = GRAPH, threads: int | None = None) -> dict[str, Any]:
    """The contents of genai_config.json for a decoder graph; `model` is the manifest's section `model`."""
    return {
        "model": {
            "type": "llama",
            "bos_token_id": 0,
            "eos_token_id": 0,
            "pad_token_id": 0,
            "vocab_size": model["vocab_size"],
            "context_length": model["max_sequence_length"],
            "decoder": _decoder(model, graph, threads),
        },
        "search": {
            "do_sample": False,
            "max_length": model["max_sequence_length"],
            "past_present_share_buffer": True,
            "top_k": 1,
        },
    }


def _decoder(model: Mapping[str, Any], graph: str, threads: int | None) -> dict[str, Any]:
    return {
        "filename": graph,
        "session_options": {} if threads is None else {"intra_op_num_threads": threads},
        "hidden_size": model["dim"],
        "head_size": model["head_dim"],
        "num_attention_heads": model["n_heads"],
        "num_key_value_heads": model["n_kv_heads"],
        "num_hidden_layers": model["n_layers"],
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
    }


def adapt_bundle(folder: Path, threads: int) -> None:
    """Makes a bundle's copy open in onnxruntime-genai: adds genai_config.json and a second graph file, no weights.

    onnxruntime-genai allocates the logits itself: (batch, new tokens, V), unless the graph declares its second axis to
    be 1, for logits of the last position alone. The bundle's own graph declares it free, so that a caller may ask for
    more positions (`logit_offsets`, an input with a default); the second graph has that default as a constant.
    """
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    spec = manifest["graphs"]["decoder"]
    if not (folder / "genai_config.json").is_file():
        _write_last_position_graph(folder / spec["file"], folder / GRAPH)
        config = genai_config(manifest["model"], threads=threads)
        (folder / "genai_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    set_threads(folder, threads)


def _write_last_position_graph(source: Path, target: Path) -> None:
    import onnx

    model = onnx.load(source, load_external_data=False)
    defaults = {initializer.name for initializer in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in defaults]
    del model.graph.input[:]
    model.graph.input.extend(inputs)
    logits = next(value for value in model.graph.output if value.name == "logits")
    logits.type.tensor_type.shape.dim[1].dim_value = 1
    onnx.save(model, target)


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
