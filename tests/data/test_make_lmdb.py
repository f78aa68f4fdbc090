"""make_lmdb and write_lmdb, read back with liblmdb as Caffe does."""

from __future__ import annotations

import os
from pathlib import Path

import cv2
import lmdb
import numpy as np
import pytest
from pictures import photograph

from quantize.caffenet import Datum
from quantize.data.make_lmdb import FIRST_MAP_SIZE, make_datum, make_lmdb, write_lmdb
from quantize.data.sources import open_source
from quantize.errors import InputError, LabelfreeError
from tests.heard import Heard


def records(path: Path) -> dict[bytes, Datum]:
    with lmdb.open(str(path), readonly=True) as environment, environment.begin() as transaction:
        return {key: Datum.FromString(value) for key, value in transaction.cursor()}


def test_raw_datums_under_the_keys_of_convert_imageset(image_folder, tmp_path):
    folder = image_folder(12, size=(20, 30))
    report = make_lmdb(folder, tmp_path / "new" / "lmdb")
    assert (report.written, report.unreadable) == (12, ())
    assert sorted(os.listdir(tmp_path / "new")) == ["lmdb"]
    assert sorted(os.listdir(tmp_path / "new" / "lmdb")) == ["data.mdb"]
    for i, (key, datum) in enumerate(records(tmp_path / "new" / "lmdb").items()):
        assert key == b"%08d_image%02d.png" % (i, i)
        assert (datum.channels, datum.height, datum.width, datum.encoded) == (3, 20, 30, False)
        assert not datum.HasField("label")
        assert datum.data == photograph(i, 20, 30).transpose(2, 0, 1).tobytes()


def test_encoded_resized_labelled_and_limited(image_folder, tmp_path):
    image_folder(9)
    (tmp_path / "list").write_text("".join(f"images/image{i:02d}.png {i * i}\n" for i in range(9)))
    heard = Heard()
    report = make_lmdb(
        tmp_path / "list", tmp_path / "l", resize_short=32, limit=5, jpeg_quality=95, progress=heard
    )
    assert (report.written, report.labeled) == (5, 5)
    assert (heard.total, heard.done, heard.notes) == ({"make-lmdb": 5}, {"make-lmdb": 5}, [])
    for i, datum in enumerate(records(tmp_path / "l").values()):
        assert datum.encoded
        assert datum.label == i * i
        assert min(datum.height, datum.width) == 32
        decoded = cv2.imdecode(np.frombuffer(datum.data, np.uint8), -1)
        assert decoded.shape == (datum.height, datum.width, datum.channels)
        original = cv2.imread(str(tmp_path / "images" / f"image{i:02d}.png"))
        expected = cv2.resize(original, decoded.shape[1::-1])
        assert np.abs(decoded.astype(int) - expected).mean() < 6


def test_resized_to_one_size_as_convert_imageset_does(image_folder, tmp_path):
    folder = image_folder(4)
    make_lmdb(folder, tmp_path / "l", resize=(24, 40))
    for i, datum in enumerate(records(tmp_path / "l").values()):
        original = cv2.imread(str(folder / f"image{i:02d}.png"))
        expected = cv2.resize(original, (40, 24)).transpose(2, 0, 1)
        assert (datum.height, datum.width) == (24, 40)
        assert datum.data == expected.tobytes()


def test_labels_are_the_subfolders_and_that_is_said(image_folder, tmp_path):
    folder = image_folder(6, size=(4, 4))
    for i, name in enumerate(["cat", "ant", "bee"] * 2):
        (folder / name).mkdir(exist_ok=True)
        (folder / f"image{i:02d}.png").rename(folder / name / f"{i}.png")
    heard = Heard()
    report = make_lmdb(folder, tmp_path / "l", progress=heard)
    assert (report.written, report.labeled) == (6, 6)
    assert heard.notes == [f"{folder}: 3 folders taken as 3 classes: ant is 0, cat is 2"]
    assert {key[9:]: datum.label for key, datum in records(tmp_path / "l").items()} == {
        b"ant/1.png": 0,
        b"ant/4.png": 0,
        b"bee/2.png": 1,
        b"bee/5.png": 1,
        b"cat/0.png": 2,
        b"cat/3.png": 2,
    }


def test_shuffle_depends_on_the_seed_alone(image_folder, tmp_path):
    folder = image_folder(10, size=(4, 4))
    for name, seed, threads in [("a", 1, 1), ("b", 1, 3), ("c", 2, 1)]:
        make_lmdb(folder, tmp_path / name, shuffle=True, seed=seed, threads=threads)
    a, b, c = (list(records(tmp_path / name)) for name in "abc")
    assert a == b != c
    assert (
        sorted(key[9:] for key in a)
        == sorted(key[9:] for key in c)
        == [b"image%02d.png" % i for i in range(10)]
    )
    assert a == sorted(a)


