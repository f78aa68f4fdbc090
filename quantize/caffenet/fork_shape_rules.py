"""Shapes of what the layer types of forks make, as ``shape_rules`` has them for Caffe 1.0's.

The forks are named in the engine's docstrings, which say what the layers compute.
"""

from __future__ import annotations

from quantize.arrays import Shape
from quantize.caffenet.norms import is_learning, norm_places
from quantize.caffenet.schema import InterpParameter, LayerParameter, UpsampleParameter
from quantize.caffenet.shape_rules import LayerShapes, require, shape_rule

SPATIAL = 2
"""The first of the two axes of pixels."""


def permuted_axes(layer: LayerParameter, axes: int) -> list[int]:
    """The order of a Permute layer's axes: those that it does not name follow as they stand."""
    order = list(layer.permute_param.order)
    require(
        all(axis < axes for axis in order),
        f"permute_param.order {order[:8]} names an axis beyond the {axes} of its bottom",
    )
    require(len(set(order)) == len(order), f"permute_param.order {order[:8]} names an axis twice")
    return order + [axis for axis in range(axes) if axis not in order]


@shape_rule("Permute")
def _permute(layer: LayerParameter, bottoms: list[Shape]) -> LayerShapes:
    return LayerShapes([tuple(bottoms[0][axis] for axis in permuted_axes(layer, len(bottoms[0])))])


@shape_rule("Normalize")
def _normalize(layer: LayerParameter, bottoms: list[Shape]) -> LayerShapes:
    """One scale per channel, or one in all."""
    require(len(bottoms[0]) >= 2, f"the bottom's shape is {bottoms[0]}; a channel axis is needed")
    return LayerShapes(bottoms, [() if layer.norm_param.channel_shared else (bottoms[0][1],)])


@shape_rule("BN", "CuDNNBatchNorm")
def _bn(layer: LayerParameter, bottoms: list[Shape]) -> LayerShapes:
    """Scale and shift, and of the kind that normalizes mean and variance; each (1, C, 1, 1)."""
    require(len(bottoms[0]) >= 2, f"the bottom's shape is {bottoms[0]}; a channel axis is needed")
    require(
        not is_learning(layer),
        "bn_param.bn_mode is LEARN, which normalizes by the batch at hand; compute the statistics with the "
        "fork's script and say bn_mode: INFERENCE",
    )
    blobs = 2 if norm_places(layer) is None else 4
    return LayerShapes(bottoms, [(1, bottoms[0][1], 1, 1)] * blobs)


@shape_rule("Axpy", bottoms=3)
def _axpy(_layer: LayerParameter, bottoms: list[Shape]) -> LayerShapes:
    a, x, y = bottoms
    require(x == y, f"the shapes of the second and the third bottom differ: {x} and {y}")
    require(len(x) >= 2, f"the second bottom's shape is {x}; a channel axis is needed")
    require(
        a[:2] == x[:2] and all(size == 1 for size in a[2:]),
        f"the first bottom's shape {a} is not one number for each channel of {x}",
    )
    return LayerShapes([x])


@shape_rule("ShuffleChannel")
def _shuffle_channel(layer: LayerParameter, bottoms: list[Shape]) -> LayerShapes:
    shape, group = bottoms[0], layer.shuffle_channel_param.group
    require(len(shape) >= 2, f"the bottom's shape is {shape}; a channel axis is needed")
    require(
        group > 0 and shape[1] % group == 0,
        f"{shape[1]} channels cannot be parted into shuffle_channel_param.group {group}",
    )
    return LayerShapes([shape])


