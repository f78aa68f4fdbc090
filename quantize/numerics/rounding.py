"""Round the kernels of a layer to alpha * Q so that its output changes least, given its input.

With x the input patches of the net as quantized so far and y the output that the full-precision net gives at
the same places, a kernel q should minimise E (y - q x)^2 = E y^2 - 2 q b + q H q^T, H = E x x^T, b = E x y.
Without the grid the minimum is the target w* = b H^-1: it makes up for what the layers before have changed.
With it, E (y - q x)^2 = (w* - q) H (w* - q)^T + constant, and that is what is rounded:

- the recursion of OBQ and GPTQ (Frantar & Alistarh 2022, Frantar et al. 2023): round one weight after the
  other and let those not yet rounded make up for the error. It is written here as Babai's nearest plane
  (Babai 1986; the two are the same): with H = R^T R, R upper triangular,
  (w* - q) H (w* - q)^T = sum_i R_ii^2 (w*_i - q_i + sum_{j>i} R_ij / R_ii (w*_j - q_j))^2,
  so going from the last weight to the first, each is rounded after the errors behind it have been added;
- coordinate descent: each weight in turn takes the best level given all others;
- alpha in closed form, <w* H, Q> / <Q H, Q>.

The recursion runs from two alphas; the better result of each kernel is descended from, and recursion and
descent are done once more with its alpha.

All arrays have a leading axis for the groups of a convolution: G groups of n kernels by k weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from quantize.arrays import Floats
from quantize.numerics.grids import Grid
from quantize.numerics.solvers import fit

DAMPINGS = (0.01, 0.1, 1.0, 10.0, 100.0)
"""What is added to the diagonal of H, relative to its mean: a prior for the weights (GPTQ: the first)."""
BLOCK = 32
"""Weights whose mutual corrections are made one by one; those to weights beyond are one matrix product."""
ALPHA_RATIOS = np.geomspace(0.4, 1.25, 24)
"""Scales tried for each kernel, relative to the one with the least error of the weights."""
SWEEPS = 4
LEAST_GAIN = 1e-3
"""Sweeps and dampings end when one lowers the loss of the layer by less than this share."""


@dataclass(frozen=True)
class Statistics:
    """Second moments of a layer's input and output.

    Attributes:
        H: float64 (G, k, k): E x x^T of the quantized net's input patches.
        B: float64 (G, n, k): E y x^T with the full-precision net's output y.
        energy: float64 (G, n): E y^2.
    """

    H: Floats
    B: Floats
    energy: Floats

    def error(self, kernels: Floats) -> Floats:
        """E (y - q x)^2 for ``kernels`` (G, n, k): shape (G, n)."""
        change: Floats = np.einsum("gnk,gnk->gn", kernels, kernels @ self.H - 2 * self.B)
        return np.maximum(self.energy + change, 0)

    def damped(self, damping: float) -> Floats:
        """H with the damping, times the mean of its diagonal, added to that."""
        k = self.H.shape[1]
        mean = np.trace(self.H, axis1=1, axis2=2) / k
        H: Floats = self.H.copy()
        H[:, range(k), range(k)] += np.where(mean > 0, damping * mean, 1.0)[:, None]
        return H


@dataclass(frozen=True)
class Problem:
    """Minimise (target - alpha * Q) H (target - alpha * Q)^T for every kernel.

    Attributes:
        target: float64 (G, n, k).
        H: float64 (G, k, k), positive definite.
    """

    target: Floats
    H: Floats

    @cached_property
    def targetH(self) -> Floats:  # noqa: N802
        """The target times H: (G, n, k)."""
        return self.target @ self.H

    @classmethod
    def of(cls, weights: Floats, statistics: Statistics, damping: float = DAMPINGS[0]) -> Problem:
        """The damped problem: where the images say nothing, the weights stay what they are.

        With d the damping times the mean of H's diagonal, d * ||q - w||^2 is added to the error. Inputs that
        are always 0 and fewer patches than weights then leave the problem positive definite. Where all
        inputs are always 0, what remains is the rounding of the weights as they are.
        """
        H = statistics.damped(damping)
        correction = np.linalg.solve(H, np.swapaxes(statistics.B - weights @ statistics.H, 1, 2))
        return cls(weights + np.swapaxes(correction, 1, 2), H)

    def loss(self, kernels: Floats) -> Floats:
        """The objective, shape (G, n)."""
        error = self.target - kernels
        loss: Floats = np.einsum("gnk,gnk->gn", error @ self.H, error)
        return loss

    def ordered(self, order: npt.NDArray[np.int64]) -> Problem:
        """The problem with the weights of each group in ``order`` (G, k)."""
        H = np.take_along_axis(self.H, order[:, :, None], axis=1)
        return Problem(
            np.take_along_axis(self.target, order[:, None, :], axis=2),
            np.take_along_axis(H, order[:, None, :], axis=2),
        )


@dataclass(frozen=True)
class Rounding:
    """alpha (G, n) and Q (G, n, k) on the grid, Q times H, and the loss (G, n) of alpha * Q."""

    alpha: Floats
    Q: Floats
    QH: Floats
    loss: Floats

    def better(self, other: Rounding) -> Rounding:
        """Per kernel the one with the lower loss."""
        wins = other.loss < self.loss
        return Rounding(
            np.where(wins, other.alpha, self.alpha),
            np.where(wins[:, :, None], other.Q, self.Q),
            np.where(wins[:, :, None], other.QH, self.QH),
            np.where(wins, other.loss, self.loss),
        )


def chosen_damping(weights: Floats, fitted: Statistics, tried: Statistics) -> float:
    """The damping whose target, found from some images, is best on others.

    A target fits the noise of few images as well as what is true of all. In the last layer of a net for 1,000
    classes, with one patch per image, its error is next to nothing on the images that it was found from, and
    greater than that of the weights as they are on others. The error on others over log damping has one
    minimum, so dampings are tried from the least on as long as they gain anything.

    Args:
        weights: float64 (G, n, k).
        fitted, tried: the second moments over disjoint sets of images.
    """
    missing = np.swapaxes(fitted.B - weights @ fitted.H, 1, 2).astype(np.float32)

    def error(damping: float) -> float:
        # float32 is enough to compare, and takes half the time.
        found = np.linalg.solve(fitted.damped(damping).astype(np.float32), missing)
        return float(tried.error(weights + np.swapaxes(found, 1, 2)).sum())

    least, best = error(DAMPINGS[0]), DAMPINGS[0]
    for damping in DAMPINGS[1:]:
        new = error(damping)
        if not new < least * (1 - LEAST_GAIN):
            break
        least, best = new, damping
    return best


def round_kernels(problem: Problem, grid: Grid) -> Rounding:
    """Quantize the kernels of a problem: the best of what the steps in this module's text find."""
    order = np.argsort(np.diagonal(problem.H, axis1=1, axis2=2), axis=1, kind="stable")
    sorted_problem = problem.ordered(order)
    factor = np.swapaxes(np.linalg.cholesky(sorted_problem.H), 1, 2)
    nearest = Nearest(grid)

    def rounded(alpha: Floats) -> Rounding:
        Q = recursion(sorted_problem.target, factor, alpha, nearest)
        return refitted(sorted_problem, Q, Q @ sorted_problem.H, alpha)

    first, second = start_alphas(sorted_problem, grid, nearest)
    best = rounded(first).better(rounded(second))
    best = best.better(descended(sorted_problem, best, nearest))
    best = best.better(descended(sorted_problem, rounded(best.alpha), nearest))
    plain = nearest(sorted_problem.target, first[:, :, None])
    best = best.better(refitted(sorted_problem, plain, plain @ sorted_problem.H, first))
    inverse = np.argsort(order, axis=1)[:, None, :]
    Q, QH = (np.take_along_axis(rows, inverse, axis=2) for rows in (best.Q, best.QH))
    return Rounding(best.alpha, Q, QH, best.loss)


