"""A bundle: the folder that an export wrote, opened and checked."""

import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cosmos_runtime.errors import BundleError
from cosmos_runtime.files import sha256_of
from cosmos_runtime.manifest import MANIFEST_NAME, FileEntry, Manifest

_WANTED = f"expected a bundle: the folder with {MANIFEST_NAME} that `cosmos-export` writes"
_CURE = "copy the bundle again or export it again"
# A manifest is a few kilobytes; a larger file is something else, and not worth reading into memory.
_LARGEST_MANIFEST = 64 << 20

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: its folder and its manifest. The files' contents are not read at opening."""

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> "Bundle":
        """Read the manifest and check that every listed file is there, inside the folder, with its listed size.

        Raises: BundleError where the folder, the manifest or a file is not as it should be.
        """
        folder = Path(path)
        _check_folder(folder)
        bundle = cls(folder, Manifest.from_json(_read_manifest(folder)))
        for name, entry in bundle.manifest.files.items():
            _check_file(folder, name, entry)
        return bundle

    def file(self, name: str) -> Path:
        """The path of a file that the manifest lists; BundleError for one that it does not."""
        if name not in self.manifest.files:
            raise BundleError(f"{self.path}: {name!r} is not listed in {MANIFEST_NAME}")
        return self.path / name

    def check_hashes(self, progress: Progress | None = None) -> None:
        """Compare the SHA-256 of every file with the manifest: finds what equal sizes hide, such as a flipped bit.

        `progress(file_name, bytes_done, bytes_in_all)` is called as bytes are read.

        Raises: BundleError naming the first file that differs.
        """
        in_all = sum(entry.size for entry in self.manifest.files.values())
        done = 0
        for name, entry in self.manifest.files.items():

            def on_bytes(count: int, name: str = name) -> None:
                nonlocal done
                done += count
                if progress is not None:
                    progress(name, done, in_all)

            _check_file(self.path, name, entry)
            _check_hash(self.path / name, entry, on_bytes)


def _check_folder(folder: Path) -> None:
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


def _read_manifest(folder: Path) -> str:
    path = folder / MANIFEST_NAME
    if not path.is_file():
        raise BundleError(f"{folder}: has no {MANIFEST_NAME}; {_WANTED}")
    if path.stat().st_size > _LARGEST_MANIFEST:
        raise BundleError(f"{path}: expected at most {_LARGEST_MANIFEST} bytes, got {path.stat().st_size}; {_CURE}")
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BundleError(f"{path}: cannot be read: {error}; {_CURE}") from error


def _check_file(folder: Path, name: str, entry: FileEntry) -> None:
    path = folder / name
    try:
        inside = path.resolve(strict=True).is_relative_to(folder.resolve())
        status = path.stat()
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of symbolic links
        raise BundleError(f"{path}: listed in {MANIFEST_NAME} but missing; {_CURE}") from error
    if not inside:
        raise BundleError(f"{path}: a symbolic link that leaves the bundle; put the file itself in the folder")
    if not stat.S_ISREG(status.st_mode):
        raise BundleError(f"{path}: expected a regular file; {_CURE}")
    if status.st_size != entry.size:
        raise BundleError(f"{path}: expected {entry.size} bytes, got {status.st_size}; {_CURE}")


def _check_hash(path: Path, entry: FileEntry, on_bytes: Callable[[int], None]) -> None:
    try:
        sha256 = sha256_of(path, on_bytes)
    except OSError as error:
        raise BundleError(f"{path}: cannot be read: {error.strerror}; {_CURE}") from error
    if sha256 != entry.sha256:
        raise BundleError(f"{path}: altered: expected SHA-256 {entry.sha256}, got {sha256}; {_CURE}")
