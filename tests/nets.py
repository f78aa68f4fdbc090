"""Small networks and image sources for the tests."""

from pathlib import Path

import numpy as np
from google.protobuf import text_format

from quantize.caffenet import InferenceNet, NetParameter, Weights, empty_like, infer_shapes
from quantize.caffenet.model import Model
from quantize.caffenet.norms import norm_places
from quantize.data import Images, Transform, open_source
from quantize.data.feed import Feed
from quantize.data.make_lmdb import make_datum, write_lmdb
from quantize.engines import engine_opener
from quantize.engines.base import OpenEngine
from quantize.record import BatchNormShift, QuantizedLayer
from quantize.settings import CaffeProcess, GridChoice, RenormSettings, SolverName
from quantize.stages.data_aware import CalibrationSweep
from quantize.stages.renorm import renorm
from quantize.stages.weights import weights_quan

RESIDUAL = """
name: "residual"
layer { name: "data" type: "Data" top: "data" top: "label" include { phase: TRAIN }
  transform_param { crop_size: 9 mirror: true scale: 0.02 mean_value: 100 }
  data_param { source: "train_lmdb" batch_size: 4 backend: LMDB } }
layer { name: "data" type: "Data" top: "data" top: "label" include { phase: TEST }
  transform_param { crop_size: 9 scale: 0.02 mean_value: 100 }
  data_param { source: "test_lmdb" batch_size: 4 backend: LMDB } }
layer { name: "conv1" type: "Convolution" bottom: "data" top: "conv1"
  convolution_param { num_output: 6 kernel_size: 3 pad: 1 } }
layer { name: "bn1" type: "BatchNorm" bottom: "conv1" top: "conv1" }
layer { name: "scale1" type: "Scale" bottom: "conv1" top: "conv1" scale_param { bias_term: true } }
layer { name: "relu1" type: "ReLU" bottom: "conv1" top: "conv1" }
layer { name: "left" type: "Convolution" bottom: "conv1" top: "left"
  convolution_param { num_output: 8 kernel_size: 1 stride: 2 bias_term: false } }
layer { name: "bn_left" type: "BatchNorm" bottom: "left" top: "left" }
layer { name: "scale_left" type: "Scale" bottom: "left" top: "left" scale_param { bias_term: true } }
layer { name: "right_a" type: "Convolution" bottom: "conv1" top: "right_a"
  convolution_param { num_output: 8 kernel_size: 3 pad: 1 stride: 2 group: 2 bias_term: false } }
layer { name: "bn_right_a" type: "BatchNorm" bottom: "right_a" top: "right_a" }
layer { name: "scale_right_a" type: "Scale" bottom: "right_a" top: "right_a" scale_param { bias_term: true } }
layer { name: "relu_right_a" type: "ReLU" bottom: "right_a" top: "right_a" }
layer { name: "right_b" type: "Convolution" bottom: "right_a" top: "right_b"
  convolution_param { num_output: 8 kernel_size: 3 pad: 1 bias_term: false } }
layer { name: "bn_right_b" type: "BatchNorm" bottom: "right_b" top: "right_b" }
layer { name: "scale_right_b" type: "Scale" bottom: "right_b" top: "right_b" scale_param { bias_term: true } }
layer { name: "sum" type: "Eltwise" bottom: "left" bottom: "right_b" top: "sum" }
layer { name: "relu_sum" type: "ReLU" bottom: "sum" top: "sum" }
layer { name: "pool" type: "Pooling" bottom: "sum" top: "pool"
  pooling_param { pool: AVE kernel_size: 2 stride: 2 } }
layer { name: "fc1" type: "InnerProduct" bottom: "pool" top: "fc1" inner_product_param { num_output: 12 } }
layer { name: "bn_fc1" type: "BatchNorm" bottom: "fc1" top: "fc1" }
layer { name: "relu_fc1" type: "ReLU" bottom: "fc1" top: "fc1" }
layer { name: "drop" type: "Dropout" bottom: "fc1" top: "fc1" }
layer { name: "fc2" type: "InnerProduct" bottom: "fc1" top: "fc2" inner_product_param { num_output: 7 } }
layer { name: "loss" type: "SoftmaxWithLoss" bottom: "fc2" bottom: "label" top: "loss" }
layer { name: "top1" type: "Accuracy" bottom: "fc2" bottom: "label" top: "top1" include { phase: TEST } }
"""
SEVERAL = """
name: "several"
layer { name: "target" type: "Input" top: "target" input_param { shape { dim: [1, 2, 9, 9] } } }
layer { name: "image" type: "Input" top: "image" input_param { shape { dim: [1, 3, 9, 9] } } }
layer { name: "info" type: "Input" top: "info" input_param { shape { dim: [1, 3] } } }
layer { name: "conv_t" type: "Convolution" bottom: "target" top: "conv_t"
  convolution_param { num_output: 6 kernel_size: 3 } }
layer { name: "relu_t" type: "ReLU" bottom: "conv_t" top: "conv_t" }
layer { name: "conv_i" type: "Convolution" bottom: "image" top: "conv_i"
  convolution_param { num_output: 6 kernel_size: 3 } }
layer { name: "bn_i" type: "BatchNorm" bottom: "conv_i" top: "conv_i" }
layer { name: "relu_i" type: "ReLU" bottom: "conv_i" top: "conv_i" }
layer { name: "both" type: "Concat" bottom: "conv_t" bottom: "conv_i" top: "both" }
layer { name: "fc1" type: "InnerProduct" bottom: "both" top: "fc1" inner_product_param { num_output: 10 } }
layer { name: "bn_1" type: "BatchNorm" bottom: "fc1" top: "fc1" }
layer { name: "fc_info" type: "InnerProduct" bottom: "info" top: "fc_info"
  inner_product_param { num_output: 4 } }
layer { name: "join" type: "Concat" bottom: "fc1" bottom: "fc_info" top: "join" }
layer { name: "relu_j" type: "ReLU" bottom: "join" top: "join" }
layer { name: "fc2" type: "InnerProduct" bottom: "join" top: "fc2" inner_product_param { num_output: 7 } }
layer { name: "prob" type: "Softmax" bottom: "fc2" top: "prob" }
"""
"""Images, what goes with each of them, and numbers that are the same for all."""
SEVERAL_YAML = """
name: several
model: {prototxt: net.prototxt, weights: net.caffemodel}
data:
  calibration: {source: train_lmdb, inputs: {target: targets, info: [0.5, -1, 2]}}
  validation: {source: test_lmdb, inputs: {target: test_targets.npz, info: [0.5, -1, 2]}}
  transform: {scale: 0.02, mean_value: 100}
renorm: {images: 20}
activations: {images: 20}
output: out
"""
SEVERAL_SHAPES = {"target": (2, 9, 9), "image": (3, 9, 9), "info": (3,)}
IMAGE = (3, 11, 11)
CROPPED = (3, 9, 9)


