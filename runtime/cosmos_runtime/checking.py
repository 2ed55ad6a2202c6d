"""Every byte of a bundle against its manifest, and against a signature: all that is wrong, not the first of it."""

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from cosmos_runtime.bundle import CURE, Progress, check_file, check_folder, check_hash, read_manifest
from cosmos_runtime.errors import BundleError
from cosmos_runtime.graph_check import check_files, check_graph
from cosmos_runtime.manifest import MANIFEST_NAME, ONNX, FileEntry, Manifest
from cosmos_runtime.manifest_digest import DIGEST, digest_problem

# The signature's file in a bundle's folder: the name that the tools of the OpenSSF Model Signing format give it.
SIGNATURE_NAME = "model.sig"


@dataclass(frozen=True)
class Finding:
    """What is wrong with one file of a bundle."""

    file: str
    problem: str


@dataclass(frozen=True)
class CheckedBundle:
    """What a check found: `findings` is empty where every file is as it was exported.

    `files` and `size` are the number and the bytes of what was read; `signed` is whether a signature was checked and
    holds; `notes` say what could not be checked.
    """

    path: Path
    files: int
    size: int
    findings: tuple[Finding, ...]
    signed: bool = False
    notes: tuple[str, ...] = ()

    @property
    def good(self) -> bool:
        """Whether nothing is wrong."""
        return not self.findings


def check_bundle(
    path: str | os.PathLike[str], *, key: str | os.PathLike[str] | None = None, progress: Progress | None = None
) -> CheckedBundle:
    """Read every file of a bundle and compare it with the manifest, the manifest with its own digest, the graphs with
    what they may use; with the `key` (a PEM file with a public key) also the whole with its signature.

    Files that the manifest does not list are found, too. Nothing is written, and nothing is loaded.

    Raises: BundleError where there is no bundle at `path`, InputError for a `key` that is none.
    """
    folder = Path(path)
    check_folder(folder)
    raw = read_manifest(folder)
    findings: list[Finding] = []
    hashed = {} if key is None else _check_signature(folder, Path(key), findings)
    signed = key is not None and not findings
    manifest = _check_manifest(raw, findings)
    if manifest is None:
        return CheckedBundle(folder, 1, len(raw), tuple(findings), signed)
    findings += _contents(folder, manifest, hashed, progress)
    findings += [Finding(name, f"not listed in {MANIFEST_NAME}") for name in _unlisted(folder, manifest)]
    return CheckedBundle(
        path=folder,
        files=len(manifest.files) + 1,
        size=len(raw) + sum(entry.size for entry in manifest.files.values()),
        findings=tuple(findings),
        signed=signed,
        notes=tuple(_notes(folder, manifest, raw, key is not None)),
    )


def _check_signature(folder: Path, key: Path, findings: list[Finding]) -> dict[str, str]:
    """The SHA-256 of every file, hashed on the way; empty where the signature does not hold."""
    from cosmos_runtime.signatures import verify_signature

    try:
        return verify_signature(folder, key)
    except BundleError as error:
        findings.append(Finding(SIGNATURE_NAME, _without_name(error, folder / SIGNATURE_NAME)))
        return {}


def _check_manifest(raw: bytes, findings: list[Finding]) -> Manifest | None:
    try:
        problem = digest_problem(raw, MANIFEST_NAME)
        manifest = Manifest.from_json(raw.decode("utf-8"))
        check_files(manifest)
    except BundleError as error:
        findings.append(Finding(MANIFEST_NAME, _without_name(error, MANIFEST_NAME)))
        return None
    if problem is not None:
        findings.append(Finding(MANIFEST_NAME, problem))
    return manifest


def _contents(
    folder: Path, manifest: Manifest, hashed: Mapping[str, str], progress: Progress | None
) -> Iterator[Finding]:
    """What is wrong with the listed files: one finding each."""
    in_all = sum(entry.size for entry in manifest.files.values())
    done = 0
    for name, entry in manifest.files.items():

        def on_bytes(count: int, name: str = name) -> None:
            nonlocal done
            done += count
            if progress is not None:
                progress(name, done, in_all)

        try:
            _check_content(folder, manifest, name, entry, hashed.get(name), on_bytes)
        except BundleError as error:
            yield Finding(name, _without_name(error, folder / name))


def _check_content(
    folder: Path,
    manifest: Manifest,
    name: str,
    entry: FileEntry,
    sha256: str | None,
    on_bytes: Callable[[int], None],
) -> None:
    check_file(folder, name, entry)
    if sha256 != entry.sha256:  # not hashed yet, or another: then it is read again to say so
        check_hash(folder, name, entry, on_bytes)
    if manifest.graph_format == ONNX and (name.endswith(".onnx") or _is_graph(manifest, name)):
        check_graph(folder, manifest, name)


def _is_graph(manifest: Manifest, name: str) -> bool:
    return any(graph.file == name for graph in manifest.graphs.values())


def _unlisted(folder: Path, manifest: Manifest) -> list[str]:
    """Files, links and the like that neither the manifest nor this package put there."""
    found = []
    for parent, folders, files in os.walk(folder):
        names = [*files, *(name for name in folders if Path(parent, name).is_symlink())]
        found += [Path(parent, name).relative_to(folder).as_posix() for name in names]
    return sorted(set(found) - {MANIFEST_NAME, SIGNATURE_NAME, *manifest.files})


def _notes(folder: Path, manifest: Manifest, raw: bytes, key_given: bool) -> Iterator[str]:
    if f'"{DIGEST}"'.encode() not in raw:
        made_by = f"{manifest.tool['name']} {manifest.tool['version']}"
        yield f"{MANIFEST_NAME} has no digest of itself, as {made_by} made none: a change in it would not be found"
    if not key_given and (folder / SIGNATURE_NAME).exists():
        yield f"it is signed; --key PUBLIC.pem checks by whom ({SIGNATURE_NAME} was not read)"


def _without_name(error: BundleError, name: str | Path) -> str:
    """The message without the file's name at its head and the usual cure at its end, which a report says once."""
    return str(error).removeprefix(f"{name}: ").removesuffix(f"; {CURE}")
