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

SUFFIXES = [".jpg", ".png", ".bmp", ".ppm", ".webp", ".tiff"]


def encode(pixels: np.ndarray, suffix: str, *parameters: int) -> bytes:
    encoded, data = cv2.imencode(suffix, pixels, parameters)
    assert encoded
    return data.tobytes()


def tiff(fields: dict[int, tuple[int, int]], order: str = "<", big: bool = False) -> bytes:
    """A TIFF of one image with the fields ``{tag: (type, value)}``, without its pixels."""
    word, half, size = ("Q", "Q", 8) if big else ("I", "H", 4)
    head = (b"II" if order == "<" else b"MM") + struct.pack(order + "H", 43 if big else 42)
    head += struct.pack(order + "HHQ", 8, 0, 16) if big else struct.pack(order + "I", 8)
    kinds = {1: "B", 3: "H", 4: "I", 16: "Q"}
    entries = b"".join(
        struct.pack(f"{order}HH{word}", tag, kind, 1)
        + struct.pack(order + kinds[kind], value).ljust(size, b"\0")
        for tag, (kind, value) in fields.items()
    )
    return head + struct.pack(order + half, len(fields)) + entries + bytes(size)


def webp(kind: bytes, body: bytes) -> bytes:
    chunk = kind + struct.pack("<I", len(body)) + body
    return b"RIFF" + struct.pack("<I", 4 + len(chunk)) + b"WEBP" + chunk


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


def test_every_kind_of_webp_is_read():
    pixels = photograph(0, 21, 34)
    lossy, lossless = (encode(pixels, ".webp", cv2.IMWRITE_WEBP_QUALITY, quality) for quality in (80, 101))
    clear = encode(np.dstack([pixels, pixels[..., :1]]), ".webp", cv2.IMWRITE_WEBP_QUALITY, 80)
    assert [data[12:16] for data in (lossy, lossless, clear)] == [b"VP8 ", b"VP8L", b"VP8X"]
    for data in (lossy, lossless, clear):
        assert image_size(data) == (21, 34)
        assert decode(data, True).shape == (3, 21, 34)
    assert np.array_equal(decode(lossless, True), pixels.transpose(2, 0, 1))


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("big", [False, True])
def test_every_kind_of_tiff_is_read(order, big):
    pixels = photograph(0, 21, 34, channels=1)
    fields = {256: (3, 34), 257: (16 if big else 4, 21), 258: (3, 8), 259: (3, 1), 262: (3, 1)}
    fields |= {273: (4, 0), 277: (3, 1), 278: (3, 21), 279: (4, pixels.size)}
    fields[273] = (4, len(tiff(fields, order, big)))
    data = tiff(fields, order, big) + pixels.tobytes()
    assert image_size(data) == (21, 34)
    assert np.array_equal(decode(data, None)[0], pixels[..., 0])


def test_a_tiff_of_a_large_tile_and_one_beyond_its_end():
    assert image_size(tiff({256: (3, 34), 257: (3, 21), 322: (4, 1 << 20), 323: (4, 1 << 18)})) == (
        1 << 18,
        1 << 20,
    )
    assert image_size(b"II*\0\xff\xff\xff\xff") is None
    assert image_size(b"II+\0\x08\0\0\0" + b"\xff" * 8) is None
    assert image_size(tiff({256: (3, 34)})) == (0, 34)


def test_sixteen_bits_are_reduced_or_refused():
    data = encode(photograph(0, 4, 5).astype(np.uint16) * 257, ".png")
    assert decode(data, True).dtype == np.uint8
    with pytest.raises(InputError, match="more than 8 bits"):
        decode(data, None)


BOMBS = {
    "png": png_claiming(20_000, 20_000),
    "png, the largest": png_claiming(2**31 - 1, 2**31 - 1),
    "png, long": png_claiming(1, MAX_PIXELS + 1),
    "tiff": tiff({256: (4, 2**32 - 1), 257: (4, 2**32 - 1), 258: (3, 8)}),
    "tiff, 64 bits": tiff({256: (16, 2**63), 257: (16, 2**63)}, big=True),
    "tiff, tile": tiff({256: (3, 8), 257: (3, 8), 322: (4, 1 << 24), 323: (4, 1 << 24)}),
    "webp": webp(b"VP8X", bytes(4) + b"\xff" * 6),
    "webp, lossless": webp(b"VP8L", b"\x2f" + b"\xff\xff\xff\x0f" + bytes(20)),
    "webp, lossy": webp(b"VP8 ", b"\x10\0\0\x9d\x01\x2a\xff\x3f\xff\x3f" + bytes(20)),
}


@pytest.mark.parametrize("name", BOMBS)
def test_decompression_bombs_are_refused_unread(name):
    with pytest.raises(InputError, match="pixels, more than"):
        decode(BOMBS[name], True)


@pytest.mark.parametrize("kind", [np.float32, np.int32])
def test_a_tiff_that_cannot_be_reduced_to_8_bits_says_so(kind):
    data = encode(photograph(0, 4, 5).astype(kind), ".tiff")
    with pytest.raises(InputError, match="a TIFF of 32 bits per value: convert it"):
        decode(data, True)


@pytest.mark.parametrize(
    ("start", "kind"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0", "a HEIC image"),
        (b"\0\0\0\x1cftypmif1\0\0\0\0", "a HEIC image"),
        (b"\0\0\0\x1cftypavif\0\0\0\0", "an AVIF image"),
        (b"GIF89a", "a GIF image"),
    ],
)
def test_what_is_not_read_is_named_with_the_remedy(start, kind):
    with pytest.raises(InputError, match=f"^{kind}, which is not read: convert it to JPEG"):
        decode(start + bytes(40), True)


def test_a_png_chunk_that_claims_gigabytes_is_refused_unread():
    data = bytearray(encode(photograph(0, 12, 11), ".png"))
    data[33] = 0xFF  # the length of the first IDAT
    with pytest.raises(InputError, match="not a whole"):
        decode(bytes(data), True)


@pytest.mark.parametrize(
    "data",
    [b"", b"\xff\xd8\xff", b"BM", b"RIFF\0\0\0\0WEBP", b"II*\0", b"P6 1", b"\x89PNG\r\n\x1a\n", bytes(99)],
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
