"""Renorm against a training-mode batch of all images, computed the long way in float64."""

from collections.abc import Mapping

import numpy as np
import pytest

from quantize.caffenet import TRAIN, InferenceNet, NetParameter, Weights, single_assignment
from quantize.data import Transform
from quantize.data.feed import Feed
from quantize.engines import engine_opener
from quantize.engines.base import Engine
from quantize.settings import CaffeProcess
from quantize.stages.renorm import Tour
from quantize.sweep.run import Shard
from tests.heard import Heard
from tests.nets import (
    CROPPED,
    RESIDUAL,
    images_of,
    model_of,
    parse,
    random_weights,
    renorm_weights,
    write_images,
)

TRANSFORM = Transform(crop_size=9, mirror=True, scale=0.02, mean_value=(100.0,))
COUNT = 23


@pytest.fixture(scope="module")
def feed(tmp_path_factory: pytest.TempPathFactory) -> Feed:
    path = write_images(tmp_path_factory.mktemp("images") / "lmdb", COUNT)
    return Feed({"data": images_of(path, TRANSFORM, TRAIN)})


@pytest.fixture(scope="module")
def net() -> NetParameter:
    return InferenceNet.of(parse(RESIDUAL)).net


@pytest.fixture(scope="module")
def weights(net: NetParameter) -> Weights:
    return random_weights(net, {"data": CROPPED})


OPEN = engine_opener("onnx", CaffeProcess(), 2)


def training_mode_statistics(
    net: NetParameter, weights: Weights, feed: Feed
) -> dict[str, tuple[np.ndarray, np.ndarray, int]]:
    """Mean, biased variance and count of every BatchNorm's input, with all images in one batch."""
    flat = single_assignment(net)
    batch, *rest = feed.batches(len(feed))
    assert not rest
    engine = OPEN(flat, weights, feed.shapes)
    found = {}
    for index, layer in enumerate(flat.layer):
        if layer.type != "BatchNorm":
            continue
        x = engine.compile(0, index, [layer.bottom[0]]).run(batch.feeds).blobs[layer.bottom[0]]
        x = np.moveaxis(x.astype(np.float64), 1, 0).reshape(x.shape[1], -1)
        found[layer.name] = x.mean(axis=1), x.var(axis=1), x.shape[1]
        blobs = [x.mean(axis=1), x.var(axis=1), np.ones(1)]
        engine.set_blobs(layer.name, [blob.astype(np.float32) for blob in blobs])
    return found


@pytest.mark.parametrize("memory", [None, 1 << 20, 60_000, 30_000])
def test_it_is_the_training_mode_batch(
    net: NetParameter, weights: Weights, feed: Feed, memory: int | None
) -> None:
    expected = training_mode_statistics(net, weights, feed)
    renormed, shifts = renorm_weights(net, weights, feed, OPEN, memory)
    assert [shift.name for shift in shifts] == ["bn1", "bn_left", "bn_right_a", "bn_right_b", "bn_fc1"]
    for name, (mean, variance, count) in expected.items():
        stored_mean, stored_variance, factor = renormed[name]
        np.testing.assert_allclose(stored_mean, mean, rtol=1e-4, atol=1e-5 * np.sqrt(variance.max()))
        np.testing.assert_allclose(stored_variance, variance * count / (count - 1), rtol=1e-4)
        assert factor.tolist() == [1.0]


def test_memory_bounds_change_the_plan_but_not_the_result(
    net: NetParameter, weights: Weights, feed: Feed
) -> None:
    whole, _ = renorm_weights(net, weights, feed, OPEN, None)
    tour = Tour.of(model_of(net, weights))
    plans = set()
    for memory in (20_000, 40_000, 80_000, 160_000, 320_000):
        shard = Shard(OPEN(tour.net, tour.weights, {"data": CROPPED}), feed, tour.steps, memory)
        plans.add(shard.plan)
        assert shard.plan.kept_bytes <= memory
        bounded, _ = renorm_weights(net, weights, feed, OPEN, memory)
        for name in ("bn1", "bn_left", "bn_right_a", "bn_right_b", "bn_fc1"):
            for got, wanted in zip(bounded[name], whole[name], strict=True):
                np.testing.assert_allclose(got, wanted, rtol=2e-5, atol=1e-5)
    assert len(plans) >= 3