class Nearest:
    """The nearest level of a grid, for values divided by alpha."""

    def __init__(self, grid: Grid) -> None:
        self.levels = grid.levels(grid.canonical)
        self.midpoints = (self.levels[1:] + self.levels[:-1]) / 2

    def __call__(self, values: Floats, alpha: Floats) -> Floats:
        """Levels for ``values``: alpha * level is the nearest; ``alpha`` has the same axes, or axes of 1."""
        scale = np.where(alpha == 0, 1.0, alpha)
        return self.levels[np.searchsorted(self.midpoints, values / scale)]


def start_alphas(problem: Problem, grid: Grid, nearest: Nearest) -> tuple[Floats, Floats]:
    """Per kernel the alpha with the least error of the weights, and of some around it the best under diag(H).

    Returns:
        Two arrays (G, n).
    """
    G, n, k = problem.target.shape
    plain = fit(problem.target.reshape(-1, k), grid).alpha.reshape(G, n)
    importance = np.diagonal(problem.H, axis1=1, axis2=2)
    best, least = plain, np.full((G, n), np.inf)
    for ratio in ALPHA_RATIOS:
        alpha = plain * ratio
        error = problem.target - alpha[:, :, None] * nearest(problem.target, alpha[:, :, None])
        loss = np.einsum("gnk,gk->gn", error * error, importance)
        best, least = np.where(loss < least, alpha, best), np.minimum(loss, least)
    return plain, best


