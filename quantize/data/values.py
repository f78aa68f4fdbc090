"""Values for inputs that are no images: from .npy, .npz and HDF5 files, or one constant for all images.

Nothing is unpickled, and what a file claims is checked against its size before memory is taken for it.
"""

from __future__ import annotations

import math
import os
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from numpy.lib import format as npy

from quantize.arrays import FloatArray, Shape
from quantize.data.files import printable
from quantize.data.sources import HDF5_SUFFIXES
from quantize.data.transform import shape_text
from quantize.errors import InputError

ENDLESS = sys.maxsize
"""How many values a constant has."""
MAX_IN_MEMORY = 2 << 30
"""Bytes of an array in a .npz, which is unpacked as a whole, and of a chunk of an HDF5 dataset."""
CHUNK_CACHE = 64 << 20
"""Bytes: rows are read one by one, and a chunk should be unpacked once."""
NUMBERS = "fiub"
"""Kinds of numpy types that become float32: real and whole numbers, booleans."""
HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}

Array = npt.NDArray[Any]
Given = float | list[Any] | Path
"""What the configuration says about an input."""


@dataclass(frozen=True)
class Values:
    """What goes into one input: a value for each image, or the same for all.

    Attributes:
        where: the key and what it names, for messages.
        shape: of one value, without the batch axis.
        count: how many there are; `ENDLESS`: one for all images.
        read: value number i, of any numeric type and a shape that has as many values as ``shape``.
        name: what to call value number i in a message.
    """

    where: str
    shape: Shape
    count: int
    read: Callable[[int], Array]
    name: Callable[[int], str]

    def __len__(self) -> int:
        """Return the number of values."""
        return self.count

    def batches(
        self, size: int, start: int = 0, stop: int | None = None
    ) -> Iterator[tuple[FloatArray, None]]:
        """Values ``start <= i < stop`` in order, ``size`` at a time, as `Images.batches`; without labels.

        Raises:
            InputError: a value cannot be read or is not finite; names it.
        """
        stop = self.count if stop is None else min(stop, self.count)
        for first in range(start, stop, size):
            numbers = range(first, min(first + size, stop))
            rows = np.empty((len(numbers), *self.shape), np.float32)
            for place, number in enumerate(numbers):
                with np.errstate(over="ignore"):
                    rows[place, ...] = self._read(number)
            finite = np.isfinite(rows.reshape(len(rows), -1)).all(axis=1)
            if not finite.all():
                name = self.name(numbers[int(finite.argmin())])
                raise InputError(
                    f"{self.where}: {name} holds a NaN, an infinity or a number beyond float32; correct it"
                )
            yield rows, None

    def subset(self, numbers: Sequence[int]) -> Values:
        """Some of the values, by number; a constant stays what it is."""
        if self.count == ENDLESS:
            return self
        return replace(
            self,
            count=len(numbers),
            read=lambda number: self.read(numbers[number]),
            name=lambda number: self.name(numbers[number]),
        )

    def _read(self, number: int) -> Array:
        try:
            return self.read(number).reshape(self.shape)
        except (InputError, OSError, ValueError, RuntimeError) as error:
            raise InputError(f"{self.where}: {self.name(number)}: {error}; write it again") from error


def open_values(given: Given, blob: str, expected: Shape | None, key: str) -> Values:
    """Open the values of an input.

    Args:
        given: a folder of .npy files, one for each image in the order of their names; a .npy, .npz or HDF5
            file with a row for each image; a number or nested lists of numbers for all images.
        blob: the input, and the name of its array in a .npz or HDF5 file that holds several.
        expected: the shape of one value, without the batch axis; None: as given.
        key: the configuration's, for messages.

    Raises:
        InputError: there is no such file, it is damaged or holds no numbers, or they have another shape.
    """
    where = f"{key}: {printable(str(given))}" if isinstance(given, Path) else key
    try:
        values = _opened(given, where, blob) if isinstance(given, Path) else _constant(given, expected, where)
    except OSError as error:
        raise InputError(f"{where}: cannot be read: {error.strerror or error}") from error
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    if expected is not None and values.shape not in (expected, (1, *expected)):
        raise InputError(
            f"{where}: a value for each image has the shape {_text(values.shape)} but input {blob!r} takes "
            f"{_text(expected)}; save it so, or give data.input_shape"
        )
    return values if expected is None else replace(values, shape=expected)


