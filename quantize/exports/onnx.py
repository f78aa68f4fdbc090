"""ONNX with QuantizeLinear and DequantizeLinear (opset 21), for onnxruntime and OpenVINO.

Both runtimes look for DequantizeLinear -> operator -> QuantizeLinear and compute it in integers. What they
need beyond that was found by counting the kernels that they run (tests/exports):

- Scales and zero points of a whole tensor have no axes; with an axis of 1 onnxruntime loses every sum.
- Biases stay floats, which onnxruntime makes int32 from 1.23 on; the form for older ones has them as int32.
- onnxruntime computes a convolution in integers only where its output is codes, too. So codes are made as
  early as can be: quantizing commutes with ReLU, Clip, Concat and maximum pooling, so that what stands in
  front of a quantizer is quantized in front of these. A narrower range is cut out of the codes behind
  QuantizeLinear.
- OpenVINO takes float outputs; it wants the range cut out of the values in front of QuantizeLinear.

Weights are packed: Q of up to 16 levels as INT4 -> Cast(INT8), or as UINT4 -> Cast(INT32) -> Gather of the
levels, both of which the runtimes compute once, when they load the file.
"""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from quantize.arrays import FloatArray, Floats
from quantize.caffenet import LayerParameter
from quantize.caffenet.kernels import from_kernels
from quantize.caffenet.quantized import Quantizer, read_quantizer
from quantize.caffenet.quantizers import MOST_SIGNED_LEVELS
from quantize.caffenet.shape_rules import Window, canonical_axis, convolution_window
from quantize.engines.exported import Pixels
from quantize.engines.onnx.engine import OnnxEngine, Translation
from quantize.engines.onnx.file import MEAN, SCALE
from quantize.engines.onnx.graph import Graph
from quantize.errors import InputError
from quantize.exports.integers import IMAGE_AXES, IntegerLayer, IntegerNet, has_kernels, whole_codes
from quantize.exports.target import Exported

OPSET, IR_VERSION = 21, 10
"""4-bit types came with them; onnxruntime reads the pair from 1.18 on, OpenVINO from 2024.4 on."""
INT4 = range(-8, 8)
INT8 = range(-128, 128)
FEW_LEVELS = 16
"""As many as 4 bits tell apart."""
SIGNED_ZERO = 128
"""The byte of code 0 where codes have both signs."""
MOST_OF_INT32 = 2.0**30
NEGLIGIBLE = 2.0**-9

Runtime = Literal["ort", "openvino"]
Packing = Literal["packed", "int8"]


@dataclass(frozen=True)
class OnnxOptions:
    """How the file is written.

    Attributes:
        runtime: which one it is to be fast in; it runs in both.
        weights: packed; or a byte each and biases of 32 bits, for onnxruntime before 1.23.
        pixels: have the net's first input take pixels of 8 bits, of which it makes its values so.
    """

    runtime: Runtime = "ort"
    weights: Packing = "packed"
    pixels: Pixels | None = None


def export_onnx(net: IntegerNet, name: str, options: OnnxOptions) -> Exported:
    """``NAME.onnx``.

    Raises:
        InputError: a layer cannot be translated, or the net has no input of images for pixels.
    """
    if options.pixels is not None:
        _check_pixels(net, options.pixels)
    with closing(OnnxEngine(net.net, net.weights, net.inputs)) as engine:
        writer = _Writer(net, options, engine)
        model = writer.written()
    return Exported({f"{name}.onnx": model.SerializeToString()}, writer.floats)


@dataclass(frozen=True)
class _Codes:
    """A blob's codes: a tensor of bytes, and what they mean.

    Attributes:
        tensor: of bytes; code 0 is byte 0, or `SIGNED_ZERO` where codes have both signs.
        quantizer: their step and range.
        lowest, highest: what the codes are known to be within.
    """

    tensor: str
    quantizer: Quantizer
    lowest: int
    highest: int