def test_branches_of_one_depth_are_measured_together(net: NetParameter) -> None:
    tour = Tour.of(model_of(net, Weights()))
    assert len(tour.steps) == 4
    assert {norm.name for norm in tour.repairs[1]} == {"bn_left", "bn_right_a"}
    assert set(tour.steps[1].measured) == {norm.bottom for norm in tour.repairs[1]}


def test_other_layers_and_the_input_weights_are_untouched(
    net: NetParameter, weights: Weights, feed: Feed
) -> None:
    before = {name: [blob.copy() for blob in weights[name]] for name in weights.layers()}
    renormed, _ = renorm_weights(net, weights, feed, OPEN, None)
    for name in weights.layers():
        for old, given in zip(before[name], weights[name], strict=True):
            np.testing.assert_array_equal(old, given)
        if not name.startswith("bn"):
            for old, new in zip(before[name], renormed[name], strict=True):
                np.testing.assert_array_equal(old, new)


def test_a_net_without_batch_norm_passes_through(feed: Feed) -> None:
    net = parse(
        'layer { name: "conv" type: "Convolution" bottom: "data" top: "conv" '
        "convolution_param { num_output: 2 kernel_size: 3 } }"
    )
    weights = random_weights(net, {"data": CROPPED})

    def never(_: NetParameter, __: Weights, ___: Mapping[str, tuple[int, ...]]) -> Engine:
        raise AssertionError("nothing to run")

    assert renorm_weights(net, weights, feed, never, None) == (weights, [])


def test_the_shift_says_how_far_the_statistics_moved(net: NetParameter, weights: Weights, feed: Feed) -> None:
    once, _ = renorm_weights(net, weights, feed, OPEN, None)
    _, again = renorm_weights(net, once, feed, OPEN, None)
    for shift in again:
        # The second time the statistics are those that are stored.
        assert shift.mean_shift < 1e-4
        assert shift.variance_ratio == pytest.approx(1, abs=1e-4)


def test_only_layers_behind_the_last_batch_norm_may_be_unknown(
    net: NetParameter, weights: Weights, feed: Feed
) -> None:
    strange = NetParameter()
    strange.CopyFrom(net)
    strange.layer.add(name="strange", type="NobodyKnows", bottom=["fc2"], top=["strange"])
    renormed, _ = renorm_weights(strange, weights, feed, OPEN, None)
    assert "bn_fc1" in renormed


