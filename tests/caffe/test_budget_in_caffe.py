"""Sensitivities measured with the caffe engine are those measured with the other one."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from quantize.arrays import Shape
from quantize.caffenet import InferenceNet, NetParameter, Weights
from quantize.caffenet.model import Model
from quantize.data import Transform
from quantize.data.feed import Feed
from quantize.engines import engine_opener
from quantize.engines.caffe.engine import CaffeEngine
from quantize.measure.outputs import class_scores
from quantize.settings import CaffeProcess
from quantize.stages.budget import sensitivities
from quantize.stages.data_aware import CalibrationSweep
from tests.nets import CROPPED, RESIDUAL, images_of, parse, random_weights, write_images


def test_both_engines_measure_the_same(caffe_python: list[str], tmp_path: Path) -> None:
    def open_caffe(net: NetParameter, weights: Weights, inputs: Mapping[str, Shape]) -> CaffeEngine:
        return CaffeEngine(net, weights, inputs, command=caffe_python, threads=1)

    test = InferenceNet.of(parse(RESIDUAL))
    weights = random_weights(test.net, {test.blob: CROPPED})
    transform = Transform(crop_size=9, scale=0.02, mean_value=(100.0,))
    feed = Feed({test.blob: images_of(write_images(tmp_path / "lmdb", 20), transform, phase=1)})
    model = Model(parse(RESIDUAL), weights)
    scores = class_scores(parse(RESIDUAL), "this test")
    layers = ["left", "right_a", "right_b", "fc1"]
    onnx = engine_opener("onnx", CaffeProcess(), 1)
    wanted, found = (
        sensitivities(model, layers, "power_of_two", CalibrationSweep(feed, opener, 40_000), scores)
        for opener in (onnx, open_caffe)
    )
    assert found[1] == wanted[1] == 20
    for name in layers:
        assert found[0][name] == pytest.approx(wanted[0][name], rel=1e-2, abs=1e-7)
