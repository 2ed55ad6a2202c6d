"""What an export imports before it begins: not what it may do without."""

import subprocess
import sys

import pytest

PROGRAM = """
import sys
import cosmos_export.cli.stages, cosmos_export.pipeline
sys.exit(" ".join(name for name in sys.argv[1:] if name in sys.modules) or 0)
"""


@pytest.mark.parametrize(
    "absent",
    [
        ["cosmos_export.parity.verify", "onnxruntime"],
        ["cosmos_export.calibration.calibrate"],
        ["cosmos_export.torch_programs.build", "torch._dynamo"],
    ],
    ids=["verification", "calibration", "other formats"],
)
def test_the_pipeline_begins_without(absent: list[str]) -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM, *absent], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
