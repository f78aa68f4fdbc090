"""NAME.param and NAME.bin: the net for ncnn, with our weights in int8 and our steps.

A layer in integers has the codes Q as int8 weights, 1 / scale per output channel (it may be negative) and
1 / step of what it reads, and the bias as floats (``int8_scale_term`` 2; in a ConvolutionDepthWise 1). ncnn
rounds what such a layer reads to codes, unless they are codes already: of a Quantize layer, or of a
convolution that makes codes of its own outputs (100 more). It clamps codes at -127 and 127.

What reads a quantizer's values in float gets codes times step (Cast and BinaryOp): ncnn's Dequantize wants
int32. A convolution with groups of several outputs has one weight scale per group in ncnn; so it has scale 1,
and a Scale layer behind it does the rest.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np

from quantize.caffenet import LayerParameter
from quantize.caffenet.quantized import Quantizer, read_quantizer
from quantize.caffenet.strings import to_bytes
from quantize.errors import InputError
from quantize.exports.integers import IntegerLayer, IntegerNet, whole_codes
from quantize.exports.ncnn_layers import (
    Layer,
    Op,
    UnsupportedError,
    Value,
    kernels,
    raw,
    tagged_codes,
    translate,
    word,
)
from quantize.exports.target import Exported

_MAGIC = "7767517"
_HIGHEST_CODE = 127
_MOST_AXES = 3
_MOST = float(np.finfo(np.float32).max)
_ONE_PER_GROUP, _SEPARATE = 1, 2
"""Values of ``int8_scale_term``: weight scales for each group, or each output."""
_SCALE_TERM, _ACTIVATION, _ACTIVATION_PARAMS = 8, 9, 10  # ids
_RELU, _CLIP = 1, 3  # activations
_MULTIPLY = 2
_FLOAT32, _INT8 = 1, 3  # what Cast knows
_MAKING_CODES = {"Convolution": 100 + _SEPARATE, "ConvolutionDepthWise": 100 + _ONE_PER_GROUP}
"""What can make codes of its outputs, and the ``int8_scale_term`` that says so."""
_FUSING = (*_MAKING_CODES, "Deconvolution", "DeconvolutionDepthWise", "InnerProduct")
"""What can keep its outputs within limits."""

Limits = tuple[float, float]


def export_ncnn(net: IntegerNet, name: str) -> Exported:
    """Make NAME.param, NAME.bin and NAME.table.

    The table is for ncnn's own tool: ``caffe2ncnn`` of the plain Caffe pair, then ``ncnn2int8`` with it.

    Args:
        net: the net.
        name: of the files.

    Raises:
        InputError: ncnn has no such layer or no such codes.
    """
    writer = _Writer(net)
    writer.write()
    param, weights = writer.files()
    files = {f"{name}.param": param, f"{name}.bin": weights, f"{name}.table": to_bytes(_table(writer))}
    return Exported(files, writer.in_float)


@dataclass
class _Writer:
    """What is written, layer by layer.

    Attributes:
        net: the net.
        ops: the layers of ncnn.
        in_float: the layers with weights that stay in float, and why.
        integers: those that run in integers, with whole codes.
        names: of blobs, in ncnn.
        codes: by blob of ncnn the one that has its codes.
        limits: by layer of ncnn what it keeps its outputs within.
        readers: by blob of ncnn how many layers read it, the user included.
        grouped: those in integers whose weight scales are in a layer of their own.
    """

    net: IntegerNet
    ops: list[Op] = field(default_factory=list)
    in_float: dict[str, str] = field(default_factory=dict)
    integers: dict[str, IntegerLayer] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    codes: dict[str, str] = field(default_factory=dict)
    limits: dict[str, Limits] = field(default_factory=dict)
    readers: Counter[str] = field(default_factory=Counter)
    grouped: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Name the blobs and decide which layers run in integers."""
        self.in_float |= self.net.floats
        taken: set[str] = set()
        self.names = {blob: _unique(blob, taken) for blob in self.net.inputs}
        for layer in self.net.net.layer:
            for top in layer.top:
                same = self._is_nothing(layer)
                self.names[top] = self.names[layer.bottom[0]] if same else _unique(top, taken)
            if not self._is_nothing(layer):
                self.readers.update(self.names[bottom] for bottom in layer.bottom)
        self.readers.update(self.names[output] for output in self.net.outputs)
        for layer in self.net.net.layer:
            if read_quantizer(layer) is not None:
                _check(layer, self.net.quantizers[layer.top[0]])
            elif layer.name in self.net.layers and layer.name not in self.net.floats:
                self._sort(layer, whole_codes(self.net.layers[layer.name]))

    def _sort(self, layer: LayerParameter, found: IntegerLayer) -> None:
        if layer.type == "Deconvolution":
            self.in_float[layer.name] = "ncnn has no Deconvolution in integers"
        elif not -_HIGHEST_CODE - 1 <= found.codes.min() <= found.codes.max() <= _HIGHEST_CODE:
            self.in_float[layer.name] = f"its weights reach {abs(found.codes).max():.0f}, int8 ends at 127"
        else:
            self.integers[layer.name] = _without_vanishing(found)

    def write(self) -> None:
        """Write all layers.

        Raises:
            InputError: ncnn cannot do what one does.
        """
        for blob, shape in self.net.inputs.items():
            if not 1 <= len(shape) <= _MOST_AXES:
                raise InputError(f"input {blob!r}: shape {shape}; blobs of ncnn have 1 to {_MOST_AXES} axes")
            sizes = dict(zip((0, 1, 2), reversed(shape), strict=False))
            self.ops.append(Op("Input", self.names[blob], [], [self.names[blob]], dict(sizes)))
        for layer in self.net.net.layer:
            with _named(layer):
                self._write(layer)

    def _write(self, layer: LayerParameter) -> None:
        if self._is_nothing(layer):
            return
        if read_quantizer(layer) is not None:
            self._quantize(layer, self.net.quantizers[layer.top[0]])
        elif layer.name in self.integers:
            self._compute(layer, self.integers[layer.name])
        else:
            limits = _limits(layer)
            if limits is None or not self._limit(layer.bottom[0], self.names[layer.top[0]], limits):
                self.ops += translate(self._seen(layer))

    def _is_nothing(self, layer: LayerParameter) -> bool:
        """Whether a layer's tops are other names of its bottom, and none is known outside."""
        return layer.type in ("Dropout", "Split") and not any(top in self.net.outputs for top in layer.top)

    def _seen(self, layer: LayerParameter) -> Layer:
        blobs = self.net.weights[layer.name] if layer.name in self.net.weights else []  # noqa: SIM401
        return Layer(
            layer,
            [self.names[bottom] for bottom in layer.bottom],
            [self.names[top] for top in layer.top],
            [self.net.shapes.blobs[bottom] for bottom in layer.bottom],
            [self.net.shapes.blobs[top] for top in layer.top],
            blobs,
        )

    # ---- Layers in integers ----

    def _compute(self, layer: LayerParameter, integers: IntegerLayer) -> None:
        seen = self._seen(layer)
        seen.bottoms[0] = self.codes.get(seen.bottoms[0], seen.bottoms[0])
        found = kernels(seen)
        step = raw([1 / self.net.quantizers[layer.bottom[0]].step])
        codes, bias = tagged_codes(integers.codes), raw(integers.bias)
        if found.groups in (1, len(integers.codes)):
            op = seen.op(found.type, {**found.params, found.bias_id: 1})
            op.params[_SCALE_TERM] = _SEPARATE if found.groups == 1 else _ONE_PER_GROUP
            op.weights = [codes, bias, raw(1 / integers.scale), step]
            self.ops.append(op)
            return
        self.grouped.append(layer.name)
        sums = f"{seen.tops[0]}_sums"
        params = {**found.params, found.bias_id: 0, _SCALE_TERM: _ONE_PER_GROUP}
        weights = [codes, raw(np.ones(found.groups)), step]
        self.ops.append(Op(found.type, seen.name, seen.bottoms, [sums], params, weights))
        scale = [raw(integers.scale), bias]
        self.ops.append(
            Op("Scale", f"{seen.name}_scale", [sums], seen.tops, {0: len(integers.scale), 1: 1}, scale)
        )

    # ---- Activations ----

    def _maker(self, blob: str) -> Op | None:
        """The layer with weights that makes a blob which one layer alone reads."""
        if self.readers[self.names[blob]] > 1:
            return None
        return next((op for op in self.ops if self.names[blob] in op.tops and op.type in _FUSING), None)

    def _limit(self, bottom: str, top: str, limits: Limits) -> bool:
        """Have what makes a blob keep it within limits and call it ``top``, if it can; whether it does."""
        maker = self._maker(bottom)
        if maker is None:
            return False
        low, high = self.limits.get(maker.name, (-math.inf, math.inf))
        low, high = (min(max(limit, limits[0]), limits[1]) for limit in (low, high))
        self.limits[maker.name] = low, high
        if (low, high) == (0, math.inf):
            maker.params[_ACTIVATION] = _RELU
        else:
            maker.params |= {_ACTIVATION: _CLIP, _ACTIVATION_PARAMS: [_finite(low), _finite(high)]}
        maker.tops = [top]
        return True

    def _quantize(self, layer: LayerParameter, quantizer: Quantizer) -> None:
        """The codes, and the values of them where something reads those."""
        bottom, top, step = layer.bottom[0], self.names[layer.top[0]], quantizer.step
        codes, name = f"{top}_codes", word(layer.name)
        self.codes[top] = codes
        alone = self._maker(bottom) is not None
        source = self._limited(layer, f"{top}_limited", quantizer)
        maker = next((op for op in self.ops if source in op.tops), None)
        if alone and maker is not None and maker.type in _MAKING_CODES and _SCALE_TERM in maker.params:
            maker.params[_SCALE_TERM] = _MAKING_CODES[maker.type]
            maker.weights.append(raw([1 / step]))
            maker.tops = [codes]
        else:
            self.ops.append(Op("Quantize", name, [source], [codes], {0: 1}, [raw([1 / step])]))
        if layer.top[0] in self.net.outputs or any(map(self._reads_floats(top), self.net.net.layer)):
            cast = f"{top}_cast"
            self.ops.append(Op("Cast", f"{name}_cast", [codes], [cast], {0: _INT8, 1: _FLOAT32}))
            self.ops.append(Op("BinaryOp", f"{name}_values", [cast], [top], {0: _MULTIPLY, 1: 1, 2: step}))

    def _reads_floats(self, blob: str) -> Callable[[LayerParameter], bool]:
        """Whether a layer reads a blob of ncnn in float."""

        def reads(layer: LayerParameter) -> bool:
            read = blob in [self.names[bottom] for bottom in layer.bottom]
            return read and layer.name not in self.integers and not self._is_nothing(layer)

        return reads

    def _limited(self, layer: LayerParameter, top: str, quantizer: Quantizer) -> str:
        """The blob of a quantizer's bottom within its codes, as far as ncnn would not keep it there."""
        bottom = layer.bottom[0]
        low, high = quantizer.lowest * quantizer.step, quantizer.highest * quantizer.step
        if quantizer.highest == _HIGHEST_CODE:
            low, high = (low if quantizer.lowest == 0 else -math.inf), math.inf
        if (low, high) == (-math.inf, math.inf):
            return self.names[bottom]
        if not self._limit(bottom, top, (low, high)):
            is_relu = (low, high) == (0, math.inf)
            within: dict[int, Value] = {} if is_relu else {0: _finite(low), 1: _finite(high)}
            name = f"{word(layer.name)}_limited"
            self.ops.append(Op("ReLU" if is_relu else "Clip", name, [self.names[bottom]], [top], within))
        return top

    # ---- Files ----

    def files(self) -> tuple[bytes, bytes]:
        """NAME.param and NAME.bin.

        Raises:
            InputError: a blob has the name of one that is added.
        """
        ops = list(_with_splits(self.ops))
        for blob, makers in Counter(top for op in ops for top in op.tops).items():
            if makers > 1:
                raise InputError(f"blob {blob!r}: labelfree needs this name; rename the blob in the prototxt")
        blobs = sum(len(op.tops) for op in ops)
        lines = [_MAGIC, f"{len(ops)} {blobs}", *(op.line() for op in ops)]
        weights = b"".join(piece for op in ops for piece in op.weights)
        return to_bytes("\n".join(lines) + "\n"), weights


