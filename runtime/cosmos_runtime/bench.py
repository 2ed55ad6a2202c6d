"""How fast a loaded model is here: load, prefill, decode, and what the host adds to the graph's own time."""

import statistics
import sys
import time
from dataclasses import dataclass

import numpy as np

from cosmos_runtime.arrays import TokenIds
from cosmos_runtime.continuation import Continuation
from cosmos_runtime.decoding import new_decoder
from cosmos_runtime.errors import InputError
from cosmos_runtime.generation import Generation, new_continuation
from cosmos_runtime.heads import Diagnosis
from cosmos_runtime.session import Session


@dataclass(frozen=True)
class Run:
    """Seconds of one generation: its prompt, then each new token but the first, and the graph's part of each."""

    prefill_s: float
    token_s: list[float]
    graph_s: list[float]


@dataclass(frozen=True)
class Result:
    """Medians over the runs; what is said of a token, over all their tokens. The host's part is sampling and
    bookkeeping."""

    prompt_tokens: int
    new_tokens: int
    repeat: int
    prefill_ms: float
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    ms_per_token_median: float
    ms_per_token_min: float
    ms_per_token_max: float
    host_us_per_token: float
    host_share: float
    peak_memory_mb: float | None


def measure(session: Session, *, prompt_tokens: int, new_tokens: int, repeat: int, seed: int = 0) -> Result:
    """Generate greedily from random prompts, once to warm up and then `repeat` times.

    Raises: InputError where prompt and answer are longer than the model's sequences.
    """
    most = session.manifest.max_sequence_length
    if prompt_tokens + new_tokens > most:
        raise InputError(
            f"bench: expected at most {most} tokens of prompt and answer, got {prompt_tokens} + {new_tokens}; "
            f"ask for fewer"
        )
    rng = np.random.default_rng(seed)
    prompts = rng.integers(0, session.manifest.vocab_size, (repeat + 1, prompt_tokens))
    return summarise(prompt_tokens, new_tokens, [_run(session, prompt, new_tokens) for prompt in prompts][1:])


def summarise(prompt_tokens: int, new_tokens: int, runs: list[Run]) -> Result:
    """The figures of some runs."""
    prefill = statistics.median(run.prefill_s for run in runs)
    tokens = [seconds for run in runs for seconds in run.token_s]
    token = statistics.median(tokens)
    host = statistics.median(t - g for run in runs for t, g in zip(run.token_s, run.graph_s, strict=True))
    return Result(
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        repeat=len(runs),
        prefill_ms=1e3 * prefill,
        prefill_tokens_per_second=prompt_tokens / prefill,
        decode_tokens_per_second=statistics.median(len(run.token_s) / sum(run.token_s) for run in runs),
        ms_per_token_median=1e3 * token,
        ms_per_token_min=1e3 * min(tokens),
        ms_per_token_max=1e3 * max(tokens),
        host_us_per_token=1e6 * host,
        host_share=host / token,
        peak_memory_mb=peak_memory_mb(),
    )


def peak_memory_mb() -> float | None:
    """The most memory (resident, MB) that this process had so far; None where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


class _Heedless(Continuation):
    """A step that is blocked takes as long as any other."""

    def examine(self, diagnosis: Diagnosis | None) -> None:
        """Goes on, whatever capability heads found."""


def _run(session: Session, prompt: TokenIds, new_tokens: int) -> Run:
    continuation = new_continuation(
        session, prompt, max_new_tokens=new_tokens, min_new_tokens=0, sampling=None, stop_ids=()
    )
    decoder = new_decoder(session, continuation.capacity, continuation.most_calls, diagnostics=False)
    heedless = _Heedless(continuation.prompt_ids, continuation.limits, continuation.sampling)
    generation = Generation(heedless, lambda: decoder)
    prefill_s = _timed_step(generation)
    token_s, graph_s = [], []
    for _ in range(new_tokens - 1):
        before = decoder.graph_seconds
        token_s.append(_timed_step(generation))
        graph_s.append(decoder.graph_seconds - before)
    return Run(prefill_s, token_s, graph_s)


def _timed_step(generation: Generation) -> float:
    start = time.perf_counter()
    next(generation)
    return time.perf_counter() - start
