"""Write LMDBs of Datums that Caffe and labelfree read, from image files or from other LMDBs."""

from __future__ import annotations

import errno
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import cv2
import lmdb
import numpy as np
import numpy.typing as npt

from quantize.caffenet import Datum
from quantize.data.sources import Pixels, Source, open_source
from quantize.data.transform import resized, short_side_size
from quantize.errors import InputError, LabelfreeError
from quantize.host import available_threads, pool, using_threads
from quantize.progress import SILENT, Progress

LMDB_FILES = frozenset({"data.mdb", "lock.mdb"})
FULL_DISK_BYTES = 1 << 20
"""With less than this left a disk is full: a write that it cuts short is an input/output error to LMDB."""
MAX_KEY = 511
"""LMDB's limit on the bytes of a key."""
FIRST_MAP_SIZE = 1 << 24
"""Bytes; doubled whenever the records outgrow it, so that readers need not map more than there is."""
COMMIT_BYTES = 1 << 26
"""Records are written in transactions of about this many bytes."""
AHEAD_PER_THREAD = 8
"""Images prepared ahead of the one being written, per thread."""


@dataclass(frozen=True)
class Unreadable:
    """An image that was left out, and why (a whole line that names it)."""

    name: str
    reason: str


@dataclass(frozen=True)
class LmdbReport:
    """What make_lmdb did.

    Attributes:
        written: images that the LMDB holds.
        labeled: how many of them have a label.
        unreadable: which of the source could not be read.
    """

    written: int
    labeled: int
    unreadable: tuple[Unreadable, ...]


def make_lmdb(
    source_path: Path,
    lmdb_path: Path,
    *,
    resize_short: int | None = None,
    resize: tuple[int, int] | None = None,
    limit: int | None = None,
    shuffle: bool = False,
    seed: int = 0,
    jpeg_quality: int | None = None,
    threads: int | None = None,
    force: bool = False,
    progress: Progress = SILENT,
) -> LmdbReport:
    """Make an LMDB of Datums from whatever open_source opens; images that cannot be read are left out.

    Args:
        source_path: an image folder, a list of images or an LMDB.
        lmdb_path: the new LMDB's folder.
        resize_short: resize so that the shorter side has this many pixels.
        resize: resize to this height and width; without either the sizes are kept.
        limit: stop after this many images written; None: all.
        shuffle: in an order that the seed decides, else in the source's.
        seed: of the shuffle.
        jpeg_quality: 1 to 100: store the images encoded as JPEG; None: raw.
        threads: that read, decode and resize; None: as `available_threads` says.
        force: replace an LMDB that is already there.
        progress: hears of each image written or left out, and what the subfolders were taken for.

    Raises:
        InputError: impossible settings, nothing to read, no image readable, or the LMDB is already there.
        LabelfreeError: it cannot be written (no space, no permission).
    """
    for name, value in (("resize_short", resize_short), ("limit", limit), ("jpeg_quality", jpeg_quality)):
        if value is not None and value < 1:
            raise InputError(f"{name} is {value}: it must be at least 1")
    if resize is not None and min(resize) < 1:
        raise InputError(f"resize is {resize[0]}x{resize[1]}: height and width must be at least 1")
    if resize is not None and resize_short is not None:
        raise InputError("resize and resize_short are both given: keep one")
    if jpeg_quality is not None and jpeg_quality > 100:
        raise InputError(f"jpeg_quality is {jpeg_quality}: it must be at most 100")
    if seed < 0:
        raise InputError(f"the seed is {seed}: it must be 0 or more")
    _refuse_existing(lmdb_path, force)
    unreadable: list[Unreadable] = []
    labeled = 0

    def left_out(image: Unreadable) -> None:
        unreadable.append(image)
        progress.note(f"left out: {image.reason}")

    def records(source: Source) -> Iterator[tuple[str, Datum]]:
        nonlocal labeled
        order = np.random.default_rng(seed).permutation(len(source)) if shuffle else range(len(source))
        progress.start("make-lmdb", min(limit or len(source), len(source)))
        for name, datum in islice(_readable(source, order, prepare, left_out), limit):
            labeled += datum.HasField("label")
            yield name, datum
            progress.advance()
        if len(unreadable) == len(source):
            first = unreadable[0].reason
            raise InputError(
                f"{source_path}: none of its {len(source)} images can be read; the first: {first}"
            )

    def prepare(source: Source, index: int) -> Datum:
        image = source.read(index)
        pixels = image.pixels
        try:
            if resize_short is not None:
                pixels = resized(pixels, short_side_size(pixels.shape[1], pixels.shape[2], resize_short))
            elif resize is not None:
                pixels = resized(pixels, resize)
            return make_datum(pixels, image.label, jpeg_quality)
        except InputError as error:
            raise InputError(f"{source.path}: image {source.name(index)}: {error}") from error

    with using_threads(threads), closing(open_source(source_path)) as source:
        if source.folders is not None:
            progress.note(f"{source_path}: {source.folders.text}")
        written = write_lmdb(records(source), lmdb_path, force=force)
    return LmdbReport(written, labeled, tuple(unreadable))


