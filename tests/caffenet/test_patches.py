"""Patches times kernels are what layers compute."""

import numpy as np
import pytest

from quantize.caffenet import NetParameter, infer_shapes
from quantize.caffenet.kernels import to_kernels
from quantize.caffenet.patches import Patches
from quantize.engines import engine_opener
from quantize.settings import CaffeProcess
from tests.nets import (
    parse,
    random_weights,
)

ONNX = engine_opener("onnx", CaffeProcess(), 1)


LAYERS = [
    "num_output: 6 kernel_size: 3 pad: 1",
    "num_output: 6 kernel_size: 3 stride: 2 dilation: 2 pad: 2 group: 2",
    "num_output: 8 kernel_h: 2 kernel_w: 3 pad_h: 1 pad_w: 0 stride_h: 1 stride_w: 2 group: 4",
    "num_output: 4 kernel_size: 1 bias_term: false group: 4",
]


@pytest.mark.parametrize("text", LAYERS)
def test_patches_times_kernels_are_the_outputs(text: str) -> None:
    net = parse(
        f'layer {{ name: "c" type: "Convolution" bottom: "data" top: "c" convolution_param {{ {text} }} }}'
    )
    check_patches(net, (4, 9, 8), per_image=7)


@pytest.mark.parametrize("options", ["", "transpose: true", "axis: 2"])
def test_rows_times_kernels_are_the_outputs(options: str) -> None:
    net = parse(
        'layer { name: "c" type: "InnerProduct" bottom: "data" top: "c" '
        f"inner_product_param {{ num_output: 5 {options} }} }}"
    )
    check_patches(net, (4, 3, 2), per_image=2)


def check_patches(net: NetParameter, shape: tuple[int, ...], per_image: int) -> None:
    weights = random_weights(net, {"data": shape})
    shapes = infer_shapes(net, {"data": (1, *shape)})
    x = np.random.default_rng(0).normal(size=(3, *shape)).astype(np.float32)
    top = ONNX(net, weights, {"data": shape}).compile(0, 1, ["c"]).run({"data": x}).blobs["c"]
    layer, (blob, *bias) = net.layer[0], weights["c"]
    patches = Patches.of(layer, shapes.blobs["data"], shapes.blobs["c"], blob.shape)
    assert patches is not None
    kernels = to_kernels(layer, blob).reshape(patches.groups, -1, patches.columns)
    for count in (per_image, 1000):
        places = patches.sample(range(3), count, seed=0)
        assert places.shape == (3, min(count, patches.places))
        assert all(len(set(row)) == len(row) for row in places.tolist())
        made = patches.inputs(x, places) @ kernels.swapaxes(1, 2)
        if bias:
            made += bias[0].reshape(patches.groups, 1, -1)
        np.testing.assert_allclose(made, patches.outputs(top, places), rtol=1e-4, atol=1e-5)