@contextmanager
def _named(layer: LayerParameter) -> Iterator[None]:
    try:
        yield
    except UnsupportedError as error:
        raise InputError(
            f"layer {layer.name!r} ({layer.type}): ncnn cannot do it: {error}; export to onnx or caffe"
        ) from None


def _check(layer: LayerParameter, quantizer: Quantizer) -> None:
    if quantizer.highest > _HIGHEST_CODE:
        raise InputError(
            f"layer {layer.name!r}: codes {quantizer.lowest} to {quantizer.highest}; those of ncnn are -127 "
            "to 127: quantize with activations.levels: 127, or export to onnx"
        )


def _limits(layer: LayerParameter) -> Limits | None:
    """What a layer keeps its bottom within; None where it does something else."""
    if layer.type == "ReLU" and not layer.relu_param.negative_slope:
        return 0.0, math.inf
    if layer.type == "Clip":
        return layer.clip_param.min, layer.clip_param.max
    return None


def _finite(limit: float) -> float:
    return float(np.clip(limit, -_MOST, _MOST))


def _without_vanishing(layer: IntegerLayer) -> IntegerLayer:
    """The same layer with kernels of zeros where the scale is so small that ncnn's 1 / scale is infinite."""
    vanishes = abs(layer.scale) < 1 / _MOST
    codes = np.where(vanishes[:, None], np.float32(0), layer.codes)
    return replace(layer, codes=codes, scale=np.where(vanishes, 1.0, layer.scale))


