"""Signatures: whoever has the public key finds any change, however well it was covered up, without a network."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from cosmos_export.cli import main as export_cli
from cosmos_export.pipeline import ExportedBundle
from cosmos_runtime import BundleError, CosmosRuntimeError, InputError, Manifest, describe_file, load, sign_bundle
from cosmos_runtime.cli import main as run_cli
from cosmos_runtime.signatures import verify_signature


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        pytest.fail("a signature must not need the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def write_key(path: Path, key: Any, password: str | None = None) -> None:
    encryption = (
        serialization.NoEncryption() if password is None else serialization.BestAvailableEncryption(password.encode())
    )
    pem, pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    path.write_bytes(key.private_bytes(pem, pkcs8, encryption))
    public = key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)
    path.with_suffix(".pub").write_bytes(public)


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """mine.pem with mine.pub, and so on."""
    folder = tmp_path_factory.mktemp("keys")
    write_key(folder / "mine.pem", ec.generate_private_key(ec.SECP256R1()))
    write_key(folder / "other.pem", ec.generate_private_key(ec.SECP384R1()))
    write_key(folder / "locked.pem", ec.generate_private_key(ec.SECP521R1()), "open sesame")
    write_key(folder / "rsa.pem", rsa.generate_private_key(65537, 2048))
    (folder / "text.pem").write_text("no key")
    (folder / "text.pub").write_text("no key")
    return folder


@pytest.fixture
def bundle(small_decoder: ExportedBundle, tmp_path: Path) -> Path:
    return Path(shutil.copytree(small_decoder.path, tmp_path / "bundle"))


@pytest.fixture
def signed(bundle: Path, keys: Path) -> Path:
    result = sign(bundle, keys / "mine.pem")
    assert result.exit_code == 0, result.output
    return bundle


def sign(*arguments: Any) -> Result:
    bundle, key, *more = map(str, arguments)
    return CliRunner().invoke(export_cli, ["sign", bundle, "--key", key, *more])


def check(bundle: Path, key: Path, *more: str) -> Result:
    return CliRunner().invoke(run_cli, ["check", str(bundle), "--key", str(key), *more])


def cover_up(bundle: Path) -> None:
    """Makes the manifest fit the files, as anybody can."""
    manifest = Manifest.from_json((bundle / "manifest.json").read_text())
    files = {name: describe_file(bundle / name) for name in manifest.files}
    (bundle / "manifest.json").write_text(replace(manifest, files=files).to_json())


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_signed_bundle_is_good(signed: Path, keys: Path) -> None:
    result = check(signed, keys / "mine.pub")
    assert result.exit_code == 0, result.output
    assert result.stdout.rstrip().endswith(f"signed by the owner of {keys / 'mine.pub'}")
    assert json.loads(check(signed, keys / "mine.pub", "--json").stdout)["signed"] is True
    assert load(signed, threads=1).logits([1]).shape[0] == 1


def test_the_tools_of_the_format_take_the_signature(signed: Path, keys: Path) -> None:
    signature = ["--signature", str(signed / "model.sig"), "--public_key", str(keys / "mine.pub")]
    command = [sys.executable, "-m", "model_signing", "verify", "key", str(signed), *signature]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("file", ["manifest.json", "model.onnx", "model.onnx.data", "config.json", "genai_config.json"])
@pytest.mark.parametrize("covered", [False, True])
def test_an_altered_file(signed: Path, keys: Path, file: str, covered: bool) -> None:
    if file == "manifest.json":
        document = json.loads((signed / file).read_text())
        document["generation"]["temperature"] = 9.5
        (signed / file).write_text(json.dumps(document))
    else:
        flip(signed / file)
    if covered:
        cover_up(signed)
    result = check(signed, keys / "mine.pub")
    assert result.exit_code == 1
    assert f"'{file}'" in result.stdout.splitlines()[0]
    assert result.stdout.startswith("model.sig: does not hold: ")


def test_an_added_or_removed_file(signed: Path, keys: Path) -> None:
    (signed / ".gitignore").write_text("*")
    result = check(signed, keys / "mine.pub")
    assert result.exit_code == 1
    assert "Extra files" in result.stdout
    assert ".gitignore: not listed in manifest.json" in result.stdout
    (signed / ".gitignore").unlink()
    (signed / "genai_config.json").unlink()
    result = check(signed, keys / "mine.pub")
    assert result.exit_code == 1
    assert "Missing files" in result.stdout


def test_a_file_that_became_a_link(signed: Path, keys: Path) -> None:
    (signed / "config.json").rename(signed / "was")
    (signed / "config.json").symlink_to("was")
    assert check(signed, keys / "mine.pub").exit_code == 1


def test_another_key(signed: Path, keys: Path) -> None:
    result = check(signed, keys / "other.pub")
    assert result.exit_code == 1
    assert result.stdout.startswith("model.sig: does not hold: Key mismatch")


def test_no_signature(bundle: Path, keys: Path) -> None:
    result = check(bundle, keys / "mine.pub")
    assert result.exit_code == 1
    assert result.stdout.startswith("model.sig: missing: the bundle is not signed")


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"\xff\xfe", b'{"verificationMaterial": {}}', b"[" * 5000])
def test_a_file_that_is_no_signature(signed: Path, keys: Path, content: bytes) -> None:
    (signed / "model.sig").write_bytes(content)
    result = check(signed, keys / "mine.pub")
    assert result.exit_code == 1
    assert result.stdout.startswith("model.sig: does not hold: ")


def test_a_signature_of_another_bundle(signed: Path, keys: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(signed, tmp_path / "other"))
    flip(other / "model.onnx.data")
    cover_up(other)
    (other / "model.sig").unlink()
    assert sign(other, keys / "mine.pem").exit_code == 0
    shutil.copyfile(other / "model.sig", signed / "model.sig")
    assert check(signed, keys / "mine.pub").exit_code == 1
    assert check(other, keys / "mine.pub").exit_code == 0


def test_signing_again_replaces_the_signature(signed: Path, keys: Path) -> None:
    (signed / ".model.sig.partial").write_text("of a run that was killed")
    assert sign(signed, keys / "other.pem").exit_code == 0
    assert check(signed, keys / "other.pub").exit_code == 0
    assert check(signed, keys / "mine.pub").exit_code == 1


def test_without_a_key_the_signature_is_only_mentioned(signed: Path) -> None:
    result = CliRunner().invoke(run_cli, ["check", str(signed)])
    assert result.exit_code == 0
    assert "it is signed; --key PUBLIC.pem checks by whom" in result.stderr


def test_an_encrypted_key(bundle: Path, keys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEY_PASSWORD", "open sesame")
    result = sign(bundle, keys / "locked.pem", "--password-env", "KEY_PASSWORD")
    assert result.exit_code == 0, result.output
    assert "sesame" not in result.output
    assert check(bundle, keys / "locked.pub").exit_code == 0
    monkeypatch.setenv("KEY_PASSWORD", "wrong")
    result = sign(bundle, keys / "locked.pem", "--password-env", "KEY_PASSWORD")
    assert result.exit_code == 1
    assert "locked.pem: cannot be used: " in result.stderr
    result = sign(bundle, keys / "locked.pem", "--password-env", "NO_SUCH_VARIABLE")
    assert "there is no such environment variable" in result.stderr


def test_an_encrypted_key_asks_for_its_password(bundle: Path, keys: Path) -> None:
    arguments = ["sign", str(bundle), "--key", str(keys / "locked.pem")]
    result = CliRunner().invoke(export_cli, arguments, input="open sesame\n")
    assert result.exit_code == 0, result.output
    assert check(bundle, keys / "locked.pub").exit_code == 0


@pytest.mark.parametrize("key", ["rsa.pem", "text.pem", "mine.pub", "nowhere.pem"])
def test_keys_that_cannot_sign(bundle: Path, keys: Path, key: str) -> None:
    result = sign(bundle, keys / key)
    assert result.exit_code == 1
    assert result.stderr.startswith(f"error: {keys / key}: ")
    assert "expected the private key of an elliptic curve in PEM form" in result.stderr
    assert not (bundle / "model.sig").exists()


@pytest.mark.parametrize("key", ["rsa.pub", "text.pub", "mine.pem", "nowhere.pub"])
def test_keys_that_cannot_verify(signed: Path, keys: Path, key: str) -> None:
    result = check(signed, keys / key)
    assert result.exit_code == 1
    assert result.stderr.startswith(f"error: {keys / key}: ")
    assert "expected the public key of an elliptic curve in PEM form" in result.stderr


def test_a_private_key_in_the_bundle_is_not_signed_along(bundle: Path, keys: Path) -> None:
    shutil.copyfile(keys / "mine.pem", bundle / "mine.pem")
    with pytest.raises(InputError, match="lies in the bundle, and would be given away with it"):
        sign_bundle(bundle, bundle / "mine.pem")


def test_a_bundle_that_is_not_whole_is_not_signed(bundle: Path, keys: Path) -> None:
    flip(bundle / "model.onnx.data")
    result = sign(bundle, keys / "mine.pem")
    assert result.exit_code == 1
    assert "not signed, as it is not as it was exported: model.onnx.data: altered" in result.stderr
    assert not (bundle / "model.sig").exists()


def test_what_is_no_bundle_is_not_signed(tmp_path: Path, keys: Path) -> None:
    result = sign(tmp_path, keys / "mine.pem")
    assert result.exit_code == 1
    assert "has no manifest.json" in result.stderr


def test_without_the_package(signed: Path, keys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("model_signing", "model_signing.signing", "model_signing.verifying"):
        monkeypatch.setitem(sys.modules, module, None)
    for call in (lambda: verify_signature(signed, keys / "mine.pub"), lambda: sign_bundle(signed, keys / "mine.pem")):
        with pytest.raises(CosmosRuntimeError, match=r'pip install "cosmos-export\[sign\]"') as caught:
            call()
        assert not isinstance(caught.value, BundleError)
