"""An exported ONNX file in OpenVINO."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy.typing as npt
import openvino

from quantize.arrays import FloatArray
from quantize.engines.exported import ExportedFile
from quantize.engines.onnx.file import pixels_of, read_onnx
from quantize.errors import InputError, LabelfreeError
from quantize.record import Kernels

WITH_WEIGHTS = frozenset({"Convolution", "FullyConnected", "MatMul", "Deconvolution"})
"""Layer types in OpenVINO's runtime model."""
INTEGER = frozenset({"u8", "i8"})


class File(ExportedFile):
    """An ONNX file in OpenVINO, on the CPU, with floats of 32 bits where it computes with floats."""

    def __init__(self, path: Path, outputs: Sequence[str], threads: int) -> None:
        model = read_onnx(path, outputs)
        self.pixels = pixels_of(model)
        self._content = model.SerializeToString()
        self._settings = {
            "INFERENCE_NUM_THREADS": threads,
            "INFERENCE_PRECISION_HINT": "f32",
            "PERFORMANCE_HINT": "LATENCY",
        }
        self.inputs = tuple(value.name for value in model.graph.input)
        self.outputs = tuple(outputs)
        self._compiled: dict[int, Any] = {}
        try:
            self._for_batch(1)
        except RuntimeError as error:
            raise InputError(f"{path}: OpenVINO cannot open it: {' '.join(str(error).split())}") from error

    def _for_batch(self, batch: int) -> Any:
        """The net for so many images: OpenVINO is fastest where shapes are known."""
        if batch not in self._compiled:
            core = openvino.Core()
            model = core.read_model(self._content)
            model.reshape({put.any_name: [batch, *list(put.partial_shape)[1:]] for put in model.inputs})
            self._compiled[batch] = core.compile_model(model, "CPU", self._settings)
        return self._compiled[batch]

    def compute(self, taken: Mapping[str, npt.NDArray[Any]]) -> dict[str, FloatArray]:
        """The outputs; see ``ExportedFile``."""
        batch = len(next(iter(taken.values())))
        try:
            found = self._for_batch(batch)(dict(taken))
        except RuntimeError as error:
            raise LabelfreeError(f"OpenVINO: {' '.join(str(error).split())}") from error
        return {name: found[name] for name in self.outputs}

    def kernels(self) -> Kernels:
        """Counted in the model that OpenVINO runs."""
        precisions = []
        for layer in self._for_batch(1).get_runtime_model().get_ops():
            about = {key: layer.rt_info[key].astype(str) for key in ("layerType", "runtimePrecision")}
            if about["layerType"] in WITH_WEIGHTS:
                precisions.append(about["runtimePrecision"])
        integer = sum(precision in INTEGER for precision in precisions)
        return Kernels(integer, len(precisions) - integer)
