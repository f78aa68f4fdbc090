"""How each Caffe layer type is computed: one translator per type, found by the type's name.

A translator writes a layer into an ONNX graph and returns the tensor of its top, or of each top. Formulas are
those of ``Forward_cpu`` of Caffe 1.0's layers in the TEST phase. x is the bottom, y the top, N the batch; a
"prototxt" line names the fields that are read. Shapes are those of one image, that is with a batch of 1, and
batch axes are -1 in the graph, so that a graph serves any number of images.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from onnx import TensorProto, helper

from quantize.arrays import FloatArray, Shape
from quantize.caffenet import LayerParameter, PoolingParameter
from quantize.caffenet.norms import scale_and_shift
from quantize.caffenet.quantized import DEFAULT_LEVELS
from quantize.caffenet.quantizers import MOST_SIGNED_LEVELS
from quantize.caffenet.shape_rules import canonical_axis, convolution_window, height_and_width, spp_pooling
from quantize.engines.onnx.graph import Graph

MOST_LEVELS = 255
"""The largest code that an ActQuantize layer may have."""

LOWEST = float(np.finfo(np.float32).min)
"""What Caffe's maximum pooling makes of a window without pixels."""


class UnsupportedError(Exception):
    """The layer cannot be run by this engine; the text says why."""


@dataclass(frozen=True)
class Layer:
    """A layer to translate.

    Attributes:
        proto: the layer's parameters.
        bottoms: tensors.
        shapes: of the bottoms, for a batch of 1.
        grows: of each bottom whether it has values per image; otherwise it is the same for every batch.
        tops: shapes of the tops, for a batch of 1.
        blobs: the layer's own arrays, of the shapes that Caffe gives them.
    """

    proto: LayerParameter
    bottoms: Sequence[str]
    shapes: Sequence[Shape]
    grows: Sequence[bool]
    tops: Sequence[Shape]
    blobs: Sequence[FloatArray]

    @property
    def x(self) -> str:
        """The first bottom."""
        return self.bottoms[0]

    @property
    def shape(self) -> Shape:
        """The shape of the first bottom."""
        return self.shapes[0]

    def axis(self, axis: int) -> int:
        """An axis of the first bottom, counted from the start.

        Raises:
            UnsupportedError: it is the batch axis.
        """
        found = canonical_axis(axis, self.shape)
        if found == 0:
            raise UnsupportedError("works along the batch axis; images are run in batches of any size here")
        return found


Translator = Callable[[Graph, Layer], "str | list[str]"]

TRANSLATORS: dict[str, Translator] = {}


def translator(*types: str) -> Callable[[Translator], Translator]:
    """Register the translator of the layer types ``types``."""

    def register(function: Translator) -> Translator:
        TRANSLATORS.update(dict.fromkeys(types, function))
        return function

    return register


# ---- Convolutions and matrices ----


@translator("Convolution", "DepthwiseConvolution", "ConvolutionDepthwise")
def convolution(g: Graph, layer: Layer) -> list[str]:
    """y = W * x + b, each bottom to a top.

    x (N, C, ...), W (num_output, C / group, ...), b (num_output,), y (N, num_output, ...). The group is what
    W says: the forks' depthwise types have as many groups as channels.
    prototxt: convolution_param.{kernel_size, stride, pad, dilation, group, bias_term, kernel_h, ...}
    """
    group = layer.shape[1] // layer.blobs[0].shape[1]
    return _convolved(g, layer, "Conv", layer.blobs, group)


@translator("Deconvolution")
def deconvolution(g: Graph, layer: Layer) -> list[str]:
    """The gradient of Convolution; x (N, C, ...), W (C, num_output / group, ...), y (N, num_output, ...).

    prototxt: convolution_param.{kernel_size, stride, pad, dilation, group, bias_term, kernel_h, ...}
    """
    return _convolved(g, layer, "ConvTranspose", layer.blobs, layer.proto.convolution_param.group)


