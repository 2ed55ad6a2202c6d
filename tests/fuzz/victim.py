"""The process that meets the files: it does what a user would, says how that ended, and is asked again.

One line of JSON in, one out: {"folder": ...} to {"ending": ..., "error": ...}.
An ending is "works", "refused" (an error of the project's own) or "untyped" (anything else; with its traceback).
"""

import contextlib
import json
import os
import resource
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Address space: what a few tiny models need many times over, and far less than a hostile size would take.
_MEMORY = {"bundle": 4 << 30, "checkpoint": 16 << 30, "export": 16 << 30}


def meet_bundle(folder: Path) -> None:
    """Open, load, generate from ids and from text, look at it, check it."""
    import cosmos_runtime

    with _several() as attempt:
        bundle = cosmos_runtime.Bundle.open(folder)
        attempt(bundle.check_hashes)
        attempt(bundle.manifest.to_json)
        session = cosmos_runtime.load(bundle, threads=1)
        attempt(lambda: list(cosmos_runtime.generate(session, [1, 2], max_new_tokens=2)))
        attempt(lambda: list(cosmos_runtime.generate_text(session, "ab", max_new_tokens=2)))
        attempt(lambda: session.call([[1, 2], [3, 4]]).diagnostics)


def meet_checkpoint(folder: Path) -> None:
    """Open it, look at its tokenizer, and let the eager model continue a prompt."""
    import cosmos_runtime
    from cosmos_export.checkpoint import Checkpoint
    from cosmos_export.checkpoint_checks import check_tokenizer
    from cosmos_export.torch_programs.sessions import eager_session

    checkpoint = Checkpoint.open(folder)
    check_tokenizer(checkpoint.tokenizer, checkpoint.config.vocab_size)
    list(cosmos_runtime.generate(eager_session(checkpoint, threads=1), [1, 2], max_new_tokens=2))


def meet_export(folder: Path) -> None:
    """Open a checkpoint, and export a bundle without the proof."""
    from cosmos_export.checkpoint import Checkpoint
    from cosmos_export.parity.verify import Effort
    from cosmos_export.pipeline import export_bundle
    from cosmos_export.recipe import ExportRecipe

    checkpoint = Checkpoint.open(folder)
    with tempfile.TemporaryDirectory() as out:
        export_bundle(checkpoint, Path(out) / "bundle", ExportRecipe.load("fp32"), effort=Effort.OFF)


@contextlib.contextmanager
def _several() -> Iterator[Callable[[Callable[[], Any]], None]]:
    """What is attempted goes on after an error of the project's own; the first one is the ending."""
    from cosmos_runtime import CosmosRuntimeError

    refusals: list[CosmosRuntimeError] = []

    def attempt(call: Callable[[], Any]) -> None:
        try:
            call()
        except CosmosRuntimeError as error:
            refusals.append(error)

    yield attempt
    if refusals:
        raise refusals[0]


def ending_of(kind: str, folder: Path) -> dict[str, str]:
    """How a meeting ends, as an answer."""
    from cosmos_runtime import CosmosRuntimeError

    typed: tuple[type[BaseException], ...] = (CosmosRuntimeError,)
    if kind != "bundle":
        from cosmos_export.errors import CosmosExportError

        typed = (CosmosRuntimeError, CosmosExportError)
    try:
        {"bundle": meet_bundle, "checkpoint": meet_checkpoint, "export": meet_export}[kind](folder)
    except typed as error:
        return {"ending": "refused", "error": type(error).__name__, "message": str(error)[:500]}
    except BaseException as error:
        where = traceback.format_exc()
        return {"ending": "untyped", "error": type(error).__name__, "message": str(error)[:500], "traceback": where}
    return {"ending": "works", "error": "", "message": ""}


def main(kind: str) -> None:
    """Answers until its input ends. What libraries print must not mix with the answers."""
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY[kind],) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        answer = ending_of(kind, Path(json.loads(line)["folder"]))
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main(sys.argv[1])