class _Writer:
    """A net being written as ONNX.

    Attributes:
        floats: the layers with weights that stay in float, and why.
    """

    def __init__(self, net: IntegerNet, options: OnnxOptions, engine: OnnxEngine) -> None:
        self.net = net
        self.options = options
        self.floats = dict(net.floats)
        self.graph = Graph(_free_prefix([*net.shapes.blobs]))
        self.translation = Translation(engine, self.graph)
        self.codes: dict[str, _Codes] = {}
        self.demanded = _demanded(net) if options.runtime == "ort" else {}
        self.constants: dict[bytes, str] = {}
        self.pixels = options.pixels
        self.pixel_input = next(iter(net.inputs)) if options.pixels is not None else None
        self.pixel_tensor = ""

    def written(self) -> onnx.ModelProto:
        """The file's content."""
        inputs = self._inputs()
        for layer in self.net.net.layer:
            quantizer = read_quantizer(layer)
            if quantizer is not None:
                self._add_quantizer(layer, quantizer)
            elif layer.name in self.net.layers:
                self._add_quantized(layer, self.net.layers[layer.name])
            elif not self._cut_codes(layer):
                self._add_floating(layer)
            if self.options.runtime == "ort":
                for top in layer.top:
                    self._quantize_as_wanted(top)
        blobs = {self.translation.blob(name).tensor: name for name in reversed(self.net.shapes.blobs)}
        ends = {self.graph.output(self.translation.blob(name).tensor): name for name in self.net.outputs}
        names = {
            tensor: name for tensor, name in blobs.items() if name not in (*ends.values(), *inputs.values())
        }
        names |= ends | inputs
        model = self.graph.whole_model(OPSET, IR_VERSION)
        model.producer_name = "labelfree"
        model.graph.name = _text(self.net.name)
        _pad_averages(model.graph)
        _rename(model, {tensor: _text(name) for tensor, name in names.items()})
        _declare(model, self.net)
        if self.pixels is not None:
            mean = ",".join(str(np.float32(mean)) for mean in self.pixels.mean)
            helper.set_model_props(model, {MEAN: mean, SCALE: str(np.float32(self.pixels.scale))})
        onnx.checker.check_model(model)
        return model

    def _inputs(self) -> dict[str, str]:
        """Make the net's inputs; their names by tensor."""
        found = {}
        for name, shape in self.net.inputs.items():
            if name == self.pixel_input and self.pixels is not None:
                self.pixel_tensor = self.graph.input((1, *shape), grows=True, kind=TensorProto.UINT8)
                found[self.pixel_tensor] = name
                x = self.graph.op("Cast", self.pixel_tensor, to=TensorProto.FLOAT)
                mean = self.pixels.mean.reshape(-1, *[1] * (len(shape) - 1))
                x = self.graph.op("Sub", x, self.graph.floats(mean))
                self.translation.define(name, self.graph.op("Mul", x, self.graph.floats(self.pixels.scale)))
            else:
                found[self.translation.blob(name).tensor] = name
        return found

    # ---- Activations ----

    def _quantize_as_wanted(self, blob: str) -> None:
        """Make codes of a blob whose readers want them, or whose maker has passed codes on."""
        wanted = self.demanded.get(blob) or self.net.quantizers.get(blob)
        if wanted is not None and blob not in self.codes:
            self._quantize(blob, self.translation.blob(blob).tensor, wanted)

    def _quantize(self, blob: str, x: str, quantizer: Quantizer) -> None:
        """Make codes of ``x``, which fill a byte."""
        signed = quantizer.lowest < 0
        byte = self.graph.op("QuantizeLinear", x, *self._step(quantizer))
        lowest, highest = (-SIGNED_ZERO, 255 - SIGNED_ZERO) if signed else (0, 255)
        self._define(blob, _Codes(byte, quantizer, lowest, highest))

    def _define(self, blob: str, codes: _Codes) -> None:
        self.codes[blob] = codes
        x = self.graph.op("DequantizeLinear", codes.tensor, *self._step(codes.quantizer))
        self.translation.define(blob, x)

    def _step(self, quantizer: Quantizer) -> tuple[str, str]:
        """Scale and zero point, without axes."""
        zero = SIGNED_ZERO if quantizer.lowest < 0 else 0
        return self.graph.floats(quantizer.step), self.graph.constant(np.array(zero, np.uint8))

    def _add_quantizer(self, layer: LayerParameter, quantizer: Quantizer) -> None:
        bottom, top = layer.bottom[0], layer.top[0]
        if self.options.runtime == "ort":
            if bottom not in self.codes or self.codes[bottom].quantizer != quantizer:
                self._quantize(top, self.translation.blob(bottom).tensor, quantizer)
            else:
                self.codes[top] = self.codes[bottom]
            self._narrow(top, self.codes[top], quantizer.lowest, quantizer.highest)
            return
        x, step = self.translation.blob(bottom).tensor, quantizer.step
        if not _fills_byte(quantizer.lowest, quantizer.highest):
            limits = (self.graph.floats(step * quantizer.lowest), self.graph.floats(step * quantizer.highest))
            x = self.graph.op("Clip", x, *limits)
        self._quantize(top, x, quantizer)

    def _narrow(self, blob: str, codes: _Codes, lowest: int, highest: int) -> None:
        """Cut codes to a range; -128, which is nearer to what was there than -127 is, may stay."""
        signed = codes.quantizer.lowest < 0
        if signed and lowest == -MOST_SIGNED_LEVELS:
            lowest = codes.lowest
        lowest, highest = max(lowest, codes.lowest), min(highest, codes.highest)
        tensor, zero = codes.tensor, SIGNED_ZERO if signed else 0
        if (lowest, highest) != (codes.lowest, codes.highest):
            limits = (self.graph.constant(np.array(code + zero, np.uint8)) for code in (lowest, highest))
            tensor = self.graph.op("Clip", tensor, *limits)
        self._define(blob, _Codes(tensor, codes.quantizer, lowest, highest))

    def _add_floating(self, layer: LayerParameter) -> None:
        """A layer in floats."""
        blob = layer.bottom[0] if layer.bottom else ""
        codes = self.codes.get(blob)
        if codes is not None and (has_kernels(layer) or _averages(layer)):
            before = self.translation.blob(blob).tensor
            self.translation.define(blob, self._values(blob) if has_kernels(layer) else self._apart(before))
            self.translation.add(layer)
            self.translation.define(blob, before)
        else:
            self.translation.add(layer)

    def _apart(self, x: str) -> str:
        """The same values, but not seen as codes by the runtimes.

        OpenVINO averages bytes with bytes as the result, and pads uint8 with the byte 0 even if that is not
        its zero point.
        """
        return self.graph.op("Max", x, self.graph.floats(np.finfo(np.float32).min))

    def _values(self, blob: str) -> str:
        """A blob as floats, for a layer with weights in floats.

        Between DequantizeLinear and QuantizeLinear onnxruntime would quantize such weights on its own
        account, with one scale for all kernels.
        """
        if blob not in self.codes or self.options.runtime == "openvino":
            return self.translation.blob(blob).tensor
        codes = self.codes[blob]
        x = self.graph.op("Cast", codes.tensor, to=TensorProto.FLOAT)
        if codes.quantizer.lowest < 0:
            x = self.graph.op("Sub", x, self.graph.floats(SIGNED_ZERO))
        return self.graph.op("Mul", x, self.graph.floats(codes.quantizer.step))

    def _cut_codes(self, layer: LayerParameter) -> bool:
        """Whether the layer is a ReLU or Clip of a blob whose codes are made in front of it: cut those."""
        limits = _limits(layer)
        if limits is None or layer.bottom[0] not in self.demanded:
            return False
        codes = self.codes[layer.bottom[0]]
        step = np.float32(codes.quantizer.step)
        lowest, highest = (
            int(np.clip(np.floor(np.float32(limit) / step + np.float32(0.5)), codes.lowest, codes.highest))
            for limit in limits
        )
        self._narrow(layer.top[0], codes, lowest, highest)
        return True

    # ---- Weights ----

    def _add_quantized(self, layer: LayerParameter, given: IntegerLayer) -> None:
        """A layer whose weights are quantized, in integers where the runtime can."""
        on_pixels = self._is_on_pixels(layer)
        given = whole_codes(given)
        why = None if on_pixels else self.floats.get(layer.name)
        why, integers = why or self._why_float(layer), given
        if why is None and not _fit(given.codes, INT8):
            why = f"{given.bits}-bit {given.grid} weights are no bytes (weights.bits)"
        if why is None:
            integers, why = self._within_int32(layer, self._with_mean(layer, given) if on_pixels else given)
        if why is not None:
            self.floats[layer.name] = why
            x = self._values(layer.bottom[0])
            self._add_linear(layer, x, self._floats(layer, given), given, is_integer=False)
            return
        self.floats.pop(layer.name, None)
        scale = self.graph.floats(integers.scale)
        weights = self._bytes(layer, integers.codes)
        w = self.graph.op("DequantizeLinear", weights, scale, axis=_kernel_axis(layer))
        x = self._padded_pixels(layer) if on_pixels else self.translation.blob(layer.bottom[0]).tensor
        self._add_linear(layer, x, w, integers, is_integer=True)

    def _why_float(self, layer: LayerParameter) -> str | None:
        """Why a layer on codes cannot run in integers in the runtime; None where it can."""
        if layer.type == "Deconvolution":
            group = layer.convolution_param.group
            if self.options.runtime == "ort" or group > 1:
                return "no runtime has a Deconvolution (with groups) in integers"
            return None
        if (
            self.options.runtime == "ort"
            and layer.type != "InnerProduct"
            and layer.top[0] not in self.demanded
        ):
            return f"onnxruntime needs its output on codes, too{self._remedy(layer)}"
        return None

    def _remedy(self, layer: LayerParameter) -> str:
        readers = [each for each in self.net.net.layer if layer.top[0] in each.bottom]
        if any(each.type == "Eltwise" for each in readers):
            return " (activations.sums: true, or --runtime openvino)"
        return f": {readers[0].type} {readers[0].name} reads it" if readers else ""

    def _within_int32(self, layer: LayerParameter, integers: IntegerLayer) -> tuple[IntegerLayer, str | None]:
        """The layer with kernels whose biases fit the accumulators; or why there is none.

        onnxruntime adds biases as int32 in units of step * scale. A kernel with a scale of (nearly) nothing
        is a constant: its codes are 0, and its scale fits the bias.
        """
        quantizer = self._read_by(layer)
        step = quantizer.step
        unit = np.abs(integers.scale) * step
        too_large = np.abs(integers.bias) > MOST_OF_INT32 * unit
        if self.options.runtime != "ort" or not too_large.any():
            return integers, None
        most = unit * np.abs(integers.codes).sum(axis=1) * max(quantizer.highest, -quantizer.lowest)
        if (most > NEGLIGIBLE * np.abs(integers.bias))[too_large].any():
            return integers, "a bias is too large for its weights' scale, in an accumulator of 32 bits"
        scale = np.where(too_large, np.abs(integers.bias) / MOST_OF_INT32 / step, integers.scale)
        codes = np.where(too_large[:, None], np.float32(0), integers.codes)
        return IntegerLayer(integers.bits, integers.grid, codes, scale, integers.bias), None

    def _read_by(self, layer: LayerParameter) -> Quantizer:
        """The codes that a layer reads; pixels are codes, too."""
        if self.pixels is not None and self._is_on_pixels(layer):
            return Quantizer(self.pixels.scale, 0, 255)
        return self.net.quantizers[layer.bottom[0]]

    def _is_on_pixels(self, layer: LayerParameter) -> bool:
        """Whether a layer with quantized weights reads pixels."""
        return self.pixel_input is not None and layer.bottom[0] == self.pixel_input

    def _with_mean(self, layer: LayerParameter, integers: IntegerLayer) -> IntegerLayer:
        """The layer with the mean of the pixels in its bias."""
        assert self.pixels is not None
        n, k = integers.codes.shape
        channels = self.net.shapes.blobs[layer.bottom[0]][1]
        if layer.type == "InnerProduct":
            means = np.broadcast_to(np.repeat(self.pixels.mean, k // channels), (n, k))
        else:
            each = self.net.shapes.params[layer.name][0][1]
            by_group = self.pixels.mean.reshape(-1, each)
            means = np.repeat(np.repeat(by_group, n // len(by_group), axis=0), k // each, axis=1)
        shift = integers.scale * self.pixels.scale * (integers.codes * means).sum(axis=1)
        return replace(integers, bias=integers.bias - shift)

    def _padded_pixels(self, layer: LayerParameter) -> str:
        """The pixels with the mean around them, as values are padded with 0."""
        assert self.pixels is not None
        x, (_, channels, *sizes) = self.pixel_tensor, self.net.shapes.blobs[layer.bottom[0]]
        pad = (
            ()
            if layer.type == "InnerProduct"
            else convolution_window(layer.convolution_param, (1, channels, *sizes)).pad
        )
        if any(pad):
            axes = range(2, 2 + len(pad))
            x = self.graph.op("Pad", x, self.graph.integers(pad * 2), "", self.graph.integers(axes))
            inside = np.pad(np.ones(sizes, bool), [(each, each) for each in pad])[None, None]
            mean = np.rint(self.pixels.mean).clip(0, 255).astype(np.uint8).reshape(1, -1, *[1] * len(pad))
            x = self.graph.op("Where", self.graph.constant(inside), x, self.graph.constant(mean))
        step, zero = self.graph.floats(self.pixels.scale), self.graph.constant(np.array(0, np.uint8))
        return self.graph.op("DequantizeLinear", x, step, zero)

    def _bytes(self, layer: LayerParameter, codes: FloatArray) -> str:
        """Q as a tensor of int8, packed in the file where it can be."""
        blob = self._in_blob(layer, codes)
        if self.options.weights == "int8":
            return self._constant(blob.astype(np.int8))
        if _fit(codes, INT4):
            return self.graph.op("Cast", self._nibbles(blob, TensorProto.INT4), to=TensorProto.INT8)
        levels = np.unique(codes)
        if len(levels) <= FEW_LEVELS:
            return self.graph.op("Gather", self._constant(levels.astype(np.int8)), self._places(blob, levels))
        return self._constant(blob.astype(np.int8))

    def _floats(self, layer: LayerParameter, integers: IntegerLayer) -> str:
        """scale * Q as floats, which the runtime computes when it loads the file; what is in there is Q."""
        codes, blob = integers.codes, self._in_blob(layer, integers.codes)
        levels = np.unique(codes)
        packed = self.options.weights == "packed"
        if len(levels) <= FEW_LEVELS and packed:
            w = self.graph.op("Gather", self.graph.floats(levels), self._places(blob, levels))
        elif _fit(codes, INT8):
            w = self.graph.op("Cast", self._constant(blob.astype(np.int8)), to=TensorProto.FLOAT)
        else:
            bytes_ = self._constant(np.searchsorted(levels, blob).astype(np.uint8))
            w = self.graph.op(
                "Gather", self.graph.floats(levels), self.graph.op("Cast", bytes_, to=TensorProto.INT32)
            )
        return self.graph.op("Mul", w, self.graph.floats(_spread(layer, integers.scale, blob.shape)))

    def _in_blob(self, layer: LayerParameter, codes: FloatArray) -> FloatArray:
        """Kernels as the operator has them: those of an InnerProduct as columns."""
        if layer.type == "InnerProduct":
            return np.ascontiguousarray(codes.T)
        return from_kernels(layer, codes, self.net.shapes.params[layer.name][0])

    def _places(self, blob: FloatArray, levels: FloatArray) -> str:
        """The number of each value among the levels, as INT32, 4 bits each in the file."""
        places = self._nibbles(np.searchsorted(levels, blob), TensorProto.UINT4)
        return self.graph.op("Cast", places, to=TensorProto.INT32)

    def _nibbles(self, values: npt.NDArray[Any], kind: int) -> str:
        """A constant of 4 bits per value, the first of two in the lower half of a byte."""
        half = values.astype(np.int64).reshape(-1) & 15
        half = np.append(half, np.zeros(len(half) % 2, np.int64))
        packed = (half[::2] | half[1::2] << 4).astype(np.uint8).tobytes()
        key = hashlib.sha256(packed + repr((values.shape, kind)).encode()).digest()
        if key not in self.constants:
            tensor = TensorProto(data_type=kind, dims=values.shape, raw_data=packed)
            self.constants[key] = self.graph.tensor(tensor)
        return self.constants[key]

    def _constant(self, values: npt.NDArray[Any]) -> str:
        """A constant; what layers share is in the file once."""
        key = hashlib.sha256(values.tobytes() + repr((values.shape, values.dtype)).encode()).digest()
        if key not in self.constants:
            self.constants[key] = self.graph.constant(values)
        return self.constants[key]

    def _add_linear(
        self, layer: LayerParameter, x: str, w: str, integers: IntegerLayer, is_integer: bool
    ) -> None:
        """Write a layer from the tensors of what it reads and of its weights."""
        if layer.type == "InnerProduct":
            self.translation.define(layer.top[0], self._inner_product(layer, x, w, integers.bias))
            return
        bottom, kernels = self.net.shapes.blobs[layer.bottom[0]], self.net.shapes.params[layer.name][0]
        window = convolution_window(layer.convolution_param, bottom)
        is_padded = is_integer and self._is_on_pixels(layer)
        is_deconvolution = layer.type == "Deconvolution"
        strides = window.stride
        if self.options.runtime == "openvino" and _only_subsamples(window) and not is_deconvolution:
            x = self.graph.op("MaxPool", x, kernel_shape=window.kernel, strides=strides)
            strides = window.kernel
        y = self.graph.op(
            "ConvTranspose" if is_deconvolution else "Conv",
            *(x, w, *self._biases(layer, integers, is_integer)),
            group=layer.convolution_param.group if is_deconvolution else bottom[1] // kernels[1],
            kernel_shape=window.kernel,
            strides=strides,
            pads=[0 if is_padded else pad for pad in window.pad * 2],
            dilations=window.dilation,
        )
        self.translation.define(layer.top[0], y)

    def _biases(self, layer: LayerParameter, integers: IntegerLayer, is_integer: bool) -> list[str]:
        """The bias of a convolution, where there is one."""
        bias = integers.bias
        if not bias.any():
            return []
        if not (is_integer and self.options.weights == "int8" and self.options.runtime == "ort"):
            return [self.graph.floats(bias)]
        unit = (integers.scale * self._read_by(layer).step).astype(np.float32)
        whole = self.graph.constant(np.rint(bias / unit).astype(np.int32))
        return [self.graph.op("DequantizeLinear", whole, self.graph.floats(unit), axis=0)]

    def _inner_product(self, layer: LayerParameter, rows: str, w: str, bias: Floats) -> str:
        """A product and a difference: onnxruntime makes a product and a sum one Gemm, and that of floats."""
        blob, shape = layer.bottom[0], self.net.shapes.blobs[layer.bottom[0]]
        axis = canonical_axis(layer.inner_product_param.axis, shape)
        if axis + 1 != len(shape):
            rows = self.graph.reshape(rows, (-1, *shape[1:axis], math.prod(shape[axis:])))
            if blob in self.codes or self._is_on_pixels(layer):
                step = self._step(self._read_by(layer))
                rows = self.graph.op("DequantizeLinear", self.graph.op("QuantizeLinear", rows, *step), *step)
        y = self.graph.op("MatMul", rows, w)
        return self.graph.op("Sub", y, self.graph.floats(-bias)) if bias.any() else y


def _check_pixels(net: IntegerNet, pixels: Pixels) -> None:
    """Check that the first input has channels with these means (InputError if not)."""
    name, shape = next(iter(net.inputs.items()))
    if len(shape) != IMAGE_AXES - 1 or len(pixels.mean) != shape[0]:
        raise InputError(
            f"input {name!r} is {shape} but there are {len(pixels.mean)} means of channels: it takes no "
            "pixels; use --input float"
        )


def _demanded(net: IntegerNet) -> dict[str, Quantizer]:
    """The blobs of which nothing but codes of one quantizer is read, however far behind."""
    readers: defaultdict[str, list[LayerParameter]] = defaultdict(list)
    for layer in net.net.layer:
        for bottom in dict.fromkeys(layer.bottom):
            readers[bottom].append(layer)
    found: dict[str, Quantizer] = {}
    for layer in reversed(net.net.layer):
        for top in layer.top:
            wanted = {_wanted(reader, found) for reader in readers[top]}
            if len(wanted) == 1 and top not in net.outputs and top not in net.quantizers:
                [quantizer] = wanted
                if quantizer is not None:
                    found[top] = quantizer
    return found


def _wanted(reader: LayerParameter, demanded: Mapping[str, Quantizer]) -> Quantizer | None:
    """The codes that a layer makes of its bottoms, or that are made of what it passes on."""
    quantizer = read_quantizer(reader)
    if quantizer is not None:
        return quantizer
    is_maximum = reader.type == "Pooling" and reader.pooling_param.pool == reader.pooling_param.MAX
    commutes = reader.type == "Concat" or (is_maximum and len(reader.top) == 1) or _limits(reader) is not None
    return demanded.get(reader.top[0]) if commutes else None


def _averages(layer: LayerParameter) -> bool:
    return layer.type == "Pooling" and layer.pooling_param.pool == layer.pooling_param.AVE


def _only_subsamples(window: Window) -> bool:
    """Whether a convolution leaves places out and looks at no neighbours.

    OpenVINO gives the strides of such ones to what makes their input, if nothing else reads that, and what is
    behind a sum then runs in floats; pooling that leaves the places out does not.
    """
    return max(window.kernel) == 1 < max(window.stride) and not any(window.pad)


def _limits(layer: LayerParameter) -> tuple[float, float] | None:
    """The range that a ReLU or Clip cuts values to; None for any other layer."""
    if layer.type == "ReLU" and not layer.relu_param.negative_slope:
        return 0.0, math.inf
    if layer.type == "Clip":
        return layer.clip_param.min, layer.clip_param.max
    return None


def _fills_byte(lowest: int, highest: int) -> bool:
    return (lowest, highest) in ((0, 255), (-MOST_SIGNED_LEVELS, MOST_SIGNED_LEVELS))


def _fit(codes: FloatArray, allowed: range) -> bool:
    return bool(codes.min() >= allowed[0] and codes.max() <= allowed[-1])


def _kernel_axis(layer: LayerParameter) -> int:
    """The axis of the operator's weights that has one kernel at each place."""
    return int(layer.type in ("InnerProduct", "Deconvolution"))


def _spread(layer: LayerParameter, scale: Floats, shape: Sequence[int]) -> FloatArray:
    """One number per kernel so that it multiplies the operator's weights, which have some shape."""
    if layer.type == "InnerProduct":
        return scale.astype(np.float32)
    thin = (*(shape[:2] if layer.type == "Deconvolution" else (len(scale), 1)), *[1] * (len(shape) - 2))
    each = math.prod(thin) // len(scale)
    return from_kernels(layer, np.repeat(scale[:, None], each, axis=1).astype(np.float32), thin)


def _free_prefix(taken: Collection[str]) -> str:
    """A prefix of tensor names that no blob's name begins with."""
    prefix = "t"
    while any(name.startswith(prefix) for name in taken):
        prefix += "_"
    return prefix


def _text(name: str) -> str:
    """A name of any bytes as what protobuf takes for a string."""
    return name.encode("utf-8", "backslashreplace").decode()


def _pad_averages(graph: onnx.GraphProto) -> None:
    """Give averages over padding an operator for that.

    AveragePool of opsets from 19 on divides by wrong numbers there in onnxruntime 1.23.
    """
    nodes = []
    for node in graph.node:
        pads = next((each.ints for each in node.attribute if each.name == "pads"), None)
        if node.op_type == "AveragePool" and pads is not None and any(pads):
            amounts, padded = f"{node.output[0]}_pads", f"{node.output[0]}_padded"
            half = len(pads) // 2
            values = np.array([0, 0, *pads[:half], 0, 0, *pads[half:]], np.int64)
            graph.initializer.append(numpy_helper.from_array(values, amounts))
            nodes.append(helper.make_node("Pad", [node.input[0], amounts], [padded]))
            node.input[0] = padded
            pads[:] = [0] * len(pads)
        nodes.append(onnx.NodeProto.FromString(node.SerializeToString()))
    del graph.node[:]
    graph.node.extend(nodes)


def _rename(model: onnx.ModelProto, names: Mapping[str, str]) -> None:
    """Give tensors other names."""
    for node in model.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
    for value in (*model.graph.input, *model.graph.output):
        value.name = names.get(value.name, value.name)


def _declare(model: onnx.ModelProto, net: IntegerNet) -> None:
    """Give inputs and outputs their shapes, with a batch of any size."""
    shapes = {_text(name): shape for name, shape in net.shapes.blobs.items()}
    for value in (*model.graph.input, *model.graph.output):
        dims = value.type.tensor_type.shape.dim
        del dims[:]
        dims.add(dim_param="N")
        for size in shapes[value.name][1:]:
            dims.add(dim_value=size)
