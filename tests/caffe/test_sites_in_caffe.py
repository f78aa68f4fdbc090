"""Nets with quantized activations of all kinds: pycaffe and the embedded engine make the same of them."""

import io
from collections.abc import Callable

import numpy as np
import pytest

from quantize.caffenet import InferenceNet, empty_like, format_prototxt
from quantize.engines import engine_opener
from quantize.settings import CaffeProcess
from tests.families import FAMILIES, HEAD, family
from tests.stages.test_sites import quantized_net


@pytest.mark.parametrize("values", [{}, {"input": True, "sums": True, "levels": 255}], ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_caffe_computes_the_same(
    name: str, values: dict[str, object], caffe_forward: Callable[..., list[np.ndarray]]
) -> None:
    net, weights, feeds = quantized_net(family(name), **values)
    caffemodel = io.BytesIO()
    weights.write(caffemodel)
    test = InferenceNet.of(net)
    assert empty_like(net).name == name
    assert HEAD.split('"')[1] == test.blob

    engine = engine_opener("onnx", CaffeProcess(), 1)(test.net, weights, {"data": feeds["data"].shape[1:]})
    ours = engine.compile(0, len(test.net.layer), [test.scores]).run(feeds).blobs[test.scores]
    [theirs] = caffe_forward(format_prototxt(net), caffemodel.getvalue(), feeds, [test.scores])

    # A sum of another order may put a value on the other side of a rounding border: one code, somewhere.
    assert np.abs(theirs - ours).max() <= 0.02 * np.abs(ours).max()
    assert np.median(np.abs(theirs - ours)) <= 1e-5 * np.abs(ours).max()
