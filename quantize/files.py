"""Opening and reading what the user named: files only, and no more of one than there can be sense in.

And writing files that are whole or not there at all.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import BinaryIO, Protocol

from quantize.errors import InputError, LabelfreeError

PART_SUFFIX = ".labelfree-part"
"""Of a file being written. No program but this one uses it: what bears it in an output folder is ours to
remove, and nothing else is."""

READ_BLOCK = 1 << 20


class Digest(Protocol):
    """What hears the bytes of a file while they are read or written, such as ``hashlib.sha256()``."""

    def update(self, data: bytes | memoryview, /) -> None:
        """Hear the next bytes."""


_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


@contextmanager
def open_file(path: str | Path, what: str) -> Iterator[FileIO]:
    """A file to read from, unbuffered. A pipe or a device, which may never end or never begin, is refused.

    Args:
        path: the file.
        what: what was expected there, for messages: ``prototxt``.

    Raises:
        InputError: there is no such thing, it is no file, or it cannot be read. What goes wrong inside the
            block with reading ends so too.
    """
    try:
        with open(path, "rb", buffering=0, opener=_open) as file:
            kind = stat.S_IFMT(os.fstat(file.fileno()).st_mode)
            if kind != stat.S_IFREG:
                raise InputError(
                    f"{path}: {_KINDS.get(kind, 'something else')}, not a file; the {what} was expected here"
                )
            yield file
    except OSError as error:
        raise InputError(f"{path}: cannot read the {what}: {error.strerror or error}") from None
    except ValueError as error:
        if "\0" not in str(path):
            raise
        raise InputError(f"{str(path)!r}: not a path") from error


def _open(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # a pipe that nobody writes to would be waited for


def read_start(path: str | Path, what: str, most: int) -> bytes:
    """The first ``most`` bytes of a file, or all that there are; raises as `open_file`."""
    with open_file(path, what) as file:
        return _start(file, most)


def _start(file: FileIO, most: int) -> bytes:
    pieces, size = [], 0
    while size < most and (piece := file.read(most - size)):
        pieces.append(piece)
        size += len(piece)
    return b"".join(pieces)


def read_file(path: str | Path, what: str, most: int) -> bytes:
    """The content of a file of at most ``most`` bytes.

    Raises:
        InputError: as `open_file`, or the file is larger.
    """
    with open_file(path, what) as file:
        claimed = os.fstat(file.fileno()).st_size  # 0 of files that are made as they are read
        data = _start(file, most + 1) if claimed <= most else b""
    if max(claimed, len(data)) > most:
        raise InputError(f"{path}: larger than {most >> 20} MiB; is this the {what}?")
    return data


def sha256(path: Path) -> str:
    """The hash of a file's content.

    Raises:
        InputError: the file cannot be read.
    """
    digest = hashlib.sha256()
    with open_file(path, "file") as file:
        while block := file.read(READ_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def made_folder(path: str | Path) -> Path:
    """A folder, made where it is not there.

    Raises:
        InputError: it cannot be made.
    """
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"output: {path}: cannot make or open this folder: {error.strerror}") from error
    return Path(path)


class Writable(Protocol):
    """What bytes are written to."""

    def write(self, data: bytes | memoryview, /) -> object:
        """Write the next bytes."""


@dataclass(frozen=True)
class _Heard:
    """A file whose bytes a digest hears while they are written."""

    file: BinaryIO
    digest: Digest

    def write(self, data: bytes | memoryview, /) -> int:
        self.digest.update(data)
        return self.file.write(data)


@contextmanager
def whole_file(path: Path, digest: Digest | None = None) -> Iterator[Writable]:
    """A file that appears at ``path`` when the block ends well, flushed to disk; else nothing changes.

    Args:
        path: the file.
        digest: hears what is written.

    Raises:
        LabelfreeError: the file could not be written (disk full, ...).
    """
    part = path.parent / f".{path.name}{PART_SUFFIX}"
    try:
        with open(part, "wb") as file:
            yield file if digest is None else _Heard(file, digest)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise LabelfreeError(
            f"{path}: cannot write: {error.strerror}; what was there before is unchanged"
        ) from error
    finally:
        part.unlink(missing_ok=True)
