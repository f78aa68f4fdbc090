"""Exported files, opened in the runtimes that they are for."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from quantize.arrays import FloatArray, Floats
from quantize.engines.base import Range, RangeResult
from quantize.errors import InputError
from quantize.record import Kernels

RUNTIMES = {"onnx": "onnxruntime", "openvino": "openvino", "ncnn": "ncnn"}
"""The Python modules of the runtimes that can score files, by the runtime's name here."""


@dataclass(frozen=True)
class Pixels:
    """What a net does with pixels of 8 bits: (pixel - mean) * scale.

    Attributes:
        mean: float64 (channels,).
        scale: positive.
    """

    mean: Floats
    scale: float

    def of_values(self, values: FloatArray) -> npt.NDArray[np.uint8]:
        """The pixels (N, channels, height, width) that values were made of."""
        pixels = values / self.scale + self.mean.reshape(-1, 1, 1)
        return np.rint(pixels).clip(0, 255).astype(np.uint8)


class ExportedFile(Range):
    """A file opened in its runtime: a range that is the whole net.

    Args:
        path: the file.
        outputs: the blobs to return.
        threads: to compute with.

    Raises:
        InputError: it cannot be read, lacks such a blob, or the runtime is not installed.
    """

    outputs: tuple[str, ...]
    pixels: Mapping[str, Pixels]
    """What the net does with pixels, by input that takes such."""

    @abstractmethod
    def __init__(self, path: Path, outputs: Sequence[str], threads: int) -> None:
        """Open it."""

    def taken(self, feeds: Mapping[str, FloatArray]) -> dict[str, npt.NDArray[Any]]:
        """The values of images as the file takes them."""
        return {
            name: self.pixels[name].of_values(feeds[name]) if name in self.pixels else feeds[name]
            for name in self.inputs
        }

    @abstractmethod
    def compute(self, taken: Mapping[str, npt.NDArray[Any]]) -> dict[str, FloatArray]:
        """The outputs for some images as the file takes them; raises as `run`."""

    def run(
        self, feeds: Mapping[str, FloatArray], into: Mapping[str, FloatArray] | None = None
    ) -> RangeResult:
        """Run on some images; see ``Range``. Nothing is written into given arrays.

        Raises:
            LabelfreeError: the runtime fails.
        """
        del into
        return RangeResult(self.compute(self.taken(feeds)), {})

    @abstractmethod
    def kernels(self) -> Kernels:
        """What the runtime has made of the layers with weights."""


def open_exported(runtime: str, path: Path, outputs: Sequence[str], threads: int) -> ExportedFile:
    """Open a file in a runtime of `RUNTIMES`; raises as `ExportedFile`."""
    check_installed(runtime)
    opened: Any = import_module(_OPENERS[runtime])
    file: ExportedFile = opened.File(path, outputs, threads)
    return file


_OPENERS = {
    "onnx": "quantize.engines.onnx.file",
    "openvino": "quantize.engines.openvino",
    "ncnn": "quantize.engines.ncnn",
}


def is_installed(runtime: str) -> bool:
    """Whether a runtime of `RUNTIMES` can be imported."""
    return find_spec(RUNTIMES[runtime]) is not None


def check_installed(runtime: str) -> None:
    """Check that a runtime can be imported (InputError with the line that installs it)."""
    if not is_installed(runtime):
        raise InputError(f"{runtime} is not installed; install it with: pip install 'labelfree[{runtime}]'")
