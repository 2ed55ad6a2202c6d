"""Signatures of bundles: made with a private key, checked with its public half, on machines without a network.

They are in the OpenSSF Model Signing format, by the `model-signing` package (imported on first use), so that its own
tools check them, too: one signature over the SHA-256 of every file in the folder, the manifest included.
https://github.com/sigstore/model-transparency
"""

import ast
import contextlib
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from cosmos_runtime.checking import SIGNATURE_NAME, check_bundle
from cosmos_runtime.errors import BundleError, CosmosRuntimeError, InputError, first_line

_PACKAGE_CURE = 'install it with: pip install "cosmos-export[sign]"'
# A few hundred bytes a file.
_LARGEST_SIGNATURE = 16 << 20
# P-256, P-384 or P-521: what the package takes.
_KEY = "expected the {half} key of an elliptic curve in PEM form; `cosmos-export sign --help` says how to make a pair"


def sign_bundle(folder: Path, private_key: Path, password: str | None = None) -> Path:
    """Check a bundle and sign every file of its folder; the path of the signature, which may replace an older one.

    Raises: BundleError where the bundle is not as it was exported, or has what cannot be signed, InputError where the
    key cannot be used, CosmosRuntimeError where the package is missing.
    """
    signing, hashing = _package("signing"), _package("hashing")
    _check_key(private_key, "private")
    if private_key.resolve().is_relative_to(folder.resolve()):
        raise InputError(f"{private_key}: lies in the bundle, and would be given away with it; move it elsewhere")
    secret = None if password is None else password.encode()
    with _typed(InputError, f"{private_key}: cannot be used", _KEY.format(half="private")):
        config = signing.Config().use_elliptic_key_signer(private_key=private_key, password=secret)
    _beside(folder / SIGNATURE_NAME).unlink(missing_ok=True)  # of a run that was killed
    _check(folder)
    with tempfile.TemporaryDirectory(prefix="cosmos-signature-") as scratch:
        made = Path(scratch, SIGNATURE_NAME)
        with _typed(BundleError, f"{folder}: cannot be signed", "put the files themselves in the folder"):
            config.set_hashing_config(_hashing(hashing)).sign(folder, made)
        return _put_in_place(made.read_bytes(), folder / SIGNATURE_NAME)


def verify_signature(folder: Path, public_key: Path) -> dict[str, str]:
    """Check that a bundle's folder is, file for file, what the holder of the private key signed.

    Returns the SHA-256 of each file but the signature, which were computed on the way.

    Raises: BundleError where it is not signed, or not by this key, or a file was altered, added or removed since;
    InputError where the key cannot be used, CosmosRuntimeError where the package is missing.
    """
    signature = folder / SIGNATURE_NAME
    verifying, hashing = _package("verifying"), _package("hashing")
    _check_key(public_key, "public")
    with _typed(InputError, f"{public_key}: cannot be used", _KEY.format(half="public")):
        config = verifying.Config().use_elliptic_key_verifier(public_key=public_key)
    if not signature.is_file():
        raise BundleError(f"{signature}: missing: the bundle is not signed; sign it with: cosmos-export sign")
    if signature.stat().st_size > _LARGEST_SIGNATURE:
        raise BundleError(f"{signature}: does not hold: expected at most {_LARGEST_SIGNATURE:,} bytes")
    recorder = _Recorder(_hashing(hashing))
    with _typed(BundleError, f"{signature}: does not hold", "get the bundle again from who signed it"):
        config.set_hashing_config(recorder).verify(folder, signature)
    return recorder.digests


def _check(folder: Path) -> None:
    findings = check_bundle(folder).findings
    if findings:
        raise BundleError(
            f"{folder}: not signed, as it is not as it was exported: {findings[0].file}: {findings[0].problem}; see: "
            f"cosmos-run check {folder}"
        )


class _Recorder:
    """A hashing configuration that remembers what it hashed."""

    def __init__(self, config: Any) -> None:
        self._config = config
        self.digests: dict[str, str] = {}

    def hash(self, model_path: Any, **options: Any) -> Any:
        manifest = self._config.hash(model_path, **options)
        self.digests = {entry.identifier: entry.digest.digest_hex for entry in manifest.resource_descriptors()}
        return manifest

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)


def _hashing(hashing: Any) -> Any:
    """Every file but the signature itself: the package would leave out those of git as well."""
    return hashing.Config().set_ignored_paths(paths=[SIGNATURE_NAME], ignore_git_paths=False)


def _package(module: str) -> Any:
    from importlib import import_module

    try:
        return import_module(f"model_signing.{module}")
    except ImportError as error:
        raise CosmosRuntimeError(
            f"signatures need the package model-signing ({first_line(error)}); {_PACKAGE_CURE}"
        ) from error


def _check_key(path: Path, half: str) -> None:
    if not path.is_file():
        raise InputError(f"{path}: no such file; {_KEY.format(half=half)}")


@contextlib.contextmanager
def _typed(kind: type[CosmosRuntimeError], what: str, cure: str) -> Any:
    """The package raises what its libraries do, sometimes without a word, and prints warnings."""
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    except Exception as error:
        raise kind(f"{what}: {_reason(error)}; {cure}") from error


def _reason(error: Exception) -> str:
    """What the package says, without the list of objects that it prints; or what it raised, without a word."""
    text = first_line(error) if str(error).strip() else type(error).__name__
    title, bracket, differences = text.partition(": [")
    if not bracket:
        return text.rstrip(". ")
    with contextlib.suppress(ValueError, SyntaxError, TypeError):
        files = [difference.split(": Expected 'Digest")[0] for difference in ast.literal_eval(f"[{differences}")]
        return f"{title}: {'; '.join(files)}"
    return text


def _put_in_place(signature: bytes, path: Path) -> Path:
    """Whole or not at all: written beside, then renamed."""
    beside = _beside(path)
    try:
        with beside.open("wb") as file:
            file.write(signature)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise BundleError(f"{path}: cannot be written: {error.strerror}") from error
    return path


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")
