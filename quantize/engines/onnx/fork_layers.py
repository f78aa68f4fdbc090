"""How the layer types of forks are computed, as ``layers`` has it for Caffe 1.0's.

The docstrings name the fork that a type comes from. Where forks disagree, they say which one is followed.
"""

from __future__ import annotations

import numpy as np
from onnx import TensorProto

from quantize.caffenet.fork_shape_rules import permuted_axes
from quantize.caffenet.traits import hard_sigmoid_param
from quantize.engines.onnx.graph import Graph
from quantize.engines.onnx.layers import Layer, UnsupportedError, normalization, translator

# ---- Per channel ----


@translator("BN")
def bn(g: Graph, layer: Layer) -> str:
    """y = scale * (x - mean) / sqrt(variance + eps) + shift, or with a bn_mode y = scale * x + shift.

    yjxiong's Caffe and PSPNet: four blobs (1, C, 1, 1): scale, shift, mean, variance, used as stored. SegNet
    and ENet, where bn_mode is INFERENCE: the first two. x (N, C, ...). prototxt: bn_param.{eps, bn_mode}
    """
    return normalization(g, layer)


@translator("CuDNNBatchNorm")
def cudnn_batch_norm(g: Graph, layer: Layer) -> str:
    """y = scale * (x - mean) / sqrt(variance + eps) + bias: GENet's and SKNet's.

    Four blobs (1, C, 1, 1): scale, bias, mean, variance. x (N, C, ...).
    prototxt: batch_norm_param.eps or cudnn_batch_norm_param.eps
    """
    return normalization(g, layer)


@translator("Normalize")
def normalize(g: Graph, layer: Layer) -> str:
    """y = s * x / sqrt(eps + sum of x^2 over the channels, or with across_spatial over the image): SSD's.

    s (C,) or one number. x (N, C, ...). prototxt: norm_param.{across_spatial, channel_shared, eps}
    """
    param = layer.proto.norm_param
    axes = range(1, len(layer.shape)) if param.across_spatial else (1,)
    total = g.op("ReduceSumSquare", layer.x, g.integers(axes), keepdims=1)
    y = g.op("Div", layer.x, g.op("Sqrt", g.op("Add", total, g.floats(param.eps))))
    return g.affine(y, layer.shape, layer.blobs[0], 0.0)


@translator("Axpy")
def axpy(g: Graph, layer: Layer) -> str:
    """y = a * x2 + x3 of the bottoms a, x2, x3: SENet's. a (N, C) or (N, C, 1, 1), x2 and x3 (N, C, ...)."""
    a, x, term = layer.bottoms
    factor = g.reshape(a, (-1, layer.shape[1], *[1] * (len(layer.shapes[1]) - 2)))
    return g.op("Add", g.op("Mul", x, factor), term)


# ---- Element by element ----


@translator("ReLU6")
def relu6(g: Graph, layer: Layer) -> str:
    """y = min(max(x, 0), 6): MobileNet-YOLO's."""
    return g.op("Clip", layer.x, g.floats(0.0), g.floats(6.0))


@translator("HardSigmoid")
def hard_sigmoid(g: Graph, layer: Layer) -> str:
    """y = min(max(alpha * x + beta, 0), 1), where alpha is 0.2 and beta 0.5 unless said.

    prototxt: hard_sigmoid_param.{alpha, beta} or hardsigmoid_param.{alpha, beta}
    """
    param = hard_sigmoid_param(layer.proto)
    return g.op("HardSigmoid", layer.x, alpha=param.alpha, beta=param.beta)


@translator("HardSwish")
def hard_swish(g: Graph, layer: Layer) -> str:
    """y = x * min(max(x / 6 + 0.5, 0), 1): MobileNet-v3's."""
    return g.op("Mul", layer.x, g.op("HardSigmoid", layer.x, alpha=1 / 6, beta=0.5))


@translator("Mish")
def mish(g: Graph, layer: Layer) -> str:
    """y = x * tanh(log(1 + exp(x))): YOLO-v4's."""
    return g.op("Mul", layer.x, g.op("Tanh", g.op("Softplus", layer.x)))


# ---- Shapes and places ----


@translator("Permute")
def permute(g: Graph, layer: Layer) -> str:
    """The axes of x in another order: SSD's. Axes that ``order`` does not name follow as they stand.

    prototxt: permute_param.order
    """
    order = permuted_axes(layer.proto, len(layer.shape))
    if order[0] != 0:
        raise UnsupportedError("moves the batch axis; images are run in batches of any size here")
    return g.op("Transpose", layer.x, perm=order)


