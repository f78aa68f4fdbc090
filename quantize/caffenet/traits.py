"""What is known of layer types beside shapes (`shape_rules`) and arithmetic (the engines): one table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Flag, auto

from quantize.caffenet.norms import has_scale_bias
from quantize.caffenet.schema import HardSigmoidParameter, LayerParameter, PoolingParameter

COMPARING = ("Loss", "Accuracy", "Evaluate")
"""In the name of every type that compares with labels, those of forks included."""


class Trait(Flag):
    """What may hold of a layer."""

    NONE = 0
    KERNELS = auto()
    """Its first blob holds kernels, which can be quantized."""
    BLOBS = auto()
    """It has blobs of its own, which are trained."""
    AFFINE = auto()
    """y = a * x + b at each place, with blobs a and b: it rescales what the layer before makes."""
    ELEMENTWISE = auto()
    """Each value of y is a function of that of x at its place, the same one for all places of a channel."""
    RISING = auto()
    """And where x is larger, y is not smaller."""
    PASSING = auto()
    """y holds values of x and no others, zeros perhaps; see `passed_on`."""
    CODES = auto()
    """It puts values on codes."""
    IMAGES = auto()
    """It feeds the net with images that it has transformed; what it makes beside them are labels."""
    ANYTHING = auto()
    """It feeds the net, and its tops may be anything."""
    CONSTANT = auto()
    """It feeds the net with what is the same for all images."""
    COMPARES = auto()
    """It compares with labels: a loss, Accuracy, or what has a weight as a loss."""
    SCORES = auto()
    """Its first bottom holds class scores, whoever makes them."""


@dataclass(frozen=True)
class _Row:
    """Traits of a type: those of all its layers, and more of those whose parameters are so."""

    always: Trait
    more: Trait = Trait.NONE
    where: Callable[[LayerParameter], bool] = lambda _: False


_NORM = Trait.BLOBS | Trait.AFFINE | Trait.ELEMENTWISE
_KERNELS = _Row(Trait.KERNELS | Trait.BLOBS)
_RISING = _Row(Trait.ELEMENTWISE | Trait.RISING)
_NOTHING = _Row(Trait.NONE)
_AFFINE = _Row(Trait.BLOBS, Trait.AFFINE, lambda layer: len(layer.bottom) == 1)

_ROWS = {
    # Kernels
    "Convolution": _KERNELS,
    "ConvolutionDepthwise": _KERNELS,
    "DepthwiseConvolution": _KERNELS,
    "Deconvolution": _KERNELS,
    "InnerProduct": _KERNELS,
    # Per channel
    "BatchNorm": _Row(_NORM, Trait.RISING, lambda layer: not has_scale_bias(layer)),
    "BN": _Row(_NORM),
    "CuDNNBatchNorm": _Row(_NORM),
    "Scale": _AFFINE,
    "Bias": _AFFINE,
    # Element by element
    "ReLU": _Row(Trait.ELEMENTWISE, Trait.RISING, lambda layer: layer.relu_param.negative_slope >= 0),
    "ReLU6": _RISING,
    "PReLU": _Row(Trait.ELEMENTWISE | Trait.BLOBS),
    "ELU": _Row(Trait.ELEMENTWISE, Trait.RISING, lambda layer: layer.elu_param.alpha >= 0),
    "Sigmoid": _RISING,
    "TanH": _RISING,
    "BNLL": _RISING,
    "Clip": _RISING,
    "Threshold": _RISING,
    "Swish": _Row(Trait.ELEMENTWISE),
    "HardSigmoid": _Row(Trait.ELEMENTWISE, Trait.RISING, lambda layer: _slope(layer) >= 0),
    "HardSwish": _Row(Trait.ELEMENTWISE),
    "Mish": _Row(Trait.ELEMENTWISE),
    "AbsVal": _Row(Trait.ELEMENTWISE),
    "Exp": _Row(Trait.ELEMENTWISE),
    "Log": _Row(Trait.ELEMENTWISE),
    "Power": _Row(Trait.ELEMENTWISE),
    "ActQuantize": _Row(Trait.ELEMENTWISE | Trait.RISING | Trait.CODES),
    "Quant": _Row(Trait.ELEMENTWISE | Trait.RISING | Trait.CODES),
    "Dropout": _Row(Trait.ELEMENTWISE | Trait.RISING | Trait.PASSING),
    "Eltwise": _NOTHING,
    "Axpy": _NOTHING,
    # Windows and axes
    "Pooling": _Row(Trait.NONE, Trait.PASSING, lambda layer: _is_max(layer) and len(layer.top) == 1),
    "SPP": _NOTHING,
    "Im2col": _NOTHING,
    "LRN": _NOTHING,
    "Normalize": _Row(Trait.BLOBS),
    "Interp": _NOTHING,
    "MVN": _NOTHING,
    "Softmax": _NOTHING,
    "Reduction": _NOTHING,
    "ArgMax": _NOTHING,
    # Shapes and places
    "Split": _Row(Trait.PASSING),
    "Flatten": _Row(Trait.PASSING),
    "Reshape": _Row(Trait.PASSING),
    "Permute": _Row(Trait.PASSING),
    "ShuffleChannel": _Row(Trait.PASSING),
    "Reorg": _Row(Trait.PASSING),
    "Upsample": _Row(Trait.PASSING),
    "Concat": _Row(Trait.PASSING),
    "Slice": _Row(Trait.PASSING),
    "Crop": _Row(Trait.PASSING),
    "Tile": _Row(Trait.PASSING),
    "BatchReindex": _NOTHING,
    "Silence": _NOTHING,
    # Other layers with blobs
    "Embed": _Row(Trait.BLOBS),
    "LSTM": _Row(Trait.BLOBS),
    "RNN": _Row(Trait.BLOBS),
    "Recurrent": _Row(Trait.BLOBS),
    "Parameter": _Row(Trait.BLOBS),
    # Measures
    "Accuracy": _Row(Trait.SCORES),
    "SoftmaxWithLoss": _Row(Trait.SCORES),
    "InfogainLoss": _Row(Trait.SCORES),
    # Sources
    "Data": _Row(Trait.IMAGES),
    "ImageData": _Row(Trait.IMAGES),
    "MemoryData": _Row(Trait.IMAGES),
    "WindowData": _Row(Trait.IMAGES),
    "AnnotatedData": _Row(Trait.IMAGES),
    "Input": _Row(Trait.ANYTHING),
    "HDF5Data": _Row(Trait.ANYTHING),
    "DummyData": _Row(Trait.CONSTANT),
}


def traits_of(layer: LayerParameter) -> Trait:
    """What is known of a layer; of an unknown type only whether it compares with labels."""
    row = _ROWS.get(layer.type, _NOTHING)
    traits = row.always | (row.more if row.where(layer) else Trait.NONE)
    compares = any(name in layer.type for name in COMPARING) or any(layer.loss_weight)
    return traits | Trait.COMPARES if compares else traits


def types_with(trait: Trait) -> list[str]:
    """The layer types all of whose layers have a trait."""
    return [name for name, row in _ROWS.items() if trait in row.always]


def passed_on(layer: LayerParameter) -> Sequence[str]:
    """The bottoms whose values, and no others, the tops of a layer hold."""
    if Trait.PASSING not in traits_of(layer):
        return []
    return layer.bottom if layer.type == "Concat" else layer.bottom[:1]


def hard_sigmoid_param(layer: LayerParameter) -> HardSigmoidParameter:
    """The parameters of a HardSigmoid; forks have two names for them."""
    if layer.HasField("hardsigmoid_param"):
        return layer.hardsigmoid_param
    return layer.hard_sigmoid_param


def _slope(layer: LayerParameter) -> float:
    return hard_sigmoid_param(layer).alpha


def _is_max(layer: LayerParameter) -> bool:
    return layer.pooling_param.pool == PoolingParameter.MAX