def recursion(target: Floats, factor: Floats, alpha: Floats, nearest: Nearest) -> Floats:
    """Round ``target`` (G, n, k) from the last weight to the first, passing errors on.

    Args:
        factor: R (G, k, k), upper triangular, with H = R^T R.
        alpha: (G, n).
    """
    Q = np.empty_like(target)
    errors = np.zeros_like(target)
    ratios = factor / np.diagonal(factor, axis1=1, axis2=2)[:, :, None]
    for block in reversed(list(_blocks(target.shape[2]))):
        behind = slice(block.stop, None)
        wanted = _columns(target[:, :, block])
        aim = wanted + ratios[:, block, behind] @ np.swapaxes(errors[:, :, behind], 1, 2)
        inner = ratios[:, block, block]
        levels, missed = np.empty_like(aim), np.empty_like(aim)
        for i in reversed(range(aim.shape[1])):
            levels[:, i] = nearest(aim[:, i], alpha)
            missed[:, i] = wanted[:, i] - alpha * levels[:, i]
            aim[:, :i] += inner[:, :i, i, None] * missed[:, None, i]
        Q[:, :, block] = np.swapaxes(levels, 1, 2)
        errors[:, :, block] = np.swapaxes(missed, 1, 2)
    return Q


def coordinate_descent(problem: Problem, start: Rounding, nearest: Nearest) -> Rounding:
    """One sweep: each weight takes the level that is best given all others. It never raises the loss."""
    H, alpha = problem.H, start.alpha
    diagonal = np.diagonal(H, axis1=1, axis2=2)[:, :, None]
    Q, QH = start.Q.copy(), start.QH.copy()
    for block in reversed(list(_blocks(Q.shape[2]))):
        inside, curvature = H[:, block, block], diagonal[:, block]
        slope = _columns(problem.targetH[:, :, block] - alpha[:, :, None] * QH[:, :, block])
        levels = _columns(Q[:, :, block])
        for i in reversed(range(slope.shape[1])):
            level = nearest(alpha * levels[:, i] + slope[:, i] / curvature[:, i], alpha)
            change = alpha * (levels[:, i] - level)
            levels[:, i] = level
            slope += inside[:, i, :, None] * change[:, None]
        Q[:, :, block] = np.swapaxes(levels, 1, 2)
        QH += (Q[:, :, block] - start.Q[:, :, block]) @ H[:, block]
    return refitted(problem, Q, QH, alpha)


def descended(problem: Problem, start: Rounding, nearest: Nearest) -> Rounding:
    """Sweeps of coordinate descent with alpha refitted after each, as long as they change anything."""
    found = start
    for _ in range(SWEEPS):
        before = found.loss.sum()
        found = coordinate_descent(problem, found, nearest)
        if found.loss.sum() >= before * (1 - LEAST_GAIN):
            break
    return found


def refitted(problem: Problem, Q: Floats, QH: Floats, alpha: Floats) -> Rounding:
    """The alpha with the least loss for Q: <w* H, Q> / <Q H, Q>; as it was where Q is 0."""
    qq = np.einsum("gnk,gnk->gn", QH, Q)
    wq = np.einsum("gnk,gnk->gn", Q, problem.targetH)
    alpha = np.where(qq > 0, wq / np.where(qq > 0, qq, 1.0), alpha)
    error = problem.target - alpha[:, :, None] * Q
    loss = np.einsum("gnk,gnk->gn", error, problem.targetH - alpha[:, :, None] * QH)
    return Rounding(alpha, Q, QH, np.maximum(loss, 0))


def _columns(block: Floats) -> Floats:
    """A block (G, n, b) as (G, b, n): what the loops over weights read and write lies together."""
    return np.ascontiguousarray(np.swapaxes(block, 1, 2))


def _blocks(k: int) -> Iterator[slice]:
    return (slice(start, min(start + BLOCK, k)) for start in range(0, k, BLOCK))
