"""Mergeable histograms of activations, and the quantization step that fits them.

An activation x >= 0 becomes a*q with q = clip(floor(x/a + 0.5), 0, levels), one of either sign with codes
from -levels on; the step a minimises ||x - a*q||^2 (He & Cheng, "Learning Compression from Limited Unlabeled
Data", ECCV 2018).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from quantize.arrays import Floats
from quantize.errors import LabelfreeError
from quantize.numerics.solvers import Projection, SortedRows, least_loss

LOW_BITS = 12
"""Bits of a float32 that a bucket does not look at: sign, 8 bits of exponent and 11 of mantissa are left."""
BUCKETS = 1 << (31 - LOW_BITS)
INFINITY_BITS = 0x7F800000
"""Read as an integer, the bits of every finite float >= +0 are below these; those of no other float are."""

MAGNITUDE_BITS = np.uint32(0x7FFFFFFF)

CHUNK = 1 << 17
"""Values per pass: scratch arrays stay in the cache."""
MOST_PACKED = 1 << 20
"""Of so many values, sums of 2^COUNT_SHIFT + low bits are exact in float64 and hold count and sum apart."""
COUNT_SHIFT = 32

DEAD_STEP = 1.0
"""For a ReLU that never fires: any positive step is right."""
SMALLEST_STEP = float(np.finfo(np.float32).tiny)
"""Steps are stored as float32 and must stay above zero there."""
REFERENCE_TOLERANCE = 1e-3
"""Relative change of the step at which the authors stop."""
MAX_ITERATIONS = 1000


class Histogram:
    """Counts and sums of float32 values by the leading bits of their bit pattern.

    A bucket is at most 2^-11 of its values wide (denormals aside), at any scale, so nothing need be known
    about the range beforehand. Counts and sums are exact integers: they do not depend on the order of updates
    and merges. Only the pages of touched buckets take memory, at most 8 MiB for the values of each sign.

    Attributes:
        positive: the values above 0.
        negative: the magnitudes of the values below 0.
        zeros: how many values were 0.
    """

    def __init__(self) -> None:
        self.positive = Side()
        self.negative = Side()
        self.zeros = 0

    @property
    def count(self) -> int:
        """How many values were seen."""
        return self.positive.count + self.zeros + self.negatives

    @property
    def negatives(self) -> int:
        """How many values were negative."""
        return self.negative.count

    @property
    def maximum(self) -> float:
        """The largest value, exactly; 0 if there was no positive one."""
        return self.positive.largest

    @property
    def minimum(self) -> float:
        """The least value, exactly; 0 if there was no negative one."""
        return -self.negative.largest

    @property
    def dead(self) -> bool:
        """Whether no value was positive."""
        return self.maximum == 0

    def update(self, x: npt.NDArray[np.float32]) -> None:
        """Add the values of ``x``, float32 of any shape.

        Raises:
            LabelfreeError: a value is NaN or infinite; some of the others may have been added.
        """
        flat = np.ascontiguousarray(x, np.float32).reshape(-1)
        scratch = _Scratch(min(CHUNK, flat.size))
        minus: _Scratch | None = None
        for first in range(0, flat.size, MOST_PACKED):
            many = flat[first : first + MOST_PACKED]
            for start in range(0, many.size, CHUNK):
                values = many[start : start + CHUNK]
                bits = values.view(np.uint32)
                if int(bits.max()) < INFINITY_BITS:
                    # Often half of all values are 0, and none of them needs a bucket.
                    self.zeros += values.size - scratch.count(bits[np.flatnonzero(bits != 0)])
                    continue
                if int((bits & MAGNITUDE_BITS).max()) >= INFINITY_BITS:
                    raise LabelfreeError(
                        "activations hold NaN or infinity: the network overflows on these images"
                    )
                minus = minus or _Scratch(min(CHUNK, flat.size))
                below = bits[np.flatnonzero(values < 0)] & MAGNITUDE_BITS
                above = bits[np.flatnonzero(values > 0)]
                self.zeros += values.size - minus.count(below) - scratch.count(above)
            self.positive.add(scratch)
            if minus:
                self.negative.add(minus)

    def merge(self, other: Histogram) -> None:
        """Add all values of ``other``."""
        self.positive.merge(other.positive)
        self.negative.merge(other.negative)
        self.zeros += other.zeros

    def means(self, signed: bool = False) -> tuple[Floats, Floats]:
        """Return mean and count of every bucket that is not empty: float64, means ascending.

        Args:
            signed: of the negative values too, otherwise of the positive ones alone.
        """
        means, counts = self.positive.means()
        if not signed:
            return means, counts
        magnitudes, below = self.negative.means()
        return np.concatenate([-magnitudes[::-1], means]), np.concatenate([below[::-1], counts])


class Side:
    """The values of one sign, by magnitude.

    Attributes:
        counts: int64 (BUCKETS,), values per bucket.
        largest: the largest magnitude, exactly; 0 without values.
    """

    def __init__(self) -> None:
        self.counts = np.zeros(BUCKETS, np.int64)
        self.largest = 0.0
        self._lows = np.zeros(BUCKETS, np.int64)
        """Per bucket the sum of the low bits of its values, in units of the last place."""

    @property
    def count(self) -> int:
        """How many values there are."""
        return int(self.counts.sum()) if self.largest else 0

    def merge(self, other: Side) -> None:
        """Add all values of ``other``."""
        if other.largest:
            self.counts += other.counts
            self._lows += other._lows
            self.largest = max(self.largest, other.largest)

    def means(self) -> tuple[Floats, Floats]:
        """Return mean and count of every bucket that is not empty: float64, means ascending."""
        buckets = np.flatnonzero(self.counts)
        floors = (buckets << LOW_BITS).astype(np.uint32).view(np.float32).astype(np.float64)
        exponents = np.maximum(buckets >> (23 - LOW_BITS), 1) - 150
        counts = self.counts[buckets].astype(np.float64)
        return floors + np.ldexp(self._lows[buckets] / counts, exponents), counts

    def add(self, scratch: _Scratch) -> None:
        """Move what passes found, still packed, to the counts and sums."""
        if scratch.top < 0:
            return
        buckets = slice(scratch.bottom, scratch.top + 1)
        packed = scratch.packed[buckets].astype(np.int64)
        self.counts[buckets] += packed >> COUNT_SHIFT
        self._lows[buckets] += packed & ((1 << COUNT_SHIFT) - 1)
        self.largest = max(self.largest, float(np.uint32(scratch.highest).view(np.float32)))
        scratch.packed[buckets] = 0
        scratch.bottom, scratch.top = BUCKETS, -1


class _Scratch:
    """Buffers of one update, for the values of one sign."""

    def __init__(self, size: int) -> None:
        self.keys = np.empty(size, np.uint32)
        self.places = np.empty(size, np.int64)
        self.weights = np.empty(size, np.float64)
        self.packed = np.zeros(BUCKETS)
        self.bottom, self.top = BUCKETS, -1
        """The first and the last bucket that may hold anything."""
        self.highest = 0
        """The bits of the largest magnitude."""

    def count(self, bits: npt.NDArray[np.uint32]) -> int:
        """Add finite magnitudes above 0, by their bits; return how many."""
        size = bits.size
        if not size:
            return 0
        highest = int(bits.max())
        self.highest = max(self.highest, highest)
        bottom, top = int(bits.min()) >> LOW_BITS, highest >> LOW_BITS
        keys, indices, weights = self.keys[:size], self.places[:size], self.weights[:size]
        np.right_shift(bits, LOW_BITS, out=keys)
        np.subtract(keys, bottom, out=keys)
        indices[:] = keys
        np.bitwise_and(bits, (1 << LOW_BITS) - 1, out=keys)
        weights[:] = keys
        weights += 2.0**COUNT_SHIFT
        # One weighted pass gives both: every value counts above the sum of the low bits.
        self.packed[bottom : top + 1] += np.bincount(indices, weights, minlength=top + 1 - bottom)
        self.bottom, self.top = min(bottom, self.bottom), max(top, self.top)
        return size


def optimal_step(histogram: Histogram, levels: int, signed: bool = False) -> float:
    """Return the step of the least loss, the global minimum over all steps; ``DEAD_STEP`` for a dead ReLU.

    With codes of both signs the magnitudes decide: which way a value on a threshold goes changes no loss.

    A bucket's values are taken to equal their mean. On the values themselves the loss is above their own
    global minimum by less than 1e-4 of it (seen: 6e-5).
    """
    means, counts = histogram.means(signed)
    if not means.size:
        return DEAD_STEP
    rows, projection, scale = _as_one_kernel(means, counts, levels)
    return _storable(least_loss(rows, projection)[0] * scale)


def reference_step(histogram: Histogram, levels: int) -> float:
    """Return the step of the paper's iteration; ``DEAD_STEP`` for a dead ReLU.

    From a = max(x) / levels on, a becomes <x,q>/<q,q> until it changes by at most REFERENCE_TOLERANCE or the
    loss rises (then the a before stands).
    """
    if histogram.dead:
        return DEAD_STEP
    rows, projection, scale = _as_one_kernel(*histogram.means(), levels)
    a = histogram.maximum / scale / levels
    wq, qq = _products(rows, projection, a)
    loss = a * (a * qq - 2 * wq)
    for _ in range(MAX_ITERATIONS):
        previous, previous_loss = a, loss
        a = wq / qq
        wq, qq = _products(rows, projection, a)
        loss = a * (a * qq - 2 * wq)
        if loss > previous_loss:
            a = previous
            break
        if abs(a - previous) <= REFERENCE_TOLERANCE * previous:
            break
    return _storable(a * scale)


def loss(histogram: Histogram, step: float, levels: int, signed: bool = False) -> float:
    """Return ||x - step*q||^2, a bucket's values taken to equal their mean.

    Over all values with ``signed``, otherwise over all non-negative ones.
    """
    means, counts = histogram.means(signed)
    error = means - step * np.clip(np.floor(means / step + 0.5), -levels if signed else 0, levels)
    return float(np.sum(counts * error**2))


def clipped_share(histogram: Histogram, step: float, levels: int, signed: bool = False) -> float:
    """Return the share of all values, 0 to 1, that lie beyond the last level by half a step or more."""
    means, counts = histogram.means(signed)
    return float(counts[np.abs(means) / step >= levels + 0.5].sum()) / max(1, histogram.count)


def _as_one_kernel(means: Floats, counts: Floats, levels: int) -> tuple[SortedRows, Projection, float]:
    """Magnitudes as a row of kernel weights, divided by the returned power of two: at most 1."""
    magnitudes = np.abs(means)
    order = np.argsort(magnitudes, kind="stable")
    scale = float(np.exp2(np.frexp(magnitudes[order[-1]])[1]))
    thresholds = np.nextafter(np.arange(levels) + 0.5, 0)  # a value on a threshold goes up
    return (
        SortedRows(magnitudes[order][None] / scale, counts[order]),
        Projection(thresholds, np.arange(levels + 1.0)[:, None]),
        scale,
    )


def _products(rows: SortedRows, projection: Projection, a: float) -> tuple[float, float]:
    wq, qq = projection.products(rows, np.zeros(1, np.int64), np.array([a]))
    return float(wq[0, 0]), float(qq[0, 0])


def _storable(step: float) -> float:
    return max(float(step), SMALLEST_STEP)
