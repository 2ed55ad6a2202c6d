"""First of all: do the engines compute the same model? The same greedy tokens in float32, or no comparison."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.process import EngineProcess, Variant
from cosmos_export.checkpoint import Checkpoint
from cosmos_export.model.decoder import CosmosDecoder
from cosmos_export.model.loading import load_decoder
from cosmos_runtime import Tokenizer

PROMPTS = ("ROMEO:\n", "First Citizen:\nBefore we proceed", "What say you")
NEW_TOKENS = 64
# Below this difference of the two highest logits float32 may choose either token.
NEAR_TIE = 1e-3


@dataclass(frozen=True)
class Verdict:
    """One engine on one prompt: how many tokens agree, and the reference's top-2 margin where the first differs."""

    variant: str
    prompt: str
    equal_tokens: int
    of: int
    margin: float | None

    @property
    def passed(self) -> bool:
        return self.margin is None or self.margin < NEAR_TIE

    def __str__(self) -> str:
        if self.margin is None:
            return f"{self.variant}: {self.of} of {self.of} tokens equal"
        what = "a near tie" if self.passed else "DIFFERENT"
        return (
            f"{self.variant}: differs at token {self.equal_tokens}, where the top-2 margin is {self.margin:.2g}: {what}"
        )

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "passed": self.passed}


def prove(
    checkpoint: Checkpoint, variants: list[Variant], scratch: Path, threads: int, say: Callable[[str], None]
) -> list[Verdict]:
    """Compares every variant's tokens with the float64 eager model's, prompt by prompt."""
    assert checkpoint.tokenizer is not None
    torch.set_num_threads(1)  # on tensors this small threads only wait for each other
    tokenizer = Tokenizer.from_file(checkpoint.tokenizer)
    prompts = {text: tokenizer.encode(text) for text in PROMPTS}
    model = load_decoder(checkpoint, dtype=torch.float64)
    expected = {text: _greedy(model, ids) for text, ids in prompts.items()}
    verdicts = []
    for variant in variants:
        context = NEW_TOKENS + max(map(len, prompts.values()))
        with EngineProcess(variant, threads=threads, context=context, log=scratch / "proof.log") as process:
            for text, ids in prompts.items():
                tokens = process.ask("generate", prompt=ids, new_tokens=NEW_TOKENS)["tokens"]
                verdicts.append(_judge(model, variant, text, ids, expected[text], tokens))
                say(str(verdicts[-1]))
    return verdicts


@torch.inference_mode()
def _greedy(model: CosmosDecoder, prompt: list[int]) -> list[int]:
    ids = list(prompt)
    for _ in range(NEW_TOKENS):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


def _judge(
    model: CosmosDecoder, variant: Variant, text: str, prompt: list[int], expected: list[int], tokens: list[int]
) -> Verdict:
    pairs = enumerate(zip(expected, tokens, strict=True))
    first = next((i for i, (a, b) in pairs if a != b), None)
    if first is None:
        return Verdict(variant.key, text, NEW_TOKENS, NEW_TOKENS, None)
    margin = _margin(model, prompt + expected[:first])
    return Verdict(variant.key, text, first, NEW_TOKENS, margin)


@torch.inference_mode()
def _margin(model: CosmosDecoder, ids: list[int]) -> float:
    highest, second = model(torch.tensor([ids]))[0, -1].topk(2).values.tolist()
    return float(highest - second)
