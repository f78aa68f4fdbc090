"""Renorm of a net that reads an input deep inside: it waits at the cuts as every other blob does."""

from pathlib import Path

import numpy as np
import pytest

from quantize.caffenet import TRAIN, InferenceNet
from quantize.data import Transform
from quantize.data.feed import Feed
from quantize.data.values import open_values
from quantize.stages.renorm import Tour
from quantize.sweep.run import Shard
from tests.nets import CROPPED, images_of, model_of, parse, random_weights, renorm_weights, write_images
from tests.stages.test_renorm import OPEN, training_mode_statistics

NET = """
layer { name: "i" type: "Input" top: "data" top: "state" top: "info"
  input_param { shape { dim: [1, 3, 9, 9] } shape { dim: [1, 6, 7, 7] } shape { dim: [1, 2] } } }
layer { name: "conv1" type: "Convolution" bottom: "data" top: "conv1"
  convolution_param { num_output: 6 kernel_size: 3 } }
layer { name: "bn1" type: "BatchNorm" bottom: "conv1" top: "conv1" }
layer { name: "relu1" type: "ReLU" bottom: "conv1" top: "conv1" }
layer { name: "sum" type: "Eltwise" bottom: "conv1" bottom: "state" top: "sum" }
layer { name: "conv2" type: "Convolution" bottom: "sum" top: "conv2"
  convolution_param { num_output: 5 kernel_size: 3 } }
layer { name: "bn2" type: "BatchNorm" bottom: "conv2" top: "conv2" }
layer { name: "fc" type: "InnerProduct" bottom: "conv2" top: "fc" inner_product_param { num_output: 4 } }
layer { name: "join" type: "Concat" bottom: "fc" bottom: "info" top: "join" }
layer { name: "fc2" type: "InnerProduct" bottom: "join" top: "fc2" inner_product_param { num_output: 7 } }
layer { name: "bn3" type: "BatchNorm" bottom: "fc2" top: "fc2" }
"""
COUNT = 23


@pytest.fixture(scope="module")
def feed(tmp_path_factory: pytest.TempPathFactory) -> Feed:
    folder = tmp_path_factory.mktemp("inputs")
    rng = np.random.default_rng(0)
    np.save(folder / "state.npy", rng.normal(5, 3, size=(COUNT, 6, 7, 7)))
    transform = Transform(crop_size=9, mirror=True, scale=0.02, mean_value=(100.0,))
    images = images_of(write_images(folder / "lmdb", COUNT), transform, TRAIN)
    state = open_values(Path(folder / "state.npy"), "state", (6, 7, 7), "state")
    return Feed({"data": images, "state": state, "info": open_values([3.0, -20.0], "info", (2,), "info")})


@pytest.mark.parametrize("memory", [None, 60_000, 25_000])
def test_it_is_the_training_mode_batch(feed: Feed, memory: int | None) -> None:
    net = InferenceNet.of(parse(NET)).net
    weights = random_weights(net, {"data": CROPPED, "state": (6, 7, 7), "info": (2,)})
    expected = training_mode_statistics(net, weights, feed)
    renormed, _ = renorm_weights(net, weights, feed, OPEN, memory)
    assert len(expected) == 3
    for name, (mean, variance, count) in expected.items():
        stored_mean, stored_variance, _ = renormed[name]
        np.testing.assert_allclose(stored_mean, mean, rtol=1e-4, atol=1e-5 * np.sqrt(variance.max()))
        np.testing.assert_allclose(stored_variance, variance * count / (count - 1), rtol=1e-4)
    same, _ = renorm_weights(net, weights, feed, OPEN, memory, full=model_of(net, weights))
    for name in expected:
        for given, found in zip(weights[name], same[name], strict=True):
            np.testing.assert_allclose(found, given, rtol=1e-3, atol=1e-4)


def test_the_memory_is_kept(feed: Feed) -> None:
    net = InferenceNet.of(parse(NET)).net
    weights = random_weights(net, {"data": CROPPED, "state": (6, 7, 7), "info": (2,)})
    tour = Tour.of(model_of(net, weights))
    plans = set()
    for memory in (25_000, 60_000, 200_000):
        shard = Shard(OPEN(tour.net, tour.weights, feed.shapes), feed, tour.steps, memory)
        assert shard.plan.kept_bytes <= memory
        plans.add(shard.plan)
    assert len(plans) > 1
