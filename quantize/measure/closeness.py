"""How close a blob is to that of full precision: SQNR; where it has class scores agreement and divergence."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from quantize.arrays import FloatArray, Floats
from quantize.numerics.decibels import decibels
from quantize.record import Closeness

VALUES_AT_ONCE = 1 << 20


def scores_by_place(blob: FloatArray, class_axis: int) -> FloatArray:
    """The scores at every place of a blob, as (places, classes): images times positions."""
    return np.moveaxis(blob, class_axis, -1).reshape(-1, blob.shape[class_axis])


@dataclass
class Sums:
    """What `Closeness` is made of, added up over micro-batches.

    Attributes:
        class_axis: of the blob; None where it holds no class scores.
        at_once: values of which float64 copies are made.
    """

    class_axis: int | None
    at_once: int = VALUES_AT_ONCE
    places: int = 0
    agreed: int = 0
    divergence: float = 0.0
    energy: float = 0.0
    loss: float = 0.0

    def update(self, full: FloatArray, own: FloatArray) -> None:
        """Add a blob of full precision, and that of another net, for one micro-batch."""
        if self.class_axis is None:
            full, own = full.reshape(-1, 1), own.reshape(-1, 1)
        else:
            full, own = scores_by_place(full, self.class_axis), scores_by_place(own, self.class_axis)
        step = max(1, self.at_once // full.shape[1])
        for start in range(0, len(full), step):
            self._add(full[start : start + step], own[start : start + step])

    def _add(self, full: FloatArray, own: FloatArray) -> None:
        wide, narrow = full.astype(np.float64), own.astype(np.float64)
        self.energy += float(np.square(wide).sum())
        self.loss += float(np.square(wide - narrow).sum())
        if self.class_axis is not None:
            self.places += len(full)
            self.agreed += int((full.argmax(axis=1) == own.argmax(axis=1)).sum())
            self.divergence += float(divergences(full, own).sum())

    @property
    def closeness(self) -> Closeness:
        """The figures so far."""
        sqnr = decibels(self.energy, self.loss)
        if not self.places:
            return Closeness(None, None, sqnr)
        return Closeness(100 * self.agreed / self.places, max(0.0, self.divergence / self.places), sqnr)


def divergences(full: FloatArray, own: FloatArray) -> Floats:
    """Kullback-Leibler divergence of the softmax of a net's scores from that of full precision, in nats.

    Args:
        full: scores of full precision, (places, classes).
        own: those of the other net.

    Returns:
        For each place sum p log(p / p') over the classes; shape (places,).
    """
    p, q = log_softmax(full.astype(np.float64)), log_softmax(own.astype(np.float64))
    nats: Floats = (np.exp(p) * (p - q)).sum(axis=1)
    return nats


def log_softmax(scores: Floats) -> Floats:
    """Logarithms of the softmax over the classes; shape (places, classes)."""
    below = scores - scores.max(axis=1, keepdims=True)
    shifted: Floats = below - np.log(np.exp(below).sum(axis=1, keepdims=True))
    return shifted
