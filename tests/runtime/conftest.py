"""Fixtures of the runtime's tests: tiny bundles, written anew for each test."""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cosmos_runtime import FULL_SEQUENCE, FileEntry, Session, load

from .tiny_bundles import BundleFactory, chain, make_manifest, write_bundle
from .tiny_decoders import write_decoder_bundle


@pytest.fixture
def make_bundle(tmp_path: Path) -> BundleFactory:
    """`write_bundle` into the test's own folder."""
    return functools.partial(write_bundle, tmp_path / "bundle")


@pytest.fixture
def bundle_path(make_bundle: BundleFactory) -> Path:
    """A bundle of 257 tokens in which each id is followed by id + 1."""
    return make_bundle()


@pytest.fixture
def session(bundle_path: Path) -> Session:
    return load(bundle_path, threads=1)


@pytest.fixture
def write_session(make_bundle: BundleFactory) -> Callable[..., Session]:
    """A session whose model writes the given text, byte by byte, once it is given the text's first character."""

    def write(text: str, **changes: Any) -> Session:
        return load(make_bundle(chain(text), **changes), threads=1)

    return write


@pytest.fixture(scope="session")
def decoder_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that holds the same random one-layer model as a decoder and as a full-sequence graph."""
    return write_decoder_bundle(tmp_path_factory.mktemp("decoder") / "bundle", graphs=("decoder", "full_sequence"))


@pytest.fixture(scope="session")
def decoding(decoder_path: Path) -> Session:
    """The model of `decoder_path`, with its cache."""
    return load(decoder_path, threads=1)


@pytest.fixture(scope="session")
def recomputing(decoder_path: Path) -> Session:
    """The model of `decoder_path`, as a full-sequence graph."""
    return load(decoder_path, threads=1, graph=FULL_SEQUENCE)


@pytest.fixture
def document() -> dict[str, Any]:
    """A valid manifest as a JSON document to spoil."""
    files = {"model.onnx": FileEntry(3, "0" * 64), "tokenizer.json": FileEntry(4, "a" * 64)}
    parsed: dict[str, Any] = json.loads(make_manifest(files, 8).to_json())
    return parsed