def parse(text: str) -> NetParameter:
    """A net from its prototxt."""
    net = NetParameter()
    text_format.Parse(text, net)
    return net


def random_weights(net: NetParameter, inputs: dict[str, tuple[int, ...]], seed: int = 0) -> Weights:
    """Blobs for every layer of an inference net: normal weights, BatchNorm statistics that fit nothing."""
    rng = np.random.default_rng(seed)
    weights = Weights()
    shapes = infer_shapes(net, {name: (1, *shape) for name, shape in inputs.items()})
    for layer in net.layer:
        blobs = [rng.normal(0, 0.4, shape).astype(np.float32) for shape in shapes.params[layer.name]]
        places = norm_places(layer)
        if places is not None:
            blobs[places.variance] = np.abs(blobs[places.variance]) + 0.5
            if places.factor is not None:
                blobs[places.factor] = np.ones(1, np.float32)
        if blobs:
            weights.add(layer, blobs)
    return weights


def write_images(path: Path, count: int, shape: tuple[int, ...] = IMAGE, seed: int = 0) -> Path:
    """An LMDB of smooth random images with labels 0 .. 6."""
    rng = np.random.default_rng(seed)
    records = []
    for index in range(count):
        coarse = rng.integers(0, 256, (shape[0], -(-shape[1] // 3), -(-shape[2] // 3)))
        pixels = np.kron(coarse, np.ones((1, 3, 3)))[:, : shape[1], : shape[2]].astype(np.uint8)
        records.append((f"{index:08d}", make_datum(np.ascontiguousarray(pixels), index % 7)))
    write_lmdb(records, path)
    return path


def write_several(folder: Path) -> Path:
    """A job for the net of several inputs: 20 calibration and 12 validation images; its YAML file."""
    (folder / "net.prototxt").write_text(SEVERAL)
    weights = random_weights(InferenceNet.of(parse(SEVERAL)).net, SEVERAL_SHAPES)
    with open(folder / "net.caffemodel", "wb") as file:
        weights.write(file)
    write_images(folder / "train_lmdb", 20, SEVERAL_SHAPES["image"])
    write_images(folder / "test_lmdb", 12, SEVERAL_SHAPES["image"], seed=1)
    rng = np.random.default_rng(2)
    (folder / "targets").mkdir()
    for number in range(20):
        np.save(folder / f"targets/{number:02}.npy", rng.normal(size=SEVERAL_SHAPES["target"]))
    np.savez(folder / "test_targets.npz", target=rng.normal(size=(12, *SEVERAL_SHAPES["target"])))
    (folder / "config.yaml").write_text(SEVERAL_YAML)
    return folder / "config.yaml"


def write_photos(path: Path, count: int, shape: tuple[int, int] = IMAGE[1:], seed: int = 0) -> Path:
    """An LMDB of color images whose channels go together and have the means and deviations of photographs."""
    rng = np.random.default_rng(seed)
    height, width = shape
    coarse = (-(-height // 3), -(-width // 3))
    records = []
    for index in range(count):
        light = rng.normal(0, 40) + np.kron(rng.normal(0, 50, coarse), np.ones((3, 3)))
        tint = np.kron(rng.normal(0, 12, (3, *coarse)), np.ones((1, 3, 3)))
        pixels = (light + tint)[:, :height, :width] + rng.normal(0, 5, (3, height, width))
        pixels += np.array([104, 117, 123]).reshape(3, 1, 1)
        records.append((f"{index:08d}", make_datum(pixels.clip(0, 255).astype(np.uint8), index % 7)))
    write_lmdb(records, path)
    return path


def trained_statistics(net: NetParameter, weights: Weights, feed: Feed) -> Weights:
    """The blobs with the BatchNorm statistics that training on these images would have left."""
    return renorm_weights(net, weights, feed, engine_opener("onnx", CaffeProcess(), 1))[0]


def model_of(net: NetParameter, weights: Weights) -> Model:
    """A model; an inference net gets the Input layers that it lacks."""
    fed = empty_like(net)
    made: set[str] = set()
    for layer in net.layer:
        for blob in layer.bottom:
            if blob not in made:
                fed.layer.add(name=f"{blob} (input)", type="Input", top=[blob])
                made.add(blob)
        fed.layer.append(layer)
        made.update(layer.top)
    return Model(fed, weights)


def renorm_weights(
    net: NetParameter,
    weights: Weights,
    feed: Feed,
    opener: OpenEngine,
    memory: int | None = None,
    full: Model | None = None,
    biases: bool = False,
) -> tuple[Weights, list[BatchNormShift]]:
    """`renorm` on a net and blobs that a test has changed: paired where full precision is given."""
    settings = RenormSettings(statistics="paired" if full else "measured", bias_correction=biases)
    done, shifts = renorm(model_of(net, weights), feed, settings, opener, memory, full=full)
    return done.weights, shifts


def quantized_weights(
    net: NetParameter,
    weights: Weights,
    chosen: dict[str, GridChoice],
    solver: SolverName = "optimal",
    calibration: CalibrationSweep | None = None,
) -> tuple[NetParameter, Weights, list[QuantizedLayer]]:
    """`weights_quan` on a net and its blobs."""
    model, layers = weights_quan(Model(net, weights), chosen, solver, calibration=calibration)
    return model.net, model.weights, layers


def images_of(path: Path, transform: Transform, phase: int, count: int | None = None) -> Images:
    """The images of a source."""
    return Images(open_source(path), transform, phase, count)
