"""Layers of forks: what goes beyond one formula, and what they refuse."""

import numpy as np
import pytest

from quantize.caffenet import NetParameter, Weights, infer_shapes
from quantize.engines.onnx.engine import OnnxEngine
from quantize.errors import InputError
from tests.families import layer
from tests.nets import parse


def segnet(pool: str, up: str) -> NetParameter:
    """A pooling and what undoes it."""
    return parse(
        layer("pool", "Pooling", "x", "y mask", f"pooling_param {{ pool: MAX {pool} }}")
        + layer("half", "Power", "y", "half", "power_param { scale: 0.5 }")
        + layer("up", "Upsample", "half mask", "up", f"upsample_param {{ {up} }}")
    )


@pytest.mark.parametrize(
    ("pool", "up", "size"),
    [
        ("kernel_size: 2 stride: 2", "scale: 2", (6, 8)),
        ("kernel_size: 2 stride: 2", "scale: 2 pad_out_h: 1 pad_out_w: 1", (7, 5)),
        ("kernel_size: 2 stride: 2", "scale_h: 2 scale_w: 2 pad_out_w: 1", (6, 5)),
        ("kernel_size: 3 stride: 2", "scale: 2 upsample_h: 9 upsample_w: 7", (9, 7)),
        ("kernel_size: 3 stride: 1 pad: 1", "upsample_h: 5 upsample_w: 6", (5, 6)),
    ],
)
def test_values_go_back_to_where_pooling_has_taken_them(pool: str, up: str, size: tuple[int, int]) -> None:
    net = segnet(pool, up)
    x = np.random.default_rng(0).permutation(2 * 3 * size[0] * size[1]).reshape(2, 3, *size)
    feeds = {"x": x.astype(np.float32)}
    engine = OnnxEngine(net, Weights(), {"x": (3, *size)}, 1)
    found = engine.compile(0, 3, ["half", "mask", "up"]).run(feeds).blobs
    wanted = np.zeros((2, 3, size[0] * size[1]))
    for place in np.ndindex(*found["half"].shape):
        wanted[(*place[:2], int(found["mask"][place]))] = found["half"][place]
    np.testing.assert_array_equal(found["up"], wanted.reshape(2, 3, *size))
    assert set(np.unique(found["up"])) - {0} <= set(np.unique(x / 2))


MASK = 'layer { name: "up" type: "Upsample" bottom: "x" bottom: "m" top: "up" upsample_param { scale: 2 } }'
REFUSED = {
    "the mask is an input": (MASK, r"layer 'up' \(Upsample\): its second bottom 'm' is no mask"),
    "the mask is a pooling's values": (
        layer("p", "Pooling", "z", "m", "pooling_param { kernel_size: 3 stride: 2 }") + MASK,
        "its second bottom 'm' is no mask: the second top of a MAX Pooling layer is needed",
    ),
    "the mask of other pixels": (
        layer("p", "Pooling", "z", "v m", "pooling_param { kernel_size: 3 stride: 2 }") + MASK,
        r"makes 8x8 pixels, but the mask 'm' is of a pooling of 9x9: give upsample_param that size",
    ),
    "the mask of other channels": (
        layer("p", "Pooling", "w", "v m", "pooling_param { kernel_size: 2 stride: 2 }") + MASK,
        r"the mask's shape \(1, 5, 4, 4\) differs from the values'",
    ),
    "no scale": (layer("l", "Upsample", "x"), "upsample_param.scale is missing or 0"),
    "two scales": (
        layer("l", "Upsample", "x", "", "upsample_param { scale_h: 2 scale_w: 3 }"),
        "without a mask as its second bottom it takes `scale` and nothing else",
    ),
    "a padding without a mask": (
        layer("l", "Upsample", "x", "", "upsample_param { scale: 2 pad_out_h: 1 }"),
        "without a mask as its second bottom it takes `scale` and nothing else",
    ),
    "axes twice": (layer("l", "Permute", "x", "", "permute_param { order: 0 order: 1 order: 1 }"), "twice"),
    "an axis beyond": (
        layer("l", "Permute", "x", "", "permute_param { order: 4 }"),
        r"permute_param.order \[4\] names an axis beyond the 4 of its bottom",
    ),
    "the batch": (
        layer("l", "Permute", "x", "", "permute_param { order: 1 }"),
        "needs a fixed batch or mixes its images|moves the batch axis",
    ),
    "statistics of the batch": (
        layer("l", "BN", "x", "", "bn_param { bn_mode: LEARN }"),
        "bn_mode is LEARN, which normalizes by the batch at hand; .* say bn_mode: INFERENCE",
    ),
    "groups": (
        layer("l", "ShuffleChannel", "x", "", "shuffle_channel_param { group: 2 }"),
        "3 channels cannot be parted into shuffle_channel_param.group 2",
    ),
    "no group": (layer("l", "ShuffleChannel", "x", "", "shuffle_channel_param { group: 0 }"), "group 0"),
    "no stride": (layer("l", "Reorg", "x"), "reorg_param.stride is missing or 0"),
    "an odd stride": (layer("l", "Reorg", "x", "", "reorg_param { stride: 2 }"), "by the square of reorg"),
    "odd pixels": (layer("l", "Reorg", "n", "", "reorg_param { stride: 2 }"), "9x9 pixels cannot be parted"),
    "no size": (layer("l", "Interp", "x"), "interp_param says no size: give height and width"),
    "nothing left": (
        layer("l", "Interp", "x", "", "interp_param { height: 2 width: 2 pad_beg: -2 pad_end: -2 }"),
        "leave nothing of",
    ),
    "padding": (
        layer("l", "Interp", "x", "", "interp_param { height: 2 width: 2 pad_beg: 1 }"),
        "0 or negative",
    ),
    "no zoom": (layer("l", "Interp", "x", "", "interp_param { zoom_factor: -1 }"), "are 1 or more"),
    "no height": (layer("l", "Interp", "x", "", "interp_param { height: 0 width: 3 }"), "are 1 or more"),
    "an axpy of one": (layer("l", "Axpy", "x x x"), "is not one number for each channel"),
    "an axpy of two": (layer("l", "Axpy", "v x z"), "second and the third bottom differ"),
    "nothing below": (layer("l", "Normalize", "v"), "a channel axis is needed"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_is_one_line_with_the_layer(case: str) -> None:
    text, words = REFUSED[case]
    net = parse(text)
    inputs = {"x": (3, 4, 4), "z": (3, 9, 9), "w": (5, 8, 8), "n": (4, 9, 9), "v": (), "m": (3, 4, 4)}
    fed = {name: shape for name, shape in inputs.items() if any(name in each.bottom for each in net.layer)}
    made = {top for each in net.layer for top in each.top}
    fed = {name: shape for name, shape in fed.items() if name not in made}
    weights = Weights()
    with pytest.raises(InputError, match=words) as raised:
        OnnxEngine(net, weights, fed, 1).compile(0, len(net.layer), [net.layer[-1].top[0]])
    assert str(raised.value).startswith("layer ")
    assert "\n" not in str(raised.value)


def test_shapes_follow_the_batch() -> None:
    net = parse(layer("l", "Permute", "x", "", "permute_param { order: 0 order: 2 order: 3 }"))
    assert infer_shapes(net, {"x": (5, 3, 4, 2)}).blobs["l"] == (5, 4, 2, 3)
