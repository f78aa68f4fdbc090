"""Tensors in blocks of channels: the same values as without, in another order."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantize.caffenet import NetParameter, needed_layers, single_assignment
from quantize.engines.onnx.blocked import BlockedGraph, _Convolution, block_size
from quantize.engines.onnx.engine import OnnxEngine, Translation
from quantize.numerics.moments import moments_of
from tests.nets import parse, random_weights

SHAPE = (3, 8, 6)
NORM = """
layer { name: "%(n)s_bn" type: "BatchNorm" bottom: "%(n)s" top: "%(n)s" }
layer { name: "%(n)s_scale" type: "Scale" bottom: "%(n)s" top: "%(n)s" scale_param { bias_term: true } }
"""
RELU = 'layer { name: "%(n)s_relu" type: "ReLU" bottom: "%(n)s" top: "%(n)s" }\n'


def conv(name: str, bottom: str, param: str, behind: str = NORM + RELU) -> str:
    return (
        f'layer {{ name: "{name}" type: "Convolution" bottom: "{bottom}" top: "{name}" '
        f"convolution_param {{ {param} }} }}\n" + behind % {"n": name}
    )


def layer(name: str, kind: str, bottoms: list[str], param: str = "") -> str:
    reads = " ".join(f'bottom: "{bottom}"' for bottom in bottoms)
    return f'layer {{ name: "{name}" type: "{kind}" {reads} top: "{name}" {param} }}\n'


NET = parse(
    conv("few", "data", "num_output: 32 kernel_size: 3 pad: 1")
    + conv("deep", "few", "num_output: 32 kernel_size: 3 pad: 1 group: 32 bias_term: false")
    + conv("groups", "deep", "num_output: 32 kernel_h: 3 kernel_w: 1 pad_h: 1 pad_w: 0 group: 2", NORM)
    + layer("sum", "Eltwise", ["groups", "few"])
    + RELU % {"n": "sum"}
    + layer("max", "Eltwise", ["sum", "deep"], "eltwise_param { operation: MAX }")
    + layer("odd", "Pooling", ["max"], "pooling_param { kernel_size: 3 stride: 2 }")
    + conv("uneven", "odd", "num_output: 20 kernel_size: 1", RELU)
    + conv("dilated", "odd", "num_output: 16 kernel_size: 3 pad: 2 dilation: 2", "")
    + layer("act", "ActQuantize", ["dilated"], "relu_param { negative_slope: 0.05 }")
    + layer("both", "Concat", ["act", "odd"])
    + layer("mixed", "Concat", ["both", "uneven"])
    + layer("average", "Pooling", ["both"], "pooling_param { pool: AVE kernel_size: 2 stride: 2 }")
    + layer("lrn", "LRN", ["average"])
    + conv("back", "lrn", "num_output: 16 kernel_size: 1", "")
    + layer("leaky", "ReLU", ["back"], "relu_param { negative_slope: 0.1 }")
    + layer("whole", "Pooling", ["leaky"], "pooling_param { pool: AVE global_pooling: true }")
    + layer("fc", "InnerProduct", ["whole"], "inner_product_param { num_output: 5 }")
)


def engine_of(net: NetParameter, threads: int = 2) -> OnnxEngine:
    return OnnxEngine(net, random_weights(net, {"data": SHAPE}), {"data": SHAPE}, threads)


def images(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 1, (count, *SHAPE)).astype(np.float32)


def blobs_of(net: NetParameter) -> list[str]:
    return [top for one in net.layer for top in one.top]


def operators(net: NetParameter, wanted: list[str]) -> Counter[str]:
    translation = Translation(engine_of(net), BlockedGraph(8))
    translation.add(needed_layers(net.layer, wanted), wanted)
    for name in wanted:
        translation.graph.output(translation.blob(name).tensor)
    model, _, _ = translation.graph.model()
    return Counter(node.op_type for node in model.graph.node)


def test_processors_with_avx_have_blocks() -> None:
    with open("/proc/cpuinfo") as file:
        flags = file.read().split()
    assert block_size() == (16 if "avx512f" in flags else 8 if "avx" in flags else block_size())


@pytest.mark.parametrize("wanted", [blobs_of(single_assignment(NET)), ["fc"]], ids=["every blob", "the last"])
def test_blocks_do_not_change_the_values(wanted: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    net = single_assignment(NET)
    engine = engine_of(net)
    found = engine.compile(0, len(net.layer), wanted).run({"data": images(3)}).blobs
    monkeypatch.setattr("quantize.engines.onnx.engine.block_size", lambda: 0)
    plain = engine.compile(0, len(net.layer), wanted).run({"data": images(3)}).blobs
    for name in wanted:
        np.testing.assert_allclose(found[name], plain[name], rtol=1e-4, atol=1e-4 * np.abs(plain[name]).max())


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, len(NET.layer) - 1), max_size=4), st.integers(1, 5))
def test_blobs_may_stay_in_the_engines_layout_between_ranges(cuts: list[int], count: int) -> None:
    net = single_assignment(NET)
    engine = engine_of(net)
    pixels = images(count)
    expected = engine.compile(0, len(net.layer), blobs_of(net)).run({"data": pixels}).blobs
    held = {"data": pixels}
    places = [0, *sorted(set(cuts)), len(net.layer)]
    for start, stop in pairwise(places):
        written = [top for one in net.layer[start:stop] for top in one.top]
        runner = engine.compile(start, stop, written, written, own_layout=True)
        result = runner.run({name: held[name] for name in runner.inputs})
        held |= result.blobs
        for name in written:
            assert held[name].shape == expected[name].shape
            scale = np.abs(expected[name]).max()
            np.testing.assert_allclose(
                np.sort(held[name], axis=None),
                np.sort(expected[name], axis=None),
                rtol=1e-4,
                atol=1e-4 * scale,
            )
            moments = moments_of(expected[name])
            np.testing.assert_allclose(result.moments[name].mean, moments.mean, atol=1e-4 * scale)
            np.testing.assert_allclose(result.moments[name].m2, moments.m2, rtol=1e-3, atol=1e-5 * scale**2)
            assert result.moments[name].count == moments.count
    np.testing.assert_allclose(
        held["fc"], expected["fc"], rtol=1e-4, atol=1e-4 * np.abs(expected["fc"]).max()
    )


@pytest.mark.parametrize("shape", [(32, 56, 56), (16, 1, 1), (16, 97, 3), (16, 1, 300)])
def test_moments_far_from_zero_keep_their_digits(shape: tuple[int, int, int]) -> None:
    """A channel of mean 1e4 and deviation 1: a plain sum of squares would lose all digits of the variance."""
    text = conv(
        "one", "data", f"num_output: {shape[0]} kernel_size: 1 group: {shape[0]} bias_term: false", ""
    )
    net = parse(text)
    weights = random_weights(net, {"data": shape})
    weights.replace("one", [np.ones((shape[0], 1, 1, 1))])
    engine = OnnxEngine(net, weights, {"data": shape}, 2)
    x = np.random.default_rng(0).normal(1e4, 1, (6, *shape)).astype(np.float32)
    found = engine.compile(0, 1, ["one"], ["one"], own_layout=True).run({"data": x}).moments["one"]
    expected = moments_of(x)
    np.testing.assert_allclose(found.mean, expected.mean, rtol=0, atol=1e-5)
    np.testing.assert_allclose(found.m2, expected.m2, rtol=1e-5)


def test_what_follows_a_convolution_is_fused_into_it() -> None:
    net = single_assignment(
        parse(
            conv("a", "data", "num_output: 16 kernel_size: 3 pad: 1")
            + conv("b", "a", "num_output: 16 kernel_size: 3 pad: 1", NORM)
            + layer("sum", "Eltwise", ["b", "a"])
            + RELU % {"n": "sum"}
        )
    )
    assert operators(net, [net.layer[-1].top[0]]) == {"Conv": 2, "ReorderOutput": 1}


def test_a_convolution_that_is_read_twice_is_computed_once() -> None:
    net = single_assignment(
        parse(conv("a", "data", "num_output: 16 kernel_size: 3") + layer("b", "TanH", ["a"]))
    )
    twice = operators(net, ["a", "b", net.layer[-2].top[0]])
    assert twice["Conv"] == 2  # the convolution, and BatchNorm, Scale and ReLU in one


def test_an_onnxruntime_that_does_otherwise_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_Convolution, "filters", lambda convolution, _: convolution.kernels)
    assert block_size.__wrapped__() == 0
