"""Where images come from: an LMDB of Datums, a folder of image files, or a list of image files."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from google.protobuf.message import DecodeError

from quantize.caffenet import Datum
from quantize.caffenet.schema import AnnotatedDatum
from quantize.data.decode import decode, image_size
from quantize.data.files import (
    IMAGE_SUFFIXES,
    LIST_LINE,
    FolderLabels,
    ImageFile,
    files_in_folder,
    files_in_list,
    printable,
)
from quantize.data.lmdb_file import LmdbFile, is_lmdb_file
from quantize.errors import InputError
from quantize.files import read_file

HDF5_SUFFIXES = frozenset({".h5", ".hdf5"})
HDF5_MAGIC = b"\x89HDF\r\n\x1a\n"
MAX_IMAGE_BYTES = 1 << 30
MAKE_LMDB = "make an LMDB from the images with `labelfree make-lmdb IMAGES LMDB`"

Pixels = npt.NDArray[np.uint8] | npt.NDArray[np.float32]


@dataclass(frozen=True)
class Image:
    """One image as stored.

    Attributes:
        pixels: uint8 or float32, shape (channels, height, width), color in the order blue, green, red.
        label: the class, or None where the source states none.
    """

    pixels: Pixels
    label: int | None


class Source(ABC):
    """Images by number. Reading is safe from several threads at once.

    Attributes:
        path: what the user named, for messages.
        folders: what its subfolders were taken for; None where there are none.
    """

    path: Path
    folders: FolderLabels | None = None

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of images."""

    @abstractmethod
    def name(self, index: int) -> str:
        """Return what to call image ``index`` in a message: a file's path or an LMDB key."""

    @abstractmethod
    def read(self, index: int, color: bool | None = None) -> Image:
        """Read image ``index``.

        Args:
            index: 0 <= index < len.
            color: how encoded images are decoded: True to BGR, False to gray, None as Caffe does by
                default (image files to BGR, encoded Datums with the channels they have). Pixels stored
                raw stay as they are.

        Raises:
            InputError: the image is missing or damaged; names it.
        """

    def check(self, numbers: Iterable[int]) -> None:  # noqa: B027 - records of an LMDB exist once it opens
        """Raise InputError if one of some images is missing, without reading any."""

    @abstractmethod
    def files(self, numbers: Iterable[int]) -> list[str]:
        """Return the paths of the files that some images lie in."""

    def close(self) -> None:  # noqa: B027 - lists of files hold nothing
        """Release what the source holds."""


