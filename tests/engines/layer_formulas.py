"""Caffe's layers as plain numpy in float64: loops over pixels, written after the formulas and nothing else.

``FORMULAS[type](layer, bottoms, blobs)`` gives the list of tops.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np

from quantize.caffenet import LayerParameter

Array = np.ndarray
Formula = Callable[[LayerParameter, Sequence[Array], Sequence[Array]], list[Array]]

FORMULAS: dict[str, Formula] = {}


def formula(*types: str) -> Callable[[Formula], Formula]:
    def register(function: Formula) -> Formula:
        FORMULAS.update(dict.fromkeys(types, function))
        return function

    return register


def elementwise(kind: str, function: Callable[[LayerParameter, Array], Array]) -> None:
    FORMULAS[kind] = lambda layer, bottoms, _blobs: [function(layer, bottoms[0])]


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def exponential(layer: LayerParameter, x: Array) -> Array:
    p = layer.exp_param
    return (math.e if p.base == -1 else p.base) ** (p.shift + p.scale * x)


def logarithm(layer: LayerParameter, x: Array) -> Array:
    p = layer.log_param
    return np.log(p.shift + p.scale * x) / (1 if p.base == -1 else math.log(p.base))


def act_quantize(layer: LayerParameter, x: Array) -> Array:
    """In float32, where the rounding of x / a decides."""
    a = np.float32(layer.relu_param.negative_slope)
    threshold = layer.threshold_param.threshold
    codes = np.floor(x.astype(np.float32) / a + np.float32(0.5))
    return a * np.clip(codes, min(threshold, 0), abs(threshold) or 127)


elementwise("ReLU", lambda layer, x: np.where(x > 0, x, layer.relu_param.negative_slope * x))
elementwise("ELU", lambda layer, x: np.where(x > 0, x, layer.elu_param.alpha * np.expm1(x)))
elementwise("Sigmoid", lambda _, x: sigmoid(x))
elementwise("Swish", lambda layer, x: x * sigmoid(layer.swish_param.beta * x))
elementwise("TanH", lambda _, x: np.tanh(x))
elementwise("AbsVal", lambda _, x: np.abs(x))
elementwise("BNLL", lambda _, x: np.log1p(np.exp(x)))
elementwise("Exp", exponential)
elementwise("Log", logarithm)
elementwise(
    "Power",
    lambda layer, x: (layer.power_param.shift + layer.power_param.scale * x) ** layer.power_param.power,
)
elementwise("Clip", lambda layer, x: np.minimum(np.maximum(x, layer.clip_param.min), layer.clip_param.max))
elementwise("Threshold", lambda layer, x: np.where(x > layer.threshold_param.threshold, 1.0, 0.0))
elementwise("Dropout", lambda _, x: x)
elementwise("ActQuantize", act_quantize)
elementwise("Quant", act_quantize)


@formula("PReLU")
def prelu(_layer: LayerParameter, bottoms: Sequence[Array], blobs: Sequence[Array]) -> list[Array]:
    (x,), slopes = bottoms, blobs[0].reshape(1, -1, *[1] * (bottoms[0].ndim - 2))
    return [np.where(x > 0, x, slopes * x)]


# ---- Windows ----


def windows(layer: LayerParameter, axes: int) -> tuple[tuple[int, ...], ...]:
    """Stride, pad and dilation of a convolution."""
    p = layer.convolution_param
    if p.HasField("kernel_h"):
        return (p.stride_h or 1, p.stride_w or 1), (p.pad_h, p.pad_w), (1, 1)
    fields = []
    for values, default in ((p.stride, 1), (p.pad, 0), (p.dilation, 1)):
        found = list(values) or [default]
        fields.append(tuple(found * axes if len(found) == 1 else found))
    return tuple(fields)


def convolve(layer: LayerParameter, x: Array, kernels: Array) -> Array:
    """y[n, o] = sum over c and window of kernels[o, c] * x[n, c], for one bottom and no bias."""
    stride, pad, dilation = windows(layer, x.ndim - 2)
    x = np.pad(x, [(0, 0), (0, 0), *((p, p) for p in pad)])
    size = kernels.shape[2:]
    group = x.shape[1] // kernels.shape[1]
    extent = [d * (k - 1) + 1 for d, k in zip(dilation, size, strict=True)]
    out = [(n - e) // s + 1 for n, e, s in zip(x.shape[2:], extent, stride, strict=True)]
    y = np.zeros((len(x), len(kernels), *out))
    x_groups, w_groups = np.split(x, group, axis=1), np.split(kernels, group)
    for place in np.ndindex(*out):
        window = tuple(
            slice(i * s, i * s + e, d) for i, s, e, d in zip(place, stride, extent, dilation, strict=True)
        )
        parts = []
        for xg, wg in zip(x_groups, w_groups, strict=True):
            seen = xg[(slice(None), slice(None), *window)].reshape(len(x), -1)
            parts.append(seen @ wg.reshape(len(wg), -1).T)
        y[(slice(None), slice(None), *place)] = np.concatenate(parts, axis=1)
    return y


@formula("Convolution", "DepthwiseConvolution", "ConvolutionDepthwise")
def convolution(layer: LayerParameter, bottoms: Sequence[Array], blobs: Sequence[Array]) -> list[Array]:
    kernels, *bias = blobs
    tops = [convolve(layer, x, kernels) for x in bottoms]
    return [y + bias[0].reshape(-1, *[1] * (y.ndim - 2)) if bias else y for y in tops]


@formula("Im2col")
def im2col(layer: LayerParameter, bottoms: Sequence[Array], _blobs: Sequence[Array]) -> list[Array]:
    p, x = layer.convolution_param, bottoms[0]
    size = (p.kernel_h, p.kernel_w) if p.HasField("kernel_h") else tuple(p.kernel_size)
    size = size * (x.ndim - 2) if len(size) == 1 else size
    tops = []
    for bottom in bottoms:
        rows = []
        for channel in range(bottom.shape[1]):
            for pixel in np.ndindex(*size):
                unit = np.zeros((1, 1, *size))
                unit[(0, 0, *pixel)] = 1
                rows.append(convolve(layer, bottom[:, channel : channel + 1], unit))
        tops.append(np.concatenate(rows, axis=1))
    return tops


@formula("Deconvolution")
def deconvolution(layer: LayerParameter, bottoms: Sequence[Array], blobs: Sequence[Array]) -> list[Array]:
    """Every pixel of x adds its multiple of the kernel to y; the padding is cut off."""
    kernels, *bias = blobs
    group = layer.convolution_param.group
    tops = []
    for x in bottoms:
        stride, pad, dilation = windows(layer, x.ndim - 2)
        extent = [d * (k - 1) + 1 for d, k in zip(dilation, kernels.shape[2:], strict=True)]
        full = [s * (n - 1) + e for s, n, e in zip(stride, x.shape[2:], extent, strict=True)]
        outputs = kernels.shape[1]
        y = np.zeros((len(x), outputs * group, *full))
        inputs = x.shape[1] // group
        for place in np.ndindex(*x.shape[2:]):
            window = tuple(
                slice(i * s, i * s + e, d) for i, s, e, d in zip(place, stride, extent, dilation, strict=True)
            )
            for g in range(group):
                values = x[(slice(None), slice(g * inputs, (g + 1) * inputs), *place)]
                spread = np.tensordot(values, kernels[g * inputs : (g + 1) * inputs], axes=1)
                y[(slice(None), slice(g * outputs, (g + 1) * outputs), *window)] += spread
        y = y[(..., *(slice(p, n - p) for p, n in zip(pad, full, strict=True)))]
        tops.append(y + bias[0].reshape(-1, *[1] * (y.ndim - 2)) if bias else y)
    return tops


def two(param: object, name: str, h: str, w: str) -> tuple[int, int]:
    if param.HasField(h):
        return getattr(param, h), getattr(param, w)
    return (getattr(param, name),) * 2


def pool(x: Array, is_max: bool, kernel: Sequence[int], stride: Sequence[int], pad: Sequence[int]) -> Array:
    """PoolingLayer::Forward_cpu with output sizes rounded up."""
    sizes = []
    for n, k, s, p in zip(x.shape[2:], kernel, stride, pad, strict=True):
        out = math.ceil((n + 2 * p - k) / s) + 1
        if any(pad) and (out - 1) * s >= n + p:
            out -= 1
        sizes.append(out)
    y = np.empty((*x.shape[:2], *sizes))
    for place in np.ndindex(*sizes):
        window, area = [], 1
        for i, n, k, s, p in zip(place, x.shape[2:], kernel, stride, pad, strict=True):
            start = i * s - p
            end = min(start + k, n + p)
            area *= end - start
            window.append(slice(max(start, 0), min(end, n)))
        seen = x[(slice(None), slice(None), *window)]
        if is_max:
            value = seen.max(axis=(2, 3), initial=float(np.finfo(np.float32).min))
        else:
            value = seen.sum(axis=(2, 3)) / area if area else np.nan
        y[(slice(None), slice(None), *place)] = value
    return y


@formula("Pooling")
def pooling(layer: LayerParameter, bottoms: Sequence[Array], _blobs: Sequence[Array]) -> list[Array]:
    p, x = layer.pooling_param, bottoms[0]
    kernel = x.shape[2:] if p.global_pooling else two(p, "kernel_size", "kernel_h", "kernel_w")
    stride, pad = two(p, "stride", "stride_h", "stride_w"), two(p, "pad", "pad_h", "pad_w")
    y = pool(x, p.pool == p.MAX, kernel, stride, pad)
    if p.round_mode == p.FLOOR:
        out = [(n + 2 * q - k) // s + 1 for n, q, k, s in zip(x.shape[2:], pad, kernel, stride, strict=True)]
        y = y[:, :, : out[0], : out[1]]
    if len(layer.top) == 1:
        return [y]
    height, width = x.shape[2:]
    numbers = np.broadcast_to(np.arange(height * width, dtype=float).reshape(height, width), x.shape)
    places = np.empty_like(y)
    for n, c, i, j in np.ndindex(*y.shape):
        rows = slice(max(i * stride[0] - pad[0], 0), max(i * stride[0] - pad[0] + kernel[0], 0))
        columns = slice(max(j * stride[1] - pad[1], 0), max(j * stride[1] - pad[1] + kernel[1], 0))
        places[n, c, i, j] = numbers[n, c, rows, columns].flat[x[n, c, rows, columns].argmax()]
    return [y, places]


@formula("SPP")
def spp(layer: LayerParameter, bottoms: Sequence[Array], _blobs: Sequence[Array]) -> list[Array]:
    p, x = layer.spp_param, bottoms[0]
    levels = []
    for level in range(p.pyramid_height):
        kernel = [math.ceil(n / 2**level) for n in x.shape[2:]]
        pad = [(k * 2**level - n + 1) // 2 for k, n in zip(kernel, x.shape[2:], strict=True)]
        levels.append(pool(x, p.pool == p.MAX, kernel, kernel, pad))
    if len(levels) == 1:
        return levels
    return [np.concatenate([y.reshape(len(x), -1) for y in levels], axis=1)]


@formula("LRN")
def lrn(layer: LayerParameter, bottoms: Sequence[Array], _blobs: Sequence[Array]) -> list[Array]:
    p, x = layer.lrn_param, bottoms[0]
    half = p.local_size // 2
    if p.norm_region == p.WITHIN_CHANNEL:
        mean = pool(x**2, False, [p.local_size] * 2, [1, 1], [half] * 2)
        return [x * (1 + p.alpha * mean) ** -p.beta]
    total = np.zeros_like(x)
    for c in range(x.shape[1]):
        total[:, c] = (x[:, max(0, c - half) : c + half + 1] ** 2).sum(axis=1)
    return [x / (p.k + p.alpha / p.local_size * total) ** p.beta]


# ---- Per channel and along axes ----


@formula("BatchNorm")
def batch_norm(layer: LayerParameter, bottoms: Sequence[Array], blobs: Sequence[Array]) -> list[Array]:
    mean, variance, (factor,), *affine = blobs
    inverse = 1 / factor if factor else 0
    below = (-1, *[1] * (bottoms[0].ndim - 2))
    if affine:  # NVCaffe
        scale, bias = (blob.reshape(below) for blob in affine)
        eps = max(layer.batch_norm_param.eps, 1e-5)
        return [scale * (bottoms[0] - mean.reshape(below)) / np.sqrt(variance.reshape(below) + eps) + bias]
    mean, variance = (mean * inverse).reshape(below), (variance * inverse).reshape(below)
    return [(bottoms[0] - mean) / np.sqrt(variance + layer.batch_norm_param.eps)]


def below(x: Array, axis: int, factor: Array) -> Array:
    """``factor`` with its axes below those of x from ``axis`` on."""
    return factor.reshape(*factor.shape, *[1] * (x.ndim - axis % x.ndim - factor.ndim))


@formula("Scale")
def scale(layer: LayerParameter, bottoms: Sequence[Array], blobs: Sequence[Array]) -> list[Array]:
    x, axis = bottoms[0], layer.scale_param.axis
    factor, *bias = [*bottoms[1:], *blobs]
    y = x * below(x, axis, factor)
    return [y + below(x, axis, bias[0]) if bias else y]


@formula("Bias")
def bias(layer: LayerParameter, bottoms: Sequence[Array], blobs: Sequence[Array]) -> list[Array]:
    x, term = [*bottoms, *blobs]
    return [x + below(x, layer.bias_param.axis, term)]


@formula("MVN")
def mvn(layer: LayerParameter, bottoms: Sequence[Array], _blobs: Sequence[Array]) -> list[Array]:
    p, x = layer.mvn_param, bottoms[0]
    rows = x.reshape(len(x), -1) if p.across_channels else x.reshape(*x.shape[:2], -1)
    y = rows - rows.mean(axis=-1, keepdims=True)
    if p.normalize_variance:
        y /= rows.std(axis=-1, keepdims=True) + p.eps
    return [y.reshape(x.shape)]


@formula("Softmax")
def softmax(layer: LayerParameter, bottoms: Sequence[Array], _blobs: Sequence[Array]) -> list[Array]:
    axis = layer.softmax_param.axis
    y = np.exp(bottoms[0] - bottoms[0].max(axis=axis, keepdims=True))
    return [y / y.sum(axis=axis, keepdims=True)]


@formula("Reduction")
def reduction(layer: LayerParameter, bottoms: Sequence[Array], _blobs: Sequence[Array]) -> list[Array]:
    p, x = layer.reduction_param, bottoms[0]
    rows = x.reshape(*x.shape[: p.axis % x.ndim], -1)
    y = {
        p.SUM: rows.sum(axis=-1),
        p.ASUM: np.abs(rows).sum(axis=-1),
        p.SUMSQ: (rows**2).sum(axis=-1),
        p.MEAN: rows.mean(axis=-1),
    }[p.operation]
    return [p.coeff * y]


@formula("ArgMax")
def argmax(layer: LayerParameter, bottoms: Sequence[Array], _blobs: Sequence[Array]) -> list[Array]:
    p, x = layer.argmax_param, bottoms[0]
    axis = p.axis % x.ndim if p.HasField("axis") else 1
    rows = np.moveaxis(x if p.HasField("axis") else x.reshape(len(x), -1), axis, -1)
    places = np.empty((*rows.shape[:-1], p.top_k))
    for row in np.ndindex(*rows.shape[:-1]):
        places[row] = sorted(range(rows.shape[-1]), key=lambda i: (rows[row][i], i), reverse=True)[: p.top_k]
    values = np.take_along_axis(rows, places.astype(int), axis=-1)
    if p.HasField("axis"):
        return [np.moveaxis(values if p.out_max_val else places, -1, axis)]
    y = np.stack([places, values] if p.out_max_val else [places], axis=1)
    return [y.reshape(*y.shape, *[1] * (x.ndim - 3))]


# ---- Matrices and several blobs ----


@formula("InnerProduct")
def inner_product(layer: LayerParameter, bottoms: Sequence[Array], blobs: Sequence[Array]) -> list[Array]:
    p, x = layer.inner_product_param, bottoms[0]
    rows = x.reshape(*x.shape[: p.axis % x.ndim], -1)
    weights, *bias = blobs
    y = rows @ (weights if p.transpose else weights.T)
    return [y + bias[0] if bias else y]


@formula("Embed")
def embed(_layer: LayerParameter, bottoms: Sequence[Array], blobs: Sequence[Array]) -> list[Array]:
    table, *bias = blobs
    y = table[bottoms[0].astype(int)]
    return [y + bias[0] if bias else y]


@formula("BatchReindex")
def batch_reindex(_layer: LayerParameter, bottoms: Sequence[Array], _blobs: Sequence[Array]) -> list[Array]:
    table, indices = bottoms
    return [table[indices.astype(int)]]


@formula("Eltwise")
def eltwise(layer: LayerParameter, bottoms: Sequence[Array], _blobs: Sequence[Array]) -> list[Array]:
    p = layer.eltwise_param
    if p.operation == p.SUM:
        return [np.tensordot(list(p.coeff) or [1] * len(bottoms), np.stack(bottoms), axes=1)]
    return [np.max(bottoms, axis=0) if p.operation == p.MAX else np.prod(bottoms, axis=0)]


@formula("Concat")
def concat(layer: LayerParameter, bottoms: Sequence[Array], _blobs: Sequence[Array]) -> list[Array]:
    p = layer.concat_param
    return [np.concatenate(bottoms, axis=p.concat_dim if p.HasField("concat_dim") else p.axis)]


@formula("Slice")
def slice_(layer: LayerParameter, bottoms: Sequence[Array], _blobs: Sequence[Array]) -> list[Array]:
    p = layer.slice_param
    axis = p.slice_dim if p.HasField("slice_dim") else p.axis
    return np.split(bottoms[0], list(p.slice_point) or len(layer.top), axis=axis)


@formula("Crop")
def crop(layer: LayerParameter, bottoms: Sequence[Array], _blobs: Sequence[Array]) -> list[Array]:
    x, like = bottoms
    axis = layer.crop_param.axis % x.ndim
    offsets = list(layer.crop_param.offset) or [0]
    offsets = offsets * (x.ndim - axis) if len(offsets) == 1 else offsets
    cuts = [slice(o, o + n) for o, n in zip(offsets, like.shape[axis:], strict=True)]
    return [x[(*[slice(None)] * axis, *cuts)]]


@formula("Split")
def split(layer: LayerParameter, bottoms: Sequence[Array], _blobs: Sequence[Array]) -> list[Array]:
    return [bottoms[0]] * len(layer.top)


@formula("Tile")
def tile(layer: LayerParameter, bottoms: Sequence[Array], _blobs: Sequence[Array]) -> list[Array]:
    return [np.concatenate([bottoms[0]] * layer.tile_param.tiles, axis=layer.tile_param.axis)]


@formula("Flatten")
def flatten(layer: LayerParameter, bottoms: Sequence[Array], _blobs: Sequence[Array]) -> list[Array]:
    p, x = layer.flatten_param, bottoms[0]
    start, end = p.axis % x.ndim, p.end_axis % x.ndim
    return [x.reshape(*x.shape[:start], -1, *x.shape[end + 1 :])]


@formula("Reshape")
def reshape(layer: LayerParameter, bottoms: Sequence[Array], _blobs: Sequence[Array]) -> list[Array]:
    p, x = layer.reshape_param, bottoms[0]
    start = p.axis if p.axis >= 0 else x.ndim + p.axis + 1
    stop = x.ndim if p.num_axes == -1 else start + p.num_axes
    dims = [n or x.shape[start + i] for i, n in enumerate(p.shape.dim)]
    return [x.reshape(*x.shape[:start], *dims, *x.shape[stop:])]


# ---- Sources ----


@formula("Parameter")
def parameter(_layer: LayerParameter, _bottoms: Sequence[Array], blobs: Sequence[Array]) -> list[Array]:
    return list(blobs)


@formula("DummyData")
def dummy_data(layer: LayerParameter, _bottoms: Sequence[Array], _blobs: Sequence[Array]) -> list[Array]:
    p = layer.dummy_data_param
    shapes = [tuple(shape.dim) for shape in p.shape]
    shapes = shapes or list(zip(p.num, p.channels, p.height, p.width, strict=True))
    values = [filler.value for filler in p.data_filler] or [0.0]
    return [np.full(shapes[i % len(shapes)], values[i % len(values)]) for i in range(len(layer.top))]
