"""One way to open what this project makes: ONNX, TorchScript and exported programs, and the eager model itself.

    session = load_session("my-bundle")  # a bundle of any format
    session = eager_session(Checkpoint.open("my-model"))  # the model, before any export
    for token in cosmos_runtime.generate(session, [1, 2, 3], max_new_tokens=100): ...

What runs in PyTorch runs on the CPU here.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from cosmos_export.bundle import manifest_of
from cosmos_export.checkpoint import TOKENIZER, Checkpoint
from cosmos_export.errors import ConfigError
from cosmos_export.model.capabilities import capability_set
from cosmos_export.recipe import INDUCTOR, ExportRecipe
from cosmos_export.torch_programs.binding import Program, TorchGraph
from cosmos_export.torch_programs.build import load as load_model
from cosmos_export.torch_programs.build import program_spec
from cosmos_export.torch_programs.calling import TorchProgram
from cosmos_export.torch_programs.compiled import COMPILED, load_compiled
from cosmos_export.torch_programs.pt2 import load_program, runnable
from cosmos_export.torch_programs.torchscript import load_torchscript
from cosmos_runtime import (
    DECODER,
    FULL_SEQUENCE,
    ONNX,
    TORCHSCRIPT,
    Bundle,
    BundleError,
    InputError,
    Manifest,
    ProviderError,
    Session,
    choose_graph,
    session_on,
)
from cosmos_runtime import load as load_onnx


def load_session(
    bundle: Bundle | str | os.PathLike[str],
    *,
    provider: str = "cpu",
    threads: int | None = None,
    trusted: bool = False,
) -> Session:
    """Opens a bundle of any format, on the CPU or, if it is ONNX, on `provider`.

    A PyTorch program can do whatever its process may, so its bundle's files are hashed first, unless `trusted` says
    that they are known to be whole. `threads` are PyTorch's own for the whole process.
    Raises BundleError for a bundle that is altered or damaged, ProviderError, InputError.
    """
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    if opened.manifest.graph_format == ONNX:
        return load_onnx(opened, provider=provider, threads=threads)
    _check_provider(provider, opened.manifest)
    _set_threads(threads)
    if not trusted:
        opened.check_hashes()
    name, spec = choose_graph(opened.manifest)
    return session_on(TorchGraph(_program(opened, opened.file(spec.file)), spec), opened, name)


def eager_session(
    checkpoint: Checkpoint,
    *,
    causal: bool = True,
    capabilities: Sequence[str] | None = None,
    dtype: str = "float32",
    threads: int | None = None,
) -> Session:
    """The model of a checkpoint as a session, with the key/value cache that a causal model can have.

    With `capabilities` it is the model with these heads, with None the plain decoder.
    Raises CheckpointError, ConfigError, ExportError where a weight is beyond the range of `dtype`, InputError.
    """
    _set_threads(threads)
    heads = None if capabilities is None else capability_set(capabilities)
    graph = DECODER if causal else FULL_SEQUENCE
    recipe = _eager_recipe(graph, dtype)
    model = load_model(checkpoint, recipe, causal=causal, capabilities=heads)
    spec = program_spec(graph, checkpoint.config, recipe, heads)
    program = TorchProgram.around(model, graph, spec)
    manifest = manifest_of("eager", checkpoint, recipe, {graph: spec}, _files(checkpoint), causal, heads)
    place = Path(".") if checkpoint.tokenizer is None else checkpoint.tokenizer.parent
    return session_on(TorchGraph(program, spec), Bundle(place, manifest), graph)


def _program(bundle: Bundle, file: Path) -> Program:
    try:
        return _loaded(bundle, file)
    except Exception as error:  # torch raises many types here, none of them public
        made_with = bundle.manifest.versions.get("torch", "of an unknown version")
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise BundleError(
            f"{file}: PyTorch {torch.__version__} cannot load what PyTorch {made_with} made: {reason}; export the "
            f"checkpoint again with the PyTorch that is here"
        ) from error


def _loaded(bundle: Bundle, file: Path) -> Program:
    if bundle.manifest.graph_format == TORCHSCRIPT:
        return load_torchscript(file)
    if bundle.manifest.recipe["dialect"] == INDUCTOR:
        return load_compiled(bundle.file(COMPILED).parent)
    return runnable(load_program(file))


def _set_threads(threads: int | None) -> None:
    if threads is None:
        return
    if threads < 1:
        raise InputError(f"threads: expected a positive integer or None, got {threads!r}")
    torch.set_num_threads(threads)


def _check_provider(provider: str, manifest: Manifest) -> None:
    if provider != "cpu":
        raise ProviderError(
            f"provider {provider!r}: sessions over a {manifest.graph_format} bundle run on the CPU; torch can load its "
            f"program onto any device by itself (docs/TORCH.md), and `cosmos-export onnx --recipe cuda-fp16` makes a "
            f"bundle for GPUs"
        )


def _eager_recipe(graph: str, dtype: str) -> ExportRecipe:
    precisions = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
    if dtype not in precisions:
        raise ConfigError(f"dtype must be one of {', '.join(precisions)}, got {dtype!r}")
    return ExportRecipe(
        name="eager",
        description="The eager model itself.",
        precision=precisions[dtype],
        dialect="aten",
        opset=None,
        graphs=(graph,),
        activations=dtype,
        format=TORCHSCRIPT,
    )


def _files(checkpoint: Checkpoint) -> dict[str, Path]:
    return {} if checkpoint.tokenizer is None else {TOKENIZER: checkpoint.tokenizer}
