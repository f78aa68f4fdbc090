"""Encoded images (JPEG, PNG, BMP, PNM, WebP, TIFF) to 8-bit pixels, as Caffe has OpenCV decode them."""

from __future__ import annotations

import re
import struct
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from quantize.errors import InputError

cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
"""What OpenCV would print of damaged images is in our messages, with the name of the image."""

MAX_PIXELS = 178_956_970
"""Larger images are refused before they are decoded (Pillow's limit: half a gigabyte of BGR)."""

JPEG, PNG, BMP = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"BM"
JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # SOF0..SOF15 without DHT, JPG, DAC
JPEG_BARE_MARKERS = frozenset({0x01, *range(0xD0, 0xDA)})  # TEM, RST0..7, SOI, EOI have no length
TIFF = re.compile(rb"II[*+]\0|MM\0[*+]")
"""Little or big endian; with + the offsets have 64 bits (BigTIFF)."""
TIFF_TAGS = TIFF_WIDTH, TIFF_HEIGHT, TIFF_BITS, TIFF_TILE_WIDTH, TIFF_TILE_HEIGHT = 256, 257, 258, 322, 323
TIFF_KINDS = {1: "B", 3: "H", 4: "I", 16: "Q"}  # BYTE, SHORT, LONG, LONG8
TIFF_MOST_BITS = 16
"""Of a value that OpenCV reduces to 8 bits."""
NOT_READ = {
    re.compile(rb".{4}ftyp(?:hei[cfmsx]|hev[cmsx]|mif1|msf1)", re.DOTALL): "a HEIC image",
    re.compile(rb".{4}ftypavi[fs]", re.DOTALL): "an AVIF image",
    re.compile(rb"\0\0\0\x0cJXL |\xff\x0a"): "a JPEG XL image",
    re.compile(rb"\0\0\0\x0cjP  "): "a JPEG 2000 image",
    re.compile(rb"GIF8"): "a GIF image",
}
"""How images begin that not every OpenCV can read."""
CONVERTED = "to JPEG or PNG, with heif-convert of libheif or mogrify of ImageMagick"
PNM = re.compile(rb"P[1-6]\s+(?:#[^\n]*\n\s*)*(\d{1,9})\s+(?:#[^\n]*\n\s*)*(\d{1,9})\s")


def image_size(data: bytes) -> tuple[int, int] | None:
    """(height, width) from the header of an encoded image; None where it has none or is cut off."""
    try:
        if data.startswith(JPEG):
            return _jpeg_size(data)
        if data.startswith(PNG):
            return _png_size(data)
        if data.startswith(BMP):
            return _bmp_size(data)
        if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
            return _webp_size(data)
        if TIFF.match(data):
            return _tiff_size(data)
    except struct.error:
        return None
    pnm = PNM.match(data[:4096])
    return (int(pnm[2]), int(pnm[1])) if pnm else None


def _bmp_size(data: bytes) -> tuple[int, int]:
    header_size = struct.unpack_from("<I", data, 14)[0]
    width, height = struct.unpack_from("<HH" if header_size == 12 else "<ii", data, 18)
    return abs(height), abs(width)


def _png_size(data: bytes) -> tuple[int, int] | None:
    """Size from the header, if no chunk claims to be longer than the data: OpenCV would allocate it."""
    at = len(PNG)
    while at < len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        at += 12 + length
        if kind == b"IEND":
            break
    width, height = struct.unpack_from(">II", data, 16)
    return None if at > len(data) else (height, width)


def _jpeg_size(data: bytes) -> tuple[int, int] | None:
    at = 2
    while (at := data.find(0xFF, at)) >= 0:
        while data[at : at + 1] == b"\xff":
            at += 1
        marker = data[at] if at < len(data) else 0
        if marker in JPEG_FRAMES:
            height, width = struct.unpack_from(">HH", data, at + 4)
            return height, width
        at += 1
        if marker != 0 and marker not in JPEG_BARE_MARKERS:
            at += struct.unpack_from(">H", data, at)[0]
    return None


