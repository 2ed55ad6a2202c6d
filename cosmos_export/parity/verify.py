"""The comparison itself: a bundle's bytes, run by the runtime, against the eager model in float64."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cosmos_export.checkpoint import Checkpoint
from cosmos_export.parity.arithmetic import arithmetic_of, float32_activations
from cosmos_export.parity.calibrated import strayed, with_stored_levels
from cosmos_export.parity.calls import build_sequences
from cosmos_export.parity.cases import Case, Skipped, build_cases
from cosmos_export.parity.compared_logits import case_result
from cosmos_export.parity.effort import Effort as Effort
from cosmos_export.parity.gates import QUALITY_GATES, Arithmetic
from cosmos_export.parity.heads_reference import HeadsReference
from cosmos_export.parity.heads_verify import compare_calls
from cosmos_export.parity.layered_report import too_large, verify_layers
from cosmos_export.parity.quality import measure_quality, rows_of_text
from cosmos_export.parity.reference import EagerReference
from cosmos_export.parity.report import CaseResult, ParityReport
from cosmos_export.parity.reporting import capabilities_of, report_of
from cosmos_export.parity.stepwise import (
    LAST_TOKENS,
    last_logits,
    ragged_case,
    ragged_logits,
    stepwise_cases,
    stepwise_logits,
)
from cosmos_export.parity.stored import compare_stored
from cosmos_export.parity.stored_programs import compare_program
from cosmos_export.progress import Progress, Silent
from cosmos_export.recipe import ExportRecipe
from cosmos_export.torch_programs.sessions import load_session
from cosmos_runtime import DECODER, ONNX, SAMPLER, Bundle, Session, load


@dataclass(frozen=True)
class _Trial:
    """A case, and how the bundle computes its logits, from position `since` on."""

    case: Case
    run: Callable[[Session], NDArray]
    since: int = 0


def verify_bundle(
    folder: str | Path,
    checkpoint: Checkpoint,
    *,
    causal: bool = True,
    effort: Effort = Effort.FULL,
    provider: str = "cpu",
    text: str | None = None,
    trusted: bool = False,
    progress: Progress | None = None,
) -> ParityReport:
    """Compares a bundle with the model of `checkpoint`; the report's `passed` is the verdict.

    A quantised bundle is also measured against the unrounded model, on `text` or on text that it writes itself; with
    `text` any bundle is. A PyTorch program is loaded when its files have the manifest's hashes, or are `trusted`.
    Raises the runtime's errors when the bundle cannot be run at all, CheckpointError when the checkpoint does not load.
    """
    progress = progress or Silent()
    bundle = Bundle.open(folder)
    if effort is Effort.LAYERS or too_large(bundle.manifest, checkpoint, progress):
        return verify_layers(bundle, checkpoint, causal=causal, provider=provider, text=text, progress=progress)
    session = load_session(bundle, provider=provider, trusted=trusted)
    manifest = session.manifest
    recipe = ExportRecipe.from_manifest(manifest.recipe)
    progress.stage("Comparing stored tensors")
    models = [spec for name, spec in manifest.graphs.items() if not name.startswith(f"{SAMPLER}.")]  # those have none
    graphs = [session.bundle.file(spec.file) for spec in models]
    heads = capabilities_of(manifest)
    if recipe.calibration is not None and not checkpoint.calibrated:  # an export has just made them, and knows better
        checkpoint = with_stored_levels(checkpoint, graphs[0], recipe, heads)
    compare_file = compare_stored if recipe.format == ONNX else compare_program
    stored = [compare_file(graph, checkpoint, recipe, heads) for graph in graphs]
    if recipe.calibration is not None:
        far = list(strayed(checkpoint, recipe, heads))
        stored = [tensors.with_calibrated(len(checkpoint.calibrated), far) for tensors in stored]
    compare = _decoder_results if heads is None else partial(_heads_results, heads)
    with _sessions(session, recipe, provider) as sessions:
        compared = compare(sessions, checkpoint, recipe, causal, effort is Effort.QUICK, progress)
    quality = None
    if recipe.precision in QUALITY_GATES or text is not None:
        progress.stage("Comparing with the model before rounding")
        rows = None if text is None else rows_of_text(session, text)
        quality = measure_quality(session, checkpoint, rows, causal=causal)
    for warning in compared.warnings:
        progress.note(warning)
    return report_of(
        manifest,
        checkpoint,
        provider,
        stored=stored,
        cases=compared.results,
        skipped=tuple(compared.skipped),
        quality=quality,
        warnings=compared.warnings,
    )


@dataclass(frozen=True)
class _Compared:
    """What the cases gave, which were not run, and what there is to be wary of."""

    results: list[CaseResult]
    skipped: list[Skipped]
    warnings: tuple[str, ...] = ()


def _decoder_results(
    sessions: dict[Arithmetic, Session],
    checkpoint: Checkpoint,
    recipe: ExportRecipe,
    causal: bool,
    quick: bool,
    progress: Progress,
) -> _Compared:
    progress.stage("Loading the float64 reference")
    reference = EagerReference(recipe.as_computed(checkpoint), recipe, causal=causal)
    cases, skipped = build_cases(checkpoint.config, quick=quick)
    trials = [_Trial(case, lambda s, c=case: s.logits(c.input_ids)) for case in cases]  # type: ignore[misc]
    session = next(iter(sessions.values()))
    if DECODER in session.manifest.graphs:
        trials = [*_with_last_tokens(trials, checkpoint.config.max_sequence_length), *_stepwise(session)]
    progress.stage("Comparing logits with float64")
    results = _run(sessions, trials, reference, progress)
    return _Compared(results, skipped, _warnings(recipe, reference, cases))


def _heads_results(
    capabilities: Sequence[str],
    sessions: dict[Arithmetic, Session],
    checkpoint: Checkpoint,
    recipe: ExportRecipe,
    causal: bool,
    quick: bool,
    progress: Progress,
) -> _Compared:
    progress.stage("Loading the float64 reference")
    reference = HeadsReference(checkpoint, recipe, capabilities, causal=causal)
    graphs = list(next(iter(sessions.values())).manifest.graphs)
    sequences, skipped = build_sequences(checkpoint.config, capabilities, graphs, quick=quick)
    progress.stage("Comparing logits and scores with float64")
    return _Compared(compare_calls(sessions, sequences, reference, progress), skipped)


def _warnings(recipe: ExportRecipe, reference: EagerReference, cases: list[Case]) -> tuple[str, ...]:
    """Where float16 may overflow: on the longest case of one row, and on the extreme ids."""
    if recipe.activations != "float16":
        return ()
    rows = [max((c.input_ids for c in cases if len(c.input_ids) == 1), key=np.size), cases[-1].input_ids]
    near = reference.near_overflow(rows)
    return tuple(f"float16 may overflow on another text: {activation}; cuda-bf16 has the range" for activation in near)


@contextlib.contextmanager
def _sessions(session: Session, recipe: ExportRecipe, provider: str) -> Iterator[dict[Arithmetic, Session]]:
    """The session as it is and, where it rounds activations, the same bytes without that."""
    arithmetic = arithmetic_of(recipe)
    if arithmetic is not Arithmetic.INT8_ACTIVATIONS or recipe.format != ONNX:
        yield {arithmetic: session}
        return
    with float32_activations(session.bundle.path) as copy:
        yield {Arithmetic.FLOAT32: load(copy, provider=provider), arithmetic: session}


def _with_last_tokens(trials: list[_Trial], limit: int) -> Iterator[_Trial]:
    """Behind a row as long as the model allows, the same row with its last tokens decoded one by one."""
    for trial in trials:
        yield trial
        ids = trial.case.input_ids
        if ids.shape == (1, limit) and limit > 2 * LAST_TOKENS:
            case = Case(f"{trial.case.name}, the last {LAST_TOKENS} one by one", ids)
            yield _Trial(case, lambda s, c=case: last_logits(s, c.input_ids), since=limit - LAST_TOKENS - 1)  # type: ignore[misc]


def _stepwise(session: Session) -> list[_Trial]:
    vocab_size, limit = session.manifest.vocab_size, session.manifest.max_sequence_length
    alone = [
        _Trial(case, lambda s, c=case, n=sizes: stepwise_logits(s, c.input_ids, n))  # type: ignore[misc]
        for case, sizes in stepwise_cases(vocab_size, limit)
    ]
    case, prompts = ragged_case(vocab_size, limit)
    together = _Trial(case, lambda s: ragged_logits(s, case.input_ids, prompts), since=max(prompts))
    return [*alone, together] if max(prompts) < case.input_ids.shape[1] else alone


def _run(
    sessions: dict[Arithmetic, Session], trials: list[_Trial], reference: EagerReference, progress: Progress
) -> list[CaseResult]:
    """Every trial on every session, sorted by session; the reference is computed once a row of trials of equal ids."""
    results: dict[Arithmetic, list[CaseResult]] = {arithmetic: [] for arithmetic in sessions}
    done = 0
    for _, same in itertools.groupby(trials, key=lambda trial: id(trial.case.input_ids)):
        progress.update(done, len(trials))
        group = list(same)
        ids = group[0].case.input_ids
        exact = reference.exact(ids)
        for arithmetic, session in sessions.items():
            eager = reference.eager(ids, arithmetic)
            for trial in group:
                part = slice(trial.since, None)
                logits = trial.run(session)
                compared = case_result(trial.case.name, ids.shape, arithmetic, logits, exact[:, part], eager[:, part])
                results[arithmetic].append(compared)
        done += len(group)
    progress.update(done, len(trials))
    return [result for per_session in results.values() for result in per_session]
