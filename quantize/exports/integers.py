"""The neutral form that every target is written from: a quantized net with all that is linear folded.

Alpha, BatchNorm, Scale and Bias behind a layer with weights become, in float64, one scale per output channel
(it may be negative) and a bias: y = scale * (Q . x) + bias, where x = step * q if the layer reads codes q. So
y = s * (Q . q) + bias with s = scale * step. ReLUs and everything else stay what they are.

A zero-padded shortcut (a Concat of some channels with zeros) becomes one 1x1 convolution whose weights are 0
and 1, or goes into the convolution before it where nobody else reads that.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from quantize.arrays import FloatArray, Floats, Shape
from quantize.caffenet import (
    InferenceNet,
    LayerParameter,
    NetParameter,
    Shapes,
    Weights,
    check_weights,
    empty_like,
    infer_shapes,
    loaded,
    needed_layers,
    single_assignment,
)
from quantize.caffenet.graph import NetGraph
from quantize.caffenet.kernels import from_kernels, outputs, to_kernels
from quantize.caffenet.model import Model
from quantize.caffenet.norms import NORM_TYPES, scale_and_shift
from quantize.caffenet.quantized import QuantizedWeights, Quantizer, read_quantizer
from quantize.caffenet.shape_rules import canonical_axis, has_rule
from quantize.caffenet.traits import Trait, traits_of
from quantize.errors import InputError
from quantize.measure.outputs import Output

CHANNEL_AXIS = 1
IMAGE_AXES = 4


@dataclass(frozen=True)
class IntegerLayer:
    """A layer with quantized weights: y = scale * (Q . x) + bias.

    Attributes:
        bits: per weight.
        grid: name of the grid that Q is on.
        codes: Q, float32 (n kernels, k weights), as `kernels.to_kernels` orders them.
        scale: float64 (n,); may be negative.
        bias: float64 (n,).
    """

    bits: int
    grid: str
    codes: FloatArray = field(repr=False)
    scale: Floats = field(repr=False)
    bias: Floats = field(repr=False)


@dataclass(frozen=True)
class IntegerNet:
    """A quantized net in the neutral form.

    Attributes:
        name: of the net.
        net: its layers in the TEST phase with every blob name assigned once, no blobs shared, and one bottom
            and top for every layer with weights. A blob that the given net overwrites has its name as it
            stands at the end.
        weights: the blobs of all layers as floats: scale * Q and the bias for layers with quantized weights.
        inputs: by input of the net the shape of one image's values.
        outputs: the blobs that no layer reads.
        shapes: of all blobs and layers, for a batch of 1.
        layers: those with quantized weights, by name.
        quantizers: by blob the codes that its values are on: what ActQuantize layers make and what layers
            that pass values on make of that.
        floats: the layers with weights that no target can run in integers, and why.
    """

    name: str
    net: NetParameter = field(repr=False)
    weights: Weights = field(repr=False)
    inputs: Mapping[str, Shape]
    outputs: tuple[str, ...]
    shapes: Shapes = field(repr=False)
    layers: Mapping[str, IntegerLayer] = field(repr=False)
    quantizers: Mapping[str, Quantizer] = field(repr=False)
    floats: Mapping[str, str]

    @classmethod
    def of(cls, model: Model, inputs: Mapping[str, Shape] | None = None) -> IntegerNet:
        """Fold a quantized model.

        Args:
            model: with quantized weights.
            inputs: by input of the net the shape of one image's values, where the prototxt does not say it.

        Raises:
            InputError: nothing is quantized, the shape of an input is not known, or blobs do not fit.
        """
        if not any(layer.weights is not None for layer in model.layers):
            raise InputError(
                "no layer has quantized weights, so nothing would be smaller or run in integers; run "
                "`labelfree quantize` first, and give its result"
            )
        return cls.folded(model, inputs)

    @classmethod
    def folded(cls, model: Model, inputs: Mapping[str, Shape] | None = None) -> IntegerNet:
        """As `of`, also where nothing is quantized: the net in full precision to compare with."""
        test = model.inference
        quantized = {layer.name: layer.weights for layer in model.layers if layer.weights is not None}
        shapes = _known_inputs(test, {**model.declared_shapes, **(inputs or {})})
        folding = _Folding.of(test.net, model.weights, shapes, quantized)
        folding.fold()
        folding.replace_shortcuts()
        return folding.result(model.net.name or "net")

    def blob_of(self, output: Output) -> str:
        """The name that an output of the given net has here.

        Raises:
            InputError: there is no such blob any more.
        """
        name = output.blob
        if output.before is not None:
            name = next((layer.bottom[0] for layer in self.net.layer if layer.name == output.before), "")
        if name not in self.shapes.blobs:
            raise InputError(f"the net has no output {output.blob!r} any more; quantize again")
        return name


def whole_codes(integers: IntegerLayer) -> IntegerLayer:
    """The layer with whole numbers as codes, which have no power of two in common."""
    values = np.unique(np.abs(integers.codes))
    values = values[values > 0]
    if not len(values):
        return integers
    mantissas, exponents = np.frexp(values.astype(np.float64))
    whole = (mantissas * 2.0**24).astype(np.int64)
    unit = float(2.0 ** np.min(exponents - 24 + np.log2(whole & -whole)))
    codes = (integers.codes / np.float32(unit)).astype(np.float32)
    return replace(integers, codes=codes, scale=integers.scale * unit)


def _known_inputs(test: InferenceNet, known: Mapping[str, Shape]) -> dict[str, Shape]:
    for name in test.inputs:
        if name not in known:
            raise InputError(f"the shape of input {name!r} is not in the prototxt: give (data.)input_shape")
    return {name: known[name] for name in test.inputs}


@dataclass
class _Folding:
    """A net being folded.

    Attributes:
        net: with every blob name assigned once.
        given: the name that each of its blobs has in the given net.
        blobs: by layer its own blobs, as floats.
        inputs: by input the shape of one image's values.
        outputs: the blobs that no layer reads.
        shapes: of the net before it is folded.
        layers: those with quantized weights, as far as they are folded.
    """

    net: NetParameter
    given: dict[str, str]
    blobs: dict[str, list[FloatArray]]
    inputs: dict[str, Shape]
    outputs: list[str]
    shapes: Shapes
    layers: dict[str, IntegerLayer]

    @classmethod
    def of(
        cls,
        net: NetParameter,
        weights: Weights,
        inputs: dict[str, Shape],
        quantized: Mapping[str, QuantizedWeights],
    ) -> _Folding:
        for layer in net.layer:
            if not has_rule(layer.type):
                raise InputError(
                    f"layer {layer.name!r} ({layer.type}): labelfree does not know what this type computes, "
                    "so no file can say it to another runtime (docs/layers.md has the types that it knows); "
                    "end the network before it, or write it with other layers"
                )
        weights = loaded(net, weights).copy()
        one = {name: (1, *shape) for name, shape in inputs.items()}
        check_weights(net, weights, infer_shapes(net, one))
        flat = single_assignment(net)
        given = dict(zip(_tops(flat), _tops(net), strict=True)) | {name: name for name in inputs}
        blobs = {layer.name: weights[layer.name] for layer in flat.layer if layer.name in weights}
        layers = {
            layer.name: _unfolded(layer, blobs[layer.name], quantized[layer.name])
            for layer in flat.layer
            if layer.name in quantized
        }
        read = {bottom for layer in flat.layer for bottom in layer.bottom}
        outputs = [top for top in _tops(flat) if top not in read]
        folding = cls(flat, given, blobs, inputs, outputs, infer_shapes(flat, one), layers)
        folding.split_several()
        for layer in flat.layer:
            layer.ClearField("param")  # they name what is shared, and nothing is from here on
        return folding

    def split_several(self) -> None:
        """Make a layer with weights and several tops one layer for each."""
        found = []
        for layer in self.net.layer:
            parts = [layer]
            if has_kernels(layer) and len(layer.top) > 1:
                parts = list(self._parts(layer))
            found += parts
        del self.net.layer[:]
        self.net.layer.extend(found)

    def _parts(self, layer: LayerParameter) -> Iterator[LayerParameter]:
        taken = {each.name for each in self.net.layer}
        for number, (bottom, top) in enumerate(zip(layer.bottom, layer.top, strict=True), 1):
            part = LayerParameter()
            part.CopyFrom(layer)
            part.bottom[:], part.top[:] = [bottom], [top]
            if number > 1:
                part.name = _new_name(f"{layer.name}_{number}", taken)
                self.blobs[part.name] = self.blobs[layer.name]
                self.shapes.params[part.name] = self.shapes.params[layer.name]
                if layer.name in self.layers:
                    self.layers[part.name] = self.layers[layer.name]
            yield part

    # ---- What is linear ----

    def fold(self) -> None:
        """Take what rescales the channels of a layer with weights into them."""
        for name in [layer.name for layer in self.net.layer if has_kernels(layer)]:
            layer = self.layer(name)
            folded = self.layers.get(name) or _full_precision(layer, self.blobs[name])
            while (affine := self._affine_behind(layer)) is not None:
                behind, scale, shift = affine
                folded = replace(folded, scale=folded.scale * scale, bias=folded.bias * scale + shift)
                layer.top[0] = behind.top[0]
                self.net.layer.remove(behind)
            self._write(layer, folded)

    def layer(self, name: str) -> LayerParameter:
        """The layer of a name."""
        return next(layer for layer in self.net.layer if layer.name == name)

    def _readers(self, blob: str) -> list[LayerParameter]:
        return [layer for layer in self.net.layer for bottom in layer.bottom if bottom == blob]

    def _affine_behind(self, layer: LayerParameter) -> tuple[LayerParameter, Floats, Floats] | None:
        """The layer behind one with weights that alone reads it and rescales its channels, and how."""
        readers = self._readers(layer.top[0])
        if len(readers) != 1 or len(readers[0].bottom) != 1:
            return None
        axis = _channel_axis(layer, self.shapes.blobs[layer.top[0]])
        found = _affine(
            readers[0], self.blobs.get(readers[0].name, []), self.shapes.blobs[layer.top[0]], axis
        )
        return None if found is None else (readers[0], *found)

    def _write(self, layer: LayerParameter, folded: IntegerLayer) -> None:
        """Give a layer its folded weights."""
        first, *biases = self.blobs[layer.name]
        n = outputs(layer)
        kernels = folded.codes.reshape(n, -1) * folded.scale[:, None]
        blobs = [from_kernels(layer, kernels.astype(np.float32), first.shape)]
        if biases or folded.bias.any():
            is_product = layer.type == "InnerProduct"
            (layer.inner_product_param if is_product else layer.convolution_param).bias_term = True
            blobs.append(folded.bias.astype(np.float32))
        self.blobs[layer.name] = blobs
        if layer.name in self.layers:
            self.layers[layer.name] = folded

    # ---- Shortcuts ----

    def replace_shortcuts(self) -> None:
        """Write zero-padded shortcuts as convolutions."""
        for name in [layer.name for layer in self.net.layer if layer.type == "Concat"]:
            concat = self.layer(name)
            found = self._shortcut(concat)
            if found is not None:
                self._become_convolution(concat, *found)

    def _shortcut(self, concat: LayerParameter) -> tuple[str, FloatArray] | None:
        """Of a Concat of zeros and channels of one blob that blob, and 0s and 1s (n, channels)."""
        top = self.shapes.blobs[concat.top[0]]
        param = concat.concat_param
        axis = param.concat_dim if param.HasField("concat_dim") else param.axis
        if len(top) != IMAGE_AXES or canonical_axis(axis, top) != CHANNEL_AXIS:
            return None
        makers = {blob: layer for layer in self.net.layer for blob in layer.top}
        sources: set[str] = set()
        channels: list[int | None] = []
        for blob in concat.bottom:
            count = self.shapes.blobs[blob][CHANNEL_AXIS]
            if blob in makers and _is_zero(makers[blob]):
                channels += [None] * count
            else:
                source, first = self._sliced_from(blob, makers.get(blob))
                sources.add(source)
                channels += range(first, first + count)
        if len(sources) != 1 or None not in channels:
            return None
        [source] = sources
        chosen = np.zeros((len(channels), self.shapes.blobs[source][CHANNEL_AXIS]), np.float32)
        for row, channel in enumerate(channels):
            if channel is not None:
                chosen[row, channel] = 1
        return source, chosen

    def _sliced_from(self, blob: str, maker: LayerParameter | None) -> tuple[str, int]:
        """The blob that one is a slice of along the channels, and its first channel there."""
        if maker is None or maker.type != "Slice":
            return blob, 0
        param, source = maker.slice_param, maker.bottom[0]
        axis = param.slice_dim if param.HasField("slice_dim") else param.axis
        if canonical_axis(axis, self.shapes.blobs[source]) != CHANNEL_AXIS:
            return blob, 0
        before = list(maker.top)[: list(maker.top).index(blob)]
        return source, sum(self.shapes.blobs[top][CHANNEL_AXIS] for top in before)

    def _become_convolution(self, concat: LayerParameter, source: str, chosen: FloatArray) -> None:
        """Make a Concat the 1x1 convolution with some weights, or give them to the one before it."""
        concat.ClearField("concat_param")
        concat.type = "Convolution"
        concat.bottom[:] = []
        maker = next((layer for layer in self.net.layer if source in layer.top), None)
        if maker is not None and maker.type == "Convolution" and not self._is_needed(source):
            self._absorb(maker, concat, chosen)
            return
        concat.bottom[:] = [source]
        concat.convolution_param.num_output = len(chosen)
        concat.convolution_param.kernel_size.append(1)
        concat.convolution_param.bias_term = False
        self.blobs[concat.name] = [chosen.reshape(*chosen.shape, 1, 1)]
        plain = (np.ones(len(chosen)), np.zeros(len(chosen)))
        self.layers[concat.name] = IntegerLayer(2, "uniform", chosen, *plain)

    def _is_needed(self, blob: str) -> bool:
        """Whether a blob is an output or read by a layer that an output depends on."""
        needed = needed_layers(self.net.layer, self.outputs)
        return blob in self.outputs or any(blob in layer.bottom for layer in needed)

    def _absorb(self, maker: LayerParameter, concat: LayerParameter, chosen: FloatArray) -> None:
        """Make the Concat what the convolution before it and the chosen channels are together."""
        first, *biases = self.blobs[maker.name]
        folded = self.layers.get(maker.name) or _full_precision(maker, [first, *biases])
        rows, some = chosen.argmax(axis=1), chosen.any(axis=1)
        dense = _without_groups(folded.codes.reshape(first.shape), self.shapes.blobs[maker.bottom[0]])
        codes = dense[rows] * some.reshape(-1, 1, 1, 1)
        concat.bottom[:] = maker.bottom
        concat.convolution_param.CopyFrom(maker.convolution_param)
        concat.convolution_param.num_output = len(chosen)
        concat.convolution_param.group = 1
        self.blobs[concat.name] = [codes, *biases]
        scale, bias = np.where(some, folded.scale[rows], 1.0), np.where(some, folded.bias[rows], 0.0)
        joined = replace(folded, codes=codes.reshape(len(codes), -1), scale=scale, bias=bias)
        if maker.name in self.layers:
            self.layers[concat.name] = joined
        self._write(concat, joined)

    # ---- The result ----

    def result(self, name: str) -> IntegerNet:
        """What has become of the net."""
        net = empty_like(self.net)
        net.name = name
        net.layer.extend(needed_layers(self.net.layer, self.outputs))
        names = self._names(net)
        weights = Weights()
        for layer in net.layer:
            layer.bottom[:] = [names[bottom] for bottom in layer.bottom]
            layer.top[:] = [names[top] for top in layer.top]
            if self.blobs.get(layer.name):
                weights.add(layer, self.blobs[layer.name])
        graph = NetGraph(net)
        coders = {blob: graph.coder(blob) for blob in _tops(net)}
        quantizers = {
            blob: quantizer
            for blob, coder in coders.items()
            if coder is not None and (quantizer := read_quantizer(coder)) is not None
        }
        layers = {layer.name: self.layers[layer.name] for layer in net.layer if layer.name in self.layers}
        return IntegerNet(
            name,
            net,
            weights,
            self.inputs,
            tuple(names[output] for output in self.outputs),
            infer_shapes(net, {blob: (1, *shape) for blob, shape in self.inputs.items()}),
            layers,
            quantizers,
            dict(_floats(net, self.inputs, layers, quantizers)),
        )

    def _names(self, net: NetParameter) -> dict[str, str]:
        """The blobs' names: inputs keep theirs; of several that are given one name the last has it."""
        last = {self.given[blob]: blob for blob in _tops(net)} | {name: name for name in self.inputs}
        names = {blob: given for given, blob in last.items()}
        taken = set(last) | set(_tops(net))
        for blob in _tops(net):
            if blob not in names:
                names[blob] = _new_name(f"{blob}_first", taken) if blob in last else blob
        return names