def _constant(given: float | list[Any], expected: Shape | None, where: str) -> Values:
    try:
        value = np.asarray(given, np.float64)
    except (ValueError, TypeError, OverflowError):
        raise InputError("give a number, or lists of numbers of one length") from None
    if not value.size or not np.isfinite(value).all():
        raise InputError("give at least one number, and only finite ones")
    if not value.ndim:
        if expected is None:
            raise InputError("the net does not say the shape of this input: give data.input_shape, or a list")
        value = np.full(expected, value)
    return Values(where, value.shape, ENDLESS, lambda _: value, lambda _: "the constant")


def _opened(path: Path, where: str, blob: str) -> Values:
    if path.is_dir():
        return _npy_folder(path, where)
    if not path.is_file():
        raise InputError("no such folder or file; check the path")
    suffix = path.suffix.lower()
    if suffix in HDF5_SUFFIXES:
        return _hdf5(path, where, blob)
    if suffix not in (".npy", ".npz"):
        raise InputError("give a folder of .npy files, a .npy, a .npz or an HDF5 file (.h5), or numbers")
    return _npy(path, where) if suffix == ".npy" else _npz(path, where, blob)


@dataclass(frozen=True)
class _Header:
    """What a .npy file says about its array, and where that begins."""

    shape: Shape
    fortran: bool
    dtype: np.dtype[Any]
    offset: int

    @classmethod
    def of(cls, file: IO[bytes], size: int) -> _Header:
        """Read it from a file of ``size`` bytes.

        Raises:
            InputError: it is no .npy file of numbers, or holds more or less than it claims.
        """
        try:
            shape, fortran, dtype = HEADERS[npy.read_magic(file)](file)
        except Exception as error:  # numpy parses the header as Python and lets through what that raises
            raise InputError("not a .npy file, or a damaged one; save it again with numpy.save") from error
        if dtype.kind not in NUMBERS:
            raise InputError(f"holds {dtype}, not numbers; save it as float32")
        if min(shape, default=1) < 1:
            raise InputError(f"holds no values: its shape is {shape}")
        header = cls(shape, fortran, dtype, file.tell())
        if header.offset + header.bytes != size:
            raise InputError(
                f"damaged: it claims {header.bytes} bytes of values but has {size - header.offset}"
            )
        return header

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def row(self) -> tuple[Shape, int]:
        """Shape and bytes of one value, where there is one in each row.

        Raises:
            InputError: it is a single number, or the rows do not lie one behind the other.
        """
        if not self.shape:
            raise InputError("holds a single number; it needs a row for each image, or write the number here")
        if self.fortran:
            raise InputError("saved column by column; save numpy.ascontiguousarray of it")
        return self.shape[1:], self.bytes // self.shape[0]


def _header_of(path: str | Path) -> _Header:
    if not os.path.isfile(path):
        raise InputError("not a file")
    with open(path, "rb") as file:
        return _Header.of(file, os.fstat(file.fileno()).st_size)


