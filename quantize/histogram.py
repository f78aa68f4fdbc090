"""Mergeable histograms of activations, and the quantization step that they determine.

A bucket holds the positive float32 values that share exponent and the leading 12 bits of the mantissa. So a
bucket is at most 2^-12 of its value wide whatever the range of the (normal) values, one pass fills the
histogram, and histograms of parts add up to that of the whole. A bucket's values are taken to lie at its
middle, which is wrong by at most 2^-13 of the value; a quantization step is 2^-8 of the range or more.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from quantize.errors import LabelfreeError

Floats = npt.NDArray[np.float64]

DROPPED_BITS = 11
"""Mantissa bits that a bucket does not tell apart: 23 - 12."""
BUCKETS = 1 << (32 - DROPPED_BITS)
INFINITY_BUCKET = 0x7F800000 >> DROPPED_BITS
NEGATIVE_BUCKET = 0x80000000 >> DROPPED_BITS
SCAN_RATIO = 1.004
"""Neighbouring steps of the scan for the least loss; local refinement does the rest."""
SCAN_BELOW = 64
"""The scan starts at this part of the step that clips nothing."""
SCAN_BLOCK = 256
REFINED = 12
MAX_ITERATIONS = 100
REFERENCE_TOLERANCE = 1e-3
DEAD_STEP = 1.0
"""The step for a ReLU that is always 0: any positive number does."""


class Histogram:
    """Counts of float32 activations x >= 0.

    Memory is taken only for the exponents that occur: untouched pages of the table are never backed.
    """

    def __init__(self) -> None:
        self._counts = np.zeros(BUCKETS, np.int64)

    def update(self, x: npt.NDArray[np.float32]) -> None:
        """Count the values of a C-contiguous float32 array; negative ones count as 0, as ActQuantize has it.

        Raises:
            LabelfreeError: infinities or NaNs.
        """
        np.add.at(self._counts, x.reshape(-1).view(np.uint32) >> DROPPED_BITS, 1)
        if self._counts[INFINITY_BUCKET:NEGATIVE_BUCKET].any():
            raise LabelfreeError(
                "activations are not finite (infinity or NaN): the net overflows on these images"
            )

    def merged(self, other: Histogram) -> Histogram:
        """The histogram of both sets of values together."""
        both = Histogram()
        both._counts = self._counts + other._counts
        return both

    @property
    def count(self) -> int:
        """Number of values, zeros included."""
        return int(self._counts.sum())

    @property
    def energy(self) -> float:
        """Sum of squares."""
        values, counts = self.positive()
        return float((counts * values**2).sum())

    @property
    def maximum(self) -> float:
        """The largest value (the middle of its bucket); 0 where there is none above 0."""
        values, _ = self.positive()
        return float(values[-1]) if len(values) else 0.0

    def positive(self) -> tuple[Floats, Floats]:
        """Middles of the buckets that hold values above 0, ascending, and their counts; both float64."""
        (buckets,) = np.nonzero(self._counts[1:INFINITY_BUCKET])
        buckets += 1
        low = (buckets.astype(np.uint32) << DROPPED_BITS).view(np.float32).astype(np.float64)
        high = ((buckets + 1).astype(np.uint32) << DROPPED_BITS).view(np.float32).astype(np.float64)
        high[~np.isfinite(high)] = low[~np.isfinite(high)]
        return (low + high) / 2, self._counts[buckets].astype(np.float64)


class _Products:
    """<x, q> and <q, q> for q = clip(floor(x / a + 0.5), 0, levels) and many steps a, from prefix sums."""

    def __init__(self, seen: Histogram, levels: int) -> None:
        self.values, counts = seen.positive()
        self.counts_before = np.concatenate([[0.0], np.cumsum(counts)])
        self.sums_before = np.concatenate([[0.0], np.cumsum(counts * self.values)])
        self.energy = float((counts * self.values**2).sum())
        self.levels = levels

    def at(self, steps: Floats) -> tuple[Floats, Floats]:
        """Arrays of <x, q> and <q, q>, one entry per step.

        q is the number of the bounds (j - 0.5) * a, j = 1 .. levels, at or below x. So <x, q> is the sum over
        bounds of the values above, and <q, q> that of (2 j - 1) times their count.
        """
        j = np.arange(1, self.levels + 1)
        first = np.searchsorted(self.values, (j - 0.5) * steps[:, None], side="left")
        xq = (self.sums_before[-1] - self.sums_before[first]).sum(axis=1)
        qq = ((2 * j - 1) * (self.counts_before[-1] - self.counts_before[first])).sum(axis=1)
        return xq, qq

    def losses(self, steps: Floats) -> Floats:
        """||x - a * q||^2 for every step."""
        xq, qq = self.at(steps)
        return np.maximum(self.energy - 2 * steps * xq + steps**2 * qq, 0.0)


def loss(seen: Histogram, step: float, levels: int) -> float:
    """||x - step * q||^2 over all values, q = clip(floor(x / step + 0.5), 0, levels)."""
    return float(_Products(seen, levels).losses(np.array([step]))[0])


def clipped_share(seen: Histogram, step: float, levels: int) -> float:
    """The share of the values above 0 that lie above levels * step."""
    values, counts = seen.positive()
    return float(counts[values > levels * step].sum() / counts.sum()) if len(values) else 0.0


def optimal_step(seen: Histogram, levels: int) -> float:
    """The step of least loss over all a > 0.

    The loss is scanned on a fine geometric grid; from the best places a = <x, q> / <q, q> is repeated, which
    never raises the loss, until it stands still.
    """
    if not seen.maximum:
        return DEAD_STEP
    products = _Products(seen, levels)
    widest = seen.maximum / levels
    count = int(np.log(2 * levels * SCAN_BELOW) / np.log(SCAN_RATIO)) + 1
    steps: Floats = widest / SCAN_BELOW * SCAN_RATIO ** np.arange(count)
    blocks = [steps[i : i + SCAN_BLOCK] for i in range(0, count, SCAN_BLOCK)]
    losses = np.concatenate([products.losses(block) for block in blocks])
    best = steps[np.argsort(losses)[:REFINED]]
    for _ in range(MAX_ITERATIONS):
        xq, qq = products.at(best)
        following = np.divide(xq, qq, out=best.copy(), where=qq > 0)
        if np.array_equal(following, best):
            break
        best = following
    return float(best[np.argmin(products.losses(best))])


def reference_step(seen: Histogram, levels: int) -> float:
    """The step as the paper's authors' implementation finds it.

    From a = max(x) / levels repeat a = <x, q> / <q, q> until the relative change is at most 1e-3, or the loss
    rises (then the step before stands).
    """
    if not seen.maximum:
        return DEAD_STEP
    products = _Products(seen, levels)
    step = seen.maximum / levels
    for following in _lloyd(products, step):
        if products.losses(np.array([following]))[0] > products.losses(np.array([step]))[0]:
            break
        change = abs(following - step) / following
        step = following
        if change <= REFERENCE_TOLERANCE:
            break
    return step


def _lloyd(products: _Products, step: float) -> Iterator[float]:
    for _ in range(MAX_ITERATIONS):
        xq, qq = products.at(np.array([step]))
        step = float(xq[0] / qq[0])
        yield step
