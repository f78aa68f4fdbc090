"""The plain pair of `labelfree export --to caffe`, run by real Caffe: what the quantized weights compute."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from quantize.caffenet import InferenceNet, read_prototxt
from quantize.caffenet.model import Model
from quantize.caffenet.quantized import ALPHA_SUFFIX, read_quantizer, with_alpha_terms
from quantize.engines import engine_opener
from quantize.errors import InputError
from quantize.exports.caffe import FORKS_DEPTHWISE, export_caffe
from quantize.exports.integers import IntegerNet
from quantize.exports.packed import unpack
from quantize.settings import CaffeProcess
from tests.families import FAMILIES, HEAD, INPUT, act, conv, dense, family, layer
from tests.nets import parse
from tests.stages.test_sites import quantized_net

FORKS = (
    HEAD
    + conv("stem", "data", 4)
    + act("stem")
    + layer(
        "all", "DepthwiseConvolution", "stem", "all", "convolution_param { num_output: 8 kernel_size: 3 }"
    )
    + act("all")
    + layer(
        "two",
        "ConvolutionDepthwise",
        "all",
        "two",
        "convolution_param { num_output: 4 kernel_size: 3 group: 2 }",
    )
    + act("two")
    + dense("fc", "two", 7)
)
"""Two outputs for each channel; and a group that is given counts."""


@pytest.mark.parametrize("fold", [True, False], ids=["folded", "kept"])
@pytest.mark.parametrize("name", [*FAMILIES, "depthwise of forks"])
def test_caffe_computes_what_the_weights_are(
    name: str, fold: bool, tmp_path: Path, caffe_forward: Callable[..., list[np.ndarray]]
) -> None:
    given = family(name) if name in FAMILIES else parse(FORKS)
    net, weights, feeds = quantized_net(given)
    model = Model(net, weights)
    integers = IntegerNet.of(model)
    export_caffe(model, integers, "net", fold).write(tmp_path)
    plain = read_prototxt(tmp_path / "net_plain.prototxt")
    assert not any(read_quantizer(layer) for layer in plain.layer)
    assert not {layer.type for layer in plain.layer} & {*FORKS_DEPTHWISE}
    assert fold != any(layer.name.endswith(ALPHA_SUFFIX) for layer in plain.layer)

    before = InferenceNet.of(with_alpha_terms(given, weights)).net
    outputs = list(integers.outputs)
    engine = engine_opener("onnx", CaffeProcess(), 1)(before, weights, INPUT)
    ours = engine.compile(0, len(before.layer), outputs).run(feeds).blobs
    pair = (tmp_path / "net_plain.prototxt", tmp_path / "net_plain.caffemodel")
    for blob, found in zip(outputs, caffe_forward(*pair, feeds, outputs), strict=True):
        assert np.abs(found - ours[blob]).max() <= 2e-5 * np.abs(ours[blob]).max()


def test_the_packed_pair_computes_the_same(
    tmp_path: Path, caffe_forward: Callable[..., list[np.ndarray]]
) -> None:
    net, weights, feeds = quantized_net(family("mobilenet_v2"))
    model = Model(net, weights)
    integers = IntegerNet.of(model)
    export_caffe(model, integers, "net").write(tmp_path)
    engine = engine_opener("onnx", CaffeProcess(), 1)(model.inference.net, weights, INPUT)
    outputs = list(integers.outputs)
    ours = engine.compile(0, len(model.inference.net.layer), outputs).run(feeds).blobs
    pair = unpack(tmp_path / "net.lfq", tmp_path / "unpacked")
    for blob, found in zip(outputs, caffe_forward(*pair, feeds, outputs), strict=True):
        assert np.abs(found - ours[blob]).max() <= 0.02 * np.abs(ours[blob]).max()
        assert np.median(np.abs(found - ours[blob])) <= 1e-5 * np.abs(ours[blob]).max()


DETECTOR = (
    HEAD
    + conv("stem", "data", 8)
    + act("stem")
    + conv("boxes", "stem", 8)
    + layer("last", "Convolution", "boxes", "last", "convolution_param { num_output: 4 kernel_size: 1 }")
    + layer("fc", "InnerProduct", "stem", "fc", "inner_product_param { num_output: 4 }")
    + layer("found", "DetectionOutput", "last stem", "found")
)


@pytest.mark.parametrize("fold", [True, False], ids=["folded", "kept"])
def test_layers_that_nobody_knows_are_carried_over(fold: bool, tmp_path: Path) -> None:
    net, weights, _ = quantized_net(parse(DETECTOR))
    model = Model(net, weights)
    assert model.inference.trailing == {"found"}
    export_caffe(model, IntegerNet.of(model), "net", fold).write(tmp_path)
    for prototxt in (tmp_path / "net_plain.prototxt", unpack(tmp_path / "net.lfq", tmp_path / "unpacked")[0]):
        found = read_prototxt(prototxt).layer[-1]
        assert (found.name, found.type, list(found.bottom)) == ("found", "DetectionOutput", ["last", "stem"])


def test_what_folding_takes_away_from_them_is_told() -> None:
    text = DETECTOR
    for given, changed in (
        ('"BatchNorm" bottom: "boxes" top: "boxes"', '"BatchNorm" bottom: "boxes" top: "b2"'),
        ('"Scale" bottom: "boxes" top: "boxes"', '"Scale" bottom: "b2" top: "b3"'),
        ('bottom: "boxes" top: "last"', 'bottom: "b3" top: "last"'),
        ('bottom: "stem" top: "found"', 'bottom: "b2" top: "found"'),
    ):
        assert given in text
        text = text.replace(given, changed)
    net, weights, _ = quantized_net(parse(text))
    model = Model(net, weights)
    with pytest.raises(InputError, match=r"layer 'found' \(DetectionOutput\): it reads 'b2', which is gone"):
        export_caffe(model, IntegerNet.of(model), "net")
    assert export_caffe(model, IntegerNet.of(model), "net", fold=False).files