@shape_rule("Reorg")
def _reorg(layer: LayerParameter, bottoms: list[Shape]) -> LayerShapes:
    """Squares of ``stride`` pixels become channels, or with ``reverse`` the other way round."""
    param, shape = layer.reorg_param, bottoms[0]
    _check_pixels(shape)
    n, channels, height, width = shape
    s = param.stride
    require(s > 0, "reorg_param.stride is missing or 0")
    require(
        channels % (s * s) == 0,
        f"{channels} channels cannot be parted by the square of reorg_param.stride {s}",
    )
    if param.reverse:
        return LayerShapes([(n, channels // (s * s), height * s, width * s)])
    require(
        height % s == 0 and width % s == 0,
        f"{height}x{width} pixels cannot be parted into squares of reorg_param.stride {s}",
    )
    return LayerShapes([(n, channels * s * s, height // s, width // s)])


@shape_rule("Upsample", bottoms=(1, 2))
def _upsample(layer: LayerParameter, bottoms: list[Shape]) -> LayerShapes:
    """A mask, the second bottom, has the first one's shape."""
    _check_pixels(bottoms[0])
    if len(bottoms) == 2:
        require(
            bottoms[0] == bottoms[1], f"the mask's shape {bottoms[1]} differs from the values' {bottoms[0]}"
        )
    sizes = _upsampled(layer.upsample_param, bottoms[0][SPATIAL:], len(bottoms) == 2)
    return LayerShapes([(*bottoms[0][:SPATIAL], *sizes)])


def _upsampled(param: UpsampleParameter, sizes: Shape, has_mask: bool) -> Shape:
    """``upsample_h`` and ``upsample_w``, or the sizes times the scale less ``pad_out``."""
    named = {field.name for field, _ in param.ListFields()}
    require(
        has_mask or named <= {"scale"},
        "upsample_param: without a mask as its second bottom it takes `scale` and nothing else",
    )
    if {"upsample_h", "upsample_w"} <= named:
        return (param.upsample_h, param.upsample_w)
    scales = (param.scale_h, param.scale_w) if "scale_h" in named else (param.scale, param.scale)
    require(min(scales) > 0, "upsample_param.scale is missing or 0")
    pads = (param.pad_out_h, param.pad_out_w)
    return tuple(size * s - pad for size, s, pad in zip(sizes, scales, pads, strict=True))


@shape_rule("Interp")
def _interp(layer: LayerParameter, bottoms: list[Shape]) -> LayerShapes:
    param, shape = layer.interp_param, bottoms[0]
    _check_pixels(shape)
    require(
        param.pad_beg <= 0 and param.pad_end <= 0,
        "interp_param: pad_beg and pad_end cut pixels off, so they are 0 or negative",
    )
    sizes = tuple(size + param.pad_beg + param.pad_end for size in shape[SPATIAL:])
    require(min(sizes) > 0, f"interp_param: pad_beg and pad_end leave nothing of {shape[SPATIAL:]} pixels")
    return LayerShapes([(*shape[:SPATIAL], *_interpolated(param, sizes))])


def _interpolated(param: InterpParameter, sizes: Shape) -> Shape:
    """Shrunk or zoomed where either is said, else ``height`` and ``width``, else both."""
    if param.HasField("height") and param.HasField("width"):
        both = param.HasField("zoom_factor") and param.HasField("shrink_factor")
        if both or not (param.HasField("zoom_factor") or param.HasField("shrink_factor")):
            require(min(param.height, param.width) > 0, "interp_param: height and width are 1 or more")
            return (param.height, param.width)
    require(
        param.HasField("zoom_factor") or param.HasField("shrink_factor"),
        "interp_param says no size: give height and width, zoom_factor or shrink_factor",
    )
    require(
        min(param.zoom_factor, param.shrink_factor) > 0,
        "interp_param: zoom_factor and shrink_factor are 1 or more",
    )
    shrunk = ((size - 1) // param.shrink_factor + 1 for size in sizes)
    return tuple((size - 1) * param.zoom_factor + 1 for size in shrunk)


def _check_pixels(shape: Shape) -> None:
    require(len(shape) == 4, f"the bottom's shape is {shape}; four axes are needed")
