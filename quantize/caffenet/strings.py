"""Caffe's strings are bytes, such as GBK or Latin-1; protobuf's strings in Python are Unicode.

A byte that is not part of a UTF-8 character becomes a private character of Unicode, U+10FE80 to U+10FEFF, and
is the same byte again where it is written. Every string of bytes has a text of its own, so names keep apart,
and what was read is written as it was.
"""

from __future__ import annotations

import os

_PRIVATE = 0x10FE00
_ESCAPED = 0xDC00
"""Python's own way (``surrogateescape``), in characters that protobuf refuses."""
_BYTES = range(0x80, 0x100)
_TO_TEXT = {_ESCAPED + byte: chr(_PRIVATE + byte) for byte in _BYTES} | {
    # What stands for a byte cannot stand for itself.
    _PRIVATE + byte: "".join(chr(_PRIVATE + each) for each in chr(_PRIVATE + byte).encode())
    for byte in _BYTES
}
_TO_ESCAPED = {_PRIVATE + byte: chr(_ESCAPED + byte) for byte in _BYTES}


def to_text(data: bytes) -> str:
    """Bytes as text that protobuf takes."""
    return data.decode("utf-8", "surrogateescape").translate(_TO_TEXT)


def to_bytes(text: str) -> bytes:
    """The bytes of what ``to_text`` gave."""
    return text.translate(_TO_ESCAPED).encode("utf-8", "surrogateescape")


def to_path(text: str) -> str:
    """A path in a net's text as Python opens it."""
    return os.fsdecode(to_bytes(text))


def from_path(path: str | os.PathLike[str]) -> str:
    """A path as a net's text holds it."""
    return to_text(os.fsencode(path))
