"""A plain pair, NAME_plain.prototxt and NAME_plain.caffemodel, for every toolchain that still reads Caffe.

It has no ActQuantize layers: one of unsigned codes is a ReLU, one of codes of both signs nothing. So its
activations are floats; what they are quantized with stands in NAME_scales.json. Every blob of the folded
pair has a name of its own, which is what tables of ranges go by. NAME.lfq beside it is the quantized pair
itself, packed (see `packed`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from io import BytesIO

from quantize.arrays import Shape
from quantize.caffenet import NetParameter, Shapes, Weights, empty_like, format_prototxt, infer_shapes
from quantize.caffenet.model import Model
from quantize.caffenet.norms import with_stored_statistics
from quantize.caffenet.quantized import Quantizer, read_quantizer
from quantize.caffenet.strings import to_bytes
from quantize.errors import InputError
from quantize.exports.integers import IntegerNet
from quantize.exports.packed import SUFFIX, packed
from quantize.exports.scales import scales_json
from quantize.exports.target import Exported

FORKS_DEPTHWISE = ("DepthwiseConvolution", "ConvolutionDepthwise")
"""Types of forks: a Convolution with as many groups as channels, where its ``group`` is not given."""


def export_caffe(model: Model, net: IntegerNet, name: str, fold: bool = True) -> Exported:
    """Make the plain pair, NAME_scales.json and NAME.lfq.

    Args:
        model: the quantized model.
        net: the same in the neutral form.
        name: of the files.
        fold: alpha, BatchNorm and Scale into the weights; else the pair keeps them as layers.

    Raises:
        InputError: a layer that is carried over reads what folding has taken away.
        LabelfreeError: a caffemodel would be larger than Caffe can read.
    """
    test = model.inference
    quantized, weights = with_inputs(with_stored_statistics(test.whole), net.inputs), model.weights
    if fold:
        plain, weights = plain_net(net)[0], net.weights.copy()
        _carry_over(model, plain, weights)
    else:
        shapes = infer_shapes(test.net, {blob: (1, *shape) for blob, shape in net.inputs.items()})
        plain, _ = without_quantizers(quantized, shapes)
    files = {
        f"{name}_plain.prototxt": to_bytes(format_prototxt(plain)),
        f"{name}_plain.caffemodel": caffemodel(weights),
        f"{name}_scales.json": scales_json(net).encode(),
        f"{name}{SUFFIX}": packed(caffemodel(model.weights), to_bytes(format_prototxt(quantized))),
    }
    return Exported(files, net.floats)


def caffemodel(weights: Weights) -> bytes:
    """The content of a caffemodel.

    Raises:
        LabelfreeError: it would be larger than Caffe can read.
    """
    file = BytesIO()
    weights.write(file)
    return file.getvalue()


def _carry_over(model: Model, plain: NetParameter, weights: Weights) -> None:
    """Add the layers that labelfree does not know, behind which nothing is quantized, to a folded net."""
    made = {top for layer in plain.layer for top in layer.top}
    for layer in model.inference.whole.layer:
        if layer.name in model.inference.trailing:
            for bottom in layer.bottom:
                if bottom not in made:
                    raise InputError(
                        f"layer {layer.name!r} ({layer.type}): it reads {bottom!r}, which is gone where "
                        "BatchNorm and Scale are folded: export with --keep-layers"
                    )
            made.update(layer.top)
            plain.layer.append(layer)
            if layer.name in model.weights:
                weights.add(layer, model.weights[layer.name])


def with_inputs(net: NetParameter, inputs: Mapping[str, Shape]) -> NetParameter:
    """A net with an Input layer of one image for each of its inputs, copied otherwise.

    Args:
        net: its layers in the TEST phase.
        inputs: by input the shape of one image's values.
    """
    taken = {layer.name for layer in net.layer}
    changed = empty_like(net)
    for blob, shape in inputs.items():
        name = blob
        while name in taken:
            name += "_"
        layer = changed.layer.add(name=name, type="Input", top=[blob])
        layer.input_param.shape.add().dim.extend([1, *shape])
    changed.layer.extend(net.layer)
    return changed


def plain_net(net: IntegerNet) -> tuple[NetParameter, dict[str, Quantizer]]:
    """The folded net with its Input layers and without quantizers, and by blob the codes that it is on."""
    plain, renamed = without_quantizers(with_inputs(net.net, net.inputs), net.shapes)
    return plain, {renamed.get(blob, blob): quantizer for blob, quantizer in net.quantizers.items()}


def without_quantizers(net: NetParameter, shapes: Shapes) -> tuple[NetParameter, dict[str, str]]:
    """A copy without ActQuantize layers and without the depthwise types of forks.

    Args:
        net: the net.
        shapes: of its blobs.

    Returns:
        The net, and of the blobs that are gone those that hold the same values.
    """
    changed = empty_like(net)
    written = Counter(top for layer in net.layer for top in layer.top)
    relus: set[str] = set()
    renamed: dict[str, str] = {}
    for given in net.layer:
        layer = changed.layer.add()
        layer.CopyFrom(given)
        layer.bottom[:] = [renamed.get(bottom, bottom) for bottom in layer.bottom]
        quantizer = read_quantizer(layer)
        if quantizer is not None:
            source, top = layer.bottom[0], layer.top[0]
            same = quantizer.lowest < 0 or source in relus
            if same and (source == top or written[source] == written[top] == 1):
                if source != top:
                    renamed[top] = source
                del changed.layer[-1]
                continue
            layer.type = "Power" if same else "ReLU"  # a Power without parameters gives what it gets
            layer.ClearField("relu_param")
            layer.ClearField("threshold_param")
        elif layer.type in FORKS_DEPTHWISE:
            layer.type = "Convolution"
            if not layer.convolution_param.HasField("group"):
                layer.convolution_param.group = shapes.blobs[given.bottom[0]][1]
        relus.difference_update(layer.top)
        is_relu = layer.type == "ReLU" and not layer.relu_param.negative_slope
        if is_relu or (layer.type == "Clip" and layer.clip_param.min >= 0):
            relus.update(layer.top)
    return changed, renamed
