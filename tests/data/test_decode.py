"""decode: the same pixels as OpenCV, sizes from headers, and refusal of what is hostile."""

from __future__ import annotations

import struct
import zlib

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import photograph, result_or_input_error

from quantize.data.decode import MAX_PIXELS, decode, image_size
from quantize.errors import InputError

SUFFIXES = [".jpg", ".png", ".bmp", ".ppm"]


def encode(pixels: np.ndarray, suffix: str) -> bytes:
    encoded, data = cv2.imencode(suffix, pixels)
    assert encoded
    return data.tobytes()


def png_claiming(width: int, height: int) -> bytes:
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("size", [(1, 1), (17, 31), (64, 48)])
def test_pixels_and_size_as_opencv(suffix, size):
    data = encode(photograph(0, *size), suffix)
    assert image_size(data) == size
    for color, flag in [
        (True, cv2.IMREAD_COLOR),
        (False, cv2.IMREAD_GRAYSCALE),
        (None, cv2.IMREAD_UNCHANGED),
    ]:
        expected = cv2.imdecode(np.frombuffer(data, np.uint8), flag).reshape(*size, -1).transpose(2, 0, 1)
        assert np.array_equal(decode(data, color), expected)


def test_lossless_formats_give_back_blue_green_red():
    pixels = photograph(1, 9, 7)
    assert np.array_equal(decode(encode(pixels, ".png"), True), pixels.transpose(2, 0, 1))


def test_gray_images_stay_gray_unless_color_is_forced():
    data = encode(photograph(1, 9, 7, channels=1), ".jpg")
    assert decode(data, None).shape == (1, 9, 7)
    assert decode(data, True).shape == (3, 9, 7)


def test_jpeg_size_is_found_behind_large_metadata_with_a_thumbnail():
    picture, thumbnail = encode(photograph(0, 20, 30), ".jpg"), encode(photograph(0, 5, 6), ".jpg")
    metadata = b"\xff\xe1" + struct.pack(">H", 2 + len(thumbnail)) + thumbnail
    assert image_size(picture[:2] + metadata + b"\xff\xff" + picture[3:]) == (20, 30)


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_exif_orientation_counts_where_color_is_chosen(suffix):
    tiff = b"MM\0*" + struct.pack(">IHHHIHHI", 8, 1, 0x0112, 3, 1, 6, 0, 0)  # turned by 90 degrees
    data = encode(photograph(0, 20, 30), suffix)
    if suffix == ".jpg":
        segment = b"Exif\0\0" + tiff
        data = data[:2] + b"\xff\xe1" + struct.pack(">H", 2 + len(segment)) + segment + data[2:]
    else:
        chunk = b"eXIf" + tiff
        data = (
            data[:33]
            + struct.pack(">I", len(tiff))
            + chunk
            + struct.pack(">I", zlib.crc32(chunk))
            + data[33:]
        )
    assert decode(data, None).shape == (3, 20, 30)
    assert decode(data, True).shape == (3, 30, 20)


def test_sixteen_bits_are_reduced_or_refused():
    data = encode(photograph(0, 4, 5).astype(np.uint16) * 257, ".png")
    assert decode(data, True).dtype == np.uint8
    with pytest.raises(InputError, match="more than 8 bits"):
        decode(data, None)


@pytest.mark.parametrize("size", [(20_000, 20_000), (2**31 - 1, 2**31 - 1), (1, MAX_PIXELS + 1)])
def test_decompression_bombs_are_refused_unread(size):
    with pytest.raises(InputError, match="pixels, more than"):
        decode(png_claiming(*size), True)


def test_a_png_chunk_that_claims_gigabytes_is_refused_unread():
    data = bytearray(encode(photograph(0, 12, 11), ".png"))
    data[33] = 0xFF  # the length of the first IDAT
    with pytest.raises(InputError, match="not a whole"):
        decode(bytes(data), True)


@pytest.mark.parametrize(
    "data", [b"", b"\xff\xd8\xff", b"BM", b"GIF89a", b"P6 1", b"\x89PNG\r\n\x1a\n", bytes(99)]
)
def test_what_is_no_image(data):
    with pytest.raises(InputError, match="not a whole"):
        decode(data, True)


@settings(max_examples=200, deadline=None)
@given(data=st.data(), suffix=st.sampled_from(SUFFIXES), color=st.sampled_from([True, False, None]))
def test_damaged_images_give_pixels_or_an_input_error(data, suffix, color):
    damaged = bytearray(encode(photograph(0, 12, 11), suffix))
    for _ in range(data.draw(st.integers(1, 5))):
        at = data.draw(st.one_of(st.integers(0, 40), st.integers(0, len(damaged) - 1)))
        damaged[at] = data.draw(st.integers(0, 255))
    del damaged[data.draw(st.integers(0, len(damaged))) :]
    pixels = result_or_input_error(lambda: decode(bytes(damaged), color))
    assert pixels is None or (pixels.ndim == 3 and pixels.dtype == np.uint8)