def _unique(name: str, taken: set[str]) -> str:
    """A name as a word unlike all others."""
    stem = found = word(name)
    number = 1
    while found in taken:
        number += 1
        found = f"{stem}_{number}"
    taken.add(found)
    return found


def _with_splits(ops: list[Op]) -> Iterator[Op]:
    """The layers with a Split behind each that makes what several read: ncnn wants one reader per blob."""
    readers = Counter(bottom for op in ops for bottom in op.bottoms)
    parts = {blob: [f"{blob}_part{n}" for n in range(count)] for blob, count in readers.items() if count > 1}
    left = {blob: iter(names) for blob, names in parts.items()}
    for op in ops:
        bottoms = [next(left[bottom]) if bottom in left else bottom for bottom in op.bottoms]
        yield replace(op, bottoms=bottoms)
        for top in op.tops:
            if top in parts:
                yield Op("Split", f"{top}_split", [top], parts[top])


def _table(writer: _Writer) -> str:
    """NAME.table: by layer the scales of its weights, and by layer that of what it reads.

    Left out are convolutions with groups of several outputs, for which ncnn2int8 has one scale per group.
    """
    weights, reads = [], []
    for layer in writer.net.net.layer:
        if layer.name in writer.integers and layer.name not in writer.grouped:
            scales = abs(1 / writer.integers[layer.name].scale)
            step = writer.net.quantizers[layer.bottom[0]].step
            weights.append(" ".join([f"{word(layer.name)}_param_0", *(f"{scale:.9e}" for scale in scales)]))
            reads.append(f"{word(layer.name)} {1 / step:.9e}")
    return "\n".join([*weights, *reads]) + "\n"
