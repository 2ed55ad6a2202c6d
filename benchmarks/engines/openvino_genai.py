"""OpenVINO GenAI on a folder that optimum-intel exported."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator

import numpy as np
import openvino
import openvino_genai


class Engine:
    """An LLMPipeline on the CPU. It pushes tokens to a streamer, from a thread that does not wait for the reader."""

    runs_ahead = True

    def __init__(self, *, threads: int, context: int, folder: str, precision_hint: str | None = None) -> None:
        properties = {"INFERENCE_NUM_THREADS": threads}
        if precision_hint:
            properties["INFERENCE_PRECISION_HINT"] = precision_hint
        self._pipeline = openvino_genai.LLMPipeline(folder, "CPU", **properties)

    def generate(self, prompt: list[int], max_new_tokens: int) -> Iterator[int]:
        streamer = _Queue()
        config = openvino_genai.GenerationConfig(max_new_tokens=max_new_tokens, ignore_eos=True, do_sample=False)
        ids = openvino.Tensor(np.array([prompt], dtype=np.int64))
        inputs = openvino_genai.TokenizedInputs(ids, openvino.Tensor(np.ones((1, len(prompt)), dtype=np.int64)))
        thread = threading.Thread(target=self._pipeline.generate, args=(inputs, config, streamer), daemon=True)
        thread.start()
        for _ in range(max_new_tokens - 1):
            yield streamer.tokens.get()
        last = streamer.tokens.get()
        thread.join()
        yield last


class _Queue(openvino_genai.StreamerBase):
    """Takes tokens as they come."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens: queue.SimpleQueue[int] = queue.SimpleQueue()

    def write(self, token: int | list[int]) -> openvino_genai.StreamingStatus:
        for one in token if isinstance(token, list) else [token]:
            self.tokens.put(one)
        return openvino_genai.StreamingStatus.RUNNING

    def end(self) -> None:
        """Nothing is held back."""
