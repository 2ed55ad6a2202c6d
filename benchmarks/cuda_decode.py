"""Times decoding on a GPU: this runtime (host loop, device loop) beside transformers, eager and compiled, on the same
weights in one run.

What is measured: greedy decoding of B equal-length random prompts; time to the first token of all rows, then tokens a
second of the others, over all rows. The engines take turns; what counts is the median of the rounds. transformers has a
static cache as long as prompt and answer, and a step that ends with the choice of the token; compiled means
torch.compile(mode="reduce-overhead", fullgraph=True). Weights are random: speed does not depend on them, and how long
engines agree on tokens is only reported (what proves the bundle is `cosmos-export verify --provider cuda`).

    python -m benchmarks.cuda_decode --out benchmarks/results/cuda_decode.json [--models advanced,one-billion]
        [--settings 1x128,64x2048] [--bundles FOLDER]
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from benchmarks.engines.torch_static import StaticDecoder, load_llama
from benchmarks.report import commit, environment
from benchmarks.roofline import cache_bytes, weight_bytes
from cosmos_export.checkpoint import Checkpoint
from cosmos_export.model.loading import preset_checkpoint
from cosmos_export.parity.verify import Effort
from cosmos_export.pipeline import export_bundle
from cosmos_export.recipe import ExportRecipe
from cosmos_runtime import Sampling, Session, generate_batch, load
from cosmos_runtime.decode_kernels import SWITCH
from cosmos_runtime.kernel_spec import MOST_ROWS

ROUNDS, COPY_BYTES = 3, 4 << 30
# This runtime's loop over ONNX Runtime's kernels, beside the one over its own.
OTHER_KERNELS = "fp16 device loop, ONNX Runtime's kernels"
# How tokens are chosen beside greedily: from the likeliest few, and from the whole vocabulary.
SAMPLED = {
    "sampled": Sampling(temperature=0.8, top_k=50, top_p=0.9, seed=1),
    "top-p alone": Sampling(temperature=0.8, top_p=0.9, seed=1),
}


@dataclass(frozen=True)
class Setting:
    """B prompts of so many tokens, and so many new ones; `reference` says whether transformers takes part."""

    batch: int
    prompt: int
    new: int
    reference: bool = True


PRECISIONS = ("fp16", "bf16", "int8", "int4")
SETTINGS = (Setting(1, 128, 512), Setting(64, 128, 128), Setting(1, 2048, 128), Setting(8, 128, 128))
MORE = (Setting(8, 2048, 128, reference=False), Setting(64, 2048, 128, reference=False))

# One generation: milliseconds to the first token of all rows, tokens a second after it, the first row's tokens.
Run = Callable[[], tuple[float, float, list[int]]]


def copy_bandwidth() -> float:
    """Bytes read and written a second by a large copy on the device."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    seconds = []
    for _ in range(5):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        seconds.append(start.elapsed_time(end) / 1e3)
    return 2 * COPY_BYTES / min(seconds)


def runtime_run(session: Session, prompts: np.ndarray, new: int, *, device_loop: bool, sampling: Any = None) -> Run:
    """This runtime, through its public function."""

    def run() -> tuple[float, float, list[int]]:
        start = time.perf_counter()
        answer = generate_batch(session, list(prompts), max_new_tokens=new, device_loop=device_loop, sampling=sampling)
        next(answer)
        first = time.perf_counter()
        tokens = answer.run()
        return 1e3 * (first - start), len(prompts) * (new - 1) / (time.perf_counter() - first), tokens[0]

    return run


def torch_run(decoder: StaticDecoder, prompts: np.ndarray, new: int) -> Run:
    """transformers; tokens stay on the GPU until all are there."""
    ids = torch.from_numpy(prompts).cuda()

    def run() -> tuple[float, float, list[int]]:
        torch.cuda.synchronize()
        start = time.perf_counter()
        token = decoder.prefill(ids)
        torch.cuda.synchronize()
        first = time.perf_counter()
        tokens = [token, *decoder.decode(token, ids.shape[1], new - 1)]
        torch.cuda.synchronize()
        end = time.perf_counter()
        return 1e3 * (first - start), len(prompts) * (new - 1) / (end - first), torch.cat(tokens, 1)[0].tolist()

    return run


def runs_of(
    setting: Setting, sessions: dict[str, Session], llama: Any, prompts: np.ndarray, eager: bool
) -> Iterator[tuple[str, Run]]:
    """Every engine that takes part in a setting, by name."""
    for name, session in sessions.items():
        if name in PRECISIONS or setting.batch <= MOST_ROWS:
            label = f"{name} device loop" if name in PRECISIONS else name
            yield label, runtime_run(session, prompts, setting.new, device_loop=True)
    if setting.batch == 1 and setting.prompt == 128:
        for name in (name for name in sessions if name in PRECISIONS):
            for way, sampling in SAMPLED.items():
                sampled = runtime_run(sessions[name], prompts, setting.new, device_loop=True, sampling=sampling)
                yield f"{name} device loop, {way}", sampled
        yield "fp16 host loop", runtime_run(sessions["fp16"], prompts, setting.new, device_loop=False)
    if setting.reference:
        length = setting.prompt + setting.new
        yield (
            "torch.compile fp16",
            torch_run(StaticDecoder(llama, setting.batch, length, compiled=True), prompts, setting.new),
        )
        if eager:
            yield (
                "transformers eager fp16",
                torch_run(StaticDecoder(llama, setting.batch, length, compiled=False), prompts, setting.new),
            )


