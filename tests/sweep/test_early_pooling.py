"""MAX pooling before BatchNorm: the same values and the same statistics."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantize.caffenet import TRAIN, NetParameter, Weights, single_assignment
from quantize.data import Transform
from quantize.data.feed import Feed
from quantize.engines import engine_opener
from quantize.errors import InputError
from quantize.settings import CaffeProcess
from quantize.sweep.early_pooling import with_early_pooling
from tests.nets import images_of, parse, random_weights, renorm_weights, write_images

OPEN = engine_opener("onnx", CaffeProcess(), 2)
SHAPE = (3, 9, 9)
CHAIN = """
layer { name: "conv" type: "Convolution" bottom: "data" top: "conv"
  convolution_param { num_output: 8 kernel_size: 3 } }
layer { name: "bn" type: "BatchNorm" bottom: "conv" top: "conv" }
layer { name: "scale" type: "Scale" bottom: "conv" top: "conv" scale_param { bias_term: true } }
layer { name: "relu" type: "ReLU" bottom: "conv" top: "conv" }
"""
POOL = 'layer { name: "pool" type: "Pooling" bottom: "conv" top: "pool" pooling_param { %s } }\n'
BEHIND = """
layer { name: "conv2" type: "Convolution" bottom: "pool" top: "conv2"
  convolution_param { num_output: 4 kernel_size: 1 } }
