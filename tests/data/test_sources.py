"""Sources: LMDBs, folders and lists of images, good and hostile."""

from __future__ import annotations

import os
from pathlib import Path

import cv2
import lmdb
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import photograph, result_or_input_error

from quantize.caffenet import Datum
from quantize.caffenet.schema import AnnotatedDatum
from quantize.data import files, sources
from quantize.data.make_lmdb import make_datum, write_lmdb
from quantize.data.sources import datum_pixels, open_source
from quantize.errors import InputError


def write_raw(path: Path, records: dict[bytes, bytes]) -> Path:
    with (
        lmdb.open(str(path), map_size=1 << 24, sync=False) as environment,
        environment.begin(write=True) as put,
    ):
        for key, value in records.items():
            put.put(key, value)
    return path


def test_lmdb_of_all_kinds_of_datums_in_the_order_of_the_keys(tmp_path):
    color, gray = photograph(0, 6, 5), photograph(1, 6, 5, channels=1)
    chw = color.transpose(2, 0, 1)
    floats = chw / np.float32(7)
    png = cv2.imencode(".png", color)[1].tobytes()
    gray_png = cv2.imencode(".png", gray)[1].tobytes()
    records = {
        b"b": make_datum(floats, None),
        b"a": make_datum(chw, 7),
        b"d": Datum(data=png, encoded=True, label=-1),
        b"c": Datum(data=gray_png, encoded=True),
    }
    path = write_raw(tmp_path / "lmdb", {key: datum.SerializeToString() for key, datum in records.items()})
    for place in (path, path / "data.mdb"):
        source = open_source(place)
        assert [source.name(i) for i in range(len(source))] == ["a", "b", "c", "d"]
        images = [source.read(i) for i in range(4)]
        assert [image.label for image in images] == [7, None, None, -1]
        expected = [chw, floats, gray.transpose(2, 0, 1), chw]
        for image, pixels in zip(images, expected, strict=True):
            assert image.pixels.dtype == pixels.dtype
            assert np.array_equal(image.pixels, pixels)
        assert source.read(2, color=True).pixels.shape == (3, 6, 5)
        assert source.read(3, color=False).pixels.shape == (1, 6, 5)
        assert np.array_equal(source.read(0, color=False).pixels, chw)  # raw stays as it is
        source.close()


def test_annotated_datums_of_ssd_are_images(tmp_path):
    pixels = np.arange(12, dtype=np.uint8).reshape(3, 2, 2)
    inner = Datum(channels=3, height=2, width=2, data=pixels.tobytes(), label=4)
    boxes = b"\x1a\x04\x08\x07\x12\x00"  # field 3, which holds boxes
    environment = lmdb.open(str(tmp_path / "lmdb"))
    with environment.begin(write=True) as writing:
        writing.put(b"0", AnnotatedDatum(datum=inner, type=0).SerializeToString() + boxes)
        writing.put(b"1", AnnotatedDatum(datum=inner).SerializeToString())
        writing.put(b"2", boxes)
    environment.close()
    source = open_source(tmp_path / "lmdb")
    for index, label in ((0, None), (1, 4)):
        image = source.read(index)
        np.testing.assert_array_equal(image.pixels, pixels)
        assert image.label == label
    with pytest.raises(InputError, match="record 2: the Datum"):
        source.read(2)


def test_lmdb_without_permission_to_write(tmp_path):
    path = tmp_path / "lmdb"
    write_lmdb([("x", make_datum(np.zeros((1, 2, 2), np.uint8), 0))], path)
    (path / "data.mdb").chmod(0o444)
    path.chmod(0o555)
    assert len(open_source(path)) == 1
    assert not (path / "lock.mdb").exists()
    path.chmod(0o755)


