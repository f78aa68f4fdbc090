"""The targets by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from quantize.exports.integers import IntegerNet
from quantize.exports.onnx import OnnxOptions, export_onnx
from quantize.exports.target import Exported


@dataclass(frozen=True)
class Target:
    """A kind of files.

    Attributes:
        write: makes the files of a net; their names begin with the given one.
        file: what follows that in the name of the one that runtimes open.
        runtimes: those that can, by name in `engines.exported.RUNTIMES`.
    """

    write: Callable[[IntegerNet, str, OnnxOptions], Exported]
    file: str
    runtimes: tuple[str, ...]


TARGETS = {"onnx": Target(export_onnx, ".onnx", ("onnx", "openvino"))}