@translator("ShuffleChannel")
def shuffle_channel(g: Graph, layer: Layer) -> str:
    """Channel i * k + j of x, i < group, is channel j * group + i of y: ShuffleNet's. x (N, group * k, ...).

    prototxt: shuffle_channel_param.group
    """
    _, channels, *rest = layer.shape
    group = layer.proto.shuffle_channel_param.group
    parted = g.reshape(layer.x, (-1, group, channels // group, int(np.prod(rest))))
    return g.reshape(g.op("Transpose", parted, perm=[0, 2, 1, 3]), (-1, channels, *rest))


@translator("Reorg")
def reorg(g: Graph, layer: Layer) -> str:
    """Squares of s x s pixels of x become channels of y, in the order that Darknet has: YOLO-v2's.

    The values of an image, row by row, are taken for x'[c, h, i, w, j] of the sizes C / s^2, H, s, W, s, and
    y'[i, j, c, h, w] = x'[c, h, i, w, j], row by row, is y: (N, C s^2, H / s, W / s). With ``reverse`` x is
    taken for y' and what comes out for x': (N, C / s^2, H s, W s). prototxt: reorg_param.{stride, reverse}
    """
    param = layer.proto.reorg_param
    _, channels, height, width = layer.shape
    s = param.stride
    c = channels // (s * s)
    if param.reverse:
        parted = g.reshape(layer.x, (-1, s, s, c, height, width))
        moved = g.op("Transpose", parted, perm=[0, 3, 4, 1, 5, 2])
    else:
        parted = g.reshape(layer.x, (-1, c, height, s, width, s))
        moved = g.op("Transpose", parted, perm=[0, 3, 5, 1, 2, 4])
    return g.reshape(moved, (-1, *layer.tops[0][1:]))


@translator("Upsample")
def upsample(g: Graph, layer: Layer) -> str:
    """Without a mask every pixel becomes scale x scale of them: YOLO's. With one: SegNet's.

    The mask, a second bottom, holds for each value of x the place in its channel where MAX pooling took one;
    there it goes, and everything else is 0. Of several for one place the last one counts. x (N, C, H, W).
    prototxt: upsample_param.{scale, scale_h, scale_w, pad_out_h, pad_out_w, upsample_h, upsample_w}
    """
    _, channels, height, width = layer.tops[0]
    if len(layer.bottoms) == 1:
        scale = float(layer.proto.upsample_param.scale)
        scales = g.floats([1.0, 1.0, scale, scale])
        return g.op(
            "Resize",
            layer.x,
            "",
            scales,
            mode="nearest",
            coordinate_transformation_mode="asymmetric",
            nearest_mode="floor",
        )
    values, mask = (g.reshape(bottom, (0, channels, -1)) for bottom in layer.bottoms)
    batch = g.op("Shape", layer.x, start=0, end=1)
    sizes = g.op("Concat", batch, g.integers((channels, height * width)), axis=0)
    places = g.op("Cast", mask, to=TensorProto.INT64)
    put = g.op("ScatterElements", g.op("ConstantOfShape", sizes), places, values, axis=2)
    return g.reshape(put, (-1, channels, height, width))


@translator("Interp")
def interp(g: Graph, layer: Layer) -> str:
    """Bilinear interpolation whose corner pixels are those of x: DeepLab's, PSPNet's. x (N, C, H, W).

    Before, pad_beg and pad_end cut pixels off. y has ``height`` and ``width``, or (H' - 1) / shrink_factor
    rounded down, times zoom_factor, + 1.
    prototxt: interp_param.{height, width, zoom_factor, shrink_factor, pad_beg, pad_end}
    """
    param, axes = layer.proto.interp_param, g.integers((2, 3))
    x = layer.x
    if param.pad_beg or param.pad_end:
        ends = [size + param.pad_end for size in layer.shape[2:]]
        x = g.op("Slice", x, g.integers([-param.pad_beg] * 2), g.integers(ends), axes)
    sizes = g.integers(layer.tops[0][2:])
    return g.op(
        "Resize",
        x,
        "",
        "",
        sizes,
        axes=[2, 3],
        mode="linear",
        coordinate_transformation_mode="align_corners",
    )
