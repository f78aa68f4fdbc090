"""Transform against Caffe's DataTransformer, stated once more as the plain loops it is."""

from __future__ import annotations

import itertools
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantize.caffenet import TEST, TRAIN, BlobProto, TransformationParameter
from quantize.data.transform import Transform, resized, short_side_size
from quantize.errors import InputError


def caffe_transform(pixels, crop_size, top, left, mirrored, mean_value, mean_image, scale):
    channels, image_height, image_width = pixels.shape
    height = crop_size or image_height
    width = crop_size or image_width
    out = np.empty((channels, height, width), np.float32)
    for c, h, w in np.ndindex(channels, height, width):
        value = np.float32(pixels[c, top + h, left + w])
        if mean_image is not None:
            value = value - mean_image[c, top + h, left + w]
        elif len(mean_value) == 1:
            value = value - np.float32(mean_value[0])
        elif mean_value:
            value = value - np.float32(mean_value[c])
        out[c, h, width - 1 - w if mirrored else w] = value * np.float32(scale)
    return out


def write_mean(path: Path, mean: np.ndarray, legacy: bool) -> Path:
    blob = BlobProto(data=mean.ravel().tolist())
    if legacy:
        blob.num, (blob.channels, blob.height, blob.width) = 1, mean.shape
    else:
        blob.shape.dim.extend((1, *mean.shape))
    path.write_bytes(blob.SerializeToString())
    return path


finite = st.floats(-300, 300, width=32)


@st.composite
def cases(draw):
    channels, height, width = draw(st.tuples(st.integers(1, 4), st.integers(1, 7), st.integers(1, 7)))
    crop_size = draw(st.integers(0, min(height, width)))
    seed = draw(st.integers(0, 2**32))
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (channels, height, width), np.uint8)
    if draw(st.booleans()):
        pixels = (pixels / np.float32(3)).astype(np.float32)
    mean = draw(st.sampled_from(["none", "one", "each", "file"]))
    mean_value = tuple(draw(finite) for _ in range({"one": 1, "each": channels}.get(mean, 0)))
    mean_image = rng.uniform(0, 255, pixels.shape).astype(np.float32) if mean == "file" else None
    return pixels, crop_size, draw(st.booleans()), mean_value, mean_image, draw(finite), seed


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("means")