def _readable(
    source: Source,
    order: Sequence[int] | npt.NDArray[np.int64],
    prepare: Callable[[Source, int], Datum],
    left_out: Callable[[Unreadable], None],
) -> Iterator[tuple[str, Datum]]:
    """Names and Datums of the images that can be read, prepared ahead by threads."""
    threads = available_threads()
    executor = pool(threads, "labelfree-make-lmdb")
    try:
        coming = ((int(index), executor.submit(prepare, source, int(index))) for index in order)
        begun = deque(islice(coming, threads * AHEAD_PER_THREAD))
        while begun:
            index, future = begun.popleft()
            begun.extend(islice(coming, 1))
            try:
                datum = future.result()
            except InputError as error:
                left_out(Unreadable(source.name(index), str(error)))
            else:
                yield source.name(index), datum
    finally:
        executor.shutdown(cancel_futures=True)


def make_datum(pixels: Pixels, label: int | None, jpeg_quality: int | None = None) -> Datum:
    """Make a Datum.

    Args:
        pixels: uint8 or float32 (stored as float_data), shape (channels, height, width), BGR.
        label: the class; None: the Datum states none.
        jpeg_quality: 1 to 100: encode as JPEG; None: raw.

    Raises:
        InputError: pixels that a JPEG cannot hold.
    """
    channels, height, width = pixels.shape
    datum = Datum(channels=channels, height=height, width=width)
    if label is not None:
        datum.label = label
    if jpeg_quality is not None:
        if pixels.dtype != np.uint8 or channels not in (1, 3):
            raise InputError(
                f"{channels} channels of {pixels.dtype} cannot be stored as JPEG: store them raw"
            )
        interleaved: npt.NDArray[Any] = np.ascontiguousarray(pixels.transpose(1, 2, 0))
        try:
            encoded, data = cv2.imencode(".jpg", interleaved, [cv2.IMWRITE_JPEG_QUALITY, jpeg_quality])
        except cv2.error as error:
            raise InputError(f"an image of {width} x {height} pixels cannot be stored as JPEG") from error
        if not encoded:
            raise InputError(f"an image of {width} x {height} pixels cannot be stored as JPEG")
        datum.data = data.tobytes()
        datum.encoded = True
    elif pixels.dtype == np.uint8:
        datum.data = pixels.tobytes()
    else:
        datum.float_data.extend(pixels.ravel().tolist())
    return datum


def write_lmdb(records: Iterable[tuple[str, Datum]], path: Path, *, force: bool = False) -> int:
    """Write Datums as an LMDB folder, whole or not at all.

    The keys are ``NUMBER_NAME`` with the record's number in eight digits, as convert_imageset of Caffe
    writes them, so Caffe reads the records in this order.

    Args:
        records: names and Datums.
        path: the new folder. It is written beside this name and renamed when it is on the disk.
        force: replace an LMDB that is already there.

    Returns:
        The number of records.

    Raises:
        InputError: there is already something at ``path``, or no records came.
        LabelfreeError: it cannot be written.
    """
    _refuse_existing(path, force)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        beside.parent.mkdir(parents=True, exist_ok=True)
        beside.mkdir()
        try:
            count = _write_records(records, beside)
            if count == 0:
                raise InputError(f"{path}: there are no images to write")
            _put_in_place(beside, path)
        finally:
            shutil.rmtree(beside, ignore_errors=True)
    except OSError as error:
        remedy = "make room there" if error.errno == errno.ENOSPC else "choose another place"
        raise LabelfreeError(f"{path}: cannot be written: {error.strerror}; {remedy}") from error
    return count


def _refuse_existing(path: Path, force: bool) -> None:
    """Raise InputError if something is at ``path``, unless it is an LMDB (or empty) and force is set."""
    if not path.exists():
        return
    if not path.is_dir() or not {entry.name for entry in path.iterdir()} <= LMDB_FILES:
        raise InputError(f"{path}: exists and is not an LMDB: choose another name")
    if not force:
        raise InputError(f"{path}: exists: choose another name, or replace it with --force")


def _write_records(records: Iterable[tuple[str, Datum]], folder: Path) -> int:
    """Write the data file.

    There is no lock file: readers make it, and with the disk full the memory that it is mapped to ends the
    process.

    Raises:
        OSError: it cannot be written.
    """
    count = 0
    try:
        environment = lmdb.open(str(folder), map_size=FIRST_MAP_SIZE, mode=0o644, sync=False, lock=False)
        with closing(environment):
            pending: list[tuple[bytes, bytes]] = []
            size = 0
            for count, (name, datum) in enumerate(records, 1):
                key = f"{count - 1:08d}_{name}".encode("utf-8", "surrogateescape")[:MAX_KEY]
                pending.append((key, datum.SerializeToString()))
                size += len(pending[-1][1])
                if size >= COMMIT_BYTES:
                    _commit(environment, pending)
                    pending, size = [], 0
            _commit(environment, pending)
            environment.sync(True)
    except lmdb.Error as error:
        if shutil.disk_usage(folder).free < FULL_DISK_BYTES:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
        raise OSError(errno.EIO, str(error)) from error
    return count


def _commit(environment: lmdb.Environment, pending: Sequence[tuple[bytes, bytes]]) -> None:
    """Append the records in one transaction, in a map as large as that takes."""
    while True:
        try:
            with environment.begin(write=True) as transaction:
                for key, value in pending:
                    transaction.put(key, value, append=True)
            return
        except lmdb.MapFullError:  # noqa: PERF203 - the only sign that the map is too small
            environment.set_mapsize(2 * environment.info()["map_size"])


def _put_in_place(beside: Path, path: Path) -> None:
    """Rename the finished folder to its name, over an LMDB that may be there."""
    if path.exists():
        old = beside.with_suffix(".old")
        path.rename(old)
        beside.rename(path)
        shutil.rmtree(old)
    else:
        beside.rename(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
