"""The same weights in every engine's format: makes the files, and says which variants can run here."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

from benchmarks.engines import KINDS, OURS
from benchmarks.engines.genai import set_threads
from benchmarks.hf_export import write_hf_folder
from benchmarks.process import OFFLINE, ROOT, Variant
from cosmos_export.checkpoint import Checkpoint
from cosmos_export.parity.verify import Effort
from cosmos_export.pipeline import export_bundle
from cosmos_export.recipe import ExportRecipe
from cosmos_export.resources import recipe_names

PRECISIONS = ("fp32", "int8", "int4")
GGUF_CLASSES = {"f32": "fp32", "q8_0": "int8", "q4_0": "int4", "q4_0-pure": "int4"}
BUILDER_CLASSES = ("fp32", "int4")
# The recipes of each class that PyTorch runs, by engine; a recipe's name begins with its engine's.
TORCH_RECIPES = {
    "fp32": {"torchscript": ("torchscript-fp32",), "pt2": ("pt2-fp32",)},
}


class SkippedError(Exception):
    """A variant cannot be made here; the text says why."""


@dataclass
class Workshop:
    """Makes variants of one checkpoint folder under `scratch`. Whatever can't be made is skipped, and said."""

    checkpoint: Path
    scratch: Path
    threads: int
    say: Callable[[str], None]
    engines: tuple[str, ...] = tuple(KINDS)
    pythons: Mapping[str, str] = field(default_factory=dict)
    bundles: Mapping[str, Path] = field(default_factory=dict)  # ready-made ones, by precision
    openvino: Mapping[str, Path] = field(default_factory=dict)
    exact: bool = False  # for the proof of equal tokens: no rounding that an engine does by default

    def variants(self, precisions: tuple[str, ...], *, pure: bool = True, builder: bool = True) -> list[Variant]:
        """Every variant of these classes that can run here."""
        self._forget_bundles()
        makers: list[Callable[[], list[Variant]]] = []
        for precision in precisions:
            makers.append(lambda p=precision: self._this_runtime(p))  # type: ignore[misc]
            for engine, recipes in TORCH_RECIPES.get(precision, {}).items():
                makers.append(lambda e=engine, p=precision, r=recipes: self._torch_programs(e, p, r))  # type: ignore[misc]
            makers.append(lambda p=precision: self._genai(p))  # type: ignore[misc]
            if builder and precision in BUILDER_CLASSES:
                makers.append(lambda p=precision: self._genai_builder(p))  # type: ignore[misc]
            makers.append(lambda p=precision: self._llama_cpp(p, pure))  # type: ignore[misc]
            makers.append(lambda p=precision: self._openvino(p))  # type: ignore[misc]
            if precision == "fp32":
                makers.append(self._transformers)
        return [variant for maker in makers for variant in self._attempt(maker)]

    def _forget_bundles(self) -> None:
        """Other engines' files are kept in a scratch folder; bundles are what changes, and are exported anew."""
        self.scratch.mkdir(parents=True, exist_ok=True)
        for stale in (*self.scratch.glob("bundle-*"), *self.scratch.glob("genai-bundle-*")):
            shutil.rmtree(stale)

    def _attempt(self, maker: Callable[[], list[Variant]]) -> list[Variant]:
        try:
            return maker()
        except SkippedError as reason:
            self.say(f"skipped: {reason}")
            return []

    def _variant(self, engine: str, precision: str, label: str, **options: object) -> Variant:
        return Variant(engine, precision, label, options, self._python(engine))

    def _python(self, engine: str) -> str:
        return self.pythons.get(engine, sys.executable)

    def _require(self, engine: str) -> None:
        if engine not in self.engines:
            raise SkippedError(f"{KINDS[engine].title} (not among --engine)")
        missing = missing_imports(self._python(engine), KINDS[engine].imports)
        if missing:
            raise SkippedError(f"{KINDS[engine].title}: {', '.join(missing)} not installed")

    def _this_runtime(self, precision: str) -> list[Variant]:
        self._require(OURS)
        return [self._variant(OURS, precision, precision, bundle=str(self.bundle(precision)))]

    def bundle(self, precision: str) -> Path:
        """The bundle of a class: the given one, or one exported by the recipe `cpu-<class>`."""
        if precision in self.bundles:
            return self.bundles[precision]
        return self._exported(f"cpu-{precision}", self.scratch / f"bundle-{precision}")

    def _torch_programs(self, engine: str, precision: str, recipes: tuple[str, ...]) -> list[Variant]:
        self._require(engine)
        bundles = {recipe: self._exported(recipe, self.scratch / f"bundle-{recipe}") for recipe in recipes}
        return [
            self._variant(engine, precision, recipe.removeprefix(f"{engine}-"), bundle=str(bundle))
            for recipe, bundle in bundles.items()
        ]

    def _exported(self, recipe: str, target: Path) -> Path:
        """A bundle at `target` by this recipe, made unless it is there."""
        if not target.is_dir():
            if recipe not in recipe_names():
                raise SkippedError(f"there is no recipe {recipe}")
            self.say(f"exporting {recipe}")
            # What a calibration changes is the values of the weights, which costs minutes and no speed.
            plain = replace(ExportRecipe.load(recipe), calibration=None)
            export_bundle(Checkpoint.open(self.checkpoint), target, plain, effort=Effort.OFF)
        return target

    def _genai(self, precision: str) -> list[Variant]:
        self._require("genai")
        folder = self.scratch / f"genai-bundle-{precision}"
        if not folder.is_dir():
            shutil.copytree(self.bundle(precision), folder)
        set_threads(folder, self.threads)
        return [self._variant("genai", precision, f"our {precision} bundle", folder=str(folder))]

    def _genai_builder(self, precision: str) -> list[Variant]:
        self._require("genai")
        folder = self.scratch / f"genai-builder-{precision}"
        if not (folder / "genai_config.json").is_file():
            arguments = ["-i", str(self._hf_folder()), "-o", str(folder), "-p", precision, "-e", "cpu"]
            arguments += ["-c", str(self.scratch / "builder-cache")]
            self._make("genai", "onnxruntime_genai.models.builder", arguments)
        set_threads(folder, self.threads)
        return [self._variant("genai", precision, f"its builder's {precision}", folder=str(folder))]

    def _llama_cpp(self, precision: str, pure: bool) -> list[Variant]:
        self._require("llama_cpp")
        types = [t for t, p in GGUF_CLASSES.items() if p == precision and (pure or not t.endswith("-pure"))]
        folder = self.scratch / "gguf"
        if not all((folder / f"{t}.gguf").is_file() for t in types):
            if missing := missing_imports(self._python("llama_cpp"), ("gguf",)):
                raise SkippedError(f"llama.cpp: {missing[0]} not installed")
            arguments = [str(self.checkpoint), str(folder), *(word for t in types for word in ("--type", t))]
            self._make("llama_cpp", "benchmarks.gguf_export", arguments)
        options = {"exact": True} if self.exact else {}
        return [self._variant("llama_cpp", precision, t, gguf=str(folder / f"{t}.gguf"), **options) for t in types]

    def _openvino(self, precision: str) -> list[Variant]:
        if precision not in self.openvino:
            return []
        self._require("openvino_genai")
        options = {"precision_hint": "f32"} if self.exact else {}
        return [self._variant("openvino_genai", precision, precision, folder=str(self.openvino[precision]), **options)]

    def _transformers(self) -> list[Variant]:
        self._require("transformers_eager")
        return [self._variant("transformers_eager", "fp32", "fp32", folder=str(self._hf_folder()))]

    def _hf_folder(self) -> Path:
        folder = self.scratch / "hf"
        if not folder.is_dir():
            write_hf_folder(Checkpoint.open(self.checkpoint), folder)
        return folder

    def _make(self, engine: str, module: str, arguments: list[str]) -> None:
        """Runs a maker in a process of its own, which takes its libraries and threads with it."""
        self.say(f"running {module}")
        done = subprocess.run(
            [self._python(engine), "-m", module, *arguments],
            cwd=ROOT,
            env={**os.environ, **OFFLINE},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            last = (done.stderr.strip().splitlines() or ["it printed nothing"])[-1]
            raise SkippedError(f"{module} failed: {last}")


@cache
def missing_imports(python: str, names: tuple[str, ...]) -> tuple[str, ...]:
    """Which of these modules an interpreter cannot find."""
    find = "import importlib.util as u, sys; print(*[n for n in sys.argv[1:] if u.find_spec(n) is None])"
    done = subprocess.run([python, "-c", find, *names], cwd=ROOT, capture_output=True, text=True, check=True)
    return tuple(done.stdout.split())
