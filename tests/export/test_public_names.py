"""What `import cosmos_export` gives, and what it costs."""

import subprocess
import sys

import pytest

import cosmos_export
from cosmos_export.config import CosmosAdvancedConfig
from cosmos_export.model import CosmosAdvancedModel


def test_configuration_and_model_are_public() -> None:
    assert cosmos_export.CosmosAdvancedConfig is CosmosAdvancedConfig
    assert cosmos_export.CosmosAdvancedModel is CosmosAdvancedModel
    assert set(cosmos_export.__all__) <= set(dir(cosmos_export))


def test_other_names_are_not_there() -> None:
    with pytest.raises(AttributeError, match="'cosmos_export' has no attribute 'CosmosModel'"):
        cosmos_export.CosmosModel  # noqa: B018


def test_importing_the_package_imports_no_torch() -> None:
    code = "import sys, cosmos_export, cosmos_export.config; print('torch' in sys.modules, 'numpy' in sys.modules)"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.split() == ["False", "False"]