@settings(max_examples=150, deadline=None)
@given(case=cases(), legacy=st.booleans())
def test_equals_caffe(folder, case, legacy):
    pixels, crop_size, mirror, mean_value, mean_image, scale, seed = case
    mean_file = None if mean_image is None else write_mean(folder / "mean.binaryproto", mean_image, legacy)
    transform = Transform(crop_size, mirror, scale, mean_value, mean_file)
    _, height, width = pixels.shape
    tops = range(height - crop_size + 1) if crop_size else [0]
    lefts = range(width - crop_size + 1) if crop_size else [0]
    flips = [False, True] if mirror else [False]

    def candidates(tops, lefts):
        return [
            caffe_transform(pixels, crop_size, top, left, flip, mean_value, mean_image, scale)
            for top, left, flip in itertools.product(tops, lefts, flips)
        ]

    train = transform(pixels, TRAIN, np.random.default_rng(seed))
    assert train.dtype == np.float32
    assert train.shape == transform.shape_of(pixels.shape)
    assert any(np.array_equal(train, candidate) for candidate in candidates(tops, lefts))
    test = transform(pixels, TEST, np.random.default_rng(seed))
    centre = [(height - crop_size) // 2 if crop_size else 0], [(width - crop_size) // 2 if crop_size else 0]
    assert any(np.array_equal(test, candidate) for candidate in candidates(*centre))
    out = np.full(train.shape, np.nan, np.float32)
    assert transform(pixels, TRAIN, np.random.default_rng(seed), out) is out
    assert np.array_equal(out, train)


def test_every_crop_and_mirror_is_as_likely_in_train_and_only_the_mirror_is_random_in_test():
    pixels = np.arange(20, dtype=np.uint8).reshape(1, 4, 5)
    transform = Transform(crop_size=3, mirror=True)

    def seen(phase):
        corners = [
            tuple(transform(pixels, phase, np.random.default_rng([1, i]))[0, 0, [0, -1]]) for i in range(1200)
        ]
        return np.unique(corners, axis=0, return_counts=True)

    corners, counts = seen(TRAIN)
    assert len(corners) == 2 * 3 * 2
    assert counts.min() > 60  # of 100 expected
    corners, counts = seen(TEST)
    assert corners.tolist() == [[1, 3], [3, 1]]
    assert counts.min() > 500


def test_legacy_and_double_means_and_a_mean_that_moves_with_crop_and_mirror(tmp_path):
    mean = np.arange(12, dtype=np.float32).reshape(1, 3, 4)
    blob = BlobProto(num=1, channels=1, height=3, width=4, double_data=mean.ravel().tolist())
    path = tmp_path / "mean.binaryproto"
    path.write_bytes(blob.SerializeToString())
    transform = Transform(crop_size=2, mirror=True, mean_file=path)
    for i in range(8):  # the image is its own mean: whatever window, zero
        assert not transform(mean.astype(np.uint8), TRAIN, np.random.default_rng(i)).any()


def test_from_proto_takes_every_field_and_finds_the_mean_beside_the_base():
    param = TransformationParameter(
        crop_size=8, mirror=True, scale=0.5, mean_value=[1, 2, 3], force_color=True
    )
    expected = Transform(8, True, 0.5, (1, 2, 3), force_color=True)
    assert Transform.from_proto(param, Path("/base")) == expected
    param = TransformationParameter(mean_file="m.binaryproto", force_gray=True)
    expected = Transform(mean_file=Path("/base/m.binaryproto"), force_gray=True)
    assert Transform.from_proto(param, Path("/base")) == expected
    assert Transform.from_proto(TransformationParameter(), Path()) == Transform()
    assert (Transform(force_color=True).color, Transform(force_gray=True).color) == (True, False)
    assert Transform().color is None


@pytest.mark.parametrize(
    ("size", "expected"),
    [((30, 40), (12, 16)), ((40, 30), (16, 12)), ((30, 30), (12, 12)), ((5, 500), (12, 1200))],
)
def test_resize_short_keeps_the_aspect(size, expected):
    assert short_side_size(*size, 12) == expected
    assert Transform(resize_short=12).shape_of((3, *size)) == (3, *expected)


@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_resizing_is_bilinear_as_in_opencv(channels, dtype):
    pixels = np.random.default_rng(0).integers(0, 256, (channels, 13, 17)).astype(dtype)
    got = resized(pixels, (7, 23))
    assert got.shape == (channels, 7, 23)
    assert got.dtype == dtype
    for plane, source in zip(got, pixels, strict=True):
        np.testing.assert_allclose(plane.astype(float), cv2.resize(source, (23, 7)).astype(float), atol=1)
    transformed = Transform(resize=(7, 23), scale=2)(pixels, TEST, np.random.default_rng(0))
    assert np.array_equal(transformed, 2 * got.astype(np.float32))


@pytest.mark.parametrize(
    "settings_",
    [
        {"crop_size": -1},
        {"resize_short": -2},
        {"resize": (0, 4)},
        {"resize": (4, 4), "resize_short": 3},
        {"mean_file": Path("m"), "mean_value": (1.0,)},
        {"force_color": True, "force_gray": True},
        {"scale": float("nan")},
        {"mean_value": (float("inf"),)},
    ],
)
def test_impossible_settings(settings_):
    with pytest.raises(InputError, match=next(iter(settings_))):
        Transform(**settings_)


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (Transform(crop_size=9), "crop_size 9 is larger than the image .3x8x10."),
        (Transform(crop_size=9, resize_short=8), "larger"),
        (Transform(mean_value=(1, 2)), "2 mean_value for an image of 3 channels"),
        (Transform(resize_short=2**40), "too much memory"),
        (Transform(resize=(2**20, 2**20)), "too much memory"),
    ],
)
def test_images_that_do_not_fit(transform, message):
    with pytest.raises(InputError, match=message):
        transform(np.zeros((3, 8, 10), np.uint8), TRAIN, np.random.default_rng(0))


@pytest.mark.parametrize(
    ("blob", "message"),
    [
        (
            BlobProto(num=1, channels=3, height=8, width=9, data=[0.0] * 216),
            "is 3x8x9 but the image is 3x8x10",
        ),
        (BlobProto(num=1, channels=3, height=8, width=10, data=[0.0] * 239), "239 values"),
        (BlobProto(num=2, channels=3, height=8, width=5, data=[0.0] * 240), "one image"),
        (BlobProto(num=1, channels=-3, height=-8, width=10, data=[0.0] * 240), "one image"),
        (BlobProto(shape={"dim": [3, 8, 10]}, data=[0.0] * 240), "one image"),
        (BlobProto(num=1, channels=3, height=8, width=10, data=[float("nan")] * 240), "not finite"),
        (BlobProto(), "one image"),
    ],
)
def test_means_that_do_not_fit(tmp_path, blob, message):
    path = tmp_path / "mean.binaryproto"
    path.write_bytes(blob.SerializeToString())
    with pytest.raises(InputError, match=message):
        Transform(mean_file=path).shape_of((3, 8, 10))


def test_mean_files_that_are_none(tmp_path):
    with pytest.raises(
        InputError, match=r"cannot read the mean_file: No such file.* starts at the prototxt's"
    ):
        Transform(mean_file=tmp_path / "absent").shape_of((3, 8, 10))
    with pytest.raises(InputError, match=r"/dev/zero: a device, not a file; the mean_file was expected"):
        Transform(mean_file=Path("/dev/zero")).shape_of((3, 8, 10))
    np.save(tmp_path / "mean.npy", np.zeros((3, 8, 10)))
    with pytest.raises(
        InputError, match=r"not a BlobProto but a numpy array; give the BlobProto, or mean_value"
    ):
        Transform(mean_file=tmp_path / "mean.npy").shape_of((3, 8, 10))
    (tmp_path / "garbage").write_bytes(b"\xff" * 40)
    with pytest.raises(InputError, match="not a BlobProto"):
        Transform(mean_file=tmp_path / "garbage").shape_of((3, 8, 10))
