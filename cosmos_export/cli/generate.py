"""`cosmos-export generate`: continue a prompt with any bundle, or with a checkpoint that has not been exported."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from cosmos_runtime import MANIFEST_NAME, new_generate_command

if TYPE_CHECKING:
    from cosmos_runtime import Session


def _open(place: Path, *, provider: str, threads: int | None, diagnostics: bool) -> Session:
    from cosmos_export.checkpoint import Checkpoint
    from cosmos_export.errors import ConfigError
    from cosmos_export.model.capabilities import has_heads
    from cosmos_export.torch_programs.sessions import eager_session, load_session
    from cosmos_runtime import CAPABILITIES

    if (place / MANIFEST_NAME).is_file():
        return load_session(place, provider=provider, threads=threads)
    if provider != "cpu":
        raise ConfigError(
            f"--provider {provider}: a checkpoint runs on the CPU here; export it with --recipe cuda-fp16"
        )
    checkpoint = Checkpoint.open(place)
    heads = CAPABILITIES if diagnostics and has_heads(checkpoint.names) else None
    return eager_session(checkpoint, capabilities=heads, threads=threads)


generate_command = new_generate_command(
    _open,
    """Continue a prompt with BUNDLE: an exported bundle of any format, or a checkpoint folder.

    A checkpoint runs as the eager PyTorch model, a TorchScript or pt2 bundle in PyTorch (its files are hashed first: a
    program that was altered is not loaded), an ONNX bundle in ONNX Runtime. `cosmos-run generate` is the same for ONNX
    bundles, without PyTorch.

    \b
    Examples:
      cosmos-export generate checkpoints/demo --prompt "ROMEO:"
      cosmos-export generate bundles/demo-torchscript-fp32 --prompt "ROMEO:" --greedy
    """,
)