def test_progress_ends_at_the_plans_work(net: NetParameter, weights: Weights, feed: Feed) -> None:
    tour = Tour.of(model_of(net, weights))
    engine = OPEN(tour.net, tour.weights, {"data": CROPPED})
    shard = Shard(engine, feed, tour.steps, 60_000)
    heard = Heard()
    for step in tour.steps:
        moments = shard.advance(progress=heard)
        assert set(moments) == set(step.measured)
        assert all(found.count % COUNT == 0 for found in moments.values())
    assert heard.done[""] == pytest.approx(shard.plan.work)


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize(
    ("memory", "batch"), [(None, COUNT), (300_000, 16), (160_000, 8), (60_000, 2), (30_000, 1)]
)
def test_threads_and_micro_batches_do_not_change_the_result(
    net: NetParameter, weights: Weights, feed: Feed, threads: int, memory: int | None, batch: int
) -> None:
    tour = Tour.of(model_of(net, weights))
    assert Shard(OPEN(tour.net, weights, feed.shapes), feed, tour.steps, memory).plan.micro_batch == batch
    expected, _ = renorm_weights(net, weights, feed, OPEN, None)
    opener = engine_opener("onnx", CaffeProcess(), threads)
    found, _ = renorm_weights(net, weights, feed, opener, memory)
    for name in ("bn1", "bn_left", "bn_right_a", "bn_right_b", "bn_fc1"):
        for got, wanted in zip(found[name], expected[name], strict=True):
            np.testing.assert_allclose(got, wanted, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("memory", [None, 60_000])
def test_a_large_mean_does_not_drown_the_deviation(feed: Feed, memory: int | None) -> None:
    """Mean 1e4 and deviation 1: the variance is 1e-8 of the mean square, less than float32 resolves."""
    net = parse(
        'layer { name: "conv" type: "Convolution" bottom: "data" top: "conv" '
        "convolution_param { num_output: 2 kernel_size: 1 } } "
        'layer { name: "bn" type: "BatchNorm" bottom: "conv" top: "conv" } '
        'layer { name: "conv2" type: "Convolution" bottom: "conv" top: "conv2" '
        "convolution_param { num_output: 2 kernel_size: 1 } } "
        'layer { name: "bn2" type: "BatchNorm" bottom: "conv2" top: "conv2" }'
    )
    pixels = next(feed.batches(COUNT)).feeds["data"]
    deviation = pixels[:, 0].std(dtype=np.float64)
    weights = random_weights(net, {"data": CROPPED})
    kernels = np.zeros((2, 3, 1, 1), np.float32)
    kernels[:, 0] = 1 / deviation
    weights.replace("conv", [kernels, np.array([1e4, 0], np.float32)])
    weights.replace(
        "conv2", [np.eye(2, dtype=np.float32).reshape(2, 2, 1, 1), np.array([1e4, 0], np.float32)]
    )
    renormed, _ = renorm_weights(net, weights, feed, OPEN, memory)
    channel = (pixels[:, 0].astype(np.float64) / deviation).reshape(-1)
    for name, first in (("bn", channel), ("bn2", (channel - channel.mean()) / channel.std())):
        mean, variance, _ = renormed[name]
        # What float32 makes of values around 1e4, in steps of 2^-10, bounds what anybody can measure.
        np.testing.assert_allclose(mean[0], 1e4 + first.mean(), rtol=1e-7)
        np.testing.assert_allclose(variance[0], first.var(ddof=1), rtol=2e-3)
        np.testing.assert_allclose(variance[1], first.var(ddof=1), rtol=1e-4)


TABLE = """
  layer { name: "data" type: "Input" top: "data" input_param { shape { dim: 1 dim: 3 dim: 9 dim: 9 } } }
  layer { name: "table" type: "Parameter" top: "table" parameter_param { shape { dim: 6 dim: 4 } } }
  layer { name: "conv" type: "Convolution" bottom: "data" top: "conv"
    convolution_param { num_output: 6 kernel_size: 9 } }
  layer { name: "norm1" type: "BatchNorm" bottom: "conv" top: "norm1" }
  layer { name: "best" type: "ArgMax" bottom: "norm1" top: "best" }
  layer { name: "flat" type: "Reshape" bottom: "best" top: "flat" reshape_param { shape { dim: -1 } } }
  layer { name: "rows" type: "BatchReindex" bottom: "table" bottom: "flat" top: "rows" }
  layer { name: "norm2" type: "BatchNorm" bottom: "rows" top: "norm2" }
"""


@pytest.mark.parametrize("memory", [None, 20_000])
def test_a_blob_that_no_image_changes_passes_a_cut(feed: Feed, memory: int | None) -> None:
    net = InferenceNet.of(parse(TABLE)).net
    weights = random_weights(net, {"data": CROPPED})
    expected = training_mode_statistics(net, weights, feed)
    renormed, _ = renorm_weights(net, weights, feed, OPEN, memory)
    for name, (mean, variance, count) in expected.items():
        np.testing.assert_allclose(renormed[name][0], mean, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(renormed[name][1], variance * count / (count - 1), rtol=1e-4, atol=1e-6)
