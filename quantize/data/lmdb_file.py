"""LMDB data files, read without liblmdb.

The library maps the file and trusts every byte of it: a truncated or damaged file kills the process
instead of raising. It also refuses to open one file twice in a process, which calibration and validation
from the same LMDB do. Reading is a walk of a B-tree, so it is done here with every offset checked, from
read-only media too, and from any number of threads.

The format is that of LMDB 0.9 (data version 1) as 64-bit little-endian machines write it; the names of
structures and flags are those of its source file ``mdb.c``. Only the unnamed database is read: the one
that Caffe uses.
"""

from __future__ import annotations

import os
import struct
import threading
from array import array
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from quantize.errors import InputError

MAGIC = 0xBEEFC0DE
DATA_VERSION = 1
PAGE_HEADER = struct.Struct("<QHHHH")  # MDB_page: number, pad, flags, lower, upper
META = struct.Struct("<II16x")  # MDB_meta: magic, version, address, map size; two DATABASEs and TAIL follow
DATABASE = struct.Struct(
    "<IHHQQQQQ"
)  # MDB_db: pad, flags, depth, branch, leaf, overflow pages, entries, root
META_TAIL = struct.Struct("<QQ")  # last page, transaction id
NODE = struct.Struct("<HHHH")  # MDB_node: low and high half of the data size, flags, key size
P_BRANCH, P_LEAF, P_OVERFLOW, P_META, P_LEAF2 = 0x01, 0x02, 0x04, 0x08, 0x20
F_BIGDATA, F_SUBDATA, F_DUPDATA = 0x01, 0x02, 0x04
MAX_DEPTH = 32  # CURSOR_STACK
PAGE_SIZES = frozenset(2**n for n in range(9, 17))
INDEX_AHEAD = 1024
"""Records by which the index of places grows at a time."""


def is_lmdb_file(path: Path) -> bool:
    """Whether the file begins as an LMDB data file does."""
    with path.open("rb") as file:
        start = file.read(PAGE_HEADER.size + META.size)
    return (
        len(start) == PAGE_HEADER.size + META.size and META.unpack_from(start, PAGE_HEADER.size)[0] == MAGIC
    )


