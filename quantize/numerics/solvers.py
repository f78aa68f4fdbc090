"""Fit alpha * Q to the kernels of a layer: per kernel min ||w - alpha*Q||^2 with Q on a grid.

After He & Cheng, "Learning Compression from Limited Unlabeled Data", ECCV 2018. Both solvers see a kernel
only through its sorted weights and their prefix sums: for a given alpha every level of the grid is an
interval of the sorted weights, so <w,Q> and <Q,Q> cost one binary search per level.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt

from quantize.arrays import Floats
from quantize.host import available_threads, pool
from quantize.numerics.grids import Grid

Solver = Literal["optimal", "reference"]
Indices = npt.NDArray[np.int64]
T = TypeVar("T")

BLOCK = 1 << 19
"""Weights per block: about 30 MB of float64 working memory for each thread."""
MAX_THREADS = 4

EPSILON = 1e-7
"""Added to <Q,Q> by the authors' implementation."""
TOLERANCE = 1e-7
"""The authors' stopping rule: relative change of a layer's alphas."""
MAX_ITERATIONS = 1000
"""Of the reference solver; about 50 are usual."""
NO_ALPHA = 1e-300
"""Stands for alpha = 0 in thresholds: weights of either sign are beyond the last threshold, zeros stay 0."""

START_POINTS = 32
SPLIT = 4
MAX_ROUNDS = 40
"""Each round makes the open intervals SPLIT times narrower; float64 is exhausted long before."""
LOSS_TOLERANCE = 1e-9
"""The optimal solver stops when no alpha can be better by more than this, relative to the loss ..."""
NORM_TOLERANCE = 1e-13
"""... plus this, relative to ||w||^2 (the rounding of the prefix sums)."""
TIE = 1e-9
"""Losses that differ by less, relative, are equal but for rounding; the first variant of them is taken."""
MAX_NEEDLES = 1 << 18
"""Thresholds looked up at once, which bounds the memory of a search."""


@dataclass(frozen=True)
class Fit:
    """A quantized layer of n kernels by k weights.

    Attributes:
        alpha: float64 (n,): the scale of each kernel, of either sign; 0 where the kernel is all zeros.
        Q: float32 (n, k): values exactly on the levels of one variant of the grid.
        loss: float64 (n,): ||w - alpha*Q||^2 of each kernel.
    """

    alpha: Floats
    Q: npt.NDArray[np.float32]
    loss: Floats


def fit(w: npt.NDArray[np.floating[Any]], grid: Grid, solver: Solver = "optimal") -> Fit:
    """Quantize the kernels ``w``, float32 or float64 of shape (n, k), finite.

    ``optimal``: per kernel the least loss over all real alpha with Q on the grid.
    ``reference``: the paper's Quasi-Lloyd-Max as its authors ran it, with one variant and one stopping rule
    for all kernels of the layer.
    """
    if w.size == 0:
        return Fit(np.zeros(len(w)), np.zeros(w.shape, np.float32), np.zeros(len(w)))
    return _fit_reference(w, grid) if solver == "reference" else _fit_optimal(w, grid)


class SortedRows:
    """Rows of ascending values, each with the number and the sum of its values up to every place.

    Args:
        values: float64 (n, k), ascending along the rows, n and k at least 1.
        multiplicity: float64 (k,), how often each value occurs, the same for all rows; default: once.

    Attributes:
        norms: float64 (n,), the sum of squares of each row.
    """

    def __init__(self, values: Floats, multiplicity: Floats | None = None) -> None:
        n, k = values.shape
        weighted = values if multiplicity is None else values * multiplicity
        self.values = values
        self.sums = np.zeros((n, k + 1))
        np.cumsum(weighted, axis=1, out=self.sums[:, 1:])
        self.counts = np.arange(k + 1.0) if multiplicity is None else np.append(0.0, np.cumsum(multiplicity))
        self.norms: Floats = np.einsum("nk,nk->n", values, weighted)


