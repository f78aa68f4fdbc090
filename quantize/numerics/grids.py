"""The sets of values that quantized weights may take.

A grid has ``bits`` and, for the reference solver, variants of one shape at several scales: exponent offsets
of ``PowerOfTwo``, integer bits of ``FixedPoint``. Because a kernel's scale alpha is a free real, all
variants of a grid can express the same kernels alpha * Q.

A projection is given by thresholds: a value takes the level whose index is the number of thresholds below
it, so a value that lies on a threshold goes down (symmetric grids apply this to magnitudes).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from quantize.arrays import FloatArray, Floats
from quantize.errors import InputError


@dataclass(frozen=True)
class Grid(ABC):
    """Levels for weights of ``bits`` bits.

    Raises:
        InputError: the grid does not exist for this number of bits.
    """

    bits: int

    name: ClassVar[str]
    """What a configuration calls the grid."""
    allowed_bits: ClassVar[range]
    variants: ClassVar[range] = range(1)
    """What the reference solver tries (He & Cheng 2018, the authors' implementation)."""
    canonical: ClassVar[int] = 0
    """The variant that the optimal solver writes."""
    symmetric: ClassVar[bool] = True
    """Whether -x is a level wherever x is one."""

    def __post_init__(self) -> None:
        if self.bits not in self.allowed_bits:
            lowest, highest = self.allowed_bits[0], self.allowed_bits[-1]
            raise InputError(
                f"grid {self.name}: {self.bits!r} bits are impossible; choose {lowest} to {highest} bits"
            )

    @abstractmethod
    def levels(self, variant: int) -> Floats:
        """Return all levels of a variant, ascending."""

    @abstractmethod
    def project(self, x: Floats, variant: int) -> Floats:
        """Return the nearest level for every element of ``x``: shape of ``x``, exactly on the grid."""

    def half_levels(self, variant: int) -> Floats:
        """Return the levels that the thresholds separate: the magnitudes if symmetric, else all levels."""
        levels = self.levels(variant)
        return levels[levels >= 0] if self.symmetric else levels

    def thresholds(self, variant: int) -> Floats:
        """Return the midpoints of ``half_levels``: nearest-level projection."""
        levels = self.half_levels(variant)
        return (levels[1:] + levels[:-1]) / 2

    def reference_thresholds(self, variant: int) -> Floats:
        """Return the thresholds of the paper's implementation."""
        return self.thresholds(variant)

    def reference_project(self, x: Floats, variant: int) -> Floats:
        """Project as the paper's implementation does: shape of ``x``, exactly on the grid."""
        return self.project(x, variant)


class PowerOfTwo(Grid):
    """{0, +-2^m, ..., +-2^(m + 2^(bits-1) - 2)} for exponent offset m: 15 levels at 4 bits."""

    name = "power_of_two"
    allowed_bits = range(2, 6)
    variants = range(4)

    def levels(self, variant: int) -> Floats:
        powers = 2.0 ** np.arange(variant, variant + 2 ** (self.bits - 1) - 1)
        return np.concatenate([-powers[::-1], [0.0], powers])

    def reference_thresholds(self, variant: int) -> Floats:
        """Return the midpoints, but 0.75 * 2^m for 0.5 * 2^m.

        The authors round to a power of two first and set to 0 what is then <= 2^m / 2, so all that rounds
        down to 2^(m-1) becomes 0 too.
        """
        thresholds = self.thresholds(variant)
        thresholds[0] = 0.75 * 2.0**variant
        return thresholds

    def project(self, x: Floats, variant: int) -> Floats:
        return self._by_thresholds(x, variant, self.thresholds(variant))

    def reference_project(self, x: Floats, variant: int) -> Floats:
        return self._by_thresholds(x, variant, self.reference_thresholds(variant))

    def _by_thresholds(self, x: Floats, variant: int, thresholds: Floats) -> Floats:
        magnitude = np.abs(x)
        projected = np.zeros_like(magnitude)
        for threshold, rise in zip(thresholds, np.diff(self.half_levels(variant)), strict=True):
            projected += (magnitude > threshold) * rise
        return np.copysign(projected, x)


class FixedPoint(Grid):
    """Two's complement with i integer bits: step 2^-(bits-i), from -2^(i-1) to 2^(i-1) - step."""

    name = "fixed_point"
    allowed_bits = range(2, 9)
    variants = range(1, 9)
    canonical = 1
    symmetric = False

    def levels(self, variant: int) -> Floats:
        half = 2 ** (self.bits - 1)
        return np.arange(-half, half) * self._step(variant)

    def project(self, x: Floats, variant: int) -> Floats:
        half = 2 ** (self.bits - 1)
        step = self._step(variant)
        return np.clip(np.ceil(x / step - 0.5), -half, half - 1) * step

    def _step(self, variant: int) -> float:
        return float(2.0 ** (variant - self.bits))


class Uniform(Grid):
    """The integers from -(2^(bits-1) - 1) to 2^(bits-1) - 1."""

    name = "uniform"
    allowed_bits = range(2, 9)

    def levels(self, variant: int) -> Floats:  # noqa: ARG002
        largest = 2 ** (self.bits - 1) - 1
        return np.arange(-largest, largest + 1, dtype=np.float64)

    def project(self, x: Floats, variant: int) -> Floats:  # noqa: ARG002
        magnitude: Floats = np.minimum(np.ceil(np.abs(x) - 0.5), 2 ** (self.bits - 1) - 1)
        return np.copysign(magnitude, x)


GRIDS: dict[str, type[Grid]] = {grid.name: grid for grid in (PowerOfTwo, FixedPoint, Uniform)}


def make_grid(name: str, bits: int) -> Grid:
    """Return the grid of a configuration's ``grid`` and ``bits``.

    Raises:
        InputError: no such grid, or not for so many bits.
    """
    if name not in GRIDS:
        raise InputError(f"grid {name!r} is unknown; choose one of {', '.join(GRIDS)}")
    return GRIDS[name](bits)


def smallest_grid(codes: FloatArray) -> Grid | None:
    """The grid of the fewest bits that has all values of ``codes`` as levels; None where there is none.

    Of grids of as many bits one whose canonical variant has them all is preferred.
    """
    values = np.unique(codes).astype(np.float64)
    offered = [(bits, name) for bits in range(2, 9) for name in GRIDS if bits in GRIDS[name].allowed_bits]
    for bits in sorted({bits for bits, _ in offered}):
        grids = [make_grid(name, bits) for of_bits, name in offered if of_bits == bits]
        variants = [(grid, grid.canonical) for grid in grids]
        variants += [(grid, variant) for grid in grids for variant in grid.variants]
        for grid, variant in variants:
            if np.isin(values, grid.levels(variant)).all():
                return grid
    return None