layer { name: "bn2" type: "BatchNorm" bottom: "conv2" top: "conv2" }
"""
HALVING = "kernel_size: 3 stride: 2"


def of(pooling: str, chain: str = CHAIN) -> NetParameter:
    return parse(chain + POOL % pooling + BEHIND)


def order(net: NetParameter) -> list[str]:
    return [layer.name for layer in net.layer]


def outputs(net: NetParameter, weights: Weights, images: np.ndarray) -> np.ndarray:
    engine = OPEN(net, weights, {"data": images.shape[1:]})
    top = net.layer[-1].top[0]
    return engine.compile(0, len(net.layer), [top]).run({"data": images}).blobs[top]


@settings(max_examples=25, deadline=None)
@given(
    kernel=st.integers(2, 3),
    pad=st.integers(0, 1),
    negative=st.booleans(),
    seed=st.integers(0, 1 << 16),
)
def test_it_computes_the_same(kernel: int, pad: int, negative: bool, seed: int) -> None:
    flat = single_assignment(of(f"kernel_size: {kernel} stride: 2 pad: {pad}"))
    weights = random_weights(flat, {"data": SHAPE}, seed)
    if not negative:
        weights.replace("scale", [np.abs(weights["scale"][0]), weights["scale"][1]])
    pooled, pooled_weights = with_early_pooling(flat, weights)
    assert order(pooled).index("pool") < order(pooled).index("bn")
    assert ("pool_signs" in pooled_weights) == bool((weights["scale"][0] < 0).any())
    images = np.random.default_rng(seed).normal(0, 1, (3, *SHAPE)).astype(np.float32)
    # Not to the last bit: onnxruntime multiplies BatchNorm into the convolution where they are neighbours.
    np.testing.assert_allclose(
        outputs(pooled, pooled_weights, images), outputs(flat, weights, images), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    ("between", "moves"),
    [
        ('type: "TanH"', True),
        ('type: "Clip" clip_param { min: -0.5 max: 1 }', True),
        ('type: "ActQuantize" relu_param { negative_slope: 0.25 } threshold_param { threshold: -7 }', True),
        ('type: "ELU" elu_param { alpha: 0.5 }', True),
        ('type: "Dropout"', True),
        ('type: "ELU" elu_param { alpha: -0.5 }', False),
        ('type: "ReLU" relu_param { negative_slope: -0.1 }', False),
        ('type: "AbsVal"', False),
        ('type: "Swish"', False),
        ('type: "Power" power_param { power: 2 }', False),
        ('type: "PReLU"', False),
        ('type: "LRN"', False),
        ('type: "Softmax"', False),
    ],
)
def test_pooling_moves_over_what_rises(between: str, moves: bool) -> None:
    own = f'layer {{ name: "own" {between} bottom: "conv" top: "conv" }}\n'
    flat = single_assignment(of(HALVING, CHAIN + own))
    weights = random_weights(flat, {"data": SHAPE})
    pooled, pooled_weights = with_early_pooling(flat, weights)
    assert (order(pooled).index("pool") < order(pooled).index("bn")) == moves
    images = np.random.default_rng(0).normal(0, 1, (3, *SHAPE)).astype(np.float32)
    np.testing.assert_allclose(
        outputs(pooled, pooled_weights, images), outputs(flat, weights, images), rtol=1e-5, atol=1e-5
    )


def test_names_that_are_taken_are_left_alone() -> None:
    taken = CHAIN + 'layer { name: "pool_signs" type: "ReLU" bottom: "conv" top: "conv" }\n'
    flat = single_assignment(of(HALVING, taken))
    weights = random_weights(flat, {"data": SHAPE})
    weights.replace("scale", [-np.abs(weights["scale"][0]), weights["scale"][1]])
    pooled, _ = with_early_pooling(flat, weights)
    assert len(set(order(pooled))) == len(order(pooled)) == len(flat.layer) + 2


SECOND_READER = CHAIN + 'layer { name: "other" type: "TanH" bottom: "conv" top: "other" }\n'
FALLING = CHAIN.replace('{ name: "relu"', '{ relu_param { negative_slope: -1 } name: "relu"')


@pytest.mark.parametrize(
    "net",
    [
        of("kernel_size: 3 stride: 1"),
        of("kernel_size: 1 stride: 2"),
        of("kernel_size: 2 stride: 2 pool: AVE"),
        of("global_pooling: true"),
        of("kernel_h: 3 stride: 2"),
        of(HALVING, SECOND_READER),
        of(HALVING, CHAIN.replace('type: "ReLU"', 'type: "Power"')),
        of(HALVING, FALLING),
    ],
    ids=["no smaller", "gaps", "AVE", "global", "half a kernel", "two readers", "Power", "falling"],
)
def test_other_poolings_stay_where_they_are(net: NetParameter) -> None:
    flat = single_assignment(net)
    pooled, _ = with_early_pooling(flat, Weights())
    assert pooled == flat


def test_the_statistics_are_those_of_all_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transform = Transform(crop_size=9, mean_value=(100.0,), scale=0.02)
    feed = Feed({"data": images_of(write_images(tmp_path / "lmdb", 11), transform, TRAIN)})
    net = of(HALVING)
    weights = random_weights(single_assignment(net), {"data": SHAPE})
    assert (weights["scale"][0] < 0).any()
    found, shifts = renorm_weights(net, weights, feed, OPEN, None)
    monkeypatch.setattr("quantize.stages.renorm.with_early_pooling", lambda *net_and_weights: net_and_weights)
    expected, expected_shifts = renorm_weights(net, weights, feed, OPEN, None)
    assert [shift.values for shift in shifts] == [shift.values for shift in expected_shifts]
    for name in ("bn", "bn2"):
        for got, wanted in zip(found[name], expected[name], strict=True):
            np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("blobs", [[], [np.ones(5, np.float32)] * 2], ids=["none", "five channels"])
def test_scales_that_do_not_fit_are_one_line(tmp_path: Path, blobs: list[np.ndarray]) -> None:
    feed = Feed({"data": images_of(write_images(tmp_path / "lmdb", 3), Transform(crop_size=9), TRAIN)})
    second = (
        '{ name: "scale2" type: "Scale" bottom: "conv" top: "conv" scale_param { bias_term: true } }\nlayer '
    )
    net = of(HALVING, CHAIN.replace('{ name: "relu"', second + '{ name: "relu"'))
    good, bad = random_weights(single_assignment(net), {"data": SHAPE}), Weights()
    for layer in net.layer:
        if layer.name in good:
            bad.add(layer, blobs if layer.name == "scale2" else good[layer.name])
    with pytest.raises(InputError, match="scale2"):
        renorm_weights(net, bad, feed, OPEN, None)
