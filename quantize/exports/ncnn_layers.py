"""Layers in float for ncnn: one translator per Caffe type, which says what ncnn calls it and its numbers.

A line of NAME.param is ``type name bottoms tops id=value ...``; what the ids mean is in ncnn's
docs/developer-guide/operators.md. Blobs have no batch axis there: axis 1 of Caffe is axis 0.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from quantize.arrays import FloatArray, Shape
from quantize.caffenet import LayerParameter
from quantize.caffenet.kernels import outputs, to_kernels
from quantize.caffenet.norms import NORM_TYPES, scale_and_shift
from quantize.caffenet.schema import PoolingParameter
from quantize.caffenet.shape_rules import canonical_axis, convolution_window, height_and_width

Value = int | float | Sequence[int] | Sequence[float]
_LONGEST_NAME = 200
_ARRAY = -23300
"""An array has this minus its id as its id."""
_FLOAT32, _INT8 = 0, 0x000D4B38
"""Tags before weights in NAME.bin."""


class UnsupportedError(Exception):
    """ncnn has no such layer, or not with these parameters; the text says what is meant."""


@dataclass
class Op:
    """A layer of ncnn: a line of NAME.param and its part of NAME.bin.

    Attributes:
        type: its name in ncnn.
        name: its own.
        bottoms: the blobs that it reads.
        tops: the blobs that it makes.
        params: by id.
        weights: as they stand in NAME.bin, one behind the other.
    """

    type: str
    name: str
    bottoms: list[str]
    tops: list[str]
    params: dict[int, Value] = field(default_factory=dict)
    weights: list[bytes] = field(default_factory=list)

    def line(self) -> str:
        """The line in NAME.param."""
        words = [self.type, self.name, str(len(self.bottoms)), str(len(self.tops)), *self.bottoms, *self.tops]
        return " ".join([*words, *(_parameter(key, value) for key, value in self.params.items())])


def _parameter(key: int, value: Value) -> str:
    if isinstance(value, Sequence):
        return ",".join([f"{_ARRAY - key}={len(value)}", *map(_number, value)])
    return f"{key}={_number(value)}"


def _number(value: float) -> str:
    """Exact for float32, and no longer than the 15 characters that ncnn reads of an element of an array."""
    return str(value) if isinstance(value, int) else f"{value:.8e}"


def word(name: str) -> str:
    """A name without blanks, which part the words of a line; ncnn reads no more than 255 characters."""
    return re.sub(r"\s", "_", name)[:_LONGEST_NAME] or "_"


def raw(values: npt.ArrayLike) -> bytes:
    """Floats as they stand in NAME.bin where ncnn knows that they are."""
    return np.ascontiguousarray(values, "<f4").tobytes()


def tagged(values: npt.ArrayLike) -> bytes:
    """Weights, of which NAME.bin says that they are float32."""
    return _FLOAT32.to_bytes(4, "little") + raw(values)


def tagged_codes(codes: npt.NDArray[Any]) -> bytes:
    """Whole numbers, of which NAME.bin says that they are int8; filled up to a multiple of 4 bytes."""
    data = codes.astype(np.int8).tobytes()
    return _INT8.to_bytes(4, "little") + data + bytes(-len(data) % 4)


@dataclass(frozen=True)
class Layer:
    """A Caffe layer, as the translators see it.

    Attributes:
        proto: its parameters.
        bottoms: the names of what it reads, in ncnn.
        tops: the names of what it makes.
        shapes: of what it reads, with a batch of 1.
        top_shapes: of what it makes.
        blobs: its own blobs.
    """

    proto: LayerParameter
    bottoms: list[str]
    tops: list[str]
    shapes: list[Shape]
    top_shapes: list[Shape]
    blobs: list[FloatArray]

    def axis(self, axis: int) -> int:
        """An axis of the first bottom, as ncnn counts."""
        axis = canonical_axis(axis, self.shapes[0])
        if axis == 0:
            raise UnsupportedError("it works along the batch axis, which blobs of ncnn do not have")
        return axis - 1

    @property
    def name(self) -> str:
        """Its name in ncnn."""
        return word(self.proto.name)

    def op(self, kind: str, params: dict[int, Value] | None = None, weights: Iterable[bytes] = ()) -> Op:
        """What has the layer's name, bottoms and tops."""
        return Op(kind, self.name, list(self.bottoms), list(self.tops), params or {}, list(weights))


Translator = Callable[[Layer], list[Op]]
TRANSLATORS: dict[str, Translator] = {}


def translator(*types: str) -> Callable[[Translator], Translator]:
    """Register the translator of the layer types ``types``."""

    def register(function: Translator) -> Translator:
        TRANSLATORS.update(dict.fromkeys(types, function))
        return function

    return register


