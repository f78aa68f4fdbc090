"""Count, mean and squared deviations per channel, mergeable."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

from quantize.arrays import FloatArray, Floats

LONGEST, SHORTEST = 512, 16
"""Over how many values a sum may be taken in float32; and over how many at least, lest there be many."""
CANCELLED = 10.0
"""Where the squared mean is so many times the variance, a digit of the squares is lost."""


@dataclass(frozen=True)
class Moments:
    """Per channel (axis 1; the only axis of a 2-D blob besides the batch) over all values seen.

    Attributes:
        count: number of values per channel.
        mean: float64, shape (channels,).
        m2: float64, shape (channels,): the sum of squared deviations from ``mean``.
    """

    count: int
    mean: npt.NDArray[np.float64]
    m2: npt.NDArray[np.float64]

    def merged(self, other: Moments) -> Moments:
        """The moments of both sets of values together (Chan, Golub & LeVeque 1979)."""
        count = self.count + other.count
        with np.errstate(invalid="ignore"):  # what is not finite stays so
            delta = other.mean - self.mean
            mean = self.mean + delta * (other.count / count)
            m2 = self.m2 + other.m2 + delta**2 * (self.count * other.count / count)
        return Moments(count, mean, m2)


def moments_of(blob: FloatArray) -> Moments:
    """The moments of a float32 blob of any size.

    Sums of float32 lose digits where they are long, so each is of a part of an image's channel, and what is
    left is done in float64. Squares lose digits where the mean is large, so it is subtracted first there.

    Args:
        blob: C-contiguous (N, C, ...), or (N,), which is one channel.
    """
    images, channels = len(blob), blob.shape[1] if blob.ndim > 1 else 1
    rows = blob.reshape(images * channels, -1)
    with np.errstate(invalid="ignore", over="ignore"):  # what is not finite stays so
        means, m2 = (each.reshape(images, channels) for each in _of_rows(rows))
        mean = means.mean(axis=0)
        between = np.square(means - mean).sum(axis=0) * rows.shape[1]
    return Moments(images * rows.shape[1], mean, m2.sum(axis=0) + between)


def _of_rows(rows: FloatArray) -> tuple[Floats, Floats]:
    """Mean and squared deviations from it of each row."""
    count = rows.shape[1]
    if count == 1:
        return rows.astype(np.float64), np.zeros(len(rows))
    mean, m2 = _around_zero(rows)
    lost = np.flatnonzero(~(m2 > count * np.square(mean) / CANCELLED))
    near = mean[lost].astype(np.float32)
    rest, m2[lost] = _around_zero(rows[lost] - near[:, None])
    mean[lost] = near + rest
    return mean, np.maximum(m2, 0)


def _around_zero(rows: FloatArray) -> tuple[Floats, Floats]:
    """Mean and squared deviations from it of each row, from sums of its values and of their squares.

    By einsum, which is several times as fast as numpy's own sums.
    """
    count, part = rows.shape[1], _part(rows.shape[1])
    parts = rows.reshape(len(rows), count // part, part)
    mean = np.einsum("rpk->rp", parts).sum(axis=1, dtype=np.float64) / count
    squares = np.einsum("rpk,rpk->rp", parts, parts).sum(axis=1, dtype=np.float64)
    return mean, squares - count * np.square(mean)


@cache
def _part(count: int) -> int:
    """The largest divisor of ``count`` up to LONGEST; all of it if there is but a small one."""
    divisor = max(d for d in range(1, min(count, LONGEST) + 1) if count % d == 0)
    return divisor if divisor >= SHORTEST else count