def has_kernels(layer: LayerParameter) -> bool:
    """Whether it is a layer with weights that can be quantized."""
    return Trait.KERNELS in traits_of(layer)


def _tops(net: NetParameter) -> list[str]:
    return [top for layer in net.layer for top in layer.top]


def _new_name(stem: str, taken: set[str]) -> str:
    name, number = stem, 1
    while name in taken:
        number += 1
        name = f"{stem}_{number}"
    taken.add(name)
    return name


def _unfolded(layer: LayerParameter, blobs: list[FloatArray], weights: QuantizedWeights) -> IntegerLayer:
    """Q without its alphas, which the Scale layer behind the layer has."""
    return replace(_full_precision(layer, blobs), bits=weights.bits, grid=weights.grid)


def _full_precision(layer: LayerParameter, blobs: list[FloatArray]) -> IntegerLayer:
    """The kernels as they are, for folding."""
    n = outputs(layer)
    bias = blobs[1].astype(np.float64).reshape(-1) if len(blobs) > 1 else np.zeros(n)
    return IntegerLayer(32, "float", to_kernels(layer, blobs[0]), np.ones(n), bias)


def _channel_axis(layer: LayerParameter, top: Shape) -> int:
    """The axis of a top that has one kernel's outputs at each place."""
    is_product = layer.type == "InnerProduct"
    return canonical_axis((layer.inner_product_param if is_product else layer.convolution_param).axis, top)


