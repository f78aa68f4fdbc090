"""What the benchmarks run on: the nets of configs/models with random weights, and images."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

from quantize.caffenet import InferenceNet, NetParameter, Weights, infer_shapes, read_prototxt
from quantize.caffenet.model import Model
from quantize.data.feed import Feed
from quantize.data.loader import Images
from quantize.data.make_lmdb import make_datum, write_lmdb
from quantize.data.sources import open_source
from quantize.data.transform import resized, short_side_size
from quantize.engines import engine_opener
from quantize.settings import CaffeProcess, RenormSettings
from quantize.stages.renorm import renorm

MODELS = Path(__file__).resolve().parents[1] / "configs" / "models"
INPUT = (3, 224, 224)
SIDE = 256
STATISTICS_IMAGES = 16
"""BatchNorm statistics of a random net come from so many images."""


def read_net(name: str) -> NetParameter:
    """A net of configs/models with all its phases."""
    return read_prototxt(MODELS / f"{name}.prototxt")


def random_weights(net: InferenceNet, seed: int = 0) -> Weights:
    """He-normal weights, biases and BatchNorm shifts of 0, BatchNorm scales of 1."""
    rng = np.random.default_rng(seed)
    weights = Weights()
    shapes = infer_shapes(net.net, {net.blob: (1, *INPUT)})
    for layer in net.net.layer:
        params = shapes.params[layer.name]
        if not params:
            continue
        if layer.type in ("Scale", "BatchNorm"):
            blobs = [np.ones(params[0], np.float32), *(np.zeros(shape, np.float32) for shape in params[1:])]
            if layer.type == "BatchNorm":
                blobs = [1 - blobs[0], *(1 + blob for blob in blobs[1:])]
        else:
            deviation = np.sqrt(2 / np.prod(params[0][1:]))
            blobs = [deviation * rng.standard_normal(params[0], np.float32)]
            blobs += [np.zeros(shape, np.float32) for shape in params[1:]]
        weights.add(layer, blobs)
    return weights


def fitted_model(net: NetParameter, images: Images, threads: int) -> Model:
    """A model of random weights with the BatchNorm statistics of a few images."""
    few = Images(images.source, images.transform, images.phase, STATISTICS_IMAGES, threads=threads)
    opener = engine_opener("onnx", CaffeProcess(), threads)
    test = InferenceNet.of(net)
    model = Model(net, random_weights(test))
    return renorm(model, Feed({test.blob: few}), RenormSettings(statistics="measured"), opener, None)[0]


def make_images(folder: Path, count: int, photographs: Path | None) -> Path:
    """An LMDB of ``count`` images with 256x256 pixels, as Caffe's users have them.

    Photographs are taken round and round if there are too few; without any, smooth random images.
    """
    path = folder / "lmdb"
    source = open_source(photographs) if photographs is not None else None

    def pixels(index: int) -> np.ndarray:
        if source is None:
            rng = np.random.default_rng(index)
            coarse = rng.integers(0, 256, (16, 16, 3), np.uint8)
            image = cv2.resize(coarse, (SIDE, SIDE), interpolation=cv2.INTER_CUBIC)
            return np.ascontiguousarray(image.transpose(2, 0, 1))
        image = source.read(index % len(source), True).pixels
        image = resized(image, short_side_size(*image.shape[1:], SIDE))
        top, left = (image.shape[1] - SIDE) // 2, (image.shape[2] - SIDE) // 2
        return np.ascontiguousarray(image[:, top : top + SIDE, left : left + SIDE])

    write_lmdb(((f"{i:08d}", make_datum(pixels(i), i % 1000)) for i in range(count)), path)
    return path
