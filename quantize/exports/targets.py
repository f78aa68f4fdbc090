"""The targets by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from quantize.caffenet.model import Model
from quantize.exports.caffe import export_caffe
from quantize.exports.integers import IntegerNet
from quantize.exports.mnn import export_mnn
from quantize.exports.ncnn import export_ncnn
from quantize.exports.onnx import OnnxOptions, export_onnx
from quantize.exports.packed import SUFFIX
from quantize.exports.ranges import export_ranges
from quantize.exports.target import Exported


@dataclass(frozen=True)
class Order:
    """What is to be exported.

    Attributes:
        model: the model.
        net: the same in the neutral form.
        name: what the files' names begin with.
        onnx: how an ONNX file is written.
        fold: whether a plain Caffe pair has alpha, BatchNorm and Scale in its weights.
    """

    model: Model = field(repr=False)
    net: IntegerNet = field(repr=False)
    name: str
    onnx: OnnxOptions
    fold: bool


@dataclass(frozen=True)
class Target:
    """A kind of files.

    Attributes:
        write: makes the files.
        model: what follows the name in those that are the model; the first is the one that runtimes open.
        runtimes: those that can, by name in `engines.exported.RUNTIMES`.
    """

    write: Callable[[Order], Exported]
    model: tuple[str, ...]
    runtimes: tuple[str, ...] = ()


TARGETS = {
    "onnx": Target(
        lambda order: export_onnx(order.net, order.name, order.onnx), (".onnx",), ("onnx", "openvino")
    ),
    "caffe": Target(lambda order: export_caffe(order.model, order.net, order.name, order.fold), (SUFFIX,)),
    "ncnn": Target(lambda order: export_ncnn(order.net, order.name), (".param", ".bin"), ("ncnn",)),
    "mnn": Target(lambda order: export_mnn(order.net, order.name), (".mnn",)),
    "ranges": Target(lambda order: export_ranges(order.net, order.name), ()),
}
