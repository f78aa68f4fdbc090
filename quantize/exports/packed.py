"""NAME.lfq: a Caffe result at the size that its weights really have, and the way back, byte for byte.

The file is gzip. What is in it, in order:

- a line of JSON: ``labelfree`` (the version of the format, 1), ``prototxt`` and ``caffemodel`` (how many
  bytes each has), ``sha256`` (of the caffemodel), and ``blobs``, a list of ``[place, values, bits, levels]``;
- the prototxt;
- the caffemodel. Where it has at byte ``place`` the float32 values of one of ``blobs``, there are instead
  its ``levels`` different values, ascending by their bits, as little-endian float32, and then for each value
  the number of its level in ``bits`` bits, the highest first, filled up with zeros to a whole byte.

Any blob of few different values is coded so: weights of 4 bits, on whatever grid, take 4 bits.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass
from io import BytesIO, FileIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from quantize.arrays import FLOAT_BYTES
from quantize.caffenet.weights import MAX_BYTES, float_records
from quantize.errors import InputError
from quantize.files import made_folder, open_file, whole_file

SUFFIX = ".lfq"
VERSION = 1
MAX_HEADER = 16 << 20
MAX_PROTOTXT = 64 << 20
MAX_BITS = 12
"""Of a level's number: grids have up to 257 levels, 0 and -0 counting as two."""
_CHUNK = 1 << 20  # values, or bytes, at a time; a multiple of 8, so that codes of any width end with a byte
_FOREIGN = "not a file of `labelfree export --to caffe`, or damaged"


class _DamagedError(Exception):
    """The bytes are not what the format says."""


@dataclass(frozen=True)
class _Coded:
    """A blob whose values are numbers of levels.

    Attributes:
        place: of its first byte in the caffemodel.
        values: how many it has.
        bits: of the number of a level.
        levels: how many there are.
    """

    place: int
    values: int
    bits: int
    levels: int

    @property
    def end(self) -> int:
        """The byte of the caffemodel behind it."""
        return self.place + FLOAT_BYTES * self.values


@dataclass(frozen=True)
class _Header:
    labelfree: int
    prototxt: int
    caffemodel: int
    sha256: str
    blobs: list[_Coded]

    def check(self) -> None:
        """Check that all sizes are possible and fit each other.

        Raises:
            _DamagedError: they do not.
        """
        if self.labelfree != VERSION:
            raise _DamagedError(f"version {self.labelfree} of the format; this labelfree reads {VERSION}")
        if not 0 <= self.prototxt <= MAX_PROTOTXT or not 0 < self.caffemodel <= MAX_BYTES:
            raise _DamagedError(f"a prototxt of {self.prototxt} and a caffemodel of {self.caffemodel} bytes")
        end = 0
        for blob in self.blobs:
            possible = 1 <= blob.bits <= MAX_BITS and 1 <= blob.levels <= 1 << blob.bits and blob.values >= 1
            if not possible or not end <= blob.place or blob.end > self.caffemodel:
                raise _DamagedError(
                    f"a blob at byte {blob.place} of {blob.values} values of {blob.bits} bits"
                )
            end = blob.end


# ---- Packing ----


