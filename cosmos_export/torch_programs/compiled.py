"""An exported program, compiled by PyTorch (AOTInductor) for the processor of this machine: C++ that loads with torch.

    program = torch._inductor.aoti_load_package("my-bundle/model.compiled.pt2")

Matrix products are chosen by timing them here, oneDNN's and MKL's against generated C++, over matrices in the generated
code's own order. The package holds these beside the plain ones: it is up to twice as large as the model. What suits a
prompt and what suits a single token differ, and one choice serves both: on the machine of `benchmarks/LOG.md` the
uncompiled program, with products by oneDNN as `load_session` runs it, was the faster one.
"""

from __future__ import annotations

from pathlib import Path

import torch

from cosmos_export.errors import ExportError
from cosmos_export.quiet import quiet
from cosmos_export.torch_programs.binding import Program
from cosmos_export.torch_programs.pt2 import TALKER

COMPILED = "model.compiled.pt2"  # beside model.pt2, in the bundle's folder

_OPTIONS = {"freezing": True, "max_autotune": True, "max_autotune_gemm_backends": "CPP,ATEN"}


def compile_program(program: torch.export.ExportedProgram, folder: Path) -> None:
    """Writes the compiled package of a program into a bundle's folder. It takes minutes, and a C++ compiler.

    Raises ExportError where PyTorch cannot compile it.
    """
    import torch._inductor

    try:
        with quiet(TALKER):
            torch._inductor.aoti_compile_and_package(
                program, package_path=str(folder / COMPILED), inductor_configs=_OPTIONS
            )
    except Exception as error:  # torch raises many types here, none of them public
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ExportError(
            f"PyTorch could not compile the program: {reason[0]}; it wants a C++ compiler (g++); "
            f"--recipe pt2-fp32 does without"
        ) from error


def load_compiled(folder: Path) -> Program:
    """The compiled program of a bundle."""
    import torch._inductor

    # PyTorch warns here, and nowhere else, where the package was made for another processor.
    package: Program = torch._inductor.aoti_load_package(str(folder / COMPILED))
    return package
