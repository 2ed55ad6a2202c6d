"""From a checkpoint to text and diagnostics without PyTorch, in Python: export, prove, compare, run.

    python examples/export_and_run.py [CHECKPOINT]

Without an argument it takes the demo model. The commands `cosmos-export onnx --capabilities ...` and
`cosmos-run generate --diagnostics` do the same. Needs `pip install -e ".[export,cpu]"`. Takes ten to twenty seconds and
leaves no files behind.
"""

import sys
import tempfile
from pathlib import Path

import torch

import cosmos_runtime
from cosmos_export import CosmosAdvancedModel
from cosmos_export.checkpoint import Checkpoint
from cosmos_export.errors import ParityError
from cosmos_export.parity.verify import Effort
from cosmos_export.pipeline import export_bundle
from cosmos_export.recipe import ExportRecipe
from cosmos_export.resources import demo_checkpoint
from cosmos_runtime import CAPABILITIES


def export(folder: Path, bundle: Path) -> None:
    """The bundle is there only if it is equal to the model; the report of a failure says in which cases it is not."""
    recipe, checkpoint = ExportRecipe.load("cpu-fp32"), Checkpoint.open(folder)
    try:
        exported = export_bundle(checkpoint, bundle, recipe, capabilities=CAPABILITIES, effort=Effort.QUICK)
    except ParityError as error:
        raise SystemExit(f"{error}: {[case.name for case in error.report.cases if case.verdict != 'PASS']}") from None
    assert exported.report is not None
    print(f"exported: {exported.report.summary()}")


def compare(folder: Path, session: cosmos_runtime.Session) -> None:
    """The same ids through PyTorch and through the bundle."""
    ids = torch.tensor([[5, 7, 9, 11, 13]])
    with torch.no_grad():
        expected, report = CosmosAdvancedModel.from_pretrained(folder)(ids, return_diagnostics=True)
    output = session.call(ids.numpy())
    difference = float(abs(output.logits - expected.numpy()).max())
    print(f"compared: the largest difference of {output.logits.size:,} logits is {difference:.0e}")
    assert isinstance(output.diagnostics, dict)
    assert isinstance(report, dict)
    if difference > 1e-3 or output.diagnostics.keys() != report.keys():
        raise SystemExit("the bundle and the model differ: this should never happen, please report it")


def write_text(session: cosmos_runtime.Session) -> None:
    """Streams a continuation; from here on nothing needs PyTorch."""
    sampling = cosmos_runtime.Sampling(temperature=0.8, top_k=50, seed=1)
    answer = cosmos_runtime.generate_text(session, "ROMEO:", max_new_tokens=40, sampling=sampling, diagnostics=True)
    print("ROMEO:", end="")
    for piece in answer:
        print(piece, end="", flush=True)
    print(f"\ngenerated: {len(answer.tokens)} tokens, ended by {answer.finish_reason!r}")
    unsafe = sum(not report["is_safe"] for report in answer.diagnostics)
    print(f"diagnostics: {len(answer.diagnostics)} reports, {unsafe} of them unsafe")


def main(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        bundle = Path(temporary, "bundle")
        export(folder, bundle)
        session = cosmos_runtime.load(bundle, provider="cpu")
        compare(folder, session)
        if session.manifest.tokenizer is not None:
            write_text(session)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else demo_checkpoint())
