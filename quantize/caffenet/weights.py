"""A ``.caffemodel`` in memory: the blobs of every layer as numpy arrays, the rest as the bytes of the file.

A caffemodel is a ``NetParameter`` in protobuf's wire format. Parsing half a gigabyte of it with protobuf
would copy every weight twice, so the file is read once and its records are walked: a blob's data become a
view of its bytes, protobuf parses what is said about them, and whatever was not touched is written back byte
for byte. Every size that the file claims is checked against the bytes that are there before anything is made
of it, and nothing here recurses.

The file is not mapped: a mapped file that another program shortens, or whose disk fails, kills the process.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from google.protobuf.message import DecodeError, Message

from quantize.arrays import FloatArray
from quantize.caffenet.other_formats import FIRST_BYTES, is_text, not_but, other_format
from quantize.caffenet.schema import BlobProto, BlobShape, LayerParameter, V1LayerParameter
from quantize.caffenet.strings import to_bytes, to_text
from quantize.caffenet.upgrade import UnsupportedLayerError, upgrade_v1_layer
from quantize.errors import InputError, LabelfreeError
from quantize.files import Digest, Writable, open_file

MAX_BYTES = 2**31 - 1
"""The largest message that protobuf, and so Caffe, reads or writes."""

MAX_NAME = 1 << 16
MAX_AXES = 32
"""``kMaxBlobAxes`` in Caffe's ``blob.hpp``."""

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types; 3 and 4 are groups, which Caffe never used
_SIZES = {_FIXED64: 8, _FIXED32: 4}
_NET_NAME, _NET_LAYERS, _NET_LAYER = 1, 2, 100  # field numbers in caffe.proto
_LAYER_NAME, _LAYER_BLOBS = 1, 7
_V1_NAME, _V1_BLOBS = 4, 6
_BLOB_DATA, _BLOB_DOUBLE_DATA, _BLOB_RAW_DATA = 5, 8, 12
_BLOB_SHAPES = (1, 2, 3, 4, 7)
_BLOB_RAW_TYPE = 10
_RAW_TYPES = {BlobProto.DOUBLE: "<f8", BlobProto.FLOAT: "<f4", BlobProto.FLOAT16: "<f2"}
_LEGACY_SHAPE = ("num", "channels", "height", "width")
Parsed = TypeVar("Parsed", bound=Message)
_NAME_AND_BLOBS = {_NET_LAYER: (_LAYER_NAME, _LAYER_BLOBS), _NET_LAYERS: (_V1_NAME, _V1_BLOBS)}


class _DamagedError(Exception):
    """The bytes are not the message they should be."""


@dataclass(frozen=True)
class _Field:
    """One record of a message: bytes ``tag:end`` of the buffer, the payload being ``start:end``."""

    number: int
    wire: int
    tag: int
    start: int
    end: int


@dataclass(frozen=True)
class _Blob:
    array: FloatArray
    raw: memoryview | None = None
    """The BlobProto as read; None once the array has been replaced, and where Caffe could not read it."""
    raw_type: str = ""
    """The type of the numbers in NVCaffe's raw_data, as float16; none where they are stored as Caffe does."""


@dataclass(frozen=True)
class _Layer:
    name: str
    rest: tuple[memoryview, ...]
    """The LayerParameter's fields other than blobs."""
    blobs: tuple[_Blob, ...]
    raw: memoryview | None = None
    """The LayerParameter as read; None once it has been changed, and where Caffe could not read a blob."""


