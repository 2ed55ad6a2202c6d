"""A bundle: the folder that an export wrote, opened and checked."""

import os
import stat
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from cosmos_runtime.errors import BundleError
from cosmos_runtime.files import HeldFiles, sha256_of
from cosmos_runtime.graph_check import check_files, check_graphs
from cosmos_runtime.manifest import MANIFEST_NAME, SAMPLER, FileEntry, Manifest
from cosmos_runtime.manifest_digest import digest_problem

_WANTED = f"expected a bundle: the folder with {MANIFEST_NAME} that `cosmos-export` writes"
# What to do about a bundle that is not whole.
CURE = "copy the bundle again or export it again"
# A manifest is a few kilobytes; a larger file is something else, and not worth reading into memory.
_LARGEST_MANIFEST = 64 << 20

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: its folder and its manifest. The weights are not read at opening."""

    path: Path
    manifest: Manifest
    _held: HeldFiles | None = field(default=None, compare=False, repr=False)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> "Bundle":
        """Read the manifest; check that every listed file is there, inside the folder, with its listed size, and that
        the graphs use no operators or files but those that they may (`cosmos_runtime.graph_check`).

        Raises: BundleError where the folder, the manifest or a file is not as it should be.
        """
        folder = Path(path)
        check_folder(folder)
        while True:
            held = HeldFiles(folder)
            try:
                return cls._read(folder, held)
            except BundleError:
                if held.in_place():
                    raise  # else another bundle took its place meanwhile, and that one is read

    @classmethod
    def _read(cls, folder: Path, held: HeldFiles) -> "Bundle":
        manifest = Manifest.from_json(read_manifest(folder).decode("utf-8"))
        for name, entry in manifest.files.items():
            check_file(folder, name, entry)
        check_files(manifest)
        check_graphs(folder, manifest)
        held.hold(_read_later(manifest))
        return cls(folder, manifest, held)

    def file(self, name: str) -> Path:
        """The path of a file that the manifest lists.

        The file is the one that was there at opening, though another bundle may have taken the folder's place since.

        Raises: BundleError for a file that the manifest does not list, or that went with the folder.
        """
        if name not in self.manifest.files:
            raise BundleError(f"{self.path}: {name!r} is not listed in {MANIFEST_NAME}")
        return self.path / name if self._held is None else self._held.path(name)

    def check_in_place(self) -> None:
        """Make sure that no other bundle has taken the folder's place: for whoever has just loaded several files,
        which might be some of one and some of the other. Raises: BundleError."""
        if self._held is not None:
            self._held.check()

    def check_hashes(self, progress: Progress | None = None) -> None:
        """Compare the SHA-256 of every file with the manifest, and the manifest with its own digest: finds what equal
        sizes hide, such as a flipped bit.

        `progress(file_name, bytes_done, bytes_in_all)` is called as bytes are read.

        Raises: BundleError naming the first file that differs. `cosmos_runtime.check_bundle` finds all of them.
        """
        self.check_in_place()
        problem = digest_problem(read_manifest(self.path), str(self.path / MANIFEST_NAME))
        if problem is not None:
            raise BundleError(f"{self.path / MANIFEST_NAME}: {problem}; {CURE}")
        in_all = sum(entry.size for entry in self.manifest.files.values())
        done = 0
        for name, entry in self.manifest.files.items():

            def on_bytes(count: int, name: str = name) -> None:
                nonlocal done
                done += count
                if progress is not None:
                    progress(name, done, in_all)

            check_file(self.path, name, entry)
            check_hash(self.path, name, entry, on_bytes)


def _read_later(manifest: Manifest) -> list[str]:
    """The files that a session reads when it first needs them."""
    samplers = [graph.file for name, graph in manifest.graphs.items() if name.startswith(f"{SAMPLER}.")]
    return samplers if manifest.tokenizer is None else [*samplers, manifest.tokenizer]


def check_folder(folder: Path) -> None:
    """Refuse what is no folder, saying what it is instead. Raises: BundleError."""
    if folder.is_dir():
        return
    if not folder.exists():
        raise BundleError(f"{folder}: no such folder; {_WANTED}")
    if (folder.parent / MANIFEST_NAME).is_file():
        raise BundleError(f"{folder}: {_WANTED}, got a file of one; give its folder instead: {folder.parent}")
    raise BundleError(f"{folder}: {_WANTED}, got a {_kind_of_file(folder)}")


def _kind_of_file(path: Path) -> str:
    if path.suffix in {".pt", ".pth", ".pt2", ".ts", ".bin", ".safetensors"}:
        return f"PyTorch file ({path.suffix}); export its checkpoint to a bundle first"
    if path.suffix in {".onnx", ".ort"}:
        return f"bare ONNX graph ({path.suffix}); export the checkpoint it came from to a bundle"
    return "single file"


def read_manifest(folder: Path) -> bytes:
    """The bytes of a folder's manifest, which are UTF-8. Raises: BundleError where there are none."""
    path = folder / MANIFEST_NAME
    if not path.is_file():
        raise BundleError(f"{folder}: has no {MANIFEST_NAME}; {_WANTED}")
    if path.stat().st_size > _LARGEST_MANIFEST:
        raise BundleError(f"{path}: expected at most {_LARGEST_MANIFEST} bytes, got {path.stat().st_size}; {CURE}")
    try:
        raw = path.read_bytes()
        raw.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BundleError(f"{path}: cannot be read: {error}; {CURE}") from error
    return raw


def check_file(folder: Path, name: str, entry: FileEntry) -> None:
    """Refuse a listed file that is missing, outside the folder, no file or of another size. Raises: BundleError."""
    path = folder / name
    try:
        inside = path.resolve(strict=True).is_relative_to(folder.resolve())
        status = path.stat()
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of symbolic links
        raise BundleError(f"{path}: listed in {MANIFEST_NAME} but missing; {CURE}") from error
    if not inside:
        raise BundleError(f"{path}: a symbolic link that leaves the bundle; put the file itself in the folder")
    if not stat.S_ISREG(status.st_mode):
        raise BundleError(f"{path}: expected a regular file; {CURE}")
    if status.st_size != entry.size:
        raise BundleError(f"{path}: expected {entry.size} bytes, got {status.st_size}; {CURE}")


def check_hash(folder: Path, name: str, entry: FileEntry, on_bytes: Callable[[int], None]) -> None:
    """Refuse a listed file of other contents; `on_bytes` hears how many are read. Raises: BundleError."""
    path = folder / name
    try:
        sha256 = sha256_of(path, on_bytes)
    except OSError as error:
        raise BundleError(f"{path}: cannot be read: {error.strerror}; {CURE}") from error
    if sha256 != entry.sha256:
        raise BundleError(f"{path}: altered: expected SHA-256 {entry.sha256}, got {sha256}; {CURE}")
