"""Puts edited files before a process of their own, and sees how it ends: the process outlives every typed error."""

import contextlib
import hashlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from cosmos_runtime.manifest_digest import DIGEST, NO_DIGEST, with_digest

from .edits import Edit

_ROOT = Path(__file__).resolve().parents[2]
_VICTIM = Path(__file__).with_name("victim.py")
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Ending:
    """How a meeting ended: "works", "refused", "untyped", "died" (by a signal) or "hung"."""

    kind: str
    error: str = ""
    message: str = ""
    traceback: str = ""

    @property
    def acceptable(self) -> bool:
        """Whether it is one that a user could do something about."""
        return self.kind in ("works", "refused")

    @property
    def cause(self) -> str:
        """The same for the same fault: where in the project an untyped error came out, or what the process died of."""
        lines = [line.strip() for line in self.traceback.splitlines() if "cosmos_" in line and "line" in line]
        return f"{self.kind} {self.error} {lines[-1] if lines else ''}".strip()

    def __str__(self) -> str:
        return f"{self.kind} {self.error}: {self.message}\n{self.traceback}".strip()


class Victim:
    """A process of `victim.py`; started anew after it died or hung."""

    def __init__(self, kind: str, timeout: float = 120) -> None:
        self._kind, self.timeout = kind, timeout
        self._process: subprocess.Popen[str] | None = None
        self._said: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the victim)

    def meet(self, folder: Path) -> Ending:
        """Hands it a folder, and waits for what becomes of it."""
        process = self.process
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(json.dumps({"folder": str(folder)}) + "\n")
            process.stdin.flush()
        ready, _, _ = select.select([process.stdout], [], [], self.timeout)
        answer = process.stdout.readline() if ready else ""
        if answer:
            found: dict[str, Any] = json.loads(answer)
            return Ending(found.pop("ending"), **found)
        return self._death(hung=not ready)

    def close(self) -> None:
        """Ends the process."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None
        self._said.close()

    @property
    def process(self) -> subprocess.Popen[str]:
        """The process, started where it does not run."""
        if self._process is None:
            environment = {
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": f"{_ROOT}{os.pathsep}{_ROOT / 'runtime'}",
            }
            self._said.seek(0)
            self._said.truncate()
            self._process = subprocess.Popen(
                [sys.executable, str(_VICTIM), self._kind],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._said,
                text=True,
                env=environment,
            )
        return self._process

    def _death(self, *, hung: bool) -> Ending:
        process = self.process
        if hung:
            process.kill()
        process.communicate()
        self._process = None
        self._said.seek(0)
        said = self._said.read().decode(errors="replace")[-2000:]
        if hung:
            return Ending("hung", message=f"no answer in {self.timeout} s; it said: {said}")
        code = process.returncode
        return Ending("died", signal.Signals(-code).name if code < 0 else f"exit {code}", f"it said: {said}")


@dataclass(frozen=True)
class Attack:
    """One edit of one file; `sealed` puts the manifest's sizes and hashes right again, as who made it would."""

    file: str
    edit: Edit
    sealed: bool

    def bytes_of(self, folder: Path) -> bytes:
        """What the file becomes."""
        return self.edit((folder / self.file).read_bytes())


class Arena:
    """A folder in which one file at a time is edited, and put right again."""

    def __init__(self, folder: Path, victim: Victim) -> None:
        self.folder, self._victim = folder, victim

    def ending_of(self, attack: Attack) -> Ending:
        """How it ends when the victim meets the folder with this attack."""
        with self.edited(attack):
            return self.meet()

    def meet(self) -> Ending:
        """How it ends when the victim meets the folder as it is."""
        return self._victim.meet(self.folder)

    @contextlib.contextmanager
    def edited(self, attack: Attack) -> Iterator[None]:
        """The folder with an attack's edit in it, for as long as the block lasts."""
        names = {attack.file, MANIFEST} if attack.sealed else {attack.file}
        before = {name: (self.folder / name).read_bytes() for name in names}
        try:
            raw = attack.bytes_of(self.folder)
            _write(self.folder / attack.file, raw)
            if attack.sealed:
                _write(self.folder / MANIFEST, _sealed(before[MANIFEST], attack.file, raw))
            yield
        finally:
            for name, content in before.items():
                _write(self.folder / name, content)


def _write(path: Path, content: bytes) -> None:
    """A new file of this name: the victim may still have the old one mapped."""
    path.unlink(missing_ok=True)
    path.write_bytes(content)


def _sealed(manifest: bytes, file: str, raw: bytes) -> bytes:
    """The manifest with the sizes and hashes of today, its own included."""
    document = json.loads(manifest)
    document["files"][file] = {"size": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    if DIGEST not in document:
        return json.dumps(document).encode()
    return with_digest(json.dumps({**document, DIGEST: NO_DIGEST})).encode()