def _npy_folder(path: Path, where: str) -> Values:
    """A .npy file for each image, in the order of their names, as the images of a folder."""
    files = sorted(str(file) for file in path.rglob("*.npy") if not file.name.startswith("."))
    if not files:
        raise InputError("holds no .npy files; give one for each image, in the order of their names")
    names = [printable(os.path.relpath(file, path)) for file in files]
    headers = []
    for file, name in zip(files, names, strict=True):
        try:
            headers.append(_header_of(file))
        except InputError as error:
            raise InputError(f"{name}: {error}") from error
        if headers[-1].shape != headers[0].shape:
            shapes = f"{_text(headers[-1].shape)} and {names[0]} is {_text(headers[0].shape)}"
            raise InputError(f"{name} is {shapes}; all must have one shape")

    def read(number: int) -> Array:
        header = headers[number]
        values = np.fromfile(files[number], header.dtype, math.prod(header.shape), offset=header.offset)
        return values.reshape(header.shape, order="F" if header.fortran else "C")

    return Values(where, headers[0].shape, len(files), read, names.__getitem__)


def _npy(path: Path, where: str) -> Values:
    """A row for each image, read where it lies."""
    header = _header_of(path)
    shape, size = header.row()

    def read(number: int) -> Array:
        return np.fromfile(path, header.dtype, math.prod(shape), offset=header.offset + number * size)

    return Values(where, shape, header.shape[0], read, "row {}".format)


def _npz(path: Path, where: str, blob: str) -> Values:
    """A row for each image of one array; it is unpacked when the first is read."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
            entry = archive.getinfo(_chosen(names, blob) + ".npy")
            with archive.open(entry) as file:
                header = _Header.of(file, entry.file_size)
    except (zipfile.BadZipFile, zlib.error, RuntimeError, NotImplementedError, EOFError) as error:
        raise InputError(f"not a .npz, or a damaged one ({error}); save it again with numpy.savez") from error
    if header.bytes > MAX_IN_MEMORY:
        raise InputError(f"its array {header.shape} is too large to be unpacked; save it as .npy")
    shape, size = header.row()

    @cache
    def unpacked() -> bytes:
        try:
            with zipfile.ZipFile(path) as archive, archive.open(entry) as file:
                return file.read(header.offset + header.bytes)
        except (zipfile.BadZipFile, zlib.error, RuntimeError, NotImplementedError, EOFError) as error:
            raise InputError(f"damaged ({error})") from error

    def read(number: int) -> Array:
        return np.frombuffer(unpacked(), header.dtype, math.prod(shape), header.offset + number * size)

    return Values(where, shape, header.shape[0], read, "row {}".format)


def _hdf5(path: Path, where: str, blob: str) -> Values:
    """A row for each image of one dataset, read where it lies."""
    try:
        import h5py
    except ImportError:
        raise InputError("needs h5py: pip install 'labelfree[hdf5]', or save the values as .npy") from None
    try:
        file = h5py.File(path, "r", rdcc_nbytes=CHUNK_CACHE)
        data = file[_chosen(list(file), blob)]
        if not isinstance(data, h5py.Dataset) or data.dtype.kind not in NUMBERS or not data.shape:
            raise InputError(f"{data.name} is no array of numbers with a row for each image")
        if data.is_virtual or data.external or data.file.filename != file.filename:
            raise InputError(f"the values of {data.name} are in another file; copy them into this one")
        if not data.size:
            raise InputError(f"{data.name} holds no values: its shape is {data.shape}")
        if math.prod(data.chunks or ()) * data.dtype.itemsize > MAX_IN_MEMORY:
            raise InputError(f"the chunks of {data.name}, {data.chunks}, are too large; write smaller ones")
    except (OSError, KeyError, RuntimeError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"not an HDF5 file, or a damaged one ({reason}); copy it again") from error

    def read(number: int) -> Array:
        return np.asarray(data[number])

    return Values(where, tuple(data.shape[1:]), data.shape[0], read, "row {}".format)


def _chosen(names: Sequence[str], blob: str) -> str:
    """The array of an input: the one of its name, or the only one."""
    if blob in names:
        return blob
    if len(names) == 1:
        return names[0]
    shown = ", ".join(map(printable, names[:10])) or "none"
    raise InputError(f"has no array {blob!r}; it has {shown}: name one as the input")


def _text(shape: Shape) -> str:
    return shape_text(shape) or "of one number"
