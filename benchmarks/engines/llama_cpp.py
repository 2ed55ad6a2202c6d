"""llama.cpp through llama-cpp-python's bindings of its C interface.

The bindings' own `Llama.generate` copies all logits of a batch into numpy; here only the last row is looked at, so that
what is measured is llama.cpp.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import llama_cpp as llama
import numpy as np


class Engine:
    """llama.cpp's defaults (flash attention where it likes, float16 cache); `exact` keeps the cache in float32."""

    def __init__(self, *, threads: int, context: int, gguf: str, exact: bool = False) -> None:
        silence()
        llama.llama_backend_init()
        model_params = llama.llama_model_default_params()
        model_params.n_gpu_layers = 0
        self._model = llama.llama_model_load_from_file(gguf.encode(), model_params)
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {gguf}")
        self._context = llama.llama_init_from_model(self._model, _context_params(threads, context, exact))
        if not self._context:
            raise RuntimeError(f"llama.cpp cannot make a context of {context} tokens")
        self._vocab_size = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self._model))
        self._batch_size = llama.llama_n_batch(self._context)

    def generate(self, prompt: list[int], max_new_tokens: int) -> Iterator[int]:
        llama.llama_memory_clear(llama.llama_get_memory(self._context), False)
        for start in range(0, len(prompt), self._batch_size):
            self._decode(prompt[start : start + self._batch_size])
        for produced in range(1, max_new_tokens + 1):
            token = self._greedy()
            yield token
            if produced < max_new_tokens:
                self._decode([token])

    def _decode(self, tokens: list[int]) -> None:
        array = (llama.llama_token * len(tokens))(*tokens)
        status = llama.llama_decode(self._context, llama.llama_batch_get_one(array, len(tokens)))
        if status != 0:
            raise RuntimeError(f"llama_decode returned {status} for {len(tokens)} tokens")

    def _greedy(self) -> int:
        logits = llama.llama_get_logits_ith(self._context, -1)
        return int(np.ctypeslib.as_array(logits, shape=(self._vocab_size,)).argmax())


def _context_params(threads: int, context: int, exact: bool) -> Any:
    params = llama.llama_context_default_params()
    params.n_ctx = context
    params.n_batch = min(params.n_batch, context)
    params.n_threads = params.n_threads_batch = threads
    if exact:
        params.type_k = params.type_v = llama.GGML_TYPE_F32
    return params


@llama.llama_log_callback
def _on_log(_level: int, _text: bytes, _user_data: object) -> None:
    """Drops what llama.cpp logs; failures come as return values."""


def silence() -> None:
    """Nothing of llama.cpp's on standard error."""
    llama.llama_log_set(_on_log, None)