@translator("Im2col")
def im2col(g: Graph, layer: Layer) -> list[str]:
    """y[n, (c, i, j)] = x[n, c] seen through pixel (i, j) of the window: a convolution with unit kernels.

    x (N, C, H, W), y (N, C * kernel_h * kernel_w, OH, OW).
    prototxt: convolution_param.{kernel_size, stride, pad, dilation, kernel_h, ...}
    """
    kernel = convolution_window(layer.proto.convolution_param, layer.shape).kernel
    unit = np.eye(math.prod(kernel)).reshape(-1, 1, *kernel)
    kernels = np.tile(unit, (layer.shape[1], *[1] * (len(kernel) + 1)))
    return _convolved(g, layer, "Conv", [kernels.astype(np.float32)], layer.shape[1])


def _convolved(g: Graph, layer: Layer, kind: str, blobs: Sequence[FloatArray], group: int) -> list[str]:
    window = convolution_window(layer.proto.convolution_param, layer.shape)
    if window.channel_axis != 1:
        raise UnsupportedError(f"convolution_param.axis is {window.channel_axis}; only 1 is supported")
    parameters = [g.floats(blob) for blob in blobs]
    return [
        g.op(
            kind,
            x,
            *parameters,
            group=group,
            kernel_shape=window.kernel,
            strides=window.stride,
            pads=window.pad * 2,
            dilations=window.dilation,
        )
        for x in layer.bottoms
    ]


@translator("InnerProduct")
def inner_product(g: Graph, layer: Layer) -> str:
    """y = x W^T + b, where the axes of x from ``axis`` on are one of size k.

    x (N, ..., k), W (num_output, k), or (k, num_output) with transpose; y (N, ..., num_output).
    prototxt: inner_product_param.{axis, transpose, bias_term}
    """
    param = layer.proto.inner_product_param
    axis = layer.axis(param.axis)
    rows = g.reshape(layer.x, (-1, math.prod(layer.shape[axis:])))
    y = g.op("Gemm", rows, *(g.floats(blob) for blob in layer.blobs), transB=int(not param.transpose))
    return y if axis == 1 else g.reshape(y, (-1, *layer.tops[0][1:]))


@translator("Embed")
def embed(g: Graph, layer: Layer) -> str:
    """y = W[x] + b; x (N, ...) holds whole numbers, W (input_dim, num_output), y (N, ..., num_output).

    prototxt: embed_param.{input_dim, num_output, bias_term}
    """
    table, *bias = (g.floats(blob) for blob in layer.blobs)
    y = _rows(g, table, layer.x, len(layer.blobs[0]))
    return g.op("Add", y, *bias) if bias else y


@translator("BatchReindex")
def batch_reindex(g: Graph, layer: Layer) -> str:
    """y[n] = x[i[n]]; x (M, ...) must be the same for every batch, i (N,) holds whole numbers, y (N, ...).

    Rows of what is computed from the images are refused: which images share a batch is not the net's to say.
    """
    if layer.grows[0]:
        raise UnsupportedError(
            "picks images out of the batch; images are run in batches of any size here, so the first bottom "
            "must not depend on them (a Parameter or DummyData layer)"
        )
    return _rows(g, layer.x, layer.bottoms[1], layer.shape[0])


def _rows(g: Graph, table: str, indices: str, rows: int) -> str:
    """table[indices]; Gather counts negative indices from the end, so they are made too large for it."""
    whole = g.op("Cast", indices, to=TensorProto.INT64)
    negative = g.op("Less", whole, g.integers([0]))
    return g.op("Gather", table, g.op("Where", negative, g.integers([rows]), whole))


# ---- Per channel ----


