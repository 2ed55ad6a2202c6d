"""cosmos-export: Cosmos Advanced checkpoints become verified bundles: ONNX, TorchScript, or programs of torch.export.

See `cosmos_export.pipeline` for the way. A model, and a bundle of any format:

    from cosmos_export import CosmosAdvancedModel, load_session

    model = CosmosAdvancedModel.from_pretrained("path/to/checkpoint")
    logits, diagnostics = model(input_ids, return_diagnostics=True)

    session = load_session("path/to/bundle")
    logits = session.logits([[5, 7, 9]])

The names are imported on first use, so `import cosmos_export` itself costs next to nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cosmos_export.config import CosmosAdvancedConfig
    from cosmos_export.model.cosmos import CosmosAdvancedModel
    from cosmos_export.torch_programs.sessions import eager_session, load_session

__all__ = ["CosmosAdvancedConfig", "CosmosAdvancedModel", "eager_session", "load_session"]

_HOME = {
    "CosmosAdvancedConfig": "config",
    "CosmosAdvancedModel": "model.cosmos",
    "eager_session": "torch_programs.sessions",
    "load_session": "torch_programs.sessions",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
