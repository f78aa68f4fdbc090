"""LmdbFile against liblmdb, and against damaged files."""

from __future__ import annotations

import shutil
from pathlib import Path

import lmdb
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import result_or_input_error

from quantize.data.lmdb_file import LmdbFile, is_lmdb_file
from quantize.errors import InputError


def write(folder: Path, records: dict[bytes, bytes], commits: int = 1) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    with lmdb.open(str(folder), map_size=1 << 26, sync=False) as environment:
        for part in range(commits):
            with environment.begin(write=True) as transaction:
                for key, value in list(records.items())[part::commits]:
                    transaction.put(key, value)
    return folder / "data.mdb"


def contents(file: LmdbFile) -> list[tuple[bytes, bytes]]:
    return [file.record(i) for i in range(len(file))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("lmdb") / "lmdb"


# values below and above the size from which LMDB puts them on overflow pages; up to 3 levels of pages
values = st.one_of(st.binary(max_size=40), st.integers(0, 20000).map(lambda n: b"v" * n))


@settings(max_examples=40, deadline=None)
@given(
    records=st.dictionaries(st.binary(min_size=1, max_size=511), values, min_size=1, max_size=80),
    commits=st.integers(1, 4),
)
def test_same_records_in_the_same_order_as_liblmdb(folder, records, commits):
    file = LmdbFile(write(folder, records, commits))
    assert contents(file) == sorted(records.items())
    file.close()


def test_many_records_in_any_order_from_a_deep_tree(folder):
    records = {b"%08d_%s" % (i, b"x" * 300): b"%d" % i for i in range(5000)}
    path = write(folder, records, commits=3)
    file = LmdbFile(path)
    assert file.record(4321) == list(records.items())[4321]
    assert file.record(7) == list(records.items())[7]
    assert contents(file) == list(records.items())
    assert contents(LmdbFile(path)) == list(records.items())  # twice in one process
    with lmdb.open(str(folder), readonly=True, lock=False) as environment:
        assert environment.stat()["depth"] >= 3


def test_records_deleted_and_rewritten_since(folder):
    records = {b"%04d" % i: b"a" * (i * 7) for i in range(300)}
    path = write(folder, records)
    with lmdb.open(str(folder), map_size=1 << 26) as environment:
        with environment.begin(write=True) as transaction:
            for i in range(0, 300, 2):
                transaction.delete(b"%04d" % i)
        with environment.begin(write=True) as transaction:
            transaction.put(b"0001", b"new")
    left = {key: value for key, value in records.items() if int(key) % 2} | {b"0001": b"new"}
    assert contents(LmdbFile(path)) == sorted(left.items())


def test_empty(folder):
    with pytest.raises(InputError, match="is empty"):
        LmdbFile(write(folder, {}))


def test_is_lmdb_file(folder, tmp_path):
    assert is_lmdb_file(write(folder, {b"a": b"b"}))
    (tmp_path / "short").write_bytes(b"abc")
    assert not is_lmdb_file(tmp_path / "short")


SAMPLE = {b"%04d" % i: bytes([i]) * (i * 60) for i in range(120)}


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    return write(tmp_path_factory.mktemp("sample") / "lmdb", SAMPLE).read_bytes()


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_damaged_files_end_in_records_or_an_input_error(folder, sample, data):
    damaged = bytearray(sample)
    pages = len(sample) // 4096
    for _ in range(data.draw(st.integers(1, 4))):
        page = data.draw(st.sampled_from([0, 1, pages - 1, pages - 2, *range(pages)]))
        at = page * 4096 + data.draw(st.one_of(st.integers(0, 160), st.integers(0, 4095)))
        damaged[at] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        del damaged[data.draw(st.integers(0, len(damaged))) :]
    folder.mkdir(exist_ok=True)
    path = folder / "damaged"
    path.write_bytes(damaged)
    result_or_input_error(lambda: contents(LmdbFile(path)))


@pytest.mark.parametrize("length", [0, 10, 100, 4096, 8191, 8192, 12288])
def test_truncated(tmp_path, sample, length):
    path = tmp_path / "data.mdb"
    path.write_bytes(sample[:length])
    with pytest.raises(InputError, match=r"damaged or was not copied whole|no LMDB"):
        contents(LmdbFile(path))


def test_a_tree_that_contains_itself(tmp_path):
    path = write(tmp_path / "lmdb", {b"%08d_%s" % (i, b"x" * 300): b"" for i in range(100)})
    data = bytearray(path.read_bytes())
    with lmdb.open(str(path.parent), readonly=True, lock=False) as environment:
        depth = environment.stat()["depth"]
    assert depth == 2
    root = next(i for i in range(2, len(data) // 4096) if data[i * 4096 + 10] == 1)  # P_BRANCH
    node = root * 4096 + int.from_bytes(data[root * 4096 + 16 : root * 4096 + 18], "little")
    data[node : node + 6] = root.to_bytes(6, "little")
    path.write_bytes(data)
    with pytest.raises(InputError, match="damaged"):
        contents(LmdbFile(path))


def test_damage_is_the_same_whenever_one_asks(folder):
    records = {b"%08d" % i: b"v" * 100 for i in range(3000)}
    path = write(folder, records)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    said = set()
    file = LmdbFile(path)
    for _ in range(3):
        with pytest.raises(InputError, match="damaged or was not copied whole") as caught:
            file.record(2999)
        said.add(str(caught.value))
    assert len(said) == 1