def packed(caffemodel: bytes, prototxt: bytes) -> bytes:
    """The content of a packed net.

    Args:
        caffemodel: the content of the quantized weights.
        prototxt: the net that belongs to them.

    Raises:
        InputError: the caffemodel is damaged.
    """
    coded, tables = [], []
    for start, end in float_records(caffemodel):
        values = np.frombuffer(caffemodel, "<u4", (end - start) // FLOAT_BYTES, start)
        levels = _levels(values)
        if levels is not None:
            bits = max(1, (len(levels) - 1).bit_length())
            coded.append(_Coded(start, len(values), bits, len(levels)))
            tables.append(levels)
    digest = hashlib.sha256(caffemodel).hexdigest()
    header = asdict(_Header(VERSION, len(prototxt), len(caffemodel), digest, []))
    header["blobs"] = [astuple(blob) for blob in coded]
    file = BytesIO()
    with gzip.GzipFile("", "wb", fileobj=file, mtime=0) as out:
        out.write(json.dumps(header).encode() + b"\n" + prototxt)
        place = 0
        for blob, levels in zip(coded, tables, strict=True):
            out.write(caffemodel[place : blob.place])
            out.write(levels.tobytes())
            values = np.frombuffer(caffemodel, "<u4", blob.values, blob.place)
            for start in range(0, blob.values, _CHUNK):
                numbers = np.searchsorted(levels, values[start : start + _CHUNK])
                out.write(_packed(numbers.astype(np.uint16), blob.bits))
            place = blob.end
        out.write(caffemodel[place:])
    return file.getvalue()


def _levels(values: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32] | None:
    """The different values, ascending; None where coding by them saves nothing."""
    levels = np.empty(0, values.dtype)
    for start in range(0, len(values), _CHUNK):
        levels = np.union1d(levels, values[start : start + _CHUNK])
        if len(levels) > 1 << MAX_BITS:
            return None
    bits = max(1, (len(levels) - 1).bit_length())
    saves = FLOAT_BYTES * len(levels) + len(values) * bits / 8 < FLOAT_BYTES * len(values)
    return levels if saves else None


def _packed(numbers: npt.NDArray[np.uint16], bits: int) -> bytes:
    places = np.arange(bits - 1, -1, -1, dtype=np.uint16)
    return np.packbits((numbers[:, None] >> places & 1).astype(np.uint8)).tobytes()


# ---- Unpacking ----


def unpack(path: Path, folder: Path, force: bool = False) -> tuple[Path, Path]:
    """Write the prototxt and the caffemodel that were packed: ``NAME.prototxt`` and ``NAME.caffemodel``.

    Memory does not grow with what the file says it holds.

    Args:
        path: the file, NAME.lfq.
        folder: for the two; made where it is not there.
        force: replace files of these names with other content.

    Returns:
        The paths of prototxt and caffemodel.

    Raises:
        InputError: it cannot be read, is damaged or no such file, or there are other files of these names.
        LabelfreeError: a file could not be written.
    """
    prototxt, caffemodel = (folder / f"{path.stem}{suffix}" for suffix in (".prototxt", ".caffemodel"))
    for written in (prototxt, caffemodel):
        if written.exists() and not force:
            raise InputError(f"{written}: there is a file already; choose another folder or give --force")
    with open_file(path, "packed net") as packed:
        stream = _Stream(packed)
        try:
            header = _read_header(stream.line(MAX_HEADER))
            text = stream.exactly(header.prototxt)
            made_folder(folder)
            with whole_file(caffemodel) as file:
                digest = hashlib.sha256()
                for piece in _pieces(stream, header):
                    digest.update(piece)
                    file.write(piece)
                if not stream.is_at_end() or digest.hexdigest() != header.sha256:
                    raise _DamagedError("its content is not that of the caffemodel that was packed")
        except _DamagedError as error:
            raise InputError(f"{path}: {_FOREIGN}: {error}") from None
    with whole_file(prototxt) as file:
        file.write(text)
    return prototxt, caffemodel


class _Stream:
    """What is in a gzip file, from its beginning to its end."""

    def __init__(self, file: FileIO) -> None:
        self._gzip = gzip.GzipFile(fileobj=file)

    def line(self, most: int) -> bytes:
        """The rest of the line, or ``most`` bytes of it."""
        with _told():
            return self._gzip.readline(most)

    def exactly(self, size: int) -> bytes:
        """The next ``size`` bytes."""
        with _told():
            data = self._gzip.read(size)
        if len(data) < size:
            raise _DamagedError("it ends too early")
        return data

    def is_at_end(self) -> bool:
        """Whether there is no more; the checksum is right then."""
        with _told():
            return not self._gzip.read(1)


@contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise _DamagedError(str(error)) from None


def _read_header(line: bytes) -> _Header:
    try:
        said: Any = json.loads(line)
        blobs = [_Coded(*map(_whole, blob)) for blob in said.pop("blobs")]
        digest = said.pop("sha256")
        header = _Header(blobs=blobs, sha256=digest, **{key: _whole(size) for key, size in said.items()})
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise _DamagedError("it does not begin with what it holds") from None
    header.check()
    return header


def _whole(value: object) -> int:
    if type(value) is not int:
        raise TypeError(value)
    return value


def _pieces(stream: _Stream, header: _Header) -> Iterator[bytes]:
    """The caffemodel, a bounded piece at a time."""
    place = 0
    for blob in header.blobs:
        yield from _copied(stream, blob.place - place)
        levels = np.frombuffer(stream.exactly(FLOAT_BYTES * blob.levels), "<u4")
        for start in range(0, blob.values, _CHUNK):
            yield levels[_numbers(stream, min(_CHUNK, blob.values - start), blob)].tobytes()
        place = blob.end
    yield from _copied(stream, header.caffemodel - place)


def _copied(stream: _Stream, size: int) -> Iterator[bytes]:
    for start in range(0, size, _CHUNK):
        yield stream.exactly(min(_CHUNK, size - start))


def _numbers(stream: _Stream, count: int, blob: _Coded) -> npt.NDArray[np.uint16]:
    """The next ``count`` numbers of levels of a blob."""
    data = np.frombuffer(stream.exactly(-(-count * blob.bits // 8)), np.uint8)
    digits = np.unpackbits(data, count=count * blob.bits).reshape(count, blob.bits)
    numbers = np.zeros(count, np.uint16)
    for digit in digits.T:
        numbers <<= 1
        numbers |= digit
    if numbers.max() >= blob.levels:
        raise _DamagedError(f"the blob at byte {blob.place} has a level of a number that there is not")
    return numbers
