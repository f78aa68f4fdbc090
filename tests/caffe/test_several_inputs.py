"""A net with several inputs, from its files to real Caffe: what goes into each reaches what depends on it."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from quantize.caffenet import InferenceNet, Weights, read_prototxt
from quantize.commands.config import load
from quantize.data.feed import Feed
from quantize.engines import engine_opener
from quantize.job.evaluation import evaluate_run
from quantize.job.feeds import validation_feed
from quantize.job.given import Given
from quantize.job.run import Run
from quantize.settings import CaffeProcess, Config
from tests.nets import write_several

PLUGIN = "/usr/local/lib/libact_quantize.so"
ONNX = engine_opener("onnx", CaffeProcess(), 1)
FORWARD = (
    "import ctypes, json, numpy, caffe\n"
    f"ctypes.CDLL({PLUGIN!r}, ctypes.RTLD_GLOBAL)\n"
    "net = caffe.Net('net.prototxt', caffe.TEST, weights='net.caffemodel')\n"
    "feeds = numpy.load('feeds.npz')\n"
    "for name in feeds.files:\n"
    "    net.blobs[name].reshape(*feeds[name].shape)\n"
    "    net.blobs[name].data[...] = feeds[name]\n"
    "print(json.dumps({name: blob.tolist() for name, blob in net.forward().items()}))\n"
)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return load(write_several(tmp_path))


def in_caffe(
    caffe_run: Callable[..., object], prototxt: Path, weights: Path, feed: Feed, folder: Path
) -> np.ndarray:
    """The probabilities that real Caffe computes from a feed."""
    batch = next(feed.batches(len(feed)))
    np.savez(folder / "feeds.npz", **batch.feeds)
    files = {"net.prototxt": prototxt, "net.caffemodel": weights, "feeds.npz": folder / "feeds.npz"}
    done = caffe_run(["python3", "-c", FORWARD], files)
    assert done.returncode == 0, done.stderr  # type: ignore[attr-defined]
    return np.array(json.loads(done.stdout.splitlines()[-1])["prob"])  # type: ignore[attr-defined]


def in_onnx(prototxt: Path, weights: Path, feed: Feed) -> np.ndarray:
    test = InferenceNet.of(read_prototxt(prototxt))
    engine = ONNX(test.net, Weights.read(weights), feed.shapes)
    runner = engine.compile(0, len(test.net.layer), ["prob"])
    return runner.run(next(feed.batches(len(feed))).feeds).blobs["prob"]


def test_what_is_written_gives_the_same_in_caffe(
    config: Config, caffe_plugin: str, caffe_run: Callable[..., object], tmp_path: Path
) -> None:
    assert caffe_plugin == PLUGIN
    Run(config).quantize()
    feed = validation_feed(Given(config))
    pairs = {
        "full": (config.model.prototxt, config.model.weights),
        "quantized": (
            config.output / "several_deploy.prototxt",
            config.output / "several_renorm.caffemodel",
        ),
    }
    found = {}
    for name, (prototxt, weights) in pairs.items():
        found[name] = in_caffe(caffe_run, prototxt, weights, feed, tmp_path)
        np.testing.assert_allclose(found[name], in_onnx(prototxt, weights, feed), rtol=1e-4, atol=1e-6)
        assert np.ptp(found[name], axis=0).max() > 0.1  # the images, or what goes with them, matter
    same = 100 * np.mean(found["full"].argmax(axis=1) == found["quantized"].argmax(axis=1))
    assert evaluate_run(config).agreement == pytest.approx(same)


@pytest.mark.parametrize("solver", ["optimal", "data_aware"])
def test_either_engine_gives_the_same(
    solver: str, caffe_python: list[str], caffe_plugin: str, tmp_path: Path
) -> None:
    """All stages, both solvers, a budget and evaluate feed all inputs, in either engine.

    For so few images many choices of the data-aware solver are nearly as good and rounding decides, so there
    what is compared is how good they are.
    """
    yaml = write_several(tmp_path)
    given = ["weights.images=20", "weights.budget=5", f"weights.solver={solver}"]
    through_caffe = ["engine=caffe", f"caffe.python={caffe_python}", f"caffe.preload={caffe_plugin}"]
    configs = [
        load(yaml, {"output": str(tmp_path / "ours")}, given),
        load(yaml, {"output": str(tmp_path / "theirs")}, [*given, *through_caffe]),
    ]
    records = [Run(each).quantize() for each in configs]
    layers = [record.stages.weights.layers for record in records if record.stages.weights is not None]
    for first, second in zip(*layers, strict=True):
        assert (first.name, first.bits) == (second.name, second.bits)
        if first.output_sqnr_db is not None:
            assert first.output_sqnr_db == pytest.approx(second.output_sqnr_db, abs=1)
    evaluations = [evaluate_run(each) for each in configs]
    assert evaluations[0].images == evaluations[1].images == 12
    if solver == "data_aware":
        return
    stages = [record.stages.activations for record in records]
    feed = validation_feed(Given(configs[0]))
    ours, theirs = (
        in_onnx(each.output / "several_deploy.prototxt", each.output / "several_renorm.caffemodel", feed)
        for each in configs
    )
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-3)
    steps = [[layer.step for layer in stage.layers] for stage in stages if stage is not None]
    assert len(steps[0]) == 2  # one behind Concat for both convolutions, and one before the last layer
    assert steps[0] == pytest.approx(steps[1], rel=1e-3)
    assert evaluations[0].agreement == evaluations[1].agreement


def test_deploy_has_all_inputs_and_layers(config: Config) -> None:
    """First and last layer are those of the whole net."""
    record = Run(config).quantize()
    assert record.stages.weights is not None
    deploy = read_prototxt(config.output / "several_deploy.prototxt")
    given = read_prototxt(config.model.prototxt)
    written = {layer.name for layer in deploy.layer}
    assert {layer.name for layer in given.layer} <= written
    assert [layer.name for layer in deploy.layer if layer.type == "Input"] == ["target", "image", "info"]
    bits = {layer.name: layer.bits for layer in record.stages.weights.layers}
    assert bits == {"conv_t": 8, "conv_i": 4, "fc1": 4, "fc_info": 4, "fc2": 8}