def translate(layer: Layer) -> list[Op]:
    """What a layer becomes.

    Raises:
        UnsupportedError: ncnn has nothing that computes the same.
    """
    if layer.proto.type not in TRANSLATORS:
        raise UnsupportedError(f"not one of the types that can be: {', '.join(sorted(TRANSLATORS))}")
    if any(len(shape) > 4 for shape in (*layer.shapes, *layer.top_shapes)):
        raise UnsupportedError("more than 4 axes")
    return TRANSLATORS[layer.proto.type](layer)


# ---- Layers with weights ----


@dataclass(frozen=True)
class Kernels:
    """Where a layer with weights goes in ncnn, without its weights.

    Attributes:
        type: its name in ncnn.
        params: all but those about bias and codes.
        bias_id: of the parameter that says that it has a bias.
        groups: how many groups of channels; 1 for an InnerProduct.
    """

    type: str
    params: dict[int, Value]
    bias_id: int
    groups: int


def kernels(layer: Layer) -> Kernels:
    """Convolution, Deconvolution (with ``DepthWise`` behind it where there are groups) or InnerProduct."""
    n, size = outputs(layer.proto), layer.blobs[0].size
    if layer.proto.type == "InnerProduct":
        if canonical_axis(layer.proto.inner_product_param.axis, layer.shapes[0]) != 1:
            raise UnsupportedError("inner_product_param.axis is not 1")
        return Kernels("InnerProduct", {0: n, 2: size}, 1, 1)
    window = convolution_window(layer.proto.convolution_param, layer.shapes[0])
    if window.channel_axis != 1 or len(window.kernel) != 2:
        raise UnsupportedError("not over height and width (convolution_param.axis is not 1, or other shapes)")
    is_deconvolution = layer.proto.type == "Deconvolution"
    channels = layer.shapes[0][1]
    groups = layer.proto.convolution_param.group if is_deconvolution else channels // layer.blobs[0].shape[1]
    (kernel_h, kernel_w), (pad_h, pad_w) = window.kernel, window.pad
    (stride_h, stride_w), (dilation_h, dilation_w) = window.stride, window.dilation
    params: dict[int, Value] = {0: n, 1: kernel_w, 11: kernel_h, 2: dilation_w, 12: dilation_h}
    params |= {3: stride_w, 13: stride_h, 4: pad_w, 14: pad_h, 6: size}
    name = "Deconvolution" if is_deconvolution else "Convolution"
    if groups == 1:
        return Kernels(name, params, 5, groups)
    return Kernels(f"{name}DepthWise", {**params, 7: groups}, 5, groups)


@translator("Convolution", "DepthwiseConvolution", "ConvolutionDepthwise", "Deconvolution", "InnerProduct")
def with_weights(layer: Layer) -> list[Op]:
    """y = W * x + b."""
    found = kernels(layer)
    weights, *bias = layer.blobs
    op = layer.op(found.type, {**found.params, found.bias_id: len(bias)})
    op.weights = [tagged(to_kernels(layer.proto, weights)), *map(raw, bias)]
    return [op]


# ---- Per channel ----


@translator(*NORM_TYPES)
def batch_norm(layer: Layer) -> list[Op]:
    """y = a * x + b of stored statistics and, in forks, a scale and a shift."""
    a, b = scale_and_shift(layer.proto, layer.blobs)
    return [layer.op("Scale", {0: len(a), 1: 1}, map(raw, (a, b)))]


@translator("Scale")
def scale(layer: Layer) -> list[Op]:
    """y = x * s + b, s a blob of one number per channel, or a second bottom of such."""
    param = layer.proto.scale_param
    if len(layer.bottoms) == 1:
        _check_is_per_channel(layer, "scale_param", param.axis)
        s, *b = layer.blobs
        return [layer.op("Scale", {0: s.size, 1: len(b)}, map(raw, layer.blobs))]
    channels = layer.shapes[1][1:]
    starts_at = canonical_axis(param.axis, layer.shapes[0])
    if starts_at != 0 or param.bias_term or math.prod(channels) != layer.shapes[0][1]:
        raise UnsupportedError("a factor that is not one number per channel (scale_param.axis 0), or a bias")
    spread = layer.tops[0] + "_factor"
    reshape = Op(
        "Reshape", f"{layer.name}_factor", [layer.bottoms[1]], [spread], {0: 1, 1: 1, 2: math.prod(channels)}
    )
    return [reshape, Op("BinaryOp", layer.name, [layer.bottoms[0], spread], layer.tops, {0: 2})]


