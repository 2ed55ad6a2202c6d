"""How errors are told apart and handled: each has a type of its own, and its message says what to do.

    python examples/error_handling.py

On the build machine all of them are a `CosmosExportError`, on the target machine a `CosmosRuntimeError`.
Needs `pip install -e ".[export,cpu]"`. Takes a few seconds and leaves no files behind.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

import cosmos_runtime
from cosmos_export import CosmosAdvancedConfig, CosmosAdvancedModel
from cosmos_export.checkpoint import Checkpoint
from cosmos_export.errors import CheckpointError, ConfigError, CosmosExportError, RecipeError, TargetError
from cosmos_export.parity.verify import Effort
from cosmos_export.pipeline import export_bundle
from cosmos_export.recipe import ExportRecipe
from cosmos_runtime import BundleError, CosmosRuntimeError, InputError, ProviderError, TokenizerError

FP32 = ExportRecipe.load("fp32")
SMALL = CosmosAdvancedConfig(dim=64, hidden_dim=128, n_layers=1, head_dim=16, vocab_size=100)


def expect(kind: type[CosmosExportError | CosmosRuntimeError], action: Callable[[], object]) -> None:
    """Runs what must fail, and shows how; your program would put the cure where this prints."""
    try:
        action()
    except kind as error:
        print(f"{kind.__name__}: {error}\n")
    else:
        raise SystemExit(f"expected a {kind.__name__}, and nothing was raised")


def on_the_build_machine(folder: Path) -> None:
    """A configuration, a checkpoint, a recipe and a target that are not right; nothing is written."""
    expect(ConfigError, lambda: CosmosAdvancedConfig(max_seq_length=1024))
    expect(ConfigError, lambda: CosmosAdvancedModel(CosmosAdvancedConfig(n_heads=8, n_kv_heads=3)))
    expect(CheckpointError, lambda: CosmosAdvancedModel.from_pretrained(folder / "nowhere"))
    CosmosAdvancedModel(SMALL, capabilities=()).save_pretrained(folder / "no-heads")
    expect(CheckpointError, lambda: CosmosAdvancedModel.from_pretrained(folder / "no-heads"))
    expect(RecipeError, lambda: ExportRecipe.load("int5"))
    expect(TargetError, lambda: export_bundle(Checkpoint.open(folder / "no-heads"), folder / "no-heads", FP32))


def in_a_call() -> None:
    """Capabilities that this model does not have, and learning from examples, which none has."""
    model = CosmosAdvancedModel(SMALL, capabilities=["safety"]).eval()
    ids = torch.tensor([[1, 2, 3]])
    expect(ConfigError, lambda: model(ids))
    expect(ConfigError, lambda: model(ids, use_learning=True, examples=["an example"]))


def on_the_target_machine(folder: Path) -> None:
    """A bundle, its input and its device; `InputError` is what a server would answer its client with."""
    expect(BundleError, lambda: cosmos_runtime.load(folder / "nowhere"))
    export_bundle(Checkpoint.open(folder / "no-heads"), folder / "bundle", FP32, effort=Effort.OFF)
    expect(ProviderError, lambda: cosmos_runtime.load(folder / "bundle", provider="gpu"))
    session = cosmos_runtime.load(folder / "bundle")
    expect(InputError, lambda: session.logits([[1, 2, 100]]))
    expect(TokenizerError, lambda: cosmos_runtime.generate_text(session, "Hello", max_new_tokens=5))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        on_the_build_machine(Path(name))
        in_a_call()
        on_the_target_machine(Path(name))