class LmdbSource(Source):
    """The Datums of an LMDB in the order of their keys, which is the order Caffe reads them in.

    Args:
        path: the LMDB's folder, or its data file.

    Raises:
        InputError: damaged, empty or unreadable.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = LmdbFile(path / "data.mdb" if path.is_dir() else path)

    def __len__(self) -> int:
        """Return the number of Datums."""
        return len(self._file)

    def name(self, index: int) -> str:
        """Return the key of Datum ``index``."""
        key, _ = self._file.record(index)
        return printable(key.decode("utf-8", "backslashreplace"))

    def read(self, index: int, color: bool | None = None) -> Image:
        """Read Datum ``index``; see Source.read."""
        _, value = self._file.record(index)
        try:
            datum, label = _parsed(value)
            pixels = datum_pixels(datum, color)
        except DecodeError as error:
            raise InputError(f"{self.path}: record {self.name(index)}: not a Datum of Caffe") from error
        except InputError as error:
            raise InputError(f"{self.path}: record {self.name(index)}: {error}") from error
        return Image(pixels, label)

    def files(self, numbers: Iterable[int]) -> list[str]:  # noqa: ARG002 - all lie in one
        """Return the data file."""
        return [str(self._file.path)]

    def close(self) -> None:
        """Close the LMDB."""
        self._file.close()


def _parsed(record: bytes) -> tuple[Datum, int | None]:
    """The Datum of an LMDB's record and its label; of SSD's AnnotatedDatum the boxes are not looked at."""
    datum = Datum.FromString(record)
    is_of_class = True
    if not datum.data and not datum.float_data:
        annotated = AnnotatedDatum.FromString(record)
        if annotated.HasField("datum"):
            datum, is_of_class = annotated.datum, not annotated.HasField("type")
    return datum, datum.label if is_of_class and datum.HasField("label") else None


def datum_pixels(datum: Datum, color: bool | None = None) -> Pixels:
    """Return the pixels of a Datum: raw bytes, an encoded image or floats, as Caffe takes them.

    Returns:
        uint8 or float32 array (channels, height, width).

    Raises:
        InputError: the sizes that the Datum claims do not match what it holds, or it holds no image. The
            message lacks the Datum's name.
    """
    if datum.encoded:
        return decode(datum.data, color)
    shape = (datum.channels, datum.height, datum.width)
    stated = "x".join(map(str, shape))
    if min(shape) <= 0:
        raise InputError(f"the Datum claims the impossible size {stated}")
    held = len(datum.data) or len(datum.float_data)
    if held != shape[0] * shape[1] * shape[2]:
        raise InputError(f"the Datum claims {stated} values but holds {held}")
    if datum.data:
        return np.frombuffer(datum.data, np.uint8).reshape(shape)
    values = np.array(datum.float_data, np.float32).reshape(shape)
    if not np.isfinite(values).all():
        raise InputError("the Datum holds values that are not finite")
    return values


class FileSource(Source):
    """Image files, decoded to 8-bit BGR as Caffe's ImageData layer does (see decode for EXIF orientation).

    Args:
        path: what the user named: the folder or the list.
        files: the images in order.
        folders: see `Source`.
    """

    def __init__(self, path: Path, files: Sequence[ImageFile], folders: FolderLabels | None = None) -> None:
        self.path = path
        self.folders = folders
        self._files = files
        self._is_list = any(file.origin for file in files[:1])

    def __len__(self) -> int:
        """Return the number of files."""
        return len(self._files)

    def name(self, index: int) -> str:
        """Return the file's path below the folder that was named; else its whole path."""
        path = self._files[index].path
        return printable(
            os.path.relpath(path, self.path) if path.startswith(f"{self.path}{os.sep}") else path
        )

    def read(self, index: int, color: bool | None = None) -> Image:
        """Read and decode file ``index``; see Source.read."""
        file = self._files[index]
        try:
            data = read_file(file.path, "image", MAX_IMAGE_BYTES)
        except InputError as error:
            raise InputError(f"{file.origin}{error}") from None
        try:
            pixels = decode(data, color is not False)
        except InputError as error:
            raise InputError(f"{file.origin}{printable(file.path)}: {error}") from error
        return Image(pixels, file.label)

    def sizes(self, count: int) -> Iterator[tuple[int, int]]:
        """(height, width) of at most ``count`` files, spread evenly, from their headers: nothing is decoded.

        Files that are no images or cannot be read are left out; `read` says what is wrong with them.
        """
        count = min(count, len(self))
        for number in range(count):
            try:
                data = read_file(self._files[len(self) * number // count].path, "image", MAX_IMAGE_BYTES)
            except InputError:
                continue
            size = image_size(data)
            if size is not None:
                yield size

    def files(self, numbers: Iterable[int]) -> list[str]:
        """Return the images' files."""
        return [self._files[number].path for number in numbers]

    def check(self, numbers: Iterable[int]) -> None:
        """Raise InputError if one of some files that a list names is missing; a folder was just looked at."""
        for file in (self._files[number] for number in numbers) if self._is_list else ():
            if not os.path.isfile(file.path):
                raise InputError(f"{file.origin}{printable(file.path)}: no such file; {LIST_LINE}")


class Selection(Source):
    """Some images of a source, by number."""

    def __init__(self, source: Source, numbers: Sequence[int]) -> None:
        self.path = source.path
        self.folders = source.folders
        self._source = source
        self._numbers = numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def name(self, index: int) -> str:
        return self._source.name(self._numbers[index])

    def read(self, index: int, color: bool | None = None) -> Image:
        return self._source.read(self._numbers[index], color)

    def check(self, numbers: Iterable[int]) -> None:
        self._source.check(self._numbers[number] for number in numbers)

    def files(self, numbers: Iterable[int]) -> list[str]:
        return self._source.files(self._numbers[number] for number in numbers)

    def close(self) -> None:
        self._source.close()


def open_source(path: Path) -> Source:
    """Open an LMDB (its folder or data file), a folder of images, or a list of images.

    Raises:
        InputError: there is no such thing, it holds no images, or it is in a format that is not read
            (LevelDB, HDF5).
    """
    try:
        if path.is_dir():
            return _open_folder(path)
        if path.is_file():
            return _open_file(path)
    except OSError as error:
        raise InputError(f"{printable(str(path))}: cannot be read: {error.strerror}") from error
    except ValueError as error:  # a path with a null character
        raise InputError(f"{printable(str(path))}: not a path") from error
    raise InputError(
        f"{printable(str(path))}: no such LMDB, image folder or list of images; check the path"
        " (relative paths in a configuration start at its file)"
    )


def _open_folder(path: Path) -> Source:
    if (path / "data.mdb").is_file():
        return LmdbSource(path)
    if (path / "lock.mdb").exists():
        raise InputError(f"{path}: an LMDB without its data.mdb; copy it again or {MAKE_LMDB}")
    if (path / "CURRENT").exists() and any(path.glob("MANIFEST-*")):
        raise InputError(f"{path}: a LevelDB, which labelfree does not read; {MAKE_LMDB}")
    return FileSource(path, *files_in_folder(path))


def _open_file(path: Path) -> Source:
    if is_lmdb_file(path):
        return LmdbSource(path)
    with path.open("rb") as file:
        start = file.read(4096)
    suffix = path.suffix.lower()
    if suffix in HDF5_SUFFIXES or start.startswith(HDF5_MAGIC):
        raise InputError(f"{path}: an HDF5 file, which labelfree does not read; {MAKE_LMDB}")
    if suffix in IMAGE_SUFFIXES:
        raise InputError(f"{path}: a single image; give its folder, a list of images or an LMDB")
    if b"\0" in start:
        raise InputError(f"{path}: neither an LMDB nor a list of images; {LIST_LINE}")
    return FileSource(path, list(files_in_list(path)))
