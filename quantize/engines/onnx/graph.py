"""An ONNX graph being written down: tensors are strings, operators are calls that return their outputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
from onnx import helper, numpy_helper

from quantize.arrays import FloatArray, Shape

OPSET = 18
IR_VERSION = 8
"""Of the file format; this pair is read by onnxruntime from 1.14 on."""

LONGEST_AVERAGE, SHORTEST_AVERAGE = 1024, 16
"""Over how many values an average may be taken in float32; and over how many at least, lest there be many."""

FATAL_ONLY = 4
"""Of onnxruntime's log levels. It warns of what is no fault here, and its errors come as exceptions too."""

EXTERNAL_BYTES = 1024
"""Weights from this size on are handed to onnxruntime as they lie in memory and not written into the model,
which protobuf would copy and which could be no larger than 2 GiB."""


class Graph:
    """Operators and constants; what no output needs is left out of the model.

    Every tensor is assigned once; tensor names are our own, for blob names may hold any characters.
    """

    opsets: tuple[tuple[str, int], ...] = (("", OPSET),)
    """Domains and versions of the operators."""

    def __init__(self) -> None:
        self._nodes: list[onnx.NodeProto] = []
        self._inputs: dict[str, onnx.ValueInfoProto] = {}
        self._outputs: list[str] = []
        self._constants: dict[str, npt.NDArray[Any]] = {}
        self._later: dict[str, Callable[[], FloatArray]] = {}
        self._affines: dict[str, tuple[str, npt.NDArray[np.float64], npt.NDArray[np.float64]]] = {}
        self._count = 0

    def input(self, shape: Shape, grows: bool, own_layout: bool = False) -> str:  # noqa: ARG002
        """A float32 tensor from outside.

        Args:
            grows: it has a first axis of any size.
            own_layout: it comes from an output with ``own_layout``.
        """
        name = self._name()
        dims = [None, *shape[1:]] if grows else shape
        self._inputs[name] = helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, dims)
        return name

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """An operator of one output."""
        return self.ops(kind, 1, *inputs, **attributes)[0]

    def ops(self, kind: str, count: int, *inputs: str, **attributes: Any) -> list[str]:
        """An operator of ``count`` outputs."""
        outputs = [self._name() for _ in range(count)]
        self._nodes.append(helper.make_node(kind, list(inputs), outputs, **attributes))
        return outputs

    def floats(self, values: npt.ArrayLike) -> str:
        """A float32 constant; aligned C-contiguous float32 arrays are not copied. Too large is inf."""
        with np.errstate(over="ignore"):
            return self._constant(np.require(values, np.float32, ["C", "A"]))

    def later(self, make: Callable[[], FloatArray]) -> str:
        """A float32 constant that is made when the model is, if an output needs it."""
        name = self._name()
        self._later[name] = make
        return name

    def integers(self, values: Iterable[int]) -> str:
        """A vector of int64 constants."""
        return self._constant(np.array(list(values), np.int64))

    def reshape(self, x: str, dims: Iterable[int]) -> str:
        """``x`` in another shape; -1 stands for what is left."""
        return self.op("Reshape", x, self.integers(dims))

    def affine(self, x: str, shape: Shape, scale: npt.ArrayLike, shift: npt.ArrayLike) -> str:
        """x * scale + shift, per channel (axis 1).

        Of an affine of an affine, one is made of the first one's input: BatchNorm and the Scale layers around
        it are one pass over the memory. The operator is BatchNormalization, as onnxruntime fuses that with a
        convolution before it and has a single pass for it.

        Args:
            x: a tensor.
            shape: its shape; at least two axes.
            scale: one number per channel, or one in all.
            shift: the same.
        """
        channels = (shape[1],)
        a = np.broadcast_to(np.asarray(scale, np.float64), channels)
        b = np.broadcast_to(np.asarray(shift, np.float64), channels)
        if x in self._affines:
            x, first_a, first_b = self._affines[x]
            a, b = first_a * a, first_b * a + b
        zero, one = self.floats(np.zeros(channels)), self.floats(np.ones(channels))
        y = self.op("BatchNormalization", x, self.floats(a), self.floats(b), zero, one, epsilon=0.0)
        self._affines[y] = (x, a, b)
        return y

    def moments(self, x: str, shape: Shape) -> list[tuple[str, Shape]]:
        """What makes mean and variance of each image's channels.

        An average of squares loses all digits where the mean is large, so a value near the mean is
        subtracted first. The average of what is left gives the digits that it lacks. Averages of many
        float32 of one sign lose digits as well, so each is of a part of the values.

        Args:
            shape: of ``x``: (N, C, ...).

        Returns:
            Tensors and their shapes without N: a value near the mean (N, C, 1); of what is left, the averages
            and those of the squares (N, C, parts), or (N, C / B, parts, B) where blocks of B channels lie
            together.
        """
        channels, values = shape[1] if len(shape) > 1 else 1, math.prod(shape[2:])
        x = self.reshape(x, (-1, channels, values))
        near = self.op("ReduceMean", x, self.integers([2]))
        part = _part_size(values, LONGEST_AVERAGE)
        parts = (channels, values // part)
        rest = self.reshape(self.op("Sub", x, near), (-1, *parts, part))
        averages = [
            (self.op("ReduceMean", y, self.integers([3]), keepdims=0), parts)
            for y in (rest, self.op("Mul", rest, rest))
        ]
        return [(near, (channels, 1)), *averages]

    def shared(self, x: str) -> None:
        """Say that ``x`` is read more than once: fusing a reader with what computes it would save nothing."""

    def output(self, x: str, own_layout: Shape | None = None) -> str:  # noqa: ARG002
        """Make ``x`` an output; ONNX wants a copy of what is an input, a constant or an output already.

        Args:
            own_layout: the shape of ``x``, to have its values in the order that suits the graph, for an input
                with ``own_layout``.
        """
        if x in self._inputs or x in self._constants or x in self._outputs:
            x = self.op("Identity", x)
        self._outputs.append(x)
        return x

    def model(self) -> tuple[onnx.ModelProto, list[str], dict[str, FloatArray]]:
        """What computes the outputs.

        Returns:
            The model; the inputs that it reads; and the constants that it names but does not contain.
        """
        nodes: list[onnx.NodeProto] = []
        needed = set(self._outputs)
        for node in reversed(self._nodes):
            if needed.intersection(node.output):
                needed.update(node.input)
                nodes.append(node)
        inputs = [name for name in self._inputs if name in needed]
        constants = {name: array for name, array in self._constants.items() if name in needed}
        constants.update((name, make()) for name, make in self._later.items() if name in needed)
        external = {name: array for name, array in constants.items() if array.nbytes >= EXTERNAL_BYTES}
        graph = helper.make_graph(
            nodes[::-1],
            "range",
            [self._inputs[name] for name in inputs],
            [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in self._outputs],
            _initializers(constants, external),
        )
        opsets = [helper.make_opsetid(*opset) for opset in self.opsets]
        return helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION), inputs, external

    def _constant(self, array: npt.NDArray[Any]) -> str:
        name = self._name()
        self._constants[name] = array
        return name

    def _name(self) -> str:
        self._count += 1
        return f"t{self._count}"