class Weights:
    """The layers of a caffemodel, in the order of the file.

    Several layers of a file may have one name; what goes by it are the blobs of the last one that has any, as
    Caffe copies them all into the net's first layer of that name (``Net::CopyTrainedLayersFrom``).

    Attributes:
        name: the net's name.
    """

    def __init__(self) -> None:
        self.name = ""
        self._layers: list[_Layer] = []
        self._rest: list[memoryview] = []

    @classmethod
    def read(cls, path: str | Path, digest: Digest | None = None) -> Weights:
        """Read a caffemodel of any age but Caffe's first year (V0).

        Blobs are read-only float32 views of the file's bytes where it holds packed floats; they may lie
        at any byte, which numpy handles (``flags.aligned`` tells). V1 layers are upgraded as Caffe does.

        Args:
            path: the file.
            digest: hears its bytes.

        Raises:
            InputError: the file cannot be read, or is damaged, truncated, not a caffemodel, or V0.
        """
        buffer = _read_file(path)
        if digest is not None:
            digest.update(buffer)
        weights = cls()
        with _told(path, buffer):
            weights._scan(buffer)
            if not weights._layers:
                raise _DamagedError("it has no layers")
        return weights

    @property
    def raw_types(self) -> list[str]:
        """The types of what the file has in NVCaffe's raw_data, which is written as Caffe's float32."""
        return sorted({blob.raw_type for layer in self._layers for blob in layer.blobs} - {""})

    def copy(self) -> Weights:
        """A Weights that can be changed without changing this one; the arrays are shared."""
        other = Weights()
        other.name = self.name
        other._layers = list(self._layers)
        other._rest = list(self._rest)
        return other

    def layers(self) -> list[str]:
        """The names of the layers, in the order of the file."""
        return list(dict.fromkeys(layer.name for layer in self._layers))

    def entries(self) -> list[tuple[str, list[FloatArray]]]:
        """Every layer of the file with its blobs, in the order of the file: a name may come again."""
        return [(layer.name, [blob.array for blob in layer.blobs]) for layer in self._layers]

    def __contains__(self, layer: object) -> bool:
        return any(each.name == layer for each in self._layers)

    def __getitem__(self, layer: str) -> list[FloatArray]:
        """The layer's blobs (an empty list if it has none).

        Raises:
            KeyError: there is no such layer.
        """
        return [blob.array for blob in self._layers[self._index(layer)].blobs]

    def replace(self, layer: str, blobs: Iterable[npt.ArrayLike]) -> None:
        """Give a layer other blobs (kept as float32; not copied where they are float32 already).

        Raises:
            KeyError: there is no such layer.
        """
        index = self._index(layer)
        old = self._layers[index]
        self._layers[index] = _Layer(old.name, old.rest, _blobs(blobs))
        self._layers[:index] = [each for each in self._layers[:index] if each.name != layer]

    def reshape(self, layer: str, shapes: Sequence[tuple[int, ...]]) -> None:
        """See the layer's blobs in other shapes of the same sizes; the layer still counts as untouched.

        For blobs of old files, whose shapes are always four numbers: (1, 1, 1, n) is the vector (n,).
        """
        index = self._index(layer)
        old = self._layers[index]
        pairs = zip(old.blobs, shapes, strict=True)
        blobs = tuple(replace(blob, array=blob.array.reshape(shape)) for blob, shape in pairs)
        self._layers[index] = _Layer(old.name, old.rest, blobs, old.raw)

    def insert_after(self, layer: str, new: LayerParameter, blobs: Iterable[npt.ArrayLike]) -> None:
        """Put a new layer right behind a layer.

        Raises:
            KeyError: there is no such layer.
        """
        self._layers.insert(self._index(layer) + 1, _new_layer(new, blobs))

    def add(self, new: LayerParameter, blobs: Iterable[npt.ArrayLike]) -> None:
        """Put a new layer at the end."""
        self._layers.append(_new_layer(new, blobs))

    def write(self, file: Writable) -> None:
        """Write the caffemodel; layers that were not touched are written byte for byte as they were read.

        Raises:
            LabelfreeError: it would be larger than 2 GiB, which Caffe cannot read. Nothing is written then.
        """
        pieces = list(self._pieces())
        size = sum(len(piece) for piece in pieces)
        if size > MAX_BYTES:
            raise LabelfreeError(
                f"the caffemodel of net {self.name!r} would take {size} bytes; Caffe reads no more than "
                f"{MAX_BYTES}"
            )
        for piece in pieces:
            file.write(piece)

    def _index(self, layer: str) -> int:
        for index in reversed(range(len(self._layers))):
            if self._layers[index].name == layer:
                return index
        raise KeyError(layer)

    def _scan(self, buffer: memoryview) -> None:
        new: list[_Layer] = []
        v1: list[_Layer] = []
        for field in _fields(buffer, 0, len(buffer)):
            if field.number == _NET_NAME:
                self.name = _text(buffer, field)
            elif field.number == _NET_LAYER:
                new.append(_read_layer(buffer, field))
            elif field.number == _NET_LAYERS:
                v1.append(_read_v1_layer(buffer, field))
            else:
                self._rest.append(buffer[field.tag : field.end])
        if v1 and new:
            raise _DamagedError("it holds both old ('layers') and new ('layer') layers")
        self._layers = _without_empty_namesakes(new or v1)

    def _pieces(self) -> Iterator[bytes | memoryview]:
        if self.name:
            name = to_bytes(self.name)
            yield _header(_NET_NAME, len(name)) + name
        yield from self._rest
        for layer in self._layers:
            if layer.raw is not None:
                yield _header(_NET_LAYER, len(layer.raw))
                yield layer.raw
                continue
            pieces = [*layer.rest]
            for blob in layer.blobs:
                pieces += _blob_pieces(blob)
            yield _header(_NET_LAYER, sum(len(piece) for piece in pieces))
            yield from pieces