def test_unreadable_images_are_reported_and_left_out(image_folder, tmp_path):
    folder = image_folder(6, size=(8, 8))
    (folder / "image01.png").write_bytes(b"broken")
    (folder / "image04.png").write_bytes(b"")
    heard = Heard()
    report = make_lmdb(folder, tmp_path / "l", limit=3, threads=2, progress=heard)
    assert report.written == heard.done["make-lmdb"] == 3
    assert [image.name for image in report.unreadable] == ["image01.png"]
    assert "image01.png: not a whole" in report.unreadable[0].reason
    assert heard.notes == [f"left out: {image.reason}" for image in report.unreadable]
    assert list(records(tmp_path / "l")) == [
        b"00000000_image00.png",
        b"00000001_image02.png",
        b"00000002_image03.png",
    ]


def test_nothing_readable_leaves_nothing_behind(image_folder, tmp_path):
    folder = image_folder(2)
    for file in folder.iterdir():
        file.write_bytes(b"broken")
    (folder / "image00.png").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0")
    told = r"none of its 2 images can be read; the first: .*image00.png: a HEIC image, which is not read"
    with pytest.raises(InputError, match=told):
        make_lmdb(folder, tmp_path / "out" / "l")
    assert list((tmp_path / "out").iterdir()) == []


def test_an_lmdb_from_an_lmdb(image_folder, tmp_path):
    make_lmdb(image_folder(5, size=(9, 9)), tmp_path / "a")
    make_lmdb(tmp_path / "a", tmp_path / "b", limit=2)
    assert [datum.data for datum in records(tmp_path / "b").values()] == [
        datum.data for datum in list(records(tmp_path / "a").values())[:2]
    ]


def test_the_map_grows_with_the_records(tmp_path):
    big = make_datum(np.random.default_rng(0).integers(0, 256, (3, 1000, 1000), np.uint8), 1)
    count = 2 * FIRST_MAP_SIZE // len(big.data)
    assert write_lmdb(((str(i), big) for i in range(count)), tmp_path / "l") == count
    got = records(tmp_path / "l")
    assert len(got) == count
    assert all(datum == big for datum in got.values())


def test_floats_and_long_names_survive(tmp_path):
    pixels = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)
    write_lmdb([("n" * 900 + "\udcff", make_datum(pixels, None))], tmp_path / "l")
    image = open_source(tmp_path / "l").read(0)
    assert image.pixels.dtype == np.float32
    assert np.array_equal(image.pixels, pixels)
    assert len(next(iter(records(tmp_path / "l")))) == 511


def test_existing_things_are_not_overwritten(tmp_path):
    one, two = (make_datum(np.full((1, 1, 1), i, np.uint8), 0) for i in (1, 2))
    write_lmdb([("a", one)], tmp_path / "l")
    with pytest.raises(InputError, match=r"exists: .*--force"):
        write_lmdb([("a", two)], tmp_path / "l")
    assert records(tmp_path / "l") == {b"00000000_a": one}
    write_lmdb([("b", two)], tmp_path / "l", force=True)
    assert records(tmp_path / "l") == {b"00000000_b": two}
    (tmp_path / "l" / "precious.txt").touch()
    with pytest.raises(InputError, match="is not an LMDB"):
        write_lmdb([("a", one)], tmp_path / "l", force=True)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="is not an LMDB"):
        make_lmdb(tmp_path, tmp_path / "file", force=True)
    assert sorted(os.listdir(tmp_path)) == ["file", "l"]


def test_a_failure_midway_leaves_the_old_lmdb_and_no_rest(tmp_path):
    one = make_datum(np.zeros((1, 1, 1), np.uint8), 0)
    write_lmdb([("a", one)], tmp_path / "l")

    def failing():
        yield "b", one
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_lmdb(failing(), tmp_path / "l", force=True)
    assert os.listdir(tmp_path) == ["l"]
    assert records(tmp_path / "l") == {b"00000000_a": one}
    with pytest.raises(InputError, match="no images"):
        write_lmdb([], tmp_path / "m")
    assert os.listdir(tmp_path) == ["l"]


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(LabelfreeError, match="cannot be written"):
        write_lmdb([("a", make_datum(np.zeros((1, 1, 1), np.uint8), 0))], tmp_path / "file" / "l")


@pytest.mark.parametrize(
    "wish",
    [
        {"resize_short": 0},
        {"limit": 0},
        {"jpeg_quality": 0},
        {"jpeg_quality": 101},
        {"seed": -1},
        {"resize": (0, 3)},
        {"resize": (3, 3), "resize_short": 3},
    ],
)
def test_impossible_wishes(image_folder, tmp_path, wish):
    with pytest.raises(InputError, match=next(iter(wish))):
        make_lmdb(image_folder(1), tmp_path / "l", **wish)


def test_what_a_jpeg_cannot_hold():
    with pytest.raises(InputError, match="cannot be stored as JPEG"):
        make_datum(np.zeros((3, 2, 2), np.float32), None, jpeg_quality=90)
    with pytest.raises(InputError, match="cannot be stored as JPEG"):
        make_datum(np.zeros((4, 2, 2), np.uint8), None, jpeg_quality=90)
    with pytest.raises(InputError, match="cannot be stored as JPEG"):
        make_datum(np.zeros((1, 1, 70000), np.uint8), None, jpeg_quality=90)
