"""An exported ONNX file in onnxruntime, and what is said of one for any runtime."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
from google.protobuf.message import DecodeError

from quantize.arrays import FloatArray
from quantize.engines.exported import ExportedFile, Pixels
from quantize.engines.onnx.graph import FATAL_ONLY
from quantize.errors import InputError, LabelfreeError
from quantize.files import read_file
from quantize.record import Kernels

MAX_BYTES = 2**31 - 1
MEAN, SCALE = "labelfree.mean", "labelfree.scale"
"""Metadata of files that take pixels: means by channel, separated by commas, and the scale."""
INTEGER = frozenset(
    {
        *("QLinearConv", "ConvInteger", "QGemm", "QLinearMatMul", "MatMulInteger", "MatMulIntegerToFloat"),
        "DynamicQuantizeMatMul",
    }
)
FLOATING = frozenset(
    {
        *("Conv", "FusedConv", "NhwcFusedConv", "ConvTranspose", "Gemm", "FusedGemm", "MatMul"),
        "FusedMatMul",
    }
)
"""Operators with weights in onnxruntime's optimized graphs."""


def read_onnx(path: Path, outputs: Sequence[str]) -> onnx.ModelProto:
    """A file, with more blobs as its outputs.

    Raises:
        InputError: it cannot be read, or lacks such a blob.
    """
    try:
        model = onnx.ModelProto.FromString(read_file(path, "ONNX file", MAX_BYTES))
    except DecodeError as error:
        raise InputError(f"{path}: not an ONNX file, or damaged; export it again") from error
    made = {name for node in model.graph.node for name in node.output}
    present = {value.name for value in model.graph.output}
    for name in outputs:
        if name not in made:
            raise InputError(f"{path}: no blob {name!r} in it; export it again")
        if name not in present:
            model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    return model


def pixels_of(model: onnx.ModelProto) -> dict[str, Pixels]:
    """By input that takes pixels what the net does with them."""
    said = {entry.key: entry.value for entry in model.metadata_props}
    taking = [
        value.name
        for value in model.graph.input
        if value.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    ]
    if not taking:
        return {}
    try:
        mean = np.array([float(part) for part in said[MEAN].split(",")])
        return {name: Pixels(mean, float(said[SCALE])) for name in taking}
    except (KeyError, ValueError) as error:
        raise InputError(f"it takes pixels but does not say mean and scale ({MEAN}, {SCALE})") from error


class File(ExportedFile):
    """An ONNX file in onnxruntime."""

    def __init__(self, path: Path, outputs: Sequence[str], threads: int) -> None:
        self._model = read_onnx(path, outputs)
        self.pixels = pixels_of(self._model)
        self._threads = threads
        self.inputs = tuple(value.name for value in self._model.graph.input)
        self.outputs = tuple(outputs)
        try:
            self._session = self._open(self._options())
        except Exception as error:  # onnxruntime's exceptions have no common base but this
            raise InputError(f"{path}: onnxruntime cannot open it: {' '.join(str(error).split())}") from error

    def compute(self, taken: Mapping[str, npt.NDArray[Any]]) -> dict[str, FloatArray]:
        """The outputs; see ``ExportedFile``."""
        try:
            found = self._session.run(list(self.outputs), dict(taken))
        except Exception as error:  # as above
            raise LabelfreeError(f"onnxruntime: {' '.join(str(error).split())}") from error
        return dict(zip(self.outputs, found, strict=True))

    def kernels(self) -> Kernels:
        """Counted in the graph that onnxruntime runs."""
        with tempfile.TemporaryDirectory() as folder:
            options = self._options()
            options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
            self._open(options)
            graph = onnx.load(options.optimized_model_filepath).graph
        kinds = Counter(node.op_type for node in graph.node)
        return Kernels(sum(kinds[kind] for kind in INTEGER), sum(kinds[kind] for kind in FLOATING))

    def _options(self) -> onnxruntime.SessionOptions:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.log_severity_level = FATAL_ONLY
        return options

    def _open(self, options: onnxruntime.SessionOptions) -> onnxruntime.InferenceSession:
        return onnxruntime.InferenceSession(
            self._model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