def raw_types_text(weights: Weights) -> str:
    """What there is to say of a file with NVCaffe's raw_data."""
    return (
        f"blobs are stored as {' and '.join(weights.raw_types)} in raw_data, as NVCaffe and OpenCV's fp16 "
        "tool do; they are written as float32, which every Caffe reads"
    )


def _new_layer(new: LayerParameter, blobs: Iterable[npt.ArrayLike]) -> _Layer:
    bare = LayerParameter.FromString(new.SerializeToString())
    bare.ClearField("blobs")
    return _Layer(new.name, (_named(bare, new.name),), _blobs(blobs))


def _named(layer: LayerParameter, name: str) -> memoryview:
    """The fields of a layer, with a name that need not be UTF-8 (see ``strings``)."""
    layer.ClearField("name")
    encoded = to_bytes(name)
    return memoryview(_header(_LAYER_NAME, len(encoded)) + encoded + layer.SerializeToString())


def _blobs(arrays: Iterable[npt.ArrayLike]) -> tuple[_Blob, ...]:
    return tuple(_Blob(np.asarray(array, np.float32, order="C")) for array in arrays)


def float_records(caffemodel: bytes) -> list[tuple[int, int]]:
    """Where in the content of a caffemodel the float32 data of blobs begin and end, in order.

    Blobs whose data are not in one packed record of floats are left out.

    Raises:
        InputError: it is damaged.
    """
    buffer = memoryview(caffemodel)
    found = []
    with _told("the caffemodel", buffer):
        for layer in _fields(buffer, 0, len(buffer)):
            if layer.number in _NAME_AND_BLOBS:
                for blob in _split(buffer, layer, *_NAME_AND_BLOBS[layer.number])[2]:
                    data = _only_data(buffer, blob)
                    if data is not None and data.number == _BLOB_DATA:
                        found.append((data.start, data.start + _view(buffer, data, "<f4").nbytes))
    return found


# ---- Writing ----


