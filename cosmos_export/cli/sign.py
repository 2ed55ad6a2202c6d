"""`cosmos-export sign`: put your name to a bundle."""

from __future__ import annotations

from pathlib import Path

import click

from cosmos_export.cli.group import fail


@click.command("sign")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--key",
    metavar="PRIVATE.pem",
    required=True,
    type=click.Path(path_type=Path),
    help="Your private key: PEM, elliptic curve P-256, P-384 or P-521.",
)
@click.option(
    "--password-env",
    metavar="VARIABLE",
    help="Environment variable with the key's password, where it has one; default: you are asked for it.",
)
def sign_command(bundle: Path, key: Path, password_env: str | None) -> None:
    """Sign BUNDLE, as yours and unaltered.

    Whoever has your public key can then tell both. The files are first compared with the manifest. The signature,
    BUNDLE/model.sig, is over every file, in the OpenSSF Model Signing format; no network is used. Exporting to the same
    place again makes a bundle without one. Needs pip install "cosmos-export[sign]".

    \b
    Examples:
      openssl ecparam -name prime256v1 -genkey -noout -out private.pem      # once: your key,
      openssl ec -in private.pem -pubout -out public.pem                    # and its public half
      cosmos-export sign bundles/demo --key private.pem
      cosmos-run check bundles/demo --key public.pem                        # on the machine that runs it
    """
    from cosmos_runtime import Bundle, sign_bundle

    Bundle.open(bundle)  # says what is wrong where there is no bundle, before it asks for a password
    signature = sign_bundle(bundle, key, _password(key, password_env))
    click.echo(f"{signature}: signs every file of {bundle} with {key}")


def _password(key: Path, variable: str | None) -> str | None:
    import os

    if variable is not None:
        if variable not in os.environ:
            fail(f"--password-env {variable}: there is no such environment variable")
        return os.environ[variable]
    return click.prompt(f"Password of {key}", hide_input=True, err=True) if _is_encrypted(key) else None


def _is_encrypted(key: Path) -> bool:
    """Whether a PEM file says so: in its first line, or in a header of the older form."""
    try:
        head = key.read_bytes()[:200]
    except OSError:
        return False
    return b"BEGIN ENCRYPTED PRIVATE KEY" in head or b"Proc-Type: 4,ENCRYPTED" in head
