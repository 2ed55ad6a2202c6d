"""Hugging Face transformers on PyTorch in eager mode, with its own cache and its default attention."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from transformers import DynamicCache, LlamaForCausalLM


class Engine:
    """A folder of LlamaForCausalLM in float32."""

    def __init__(self, *, threads: int, context: int, folder: str) -> None:
        torch.set_num_threads(threads)
        self._model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()

    @torch.inference_mode()
    def _next(self, tokens: list[int], cache: DynamicCache) -> int:
        output = self._model(torch.tensor([tokens]), past_key_values=cache, use_cache=True, logits_to_keep=1)
        return int(output.logits[0, -1].argmax())

    def generate(self, prompt: list[int], max_new_tokens: int) -> Iterator[int]:
        cache = DynamicCache(config=self._model.config)
        tokens = prompt
        for _ in range(max_new_tokens):
            token = self._next(tokens, cache)
            yield token
            tokens = [token]