@translator("BatchNorm")
def batch_norm(g: Graph, layer: Layer) -> str:
    """y = (x - mean / f) / sqrt(variance / f + eps), per channel; f is the third blob.

    For f = 0, 1 / f is 0. The stored statistics are used whatever use_global_stats says: labelfree runs nets
    for inference. x (N, C, ...). NVCaffe's, with scale_bias or one of the fillers, has two more blobs: y is
    multiplied by the first and the second is added; f is not looked at, and eps at least 1e-5.
    prototxt: batch_norm_param.{eps, scale_bias, scale_filler, bias_filler}
    """
    return normalization(g, layer)


def normalization(g: Graph, layer: Layer) -> str:
    """y of a layer of one of the types that normalize, see ``caffenet.norms``."""
    scale, shift = scale_and_shift(layer.proto, layer.blobs)
    if len(layer.shape) == 1:
        return _plus(g, _times(g, layer.x, scale), shift)
    return g.affine(layer.x, layer.shape, scale, shift)


@translator("Scale")
def scale(g: Graph, layer: Layer) -> str:
    """y = x * s + b, where s has the sizes of x from ``axis`` on; s is a blob, or the second bottom.

    prototxt: scale_param.{axis, num_axes, bias_term}
    """
    axis = layer.proto.scale_param.axis
    blobs = list(layer.blobs)
    if len(layer.bottoms) == 1 and _is_per_channel(layer, axis):
        return g.affine(layer.x, layer.shape, blobs[0], blobs[1] if len(blobs) > 1 else 0.0)
    factor = _second(g, layer, axis) if len(layer.bottoms) == 2 else _spread(g, layer, axis, blobs.pop(0))
    y = g.op("Mul", layer.x, factor)
    return g.op("Add", y, _spread(g, layer, axis, blobs[0])) if blobs else y


@translator("Bias")
def bias(g: Graph, layer: Layer) -> str:
    """y = x + b, where b has the sizes of x from ``axis`` on; b is a blob, or the second bottom.

    prototxt: bias_param.{axis, num_axes}
    """
    axis = layer.proto.bias_param.axis
    if len(layer.bottoms) == 2:
        return g.op("Add", layer.x, _second(g, layer, axis))
    if _is_per_channel(layer, axis):
        return g.affine(layer.x, layer.shape, 1.0, layer.blobs[0])
    return g.op("Add", layer.x, _spread(g, layer, axis, layer.blobs[0]))


def _is_per_channel(layer: Layer, axis: int) -> bool:
    return layer.blobs[0].ndim == 1 and canonical_axis(axis, layer.shape) == 1


def _spread(g: Graph, layer: Layer, axis: int, blob: FloatArray) -> str:
    """A blob as a constant whose axes stand below those of x from ``axis`` on."""
    behind = len(layer.shape) - canonical_axis(axis, layer.shape) - blob.ndim
    return g.floats(blob.reshape(*blob.shape, *[1] * behind))


def _second(g: Graph, layer: Layer, axis: int) -> str:
    """The second bottom with its axes below those of x from ``axis`` on; its first axis may be the batch."""
    shape = layer.shapes[1]
    if not shape:
        return layer.bottoms[1]
    behind = len(layer.shape) - canonical_axis(axis, layer.shape) - len(shape)
    return g.reshape(layer.bottoms[1], (-1, *shape[1:], *[1] * behind))


# ---- Element by element ----


def _times(g: Graph, x: str, factor: npt.ArrayLike) -> str:
    return x if np.all(np.equal(factor, 1)) else g.op("Mul", x, g.floats(factor))


def _plus(g: Graph, x: str, term: npt.ArrayLike) -> str:
    return x if np.all(np.equal(term, 0)) else g.op("Add", x, g.floats(term))


@translator("ReLU")
def relu(g: Graph, layer: Layer) -> str:
    """y = max(x, 0) + negative_slope * min(x, 0). prototxt: relu_param.negative_slope"""
    slope = layer.proto.relu_param.negative_slope
    return g.op("LeakyRelu", layer.x, alpha=slope) if slope else g.op("Relu", layer.x)


