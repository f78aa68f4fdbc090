"""The output folder: its files, one run at a time, and every file whole or not there at all."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from quantize.errors import InputError
from quantize.files import PART_SUFFIX, made_folder, whole_file


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

    @contextmanager
    def writing(self, name: str) -> Iterator[BinaryIO]:
        """A file that appears under ``name`` when the block ends well, flushed to disk; else nothing changes.

        Raises:
            LabelfreeError: the file could not be written (disk full, ...).
        """
        with whole_file(self.path / name) as file:
            yield file

    def remove(self, name: str) -> None:
        """Remove a file that no longer fits the others, where it is there."""
        (self.path / name).unlink(missing_ok=True)
