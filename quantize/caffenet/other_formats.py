"""What people give for a net that is none: told by its first bytes, with what to do."""

from __future__ import annotations

import re

FIRST_BYTES = 4096
"""As many as are looked at."""

_CONVERT = "labelfree reads Caffe models; give the prototxt and caffemodel of the net"
_UNPACK = "unpack it and give the file inside"
_FORMATS: tuple[tuple[bytes, str], ...] = (
    (
        rb"version https://git-lfs",
        "a git-LFS pointer, not the file itself; run `git lfs pull` in its repository",
    ),
    (
        rb"(?i)\s*<(!doctype html|html|head|body|!--)",
        "a web page (HTML) that was saved instead of the file; download the file itself",
    ),
    (rb"\s*<\?xml", f"an XML file; {_CONVERT}"),
    (rb"\s*[\[{]\s*[\"{]", f"a JSON file; {_CONVERT}"),
    (rb"PK\x03\x04.{26}[^/]{0,99}(/data\.pkl|/byteorder|/version|/\.)", f"a PyTorch file; {_CONVERT}"),
    (rb"\x80[\x02-\x05][\x8a\x95}(c]", f"a pickle, as PyTorch writes it; {_CONVERT}"),
    (rb"PK\x03\x04.{26}[^\0]{0,200}\.npy", f"a numpy archive (npz); {_CONVERT}"),
    (rb"\x93NUMPY", f"a numpy array; {_CONVERT}"),
    (rb"PK(\x03\x04|\x05\x06)", f"a zip archive; {_UNPACK}"),
    (rb"\x1f\x8b", f"compressed with gzip; {_UNPACK}"),
    (rb"BZh[1-9]|\xfd7zXZ\0|7z\xbc\xaf|Rar!|\x28\xb5\x2f\xfd", f"a compressed archive; {_UNPACK}"),
    (rb".{257}ustar", f"a tar archive; {_UNPACK}"),
    (rb".{4}TFL3", f"a TensorFlow Lite model; {_CONVERT}"),
    (rb"\x89HDF", "an HDF5 snapshot; give the .caffemodel (snapshot_format: BINARYPROTO)"),
    # onnx.ModelProto: ir_version, then another field; a NetParameter begins with no number.
    (rb"\x08[\x01-\x20][\x12\x1a\x22\x28\x32\x3a\x42]", f"an ONNX model; {_CONVERT}"),
    (rb"\x08\x01\x10[\x01-\x7f]\x18", "a mean image (binaryproto); that goes to data.transform.mean_file"),
    (rb"\s*([#;].*\n\s*)*\[(net|network|convolutional)\]", f"a Darknet cfg; {_CONVERT}"),
    (rb"\0\0\0\0[\x01-\x05]\0\0\0", f"weights of Darknet; {_CONVERT}"),
    (rb"7767517\s", f"an ncnn param file; {_CONVERT}"),
)
_PATTERNS = [(re.compile(pattern, re.DOTALL if b".{" in pattern else 0), text) for pattern, text in _FORMATS]


def other_format(start: bytes) -> str | None:
    """What a file is, in words and with the remedy, if it is known to be neither prototxt nor caffemodel.

    Args:
        start: its first bytes, ``FIRST_BYTES`` of them where there are so many.
    """
    return next((text for pattern, text in _PATTERNS if pattern.match(start[:FIRST_BYTES])), None)


def is_text(start: bytes) -> bool:
    """Whether a file that begins so is text, in whatever encoding: most of it is ASCII, without controls."""
    start = start[:FIRST_BYTES]
    ascii_only = start.translate(None, bytes(range(0x80, 0x100)))
    return 2 * len(ascii_only) > len(start) and not re.search(rb"[\0-\x08\x0e-\x1f]", start)
