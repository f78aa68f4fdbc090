"""Renorm with the caffe engine, against what real Caffe's BatchNorm computes in training mode."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import pytest

from quantize.arrays import Shape
from quantize.caffenet import NetParameter, Weights, single_assignment
from quantize.data.feed import Feed
from quantize.engines.caffe.engine import CaffeEngine, Worker
from quantize.numerics.moments import moments_of
from quantize.sweep.plan import depth_order
from tests.caffe.test_engine import IMAGE, images, residual_net, run_in_ranges
from tests.nets import model_of, renorm_weights


@pytest.fixture(scope="module")
def worker(caffe_python: list[str]) -> Iterator[Worker]:
    worker = Worker(caffe_python, threads=1)
    yield worker
    worker.close()


def test_the_order_and_names_of_a_sweep_give_the_same(worker: Worker) -> None:
    engine = CaffeEngine(*residual_net(), {"data": IMAGE}, worker=worker)
    net, _ = depth_order(single_assignment(engine.net), lambda layer: layer.type == "BatchNorm")
    assert [layer.name for layer in net.layer] != [layer.name for layer in engine.net.layer]
    reordered = CaffeEngine(net, engine.weights, {"data": IMAGE}, worker=worker)
    batch = images(3)
    wanted = run_in_ranges(engine, [], batch)
    for place in range(1, len(net.layer)):
        np.testing.assert_array_equal(run_in_ranges(reordered, [place], batch), wanted)
    reordered.close()


class Batches:
    """Images in memory, for a sweep."""

    shape = IMAGE

    def __init__(self, blob: np.ndarray) -> None:
        self.blob = blob

    def __len__(self) -> int:
        return len(self.blob)

    def batches(self, size: int, start: int, stop: int) -> Iterator[tuple[np.ndarray, None]]:
        for first in range(start, stop, size):
            yield self.blob[first : min(first + size, stop)], None


def test_renorm_finds_what_one_training_pass_of_all_images_does(worker: Worker) -> None:
    """In training mode Caffe's BatchNorm normalises with the statistics of the batch."""
    net, weights = residual_net()
    blob = images(40)

    def open_engine(net: NetParameter, weights: Weights, inputs: Mapping[str, Shape]) -> CaffeEngine:
        return CaffeEngine(net, weights, inputs, worker=worker)

    found, _ = renorm_weights(net, weights, Feed({"data": Batches(blob)}), open_engine, memory=200_000)
    training = single_assignment(net)
    norms = {layer.name: layer.bottom[0] for layer in training.layer if layer.type == "BatchNorm"}
    for layer in training.layer:
        if layer.type == "BatchNorm":
            layer.batch_norm_param.use_global_stats = False
    number, _ = worker.open(training, {"data": blob.shape})
    for name in weights.layers():
        worker.call("setting", {"op": "set_blobs", "net": number, "layer": name}, weights[name])
    run = {"op": "run", "net": number, "start": 0, "stop": len(training.layer), "feeds": ["data"]}
    _, inputs = worker.call("running", {**run, "outputs": list(norms.values())}, [blob])
    worker.call("closing", {"op": "close", "net": number})
    for name, values in zip(norms, inputs, strict=True):
        mean, variance, factor = found[name]
        moments = moments_of(values)
        assert factor == 1
        np.testing.assert_allclose(mean, moments.mean, rtol=0, atol=1e-5 * np.abs(moments.mean).max())
        np.testing.assert_allclose(variance, moments.m2 / (moments.count - 1), rtol=1e-5)


def test_paired_channels_have_full_precisions_mean_and_deviation_in_caffe(worker: Worker) -> None:
    """What Caffe's BatchNorm puts out for the same images, in full precision and with other kernels."""
    net, weights = residual_net()
    blob = images(40)
    changed = weights.copy()
    rng = np.random.default_rng(0)
    for layer in net.layer:
        if layer.type in ("Convolution", "InnerProduct"):
            kernels, *bias = weights[layer.name]
            noise = rng.normal(0, 0.2 * kernels.std(), kernels.shape)
            changed.replace(layer.name, [(1.2 * kernels + noise).astype(np.float32), *bias])

    def open_engine(net: NetParameter, weights: Weights, inputs: Mapping[str, Shape]) -> CaffeEngine:
        return CaffeEngine(net, weights, inputs, worker=worker)

    full = model_of(net, weights)
    found, _ = renorm_weights(
        net, changed, Feed({"data": Batches(blob)}), open_engine, memory=200_000, full=full
    )
    flat = single_assignment(net)
    tops = [layer.top[0] for layer in flat.layer if layer.type == "BatchNorm"]
    before, wanted, paired = (
        [
            moments_of(
                open_engine(flat, blobs, {"data": IMAGE})
                .compile(0, len(flat.layer), [top])
                .run({"data": blob})
                .blobs[top]
            )
            for top in tops
        ]
        for blobs in (changed, weights, found)
    )
    for ours, theirs in zip(paired, wanted, strict=True):
        np.testing.assert_allclose(ours.mean, theirs.mean, rtol=0, atol=1e-4)
        np.testing.assert_allclose(ours.m2, theirs.m2, rtol=1e-3)
    assert max(np.abs(a.mean - b.mean).max() for a, b in zip(before, wanted, strict=True)) > 0.1
