"""Pictures for the tests of quantize.data, and what hostile ones may do."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import cv2
import numpy as np
import numpy.typing as npt

from quantize.errors import InputError

Result = TypeVar("Result")


def photograph(seed: int, height: int, width: int, channels: int = 3) -> npt.NDArray[np.uint8]:
    """Something smooth with noise, shape (height, width, channels)."""
    rng = np.random.default_rng(seed)
    coarse = rng.uniform(0, 255, (4, 5, channels)).astype(np.float32)
    smooth = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC).reshape(
        height, width, channels
    )
    return np.clip(smooth + rng.normal(0, 4, smooth.shape), 0, 255).astype(np.uint8)


def result_or_input_error(function: Callable[[], Result]) -> Result | None:
    """What the function returns; None where it raises an InputError, which must be of one line."""
    try:
        return function()
    except InputError as error:
        message = str(error)
    assert message
    assert "\n" not in message
    return None
