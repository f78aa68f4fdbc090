"""Memory in which frontiers come and go."""

from __future__ import annotations

import math
import mmap
from bisect import bisect

import numpy as np

from quantize.arrays import FLOAT_BYTES, FloatArray, Shape
from quantize.sweep.plan import aligned

GAPS = 4
"""An arena has one part in so many more than what is in use."""


class Arena:
    """One mapping of memory in which frontiers come and go.

    The first touch of every page is a page fault, which may cost more than computing what is written there.
    So arrays are put at the lowest free place, where most likely others have been. Gaps between arrays may be
    too small for others, so the mapping is a little larger than all that is kept at a time. What is never
    touched takes no memory.

    Args:
        size: bytes that are in use at a time, at most.
    """

    def __init__(self, size: int) -> None:
        size = max(size + size // GAPS, 1)
        pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._memory = np.frombuffer(pages, np.uint8)
        self._free = [(0, size)]
        """Start and end of the free places, in order; no two are adjacent."""

    def take(self, shape: Shape) -> FloatArray:
        """An array with any content; outside of the arena should all gaps be too small."""
        size = FLOAT_BYTES * math.prod(shape)
        for index, (start, end) in enumerate(self._free):
            if end - start >= aligned(size):
                rest = (start + aligned(size), end)
                self._free[index : index + 1] = [rest] if rest[0] < end else []
                return self._memory[start : start + size].view(np.float32).reshape(shape)
        return np.empty(shape, np.float32)

    def give(self, array: FloatArray) -> None:
        """Give back an array that was taken; nobody may use it from now on."""
        start = array.ctypes.data - self._memory.ctypes.data
        if not 0 <= start < len(self._memory):
            return
        end = start + aligned(array.nbytes)
        index = bisect(self._free, (start, end))
        if index < len(self._free) and self._free[index][0] == end:
            end = self._free.pop(index)[1]
        if index and self._free[index - 1][1] == start:
            index -= 1
            start = self._free.pop(index)[0]
        self._free.insert(index, (start, end))
