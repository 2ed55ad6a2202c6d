"""TorchScript files and exported programs need torch and nothing of this project: the tokens are those of the eager
model, at batches and lengths that were not traced."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cosmos_export.checkpoint import Checkpoint
from cosmos_export.parity.verify import Effort
from cosmos_export.pipeline import export_bundle
from cosmos_export.recipe import ExportRecipe
from cosmos_export.resources import demo_checkpoint
from cosmos_export.torch_programs.sessions import eager_session
from cosmos_runtime import CAPABILITIES, generate

from .head_bundles import heads_checkpoint, heads_config

SCRIPT = Path(__file__).with_name("torch_alone.py")
NEW_TOKENS = 8
ROWS = [[3], [5, 11], [7, 2, 19, 4, 4, 21, 1, 16, 9, 13, 20, 6, 12, 18, 8, 10, 14]]  # 1, 2 and 17 tokens
# Traced were 2 rows of 3 tokens.
BATCHES = [[row] for row in ROWS] + [[row, row[::-1], row] for row in ROWS]
RAGGED = [ROWS, ROWS[::-1]]

Batches = list[list[list[int]]]


class EagerModel:
    """A checkpoint, and how its model continues rows one by one."""

    def __init__(self, checkpoint: Checkpoint, capabilities: tuple[str, ...] | None) -> None:
        self.checkpoint, self.capabilities = checkpoint, capabilities
        self._session = eager_session(checkpoint, capabilities=capabilities)

    def continued(self, batches: Batches) -> Batches:
        return [[list(generate(self._session, row, max_new_tokens=NEW_TOKENS)) for row in rows] for rows in batches]

    def export(self, recipe: str, out: Path) -> Path:
        chosen = ExportRecipe.load(recipe)
        return export_bundle(self.checkpoint, out, chosen, capabilities=self.capabilities, effort=Effort.OFF).path


@pytest.fixture(scope="module")
def plain() -> EagerModel:
    return EagerModel(Checkpoint.open(demo_checkpoint()), None)


@pytest.fixture(scope="module")
def heads() -> EagerModel:
    """Its memory has room for fewer calls than are made; it blocks nothing."""
    return EagerModel(heads_checkpoint(heads_config()), CAPABILITIES)


def continued(bundle: Path, graph: str, batches: Batches) -> Batches:
    """What `torch_alone.py` makes of a bundle. It must not complain, either."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(bundle), graph, str(NEW_TOKENS)],
        input=json.dumps(batches),
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=bundle,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    tokens: Batches = json.loads(done.stdout)
    return tokens


@pytest.mark.parametrize("recipe", ["torchscript-fp32", "torchscript-portable-fp32", "pt2-fp32"])
@pytest.mark.parametrize("model", ["plain", "heads"])
def test_prefill_and_decode(model: str, recipe: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    eager: EagerModel = request.getfixturevalue(model)
    expected = eager.continued(BATCHES + RAGGED)
    assert continued(eager.export(recipe, tmp_path / "bundle"), "decoder", BATCHES + RAGGED) == expected
    assert len({token for rows in expected for row in rows for token in row}) > 8  # not one word again and again


@pytest.mark.parametrize("recipe", ["torchscript-full-sequence", "pt2-full-sequence"])
@pytest.mark.parametrize("model", ["plain", "heads"])
def test_whole_sequences(model: str, recipe: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    eager: EagerModel = request.getfixturevalue(model)
    bundle = eager.export(recipe, tmp_path / "bundle")
    assert continued(bundle, "full_sequence", BATCHES) == eager.continued(BATCHES)
