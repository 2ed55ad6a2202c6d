"""`make verify-cuda`: on an NVIDIA GPU, every test that needs one, and the proof of the presets and the demo with the
recipes for GPUs. What was run and found goes to benchmarks/results/cuda_tests.json, bundles to build/cuda.

    python -m tests.verify_cuda [--out RESULTS.json]
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import click
import numpy as np
import torch

from benchmarks.cuda_decode import versions
from benchmarks.report import environment
from cosmos_export.checkpoint import Checkpoint
from cosmos_export.model.loading import preset_checkpoint
from cosmos_export.parity.report import ParityReport
from cosmos_export.parity.verify import Effort, verify_bundle
from cosmos_export.pipeline import export_bundle
from cosmos_export.recipe import ExportRecipe
from cosmos_export.resources import demo_checkpoint
from cosmos_runtime import load, new_decoder
from tests.end_to_end.test_cuda import NEAR_TIE

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
RECIPES = ("cuda-fp16", "cuda-bf16", "cuda-int8", "cuda-int4")
CAPABILITIES = ("reasoning", "memory", "safety", "evaluation")


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
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS, show_default=True)
def main(out: Path) -> None:
    """Run and prove everything, write down what came of it; exits with 1 where anything failed."""
    if not torch.cuda.is_available():
        raise click.UsageError("there is no NVIDIA GPU that PyTorch can use")
    document: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "environment": environment(0, versions()),
        "command": "python -m tests.verify_cuda",
        "tests": run_tests(),
        "proofs": [],
    }
    for proof in PROOFS:
        document["proofs"].append(prove(proof))
        out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")  # what there is so far
    failed = document["tests"]["failed"] + [p["bundle"] for p in document["proofs"] if not p["passed"]]
    click.echo(f"{document['tests']['passed']} tests passed, {len(PROOFS)} bundles; failed: {failed or 'none'}")
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
    found = {"bundle": str(proof.folder), "effort": str(proof.effort), **summary(report)}
    if not proof.heads:
        found["apart_at_the_last_positions"] = apart = round(apart_at_the_end(proof), 6)
        found["passed"] = report.passed and apart <= NEAR_TIE[proof.recipe]
    found["seconds"] = round(time.perf_counter() - start)
    click.echo(json.dumps(found))
    return found


@cache
def model_of(name: str) -> Checkpoint:
    """The demo, or a preset's geometry with random weights."""
    return Checkpoint.open(demo_checkpoint()) if name == "demo" else preset_checkpoint(name)


def apart_at_the_end(proof: Proof) -> float:
    """How far logits of single tokens at the model's last positions are from those of whole prompts, which another
    kernel computes, as a share of their range. The quick verification does not come that far."""
    session = load(proof.folder, provider="cuda")
    limit = session.manifest.max_sequence_length
    ids = np.random.default_rng(0).integers(0, session.manifest.vocab_size, limit)
    decoder = new_decoder(session, limit)
    decoder.prefill(ids[:-3])
    largest = 0.0
    for end in range(limit - 2, limit + 1):
        logits = decoder.decode_one_token(int(ids[end - 1])).copy()
        whole = new_decoder(session, limit).prefill(ids[:end])
        largest = max(largest, float(np.abs(logits - whole).max() / np.ptp(whole)))
    return largest


def summary(report: ParityReport) -> dict[str, Any]:
    """The verdict, and how far from the gates it is."""
    measured = [m for case in report.cases for m in case.measurements]
    quality = report.quality
    return {
        "passed": report.passed,
        "cases": len(report.cases),
        "longest": report.longest,
        "stored_tensors": sum(stored.equal for stored in report.stored),
        "largest_error_of_the_gate": round(max(m.error / m.allowed for m in measured if m.allowed), 3),
        "mean_kl_nats": None if quality is None else quality.mean_kl_divergence,
        "same_best_token": None if quality is None else quality.top1_agreement,
        "warnings": report.warnings,
    }


if __name__ == "__main__":
    main()
