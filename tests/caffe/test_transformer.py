"""Our image sources and transform against Caffe's own Data layer reading the same LMDB, byte for byte."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
from google.protobuf import text_format

from quantize.caffenet import TEST, BlobProto, Datum, NetParameter
from quantize.data.loader import Images
from quantize.data.make_lmdb import make_datum, write_lmdb
from quantize.data.sources import open_source
from quantize.data.transform import Transform
from quantize.engines.caffe.engine import Worker

COUNT = 7
BATCH = 3


@pytest.fixture(scope="module")
def worker(caffe_python: list[str]) -> Iterator[Worker]:
    worker = Worker(caffe_python, threads=1)
    yield worker
    worker.close()


@pytest.fixture
def folder(caffe_root: Path) -> Iterator[Path]:
    """A folder that both sides see."""
    path = Path(tempfile.mkdtemp(dir=caffe_root / "tmp"))
    yield path
    shutil.rmtree(path)


def pixels(number: int, shape: tuple[int, int, int] = (3, 17, 20)) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, size=shape, dtype=np.uint8)


def photograph(number: int) -> np.ndarray:
    """Smooth pixels, (height, width, 3): a JPEG of noise would not look like anybody's."""
    noise = np.random.default_rng(number).integers(0, 256, size=(4, 5, 3), dtype=np.uint8)
    return cv2.resize(noise, (33, 26), interpolation=cv2.INTER_CUBIC)


def encoded(number: int, suffix: str, gray: bool = False) -> Datum:
    image = photograph(number)
    done, data = cv2.imencode(suffix, image[:, :, 0] if gray else image)
    assert done
    return Datum(data=data.tobytes(), encoded=True, label=number)


def write_mean(path: Path, shape: tuple[int, int, int]) -> None:
    mean = BlobProto(num=1, channels=shape[0], height=shape[1], width=shape[2])
    mean.data.extend(
        np.random.default_rng(99).uniform(90, 130, size=shape).ravel().astype(np.float32).tolist()
    )
    path.write_bytes(mean.SerializeToString())


def run_data_layer(worker: Worker, root: Path, folder: Path, transform: str) -> np.ndarray:
    """The images of the LMDB in ``folder`` as Caffe's Data layer feeds them."""
    inside = "/" + os.path.relpath(folder, root)
    net = text_format.Parse(
        f"""name: "data" layer {{ name: "data" type: "Data" top: "data" top: "label"
        transform_param {{ {transform.replace("FOLDER", inside)} }}
        data_param {{ source: "{inside}/lmdb" batch_size: {BATCH} backend: LMDB }} }}""",
        NetParameter(),
    )
    number, _ = worker.open(net, {})
    request = {"op": "run", "net": number, "start": 0, "stop": 1, "feeds": [], "outputs": ["data", "label"]}
    batches = [worker.call("reading", request)[1] for _ in range(-(-COUNT // BATCH))]
    worker.call("closing", {"op": "close", "net": number})
    labels = np.concatenate([batch[1] for batch in batches])[:COUNT]
    np.testing.assert_array_equal(labels, np.arange(COUNT))
    return np.concatenate([batch[0] for batch in batches])[:COUNT]


def our_images(folder: Path, transform: str) -> np.ndarray:
    net = NetParameter()
    layer = net.layer.add()
    text_format.Merge(f"transform_param {{ {transform.replace('FOLDER', str(folder))} }}", layer)
    source = open_source(folder / "lmdb")
    images = Images(source, Transform.from_proto(layer.transform_param, Path()), TEST)
    batches = list(images.batches(BATCH))
    source.close()
    np.testing.assert_array_equal(np.concatenate([labels for _, labels in batches]), np.arange(COUNT))
    return np.concatenate([batch for batch, _ in batches])


def write(folder: Path, datums: list[Datum]) -> None:
    write_lmdb(((str(i), datum) for i, datum in enumerate(datums)), folder / "lmdb")


TRANSFORMS = [
    "",
    "scale: 0.00390625",
    "scale: 0.017",
    "mean_value: 104.25",
    "mean_value: 103.94 mean_value: 116.78 mean_value: 123.68 scale: 0.017",
    "crop_size: 12",
    "crop_size: 17",
    "crop_size: 13 mean_value: 103.94 mean_value: 116.78 mean_value: 123.68",
    'mean_file: "FOLDER/mean.binaryproto"',
    'mean_file: "FOLDER/mean.binaryproto" crop_size: 11 scale: 0.3',
]


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_raw_datums(transform: str, worker: Worker, caffe_root: Path, folder: Path) -> None:
    write(folder, [make_datum(pixels(i), i) for i in range(COUNT)])
    write_mean(folder / "mean.binaryproto", (3, 17, 20))
    wanted = run_data_layer(worker, caffe_root, folder, transform)
    np.testing.assert_array_equal(our_images(folder, transform), wanted)


def test_images_of_various_sizes_are_cropped(worker: Worker, caffe_root: Path, folder: Path) -> None:
    write(folder, [make_datum(pixels(i, (3, 10 + i, 16 - i)), i) for i in range(COUNT)])
    transform = "crop_size: 9 mean_value: 100 scale: 0.1"
    wanted = run_data_layer(worker, caffe_root, folder, transform)
    np.testing.assert_array_equal(our_images(folder, transform), wanted)


@pytest.mark.parametrize("transform", ["", "mean_value: 0.5 scale: 3 crop_size: 8"])
def test_float_datums(transform: str, worker: Worker, caffe_root: Path, folder: Path) -> None:
    blobs = [np.random.default_rng(i).normal(size=(2, 9, 11)).astype(np.float32) for i in range(COUNT)]
    write(folder, [make_datum(blob, i) for i, blob in enumerate(blobs)])
    wanted = run_data_layer(worker, caffe_root, folder, transform)
    np.testing.assert_array_equal(our_images(folder, transform), wanted)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".bmp"])
@pytest.mark.parametrize("transform", ["", "crop_size: 21 mean_value: 100 scale: 0.1"])
@pytest.mark.parametrize(
    ("gray", "force"), [(False, ""), (True, ""), (True, "force_color: true"), (False, "force_gray: true")]
)
def test_encoded_datums(
    suffix: str, transform: str, gray: bool, force: str, worker: Worker, caffe_root: Path, folder: Path
) -> None:
    write(folder, [encoded(i, suffix, gray) for i in range(COUNT)])
    wanted = run_data_layer(worker, caffe_root, folder, f"{transform} {force}")
    np.testing.assert_array_equal(our_images(folder, f"{transform} {force}"), wanted)


def test_mirror_flips_or_not(worker: Worker, caffe_root: Path, folder: Path) -> None:
    """Caffe mirrors in the TEST phase, too; which images is its generator's business and ours."""
    write(folder, [make_datum(pixels(i), i) for i in range(COUNT)])
    write_mean(folder / "mean.binaryproto", (3, 17, 20))
    plain = 'mean_file: "FOLDER/mean.binaryproto" crop_size: 11 scale: 0.3'
    straight = run_data_layer(worker, caffe_root, folder, plain)
    for found in (
        run_data_layer(worker, caffe_root, folder, f"{plain} mirror: true"),
        our_images(folder, f"{plain} mirror: true"),
    ):
        mirrored = [
            np.array_equal(image, other[:, :, ::-1]) for image, other in zip(found, straight, strict=True)
        ]
        same = [np.array_equal(image, other) for image, other in zip(found, straight, strict=True)]
        assert all(np.logical_xor(mirrored, same))
