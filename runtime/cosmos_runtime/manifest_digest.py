"""The manifest's SHA-256 of itself, taken with zeros in its place: what finds a flipped bit in the manifest, too.

It protects from accidents, not from people: who alters a manifest can compute it again, as nobody can a signature.
"""

import hashlib

from cosmos_runtime.json_fields import Fields, parse_object

# A pattern for `Fields.text`, and its words.
SHA256, SHA256_WORDS = "[0-9a-f]{64}", "64 lower-case hexadecimal digits"

DIGEST = "digest"
# Recorded since the digest is. A manifest has both keys or, of before, neither: whichever is alone, the other was lost.
OPERATORS = "operators"
NO_DIGEST = "0" * 64


def with_digest(text: str) -> str:
    """A manifest's text, whose last key is a digest of zeros, with its digest."""
    before, after = text.rsplit(NO_DIGEST, 1)
    return f"{before}{hashlib.sha256(text.encode()).hexdigest()}{after}"


def check_digest_field(fields: Fields) -> str | None:
    """The digest that a manifest claims; None from the manifests of before there was one.

    Raises: BundleError where it is missing, or not a SHA-256.
    """
    if DIGEST not in fields.values and OPERATORS not in fields.values:
        return None
    fields.value(OPERATORS)
    return fields.text(DIGEST, pattern=SHA256, expected=SHA256_WORDS)


def digest_problem(raw: bytes, document: str) -> str | None:
    """What is wrong with the bytes of a manifest by its own digest; None where they fit, or where it has none.

    Raises: BundleError naming `document` where they are no manifest at all.
    """
    digest = check_digest_field(parse_object(raw.decode("utf-8", errors="replace"), document))
    if digest is None:
        return None
    sha256 = hashlib.sha256(NO_DIGEST.encode().join(raw.rsplit(digest.encode(), 1))).hexdigest()
    return None if sha256 == digest else f"altered: its own digest says SHA-256 {digest}, got {sha256}"