def _webp_size(data: bytes) -> tuple[int, int] | None:
    """Size from the first chunk: of the canvas (VP8X), or of an image, lossy (VP8) or lossless (VP8L)."""
    kind = data[12:16]
    if kind == b"VP8X":
        width, height = (int.from_bytes(size, "little") for size in struct.unpack_from("3s3s", data, 24))
        return 1 + height, 1 + width
    if kind == b"VP8L":
        bits = struct.unpack_from("<I", data, 21)[0]
        return 1 + (bits >> 14 & 0x3FFF), 1 + (bits & 0x3FFF)
    if kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", data, 26)
        return height & 0x3FFF, width & 0x3FFF
    return None


def _tiff_size(data: bytes) -> tuple[int, int]:
    """Size of the first image; that of a tile where it is larger, for OpenCV makes room for a whole one."""
    fields = _tiff_numbers(data)
    height = max(fields.get(TIFF_HEIGHT, 0), fields.get(TIFF_TILE_HEIGHT, 0))
    width = max(fields.get(TIFF_WIDTH, 0), fields.get(TIFF_TILE_WIDTH, 0))
    return height, width


def _tiff_numbers(data: bytes) -> dict[int, int]:
    """The fields TIFF_... of the first image: of their values the first, of repeated fields the largest."""
    order = "<" if data.startswith(b"II") else ">"
    big = b"+" in data[:4]
    word, half = (f"{order}Q", f"{order}Q") if big else (f"{order}I", f"{order}H")
    at = _unpack(word, data, 8 if big else 4)
    entries = _unpack(half, data, at)
    at += struct.calcsize(half)
    fields: dict[int, int] = {}
    for _ in range(min(entries, len(data))):
        tag, kind = _unpack(f"{order}H", data, at), _unpack(f"{order}H", data, at + 2)
        if tag in TIFF_TAGS and kind in TIFF_KINDS:
            count, value = _unpack(word, data, at + 4), at + 4 + struct.calcsize(word)
            number = f"{order}{TIFF_KINDS[kind]}"
            if count * struct.calcsize(number) > struct.calcsize(word):
                value = _unpack(word, data, value)
            fields[tag] = max(fields.get(tag, 0), _unpack(number, data, value))
        at += 4 + 2 * struct.calcsize(word)
    return fields


def _unpack(number: str, data: bytes, at: int) -> int:
    """The number at an offset that the data itself may have given."""
    if at > len(data):
        raise struct.error("beyond the end")
    return int(struct.unpack_from(number, data, at)[0])


def decode(data: bytes, color: bool | None) -> npt.NDArray[np.uint8]:
    """Decode an image.

    Args:
        data: the encoded image.
        color: True: to BGR; False: to gray; both turn the image as its EXIF orientation says, as OpenCV's
            color and grayscale flags do since 3.1. None: the channels as stored and not turned
            (``IMREAD_UNCHANGED``, Caffe's choice for encoded Datums without force_color and force_gray).

    Returns:
        uint8 array (channels, height, width), a view of the (height, width, channels) that OpenCV gives.

    Raises:
        InputError: not an image of a known format, damaged, too large, or not of 8 bits per value with
            color=None. The message lacks the image's name.
    """
    size = image_size(data)
    if size is None or 0 in size:
        for start, kind in NOT_READ.items():
            if start.match(data):
                raise InputError(f"{kind}, which is not read: convert it {CONVERTED}")
        raise InputError("not a whole JPEG, PNG, BMP, PNM, WebP or TIFF image")
    if size[0] * size[1] > MAX_PIXELS:
        raise InputError(f"the image claims {size[1]} x {size[0]} pixels, more than the {MAX_PIXELS} allowed")
    flag = cv2.IMREAD_UNCHANGED if color is None else cv2.IMREAD_COLOR if color else cv2.IMREAD_GRAYSCALE
    try:
        pixels: npt.NDArray[Any] | None = cv2.imdecode(np.frombuffer(data, np.uint8), flag)
    except cv2.error as error:
        raise InputError(f"the image is damaged: {error.err}") from error
    if pixels is None:
        bits = _tiff_numbers(data).get(TIFF_BITS, 0) if TIFF.match(data) else 0
        if bits > TIFF_MOST_BITS:
            raise InputError(f"a TIFF of {bits} bits per value: convert it to one of 8 bits")
        raise InputError("the image is damaged: it cannot be decoded")
    if pixels.dtype != np.uint8:
        raise InputError("the image has more than 8 bits per value: set force_color or force_gray")
    planar: npt.NDArray[np.uint8] = pixels[np.newaxis] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    return planar