class LmdbFile:
    """The records of an LMDB data file in the order of their keys, by number.

    Places of records are found as far as asked for, so that the first thousand of a million cost little.

    Args:
        path: the file, usually ``data.mdb`` in the LMDB's folder.

    Raises:
        InputError: the file cannot be read, is no LMDB of the supported version, or is empty; from any
            method: the file is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = path.open("rb", buffering=0)
        except OSError as error:
            raise InputError(f"{path}: cannot be read: {error.strerror}") from error
        try:
            self._size = os.fstat(self._file.fileno()).st_size
            self._page_size, self._root, self._entries = self._newest_database()
        except BaseException:
            self._file.close()
            raise
        self._places = array("Q")
        self._walked = self._walk(self._root, depth=1)
        self._fault = ""
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """Return the number of records."""
        return self._entries

    def record(self, index: int) -> tuple[bytes, bytes]:
        """Key and value of record ``index`` (0 <= index < len)."""
        number, offset = divmod(self._place(index), self._page_size)
        page = self._read(number * self._page_size, self._page_size)
        low, high, flags, key_size = self._unpack(NODE, page, offset)
        size = high << 16 | low
        start = offset + NODE.size + key_size
        inline = 8 if flags & F_BIGDATA else size
        if flags & (F_SUBDATA | F_DUPDATA) or start + inline > self._page_size:
            raise self._damaged(f"record {index}")
        key = page[offset + NODE.size : start]
        if not flags & F_BIGDATA:
            return key, page[start : start + size]
        overflow = int.from_bytes(page[start : start + 8], "little")
        self._header(overflow, P_OVERFLOW)
        return key, self._read(overflow * self._page_size + PAGE_HEADER.size, size)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _newest_database(self) -> tuple[int, int, int]:
        """Page size, root page and number of entries of the unnamed database as last committed."""
        page_size, *first = self._meta(0)
        if page_size not in PAGE_SIZES:
            raise self._damaged("page size")
        _, *second = self._meta(page_size)
        _, root, entries = max(first, second)
        if entries == 0:
            raise InputError(f"{self.path}: the LMDB is empty")
        if entries > self._size // NODE.size:
            raise self._damaged("number of entries")
        return page_size, root, entries

    def _meta(self, offset: int) -> tuple[int, int, int, int]:
        """Page size, transaction id, root and entries that the meta page at ``offset`` states."""
        body = PAGE_HEADER.size + META.size
        page = self._read(offset, body + 2 * DATABASE.size + META_TAIL.size)
        magic, version = META.unpack_from(page, PAGE_HEADER.size)
        if magic != MAGIC or version != DATA_VERSION:
            raise InputError(
                f"{self.path}: no LMDB data file of version {DATA_VERSION} written by a 64-bit machine;"
                " make it anew from the images with `labelfree make-lmdb`"
            )
        page_size = DATABASE.unpack_from(page, body)[0]
        main = DATABASE.unpack_from(page, body + DATABASE.size)
        _, transaction = META_TAIL.unpack_from(page, body + 2 * DATABASE.size)
        return page_size, transaction, main[7], main[6]

    def _place(self, index: int) -> int:
        """Offset in the file of the node of record ``index``."""
        if index >= len(self._places):
            with self._lock:
                missing = index + 1 - len(self._places)
                try:
                    self._places.extend(islice(self._walked, max(0, missing) + INDEX_AHEAD))
                except InputError as error:
                    self._fault = str(error)
            if index >= len(self._places):
                if self._fault:  # the walk is over: whoever asks again is told the same
                    raise InputError(self._fault)
                raise self._damaged(f"only {len(self._places)} of {self._entries} records found")
        return self._places[index]

    def _walk(self, number: int, depth: int) -> Iterator[int]:
        """Offsets in the file of the nodes of all leaves under page ``number``, in order."""
        flags, lower = self._header(number, P_LEAF | P_BRANCH)
        count = (lower - PAGE_HEADER.size) // 2
        if flags & P_LEAF2 or depth > MAX_DEPTH or count < 1 or lower > self._page_size:
            raise self._damaged(f"page {number}")
        page = self._read(number * self._page_size, self._page_size)
        offsets = struct.unpack_from(f"<{count}H", page, PAGE_HEADER.size)
        if flags & P_LEAF:
            if max(offsets) >= self._page_size:
                raise self._damaged(f"page {number}")
            yield from (number * self._page_size + offset for offset in offsets)
            return
        for offset in offsets:
            low, middle, high, _ = self._unpack(NODE, page, offset)
            yield from self._walk(high << 32 | middle << 16 | low, depth + 1)

    def _header(self, number: int, kinds: int) -> tuple[int, int]:
        """Flags and ``lower`` of page ``number``, which must know its number and be of one of the kinds."""
        header = self._read(number * self._page_size, PAGE_HEADER.size)
        stated, _, flags, lower, _ = PAGE_HEADER.unpack(header)
        if stated != number or not flags & kinds:
            raise self._damaged(f"page {number}")
        return flags, lower

    def _unpack(self, layout: struct.Struct, page: bytes, offset: int) -> tuple[int, ...]:
        if offset + layout.size > len(page):
            raise self._damaged("a node")
        return layout.unpack_from(page, offset)

    def _read(self, offset: int, size: int) -> bytes:
        if offset + size > self._size:
            raise self._damaged("it ends too early")
        try:
            data = os.pread(self._file.fileno(), size, offset)
        except OSError as error:
            raise InputError(f"{self.path}: cannot be read: {error.strerror}") from error
        if len(data) != size:
            raise self._damaged("it ends too early")
        return data

    def _damaged(self, what: str) -> InputError:
        return InputError(
            f"{self.path}: the LMDB is damaged or was not copied whole ({what}); copy it again or make it"
            " anew with `labelfree make-lmdb`"
        )
