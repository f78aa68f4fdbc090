"""Images: order, repeatability, threads and errors."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from quantize.caffenet import TEST, TRAIN
from quantize.data.loader import Images
from quantize.data.make_lmdb import make_datum, write_lmdb
from quantize.data.sources import open_source
from quantize.data.transform import Transform
from quantize.errors import InputError

TRANSFORM = Transform(crop_size=32, mirror=True, mean_value=(104, 117, 123), resize_short=40)


def loader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("labelfree-images")]


def whole(images: Images, size: int) -> np.ndarray:
    return np.concatenate([batch for batch, _ in images.batches(size)])


@pytest.fixture
def source(image_folder):
    return open_source(image_folder(23))


def test_the_same_bytes_whatever_the_threads_and_batches(source):
    images = Images(source, TRANSFORM, TRAIN, seed=5, threads=1)
    assert images.shape == (3, 32, 32)
    assert len(images) == 23
    expected = np.stack(
        [TRANSFORM(source.read(i).pixels, TRAIN, np.random.default_rng([5, i])) for i in range(23)]
    )
    for threads in (1, 2, 5):
        for size in (1, 4, 23, 100):
            again = Images(source, TRANSFORM, TRAIN, seed=5, threads=threads)
            assert np.array_equal(whole(again, size), expected)
            assert np.array_equal(whole(again, size), expected)
    assert not np.array_equal(whole(Images(source, TRANSFORM, TRAIN, seed=6), 8), expected)
    assert not loader_threads()


def test_a_part_of_the_images(source):
    images = Images(source, TRANSFORM, TRAIN, count=20)
    everything = whole(images, 7)
    assert [len(batch) for batch, _ in images.batches(7)] == [7, 7, 6]
    got = np.concatenate([batch for batch, _ in images.batches(4, start=3, stop=14)])
    assert np.array_equal(got, everything[3:14])
    assert [len(batch) for batch, _ in images.batches(4, start=18, stop=99)] == [2]
    assert list(images.batches(4, start=20)) == []


def test_labels_come_with_their_images(tmp_path):
    pixels = [np.full((1, 2, 2), i, np.uint8) for i in range(50)]
    write_lmdb(
        ((str(i), make_datum(p, None if i == 45 else 3 * i)) for i, p in enumerate(pixels)), tmp_path / "l"
    )
    images = Images(open_source(tmp_path / "l"), Transform(), TEST, threads=3)
    for start, (batch, labels) in zip(range(0, 50, 10), images.batches(10), strict=True):
        assert batch[:, 0, 0, 0].tolist() == list(range(start, start + 10))
        assert labels == [None if i == 45 else 3 * i for i in range(start, start + 10)]


def test_batches_are_the_callers_to_keep(source):
    kept = [batch for batch, _ in Images(source, TRANSFORM, TEST).batches(5)]
    copies = [batch.copy() for batch in kept]
    whole(Images(source, TRANSFORM, TRAIN), 5)
    assert all(map(np.array_equal, kept, copies))


def test_a_pass_left_early_ends_its_threads(source):
    images = Images(source, TRANSFORM, TEST, threads=2)
    batches = images.batches(2)
    next(batches)
    batches.close()
    assert not loader_threads()
    for _ in images.batches(2):
        break
    images.batches(2)  # never begun
    assert not loader_threads()


def test_only_a_bounded_number_of_images_is_read_ahead(tmp_path):
    records = ((str(i), make_datum(np.zeros((1, 2, 2), np.uint8), 0)) for i in range(300))
    write_lmdb(records, tmp_path / "l")
    source = open_source(tmp_path / "l")
    read = []
    original = source.read
    source.read = lambda index, color=None: read.append(index) or original(index, color)
    batches = Images(source, Transform(), TEST, threads=2).batches(10)
    next(batches)
    batches.close()
    assert max(read) < 10 + 60


def test_a_damaged_image_is_one_clear_error_after_the_images_before_it(source, tmp_path):
    (tmp_path / "images" / "image13.png").write_bytes(b"broken")
    (tmp_path / "images" / "image17.png").write_bytes(b"broken too")
    for threads in (1, 2, 4):
        images = Images(source, TRANSFORM, TEST, threads=threads)
        got = []
        with pytest.raises(InputError, match=r"image13.png: not a whole"):
            got.extend(len(batch) for batch, _ in images.batches(4))
        assert got == [4, 4, 4]
        assert not loader_threads()


def test_images_of_different_sizes_without_a_crop(source):
    images = Images(source, Transform(), TEST)
    with pytest.raises(
        InputError, match=r"image image01.png: it becomes 3x43x57 but the first image 3x40x50: set"
    ):
        whole(images, 4)
    assert whole(Images(source, Transform(resize=(30, 20)), TEST), 4).shape == (23, 3, 30, 20)


def test_a_crop_that_does_not_fit_names_the_image(source):
    with pytest.raises(InputError, match=r"images: image image00.png: crop_size 41 is larger"):
        Images(source, Transform(crop_size=41), TEST)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"count": 24}, "24 images asked for but it holds 23"),
        ({"count": 0}, "at least 1"),
        ({"seed": -1}, "seed"),
    ],
)
def test_impossible_wishes(source, arguments, message):
    with pytest.raises(InputError, match=message):
        Images(source, TRANSFORM, TEST, **arguments)


def test_missing_files_are_found_before_the_work_begins(image_folder, tmp_path):
    image_folder(2)
    (tmp_path / "list").write_text("images/image00.png\nimages/image01.png\ngone.png\n")
    source = open_source(tmp_path / "list")
    assert len(Images(source, TRANSFORM, TEST, count=2)) == 2
    with pytest.raises(InputError, match=r"line 3: .*gone.png: no such file"):
        Images(source, TRANSFORM, TEST)


def test_gray_is_the_transforms_choice(source):
    assert Images(source, Transform(crop_size=8, force_gray=True), TEST).shape == (1, 8, 8)
