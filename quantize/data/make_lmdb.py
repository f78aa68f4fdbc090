"""Write LMDBs of Datums that Caffe and labelfree read, from image files or from other LMDBs."""

from __future__ import annotations

import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
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
from quantize.host import available_threads, pool

LMDB_FILES = frozenset({"data.mdb", "lock.mdb"})
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
    """What make_lmdb did: how many images the LMDB holds, and which of the source could not be read."""

    written: int
    unreadable: tuple[Unreadable, ...]


def make_lmdb(
    source_path: Path,
    lmdb_path: Path,
    *,
    resize_short: int | None = None,
    limit: int | None = None,
    shuffle: bool = False,
    seed: int = 0,
    jpeg_quality: int | None = None,
    threads: int | None = None,
    force: bool = False,
    on_unreadable: Callable[[Unreadable], None] | None = None,
    on_written: Callable[[int], None] | None = None,
) -> LmdbReport:
    """Make an LMDB of Datums from whatever open_source opens; images that cannot be read are left out.

    Args:
        source_path: an image folder, a list of images or an LMDB.
        lmdb_path: the new LMDB's folder.
        resize_short: resize so that the shorter side has this many pixels; None: keep the sizes.
        limit: stop after this many images written; None: all.
        shuffle: in an order that the seed decides, else in the source's.
        seed: of the shuffle.
        jpeg_quality: 1 to 100: store the images encoded as JPEG; None: raw.
        threads: that read, decode and resize; None: one per processor.
        force: replace an LMDB that is already there.
        on_unreadable: called for each image left out, as soon as it is known.
        on_written: called with the number of images so far after each.

    Raises:
        InputError: impossible settings, nothing to read, no image readable, or the LMDB is already there.
        LabelfreeError: it cannot be written (no space, no permission).
    """
    for name, value in (("resize_short", resize_short), ("limit", limit), ("jpeg_quality", jpeg_quality)):
        if value is not None and value < 1:
            raise InputError(f"{name} is {value}: it must be at least 1")
    if jpeg_quality is not None and jpeg_quality > 100:
        raise InputError(f"jpeg_quality is {jpeg_quality}: it must be at most 100")
    if seed < 0:
        raise InputError(f"the seed is {seed}: it must be 0 or more")
    _refuse_existing(lmdb_path, force)
    unreadable: list[Unreadable] = []

    def note(image: Unreadable) -> None:
        unreadable.append(image)
        if on_unreadable is not None:
            on_unreadable(image)

    def records(source: Source) -> Iterator[tuple[str, Datum]]:
        order = np.random.default_rng(seed).permutation(len(source)) if shuffle else range(len(source))
        for count, record in enumerate(islice(_readable(source, order, prepare, threads, note), limit), 1):
            yield record
            if on_written is not None:
                on_written(count)
        if len(unreadable) == len(source):
            raise InputError(f"{source_path}: none of its {len(source)} images can be read")

    def prepare(source: Source, index: int) -> Datum:
        image = source.read(index)
        pixels = image.pixels
        try:
            if resize_short is not None:
                pixels = resized(pixels, short_side_size(pixels.shape[1], pixels.shape[2], resize_short))
            return make_datum(pixels, image.label, jpeg_quality)
        except InputError as error:
            raise InputError(f"{source.path}: image {source.name(index)}: {error}") from error

    source = open_source(source_path)
    try:
        written = write_lmdb(records(source), lmdb_path, force=force)
    finally:
        source.close()
    return LmdbReport(written, tuple(unreadable))


def _readable(
    source: Source,
    order: Sequence[int] | npt.NDArray[np.int64],
    prepare: Callable[[Source, int], Datum],
    threads: int | None,
    note: Callable[[Unreadable], None],
) -> Iterator[tuple[str, Datum]]:
    """Names and Datums of the images that can be read, prepared ahead by threads."""
    threads = threads or available_threads()
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
                note(Unreadable(source.name(index), str(error)))
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
    """Write Datums as an LMDB folder (data.mdb, lock.mdb), whole or not at all.

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
        raise LabelfreeError(f"{path}: cannot be written: {error.strerror}") from error
    except lmdb.Error as error:
        raise LabelfreeError(f"{path}: cannot be written: {error}") from error
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
    count = 0
    environment = lmdb.open(str(folder), map_size=FIRST_MAP_SIZE, mode=0o644, sync=False)
    try:
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
    finally:
        environment.close()
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
