"""An ONNX graph being written down: tensors are strings, operators are calls that return their outputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
from onnx import helper, numpy_helper

from quantize.arrays import FloatArray, Shape

OPSET, IR_VERSION = 18, 8
"""Of the file format; this pair is read by onnxruntime from 1.14 on."""

FATAL_ONLY = 4
"""Of onnxruntime's log levels. It warns of what is no fault here, and its errors come as exceptions too."""

EXTERNAL_BYTES = 1024
"""Weights from this size on are handed to onnxruntime as they lie in memory and not written into the model,
which protobuf would copy and which could be no larger than 2 GiB."""


class Graph:
    """Operators and constants; what no output needs is left out of the model.

    Every tensor is assigned once; tensor names are our own, for blob names may hold any characters.

    Args:
        prefix: of the tensors' names.
    """

    def __init__(self, prefix: str = "t") -> None:
        self._prefix = prefix
        self._nodes: list[onnx.NodeProto] = []
        self._inputs: dict[str, onnx.ValueInfoProto] = {}
        self._outputs: list[str] = []
        self._constants: dict[str, npt.NDArray[Any]] = {}
        self._tensors: dict[str, onnx.TensorProto] = {}
        self._affines: dict[str, tuple[str, npt.NDArray[np.float64], npt.NDArray[np.float64]]] = {}
        self._count = 0

    def input(self, shape: Shape, grows: bool, kind: int = onnx.TensorProto.FLOAT) -> str:
        """A tensor from outside, float32 by default; ``grows``: it has a first axis of any size."""
        name = self._name()
        dims = [None, *shape[1:]] if grows else shape
        self._inputs[name] = helper.make_tensor_value_info(name, kind, dims)
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
            return self.constant(np.require(values, np.float32, ["C", "A"]))

    def integers(self, values: Iterable[int]) -> str:
        """A vector of int64 constants."""
        return self.constant(np.array(list(values), np.int64))

    def constant(self, array: npt.NDArray[Any]) -> str:
        """A constant of the array's type."""
        name = self._name()
        self._constants[name] = array
        return name

    def tensor(self, tensor: onnx.TensorProto) -> str:
        """A constant of a type that numpy does not know; it gets a name."""
        tensor.name = self._name()
        self._tensors[tensor.name] = tensor
        return tensor.name

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

    def output(self, x: str) -> str:
        """Make ``x`` an output; ONNX wants a copy of what is an input, a constant or an output already."""
        if x in self._inputs or x in self._constants or x in self._outputs:
            x = self.op("Identity", x)
        self._outputs.append(x)
        return x

    def model(self) -> tuple[onnx.ModelProto, list[str], dict[str, FloatArray]]:
        """What computes the outputs, for `open_session`.

        Returns:
            The model; the inputs that it reads; and the constants that it names but does not contain.
        """
        constants = self._needed_constants()
        external = {name: array for name, array in constants.items() if array.nbytes >= EXTERNAL_BYTES}
        model = self._model(_initializers(constants, external), OPSET, IR_VERSION)
        return model, [value.name for value in model.graph.input], external

    def whole_model(self, opset: int, ir_version: int) -> onnx.ModelProto:
        """What computes the outputs, with all constants, for a file."""
        return self._model(_initializers(self._needed_constants(), {}), opset, ir_version)

    def _needed_nodes(self) -> tuple[list[onnx.NodeProto], set[str]]:
        """The operators that outputs depend on, and the tensors."""
        nodes: list[onnx.NodeProto] = []
        needed = set(self._outputs)
        for node in reversed(self._nodes):
            if needed.intersection(node.output):
                needed.update(node.input)
                nodes.append(node)
        return nodes[::-1], needed

    def _needed_constants(self) -> dict[str, npt.NDArray[Any]]:
        _, needed = self._needed_nodes()
        return {name: array for name, array in self._constants.items() if name in needed}

    def _model(self, initializers: list[onnx.TensorProto], opset: int, ir_version: int) -> onnx.ModelProto:
        nodes, needed = self._needed_nodes()
        graph = helper.make_graph(
            nodes,
            "range",
            [value for name, value in self._inputs.items() if name in needed],
            [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in self._outputs],
            [*initializers, *(tensor for name, tensor in self._tensors.items() if name in needed)],
        )
        opsets = [helper.make_opsetid("", opset)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=ir_version)

    def _name(self) -> str:
        self._count += 1
        return f"{self._prefix}{self._count}"


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
