"""The output folder: its files, one run at a time, and every file whole or not there at all."""

from __future__ import annotations

import fcntl
import hashlib
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from quantize.errors import InputError
from quantize.files import PART_SUFFIX, Writable, made_folder, sha256, whole_file
from quantize.record import StageName


@dataclass(frozen=True)
class Files:
    """Names of the output files."""

    quantized: str
    renorm: str
    val: str
    deploy: str

    @classmethod
    def of(cls, name: str) -> Files:
        """The files of a run called ``name``."""
        return cls(
            f"{name}_quantized.caffemodel",
            f"{name}_renorm.caffemodel",
            f"{name}_val.prototxt",
            f"{name}_deploy.prototxt",
        )

    @property
    def of_stage(self) -> Mapping[StageName, str]:
        """The caffemodel that a stage writes, where it does."""
        return {"weights": self.quantized, "renorm": self.renorm}


def is_held(path: Path) -> bool:
    """Whether a run holds a folder that is there."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


class OutputFolder:
    """A folder held by this process; made where it is not there.

    The folder itself is locked, so nothing is left behind when the process is killed. What killed runs left
    half written (``.NAME.labelfree-part``) is removed.

    Raises:
        InputError: the folder cannot be made or written, or another run holds it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._digests: dict[str, str] = {}
        try:
            self._descriptor = os.open(made_folder(path), os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            raise InputError(f"output: {path}: cannot make or open this folder: {error.strerror}") from error
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for leftover in path.glob(f".*{PART_SUFFIX}"):
                leftover.unlink()
            with tempfile.TemporaryFile(dir=path):  # fails where nothing can be written
                pass
        except BlockingIOError as error:
            self.close()
            raise InputError(
                f"output: {path}: another labelfree run is writing here; wait or choose another"
            ) from error
        except OSError as error:
            self.close()
            raise InputError(
                f"output: {path}: cannot write here: {error.strerror}; choose another folder"
            ) from error

    def close(self) -> None:
        """Let other runs use the folder."""
        os.close(self._descriptor)

    def write(self, name: str, content: bytes | Callable[[Writable], None]) -> str:
        """Write a file, flushed to disk; where that fails nothing changes.

        Args:
            name: its name.
            content: the bytes, or what writes them.

        Returns:
            Its sha256.

        Raises:
            LabelfreeError: the file could not be written (disk full, ...).
        """
        digest = hashlib.sha256()
        with whole_file(self.path / name, digest) as file:
            if isinstance(content, bytes):
                file.write(content)
            else:
                content(file)
        self._digests[name] = digest.hexdigest()
        return self._digests[name]

    def digest(self, name: str) -> str | None:
        """The sha256 of a file, which is read once; None: it is not there."""
        path = self.path / name
        if name not in self._digests and path.exists():
            self._digests[name] = sha256(path)
        return self._digests.get(name)

    def remove(self, name: str) -> None:
        """Remove a file that no longer fits the others, where it is there."""
        (self.path / name).unlink(missing_ok=True)
        self._digests.pop(name, None)