def _varint_bytes(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _header(number: int, size: int) -> bytes:
    return _varint_bytes(number << 3 | _BYTES) + _varint_bytes(size)


def _blob_pieces(blob: _Blob) -> list[memoryview]:
    if blob.raw is not None:
        return [memoryview(_header(_LAYER_BLOBS, len(blob.raw))), blob.raw]
    little_endian = np.ascontiguousarray(blob.array, "<f4")
    data = little_endian.reshape(-1).view(np.uint8).data
    head = _header(_BLOB_DATA, len(data))
    tail = BlobProto(shape=BlobShape(dim=blob.array.shape)).SerializeToString()
    whole = _header(_LAYER_BLOBS, len(head) + len(data) + len(tail))
    return [memoryview(whole + head), data, memoryview(tail)]


# ---- Reading ----


def _read_file(path: str | Path) -> memoryview:
    """The whole file, read-only; its kind and size are checked before memory is taken."""
    with open_file(path, "caffemodel") as file:
        size = os.fstat(file.fileno()).st_size
        if not size:
            raise InputError(f"{path}: the file is empty; a caffemodel was expected")
        if size > MAX_BYTES:
            raise InputError(f"{path}: {size} bytes; Caffe's format ends at 2 GiB, so this is no caffemodel")
        data = np.empty(size, np.uint8).data
        done = 0
        while done < len(data):
            count = file.readinto(data[done:])
            if not count:
                raise InputError(f"{path}: became shorter while it was read; let its writer finish first")
            done += count
    return data.toreadonly()


@contextmanager
def _told(path: str | Path, buffer: memoryview) -> Iterator[None]:
    """Say which file something is wrong with, or what it seems to be instead of a caffemodel."""
    try:
        yield
    except UnsupportedLayerError as error:
        raise InputError(f"{path}: {error}") from None
    except _DamagedError as error:
        start = bytes(buffer[:FIRST_BYTES])
        other = other_format(start)
        if other is not None:
            what = not_but("a caffemodel", other)
        elif is_text(start):
            what = (
                "text, not a caffemodel; if it is the net's prototxt, model.prototxt and model.weights have "
            )
            what += "changed places"
        else:
            what = f"damaged or not a caffemodel: {error}; copy or download it again"
        raise InputError(f"{path}: {what}") from None


def _varint(buffer: memoryview, pos: int, end: int) -> tuple[int, int]:
    """The varint at ``pos`` and the place behind it."""
    value = 0
    for shift in range(0, 70, 7):
        if pos >= end:
            raise _DamagedError(f"it ends in the middle of a number at byte {pos}")
        byte = buffer[pos]
        pos += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, pos
    raise _DamagedError(f"a number of more than 64 bits at byte {pos}")


def _fields(buffer: memoryview, tag: int, end: int) -> Iterator[_Field]:
    """Walk the records of the message ``buffer[tag:end]``."""
    while tag < end:
        key, start = _varint(buffer, tag, end)
        number, wire = key >> 3, key & 7
        if not 1 <= number < 1 << 29:
            raise _DamagedError(f"field number {number} at byte {tag}")
        if wire == _VARINT:
            stop = _varint(buffer, start, end)[1]
        elif wire == _BYTES:
            size, start = _varint(buffer, start, end)
            stop = start + size
        elif wire in _SIZES:
            stop = start + _SIZES[wire]
        else:
            raise _DamagedError(f"wire type {wire} at byte {tag}")
        if stop > end:
            raise _DamagedError(
                f"the record at byte {tag} claims to reach byte {stop} but its message ends at byte {end}"
            )
        yield _Field(number, wire, tag, start, stop)
        tag = stop


def _text(buffer: memoryview, field: _Field) -> str:
    _expect(field, _BYTES)
    if field.end - field.start > MAX_NAME:
        raise _DamagedError(f"a name of {field.end - field.start} bytes at byte {field.tag}")
    return to_text(bytes(buffer[field.start : field.end]))


def _expect(field: _Field, *wires: int) -> None:
    if field.wire not in wires:
        raise _DamagedError(f"field {field.number} at byte {field.tag} has wire type {field.wire}")


def _split(
    buffer: memoryview, layer: _Field, name: int, blobs: int
) -> tuple[str, list[memoryview], list[_Field]]:
    """A layer record's name, its fields other than blobs (neighbours joined), and its blob records."""
    _expect(layer, _BYTES)
    text, found = "", []
    rest, rest_start = [], layer.start
    for field in _fields(buffer, layer.start, layer.end):
        if field.number == name:
            text = _text(buffer, field)
        if field.number == blobs:
            _expect(field, _BYTES)
            found.append(field)
            rest.append(buffer[rest_start : field.tag])
            rest_start = field.end
    rest.append(buffer[rest_start : layer.end])
    return text, [piece for piece in rest if len(piece)], found


def _without_empty_namesakes(layers: list[_Layer]) -> list[_Layer]:
    """Of the layers of one name those with blobs; the first, where none has any."""
    kept = {layer.name: layer for layer in reversed(layers)}
    filled = {layer.name for layer in layers if layer.blobs}
    return [
        layer for layer in layers if layer.blobs or (layer.name not in filled and kept[layer.name] is layer)
    ]


def _read_blobs(buffer: memoryview, layer: str, records: list[_Field]) -> tuple[_Blob, ...]:
    blobs = []
    for index, record in enumerate(records):
        try:
            blob = _read_blob(buffer, record)
        except _DamagedError as error:
            raise _DamagedError(f"layer {layer!r}, blob {index}: {error}") from None
        blobs.append(blob)
    return tuple(blobs)


def _read_layer(buffer: memoryview, layer: _Field) -> _Layer:
    name, rest, records = _split(buffer, layer, _LAYER_NAME, _LAYER_BLOBS)
    blobs = _read_blobs(buffer, name, records)
    as_read = all(blob.raw is not None for blob in blobs)
    return _Layer(name, tuple(rest), blobs, buffer[layer.start : layer.end] if as_read else None)


def _read_v1_layer(buffer: memoryview, layer: _Field) -> _Layer:
    name, rest, records = _split(buffer, layer, _V1_NAME, _V1_BLOBS)
    blobs = _read_blobs(buffer, name, records)
    old = _parsed(V1LayerParameter, b"".join(rest))
    old.ClearField("name")
    new = LayerParameter()
    try:
        upgrade_v1_layer(old, new)
    except ValueError:  # strings that are not UTF-8; of a caffemodel Caffe reads no more than names and blobs
        new = LayerParameter()
    return _Layer(name, (_named(new, name),), blobs)


def _read_blob(buffer: memoryview, blob: _Field) -> _Blob:
    """A BlobProto's data as ``Blob::FromProto`` sees it: double_data wins over data, num over shape.

    Data in one packed record, as Caffe has written them since 2013, are a view; others protobuf has to parse.
    NVCaffe's raw_data win over both.
    """
    data = _only_data(buffer, blob)
    if data is None:
        message = _parsed(BlobProto, buffer[blob.start : blob.end])
        held = message.double_data or message.data
        dtype = np.float64 if message.double_data else np.float32
        values: npt.NDArray[np.floating] = np.fromiter(held, dtype, len(held))
    else:
        told = (*_BLOB_SHAPES, _BLOB_RAW_TYPE)
        fields = [f for f in _fields(buffer, blob.start, blob.end) if f.number in told]
        message = _parsed(BlobProto, b"".join(buffer[field.tag : field.end] for field in fields))
        values = _view(buffer, data, _stored_type(message, data))
    shape = _shape_of(message)
    if math.prod(shape) != len(values):
        raise _DamagedError(
            f"the shape {shape} does not stand for the {len(values)} values that the file holds"
        )
    is_raw = data is not None and data.number == _BLOB_RAW_DATA
    raw_type = values.dtype.name if is_raw else ""
    with np.errstate(over="ignore"):  # doubles beyond float32 become infinite, which check_weights refuses
        array = values.astype(np.float32, copy=False).reshape(shape)
    array.flags.writeable = False
    return _Blob(array, None if is_raw else buffer[blob.start : blob.end], raw_type)


def _shape_of(message: BlobProto) -> tuple[int, ...]:
    legacy = [name for name in _LEGACY_SHAPE if message.HasField(name)]
    if len(message.shape.dim) > MAX_AXES and not legacy:
        raise _DamagedError(f"a shape of {len(message.shape.dim)} dimensions; Caffe has at most {MAX_AXES}")
    shape = tuple(getattr(message, name) for name in _LEGACY_SHAPE) if legacy else tuple(message.shape.dim)
    if any(not 0 <= size < 2**31 for size in shape):
        raise _DamagedError(f"the shape {shape} has a negative or impossible dimension")
    return shape


def _only_data(buffer: memoryview, blob: _Field) -> _Field | None:
    """The record with all of a blob's data, if there is just one and it is packed; raw_data, where it is."""
    found: list[_Field] = []
    raw = None
    for field in _fields(buffer, blob.start, blob.end):
        if field.number == _BLOB_RAW_DATA:
            _expect(field, _BYTES)
            raw = field
        elif field.number in (_BLOB_DATA, _BLOB_DOUBLE_DATA):
            found.append(field)
    if raw is not None:
        return raw
    return found[0] if len(found) == 1 and found[0].wire == _BYTES else None


def _stored_type(message: BlobProto, data: _Field) -> str:
    """The type of the numbers in a record, as numpy names it."""
    if data.number != _BLOB_RAW_DATA:
        return "<f4" if data.number == _BLOB_DATA else "<f8"
    stored = message.raw_data_type
    if stored not in _RAW_TYPES:
        name = BlobProto.Type.Name(stored)
        raise _DamagedError(f"raw_data of type {name}; weights are DOUBLE, FLOAT or FLOAT16")
    return _RAW_TYPES[stored]


def _view(buffer: memoryview, data: _Field, stored: str) -> npt.NDArray[np.floating]:
    dtype = np.dtype(stored)
    size = data.end - data.start
    if size % dtype.itemsize:
        raise _DamagedError(f"packed data of {size} bytes at byte {data.tag} is no whole number of values")
    return np.frombuffer(buffer[data.start : data.end], dtype)


def _parsed(message: type[Parsed], data: bytes | memoryview) -> Parsed:
    try:
        return message.FromString(bytes(data))
    except DecodeError:
        raise _DamagedError("it cannot be parsed") from None
