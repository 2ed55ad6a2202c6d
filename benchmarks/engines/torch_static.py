"""Hugging Face transformers on a GPU with a static cache: eager, or its decoding step compiled into CUDA graphs."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

from benchmarks.hf_export import hf_config
from benchmarks.llama_names import tensor_names
from cosmos_export.checkpoint import Checkpoint


def load_llama(checkpoint: Checkpoint, dtype: torch.dtype, device: str) -> LlamaForCausalLM:
    """The checkpoint's weights in transformers' own model, in evaluation mode."""
    config = LlamaConfig(**{k: v for k, v in hf_config(checkpoint.config).items() if k != "torch_dtype"})
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    names = tensor_names(checkpoint.config.n_layers)
    state = {hf: checkpoint.tensor(cosmos).to(device, dtype) for cosmos, _, hf in names}
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, assign=True)
    with torch.device(device):  # its tables are no weights
        model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model.eval().requires_grad_(False)


class StaticDecoder:
    """Greedy decoding of a batch of equal prompts over a cache of `length` places."""

    def __init__(self, model: LlamaForCausalLM, batch: int, length: int, *, compiled: bool) -> None:
        self._model, self._batch = model, batch
        self._device = model.lm_head.weight.device
        self._cache = StaticCache(config=model.config, max_cache_len=length)
        self._step = torch.compile(self._forward, mode="reduce-overhead", fullgraph=True) if compiled else self._forward

    @torch.inference_mode()
    def prefill(self, prompts: Tensor) -> Tensor:
        """Token ids (B, T) to the next tokens (B, 1)."""
        self._cache.reset()
        return self._forward(prompts, torch.arange(prompts.shape[1], device=self._device))

    @torch.inference_mode()
    def decode(self, tokens: Tensor, start: int, steps: int) -> list[Tensor]:
        """`steps` more tokens (B, 1) each, behind `start` tokens and `tokens`. Nothing waits for the GPU."""
        position, found = torch.tensor([start], device=self._device), []
        for _ in range(steps):
            tokens = self._step(tokens, position).clone()  # a replayed graph writes to the same place again
            found.append(tokens)
            position = position + 1
        return found

    def _forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        logits = self._model(
            tokens,
            position_ids=positions[None],
            cache_position=positions,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits
        return logits[:, -1:].argmax(-1)
