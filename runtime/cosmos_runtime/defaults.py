"""The model's own defaults for generation, from the manifest's free-form `generation` section."""

from collections.abc import Mapping
from typing import Any

from cosmos_runtime.errors import BundleError, InputError
from cosmos_runtime.manifest import MANIFEST_NAME, Manifest
from cosmos_runtime.sampling import Sampling

_SAMPLING_KEYS = ("temperature", "top_k", "top_p", "repetition_penalty")


def default_sampling(manifest: Manifest) -> Sampling:
    """The sampling options that the bundle recommends, `Sampling`'s own where it is silent; no seed.

    Raises: BundleError where one of them is out of range.
    """
    given: Mapping[str, Any] = manifest.generation
    try:
        return Sampling(**{key: given[key] for key in _SAMPLING_KEYS if key in given})
    except InputError as error:
        raise BundleError(f"{MANIFEST_NAME}: generation.{error}; export the bundle again") from error


def default_stop_ids(manifest: Manifest) -> tuple[int, ...]:
    """Token ids that end an answer: the list `generation.stop_ids`, empty where the bundle names none.

    Raises: BundleError where they are not token ids.
    """
    ids = manifest.generation.get("stop_ids", [])
    if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < manifest.vocab_size for i in ids):
        raise BundleError(
            f"{MANIFEST_NAME}: generation.stop_ids: expected token ids from 0 to {manifest.vocab_size - 1}, got {ids!r}"
        )
    return tuple(ids)