@translator("PReLU")
def prelu(g: Graph, layer: Layer) -> str:
    """y = max(x, 0) + a * min(x, 0), a (C,) or one number. prototxt: prelu_param.channel_shared"""
    slopes = layer.blobs[0]
    return g.op("PRelu", layer.x, g.floats(slopes.reshape(-1, *[1] * (len(layer.shape) - 2))))


@translator("ELU")
def elu(g: Graph, layer: Layer) -> str:
    """y = x for x > 0, else alpha * (exp(x) - 1). prototxt: elu_param.alpha"""
    return g.op("Elu", layer.x, alpha=layer.proto.elu_param.alpha)


@translator("Sigmoid")
def sigmoid(g: Graph, layer: Layer) -> str:
    """y = 1 / (1 + exp(-x))"""
    return g.op("Sigmoid", layer.x)


@translator("TanH")
def tanh(g: Graph, layer: Layer) -> str:
    """y = tanh(x)"""
    return g.op("Tanh", layer.x)


@translator("Swish")
def swish(g: Graph, layer: Layer) -> str:
    """y = x / (1 + exp(-beta * x)). prototxt: swish_param.beta"""
    return g.op("Mul", layer.x, g.op("Sigmoid", _times(g, layer.x, layer.proto.swish_param.beta)))


@translator("BNLL")
def bnll(g: Graph, layer: Layer) -> str:
    """y = log(1 + exp(x))"""
    return g.op("Softplus", layer.x)


@translator("AbsVal")
def absval(g: Graph, layer: Layer) -> str:
    """y = |x|"""
    return g.op("Abs", layer.x)


@translator("Exp")
def exp(g: Graph, layer: Layer) -> str:
    """y = base^(shift + scale * x), where a base of -1 is e. prototxt: exp_param.{base, scale, shift}"""
    param = layer.proto.exp_param
    log_base = 1.0 if param.base == -1 else math.log(_positive("exp_param.base", param.base))
    y = g.op("Exp", _times(g, layer.x, param.scale * log_base))
    return _times(g, y, math.exp(param.shift * log_base))


@translator("Log")
def log(g: Graph, layer: Layer) -> str:
    """y = log(shift + scale * x) / log(base), where a base of -1 is e.

    prototxt: log_param.{base, scale, shift}
    """
    param = layer.proto.log_param
    log_base = 1.0 if param.base == -1 else math.log(_positive("log_param.base", param.base))
    if log_base == 0:
        raise UnsupportedError("log_param.base is 1; there is no logarithm to that base")
    return _times(g, g.op("Log", _plus(g, _times(g, layer.x, param.scale), param.shift)), 1 / log_base)


def _positive(field: str, value: float) -> float:
    if not value > 0:
        raise UnsupportedError(f"{field} is {value}; must be positive (or -1, for e)")
    return value


@translator("Power")
def power(g: Graph, layer: Layer) -> str:
    """y = (shift + scale * x)^power; where power * scale is 0, shift^power even for an infinite x.

    prototxt: power_param.{power, scale, shift}
    """
    param = layer.proto.power_param
    if param.power * param.scale == 0:
        value = helper.make_tensor(
            "value", TensorProto.FLOAT, [1], [_constant_power(param.shift, param.power)]
        )
        return g.op("ConstantOfShape", g.op("Shape", layer.x), value=value)
    y = _plus(g, _times(g, layer.x, param.scale), param.shift)
    return y if param.power == 1 else g.op("Pow", y, g.floats(param.power))


def _constant_power(shift: float, power: float) -> float:
    return 1.0 if power == 0 else float(np.power(np.float32(shift), np.float32(power)))


@translator("Clip")
def clip(g: Graph, layer: Layer) -> str:
    """y = min(max(x, min), max). prototxt: clip_param.{min, max}"""
    param = layer.proto.clip_param
    return g.op("Clip", layer.x, g.floats(param.min), g.floats(param.max))