@pytest.mark.parametrize(
    ("datum", "message"),
    [
        (Datum(channels=3, height=2, width=2, data=b"x" * 11), "claims 3x2x2 values but holds 11"),
        (Datum(channels=2, height=3, width=2, float_data=[0] * 13), "holds 13"),
        (Datum(channels=-3, height=-2, width=2, data=b"x" * 12), "impossible size -3x-2x2"),
        (Datum(channels=2**31 - 1, height=2**31 - 1, width=2**31 - 1, data=b"x"), "holds 1"),
        (Datum(channels=65536, height=65536, width=1), "holds 0"),
        (Datum(), "impossible size 0x0x0"),
        (Datum(channels=1, height=1, width=1, float_data=[float("nan")]), "not finite"),
        (Datum(encoded=True), "not a whole"),
        (Datum(encoded=True, data=b"\xff\xd8\xff garbage"), "not a whole"),
    ],
)
def test_datums_that_lie(tmp_path, datum, message):
    with pytest.raises(InputError, match=message):
        datum_pixels(datum)
    source = open_source(write_raw(tmp_path / "lmdb", {b"the key": datum.SerializeToString()}))
    with pytest.raises(InputError, match=f"record the key: .*{message}"):
        source.read(0)


def test_a_record_that_is_no_datum(tmp_path):
    source = open_source(write_raw(tmp_path / "lmdb", {b"k\n\xff": b"\x0a\xff\xff\xff\xff\xff\xff"}))
    with pytest.raises(InputError, match="not a Datum") as caught:
        source.read(0)
    assert "\n" not in str(caught.value)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_damaged_datums_give_pixels_or_an_input_error(tmp_path_factory, data):
    pixels = photograph(0, 4, 3).transpose(2, 0, 1)
    quality = data.draw(st.sampled_from([None, 90]))
    pixels = pixels if data.draw(st.booleans()) or quality else pixels.astype(np.float32)
    value = bytearray(make_datum(pixels, 3, quality).SerializeToString())
    for _ in range(data.draw(st.integers(1, 4))):
        value[data.draw(st.one_of(st.integers(0, 12), st.integers(0, len(value) - 1)))] = data.draw(
            st.integers(0, 255)
        )
    del value[data.draw(st.integers(0, len(value))) :]
    path = tmp_path_factory.mktemp("datum")
    source = open_source(write_raw(path, {b"key": bytes(value)}))
    image = result_or_input_error(lambda: source.read(0))
    assert image is None or image.pixels.ndim == 3
    source.close()


def test_folder_is_recursive_and_ignores_other_files(tmp_path):
    names = ["b.JPEG", "a/z.jpg", "a/y.PNG", "c d/ä.bmp"]
    for i, name in enumerate(names):
        path = tmp_path / "top" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(cv2.imencode(path.suffix.lower(), photograph(i, 5, 6))[1].tobytes())
    (tmp_path / "top" / "notes.txt").write_text("no image")
    (tmp_path / "top" / "._b.jpg").write_bytes(b"left by a file manager")
    (tmp_path / "top" / "a" / "loop").symlink_to(tmp_path / "top")
    (tmp_path / "top" / "a" / "nowhere").symlink_to(tmp_path / "absent")
    source = open_source(tmp_path / "top")
    assert [source.name(i) for i in range(len(source))] == ["b.JPEG", "a/y.PNG", "c d/ä.bmp", "a/z.jpg"]
    image = source.read(1)
    assert image.label is None
    assert np.array_equal(image.pixels, photograph(2, 5, 6).transpose(2, 0, 1))
    assert source.read(1, color=False).pixels.shape == (1, 5, 6)


def test_gray_files_come_as_color_by_default(image_folder):
    folder = image_folder(0)
    cv2.imwrite(str(folder / "gray.png"), photograph(0, 5, 6, channels=1))
    assert open_source(folder).read(0).pixels.shape == (3, 5, 6)


def test_list_with_labels_spaces_and_blank_lines(image_folder, tmp_path):
    folder = image_folder(3)
    (folder / "image01.png").rename(folder / "image 1 7.png")
    text = "\ufeffimages/image00.png 3\r\n\n  images/image 1 7.png\t-4 \nimages/image02.png\n"
    listing = tmp_path / "list.txt"
    listing.write_text(text + f"{folder}/image02.png 5\n", encoding="utf-8")
    source = open_source(listing)
    assert len(source) == 4
    assert [source.read(i).label for i in range(4)] == [3, -4, None, 5]
    assert np.array_equal(source.read(2).pixels, source.read(3).pixels)
    source.check(range(4))


