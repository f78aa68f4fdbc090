"""Mixed precision: how many bits each layer gets where only their mean is given (``weights.budget``).

How much a layer suffers from few bits is measured, as by ZeroQ (Cai et al., CVPR 2020): the divergence of the
net's output from full precision when that layer alone is quantized. Divergences of different layers are taken
to add up, so the best bits are those with the least sum among all that keep the budget: a multiple-choice
knapsack problem.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from fractions import Fraction
from functools import reduce

import numpy as np
import numpy.typing as npt

from quantize.arrays import FLOAT_BYTES, FloatArray
from quantize.caffenet import NetParameter, Weights, layer_index, live_blobs, needed_layers, single_assignment
from quantize.caffenet.kernels import from_kernels, to_kernels
from quantize.data.feed import Feed, thinned
from quantize.engines.base import Engine
from quantize.errors import InputError, LabelfreeError
from quantize.measure.evaluate import check_scores, divergences
from quantize.numerics.grids import make_grid
from quantize.numerics.moments import Moments
from quantize.numerics.solvers import fit
from quantize.progress import SILENT, Progress
from quantize.record import Budget
from quantize.settings import GRID_BITS, GridChoice, WeightSettings
from quantize.stages.data_aware import Calibration, Frontier, only_normalized
from quantize.stages.weights import choices, free_layers
from quantize.sweep.plan import Costs, micro_batch_size

LEAST_IMAGES = 64
"""Images that sensitivities are measured on, or all if there are fewer ..."""
WORK = 1e12
"""... or more of them, as many as take this many multiply-accumulates. A few images make most of a confident
net's divergence, so many are better, and with a small net they take but seconds."""
MAX_UNITS = 1 << 16
"""Bits are counted in units so large that there are no more of them than this."""

Sensitivities = dict[str, dict[int, float]]
"""By layer and bits: mean divergence in nats when that layer alone has so many bits."""


def keep_budget(
    weights: Weights,
    settings: WeightSettings,
    calibration: Calibration,
    scores: str,
    progress: Progress = SILENT,
) -> tuple[dict[str, GridChoice], Budget]:
    """The grid of every layer to quantize, so that the mean bits are at most ``settings.budget``.

    Args:
        weights: the blobs of the net in full precision.
        settings: with a budget.
        calibration: the net and images to measure sensitivities on.
        scores: the net's blob with one score per class.

    Returns:
        The grids by layer name, in network order (see `weights_quan.choices`), and what they were chosen by.

    Raises:
        InputError: no bits that the grid offers keep the budget or use it up; or as `sensitivities`.
    """
    if settings.budget is None:
        raise ValueError("the settings have no budget")
    chosen = choices(calibration.net, settings)
    free = free_layers(calibration.net, settings)
    counts = {name: weights[name][0].size for name in chosen}
    bits = bits_left(counts, {name: chosen[name].bits for name in chosen if name not in free}, settings)
    found, images = sensitivities(weights, free, settings.grid, calibration, scores, progress)
    for name, best in allocate({name: counts[name] for name in free}, found, bits).items():
        chosen[name] = GridChoice(bits=best, grid=settings.grid)
    spent = sum(counts[name] * choice.bits for name, choice in chosen.items())
    divergence = {name: {str(b): value for b, value in by_bits.items()} for name, by_bits in found.items()}
    return chosen, Budget(settings.budget, spent / sum(counts.values()), images, divergence)


def bits_left(counts: Mapping[str, int], fixed: Mapping[str, int], settings: WeightSettings) -> int:
    """How many bits the budget leaves for the layers that are not fixed.

    Args:
        counts: number of weights by layer.
        fixed: bits per weight of the layers whose bits are given.
        settings: with a budget.

    Raises:
        InputError: less than the least that the grid has for those layers, or more than the most.
    """
    budget = Fraction(str(settings.budget))
    low, high = GRID_BITS[settings.grid]
    total = sum(counts.values())
    given = sum(counts[name] * bits for name, bits in fixed.items())
    free = total - sum(counts[name] for name in fixed)
    if not free:
        raise InputError(
            "weights.budget: weights.first_last and weights.layers give the bits of every layer, so there is "
            "nothing to choose; leave budget out"
        )
    least, most = (Fraction(given + free * bits, total) for bits in (low, high))
    if not least <= budget <= most:
        # As few digits as leave room for a number between the two.
        scale = next(10**d for d in range(2, 30) if math.ceil(10**d * least) <= 10**d * most)
        if budget < least:
            fault = "small"
            remedy = f"at least {math.ceil(scale * least) / scale}, or fewer bits in weights.first_last"
        else:
            fault = "large"
            remedy = f"at most {math.floor(scale * most) / scale}, or another weights.grid"
        raise InputError(
            f"weights.budget: {settings.budget} is too {fault}: weights.grid {settings.grid} has {low} to "
            f"{high} bits, and the first and the last layer and those in weights.layers keep theirs; "
            f"give {remedy}"
        )
    return math.floor(budget * total) - given


