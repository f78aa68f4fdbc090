"""The four networks of configs/ end to end: random weights, few images, crops as small as the net allows."""

from pathlib import Path

import numpy as np
import pytest

from quantize.caffenet import TEST, InferenceNet, Weights, filter_net, read_prototxt
from quantize.commands.config import load
from quantize.job.evaluation import evaluate_run
from quantize.job.given import Given
from quantize.job.run import Run
from quantize.settings import Config
from tests.nets import random_weights, write_images

CONFIGS = Path(__file__).parents[1] / "configs"
IMAGES = 3
SHORTEST_SIDE = 256
CROPS = {"alexnet_bn": 67, "resnet18": 224, "resnet50": 224, "vgg16_bn": 32}
"""The residual nets end in a pooling over 7 x 7 pixels, the others in fully connected layers of any size."""

LEFT_OUT = {"alexnet_bn": ("fc6", "fc7"), "vgg16_bn": ("fc6", "fc7")}
"""To save time: all their weights take most of it."""


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    return write_images(folder / "lmdb", IMAGES, (3, SHORTEST_SIDE, SHORTEST_SIDE))


def config_of(name: str, images: Path, folder: Path) -> Config:
    return load(
        CONFIGS / f"{name}.yaml",
        {
            "model.weights": str(folder / "net.caffemodel"),
            "data.calibration.source": str(images),
            "data.validation.source": str(images),
            "output": str(folder / "out"),
        },
        [
            f"data.transform.crop_size={CROPS[name]}",
            *("data.calibration.images=2", "renorm.images=2", "activations.images=2"),
            "threads=2",
            *(f"weights.layers={{{layer}: {{skip: true}}}}" for layer in LEFT_OUT.get(name, ())),
        ],
    )


@pytest.mark.parametrize("name", CROPS)
def test_end_to_end(name: str, images: Path, tmp_path: Path) -> None:
    config = config_of(name, images, tmp_path)
    test = InferenceNet.of(Given(config).net)
    weights = random_weights(test.net, {test.blob: (3, CROPS[name], CROPS[name])})
    with open(tmp_path / "net.caffemodel", "wb") as file:
        weights.write(file)
    del weights
    record = Run(config).quantize()
    assert record.stages.weights is not None
    quantized = {layer.name for layer in record.stages.weights.layers}
    types = ("Convolution", "InnerProduct")
    wanted = {layer.name for layer in test.net.layer if layer.type in types}
    assert quantized == wanted - set(LEFT_OUT.get(name, ()))
    assert record.sizes.packed < record.sizes.model

    val = filter_net(read_prototxt(tmp_path / f"out/{name}_val.prototxt"), TEST)
    assert not any(layer.type == "ReLU" for layer in val.layer)
    assert sum(layer.type == "ActQuantize" for layer in val.layer) == sum(
        layer.type == "ReLU" for layer in test.net.layer
    )
    final = Weights.read(tmp_path / f"out/{name}_renorm.caffemodel")
    for layer in test.net.layer:
        if layer.type == "BatchNorm":
            mean, variance, factor = final[layer.name]
            assert factor == 1
            assert np.isfinite(mean).all()
            assert (variance >= 0).all()
    found = evaluate_run(config, IMAGES)
    assert found.images == IMAGES