@translator("Bias")
def bias(layer: Layer) -> list[Op]:
    """y = x + b, b a blob of one number per channel."""
    if len(layer.bottoms) > 1:
        raise UnsupportedError("a second bottom")
    _check_is_per_channel(layer, "bias_param", layer.proto.bias_param.axis)
    [b] = layer.blobs  # ncnn's own Bias knows blobs of three axes only
    return [layer.op("Scale", {0: b.size, 1: 1}, [raw(np.ones_like(b)), raw(b)])]


def _check_is_per_channel(layer: Layer, field_name: str, axis: int) -> None:
    if canonical_axis(axis, layer.shapes[0]) != 1 or layer.blobs[0].shape != (layer.shapes[0][1],):
        raise UnsupportedError(f"not one number per channel ({field_name})")


# ---- Element by element ----


@translator("ReLU")
def relu(layer: Layer) -> list[Op]:
    """y = max(x, 0) + negative_slope * min(x, 0)."""
    return [layer.op("ReLU", {0: layer.proto.relu_param.negative_slope})]


@translator("PReLU")
def prelu(layer: Layer) -> list[Op]:
    """y = max(x, 0) + a * min(x, 0)."""
    return [layer.op("PReLU", {0: layer.blobs[0].size}, [raw(layer.blobs[0])])]


@translator("ELU")
def elu(layer: Layer) -> list[Op]:
    """y = x for x > 0, else alpha * (exp(x) - 1)."""
    return [layer.op("ELU", {0: layer.proto.elu_param.alpha})]


@translator("Sigmoid", "TanH", "AbsVal")
def same_name(layer: Layer) -> list[Op]:
    """What ncnn calls as Caffe does, without parameters."""
    return [layer.op(layer.proto.type)]


@translator("Swish")
def swish(layer: Layer) -> list[Op]:
    """y = x / (1 + exp(-x))."""
    if layer.proto.swish_param.beta != 1:
        raise UnsupportedError(f"swish_param.beta is {layer.proto.swish_param.beta:g}, not 1")
    return [layer.op("Swish")]


@translator("Exp")
def exp(layer: Layer) -> list[Op]:
    """y = base^(shift + scale * x), where a base of -1 is e."""
    param = layer.proto.exp_param
    return [layer.op("Exp", {0: param.base, 1: param.scale, 2: param.shift})]


@translator("Log")
def log(layer: Layer) -> list[Op]:
    """y = log(shift + scale * x) / log(base), where a base of -1 is e."""
    param = layer.proto.log_param
    return [layer.op("Log", {0: param.base, 1: param.scale, 2: param.shift})]


@translator("Power")
def power(layer: Layer) -> list[Op]:
    """y = (shift + scale * x)^power."""
    param = layer.proto.power_param
    return [layer.op("Power", {0: param.power, 1: param.scale, 2: param.shift})]


@translator("Clip")
def clip(layer: Layer) -> list[Op]:
    """y = min(max(x, min), max)."""
    return [layer.op("Clip", {0: layer.proto.clip_param.min, 1: layer.proto.clip_param.max})]


@translator("Threshold")
def threshold(layer: Layer) -> list[Op]:
    """y = 1 for x > threshold, else 0."""
    return [layer.op("Threshold", {0: layer.proto.threshold_param.threshold})]


@translator("Eltwise")
def eltwise(layer: Layer) -> list[Op]:
    """y = x1 * x2 * ..., c1 * x1 + c2 * x2 + ..., or max(x1, x2, ...); ncnn's numbers are Caffe's."""
    param = layer.proto.eltwise_param
    params: dict[int, Value] = {0: int(param.operation)}
    if param.coeff and param.operation == param.SUM:
        params[1] = list(param.coeff)
    return [layer.op("Eltwise", params)]


# ---- Windows ----


