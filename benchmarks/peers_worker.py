"""Other tools, in their own environment (see `benchmarks.peers`): onnx, onnxruntime and, for its row, nncf.

    python peers_worker.py FOLDER 4/8

FOLDER holds full.onnx, calibration.npy and test.npy. Prints a line of JSON for each tool that has the
setting, and writes what the net that it made gives for the test images.
"""

import importlib.util
import json
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import version_converter
from onnxruntime import quantization
from onnxruntime.quantization import shape_inference

INPUT = "images"
BATCH = 50
INT4_OPSET = 21


class Images(quantization.CalibrationDataReader):
    """Calibration images, one by one: percentiles want equal batches."""

    def __init__(self, images: np.ndarray) -> None:
        self.batches = (images[i : i + 1] for i in range(len(images)))

    def get_next(self) -> dict[str, np.ndarray] | None:
        """What onnxruntime's calibrators ask for."""
        batch = next(self.batches, None)
        return None if batch is None else {INPUT: batch}


def by_onnxruntime(folder: Path, images: np.ndarray, bits: tuple[int, int], method: str) -> Path:
    """onnxruntime.quantization: per channel, QDQ; first and last weights of 8 bits."""
    types = quantization.QuantType
    prepared, made = folder / "prepared.onnx", folder / f"ort_{method}.onnx"
    shape_inference.quant_pre_process(folder / "full.onnx", prepared, skip_symbolic_shape=True)
    if 4 in bits:
        onnx.save(version_converter.convert_version(onnx.load(prepared), INT4_OPSET), prepared)
    graph = onnx.load(prepared).graph
    weighted = [node for node in graph.node if node.op_type in ("Conv", "Gemm", "MatMul")]
    override = [{"quant_type": types.QInt8, "axis": 0}]
    quantization.quantize_static(
        prepared,
        made,
        Images(images),
        quant_format=quantization.QuantFormat.QDQ,
        per_channel=True,
        weight_type={8: types.QInt8, 4: types.QInt4}[bits[0]],
        activation_type={8: types.QUInt8, 4: types.QUInt4}[bits[1]],
        calibrate_method=getattr(quantization.CalibrationMethod, method),
        extra_options={"TensorQuantOverrides": {weighted[i].input[1]: override for i in (0, -1)}},
    )
    return made


def by_nncf(folder: Path, images: np.ndarray) -> Path:
    """NNCF's post-training quantization to 8 bits with its fast bias correction."""
    import nncf

    made = folder / "nncf.onnx"
    data = nncf.Dataset([images[i : i + 1] for i in range(len(images))], lambda batch: {INPUT: batch})
    model = onnx.load(folder / "full.onnx")
    onnx.save(nncf.quantize(model, data, subset_size=len(images)), made)
    return made


def tools(
    folder: Path, images: np.ndarray, bits: tuple[int, int]
) -> Iterator[tuple[str, Callable[[], Path]]]:
    """The tools that have a setting, each with what makes its net."""
    runtime = f"onnxruntime {version('onnxruntime')}"
    if set(bits) <= {4, 8}:
        yield f"{runtime}, MinMax", lambda: by_onnxruntime(folder, images, bits, "MinMax")
        yield f"{runtime}, Percentile", lambda: by_onnxruntime(folder, images, bits, "Percentile")
    if bits == (8, 8) and importlib.util.find_spec("nncf"):
        yield f"NNCF {version('nncf')}", lambda: by_nncf(folder, images)


def scores(model: Path, images: np.ndarray) -> np.ndarray:
    """What a net gives; graph optimizations are off, as some of them change quantized nets."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    found = [session.run(None, {INPUT: images[i : i + BATCH]})[0] for i in range(0, len(images), BATCH)]
    return np.concatenate(found)


def main() -> None:
    """Run all tools that have the setting."""
    folder = Path(sys.argv[1])
    bits = tuple(map(int, sys.argv[2].split("/")))
    images, test = np.load(folder / "calibration.npy"), np.load(folder / "test.npy")
    for number, (tool, make) in enumerate(tools(folder, images, (bits[0], bits[1]))):
        start = time.monotonic()
        made = make()
        seconds = time.monotonic() - start
        np.save(folder / f"scores_{number}.npy", scores(made, test).reshape(len(test), -1))
        print(json.dumps({"tool": tool, "seconds": seconds, "scores": f"scores_{number}.npy"}), flush=True)


if __name__ == "__main__":
    main()
