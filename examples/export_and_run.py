"""From a checkpoint to text without PyTorch, in Python: export, prove, run, compare.

    python examples/export_and_run.py [CHECKPOINT]

Without an argument it takes the demo model, which ends up in a temporary folder. The commands `cosmos-export onnx` and
`cosmos-run generate` do the same. Needs `pip install -e ".[export,cpu]"`. Takes about ten seconds.
"""

import sys
import tempfile
from pathlib import Path

import torch

import cosmos_runtime
from cosmos_export.checkpoint import Checkpoint
from cosmos_export.errors import ParityError
from cosmos_export.model.loading import load_decoder
from cosmos_export.parity.verify import Effort
from cosmos_export.pipeline import export_onnx
from cosmos_export.recipe import ExportRecipe
from cosmos_export.resources import demo_checkpoint


def export(checkpoint: Checkpoint, bundle: Path) -> None:
    """The bundle is there only if it is equal to the model; the report of a failure says in which cases it is not."""
    try:
        exported = export_onnx(checkpoint, bundle, ExportRecipe.load("cpu-fp32"), effort=Effort.QUICK)
    except ParityError as error:
        raise SystemExit(f"{error}: {[case.name for case in error.report.cases if case.verdict != 'PASS']}") from None
    assert exported.report is not None
    print(f"exported: {exported.report.summary()}")


def compare(checkpoint: Checkpoint, session: cosmos_runtime.Session) -> None:
    """The same ids through PyTorch and through the bundle."""
    ids = torch.tensor([[5, 7, 9, 11, 13]])
    with torch.no_grad():
        expected = load_decoder(checkpoint)(ids).numpy()
    difference = abs(session.logits(ids.numpy()) - expected).max()
    print(f"compared: the largest difference of {expected.size:,} logits is {difference:.0e}")
    if difference > 1e-3:
        raise SystemExit("the bundle and the model differ")


def write_text(session: cosmos_runtime.Session) -> None:
    """Streams a continuation; from here on nothing needs PyTorch."""
    sampling = cosmos_runtime.Sampling(temperature=0.8, top_k=50, seed=1)
    answer = cosmos_runtime.generate_text(session, "ROMEO:", max_new_tokens=40, sampling=sampling)
    print("ROMEO:", end="")
    for piece in answer:
        print(piece, end="", flush=True)
    print(f"\ngenerated: {len(answer.tokens)} tokens, ended by {answer.finish_reason!r}")


def main(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    with tempfile.TemporaryDirectory() as temporary:
        bundle = Path(temporary, "bundle")
        export(checkpoint, bundle)
        session = cosmos_runtime.load(bundle, provider="cpu")
        compare(checkpoint, session)
        if checkpoint.tokenizer is not None:
            write_text(session)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else demo_checkpoint())
