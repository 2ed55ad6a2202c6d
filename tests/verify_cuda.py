"""`make verify-cuda`: on an NVIDIA GPU, every test that needs one, and the proof of the presets and the demo with the
recipes for GPUs. What was run and found goes to benchmarks/results/cuda_tests.json, bundles to build/cuda.

It wants the GPU for itself: some tests take all of its memory.

    python -m tests.verify_cuda [--only one-billion] [--out RESULTS.json]
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import click
import numpy as np
import torch

from benchmarks.cuda_decode import versions
from benchmarks.report import commit, environment
from cosmos_export.checkpoint import Checkpoint
from cosmos_export.model.loading import load_decoder, preset_checkpoint
from cosmos_export.parity.arithmetic import arithmetic_of
from cosmos_export.parity.compared_logits import case_result
from cosmos_export.parity.gates import Verdict
from cosmos_export.parity.report import CaseResult, ParityReport
from cosmos_export.parity.stepwise import LAST_TOKENS, last_logits
from cosmos_export.parity.verify import Effort, verify_bundle
from cosmos_export.pipeline import export_bundle
from cosmos_export.recipe import ExportRecipe
from cosmos_export.resources import demo_checkpoint
from cosmos_runtime import CAPABILITIES, load
from tests.end_to_end.test_cuda import RECIPES

TESTS = (
    "tests/end_to_end/test_cuda.py",
    "tests/end_to_end/test_device_loop.py",
    "tests/export/test_samplers.py",
    "tests/runtime/test_runtime_kernels.py",
    "tests/runtime/test_sampling_kernels.py",
    "tests/runtime/test_whole_step.py",
)
PLACE = Path("build/cuda")
RESULTS = Path("benchmarks/results/cuda_tests.json")


@dataclass(frozen=True)
class Proof:
    """A recipe of a model, and how much of it is verified; `heads` where it is exported with all capabilities."""

    model: str
    recipe: str
    effort: Effort
    heads: bool = False

    @property
    def folder(self) -> Path:
        """As `benchmarks.cuda_decode --bundles build/cuda` looks for it."""
        return PLACE / self.model / f"{self.recipe}{'-heads' if self.heads else ''}"


# The whole of the demo is verified by tests, which do not export heads.
PROOFS = (
    *(Proof("demo", recipe, Effort.FULL, heads=True) for recipe in ("cuda-fp16", "cuda-int4")),
    *(Proof(model, recipe, Effort.QUICK) for model in ("advanced", "one-billion") for recipe in RECIPES),
)


@click.command()
@click.option("--only", default="", help="Prove the bundles with this in their paths, run no tests, and keep the rest.")
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS, show_default=True)
def main(only: str, out: Path) -> None:
    """Run and prove everything, write down what came of it; exits with 1 where anything failed."""
    if not torch.cuda.is_available():
        raise click.UsageError("there is no NVIDIA GPU that PyTorch can use")
    about = {"device": torch.cuda.get_device_name(), "environment": environment(0, versions())}
    document: dict[str, Any] = json.loads(out.read_text(encoding="utf-8")) if only else {"proofs": {}}
    document |= about | {"command": "python -m tests.verify_cuda"} | ({} if only else {"tests": run_tests()})
    for proof in PROOFS:
        if only in str(proof.folder):
            document["proofs"][str(proof.folder)] = prove(proof)
            out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")  # what there is so far
    failed = document["tests"]["failed"] + [name for name, found in document["proofs"].items() if not found["passed"]]
    click.echo(f"{document['tests']['passed']} tests, {len(document['proofs'])} bundles; failed: {failed or 'none'}")
    sys.exit(1 if failed else 0)


def run_tests() -> dict[str, Any]:
    """The files of `TESTS`; what was skipped is listed with its reason."""
    report = PLACE / "tests.xml"
    PLACE.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "pytest", *TESTS, "-q", f"--junitxml={report}"], check=False)
    cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    failed = [c for c in cases if c.find("failure") is not None or c.find("error") is not None]
    skipped = [skip.get("message") for case in cases for skip in case.iter("skipped")]
    return {
        "commit": commit(),
        "files": TESTS,
        "passed": len(cases) - len(failed) - len(skipped),
        "skipped": {reason: skipped.count(reason) for reason in dict.fromkeys(skipped)},
        "failed": [f"{case.get('classname')}.{case.get('name')}" for case in failed],
        "seconds": round(time.perf_counter() - start),
    }


def prove(proof: Proof) -> dict[str, Any]:
    """Export a bundle, unless it is there, and verify it on the GPU."""
    start = time.perf_counter()
    checkpoint = model_of(proof.model)
    if not proof.folder.is_dir():
        heads = CAPABILITIES if proof.heads else None
        export_bundle(checkpoint, proof.folder, ExportRecipe.load(proof.recipe), effort=Effort.OFF, capabilities=heads)
    report = verify_bundle(proof.folder, checkpoint, provider="cuda", effort=proof.effort)
    found = {"effort": str(proof.effort), "commit": commit(), **summary(report)}
    if proof.effort is Effort.QUICK:
        last = at_the_end(proof)
        found["last_position"] = last.length
        found["error_there_of_the_gate"] = largest_of_the_gate([last])
        found["passed"] = report.passed and last.verdict is not Verdict.FAIL
    found["seconds"] = round(time.perf_counter() - start)
    click.echo(f"{proof.folder}: {json.dumps(found)}")
    return found


@cache
def model_of(name: str) -> Checkpoint:
    """The demo, or a preset's geometry with random weights."""
    return Checkpoint.open(demo_checkpoint()) if name == "demo" else preset_checkpoint(name)


@torch.inference_mode()
def at_the_end(proof: Proof) -> CaseResult:
    """Single tokens at the model's last positions, which the quick verification leaves out, against float64: by the
    same gate, the eager models on the GPU (in float64 it computes as exactly as any processor)."""
    recipe, model = ExportRecipe.load(proof.recipe), model_of(proof.model)
    limit, arithmetic = model.config.max_sequence_length, arithmetic_of(recipe)
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (1, limit))
    computed = recipe.as_computed(model)
    loaded = Checkpoint.from_tensors(computed.config, load_decoder(computed).state_dict(), dict(computed.origin))
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False

    def eager(dtype: torch.dtype) -> np.ndarray:
        decoder = load_decoder(loaded, dtype=dtype).to("cuda")
        logits = decoder(torch.from_numpy(ids).cuda())[:, -LAST_TOKENS - 1 :]
        return logits.to(torch.float64).cpu().numpy()

    exact, rounded = eager(torch.float64), eager(getattr(torch, recipe.activations))
    torch.cuda.empty_cache()
    found = last_logits(load(proof.folder, provider="cuda"), ids)
    return case_result(f"the last of {limit} positions", ids.shape, arithmetic, found, exact, rounded)


def summary(report: ParityReport) -> dict[str, Any]:
    """The verdict, and how far from the gates it is."""
    quality = report.quality
    return {
        "passed": report.passed,
        "cases": len(report.cases),
        "longest": report.longest,
        "stored_tensors": sum(stored.equal for stored in report.stored),
        "largest_error_of_the_gate": largest_of_the_gate(report.cases),
        "mean_kl_nats": None if quality is None else quality.mean_kl_divergence,
        "same_best_token": None if quality is None else quality.top1_agreement,
        "warnings": report.warnings,
    }


def largest_of_the_gate(cases: Sequence[CaseResult]) -> float:
    """The largest error as a share of what its gate allows."""
    return round(max(m.error / m.allowed for case in cases for m in case.measurements if m.allowed), 3)


if __name__ == "__main__":
    main()
