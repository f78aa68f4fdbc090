"""Small quantized models, and how close two blobs are."""

from contextlib import closing
from pathlib import Path

import numpy as np
import numpy.typing as npt

import quantize
from quantize.arrays import FloatArray, Shape
from quantize.caffenet import InferenceNet, NetParameter, Weights
from quantize.caffenet.model import Model
from quantize.engines import engine_opener
from quantize.exports.integers import IntegerNet
from quantize.settings import CaffeProcess
from tests.nets import parse, random_weights

IMAGE = (3, 12, 12)
RUNTIMES = {"ort": "onnx", "openvino": "openvino"}


def input_text(shape: Shape = IMAGE) -> str:
    dims = ", ".join(map(str, (1, *shape)))
    return f'layer {{ name: "data" type: "Input" top: "data" input_param {{ shape {{ dim: [{dims}] }} }} }}\n'


def model_of(net: NetParameter | str, seed: int = 0) -> Model:
    """A net of an Input layer with random weights; a text gets the Input layer."""
    if isinstance(net, str):
        net = parse('name: "net"\n' + input_text() + net)
    model = Model(net, Weights(), Path("net.prototxt"))
    weights = random_weights(InferenceNet.of(net).net, model.declared_shapes, seed)
    return Model(net, weights, Path("net.prototxt"))


def images_for(model: Model, count: int = 24, seed: int = 1) -> dict[str, FloatArray]:
    rng = np.random.default_rng(seed)
    return {
        name: rng.normal(size=(count, *shape)).astype(np.float32)
        for name, shape in model.declared_shapes.items()
    }


def quantized(model: Model, levels: int = 255, sums: bool = True, **weights: object) -> Model:
    """All three stages, on random images."""
    images = quantize.Images(images_for(model), model)
    activations = {"levels": levels, "sums": sums}
    return quantize.quantize(model, images, weights=weights, activations=activations)


def scores_of(model: Model | IntegerNet, feeds: dict[str, FloatArray], blob: str) -> FloatArray:
    """A blob at the end of the net, in labelfree's engine."""
    net = model.inference.net if isinstance(model, Model) else model.net
    shapes = {name: values.shape[1:] for name, values in feeds.items()}
    with closing(engine_opener("onnx", CaffeProcess(), 1)(net, model.weights, shapes)) as engine:
        return engine.compile(0, len(net.layer), [blob]).run(feeds).blobs[blob]


def sqnr(wanted: npt.ArrayLike, found: npt.ArrayLike) -> float:
    """Decibels; infinite where the two are the same."""
    a, b = np.asarray(wanted, np.float64), np.asarray(found, np.float64)
    with np.errstate(divide="ignore"):
        return float(10 * np.log10(np.square(a).sum() / np.square(a - b).sum()))
