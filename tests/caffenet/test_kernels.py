"""Kernels of Deconvolution against its definition: what one output channel is made of."""

import numpy as np
import pytest

from quantize.caffenet.kernels import are_kernels, from_kernels, to_kernels
from tests.nets import parse


@pytest.mark.parametrize(("channels", "outputs", "groups"), [(4, 6, 1), (4, 6, 2), (6, 6, 6)])
def test_kernels_of_a_deconvolution(channels: int, outputs: int, groups: int) -> None:
    """Output o of group g is the sum over channels c of group g of blob[c, o - g * n / G]."""
    text = (
        'layer { name: "up" type: "Deconvolution" bottom: "x" top: "y" '
        f"convolution_param {{ num_output: {outputs} kernel_h: 2 kernel_w: 3 group: {groups} }} }}"
    )
    layer = parse(text).layer[0]
    rng = np.random.default_rng(0)
    blob = rng.normal(size=(channels, outputs // groups, 2, 3)).astype(np.float32)
    kernels = to_kernels(layer, blob)
    assert kernels.shape == (outputs, channels // groups * 6)
    for o, kernel in enumerate(kernels):
        g, within = divmod(o, outputs // groups)
        own = blob[g * channels // groups : (g + 1) * channels // groups, within]
        np.testing.assert_array_equal(kernel, own.reshape(-1))
    np.testing.assert_array_equal(from_kernels(layer, kernels, blob.shape), blob)
    assert are_kernels(layer, blob.shape)
    assert not are_kernels(layer, (channels, outputs, 2, 3)) or groups == 1
    assert not are_kernels(layer, (blob.size,))
