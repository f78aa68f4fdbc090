"""The caffe engine in real pycaffe: any range of layers gives what the whole net gives."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest
from google.protobuf import text_format

from quantize.caffenet import NetParameter, Weights, infer_shapes, live_blobs
from quantize.engines.caffe.engine import CaffeEngine, Worker
from quantize.errors import InputError, LabelfreeError

RESIDUAL = """
name: "residual"
layer { name: "conv1" type: "Convolution" bottom: "data" top: "conv1"
        convolution_param { num_output: 8 kernel_size: 3 pad: 1 } }
layer { name: "bn1" type: "BatchNorm" bottom: "conv1" top: "conv1" }
layer { name: "scale1" type: "Scale" bottom: "conv1" top: "conv1" scale_param { bias_term: true } }
layer { name: "relu1" type: "ReLU" bottom: "conv1" top: "conv1" }
layer { name: "pool1" type: "Pooling" bottom: "conv1" top: "pool1"
        pooling_param { kernel_size: 3 stride: 2 } }
layer { name: "conv2a" type: "Convolution" bottom: "pool1" top: "conv2a"
        convolution_param { num_output: 8 kernel_size: 3 pad: 1 bias_term: false } }
layer { name: "bn2a" type: "BatchNorm" bottom: "conv2a" top: "conv2a" }
layer { name: "relu2a" type: "ReLU" bottom: "conv2a" top: "conv2a" }
layer { name: "conv2b" type: "Convolution" bottom: "conv2a" top: "conv2b"
        convolution_param { num_output: 8 kernel_size: 1 group: 2 } }
layer { name: "sum" type: "Eltwise" bottom: "pool1" bottom: "conv2b" top: "sum" }
layer { name: "relu_sum" type: "ReLU" bottom: "sum" top: "sum" }
layer { name: "split_by_hand" type: "Split" bottom: "sum" top: "left" top: "right" }
layer { name: "shrink" type: "Convolution" bottom: "left" top: "shrink"
        convolution_param { num_output: 4 kernel_size: 1 } }
layer { name: "small" type: "Pooling" bottom: "data" top: "small" pooling_param { kernel_size: 3 stride: 2 } }
layer { name: "join" type: "Concat" bottom: "shrink" bottom: "right" bottom: "pool1" bottom: "small"
        top: "join" }
layer { name: "drop" type: "Dropout" bottom: "join" top: "join" }
layer { name: "mean" type: "Pooling" bottom: "join" top: "mean"
        pooling_param { pool: AVE global_pooling: true } }