@dataclass(frozen=True)
class Projection:
    """A value x becomes ``levels[j]``, j being the number of thresholds below x.

    Attributes:
        thresholds: float64 (J,), ascending.
        levels: float64 (J + 1, O): the levels in each of O orientations of the grid.
    """

    thresholds: Floats
    levels: Floats

    def products(self, of: SortedRows, rows: Indices, alphas: Floats) -> tuple[Floats, Floats]:
        """Return <w,Q> and <Q,Q>, each (M, O), of w = row ``rows[m]`` and Q = P(w / ``alphas[m]``).

        ``rows`` ascend, ``alphas`` are positive.
        """
        wq = np.empty((len(rows), self.levels.shape[1]))
        qq = np.empty_like(wq)
        chunk = max(1, MAX_NEEDLES // len(self.thresholds))
        for start in range(0, len(rows), chunk):
            part = slice(start, start + chunk)
            wq[part], qq[part] = self._products(of, rows[part], alphas[part])
        return wq, qq

    def _products(self, of: SortedRows, rows: Indices, alphas: Floats) -> tuple[Floats, Floats]:
        needles = alphas[:, None] * self.thresholds
        below = np.empty(needles.shape, np.int64)
        starts = np.flatnonzero(np.diff(rows, prepend=-1))
        stops = np.append(starts[1:], len(rows))
        for row, start, stop in zip(rows[starts].tolist(), starts.tolist(), stops.tolist(), strict=True):
            below[start:stop] = of.values[row].searchsorted(needles[start:stop], side="right")
        counts = of.counts[below]
        below += (rows * of.sums.shape[1])[:, None]
        sums = of.sums.ravel()[below]
        # Summation by parts: sum of q_j (S_j+1 - S_j) = q_J S_J - sum of (q_j - q_j-1) S_j. One orientation
        # after another: a row's result must not depend on the rows beside it, not even in its last bit.
        wq = of.sums[rows, -1, None] * self.levels[-1]
        qq = np.tile(of.counts[-1] * self.levels[-1] ** 2, (len(rows), 1))
        for o, levels in enumerate(self.levels.T):
            wq[:, o] -= np.einsum("mj,j->m", sums, np.diff(levels))
            qq[:, o] -= np.einsum("mj,j->m", counts, np.diff(levels**2))
        return wq, qq


@np.errstate(all="ignore")  # <Q,Q> may be 0
def least_loss(of: SortedRows, projection: Projection) -> Floats:
    """Return the alphas of the global minima of f(alpha) = min_Q ||w - alpha*Q||^2: float64 (n,).

    With beta = 1/alpha, g(beta) = min_Q(<Q,Q> - 2 beta <w,Q>) is a minimum of straight lines, hence concave,
    and f = ||w||^2 + alpha^2 g. So between two evaluated points g lies above its chord A + s beta, which puts
    f above ||w||^2 + A alpha^2 + s alpha >= ||w||^2 - s^2 / 4A. Branch and bound: intervals are split until
    none can hold a loss better than the best one seen by more than the tolerances.

    Alphas are positive in the first orientation of the projection and negative in the second (the mirrored
    grid). A row of zeros has alpha 0.
    """
    rows = np.arange(len(of.values))
    alphas = _start_points(of, projection)
    wq, qq = (
        x.reshape(*alphas.shape, -1)
        for x in projection.products(of, rows.repeat(START_POINTS), alphas.ravel())
    )
    best = _Best(of.norms)
    for _ in range(MAX_ROUNDS):
        best.update(rows, wq, qq)
        beta = 1 / alphas[:, :, None]
        kappa = (np.diff(qq, axis=1) - 2 * beta[:, 1:] * np.diff(wq, axis=1)) / np.diff(beta, axis=1)
        slope = kappa - 2 * wq[:, :-1]
        intercept = qq[:, :-1] - beta[:, :-1] * kappa
        vertex = -slope / (2 * intercept)
        inside = (vertex <= alphas[:, :-1, None]) & (vertex >= alphas[:, 1:, None])
        better = slope**2 / (4 * intercept) > best.worthwhile()[rows][:, None, None]
        i, j = np.nonzero((inside & better).any(axis=2))
        if not len(i):
            break
        rows = rows[i]
        ends = alphas[i, j], alphas[i, j + 1]
        inner = np.geomspace(*ends, SPLIT + 1, axis=1)[:, 1:-1]
        products = projection.products(of, rows.repeat(SPLIT - 1), inner.ravel())
        alphas = np.column_stack([ends[0], inner, ends[1]])
        wq, qq = (
            np.concatenate([old[i, j, None], new.reshape(*inner.shape, -1), old[i, j + 1, None]], axis=1)
            for old, new in zip((wq, qq), products, strict=True)
        )
    return best.alpha


def _start_points(of: SortedRows, projection: Projection) -> Floats:
    """Descending alphas (n, START_POINTS) from where all of Q is 0 to where all of it is saturated."""
    magnitudes = np.abs(of.values)
    largest = magnitudes.max(axis=1)
    smallest = np.min(magnitudes, axis=1, where=magnitudes > 0, initial=np.inf)
    thresholds = np.abs(projection.thresholds)
    beyond = 1 + 1e-9
    highest = np.where(largest > 0, largest, 1.0) / thresholds.min() * beyond
    lowest = np.minimum(smallest, largest.clip(NO_ALPHA)) / thresholds.max() / beyond
    return np.geomspace(highest, lowest, START_POINTS, axis=1)


class _Best:
    """The largest gain <w,Q>^2 / <Q,Q> = ||w||^2 - loss seen per row, and its alpha."""

    def __init__(self, norms: Floats) -> None:
        self.norms = norms
        self.gain = np.zeros_like(norms)
        self.alpha = np.zeros_like(norms)

    def update(self, rows: Indices, wq: Floats, qq: Floats) -> None:
        """``rows`` (I,) ascending; ``wq``, ``qq`` (I, points, orientations)."""
        gains = np.where(qq > 0, wq**2 / qq, 0.0).reshape(len(rows), -1)
        at = gains.argmax(axis=1)
        gain = gains[np.arange(len(rows)), at]
        point, orientation = np.divmod(at, wq.shape[2])
        alpha = (wq / qq)[np.arange(len(rows)), point, orientation] * np.where(orientation == 0, 1.0, -1.0)
        # Ascending by gain: of several intervals of one row the best is written last.
        order = np.argsort(gain, kind="stable")
        order = order[gain[order] > self.gain[rows[order]]]
        self.gain[rows[order]] = gain[order]
        self.alpha[rows[order]] = alpha[order]

    def worthwhile(self) -> Floats:
        """The gain that an alpha must exceed to be worth finding."""
        return self.gain + LOSS_TOLERANCE * (self.norms - self.gain) + NORM_TOLERANCE * self.norms


def _fit_optimal(w: npt.NDArray[np.floating[Any]], grid: Grid) -> Fit:
    levels = grid.half_levels(grid.canonical)[:, None]
    if not grid.symmetric:
        both = np.union1d(levels, -levels)
        levels = np.column_stack([both.clip(levels[0], levels[-1]), both.clip(-levels[-1], -levels[0])])
        thresholds = (both[1:] + both[:-1]) / 2
    else:
        thresholds = grid.thresholds(grid.canonical)
    projection = Projection(thresholds, levels)
    result = Fit(np.empty(len(w)), np.empty(w.shape, np.float32), np.empty(len(w)))

    def solve(block: slice) -> None:
        # A power of two per kernel keeps squares within range, however small or large the weights.
        exponent = np.frexp(np.abs(w[block]).max(axis=1))[1]
        scaled = np.ldexp(w[block].astype(np.float64), -exponent[:, None])
        alpha = least_loss(_sorted_rows(scaled, grid), projection)
        Q = grid.project(scaled / np.where(alpha == 0, 1.0, alpha)[:, None], grid.canonical)
        qq = np.einsum("nk,nk->n", Q, Q)
        alpha = np.einsum("nk,nk->n", scaled, Q) / np.where(qq == 0, 1.0, qq)
        scaled -= alpha[:, None] * Q
        result.alpha[block] = np.ldexp(alpha, exponent)
        result.Q[block] = Q
        result.loss[block] = np.ldexp(np.einsum("nk,nk->n", scaled, scaled), 2 * exponent)

    _for_blocks(solve, w)
    return result


def _fit_reference(w: npt.NDArray[np.floating[Any]], grid: Grid) -> Fit:
    """Let each block iterate until none of its alphas moves, then apply the layer's stopping rule."""
    projections = {
        v: Projection(grid.reference_thresholds(v), grid.half_levels(v)[:, None]) for v in grid.variants
    }

    def trace(block: slice) -> dict[int, Floats]:
        rows = _sorted_rows(w[block].astype(np.float64), grid)
        return {
            v: np.array([step.totals(rows) for step in _iterate(rows, p)]) for v, p in projections.items()
        }

    traces = _for_blocks(trace, w)
    iterations, losses = {}, {}
    for variant in grid.variants:
        change, norm, loss = _added_up([of_block[variant] for of_block in traces]).T
        stopped = np.sqrt(change) <= TOLERANCE * np.sqrt(norm)
        last = int(stopped.argmax()) if stopped.any() else len(stopped) - 1
        iterations[variant] = last + 1
        losses[variant] = max(0.0, loss[last])  # an exact fit's may round to less
    least = min(losses.values())
    variant = next(v for v in grid.variants if not losses[v] > least + TIE * abs(least))
    result = Fit(np.empty(len(w)), np.empty(w.shape, np.float32), np.empty(len(w)))

    def solve(block: slice) -> None:
        dense = w[block].astype(np.float64)
        for step in islice(_iterate(_sorted_rows(dense, grid), projections[variant]), iterations[variant]):
            last = step
        Q = grid.reference_project(
            np.nan_to_num(dense / last.previous[:, None], posinf=np.inf, neginf=-np.inf), variant
        )
        dense -= last.alpha[:, None] * Q
        result.alpha[block] = last.alpha
        result.Q[block] = Q
        result.loss[block] = np.einsum("nk,nk->n", dense, dense)

    _for_blocks(solve, w)
    return result


@dataclass(frozen=True)
class _Step:
    """One iteration of all kernels of a block: Q = P(w / previous), alpha = <w,Q> / (<Q,Q> + EPSILON)."""

    previous: Floats
    alpha: Floats
    wq: Floats
    qq: Floats

    def totals(self, rows: SortedRows) -> tuple[float, float, float]:
        """Squares of the change of alpha and of alpha, and the loss, each added up over the kernels."""
        loss = rows.norms + self.alpha * (self.alpha * self.qq - 2 * self.wq)
        return (
            float(np.sum((self.alpha - self.previous) ** 2)),
            float(np.sum(self.alpha**2)),
            float(np.sum(loss)),
        )


def _iterate(rows: SortedRows, projection: Projection) -> Iterator[_Step]:
    """The iterations of the reference solver, until no alpha changes any more."""
    alpha = rows.norms / rows.values.shape[1]
    wq, qq = np.zeros_like(alpha), np.zeros_like(alpha)
    moving = np.arange(len(alpha))
    for _ in range(MAX_ITERATIONS):
        previous = alpha
        alpha, wq, qq = alpha.copy(), wq.copy(), qq.copy()
        products = projection.products(rows, moving, np.maximum(previous[moving], NO_ALPHA))
        wq[moving], qq[moving] = products[0][:, 0], products[1][:, 0]
        alpha[moving] = wq[moving] / (qq[moving] + EPSILON)
        yield _Step(previous, alpha, wq, qq)
        moving = np.flatnonzero(np.abs(alpha - previous) > 0)  # not those that are NaN
        if not len(moving):
            return


def _added_up(traces: list[Floats]) -> Floats:
    """Add up traces (iterations, 3) of blocks that settled at different times: no change afterwards."""
    total = np.zeros((max(map(len, traces)), 3))
    for trace in traces:
        total[: len(trace)] += trace
        total[len(trace) :, 1:] += trace[-1, 1:]
    return total


def _sorted_rows(w: Floats, grid: Grid) -> SortedRows:
    return SortedRows(np.sort(np.abs(w) if grid.symmetric else w, axis=1))


def _for_blocks(work: Callable[[slice], T], w: npt.NDArray[Any]) -> list[T]:
    """Do ``work`` on blocks of kernels, in threads: numpy sorts and adds without the interpreter's lock."""
    n, k = w.shape
    threads = min(MAX_THREADS, available_threads())
    size = max(1, min(BLOCK // k, -(-n // threads)))

    def quietly(start: int) -> T:
        # Divisions by an alpha of 0 are meant.
        with np.errstate(all="ignore"):
            return work(slice(start, min(start + size, n)))

    with pool(threads, "labelfree-solver") as executor:
        return list(executor.map(quietly, range(0, n, size)))
