"""What is measured, in alternating pairs: A B A B ..., so that a change of the machine's speed meets both sides.

In each class of precision this runtime (or, where it takes no part, the first of this project's other engines) is
paired with every other variant. A pair's two processes are the only ones alive, and take turns: one computes while the
other waits on its pipe.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.engines import KINDS, OUR_ENGINES
from benchmarks.process import EngineFailureError, EngineProcess, Variant

Samples = dict[str, list[float]]  # values of one metric by metric name, in the order measured

# Metrics of which less is better; of the others (tok/s), more.
LOWER_IS_BETTER = ("load_s", "first_token_s", "prefill_short_ms", "prefill_long_ms", "peak_rss", "peak_rss_deep")
# Before a timed run: a short one, so that pages are mapped, buffers made and clocks up.
WARM_UP = (16, 4)
# A process may use this share of one processor while idle before it is called a disturbance.
IDLE_SECONDS, IDLE_LIMIT = 1.0, 0.02


@dataclass(frozen=True)
class Plan:
    """Sizes in tokens, and how often."""

    pairs: int
    threads: int
    first_prompt: int
    short_prompt: int
    long_prompt: int
    new_tokens: int
    deep_context: int
    deep_tokens: int

    @property
    def deep_total(self) -> int:
        """Tokens of the generation that stays open: its context grows by `deep_tokens` a pair."""
        return self.deep_context + 1 + self.deep_tokens * self.pairs

    @property
    def room(self) -> int:
        """Tokens that a process needs room for."""
        return max(self.deep_total, self.long_prompt + 1, self.short_prompt + 1 + self.new_tokens)


FULL = {
    "first_prompt": 16,
    "short_prompt": 128,
    "long_prompt": 512,
    "new_tokens": 128,
    "deep_context": 4096,
    "deep_tokens": 32,
}
QUICK = {
    "first_prompt": 16,
    "short_prompt": 32,
    "long_prompt": 128,
    "new_tokens": 16,
    "deep_context": 256,
    "deep_tokens": 8,
}


@dataclass
class Results:
    """Samples by variant, and ratios by pair of variants."""

    samples: dict[str, Samples] = field(default_factory=dict)
    ratios: dict[tuple[str, str], Samples] = field(default_factory=dict)
    idle: dict[str, float] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def add(self, variant: Variant, values: dict[str, float]) -> None:
        """Files one measurement of a variant."""
        for metric, value in values.items():
            self.samples.setdefault(variant.key, {}).setdefault(metric, []).append(value)

    def add_pair(self, ours: Variant, other: Variant, a: dict[str, float], b: dict[str, float]) -> None:
        """Files a pair: its ratios say how many times better ours is."""
        ratios = self.ratios.setdefault((ours.key, other.key), {})
        for metric in a.keys() & b.keys():
            ratio = b[metric] / a[metric] if metric in LOWER_IS_BETTER else a[metric] / b[metric]
            ratios.setdefault(metric, []).append(ratio)

    def median(self, key: str, metric: str) -> float | None:
        values = self.samples.get(key, {}).get(metric)
        return statistics.median(values) if values else None

    def ratio(self, ours: str, other: str, metric: str) -> dict[str, float] | None:
        values = self.ratios.get((ours, other), {}).get(metric)
        return values and {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}


def base_of(variants: Iterable[Variant]) -> Variant | None:
    """Ours among the variants of a class: what the others are compared to. None where nothing in it is ours."""
    ours = [variant for variant in variants if variant.engine in OUR_ENGINES]
    return min(ours, key=lambda variant: OUR_ENGINES.index(variant.engine), default=None)


def pairs_of(variants: Iterable[Variant]) -> list[list[Variant]]:
    """Ours with each other variant of its class; variants of a class without ours stand alone, and so does ours."""
    by_class: dict[str, list[Variant]] = {}
    for variant in variants:
        by_class.setdefault(variant.precision, []).append(variant)
    groups: list[list[Variant]] = []
    for members in by_class.values():
        base = base_of(members)
        ours = [] if base is None else [base]
        others = [v for v in members if v is not base]
        groups += [[*ours, other] for other in others] or [ours]
    return groups


def prompt(length: int, vocab_size: int, seed: int) -> list[int]:
    """Token ids that mean nothing; the time of a step does not depend on them."""
    generator = random.Random(f"{length} {seed}")
    return [generator.randrange(vocab_size) for _ in range(length)]


class Bench:
    """Runs a plan on groups of one or two variants."""

    def __init__(self, plan: Plan, vocab_size: int, scratch: Path, say: Callable[[str], None]) -> None:
        self.plan, self.results, self._say = plan, Results(), say
        self._vocab_size, self._scratch = vocab_size, scratch

    def run(self, group: list[Variant]) -> None:
        """Everything for one group: fresh processes first, then steady ones. An engine's failure ends the group."""
        self._say("measuring " + " and ".join(variant.key for variant in group))
        try:
            self._alternate(group, self._first_token)
            self._steady([self._process(variant, self.plan.room) for variant in group], [])
        except EngineFailureError as error:
            self._say(f"failed: {error}")
            self.results.failures.append(str(error))

    def _steady(self, waiting: list[EngineProcess], running: list[EngineProcess]) -> None:
        if waiting:
            with waiting[0] as process:
                return self._steady(waiting[1:], [*running, process])
        for process in running:
            self._short_run(process, -1)
        self._watch_idle(running)
        self._alternate(running, self._short_and_long)
        for process in running:
            self._fill(process)
        self._alternate(running, self._deep)
        for process in running:
            status = process.ask("status", distributions=KINDS[process.variant.engine].distributions)
            self.results.add(process.variant, {"peak_rss_deep": status["peak_rss"]})
            self.results.versions |= status["versions"]
        return None

    def _alternate(self, sides: list[Any], measure: Callable[[Any, int], dict[str, float]]) -> None:
        for pair in range(self.plan.pairs):
            values = [measure(side, pair) for side in sides]
            variants = [getattr(side, "variant", side) for side in sides]
            for variant, value in zip(variants, values, strict=True):
                self.results.add(variant, value)
            if len(variants) == 2:
                self.results.add_pair(*variants, *values)

    def _process(self, variant: Variant, room: int) -> EngineProcess:
        log = self._scratch / f"{variant.engine}-{variant.label.replace(' ', '-')}.log"
        return EngineProcess(variant, threads=self.plan.threads, context=room, log=log)

    def _prompt(self, length: int, seed: int) -> list[int]:
        """The same for both sides of a pair, another for each pair: an engine may remember prompts."""
        return prompt(length, self._vocab_size, seed)

    def _first_token(self, variant: Variant, pair: int) -> dict[str, float]:
        """Start of a process to its first token, and the part of it that is loading."""
        length = self.plan.first_prompt
        with self._process(variant, length + 1) as process:
            answer = process.ask("generate", prompt=self._prompt(length, pair), new_tokens=1)
            first_token = time.perf_counter() - process.started
            load = process.loaded["import_s"] + process.loaded["load_s"]
        return {"first_token_s": first_token, "load_s": load, "peak_rss": answer["peak_rss"]}

    def _watch_idle(self, processes: list[EngineProcess]) -> None:
        """Does a process compute while nothing is asked of it? Its threads may have been told to wait by spinning."""
        time.sleep(0.3)
        before = [process.processor_seconds() for process in processes]
        time.sleep(IDLE_SECONDS)
        for process, start in zip(processes, before, strict=True):
            end, key = process.processor_seconds(), process.variant.key
            if start is None or end is None:
                continue
            share = self.results.idle[key] = (end - start) / IDLE_SECONDS
            if share > IDLE_LIMIT:
                self._say(f"{key} uses {share:.0%} of a processor while idle; it disturbs the other side")

    def _short_run(self, process: EngineProcess, seed: int) -> None:
        length, new_tokens = WARM_UP
        process.ask("generate", prompt=self._prompt(length, seed), new_tokens=new_tokens)

    def _short_and_long(self, process: EngineProcess, pair: int) -> dict[str, float]:
        plan = self.plan
        self._short_run(process, pair)
        short_prompt, long_prompt = (self._prompt(n, pair) for n in (plan.short_prompt, plan.long_prompt))
        short = process.ask("generate", prompt=short_prompt, new_tokens=plan.new_tokens + 1)
        long = process.ask("generate", prompt=long_prompt, new_tokens=1)
        return {
            "prefill_short_ms": 1e3 * short["first_s"],
            "decode_tok_s": plan.new_tokens / short["rest_s"],
            "prefill_long_ms": 1e3 * long["first_s"],
        }

    def _fill(self, process: EngineProcess) -> None:
        plan = self.plan
        ids = self._prompt(plan.deep_context, 0)
        begun = process.ask("begin", prompt=ids, new_tokens=1 + plan.deep_tokens * plan.pairs)
        self.results.add(process.variant, {"prefill_deep_s": begun["first_s"]})

    def _deep(self, process: EngineProcess, _pair: int) -> dict[str, float]:
        deep = process.ask("go_on", new_tokens=self.plan.deep_tokens)
        return {"decode_deep_tok_s": (self.plan.deep_tokens - 1) / deep["rest_s"]}
