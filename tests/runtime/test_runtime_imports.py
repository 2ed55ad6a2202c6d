"""The runtime's promise: no PyTorch, no ONNX package, and nothing heavy before it is needed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import cosmos_runtime

RUNTIME = Path(__file__).parents[2] / "runtime"

USE_EVERYTHING = """
import importlib, pkgutil, sys
import cosmos_runtime
for module in pkgutil.walk_packages(cosmos_runtime.__path__, "cosmos_runtime."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
for name in cosmos_runtime.__all__:
    getattr(cosmos_runtime, name)
session = cosmos_runtime.load(sys.argv[1], threads=1)
assert list(cosmos_runtime.generate(session, [1], max_new_tokens=2)) == [2, 3]
list(cosmos_runtime.generate_text(session, "a", max_new_tokens=2))
decoder = cosmos_runtime.load(sys.argv[2], threads=1)
prompts = [[1, 2], [3]]
alone = [list(cosmos_runtime.generate(decoder, prompt, max_new_tokens=5, speculate=2)) for prompt in prompts]
assert cosmos_runtime.generate_batch(decoder, prompts, max_new_tokens=5).run() == alone
assert cosmos_runtime.score(decoder, "ab").total < 0
print(*sys.modules)
"""


def modules_after(code: str, *arguments: str) -> set[str]:
    """Names of the top-level packages that a fresh interpreter has imported after `code`."""
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(RUNTIME)},
        check=False,
        timeout=60,
    )
    assert result.returncode == 0, result.stderr
    return {name.partition(".")[0] for name in result.stdout.split()}


def test_using_everything_imports_no_build_tool(bundle_path: Path, decoder_path: Path) -> None:
    imported = modules_after(USE_EVERYTHING, str(bundle_path), str(decoder_path))
    assert {"onnxruntime", "tokenizers", "cosmos_runtime"} <= imported
    assert not imported & {"torch", "onnx", "onnxscript", "onnx_ir", "transformers", "cosmos_export"}


def test_importing_the_package_imports_nothing_else() -> None:
    imported = modules_after("import sys, cosmos_runtime; print(*sys.modules)")
    assert not imported & {"numpy", "onnxruntime", "tokenizers", "click"}


def test_the_command_line_starts_without_numpy() -> None:
    imported = modules_after("import sys, cosmos_runtime.cli; print(*sys.modules)")
    assert not imported & {"numpy", "onnxruntime", "tokenizers"}


def test_all_names_are_there() -> None:
    assert set(cosmos_runtime.__all__) <= set(dir(cosmos_runtime))
    for name in cosmos_runtime.__all__:
        assert getattr(cosmos_runtime, name) is not None


def test_unknown_name() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'generat'"):
        _ = cosmos_runtime.generat