def _affine(
    layer: LayerParameter, blobs: list[FloatArray], shape: Shape, axis: int
) -> tuple[Floats, Floats] | None:
    """Scale and shift (channels,) of a layer that rescales the channels along an axis; else None."""
    if layer.type in NORM_TYPES and axis == CHANNEL_AXIS:
        return scale_and_shift(layer, blobs)
    if layer.type not in ("Scale", "Bias") or not blobs or blobs[0].shape != (shape[axis],):
        return None
    given = layer.scale_param.axis if layer.type == "Scale" else layer.bias_param.axis
    if canonical_axis(given, shape) != axis:
        return None
    first, *rest = (blob.astype(np.float64) for blob in blobs)
    if layer.type == "Bias":
        return np.ones(len(first)), first
    return first, rest[0] if rest else np.zeros(len(first))


def _is_zero(layer: LayerParameter) -> bool:
    """Whether all that a layer makes is 0."""
    param = layer.power_param
    return layer.type == "Power" and param.scale == 0 and param.shift == 0 and param.power == 1


def _without_groups(kernels: FloatArray, bottom: Shape) -> FloatArray:
    """The kernels (n, channels / groups, ...) of a convolution as one of a single group has them."""
    n, each = kernels.shape[:2]
    channels = bottom[CHANNEL_AXIS]
    dense = np.zeros((n, channels, *kernels.shape[2:]), np.float32)
    per_group = n * each // channels
    for row in range(n):
        start = row // per_group * each
        dense[row, start : start + each] = kernels[row]
    return dense


def _floats(
    net: NetParameter,
    inputs: Collection[str],
    layers: Collection[str],
    quantizers: Mapping[str, Quantizer],
) -> Iterator[tuple[str, str]]:
    """The layers with weights that cannot run in integers, and why."""
    for layer in net.layer:
        if not has_kernels(layer) or (layer.name in layers and layer.bottom[0] in quantizers):
            continue
        blob = layer.bottom[0]
        if layer.name not in layers:
            yield layer.name, "weights in full precision (weights.layers)"
        elif blob in inputs:
            yield layer.name, f"reads the input {blob}, which is not on codes (activations.input)"
        elif quantizers:
            yield layer.name, f"reads {blob}, which is not on codes (activations.scope: inputs)"
        else:
            yield layer.name, "activations are not quantized (labelfree activations-quan)"