def allocate(counts: Mapping[str, int], sensitivities: Sensitivities, bits: int) -> dict[str, int]:
    """The bits per weight of every layer for which the sum of the sensitivities is least.

    A dynamic programme over the layers and the bits spent beyond the fewest that each may have. These are
    counted in units of the greatest common divisor of the numbers of weights, which is exact; where that
    makes more than `MAX_UNITS`, in larger ones, rounded up, so that the budget is kept.

    Args:
        counts: number of weights by layer.
        sensitivities: by layer and by the bits that it may have.
        bits: for all these layers together, at least enough for the fewest that each may have.

    Returns:
        Bits per weight by layer: sum of counts * bits per weight <= ``bits``.
    """
    fewest = {name: min(sensitivities[name]) for name in counts}
    spare = bits - sum(counts[name] * fewest[name] for name in counts)
    spare = min(spare, sum(counts[name] * (max(sensitivities[name]) - fewest[name]) for name in counts))
    unit = max(math.gcd(*counts.values()), -(-spare // MAX_UNITS), 1)
    capacity = spare // unit
    least = np.zeros(capacity + 1)
    """Of the layers so far, the least sum by the units they may take."""
    steps: list[tuple[str, list[int], npt.NDArray[np.intp]]] = []
    for name in counts:
        by_bits = sensitivities[name]
        offered = sorted(by_bits)
        sums = np.full((len(offered), capacity + 1), np.inf)
        for row, b in zip(sums, offered, strict=True):
            taken = -(-counts[name] * (b - fewest[name]) // unit)
            if taken <= capacity:
                row[taken:] = least[: capacity + 1 - taken] + by_bits[b]
        best = sums.argmin(axis=0)
        least = sums[best, np.arange(capacity + 1)]
        steps.append((name, offered, best))
    found = {}
    for name, offered, best in reversed(steps):
        found[name] = offered[best[capacity]]
        capacity -= -(-counts[name] * (found[name] - fewest[name]) // unit)
    return dict(reversed(found.items()))


def sensitivities(
    weights: Weights,
    layers: Sequence[str],
    grid: str,
    calibration: Calibration,
    scores: str,
    progress: Progress = SILENT,
) -> tuple[Sensitivities, int]:
    """How far the net's output moves when one layer alone is quantized, for all bits that the grid has.

    The weights take the nearest levels (`solvers.fit`). Where only BatchNorms read the layer's output, renorm
    will repair its statistics. So every channel of it gets back the mean m and the standard deviation s that
    it has in full precision over the same images: y becomes (y - m') s / s' + m.

    Args:
        weights: the blobs of the net in full precision.
        layers: the layers, each on its own.
        grid: name of their grid.
        calibration: the net and its images; some of them are taken, spread evenly.
        scores: the net's blob with one score per class.

    Returns:
        Mean over the images of the Kullback-Leibler divergence of the softmax of the scores from that of full
        precision, by layer and bits; and the number of images.

    Raises:
        InputError: the scores cannot be computed or do not depend on a layer, or too little memory.
        LabelfreeError: scores are not finite.
    """
    net, scores = _part_for(calibration.net, scores)
    for name in layers:
        if not any(layer.name == name for layer in net.layer):
            raise InputError(
                f"weights.budget: the net's scores do not depend on layer {name}, so nothing says how many "
                f"bits it needs; give weights.layers.{name}.bits"
            )
    feed = calibration.feed
    offered = range(GRID_BITS[grid][0], GRID_BITS[grid][1] + 1)
    found: Sensitivities = {name: {} for name in layers}
    with closing(calibration.open_engine(net, weights, {feed.blob: feed.images.shape})) as engine:
        costs = Costs.of(net, engine.shapes, [feed.blob], [scores])
        work = {name: costs.between(layer_index(net, name), len(net.layer)) for name in layers}
        per_image = sum(work.values()) * len(offered)
        feed = thinned(feed, max(LEAST_IMAGES, int(WORK / max(per_image, 1))))
        images = len(feed.images)
        progress.start("budget", per_image * images)
        reference = _Reference.of(engine, feed, scores, costs.widest, calibration.memory)
        for name in layers:
            alone = _Alone(reference, name)
            w = to_kernels(alone.layer, weights[name][0])
            for bits in offered:
                rounded = fit(w, make_grid(grid, bits))
                kernels = rounded.alpha[:, None].astype(np.float32) * rounded.Q
                blob = from_kernels(alone.layer, kernels, weights[name][0].shape)
                found[name][bits] = alone.divergence([blob, *weights[name][1:]])
                progress.advance(work[name] * images)
    return found, images


def _part_for(net: NetParameter, scores: str) -> tuple[NetParameter, str]:
    """The layers that the scores depend on, every blob name assigned once, and the scores' name there."""
    check_scores(net, scores)
    part = NetParameter()
    part.layer.extend(needed_layers(net.layer, [scores]))
    flat = single_assignment(part)
    return flat, flat.layer[-1].top[list(part.layer[-1].top).index(scores)]


@dataclass(frozen=True)
class _Reference:
    """The net in full precision.

    Attributes:
        frontier: the net and how far it has been run.
        scores: the blob.
        full: its values, by micro-batch.
    """

    frontier: Frontier
    scores: str
    full: list[FloatArray]

    @classmethod
    def of(cls, engine: Engine, feed: Feed, scores: str, widest: int, memory: int | None) -> _Reference:
        """Run the net once.

        Args:
            widest: bytes per image of the bottoms and tops of the widest layer.
            memory: bytes that scores and frontier may take; None: no bound.
        """
        images = len(feed.images)
        held = FLOAT_BYTES * math.prod(engine.shapes.blobs[scores]) * images
        micro_batch_size(widest + held, images, memory)  # says so where not even one image fits
        batch = micro_batch_size(widest, images, memory and memory - held)
        runner = engine.compile(0, len(engine.net.layer), [scores])
        batches = feed.images.batches(batch)
        full = [runner.run({feed.blob: pixels}).blobs[scores] for pixels, _ in batches]
        return cls(Frontier(engine, feed, batch, memory and memory - held), scores, full)


class _Alone:
    """One layer of the net, to be quantized alone."""

    def __init__(self, reference: _Reference, name: str) -> None:
        self._reference = reference
        self._engine = engine = reference.frontier.engine
        self._at = layer_index(engine.net, name)
        self._live = live_blobs(engine.net, self._at)
        self.layer = engine.net.layer[self._at]
        self._normalized = [top for top in self.layer.top if only_normalized(engine.net, top)]
        self._wanted = self._moments()
        self._behind = engine.compile(self._at + 1, len(engine.net.layer), [reference.scores])

    def divergence(self, blobs: Sequence[FloatArray]) -> float:
        """Mean divergence of the scores with other blobs of the layer, in nats.

        Raises:
            LabelfreeError: scores are not finite.
        """
        original = self._engine.weights[self.layer.name]
        self._engine.set_blobs(self.layer.name, blobs)
        found = self._moments()
        runner = self._engine.compile(self._at, self._at + 1, list(self.layer.top))
        total = 0.0
        for before, full in zip(self._before(), self._reference.full, strict=True):
            tops = runner.run({name: before[name] for name in runner.inputs}).blobs
            for top in self._normalized:
                tops[top] = _restored(tops[top], found[top], self._wanted[top])
            feeds = {**before, **tops}
            scores = self._behind.run({name: feeds[name] for name in self._behind.inputs}).blobs
            total += self._divergence(full, scores[self._reference.scores])
        self._engine.set_blobs(self.layer.name, original)
        return max(0.0, total / len(self._reference.frontier.feed.images))

    def _divergence(self, full: FloatArray, own: FloatArray) -> float:
        if not (np.isfinite(full).all() and np.isfinite(own).all()):
            blob = self._reference.scores
            raise LabelfreeError(f"{self.layer.name}: blob {blob} is not finite; layers before it overflow")
        return float(divergences(full.reshape(len(full), -1), own.reshape(len(own), -1)).sum())

    def _before(self) -> Iterator[dict[str, FloatArray]]:
        """What is live before the layer, by micro-batch."""
        return (result.blobs for _, result in self._reference.frontier.run_to(self._at, self._live))

    def _moments(self) -> dict[str, Moments]:
        """Of the tops that only BatchNorms read, over all images."""
        if not self._normalized:
            return {}
        runner = self._engine.compile(self._at, self._at + 1, [], self._normalized)
        seen = [runner.run({name: live[name] for name in runner.inputs}).moments for live in self._before()]
        return {top: reduce(Moments.merged, (moments[top] for moments in seen)) for top in self._normalized}


def _restored(blob: FloatArray, found: Moments, wanted: Moments) -> FloatArray:
    """A blob whose channels have the moments ``found``, moved and scaled so that they have ``wanted``."""
    ratio = np.divide(wanted.m2, found.m2, out=np.zeros_like(found.m2), where=found.m2 > 0)
    scale = np.sqrt(ratio)
    shape = (1, -1) + (1,) * (blob.ndim - 2)
    shift = wanted.mean - scale * found.mean
    return blob * scale.reshape(shape).astype(np.float32) + shift.reshape(shape).astype(np.float32)
