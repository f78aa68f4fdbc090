"""Count, mean and squared deviations per channel, mergeable."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from quantize.arrays import FloatArray


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
        delta = other.mean - self.mean
        return Moments(
            count,
            self.mean + delta * (other.count / count),
            self.m2 + other.m2 + delta**2 * (self.count * other.count / count),
        )


def moments_of(blob: FloatArray) -> Moments:
    """The moments of a blob of at least two axes; float64 throughout, around each image's own mean."""
    values = blob.reshape(*blob.shape[:2], -1)
    means = values.mean(axis=2, dtype=np.float64)
    m2 = [np.square(image - mean[:, None]).sum(axis=1) for image, mean in zip(values, means, strict=True)]
    mean = means.mean(axis=0)
    between = np.square(means - mean).sum(axis=0) * values.shape[2]
    return Moments(values.shape[0] * values.shape[2], mean, np.sum(m2, axis=0) + between)
