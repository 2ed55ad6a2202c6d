"""Lets onnxruntime-genai open a decoder bundle: its configuration file, and the graph in the form that it expects.

onnxruntime-genai allocates the logits itself: one position for each new token, unless the graph declares that there is
only one (seen with 0.18). The bundle's own graph declares the number free, because a caller may ask for more positions;
the second graph has the default as a constant. Both read the one file of weights.
https://onnxruntime.ai/docs/genai/reference/config.html
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx

from cosmos_export.config import CosmosAdvancedConfig
from cosmos_export.onnx.signature import ATTENTION_MASK, DEFAULT_INPUTS, INPUT_IDS, LOGITS, PAST, PRESENT

GRAPH_FILE, CONFIG_FILE = "genai.onnx", "genai_config.json"
END_TOKEN = 0


def write_genai(folder: Path, decoder_file: str, config: CosmosAdvancedConfig) -> None:
    """Writes genai_config.json and its graph into a bundle's folder, beside the decoder graph `decoder_file`."""
    onnx.save(_last_position_only(onnx.load(folder / decoder_file, load_external_data=False)), folder / GRAPH_FILE)
    text = json.dumps(genai_config(config), indent=1)
    (folder / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")


def genai_config(config: CosmosAdvancedConfig) -> dict[str, Any]:
    """The contents of genai_config.json.

    onnxruntime-genai ends a generation at a token of the vocabulary, whatever the configuration says. A Cosmos model
    has no such token; `END_TOKEN` is named, and a generation that reaches it ends there.
    """
    return {
        "model": {
            "type": "llama",
            "bos_token_id": END_TOKEN,
            "eos_token_id": END_TOKEN,
            "pad_token_id": END_TOKEN,
            "vocab_size": config.vocab_size,
            "context_length": config.max_sequence_length,
            "decoder": {
                "filename": GRAPH_FILE,
                "session_options": {},
                "hidden_size": config.dim,
                "head_size": config.head_dim,
                "num_attention_heads": config.n_heads,
                "num_key_value_heads": config.n_kv_heads,
                "num_hidden_layers": config.n_layers,
                "inputs": {
                    "input_ids": INPUT_IDS,
                    "attention_mask": ATTENTION_MASK,
                    "past_key_names": PAST.format(layer="%d", part="key"),
                    "past_value_names": PAST.format(layer="%d", part="value"),
                },
                "outputs": {
                    "logits": LOGITS,
                    "present_key_names": PRESENT.format(layer="%d", part="key"),
                    "present_value_names": PRESENT.format(layer="%d", part="value"),
                },
            },
        },
        "search": {
            "do_sample": False,
            "max_length": config.max_sequence_length,
            "past_present_share_buffer": True,
            # It refuses a top_k beyond the vocabulary.
            "top_k": min(config.generation.top_k, config.vocab_size),
            "top_p": config.generation.top_p,
            "temperature": config.generation.temperature,
        },
    }


def _last_position_only(model: onnx.ModelProto) -> onnx.ModelProto:
    """The decoder graph without the inputs that may be left out, and with one position of logits declared."""
    inputs = [value for value in model.graph.input if value.name not in DEFAULT_INPUTS]
    del model.graph.input[:]
    model.graph.input.extend(inputs)
    logits = next(value for value in model.graph.output if value.name == LOGITS)
    logits.type.tensor_type.shape.dim[1].Clear()
    logits.type.tensor_type.shape.dim[1].dim_value = 1
    return model