@translator("Pooling")
def pooling(layer: Layer) -> list[Op]:
    """The maximum or the average of each window.

    Caffe's average divides by the window as far as the padding reaches, ncnn's as far as the image does: so
    the padding becomes a layer of its own and counts as image. The padding behind is what Caffe's number of
    windows needs, for it rounds that number in its own way.
    """
    param = layer.proto.pooling_param
    is_average = param.pool == param.AVE
    if param.pool == param.STOCHASTIC or len(layer.tops) > 1:
        raise UnsupportedError("stochastic pooling, or one with a second top")
    if param.global_pooling:
        flat = layer.tops[0] + "_flat"
        pool = Op("Pooling", layer.name, layer.bottoms, [flat], {0: int(is_average), 4: 1})
        return [
            pool,
            Op("Reshape", f"{layer.name}_flat", [flat], layer.tops, {0: 1, 1: 1, 2: layer.shapes[0][1]}),
        ]
    (kernel_h, kernel_w), (stride_h, stride_w), (pad_h, pad_w) = pool_fields(param)
    (height, width), (rows, columns) = layer.shapes[0][2:], layer.top_shapes[0][2:]
    below = (rows - 1) * stride_h + kernel_h - height - pad_h
    right = (columns - 1) * stride_w + kernel_w - width - pad_w
    if is_average and (below >= kernel_h or right >= kernel_w):
        raise UnsupportedError("an average over a window behind the image")
    params: dict[int, Value] = {
        0: int(is_average),
        1: kernel_w,
        11: kernel_h,
        2: stride_w,
        12: stride_h,
        5: 1,
    }
    if not (is_average and (pad_h or pad_w)):
        sides = {3: pad_w, 13: pad_h, 14: max(0, right), 15: max(0, below)}
        return [layer.op("Pooling", {**params, **sides})]
    padded = layer.tops[0] + "_padded"
    sides = {0: pad_h, 1: pad_h, 2: pad_w, 3: pad_w}
    padding = Op("Padding", f"{layer.name}_padded", layer.bottoms, [padded], {**sides, 4: 0, 5: 0.0})
    behind = {14: max(0, right - pad_w), 15: max(0, below - pad_h)}
    return [padding, Op("Pooling", layer.name, [padded], layer.tops, {**params, 3: 0, 13: 0, **behind})]


def pool_fields(param: PoolingParameter) -> tuple[Shape, Shape, Shape]:
    """Kernel, stride and pad, each of height and width."""
    kernel = height_and_width(param, "kernel_size", "kernel_h", "kernel_w")
    return kernel, height_and_width(param, "stride"), height_and_width(param, "pad")


@translator("LRN")
def lrn(layer: Layer) -> list[Op]:
    """y = x * (k + alpha / size * sum of squares)^-beta; within a channel k is 1."""
    param = layer.proto.lrn_param
    within = param.norm_region == param.WITHIN_CHANNEL
    params: dict[int, Value] = {0: int(within), 1: param.local_size, 2: param.alpha, 3: param.beta}
    return [layer.op("LRN", {**params, 4: 1.0 if within else param.k})]


@translator("Softmax")
def softmax(layer: Layer) -> list[Op]:
    """y = exp(x) / sum of exp(x) along the axis."""
    return [layer.op("Softmax", {0: layer.axis(layer.proto.softmax_param.axis), 1: 1})]


# ---- Shapes and places ----


@translator("Concat")
def concat(layer: Layer) -> list[Op]:
    """The bottoms one behind the other along the axis."""
    param = layer.proto.concat_param
    axis = layer.axis(param.concat_dim if param.HasField("concat_dim") else param.axis)
    return [layer.op("Concat", {0: axis})]


@translator("Slice")
def slice_(layer: Layer) -> list[Op]:
    """Consecutive parts of x along the axis."""
    param = layer.proto.slice_param
    axis = layer.axis(param.slice_dim if param.HasField("slice_dim") else param.axis)
    return [layer.op("Slice", {0: [shape[axis + 1] for shape in layer.top_shapes], 1: axis})]


@translator("Dropout", "Split")
def passed_through(layer: Layer) -> list[Op]:
    """Every top is x."""
    return [layer.op("Split")]


@translator("Flatten", "Reshape")
def reshape(layer: Layer) -> list[Op]:
    """The same values in another shape."""
    if layer.top_shapes[0][:1] != (1,) or len(layer.top_shapes[0]) < 2:
        raise UnsupportedError("it works along the batch axis, which blobs of ncnn do not have")
    *outer, width = layer.top_shapes[0][1:]
    params: dict[int, Value] = {0: width}
    params |= dict(zip((1, 2), reversed(outer), strict=False))
    return [layer.op("Reshape", params)]


@translator("Crop")
def crop(layer: Layer) -> list[Op]:
    """x cut to the second bottom's sizes from the axis on, starting at the offsets."""
    param = layer.proto.crop_param
    if len(layer.shapes[0]) != 4:
        raise UnsupportedError("not over channels, height and width")
    axis = layer.axis(param.axis)
    offsets = list(param.offset) or [0]
    starts = [0] * axis + (offsets * (3 - axis) if len(offsets) == 1 else offsets)
    sizes = layer.top_shapes[0][1:]
    params: dict[int, Value] = dict(zip((2, 1, 0, 5, 4, 3), (*starts, *sizes), strict=True))
    return [Op("Crop", layer.name, layer.bottoms[:1], layer.tops, params)]