def test_list_naming_a_missing_file(image_folder, tmp_path):
    image_folder(1)
    listing = tmp_path / "list.txt"
    listing.write_text("images/image00.png 0\nimages/gone.png 1\n")
    source = open_source(listing)
    source.check(range(1))
    with pytest.raises(InputError, match=r"list.txt, line 2: .*images/gone.png: no such file"):
        source.check(range(2))
    with pytest.raises(InputError, match=r"line 2: .*No such file"):
        source.read(1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "names no images"),
        (b"\n \n", "names no images"),
        (b"a.jpg 99999999999", "does not fit 32 bits"),
        (b"a\0b", "neither an LMDB nor a list"),
        (b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
        (b" " * 4096 + b"a\0b", "line 1: not a path"),
    ],
)
def test_files_that_are_no_list(tmp_path, content, message):
    (tmp_path / "list").write_bytes(content)
    with pytest.raises(InputError, match=message):
        open_source(tmp_path / "list")


@settings(max_examples=100, deadline=None)
@given(
    content=st.one_of(
        st.binary(max_size=300), st.text(max_size=100).map(lambda t: t.encode("utf-8", "replace"))
    )
)
def test_any_list_opens_or_is_an_input_error(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "any-list"
    path.write_bytes(content)
    source = result_or_input_error(lambda: open_source(path))
    if source is not None:
        result_or_input_error(lambda: source.check(range(len(source))))
        result_or_input_error(lambda: source.read(0))


def test_places_that_hold_no_images(tmp_path):
    def refused(path: Path, message: str) -> None:
        with pytest.raises(InputError, match=message):
            open_source(path)

    refused(tmp_path / "absent", "no such LMDB")
    refused(Path("nul\0l"), "not a path|no such")
    refused(Path("x" * 5000), "cannot be read|no such")
    refused(Path("/dev/null"), "no such LMDB")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "no images")
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "lock.mdb").touch()
    refused(tmp_path / "half", "without its data.mdb")
    (tmp_path / "half" / "data.mdb").touch()
    refused(tmp_path / "half", "damaged")
    (tmp_path / "level").mkdir()
    (tmp_path / "level" / "CURRENT").touch()
    (tmp_path / "level" / "MANIFEST-000002").touch()
    refused(tmp_path / "level", "LevelDB.*make-lmdb")
    (tmp_path / "x.h5").touch()
    refused(tmp_path / "x.h5", "HDF5.*make-lmdb")
    (tmp_path / "x.jpg").touch()
    refused(tmp_path / "x.jpg", "single image")


def test_lists_and_images_have_bounds(image_folder, tmp_path):
    image_folder(1)
    (tmp_path / "list.txt").write_text("images/image00.png 0\n/dev/zero 1\n")
    source = open_source(tmp_path / "list.txt")
    with pytest.raises(InputError, match=r"list.txt, line 2: /dev/zero: a device, not a file"):
        source.read(1)
    os.truncate(tmp_path / "images/image00.png", sources.MAX_IMAGE_BYTES + 1)
    with pytest.raises(InputError, match=r"list.txt, line 1: .*image00.png: larger than"):
        source.read(0)
    (tmp_path / "list.txt").write_text("# comment\n" * 10_000)
    os.truncate(tmp_path / "list.txt", files.MAX_LIST_BYTES + 1)
    with pytest.raises(InputError, match=r"list.txt: larger than .*list of images"):
        open_source(tmp_path / "list.txt")


def test_an_unreadable_image_is_named(image_folder):
    folder = image_folder(2)
    (folder / "image01.png").write_bytes(b"<html>404</html>")
    source = open_source(folder)
    source.read(0)
    with pytest.raises(InputError, match=r"image01.png: not a whole JPEG"):
        source.read(1)
