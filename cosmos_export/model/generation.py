"""Generation with the eager model: plain and slow, one whole forward pass a token. Bundles generate with a cache.

B  batch    T  tokens of a prompt    N  tokens so far    V  vocab_size
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cosmos_export.errors import PromptError
from cosmos_export.model.token_ids import check_token_ids
from cosmos_runtime import Sampling, quoted, sample

if TYPE_CHECKING:
    from cosmos_export.config import CosmosAdvancedConfig
    from cosmos_export.model.cosmos import CosmosAdvancedModel

PADDING = 0  # the id that fills a row after its end


@dataclass
class _Row:
    """A prompt and its answer so far."""

    tokens: list[int]
    prompt_length: int
    sampling: Sampling
    finish_reason: str | None = None
    steps: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rng = self.sampling.generator()

    def take(self, logits: Tensor, report: dict[str, Any], stop_ids: Sequence[int]) -> None:
        """Chooses the next token from logits (V,), unless the row is blocked."""
        self.steps.append(report)
        if report.get("output_blocked"):
            self.finish_reason = "blocked"
            return
        token = sample(logits.double().cpu().numpy(), self.tokens, self.sampling, self.rng)
        if token in stop_ids:
            self.finish_reason = "stop"
        else:
            self.tokens.append(token)

    def report(self) -> dict[str, Any]:
        return {
            "num_tokens_generated": len(self.tokens) - self.prompt_length,
            "finish_reason": self.finish_reason,
            "generation_steps": self.steps,
        }


def generate(
    model: CosmosAdvancedModel,
    input_ids: Tensor,
    max_new_tokens: int | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float | None = None,
    *,
    seed: int | None = None,
    stop_ids: Sequence[int] = (),
    **flags: bool,
) -> tuple[Tensor, dict[str, Any] | list[dict[str, Any]]]:
    """Prompts (B, T) with their answers (B, N), and what is known of them: a dict for one row, else a list.

    Options that are left out are `config.generation`'s; `temperature=0` is greedy, and a `seed` is every row's. `flags`
    are the model's (`use_reasoning`, ...). A row ends when it is blocked ("blocked"), at one of `stop_ids`, which is
    then not part of it ("stop"), after `max_new_tokens` ("length") or at `max_sequence_length` ("context"); what
    follows its end is padded with 0. Its dict holds `num_tokens_generated`, `finish_reason` and `generation_steps`,
    the diagnostics of each step. The working memory lasts from the first token to the last.
    Raises PromptError for prompts or a length that do not fit, InputError for a sampling option out of range.
    """
    most = model.config.generation.max_tokens if max_new_tokens is None else max_new_tokens
    room = _room(model.config, input_ids, most)
    sampling = _sampling(model.config, temperature, top_k, top_p, repetition_penalty, seed)
    rows = [_Row(ids, len(ids), sampling) for ids in input_ids.tolist()]
    for logits, reports in _steps(model, rows, min(most, room), flags):
        for row, row_logits, report in zip(rows, logits, reports, strict=True):
            if row.finish_reason is None:
                row.take(row_logits, report, stop_ids)
    for row in rows:
        row.finish_reason = row.finish_reason or ("length" if most <= room else "context")
    longest = max(len(row.tokens) for row in rows)
    answers = torch.tensor([_padded(row.tokens, longest) for row in rows], device=input_ids.device)
    summaries = [row.report() for row in rows]
    return answers, summaries[0] if len(rows) == 1 else summaries


def _steps(
    model: CosmosAdvancedModel, rows: Sequence[_Row], most: int, flags: dict[str, bool]
) -> Iterator[tuple[Tensor, list[dict[str, Any]]]]:
    """Logits (B, V) and reports (B) of the next position, up to `most` times; rows that ended are carried along."""
    memory = model.new_memory(len(rows), capacity=most)
    device = model.tok_embeddings.weight.device
    for step in range(most):
        if all(row.finish_reason for row in rows):
            return
        length = rows[0].prompt_length + step
        ids = torch.tensor([_padded(row.tokens, length) for row in rows], device=device)
        logits, reports = model(ids, return_diagnostics=True, memory=memory, **flags)
        yield logits[:, -1], reports if isinstance(reports, list) else [reports]


def _padded(tokens: list[int], length: int) -> list[int]:
    return tokens + [PADDING] * (length - len(tokens))


def _room(config: CosmosAdvancedConfig, input_ids: Tensor, max_new_tokens: int) -> int:
    """How many tokens the model has room for after these prompts."""
    check_token_ids(input_ids, config.vocab_size)
    if not isinstance(max_new_tokens, int) or isinstance(max_new_tokens, bool) or max_new_tokens < 0:
        raise PromptError(f"max_new_tokens must be 0 or more, got {quoted(max_new_tokens)}")
    room = config.max_sequence_length - input_ids.shape[1]
    if room < 0:
        raise PromptError(
            f"prompts of {input_ids.shape[1]} tokens, and max_sequence_length is {config.max_sequence_length}"
        )
    return room


def _sampling(
    config: CosmosAdvancedConfig,
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    repetition_penalty: float | None,
    seed: int | None,
) -> Sampling:
    given: dict[str, Any] = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "repetition_penalty": repetition_penalty,
    }
    chosen = {n: getattr(config.generation, n) if value is None else value for n, value in given.items()}
    return Sampling(**chosen, seed=seed).seeded()
