"""The names that other libraries give to the tensors of a Llama, which a Cosmos decoder is: the same blocks in the
same order, query head h reading key/value head h // G, rotate-half rotary, one tied embedding.
"""

from __future__ import annotations

from collections.abc import Iterator

# Cosmos, GGUF and Hugging Face names of a layer's tensors.
LAYER_TENSORS = (
    ("norm1", "attn_norm", "input_layernorm"),
    ("attention.q_proj", "attn_q", "self_attn.q_proj"),
    ("attention.k_proj", "attn_k", "self_attn.k_proj"),
    ("attention.v_proj", "attn_v", "self_attn.v_proj"),
    ("attention.o_proj", "attn_output", "self_attn.o_proj"),
    ("norm2", "ffn_norm", "post_attention_layernorm"),
    ("feed_forward.w1", "ffn_gate", "mlp.gate_proj"),
    ("feed_forward.w2", "ffn_down", "mlp.down_proj"),
    ("feed_forward.w3", "ffn_up", "mlp.up_proj"),
)
TOP_TENSORS = (("tok_embeddings", "token_embd", "model.embed_tokens"), ("norm", "output_norm", "model.norm"))


def tensor_names(layers: int) -> Iterator[tuple[str, str, str]]:
    """(Cosmos, GGUF, Hugging Face) name of every tensor; the tied output projection is the embedding."""
    for names in TOP_TENSORS:
        cosmos, gguf, hugging_face = (f"{name}.weight" for name in names)
        yield cosmos, gguf, hugging_face
    for layer in range(layers):
        for cosmos, gguf, hugging_face in LAYER_TENSORS:
            yield (
                f"layers.{layer}.{cosmos}.weight",
                f"blk.{layer}.{gguf}.weight",
                f"model.layers.{layer}.{hugging_face}.weight",
            )