layer { name: "flat" type: "Flatten" bottom: "mean" top: "flat" }
layer { name: "fc" type: "InnerProduct" bottom: "flat" top: "fc" inner_product_param { num_output: 10 } }
layer { name: "prob" type: "Softmax" bottom: "fc" top: "prob" }
"""
IMAGE = (3, 17, 14)


def residual_net(seed: int = 0) -> tuple[NetParameter, Weights]:
    """A small net with branches, in-place layers and a Split of its own, and random weights."""
    net = text_format.Parse(RESIDUAL, NetParameter())
    rng = np.random.default_rng(seed)
    weights = Weights()
    layers = {layer.name: layer for layer in net.layer}
    for name, shapes in infer_shapes(net, {"data": (1, *IMAGE)}).params.items():
        blobs = [(rng.normal(size=shape) * 0.3).astype(np.float32) for shape in shapes]
        if layers[name].type == "BatchNorm":
            blobs[1], blobs[2] = np.abs(blobs[1]) + np.float32(0.5), np.ones(1, np.float32)
        if shapes:
            weights.add(layers[name], blobs)
    return net, weights


def images(count: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, *IMAGE)).astype(np.float32)


@pytest.fixture(scope="module")
def worker(caffe_python: list[str]) -> Iterator[Worker]:
    worker = Worker(caffe_python, threads=1)
    yield worker
    worker.close()


@pytest.fixture
def engine(worker: Worker) -> Iterator[CaffeEngine]:
    engine = CaffeEngine(*residual_net(), {"data": IMAGE}, worker=worker)
    yield engine
    engine.close()


def run_in_ranges(engine: CaffeEngine, cuts: list[int], batch: np.ndarray) -> np.ndarray:
    blobs = {"data": batch}
    for start, stop in pairwise([0, *cuts, len(engine.net.layer)]):
        outputs = live_blobs(engine.net, stop, ["prob"]) if stop < len(engine.net.layer) else ["prob"]
        piece = engine.compile(start, stop, outputs)
        blobs = piece.run({name: blobs[name] for name in piece.inputs}).blobs
    return blobs["prob"]


def test_every_cut_and_any_batch_size_give_the_same(engine: CaffeEngine) -> None:
    whole = engine.compile(0, len(engine.net.layer), ["prob"])
    for place in range(1, len(engine.net.layer)):
        batch = images(1 + place % 4, seed=place)
        pieces = run_in_ranges(engine, [place], batch)
        np.testing.assert_array_equal(pieces, whole.run({"data": batch}).blobs["prob"])


def test_layer_by_layer_gives_the_same(engine: CaffeEngine) -> None:
    batch = images(3)
    pieces = run_in_ranges(engine, list(range(1, len(engine.net.layer))), batch)
    whole = engine.compile(0, len(engine.net.layer), ["prob"])
    np.testing.assert_array_equal(pieces, whole.run({"data": batch}).blobs["prob"])


def test_what_another_batch_left_behind_does_not_matter(engine: CaffeEngine) -> None:
    """Two batches take turns, range by range, as in a sweep."""
    first, second = images(4, seed=2), images(4, seed=3)
    wanted = [run_in_ranges(engine, [], batch) for batch in (first, second)]
    cuts = [0, 5, 9, 11, 13, len(engine.net.layer)]
    blobs = [{"data": first}, {"data": second}]
    for start, stop in pairwise(cuts):
        piece = engine.compile(
            start, stop, live_blobs(engine.net, stop, ["prob"]) if stop < cuts[-1] else ["prob"]
        )
        blobs = [piece.run({name: kept[name] for name in piece.inputs}).blobs for kept in blobs]
    for kept, prob in zip(blobs, wanted, strict=True):
        np.testing.assert_array_equal(kept["prob"], prob)


def test_moments_are_those_of_the_blob(engine: CaffeEngine) -> None:
    result = engine.compile(0, 7, ["conv2a"], ["conv2a", "pool1"]).run({"data": images(5)})
    values = result.blobs["conv2a"].astype(np.float64)
    moments = result.moments["conv2a"]
    assert moments.count == values.size // values.shape[1]
    np.testing.assert_allclose(moments.mean, values.mean((0, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(moments.m2, values.var((0, 2, 3)) * moments.count, rtol=1e-6)
    assert result.moments["pool1"].mean.shape == (8,)


def test_new_blobs_count_from_now_on(engine: CaffeEngine) -> None:
    before = engine.compile(0, 1, ["conv1"])
    batch = images(2)
    kernels, bias = engine.weights["conv1"]
    old = before.run({"data": batch}).blobs["conv1"]
    engine.set_blobs("conv1", [kernels * 2, bias * 2])
    np.testing.assert_allclose(before.run({"data": batch}).blobs["conv1"], 2 * old, rtol=1e-6)


def test_legacy_blob_shapes_are_taken(worker: Worker) -> None:
    net, weights = residual_net()
    wanted = CaffeEngine(net, weights, {"data": IMAGE}, worker=worker)
    legacy = weights.copy()
    kernels, bias = weights["fc"]
    legacy.replace("fc", [kernels.reshape(1, 1, *kernels.shape), bias.reshape(1, 1, 1, -1)])
    found = CaffeEngine(net, legacy, {"data": IMAGE}, worker=worker)
    batch = images(2)
    np.testing.assert_array_equal(run_in_ranges(found, [], batch), run_in_ranges(wanted, [], batch))
    found.close()
    wanted.close()


def test_the_worker_says_what_it_runs_in(worker: Worker) -> None:
    assert worker.versions["caffe"].startswith("1.0")


def one_layer(text: str) -> NetParameter:
    return text_format.Parse(
        f'name: "one" layer {{ name: "layer" bottom: "data" top: "top" {text} }}', NetParameter()
    )


def test_a_layer_that_caffe_lacks(caffe_python: list[str]) -> None:
    net = one_layer('type: "ActQuantize" relu_param { negative_slope: 0.1 }')
    with pytest.raises(
        InputError, match=r"Unknown layer type: ActQuantize .*labelfree layers.*caffe\.preload"
    ):
        CaffeEngine(net, Weights(), {"data": (2, 3, 4)}, caffe_python)


def test_a_layer_that_comes_with_a_library(caffe_python: list[str], caffe_plugin: str) -> None:
    net = one_layer('type: "ActQuantize" relu_param { negative_slope: 0.5 }')
    engine = CaffeEngine(net, Weights(), {"data": (2, 3, 4)}, caffe_python, preload=caffe_plugin)
    blob = np.linspace(-1, 80, 48, dtype=np.float32).reshape(2, 2, 3, 4)
    found = engine.compile(0, 1, ["top"]).run({"data": blob}).blobs["top"]
    np.testing.assert_array_equal(found, 0.5 * np.clip(np.floor(blob / 0.5 + 0.5), 0, 127))
    engine.close()


def test_a_check_that_fails_ends_in_one_line(caffe_python: list[str]) -> None:
    net = one_layer('type: "ActQuantize" relu_param { negative_slope: 0.1 }')
    net.layer[0].type = "Slice"
    net.layer[0].ClearField("relu_param")
    net.layer[0].slice_param.slice_point.append(1)
    with pytest.raises(LabelfreeError, match=r"opening the net 'one': it ended \(SIGABRT\): Check failed:"):
        Worker(caffe_python).open(net, {"data": (1, 2, 3, 4)})


def test_a_type_that_only_caffe_knows(worker: Worker) -> None:
    """Filter has no shape rule of ours: its shapes come from Caffe."""
    net = text_format.Parse(
        'layer { name: "relu" type: "ReLU" bottom: "data" top: "relu" }'
        'layer { name: "scaled" type: "Power" bottom: "relu" top: "scaled" power_param { scale: 2 } }'
        'layer { name: "rows" type: "Filter" bottom: "scaled" bottom: "data" top: "rows" }',
        NetParameter(),
    )
    with pytest.raises(InputError, match="Filter"):
        infer_shapes(net, {"data": (1, 1)})
    engine = CaffeEngine(net, Weights(), {"data": (1,)}, worker=worker)
    assert "rows" in engine.shapes.blobs
    x = np.array([[3.0]], np.float32)
    assert engine.compile(0, 2, ["scaled"]).run({"data": x}).blobs["scaled"].tolist() == [[6.0]]
