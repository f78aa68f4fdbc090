"""Array types and sizes, as every room names them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]
"""Blobs: what Caffe computes with."""
Floats = npt.NDArray[np.float64]
"""What sums, solvers and statistics are computed with."""
Labels = npt.NDArray[np.int64]
Shape = tuple[int, ...]
FLOAT_BYTES = 4