@translator("Threshold")
def threshold(g: Graph, layer: Layer) -> str:
    """y = 1 for x > threshold, else 0. prototxt: threshold_param.threshold"""
    above = g.op("Greater", layer.x, g.floats(layer.proto.threshold_param.threshold))
    return g.op("Cast", above, to=TensorProto.FLOAT)


@translator("ActQuantize", "Quant")
def act_quantize(g: Graph, layer: Layer) -> str:
    """y = a * min(max(floor(x / a + 0.5), lowest), levels), in float32 as labelfree's Caffe layer.

    lowest is 0. A threshold of -L means codes of both signs: lowest -L, levels L.
    prototxt: a = relu_param.negative_slope; levels = threshold_param.threshold, 127 where that is 0
    """
    step, threshold = layer.proto.relu_param.negative_slope, layer.proto.threshold_param.threshold
    if not (step > 0 and math.isfinite(step)):
        raise UnsupportedError(f"the step relu_param.negative_slope is {step}; must be positive")
    if not (-MOST_SIGNED_LEVELS <= threshold <= MOST_LEVELS and threshold == int(threshold)):
        raise UnsupportedError(
            f"threshold_param.threshold is {threshold:g}; must be a whole number from -{MOST_SIGNED_LEVELS} "
            f"to {MOST_LEVELS}"
        )
    a, levels = g.floats(step), abs(threshold) or DEFAULT_LEVELS
    code = g.op("Floor", _plus(g, g.op("Div", layer.x, a), 0.5))
    return g.op("Mul", g.op("Clip", code, g.floats(min(threshold, 0)), g.floats(levels)), a)


@translator("Dropout", "Split")
def passed_through(_g: Graph, layer: Layer) -> list[str]:
    """Every top is x: in the TEST phase Dropout drops nothing."""
    return [layer.x] * len(layer.tops)


@translator("Eltwise")
def eltwise(g: Graph, layer: Layer) -> str:
    """y = x1 * x2 * ..., c1 * x1 + c2 * x2 + ..., or max(x1, x2, ...).

    prototxt: eltwise_param.{operation, coeff}
    """
    param = layer.proto.eltwise_param
    if param.operation == param.MAX:
        return g.op("Max", *layer.bottoms)
    terms = list(layer.bottoms)
    if param.coeff:
        terms = [_times(g, x, coefficient) for x, coefficient in zip(terms, param.coeff, strict=True)]
    kind = "Mul" if param.operation == param.PROD else "Add"
    y = terms[0]
    for term in terms[1:]:
        y = g.op(kind, y, term)
    return y


# ---- Windows ----


@translator("Pooling")
def pooling(g: Graph, layer: Layer) -> str | list[str]:
    """The maximum or the average of each window; x (N, C, H, W), y (N, C, OH, OW).

    The average divides by the window's size including padding, but only as far as the padding reaches, which
    the last window of a row may not (output sizes are rounded up). MAX may have the places of the maxima in
    their channel as a second top, if every window has a pixel.
    prototxt: pooling_param.{pool, kernel_size, stride, pad, global_pooling, round_mode, ceil_mode, kernel_h,
    ...}
    """
    param = layer.proto.pooling_param
    if len(layer.tops) == 2:
        return _max_with_places(g, layer)
    return _pooled(g, param, layer.x, layer.shape, layer.tops[0])


def _pooled(g: Graph, param: PoolingParameter, x: str, shape: Shape, top: Shape) -> str:
    if param.pool == param.STOCHASTIC:
        raise UnsupportedError("stochastic pooling is not supported (nor by Caffe on a CPU)")
    is_max = param.pool == param.MAX
    if param.global_pooling:
        return g.op("GlobalMaxPool" if is_max else "GlobalAveragePool", x)
    window = _PoolWindow.of(param, shape, top)
    if window.some_see_no_pixel:
        x, window = _padded(g, x, window, LOWEST if is_max else 0.0)
    if is_max:
        return g.op("MaxPool", x, **window.attributes())
    y = g.op("AveragePool", x, count_include_pad=1, **window.attributes())
    return _times(g, y, _overhang_factor(param, shape, window, top))


