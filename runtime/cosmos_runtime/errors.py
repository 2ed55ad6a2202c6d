"""Everything the runtime raises on purpose: one class for each cause."""


class CosmosRuntimeError(Exception):
    """Base class of every error of this package; also raised where a graph computes something unusable."""


class BundleError(CosmosRuntimeError):
    """The bundle is missing, invalid, altered, or made for another runtime."""


class ProviderError(CosmosRuntimeError):
    """The execution provider that was asked for is not available here."""


class InputError(CosmosRuntimeError, ValueError):
    """Token ids, shapes, prompts, lengths or sampling options that the model cannot take."""


class TokenizerError(CosmosRuntimeError):
    """The bundle's tokenizer is missing or cannot be read."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message: ONNX Runtime adds stack traces below it."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