def measure(setting: Setting, runs: dict[str, Run]) -> dict[str, Any]:
    """Warm every engine up, then let them take turns."""
    found: dict[str, list[tuple[float, float, list[int]]]] = {name: [] for name in runs}
    for run in runs.values():
        run(), run()
    for _ in range(ROUNDS):
        for name, run in runs.items():
            found[name].append(run())
    reference, measured = next(iter(found.values()))[0][2], commit()
    return {
        name: {
            "commit": measured,
            "first_token_ms": statistics.median(f for f, _, _ in results),
            "tokens_per_second": statistics.median(s for _, s, _ in results),
            "all_tokens_per_second": [s for _, s, _ in results],
            "same_tokens": _same(reference, results[0][2]),
        }
        for name, results in found.items()
    }


def _same(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))


def bundles(checkpoint: Checkpoint, folder: Path, recipes: tuple[str, ...]) -> dict[str, Path]:
    """The bundles of a model, one a recipe, by the recipe's precision; those that are there already are taken."""
    made = {}
    for recipe in recipes:
        if not (folder / recipe).is_dir():
            export_bundle(checkpoint, folder / recipe, ExportRecipe.load(recipe), effort=Effort.OFF)
        made[recipe.removeprefix("cuda-")] = folder / recipe
    return made


def load_sessions(paths: dict[str, Path]) -> dict[str, Session]:
    """A session a bundle, and one of the fp16 bundle that leaves single tokens to ONNX Runtime."""
    sessions = {precision: load(path, provider="cuda") for precision, path in paths.items()}
    os.environ[SWITCH] = "0"
    try:
        return sessions | {OTHER_KERNELS: load(paths["fp16"], provider="cuda")}
    finally:
        del os.environ[SWITCH]


def bench_model(
    name: str, recipes: tuple[str, ...], settings: tuple[Setting, ...], kept: Path | None
) -> Iterator[dict[str, Any]]:
    """One result a setting."""
    checkpoint = preset_checkpoint(name)
    llama = load_llama(checkpoint, torch.float16, "cuda")
    with tempfile.TemporaryDirectory() as folder:
        paths = bundles(checkpoint, (kept or Path(folder)) / name, recipes)
        sessions = load_sessions(paths)
        for setting in settings:
            ids = np.random.default_rng(0).integers(0, checkpoint.config.vocab_size, (setting.batch, setting.prompt))
            torch._dynamo.reset()
            runs = dict(runs_of(setting, sessions, llama, ids, eager=setting.batch == 1))
            reads = {p: weight_bytes(path) for p, path in paths.items()}
            cache = cache_bytes(paths["fp16"], setting.prompt + setting.new // 2) * setting.batch
            yield {
                "model": name,
                **vars(setting),
                "weight_bytes": reads,
                "cache_bytes": cache,
                "engines": measure(setting, runs),
            }
            del runs
            gc.collect()
            torch.cuda.empty_cache()


def merge(results: list[dict[str, Any]], result: dict[str, Any]) -> None:
    """Add a setting's result; engines of an earlier one of the same setting stay where they were not measured again."""
    setting = ("model", "batch", "prompt")
    earlier = next((r for r in results if all(r[key] == result[key] for key in setting)), None)
    if earlier is None:
        results.append(result)
    else:
        earlier |= {**result, "engines": earlier["engines"] | result["engines"]}


def versions() -> dict[str, str]:
    """What computes, beyond what is installed as a package of this project."""
    import onnxruntime
    import transformers

    driver = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return {
        "onnxruntime": onnxruntime.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "CUDA": str(torch.version.cuda),
        "driver": subprocess.run(driver, capture_output=True, text=True, check=False).stdout.strip(),
    }


def table(results: list[dict[str, Any]]) -> str:
    """What was measured, a line an engine."""
    lines = []
    for result in results:
        lines.append(f"{result['model']}, batch {result['batch']}, prompt {result['prompt']}, {result['new']} new")
        for name, engine in result["engines"].items():
            speed, first = engine["tokens_per_second"], engine["first_token_ms"]
            lines.append(
                f"  {name:28} {speed:10,.0f} tok/s   first token {first:8.1f} ms   same {engine['same_tokens']}"
            )
    return "\n".join(lines)


@click.command()
@click.option("--models", default="advanced,one-billion", show_default=True, help="Presets.")
@click.option("--recipes", default="cuda-fp16,cuda-int4", show_default=True, help="Recipes; cuda-fp16 must be there.")
@click.option("--settings", "wanted", help="Batches and prompts, such as 1x128,64x2048; all of them if left out.")
@click.option("--bundles", "kept", type=click.Path(path_type=Path), help="Take bundles from here, or make them here.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("benchmarks/results/cuda_decode.json"))
@click.option(
    "--keep", is_flag=True, help="Keep what is in --out of settings and engines that this run does not measure."
)
def main(models: str, recipes: str, wanted: str | None, kept: Path | None, out: Path, keep: bool) -> None:
    """Measure, print a table, write the results."""
    if not torch.cuda.is_available():
        raise click.UsageError("this benchmark needs an NVIDIA GPU that PyTorch can use")
    named = {f"{setting.batch}x{setting.prompt}": setting for setting in SETTINGS + MORE}
    if unknown := set((wanted or "").split(",")) - {*named, ""}:
        raise click.UsageError(f"--settings: expected some of {', '.join(named)}, got {', '.join(sorted(unknown))}")
    settings = tuple(named[name] for name in (wanted.split(",") if wanted else named))
    document: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "copy_bytes_per_second": copy_bandwidth(),
        "environment": environment(0, versions()),
        "results": json.loads(out.read_text(encoding="utf-8"))["results"] if keep else [],
    }
    for model in models.split(","):
        for result in bench_model(model, tuple(recipes.split(",")), settings, kept):
            merge(document["results"], result)
            out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")  # what there is so far
            click.echo(table([result]))


if __name__ == "__main__":
    main()
