"""The engines that are compared: one module each, with a class `Engine`.

    engine = Engine(threads=2, context=512, ...)      # loads the model; `context`: room for so many tokens
    engine.generate(prompt_ids, max_new_tokens)       # an iterator of greedy token ids; starts anew at each call

A module imports its library at its top, and is itself imported by `benchmarks.worker` alone: one process an engine.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol


class Engine(Protocol):
    """What a module's `Engine` can do; made with the keywords `threads`, `context` and its model's own."""

    def generate(self, prompt: list[int], max_new_tokens: int) -> Iterator[int]:
        """Greedy continuation of a prompt; a token is computed when it is asked for (else: `runs_ahead = True`)."""
        ...


@dataclass(frozen=True)
class EngineKind:
    """An engine's title in tables, what has to be importable for it, and the distributions whose versions matter."""

    title: str
    imports: tuple[str, ...]
    distributions: tuple[str, ...]


_TORCH_PROGRAMS = ("cosmos_runtime", "cosmos_export", "torch")

KINDS = {
    "this_runtime": EngineKind("this runtime", ("cosmos_runtime", "onnxruntime"), ("onnxruntime",)),
    "torchscript": EngineKind("this project, TorchScript", _TORCH_PROGRAMS, ("torch",)),
    "pt2": EngineKind("this project, pt2", _TORCH_PROGRAMS, ("torch",)),
    "llama_cpp": EngineKind("llama.cpp", ("llama_cpp",), ("llama-cpp-python",)),
    "genai": EngineKind("onnxruntime-genai", ("onnxruntime_genai",), ("onnxruntime-genai",)),
    "transformers_eager": EngineKind("transformers eager", ("transformers", "torch"), ("transformers", "torch")),
    "openvino_genai": EngineKind("OpenVINO GenAI", ("openvino_genai",), ("openvino-genai",)),
}
OURS = "this_runtime"
# What this project makes. The first of them that takes part in a class is what the class's other variants are paired
# with, and compared to.
OUR_ENGINES = (OURS, "torchscript", "pt2")
