"""An exported pair of NAME.param and NAME.bin in ncnn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ncnn
import numpy as np
import numpy.typing as npt

from quantize.arrays import FloatArray
from quantize.engines.exported import ExportedFile
from quantize.errors import InputError, LabelfreeError
from quantize.files import open_file, read_file
from quantize.record import Kernels

MAGIC = "7767517"
MAX_PARAM = 64 << 20
WITH_WEIGHTS = (
    "Convolution",
    "ConvolutionDepthWise",
    "Deconvolution",
    "DeconvolutionDepthWise",
    "InnerProduct",
)
_IN_INTEGERS = "8="
"""``int8_scale_term``, where it is not 0."""


class File(ExportedFile):
    """A net in ncnn on the CPU, with ncnn's own choice of precision where it computes with floats.

    Args:
        path: NAME.param; NAME.bin lies beside it.
        outputs: the blobs to return.
        threads: to compute with.
    """

    def __init__(self, path: Path, outputs: Sequence[str], threads: int) -> None:
        self._lines = _lines(path)
        self.inputs = tuple(top for line in self._lines if line.type == "Input" for top in line.tops)
        self.outputs = tuple(outputs)
        self.pixels = {}
        tops = {top for line in self._lines for top in line.tops}
        for output in outputs:
            if output not in tops:
                raise InputError(f"{path}: it has no blob {output!r}; export it again")
        weights = path.with_suffix(".bin")
        with open_file(weights, "weights of the ncnn net"):
            pass
        self._net = ncnn.Net()
        self._net.opt.num_threads = threads
        if self._net.load_param(str(path)) or self._net.load_model(str(weights)):
            raise InputError(f"{path}: ncnn cannot open it with {weights.name}; export it again")

    def compute(self, taken: Mapping[str, npt.NDArray[Any]]) -> dict[str, FloatArray]:
        """The outputs; see ``ExportedFile``. ncnn knows no batches: one image after the other."""
        images = [
            self._one({name: values[n] for name, values in taken.items()}) for n in range(_count(taken))
        ]
        return {name: np.stack([image[name] for image in images]) for name in self.outputs}

    def _one(self, image: Mapping[str, npt.NDArray[Any]]) -> dict[str, FloatArray]:
        extractor = self._net.create_extractor()
        kept = {name: np.ascontiguousarray(values, np.float32) for name, values in image.items()}
        for name, values in kept.items():
            extractor.input(name, ncnn.Mat(values))
        found = {}
        for name in self.outputs:
            code, mat = extractor.extract(name)
            if code:
                raise LabelfreeError(f"ncnn: it fails with code {code} at {name}")
            found[name] = np.array(mat)
        return found

    def kernels(self) -> Kernels:
        """Counted in NAME.param: ncnn computes as that says."""
        layers = [line for line in self._lines if line.type in WITH_WEIGHTS]
        integer = sum(any(param.startswith(_IN_INTEGERS) for param in line.params) for line in layers)
        return Kernels(integer, len(layers) - integer)


def _count(taken: Mapping[str, npt.NDArray[Any]]) -> int:
    return len(next(iter(taken.values())))


@dataclass(frozen=True)
class _Line:
    """A layer in NAME.param."""

    type: str
    tops: tuple[str, ...]
    params: tuple[str, ...]


def _lines(path: Path) -> list[_Line]:
    """What NAME.param says.

    Raises:
        InputError: it cannot be read, or is none.
    """
    text = read_file(path, "ncnn net (.param)", MAX_PARAM).decode("utf-8", "surrogateescape")
    magic, _, *rest = [*text.splitlines(), "", ""]
    try:
        if magic.strip() != MAGIC:
            raise ValueError(magic)
        return [_line(words) for words in map(str.split, rest) if words]
    except ValueError:
        raise InputError(f"{path}: damaged, or not a .param of ncnn, which begins with {MAGIC}") from None


def _line(words: list[str]) -> _Line:
    kind, _, bottoms, tops, *names = words
    made = int(bottoms)
    behind = made + int(tops)
    return _Line(kind, tuple(names[made:behind]), tuple(names[behind:]))