def _initializers(
    constants: Mapping[str, npt.NDArray[Any]], external: Mapping[str, npt.NDArray[Any]]
) -> list[onnx.TensorProto]:
    tensors = []
    for name, array in constants.items():
        if name in external:
            tensor = onnx.TensorProto(
                name=name,
                dims=array.shape,
                data_type=helper.np_dtype_to_tensor_dtype(array.dtype),
                data_location=onnx.TensorProto.EXTERNAL,
            )
            tensor.external_data.add(key="location", value="given by add_external_initializers")
        else:
            tensor = numpy_helper.from_array(array, name)
        tensors.append(tensor)
    return tensors


def open_session(model: onnx.ModelProto, constants: Mapping[str, FloatArray]) -> onnxruntime.InferenceSession:
    """A session of one thread for ``Graph.model``; it reads the constants where they lie, so keep them."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = FATAL_ONLY
    values = [onnxruntime.OrtValue.ortvalue_from_numpy(array) for array in constants.values()]
    options.add_external_initializers(list(constants), values)
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def _part_size(values: int, longest: int) -> int:
    """The largest divisor of ``values`` up to ``longest``; all of them if there is but a small one."""
    divisor = max(d for d in range(1, max(1, min(values, longest)) + 1) if values % d == 0)
    return divisor if divisor >= SHORTEST_AVERAGE else values