@dataclass(frozen=True)
class _PoolWindow:
    """Per spatial axis; the pads are those before all axes, then those behind."""

    kernel: Shape
    stride: Shape
    pads: Shape

    @classmethod
    def of(cls, param: PoolingParameter, shape: Shape, top: Shape) -> _PoolWindow:
        """With as much padding behind as the last window reaches over."""
        kernel, stride, pad = _pool_fields(param)
        axes = zip(top[2:], stride, kernel, shape[2:], pad, strict=True)
        behind = [max(0, (out - 1) * s + k - size - p) for out, s, k, size, p in axes]
        return cls(kernel, stride, (*pad, *behind))

    @property
    def some_see_no_pixel(self) -> bool:
        """Whether the last window of a row or column lies behind the image wholly."""
        return any(pad >= k for pad, k in zip(self.pads[2:], self.kernel, strict=True))

    def attributes(self) -> dict[str, Shape]:
        return {"kernel_shape": self.kernel, "strides": self.stride, "pads": self.pads}


def _pool_fields(param: PoolingParameter) -> tuple[Shape, Shape, Shape]:
    """Kernel, stride and pad."""
    kernel = height_and_width(param, "kernel_size", "kernel_h", "kernel_w")
    return kernel, height_and_width(param, "stride"), height_and_width(param, "pad")


def _padded(g: Graph, x: str, window: _PoolWindow, value: float) -> tuple[str, _PoolWindow]:
    """Padding of its own, for ONNX allows no window that lies in the padding wholly."""
    x = g.op("Pad", x, g.integers(window.pads), g.floats(value), g.integers((2, 3)))
    return x, _PoolWindow(window.kernel, window.stride, (0, 0, 0, 0))


def _overhang_factor(
    param: PoolingParameter, shape: Shape, window: _PoolWindow, top: Shape
) -> npt.NDArray[np.float64]:
    """Kernel size by the number of pixels up to the end of the padding; infinite where there are none."""
    factors = []
    _, _, pads = _pool_fields(param)
    axes = zip(top[2:], window.kernel, window.stride, pads, shape[2:], strict=True)
    for out, kernel, stride, pad, size in axes:
        start = np.arange(out) * stride - pad
        with np.errstate(divide="ignore"):
            factors.append(kernel / (np.minimum(start + kernel, size + pad) - start))
    return factors[0][:, None] * factors[1]


def _max_with_places(g: Graph, layer: Layer) -> list[str]:
    param = layer.proto.pooling_param
    _, _, height, width = layer.shape
    window = _PoolWindow.of(param, layer.shape, layer.tops[0])
    if param.pool != param.MAX or param.global_pooling:
        raise UnsupportedError("a second top is supported for MAX pooling that is not global only")
    if window.some_see_no_pixel:
        raise UnsupportedError(
            "its last window lies outside the image wholly, so the second top has no place to name; "
            "use engine: caffe"
        )
    # An operator for each: onnxruntime moves what rounds y in front of the operator that makes it, and maxima
    # that have become equal would stand elsewhere.
    y = g.op("MaxPool", layer.x, **window.attributes())
    _, place = g.ops("MaxPool", 2, layer.x, **window.attributes())
    in_channel = g.op("Mod", place, g.integers([height * width]))
    return [y, g.op("Cast", in_channel, to=TensorProto.FLOAT)]


