"""The decoder against transformers' Llama, which is the same architecture by other hands."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from cosmos_export.checkpoint import Checkpoint
from cosmos_export.config import CosmosAdvancedConfig
from cosmos_export.model.loading import load_decoder, random_checkpoint

transformers = pytest.importorskip("transformers")

# Our names of a layer, and Llama's.
LAYER_NAMES = {
    "attention.q_proj": "self_attn.q_proj",
    "attention.k_proj": "self_attn.k_proj",
    "attention.v_proj": "self_attn.v_proj",
    "attention.o_proj": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "norm1": "input_layernorm",
    "norm2": "post_attention_layernorm",
}


def llama_name(name: str) -> str:
    name = name.replace("tok_embeddings", "embed_tokens")
    for ours, theirs in LAYER_NAMES.items():
        name = name.replace(f".{ours}.", f".{theirs}.")
    return f"model.{name}"


def llama(config: CosmosAdvancedConfig, state: dict[str, Tensor]) -> torch.nn.Module:
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=config.dim,
            num_hidden_layers=config.n_layers,
            num_attention_heads=config.n_heads,
            num_key_value_heads=config.n_kv_heads,
            head_dim=config.head_dim,
            intermediate_size=config.hidden_dim,
            vocab_size=config.vocab_size,
            max_position_embeddings=config.max_sequence_length,
            rms_norm_eps=config.norm_eps,
            rope_theta=config.rope_theta,
            tie_word_embeddings=True,
            attn_implementation="eager",
        )
    )
    missing, unexpected = model.load_state_dict({llama_name(n): t for n, t in state.items()}, strict=False)
    assert (missing, unexpected) in ((["lm_head.weight"], []), ([], []))
    model.tie_weights()
    return model.eval()


def varied(checkpoint: Checkpoint) -> Checkpoint:
    """Weights large enough that heads, positions and norms all matter: fresh ones give nearly uniform attention."""
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for name in checkpoint.names:
        tensor = checkpoint.tensor(name)
        noise = torch.randn(tensor.shape, generator=generator)
        tensors[name] = noise * tensor.shape[1] ** -0.5 if tensor.dim() > 1 else 1 + 0.3 * noise
    return Checkpoint.from_tensors(checkpoint.config, tensors, dict(checkpoint.origin))


@torch.inference_mode()
@pytest.mark.parametrize(
    "changes",
    [
        {"head_dim": 16, "norm_eps": 1e-5},  # 4 heads of 16 beside dim 32
        {"dim": 48, "n_heads": 6, "n_kv_heads": 3, "head_dim": 8, "rope_theta": 500.0, "norm_eps": 1e-2},
    ],
    ids=["head_dim independent of dim", "head_dim is dim / n_heads"],
)
def test_logits_are_those_of_llama(make_config: Callable[..., CosmosAdvancedConfig], changes: dict[str, float]) -> None:
    config = make_config(**changes)
    checkpoint = varied(random_checkpoint(config, name="tiny"))
    theirs = llama(config, {name: checkpoint.tensor(name) for name in checkpoint.names})
    ids = torch.randint(config.vocab_size, (2, 40), generator=torch.Generator().manual_seed(2))
    expected = theirs(ids).logits
    # Llama's norms, softmax and rotary angles are float32 in a float64 model too, so float32 is what can be compared.
    # The exact model lies within float32 rounding of it.
    spread = (expected.max() - expected.min()).item()
    for dtype in (torch.float32, torch.float64):
        logits = load_decoder(checkpoint, dtype=dtype)(ids)
        torch.testing.assert_close(logits.double(), expected.double(), rtol=0, atol=1e-5 * spread)
