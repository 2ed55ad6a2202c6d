"""A Cosmos checkpoint as a Hugging Face folder of a Llama: what transformers, the onnxruntime-genai builder and
optimum-intel read. Names change, values don't. Written without transformers, so that it costs nothing to make.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from benchmarks.llama_names import tensor_names
from cosmos_export.checkpoint import Checkpoint
from cosmos_export.config import CosmosAdvancedConfig


def hf_config(config: CosmosAdvancedConfig) -> dict[str, Any]:
    """The contents of `config.json` for LlamaForCausalLM."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": config.dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.hidden_dim,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_sequence_length,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
        "torch_dtype": "float32",
    }


def write_hf_folder(checkpoint: Checkpoint, folder: Path) -> None:
    """Writes config.json, model.safetensors and a tokenizer whose words are the ids, which exporters insist on."""
    folder.mkdir(parents=True)
    names = tensor_names(checkpoint.config.n_layers)
    tensors = {hf: checkpoint.tensor(cosmos).float().contiguous() for cosmos, _, hf in names}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    _write_json(folder / "config.json", hf_config(checkpoint.config))
    _write_json(folder / "generation_config.json", {"do_sample": False, "eos_token_id": 0, "bos_token_id": 0})
    _write_tokenizer(folder, checkpoint.config.vocab_size)


def _write_tokenizer(folder: Path, vocab_size: int) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    tokenizer = Tokenizer(WordLevel({str(i): i for i in range(vocab_size)}, unk_token="0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    words = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "0", "eos_token": "0", "pad_token": "0"}
    _write_json(folder / "tokenizer_config.json", words)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
