"""Image files that a folder holds or a list names, with their labels."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

import numpy as np

from quantize.data.decode import CONVERTED
from quantize.errors import InputError

IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".png", ".bmp", ".ppm", ".pgm", ".pnm", ".webp", ".tif", ".tiff"}
)
OTHER_SUFFIXES = frozenset({".heic", ".heif", ".avif", ".gif", ".jxl", ".jp2"})
"""Of images that must be converted first."""
LABEL = re.compile(r"[+-]?[0-9]{1,18}$")
CLASS_NUMBER = re.compile(r"[0-9]{1,9}")
"""A folder's name that is its class."""
MAX_LIST_BYTES = 256 << 20
INT32 = np.iinfo(np.int32)
LIST_LINE = "a line is `path [label]`, the label a whole number"


class ImageFile(NamedTuple):
    """An image file, its label, and where it was named (``list.txt, line 3: `` or nothing)."""

    path: str
    label: int | None
    origin: str


@dataclass(frozen=True)
class FolderLabels:
    """What the subfolders of a folder of images were taken for.

    Attributes:
        text: what was understood, or why the images are unlabeled.
        classes: the class of each subfolder, in the order of their names; empty where they are no classes.
        named: whether the classes are the subfolders' names, which are numbers, and not their places.
    """

    text: str
    classes: Sequence[int] = ()
    named: bool = False


def files_in_folder(path: Path) -> tuple[list[ImageFile], FolderLabels | None]:
    """The image files below a folder, and what its subfolders were taken for (None: it has none with images).

    The first images of all folders come first, then the second ones, and so on: whoever takes the first
    hundred gets some of each folder, which often is of each class.

    Raises:
        InputError: there are none.
        OSError: it cannot be read.
    """
    by_folder = dict(_walk(str(path)))
    if not by_folder:
        raise InputError(f"{path}: holds no data.mdb and no images {_what_it_holds(path)}")
    folders = _folder_labels(path, by_folder)
    names = sorted(by_folder)
    labels: Iterable[int | None] = folders.classes if folders and folders.classes else [None] * len(names)
    files = (
        [ImageFile(image, label, "") for image in by_folder[name]]
        for name, label in zip(names, labels, strict=True)
    )
    return [file for turn in zip_longest(*files) for file in turn if file is not None], folders


def _walk(top: str) -> Iterator[tuple[str, list[str]]]:
    """The folders with images under a folder, relative to it, and the paths of these in their order.

    What is hidden is left out; a folder reached twice counts once.
    """
    seen: set[tuple[int, int]] = set()
    for folder, subfolders, names in os.walk(top, followlinks=True, onerror=_raise):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
            subfolders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        images = sorted(name for name in names if _is_image(name))
        if images:
            start = os.path.join(folder, "")
            yield "" if folder == top else os.path.relpath(folder, top), [start + name for name in images]


def _is_image(name: str) -> bool:
    stem, dot, suffix = name.rpartition(".")
    return bool(stem) and name[0] != "." and dot + suffix.lower() in IMAGE_SUFFIXES


def _raise(error: OSError) -> None:
    raise error


def _folder_labels(path: Path, by_folder: Mapping[str, Sequence[str]]) -> FolderLabels | None:
    """Whether the subfolders are the classes of the images in them.

    Args:
        path: the folder.
        by_folder: its images by the folder that they lie in, relative to ``path``.
    """
    names = sorted(by_folder)
    if names == [""]:
        return None
    fault = _not_classes(path, by_folder)
    if fault is not None:
        return FolderLabels(f"its images are read as unlabeled, for {fault}")
    if len({int(name) for name in names if CLASS_NUMBER.fullmatch(name)}) == len(names):
        text = f"{len(names)} folders taken as classes, the numbers that are their names"
        return FolderLabels(text, [int(name) for name in names], named=True)
    first, last = printable(names[0]), printable(names[-1])
    text = f"{len(names)} folders taken as {len(names)} classes: {first} is 0, {last} is {len(names) - 1}"
    return FolderLabels(text, range(len(names)))


def _not_classes(path: Path, by_folder: Mapping[str, Sequence[str]]) -> str | None:
    """Why the subfolders are not one for each class; None: they may be."""
    if "" in by_folder:
        return f"{printable(os.path.basename(by_folder[''][0]))} lies beside the subfolders"
    for name in by_folder:
        if os.sep in name:
            nested = f"{printable(name)} is a folder within a subfolder"
            return f"{nested}; for labels name the folder that holds one folder per class"
    for name in sorted(os.listdir(path)):
        if os.path.isdir(path / name) and not name.startswith(".") and name not in by_folder:
            return f"the subfolder {printable(name)} holds no images"
    return "they lie in a single subfolder" if len(by_folder) == 1 else None


def _what_it_holds(path: Path) -> str:
    """What there is in a folder without images, and what can be done about it."""
    counts = Counter(os.path.splitext(name)[1].lower() for _, _, names in os.walk(path) for name in names)
    held = ", ".join(f"{count} {printable(suffix)}" for suffix, count in counts.most_common(3) if suffix)
    remedy = f"; convert them {CONVERTED}" if OTHER_SUFFIXES & counts.keys() else ""
    return f"({' '.join(sorted(IMAGE_SUFFIXES))}){f', but {held}' if held else ''}{remedy}"


def files_in_list(path: Path) -> Iterator[ImageFile]:
    """The files that a list names, one a line as ``path [label]``.

    Blanks, tabs or a comma part a whole number at the end from the path: the label. A line that begins with
    ``#`` is a comment. Relative paths start at the list's folder.

    Raises:
        InputError: a label that does not fit 32 bits, something that is no path, no images, or a file too
            large for a list.
        OSError: it cannot be read.
    """
    if path.stat().st_size > MAX_LIST_BYTES:
        raise InputError(f"{path}: larger than {MAX_LIST_BYTES >> 20} MiB; is this a list of images?")
    empty = True
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as lines:
        for number, line in enumerate(lines, 1):
            text = line.strip()
            if not text or text.startswith("#"):
                continue
            empty = False
            name, label = _parted(text)
            if label is not None and not INT32.min <= label <= INT32.max:
                raise InputError(f"{path}, line {number}: the label {label} does not fit 32 bits")
            if "\0" in name:
                raise InputError(f"{path}, line {number}: not a path")
            yield ImageFile(os.path.join(path.parent, name), label, f"{path}, line {number}: ")
    if empty:
        raise InputError(f"{path}: the list names no images; {LIST_LINE}")


def _parted(line: str) -> tuple[str, int | None]:
    """A line's path and its label, if any."""
    label = LABEL.search(line)
    if label is None:
        return line, None
    before = line[: label.start()]
    name = before.rstrip()
    name = name.removesuffix(",").rstrip()
    return (name, int(label[0])) if name and name != before else (line, None)


def printable(text: str) -> str:
    """Return the text, or, where it has characters that would spoil a one-line message, its escaped form."""
    return text if text.isprintable() else repr(text)
