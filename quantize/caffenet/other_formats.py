"""What people give for a net that is none: told by its first bytes, with what to do."""

from __future__ import annotations

import re
from dataclasses import dataclass

FIRST_BYTES = 4096
"""As many as are looked at."""


@dataclass(frozen=True)
class OtherFormat:
    """What a file is, in words, and what to do with it; None where it is of no use for a Caffe model."""

    what: str
    remedy: str | None = None


_UNPACK = "unpack it and give the file inside"
_FORMATS: tuple[tuple[bytes, OtherFormat], ...] = (
    (
        rb"version https://git-lfs",
        OtherFormat("a git-LFS pointer", "run `git lfs pull` in its repository to get the file itself"),
    ),
    (
        rb"(?i)\s*<(!doctype html|html|head|body|!--)",
        OtherFormat("a web page (HTML)", "it was saved instead of the file; download the file itself"),
    ),
    (rb"\s*<\?xml", OtherFormat("an XML file")),
    (rb"\s*[\[{]\s*[\"{]", OtherFormat("a JSON file")),
    (
        rb"PK\x03\x04.{26}[^/]{0,99}(/data\.pkl|/byteorder|/version|/\.)|\x80[\x02-\x05][\x8a\x95}(c]",
        OtherFormat("a PyTorch file"),
    ),
    (rb"PK\x03\x04.{26}[^\0]{0,200}\.npy", OtherFormat("a numpy archive (npz)")),
    (rb"\x93NUMPY", OtherFormat("a numpy array")),
    (rb"PK(\x03\x04|\x05\x06)", OtherFormat("a zip archive", _UNPACK)),
    (rb"\x1f\x8b", OtherFormat("compressed with gzip", _UNPACK)),
    (rb"BZh[1-9]|\xfd7zXZ\0|7z\xbc\xaf|Rar!|\x28\xb5\x2f\xfd", OtherFormat("a compressed archive", _UNPACK)),
    (rb".{257}ustar", OtherFormat("a tar archive", _UNPACK)),
    (rb".{4}TFL3", OtherFormat("a TensorFlow Lite model")),
    (
        rb"\x89HDF",
        OtherFormat("an HDF5 snapshot", "give the .caffemodel (snapshot_format: BINARYPROTO)"),
    ),
    # onnx.ModelProto: ir_version, then another field; a NetParameter begins with no number.
    (rb"\x08[\x01-\x20][\x12\x1a\x22\x28\x32\x3a\x42]", OtherFormat("an ONNX model")),
    (
        rb"\x08\x01\x10[\x01-\x7f]\x18",
        OtherFormat("a mean image (binaryproto)", "that is for data.transform.mean_file"),
    ),
    (rb"\s*([#;].*\n\s*)*\[(net|network|convolutional)\]", OtherFormat("a Darknet cfg")),
    (rb"\0\0\0\0[\x01-\x05]\0\0\0", OtherFormat("a Darknet weights file")),
    (rb"7767517\s", OtherFormat("an ncnn param file")),
)
_PATTERNS = [
    (re.compile(pattern, re.DOTALL if b".{" in pattern else 0), other) for pattern, other in _FORMATS
]


def other_format(start: bytes) -> OtherFormat | None:
    """What a file is, if it is known to be neither prototxt nor caffemodel.

    Args:
        start: its first bytes, ``FIRST_BYTES`` of them where there are so many.
    """
    return next((other for pattern, other in _PATTERNS if pattern.match(start[:FIRST_BYTES])), None)


def not_but(wanted: str, other: OtherFormat) -> str:
    """The sentence for a file of another format than was wanted."""
    remedy = other.remedy or "labelfree reads Caffe models; give the prototxt and the caffemodel of the net"
    return f"not {wanted} but {other.what}; {remedy}"


def is_text(start: bytes) -> bool:
    """Whether a file that begins so is text, in whatever encoding: most of it is ASCII, without controls."""
    start = start[:FIRST_BYTES]
    ascii_only = start.translate(None, bytes(range(0x80, 0x100)))
    return 2 * len(ascii_only) > len(start) and not re.search(rb"[\0-\x08\x0e-\x1f]", start)
