"""Shapes of what each Caffe layer type makes and of its blobs: one rule per type, found by the type's name.

A rule gets the layer and its bottoms' shapes and gives a ``LayerShapes``; what Caffe would refuse raises
``ShapeError``. The formulas are those of ``LayerSetUp`` and ``Reshape`` of Caffe 1.0's layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise

from quantize.arrays import Shape
from quantize.caffenet.norms import has_scale_bias
from quantize.caffenet.schema import ConvolutionParameter, LayerParameter, PoolingParameter


class ShapeError(Exception):
    """The layer cannot have these bottoms or these parameters; the text says why."""


@dataclass(frozen=True)
class LayerShapes:
    """What a layer makes of its bottoms.

    Attributes:
        tops: the shapes of its tops.
        params: the shapes of its blobs.
        macs: multiply-accumulates of one run.
    """

    tops: Sequence[Shape]
    params: Sequence[Shape] = ()
    macs: int = 0


Rule = Callable[[LayerParameter, list[Shape]], LayerShapes]


@dataclass(frozen=True)
class _Registered:
    rule: Rule
    least_bottoms: int
    most_bottoms: int


_MANY = 1 << 30
_rules: dict[str, _Registered] = {}


def shape_rule(*types: str, bottoms: int | tuple[int, int] = 1) -> Callable[[Rule], Rule]:
    """Register the rule of the layer types ``types``; ``bottoms`` is their number, or (least, most)."""
    least, most = (bottoms, bottoms) if isinstance(bottoms, int) else bottoms

    def register(rule: Rule) -> Rule:
        _rules.update(dict.fromkeys(types, _Registered(rule, least, most)))
        return rule

    return register


def has_rule(type_name: str) -> bool:
    """Whether layers of this type have a shape rule."""
    return type_name in _rules


def known_types() -> Collection[str]:
    """The types that have a shape rule."""
    return _rules.keys()


def layer_shapes(layer: LayerParameter, bottoms: list[Shape]) -> LayerShapes:
    """Apply the rule of the layer's type, which must have one.

    Raises:
        ShapeError: a wrong number of bottoms, or what the rule refuses.
    """
    registered = _rules[layer.type]
    if not registered.least_bottoms <= len(bottoms) <= registered.most_bottoms:
        raise ShapeError(f"{len(bottoms)} bottoms; the type does not take so many or so few")
    return registered.rule(layer, bottoms)


def require(condition: bool, message: str) -> None:
    """Raise ShapeError with a message unless a condition holds."""
    if not condition:
        raise ShapeError(message)


def canonical_axis(axis: int, shape: Shape) -> int:
    """``Blob::CanonicalAxisIndex``: negative axes count from the end."""
    require(-len(shape) <= axis < len(shape), f"axis {axis} is out of range for the shape {shape}")
    return axis % len(shape)


# ---- Element by element ----


@shape_rule(
    *(
        "ReLU",
        "ELU",
        "Sigmoid",
        "TanH",
        "AbsVal",
        "Exp",
        "Log",
        "Power",
        "BNLL",
        "Clip",
        "Threshold",
        "Swish",
    ),
    *("Dropout", "ActQuantize", "Quant"),
    *("ReLU6", "HardSigmoid", "HardSwish", "Mish"),
)
def _elementwise(_layer: LayerParameter, bottoms: list[Shape]) -> LayerShapes:
    return LayerShapes(bottoms)


@shape_rule("Split")
def _split(layer: LayerParameter, bottoms: list[Shape]) -> LayerShapes:
    return LayerShapes(bottoms * len(layer.top))


@shape_rule("Softmax")
def _softmax(layer: LayerParameter, bottoms: list[Shape]) -> LayerShapes:
    canonical_axis(layer.softmax_param.axis, bottoms[0])
    return LayerShapes(bottoms)


@shape_rule("LRN")
def _lrn(layer: LayerParameter, bottoms: list[Shape]) -> LayerShapes:
    require(len(bottoms[0]) == 4, f"the bottom's shape is {bottoms[0]}; four axes are needed")
    require(
        layer.lrn_param.local_size % 2 == 1,
        f"lrn_param.local_size is {layer.lrn_param.local_size}; must be odd",
    )
    return LayerShapes(bottoms)


@shape_rule("MVN")
def _mvn(_layer: LayerParameter, bottoms: list[Shape]) -> LayerShapes:
    require(len(bottoms[0]) <= 4, f"the bottom's shape is {bottoms[0]}; at most four axes are possible")
    return LayerShapes(bottoms)


@shape_rule("PReLU")
def _prelu(layer: LayerParameter, bottoms: list[Shape]) -> LayerShapes:
    """One slope per channel, or one in all."""
    require(len(bottoms[0]) >= 2, f"the bottom's shape is {bottoms[0]}; a channel axis is needed")
    slopes = () if layer.prelu_param.channel_shared else (bottoms[0][1],)
    return LayerShapes(bottoms, [slopes])


@shape_rule("BatchNorm")
def _batch_norm(layer: LayerParameter, bottoms: list[Shape]) -> LayerShapes:
    """Mean and variance, both multiplied by the third blob; NVCaffe may have scale and bias behind them."""
    channels = 1 if len(bottoms[0]) == 1 else bottoms[0][1]
    scaled = [(channels,), (channels,)] if has_scale_bias(layer) else []
    return LayerShapes(bottoms, [(channels,), (channels,), (1,), *scaled])


@shape_rule("Scale", bottoms=(1, 2))
def _scale(layer: LayerParameter, bottoms: list[Shape]) -> LayerShapes:
    """x * scale (+ bias): the scale is a blob, or the second bottom."""
    param = layer.scale_param
    factor = _broadcast(bottoms, param.axis, param.num_axes)
    params = [factor] if len(bottoms) == 1 else []
    return LayerShapes(bottoms[:1], params + [factor] * param.bias_term)


@shape_rule("Bias", bottoms=(1, 2))
def _bias(layer: LayerParameter, bottoms: list[Shape]) -> LayerShapes:
    """x + bias: the bias is a blob, or the second bottom."""
    term = _broadcast(bottoms, layer.bias_param.axis, layer.bias_param.num_axes)
    return LayerShapes(bottoms[:1], [term] if len(bottoms) == 1 else [])


def _broadcast(bottoms: list[Shape], axis: int, num_axes: int) -> Shape:
    """The shape of what is spread over bottom 0 from ``axis`` on."""
    shape = bottoms[0]
    if len(bottoms) == 2:
        start = canonical_axis(axis, shape) if bottoms[1] else 0
        require(
            shape[start : start + len(bottoms[1])] == bottoms[1],
            f"the second bottom's shape {bottoms[1]} does not fit the first's {shape} from axis {start} on",
        )
        return bottoms[1]
    start = canonical_axis(axis, shape)
    require(num_axes >= -1, f"num_axes is {num_axes}; -1 or more is possible")
    stop = len(shape) if num_axes == -1 else start + num_axes
    require(stop <= len(shape), f"axis {axis} and num_axes {num_axes} reach beyond the shape {shape}")
    return shape[start:stop]


@shape_rule("Eltwise", bottoms=(2, _MANY))
def _eltwise(layer: LayerParameter, bottoms: list[Shape]) -> LayerShapes:
    require(len(set(bottoms)) == 1, f"the bottoms' shapes differ: {_list(bottoms)}")
    coefficients = len(layer.eltwise_param.coeff)
    require(
        coefficients in (0, len(bottoms)),
        f"{coefficients} coeff for {len(bottoms)} bottoms; give one for each",
    )
    require(
        not (coefficients and layer.eltwise_param.operation == layer.eltwise_param.PROD),
        "coeff is possible for SUM only",
    )
    return LayerShapes(bottoms[:1])


def _list(shapes: Sequence[Shape]) -> str:
    return ", ".join(map(str, shapes[:8])) + (", ..." if len(shapes) > 8 else "")


# ---- Windows ----


@dataclass(frozen=True)
class Window:
    """Of a convolution: per spatial axis."""

    channel_axis: int
    kernel: Shape
    stride: Shape
    pad: Shape
    dilation: Shape

    def extents(self) -> list[int]:
        return [d * (k - 1) + 1 for k, d in zip(self.kernel, self.dilation, strict=True)]

    def convolved(self, sizes: Shape) -> Shape:
        """floor((size + 2 pad - extent) / stride) + 1"""
        out = []
        for size, extent, stride, pad in zip(sizes, self.extents(), self.stride, self.pad, strict=True):
            require(size + 2 * pad >= extent, f"a kernel over {extent} pixels on {size} with pad {pad}")
            out.append((size + 2 * pad - extent) // stride + 1)
        return tuple(out)

    def deconvolved(self, sizes: Shape) -> Shape:
        """stride * (size - 1) + extent - 2 pad"""
        axes = zip(sizes, self.extents(), self.stride, self.pad, strict=True)
        return tuple(stride * (size - 1) + extent - 2 * pad for size, extent, stride, pad in axes)


def convolution_window(param: ConvolutionParameter, shape: Shape) -> Window:
    channel_axis = canonical_axis(param.axis, shape)
    axes = len(shape) - channel_axis - 1
    window = Window(
        channel_axis,
        kernel=_per_axis(param, "kernel_size", "kernel_h", "kernel_w", axes, None),
        stride=_per_axis(param, "stride", "stride_h", "stride_w", axes, 1),
        pad=_per_axis(param, "pad", "pad_h", "pad_w", axes, 0),
        dilation=_spread("dilation", list(param.dilation), axes, 1),
    )
    for name in ("kernel", "stride", "dilation"):
        require(all(size > 0 for size in getattr(window, name)), f"convolution_param: a {name} of 0")
    return window


def _per_axis(
    param: ConvolutionParameter, name: str, h: str, w: str, axes: int, default: int | None
) -> Shape:
    """The value for each spatial axis: of the repeated field, or of the _h and _w fields."""
    values = list(getattr(param, name))
    if not (param.HasField(h) or param.HasField(w)):
        return _spread(name, values, axes, default)
    require(axes == 2, f"convolution_param: {h} and {w} are for two spatial axes; here are {axes}")
    require(not values, f"convolution_param: {name} as well as {h} or {w}; give one kind only")
    return getattr(param, h), getattr(param, w)


def _spread(name: str, values: list[int], axes: int, default: int | None) -> Shape:
    if not values and default is not None:
        values = [default]
    require(
        len(values) in (1, axes),
        f"convolution_param: {len(values)} {name} for {axes} spatial axes; give 1 or {axes}",
    )
    return tuple(values * axes) if len(values) == 1 else tuple(values)


@shape_rule("Convolution", "DepthwiseConvolution", "ConvolutionDepthwise", bottoms=(1, _MANY))
def _convolution(layer: LayerParameter, bottoms: list[Shape]) -> LayerShapes:
    """Kernels (num_output, channels / group, ...) and the bias (num_output,).

    The forks' depthwise types have as many groups as channels unless ``group`` says otherwise.
    """
    param, shape = layer.convolution_param, _same(bottoms)
    window = convolution_window(param, shape)
    channels, spatial = shape[window.channel_axis], shape[window.channel_axis + 1 :]
    depthwise = layer.type != "Convolution" and not param.HasField("group")
    group = channels if depthwise else param.group
    _check_groups(param.num_output, channels, group)
    out = window.convolved(spatial)
    top = (*shape[: window.channel_axis], param.num_output, *out)
    kernels = (param.num_output, channels // group, *window.kernel)
    params = [kernels, (param.num_output,)] if param.bias_term else [kernels]
    macs = math.prod(top) * math.prod(kernels[1:]) * len(bottoms)
    return LayerShapes([top] * len(bottoms), params, macs)


@shape_rule("Deconvolution", bottoms=(1, _MANY))
def _deconvolution(layer: LayerParameter, bottoms: list[Shape]) -> LayerShapes:
    """Kernels (channels, num_output / group, ...) and the bias (num_output,)."""
    param, shape = layer.convolution_param, _same(bottoms)
    window = convolution_window(param, shape)
    channels, spatial = shape[window.channel_axis], shape[window.channel_axis + 1 :]
    _check_groups(param.num_output, channels, param.group)
    top = (*shape[: window.channel_axis], param.num_output, *window.deconvolved(spatial))
    kernels = (channels, param.num_output // param.group, *window.kernel)
    params = [kernels, (param.num_output,)] if param.bias_term else [kernels]
    macs = math.prod(shape) * math.prod(kernels[1:]) * len(bottoms)
    return LayerShapes([top] * len(bottoms), params, macs)


@shape_rule("Im2col", bottoms=(1, _MANY))
def _im2col(layer: LayerParameter, bottoms: list[Shape]) -> LayerShapes:
    shape = _same(bottoms)
    window = convolution_window(layer.convolution_param, shape)
    axis = window.channel_axis
    columns = shape[axis] * math.prod(window.kernel)
    top = (*shape[:axis], columns, *window.convolved(shape[axis + 1 :]))
    return LayerShapes([top] * len(bottoms))


def _same(bottoms: list[Shape]) -> Shape:
    require(len(set(bottoms)) == 1, f"the bottoms' shapes differ: {_list(bottoms)}")
    return bottoms[0]


def _check_groups(num_output: int, channels: int, group: int) -> None:
    require(num_output > 0, "convolution_param.num_output is missing or 0")
    require(
        group > 0 and channels % group == 0 and num_output % group == 0,
        f"{channels} channels and num_output {num_output} cannot be parted into {group} groups",
    )


@shape_rule("Pooling")
def _pooling(layer: LayerParameter, bottoms: list[Shape]) -> LayerShapes:
    """Sizes are rounded up; MAX has the mask of maxima as a second top."""
    top = _pooled(layer.pooling_param, bottoms[0])
    return LayerShapes([top] * len(layer.top))


def _pooled(param: PoolingParameter, shape: Shape) -> Shape:
    """ceil((size + 2 pad - kernel) / stride) + 1; with padding, a window that starts outside is dropped."""
    require(len(shape) == 4, f"the bottom's shape is {shape}; four axes are needed")
    sizes = shape[2:]
    stride = height_and_width(param, "stride")
    pad = height_and_width(param, "pad")
    if param.global_pooling:
        has_kernel = param.HasField("kernel_size") or param.HasField("kernel_h") or param.HasField("kernel_w")
        require(not has_kernel, "pooling_param: global_pooling takes no kernel size")
        require(
            stride == (1, 1) and pad == (0, 0), "pooling_param: global_pooling takes no stride and no pad"
        )
        return (*shape[:2], 1, 1)
    kernel = height_and_width(param, "kernel_size", "kernel_h", "kernel_w")
    require(min(kernel) > 0, "pooling_param: the kernel size is missing or 0")
    require(min(stride) > 0, "pooling_param: a stride of 0")
    require(
        pad[0] < kernel[0] and pad[1] < kernel[1],
        f"pooling_param: pad {pad} must be less than kernel {kernel}",
    )
    floor = _rounds_down(param)
    out = []
    for size, k, s, p in zip(sizes, kernel, stride, pad, strict=True):
        reach = size + 2 * p - k
        count = (reach // s if floor else -(-reach // s)) + 1
        if pad != (0, 0) and (count - 1) * s >= size + p:
            count -= 1
        require(count > 0, f"pooling_param: a kernel of {k} on {size} pixels with stride {s} and pad {p}")
        out.append(count)
    return (*shape[:2], *out)


def _rounds_down(param: PoolingParameter) -> bool:
    """``round_mode: FLOOR``, or as many forks have it ``ceil_mode: false``."""
    floor = param.round_mode == param.FLOOR
    if not param.HasField("ceil_mode"):
        return floor
    require(
        not param.HasField("round_mode") or floor != param.ceil_mode,
        "pooling_param: round_mode and ceil_mode say different things; give one of them",
    )
    return not param.ceil_mode


def height_and_width(param: PoolingParameter, name: str, h: str = "", w: str = "") -> Shape:
    """The value for height and width: of the one field, or of the _h and _w fields."""
    h, w = h or f"{name}_h", w or f"{name}_w"
    has_h, has_w = param.HasField(h), param.HasField(w)
    if not (has_h or has_w):
        return (getattr(param, name),) * 2
    require(has_h and has_w, f"pooling_param: give {h} and {w} both")
    require(not param.HasField(name), f"pooling_param: {name} as well as {h} and {w}; give one kind only")
    return getattr(param, h), getattr(param, w)


@shape_rule("SPP")
def _spp(layer: LayerParameter, bottoms: list[Shape]) -> LayerShapes:
    """Level i pools into 2^i x 2^i bins; all levels are flattened and strung together (``SPPLayer``)."""
    param, shape = layer.spp_param, bottoms[0]
    require(len(shape) == 4, f"the bottom's shape is {shape}; four axes are needed")
    require(
        0 < param.pyramid_height <= 16,
        f"spp_param.pyramid_height is {param.pyramid_height}; 1 to 16 is possible",
    )
    levels = [_pooled(spp_pooling(level, shape), shape) for level in range(param.pyramid_height)]
    if len(levels) == 1:
        return LayerShapes(levels)
    return LayerShapes([(shape[0], sum(math.prod(level[1:]) for level in levels))])


def spp_pooling(level: int, shape: Shape) -> PoolingParameter:
    bins = 2**level
    kernel = [-(-size // bins) for size in shape[2:]]
    pad = [(k * bins - size + 1) // 2 for k, size in zip(kernel, shape[2:], strict=True)]
    return PoolingParameter(
        kernel_h=kernel[0],
        kernel_w=kernel[1],
        stride_h=kernel[0],
        stride_w=kernel[1],
        pad_h=pad[0],
        pad_w=pad[1],
    )


# ---- Matrices ----


@shape_rule("InnerProduct")
def _inner_product(layer: LayerParameter, bottoms: list[Shape]) -> LayerShapes:
    """Weights (num_output, k), or (k, num_output) with transpose; k is all from ``axis`` on."""
    param, shape = layer.inner_product_param, bottoms[0]
    require(param.num_output > 0, "inner_product_param.num_output is missing or 0")
    axis = canonical_axis(param.axis, shape)
    size = math.prod(shape[axis:])
    top = (*shape[:axis], param.num_output)
    weights = (size, param.num_output) if param.transpose else (param.num_output, size)
    params = [weights, (param.num_output,)] if param.bias_term else [weights]
    return LayerShapes([top], params, math.prod(top) * size)


@shape_rule("Embed")
def _embed(layer: LayerParameter, bottoms: list[Shape]) -> LayerShapes:
    """Rows of a table (input_dim, num_output)."""
    param = layer.embed_param
    require(param.num_output > 0 and param.input_dim > 0, "embed_param needs num_output and input_dim")
    table = (param.input_dim, param.num_output)
    params = [table, (param.num_output,)] if param.bias_term else [table]
    return LayerShapes([(*bottoms[0], param.num_output)], params)


# ---- Shapes and places ----


@shape_rule("Concat", bottoms=(1, _MANY))
def _concat(layer: LayerParameter, bottoms: list[Shape]) -> LayerShapes:
    param = layer.concat_param
    require(
        not (param.HasField("axis") and param.HasField("concat_dim")),
        "concat_param: axis as well as concat_dim",
    )
    first = bottoms[0]
    axis = canonical_axis(param.concat_dim if param.HasField("concat_dim") else param.axis, first)
    others = {(*shape[:axis], *shape[axis + 1 :], len(shape)) for shape in bottoms}
    require(len(others) == 1, f"the bottoms' shapes differ beyond axis {axis}: {_list(bottoms)}")
    return LayerShapes([(*first[:axis], sum(shape[axis] for shape in bottoms), *first[axis + 1 :])])


@shape_rule("Slice")
def _slice(layer: LayerParameter, bottoms: list[Shape]) -> LayerShapes:
    """Parts between the slice_points, or equal parts."""
    param, shape, parts = layer.slice_param, bottoms[0], len(layer.top)
    require(
        not (param.HasField("axis") and param.HasField("slice_dim")), "slice_param: axis as well as slice_dim"
    )
    axis = canonical_axis(param.slice_dim if param.HasField("slice_dim") else param.axis, shape)
    points = list(param.slice_point)
    if points:
        require(len(points) == parts - 1, f"slice_param: {len(points)} slice_point for {parts} tops")
        edges = [0, *points, shape[axis]]
    else:
        require(
            parts > 0 and shape[axis] % parts == 0,
            f"axis {axis} of {shape} cannot be sliced into {parts} tops",
        )
        edges = [i * (shape[axis] // parts) for i in range(parts + 1)]
    require(
        all(a < b for a, b in pairwise(edges)),
        f"slice_point {points} does not rise within {shape}",
    )
    return LayerShapes([(*shape[:axis], b - a, *shape[axis + 1 :]) for a, b in pairwise(edges)])


@shape_rule("Flatten")
def _flatten(layer: LayerParameter, bottoms: list[Shape]) -> LayerShapes:
    shape = bottoms[0]
    start = canonical_axis(layer.flatten_param.axis, shape)
    end = canonical_axis(layer.flatten_param.end_axis, shape)
    require(start <= end, f"flatten_param: axis {start} is behind end_axis {end}")
    return LayerShapes([(*shape[:start], math.prod(shape[start : end + 1]), *shape[end + 1 :])])


@shape_rule("Reshape")
def _reshape(layer: LayerParameter, bottoms: list[Shape]) -> LayerShapes:
    """``num_axes`` axes from ``axis`` on become shape.dim: 0 copies, one -1 takes what is left."""
    param, shape = layer.reshape_param, bottoms[0]
    start = param.axis if param.axis >= 0 else len(shape) + param.axis + 1
    require(
        0 <= start <= len(shape), f"reshape_param.axis {param.axis} is out of range for the shape {shape}"
    )
    require(param.num_axes >= -1, f"reshape_param.num_axes is {param.num_axes}; -1 or more is possible")
    stop = len(shape) if param.num_axes == -1 else start + param.num_axes
    require(stop <= len(shape), f"reshape_param: axis and num_axes reach beyond the shape {shape}")
    dims = list(param.shape.dim)
    require(all(dim >= -1 for dim in dims), f"reshape_param: a dim below -1 in {dims[:8]}")
    require(dims.count(-1) <= 1, "reshape_param: more than one dim of -1")
    for index, dim in enumerate(dims):
        if dim == 0:
            require(
                start + index < len(shape), f"reshape_param: dim {index} copies an axis that {shape} lacks"
            )
            dims[index] = shape[start + index]
    if -1 in dims:
        known = (
            math.prod(shape[:start]) * math.prod(dim for dim in dims if dim != -1) * math.prod(shape[stop:])
        )
        require(math.prod(shape) % known == 0, f"reshape_param: {shape} cannot be parted into {dims[:8]}")
        dims[dims.index(-1)] = math.prod(shape) // known
    top = (*shape[:start], *dims, *shape[stop:])
    require(math.prod(top) == math.prod(shape), f"reshape_param: {shape} and {top[:8]} differ in size")
    return LayerShapes([top])


@shape_rule("Tile")
def _tile(layer: LayerParameter, bottoms: list[Shape]) -> LayerShapes:
    param, shape = layer.tile_param, bottoms[0]
    axis = canonical_axis(param.axis, shape)
    require(param.tiles > 0, "tile_param.tiles is missing or not positive")
    return LayerShapes([(*shape[:axis], shape[axis] * param.tiles, *shape[axis + 1 :])])


@shape_rule("Reduction")
def _reduction(layer: LayerParameter, bottoms: list[Shape]) -> LayerShapes:
    """All axes from ``axis`` on become one number."""
    return LayerShapes([bottoms[0][: canonical_axis(layer.reduction_param.axis, bottoms[0])]])


@shape_rule("ArgMax")
def _argmax(layer: LayerParameter, bottoms: list[Shape]) -> LayerShapes:
    """(N, 1 or 2, top_k, 1...) over all but the batch; with ``axis``, top_k in that axis."""
    param, shape = layer.argmax_param, bottoms[0]
    if param.HasField("axis"):
        axis = canonical_axis(param.axis, shape)
        size = shape[axis]
        top: Shape = (*shape[:axis], param.top_k, *shape[axis + 1 :])
    else:
        size = math.prod(shape[1:])
        top = (shape[0], 2 if param.out_max_val else 1, param.top_k, *[1] * (len(shape) - 3))
    require(1 <= param.top_k <= size, f"argmax_param.top_k is {param.top_k} of {size} values")
    return LayerShapes([top])


@shape_rule("BatchReindex", bottoms=2)
def _batch_reindex(_layer: LayerParameter, bottoms: list[Shape]) -> LayerShapes:
    require(len(bottoms[1]) == 1, f"the second bottom's shape is {bottoms[1]}; one axis is needed")
    return LayerShapes([(*bottoms[1], *bottoms[0][1:])])


@shape_rule("Crop", bottoms=2)
def _crop(layer: LayerParameter, bottoms: list[Shape]) -> LayerShapes:
    """Bottom 0 cut to the sizes of bottom 1 from ``axis`` on."""
    shape, like = bottoms
    axis = canonical_axis(layer.crop_param.axis, shape)
    require(len(like) == len(shape), f"the bottoms' shapes {shape} and {like} differ in axes")
    offsets = list(layer.crop_param.offset) or [0]
    if len(offsets) == 1:
        offsets *= len(shape) - axis
    require(
        len(offsets) == len(shape) - axis, f"crop_param: {len(offsets)} offset for {len(shape) - axis} axes"
    )
    require(
        all(o + b <= a for o, a, b in zip(offsets, shape[axis:], like[axis:], strict=True)),
        f"crop_param: {like} at offset {offsets} does not fit into {shape}",
    )
    return LayerShapes([(*shape[:axis], *like[axis:])])


@shape_rule("Silence", bottoms=(1, _MANY))
def _silence(_layer: LayerParameter, _bottoms: list[Shape]) -> LayerShapes:
    return LayerShapes([])


# ---- Sources ----


@shape_rule("Input", bottoms=0)
def _input(layer: LayerParameter, _bottoms: list[Shape]) -> LayerShapes:
    """One shape for all tops or one for each."""
    return LayerShapes(_for_each_top(layer, [tuple(shape.dim) for shape in layer.input_param.shape]))


@shape_rule("DummyData", bottoms=0)
def _dummy_data(layer: LayerParameter, _bottoms: list[Shape]) -> LayerShapes:
    param = layer.dummy_data_param
    shapes: list[Shape] = [tuple(shape.dim) for shape in param.shape]
    if not shapes:
        counts = {len(param.num), len(param.channels), len(param.height), len(param.width)}
        require(len(counts) == 1, "dummy_data_param: differing numbers of num, channels, height and width")
        shapes = list(zip(param.num, param.channels, param.height, param.width, strict=True))
    return LayerShapes(_for_each_top(layer, shapes))


@shape_rule("MemoryData", bottoms=0)
def _memory_data(layer: LayerParameter, _bottoms: list[Shape]) -> LayerShapes:
    param = layer.memory_data_param
    images = (param.batch_size, param.channels, param.height, param.width)
    return LayerShapes([images, (param.batch_size,)][: len(layer.top)])


@shape_rule("Parameter", bottoms=0)
def _parameter(layer: LayerParameter, _bottoms: list[Shape]) -> LayerShapes:
    shape = tuple(layer.parameter_param.shape.dim)
    return LayerShapes([shape], [shape])


def _for_each_top(layer: LayerParameter, shapes: list[Shape]) -> list[Shape]:
    require(
        len(shapes) in (1, len(layer.top)),
        f"{len(shapes)} shapes for {len(layer.top)} tops; give one, or one for each",
    )
    return shapes * len(layer.top) if len(shapes) == 1 else shapes


# ---- Measures ----


@shape_rule("Accuracy", bottoms=2)
def _accuracy(layer: LayerParameter, bottoms: list[Shape]) -> LayerShapes:
    """The share of right answers, and per class as a second top."""
    axis = canonical_axis(layer.accuracy_param.axis, bottoms[0])
    return LayerShapes([(), (bottoms[0][axis],)][: len(layer.top)])


@shape_rule("SoftmaxWithLoss", bottoms=(2, 3))
def _softmax_loss(layer: LayerParameter, bottoms: list[Shape]) -> LayerShapes:
    """The loss, and the probabilities as a second top."""
    return LayerShapes([(), bottoms[0]][: max(1, len(layer.top))])


@shape_rule(
    *("EuclideanLoss", "HingeLoss", "SigmoidCrossEntropyLoss", "MultinomialLogisticLoss", "InfogainLoss"),
    *("ContrastiveLoss",),
    bottoms=(2, 3),
)
def _loss(layer: LayerParameter, _bottoms: list[Shape]) -> LayerShapes:
    return LayerShapes([()] * max(1, min(1, len(layer.top))))
