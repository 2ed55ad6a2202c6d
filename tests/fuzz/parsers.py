"""Coverage-guided fuzzing of the parsers that run before ONNX Runtime does, with atheris (libFuzzer for Python):

    pip install atheris                                       # Linux; not among the project's own dependencies
    python -m tests.fuzz.parsers build/corpus -max_total_time=600

The first byte of an input says what the rest is: a manifest, a config.json, a recipe or an ONNX graph file. The corpus
begins with one of each; what libFuzzer finds to reach new lines is added to it. Whatever is raised must be typed.
"""

import os
import sys
import tempfile
from pathlib import Path

PREFIXES = {"manifest": b"\x00", "config": b"\x40", "recipe": b"\x80", "graph": b"\xc0"}


def main() -> None:
    """Hands over to libFuzzer, with the options that it knows."""
    import atheris

    with atheris.instrument_imports(include=["cosmos_runtime", "cosmos_export", "json"]):
        from cosmos_export.config import CosmosAdvancedConfig
        from cosmos_export.errors import CosmosExportError
        from cosmos_export.recipe import ExportRecipe
        from cosmos_runtime import CosmosRuntimeError, Manifest
        from cosmos_runtime.graph_file import read_graph

    place = Path(tempfile.mkdtemp())
    files = {"manifest": "manifest.json", "config": "config.json", "recipe": "mine.toml", "graph": "model.onnx"}

    def parse(data: bytes) -> None:
        kind = list(PREFIXES)[data[0] >> 6 if data else 0]
        path = place / files[kind]
        path.write_bytes(data[1:])
        try:
            if kind == "manifest":
                Manifest.from_json(data[1:].decode("utf-8", errors="replace")).to_json()
            elif kind == "config":
                CosmosAdvancedConfig.from_file(path).validate().to_dict()
            elif kind == "recipe":
                ExportRecipe.load(str(path))
            else:
                read_graph(path)
        except (CosmosRuntimeError, CosmosExportError):
            pass

    _plant(Path(next((argument for argument in sys.argv[1:] if not argument.startswith("-")), "build/corpus")))
    atheris.Setup(sys.argv, parse)
    atheris.Fuzz()


def _plant(corpus: Path) -> None:
    """One whole input of each kind."""
    from cosmos_export.resources import demo_checkpoint, recipe_path

    from ..runtime.tiny_bundles import write_bundle  # noqa: TID252

    corpus.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        bundle = write_bundle(Path(folder) / "bundle", tokenizer=False, vocab_size=3)
        seeds = {
            "manifest": bundle / "manifest.json",
            "config": demo_checkpoint() / "config.json",
            "recipe": recipe_path("cpu-int4"),
            "graph": bundle / "model.onnx",
        }
        for kind, path in seeds.items():
            (corpus / f"{kind}.seed").write_bytes(PREFIXES[kind] + path.read_bytes())


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