@translator("SPP")
def spp(g: Graph, layer: Layer) -> str:
    """Pools into 1 x 1, 2 x 2, 4 x 4, ... bins; the levels are flattened and strung together.

    x (N, C, H, W), y (N, C * (1 + 4 + ...)), or (N, C, 1, 1) for a single level.
    prototxt: spp_param.{pyramid_height, pool}
    """
    param = layer.proto.spp_param
    levels = []
    for level in range(param.pyramid_height):
        pool = spp_pooling(level, layer.shape)
        pool.pool = {param.MAX: pool.MAX, param.AVE: pool.AVE, param.STOCHASTIC: pool.STOCHASTIC}[param.pool]
        side = 2**level
        levels.append(_pooled(g, pool, layer.x, layer.shape, (1, layer.shape[1], side, side)))
    if len(levels) == 1:
        return levels[0]
    return g.op("Concat", *(g.reshape(y, (-1, layer.shape[1] * 4**i)) for i, y in enumerate(levels)), axis=1)


@translator("LRN")
def lrn(g: Graph, layer: Layer) -> str:
    """y = x / (k + alpha * mean of x^2 over local_size channels, or pixels with k = 1)^beta.

    Beyond the edge x is 0 and counts. x (N, C, H, W).
    prototxt: lrn_param.{local_size, alpha, beta, k, norm_region}
    """
    param = layer.proto.lrn_param
    size = param.local_size
    if param.norm_region == param.ACROSS_CHANNELS:
        return g.op("LRN", layer.x, size=size, alpha=param.alpha, beta=param.beta, bias=param.k)
    square = g.op("Mul", layer.x, layer.x)
    pads = [(size - 1) // 2] * 4
    mean = g.op("AveragePool", square, kernel_shape=[size] * 2, pads=pads, count_include_pad=1)
    return g.op("Mul", layer.x, g.op("Pow", _plus(g, _times(g, mean, param.alpha), 1), g.floats(-param.beta)))


# ---- Along axes ----


@translator("MVN")
def mvn(g: Graph, layer: Layer) -> str:
    """y = (x - mean) / (standard deviation + eps), per image and channel, or per image.

    prototxt: mvn_param.{normalize_variance, across_channels, eps}
    """
    param, shape = layer.proto.mvn_param, (*layer.shape, 1)
    rows = (math.prod(shape[1:]),) if param.across_channels else (shape[1], math.prod(shape[2:]))
    x, last = g.reshape(layer.x, (-1, *rows)), g.integers([-1])
    y = g.op("Sub", x, g.op("ReduceMean", x, last))
    if param.normalize_variance:
        variance = g.op("ReduceMean", g.op("Mul", y, y), last)
        y = g.op("Div", y, _plus(g, g.op("Sqrt", variance), param.eps))
    return g.reshape(y, (-1, *layer.shape[1:]))


@translator("Softmax")
def softmax(g: Graph, layer: Layer) -> str:
    """y = exp(x) / sum of exp(x) along the axis. prototxt: softmax_param.axis"""
    return g.op("Softmax", layer.x, axis=layer.axis(layer.proto.softmax_param.axis))


@translator("Reduction")
def reduction(g: Graph, layer: Layer) -> str:
    """y = coeff * sum of x, |x| or x^2, or their mean, over all axes from ``axis`` on.

    prototxt: reduction_param.{operation, axis, coeff}
    """
    param = layer.proto.reduction_param
    kinds = {
        param.SUM: "ReduceSum",
        param.ASUM: "ReduceL1",
        param.SUMSQ: "ReduceSumSquare",
        param.MEAN: "ReduceMean",
    }
    axes = range(layer.axis(param.axis), len(layer.shape))
    return _times(g, g.op(kinds[param.operation], layer.x, g.integers(axes), keepdims=0), param.coeff)


@translator("ArgMax")
def argmax(g: Graph, layer: Layer) -> str:
    """The places of the top_k largest values, their values, or both; of equal values the last comes first.

    With ``axis``: along it, the values for out_max_val. Without: over the image; y (N, 1, top_k), or for
    out_max_val (N, 2, top_k) with places and values.
    prototxt: argmax_param.{axis, top_k, out_max_val}
    """
    param, shape = layer.proto.argmax_param, layer.shape
    x, axis = layer.x, 1
    if param.HasField("axis"):
        axis = layer.axis(param.axis)
        size = shape[axis]
    else:
        size = math.prod(shape[1:])
        x = g.reshape(x, (-1, size))
    # TopK takes the first of equal values, so it sees the axis backwards.
    backwards = [g.integers([number]) for number in (-1, -size - 1, axis, -1)]
    values, places = g.ops(
        "TopK", 2, g.op("Slice", x, *backwards), g.integers([param.top_k]), axis=axis, largest=1, sorted=1
    )
    forwards = g.op("Sub", g.integers([size - 1]), places)
    found = g.op("Cast", forwards, to=TensorProto.FLOAT)
    if param.HasField("axis"):
        return values if param.out_max_val else found
    y = g.op("Concat", found, values, axis=1) if param.out_max_val else found
    return g.reshape(y, (-1, *layer.tops[0][1:]))


# ---- Shapes and places ----


@translator("Concat")
def concat(g: Graph, layer: Layer) -> str:
    """The bottoms one behind the other along the axis. prototxt: concat_param.{axis, concat_dim}"""
    param = layer.proto.concat_param
    axis = param.concat_dim if param.HasField("concat_dim") else param.axis
    return g.op("Concat", *layer.bottoms, axis=layer.axis(axis))


@translator("Slice")
def slice_(g: Graph, layer: Layer) -> list[str]:
    """Consecutive parts of x along the axis. prototxt: slice_param.{axis, slice_dim, slice_point}"""
    param = layer.proto.slice_param
    axis = layer.axis(param.slice_dim if param.HasField("slice_dim") else param.axis)
    sizes = g.integers(top[axis] for top in layer.tops)
    return g.ops("Split", len(layer.tops), layer.x, sizes, axis=axis)


@translator("Crop")
def crop(g: Graph, layer: Layer) -> str:
    """x cut to the second bottom's sizes from ``axis`` on, starting at the offsets.

    prototxt: crop_param.{axis, offset}
    """
    axis = layer.axis(layer.proto.crop_param.axis)
    axes = range(axis, len(layer.shape))
    offsets = list(layer.proto.crop_param.offset) or [0]
    starts = offsets * len(axes) if len(offsets) == 1 else offsets
    ends = [start + size for start, size in zip(starts, layer.tops[0][axis:], strict=True)]
    return g.op("Slice", layer.x, g.integers(starts), g.integers(ends), g.integers(axes))


@translator("Flatten", "Reshape")
def reshape(g: Graph, layer: Layer) -> str:
    """x in the shape that flatten_param.{axis, end_axis} or reshape_param.{shape, axis, num_axes} give."""
    return g.reshape(layer.x, (-1, *layer.tops[0][1:]))


@translator("Tile")
def tile(g: Graph, layer: Layer) -> str:
    """x repeated along the axis. prototxt: tile_param.{axis, tiles}"""
    repeats = [1] * len(layer.shape)
    repeats[layer.axis(layer.proto.tile_param.axis)] = layer.proto.tile_param.tiles
    return g.op("Tile", layer.x, g.integers(repeats))


# ---- Sources ----


@translator("Parameter")
def parameter(g: Graph, layer: Layer) -> str:
    """y is the layer's blob. prototxt: parameter_param.shape"""
    return g.floats(layer.blobs[0])


@translator("DummyData")
def dummy_data(g: Graph, layer: Layer) -> list[str]:
    """Every top is filled with a value.

    prototxt: dummy_data_param.{shape, num, channels, height, width, data_filler of type constant}
    """
    fillers = list(layer.proto.dummy_data_param.data_filler)
    if any(filler.type != "constant" for filler in fillers):
        raise UnsupportedError("dummy_data_param.data_filler must be of type 'constant'")
    values = [filler.value for filler in fillers] or [0.0]
    values = values * len(layer.tops) if len(values) == 1 else values
    return [g.floats(np.full(top, value)) for top, value in zip(layer.tops, values, strict=True)]
