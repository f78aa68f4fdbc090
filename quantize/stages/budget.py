"""Mixed precision: how many bits each layer gets where only their mean is given (``weights.budget``).

How much a layer suffers from few bits is measured, as by ZeroQ (Cai et al., CVPR 2020): the divergence of the
net's output from full precision when that layer alone is quantized. Divergences of different layers are taken
to add up, so the best bits are those with the least sum among all that keep the budget: a multiple-choice
knapsack problem.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from quantize.arrays import FLOAT_BYTES, FloatArray
from quantize.caffenet import (
    LayerParameter,
    NetParameter,
    empty_like,
    layer_index,
    live_blobs,
    needed_layers,
    single_assignment,
)
from quantize.caffenet.kernels import from_kernels, to_kernels
from quantize.caffenet.model import Model
from quantize.data.feed import thinned
from quantize.engines.base import Engine, RangeResult
from quantize.errors import InputError, LabelfreeError
from quantize.measure.closeness import divergences, scores_by_place
from quantize.measure.outputs import Output, tapped
from quantize.numerics.grids import make_grid
from quantize.numerics.moments import Moments
from quantize.numerics.solvers import fit
from quantize.progress import SILENT, Progress
from quantize.record import Budget
from quantize.settings import GRID_BITS, GridChoice, WeightSettings
from quantize.stages.data_aware import CalibrationSweep
from quantize.stages.renorm import only_normalized, variance_ratio
from quantize.stages.weights import choices, free_layers
from quantize.sweep.plan import Costs, Step, micro_batch_size
from quantize.sweep.run import Shard

LEAST_IMAGES = 64
"""Images that sensitivities are measured on, or all if there are fewer ..."""
WORK = 1e12
"""... or more of them, as many as take this many multiply-accumulates. A few images make most of a confident
net's divergence, so many are better, and with a small net they take but seconds."""
MAX_UNITS = 1 << 16
"""Bits are counted in units so large that there are no more of them than this."""

FULL = 0
"""Bits of a layer in full precision."""

Sensitivities = dict[str, dict[int, float]]
"""By layer and bits: mean divergence in nats when that layer alone has so many bits."""


def keep_budget(
    model: Model,
    settings: WeightSettings,
    calibration: CalibrationSweep,
    scores: Output,
    progress: Progress = SILENT,
) -> tuple[dict[str, GridChoice], Budget]:
    """The grid of every layer to quantize, so that the mean bits are at most ``settings.budget``.

    Args:
        model: in full precision.
        settings: with a budget.
        calibration: the images to measure sensitivities on.
        scores: the net's output with one score per class.

    Returns:
        The grids by layer name, in network order (see `weights_quan.choices`), and what they were chosen by.

    Raises:
        InputError: no bits that the grid offers keep the budget or use it up; or as `sensitivities`.
    """
    if settings.budget is None:
        raise ValueError("the settings have no budget")
    net = model.inference.net
    chosen = choices(net, settings)
    free = free_layers(net, settings)
    counts = {name: model.weights[name][0].size for name in chosen}
    bits = bits_left(counts, {name: chosen[name].bits for name in chosen if name not in free}, settings)
    found, images = sensitivities(model, free, settings.grid, calibration, scores, progress)
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
    model: Model,
    layers: Sequence[str],
    grid: str,
    calibration: CalibrationSweep,
    scores: Output,
    progress: Progress = SILENT,
    work: float = WORK,
    least_images: int = LEAST_IMAGES,
) -> tuple[Sensitivities, int]:
    """How far the net's output moves when one layer alone is quantized, for all bits that the grid has.

    The weights take the nearest levels (`solvers.fit`). Where only BatchNorms read the layer's output, renorm
    will repair its statistics. So every channel of it gets back the mean m and the standard deviation s that
    it has in full precision over the same images: y becomes (y - m') s / s' + m.

    Args:
        model: in full precision.
        layers: the layers, each on its own.
        grid: name of their grid.
        calibration: the images; some of them are taken, spread evenly.
        scores: the net's output with one score per class.
        work: multiply-accumulates, of which the number of images follows, but ...
        least_images: ... not fewer than these, where there are so many.

    Returns:
        Mean over the images (and their places, where there are several) of the Kullback-Leibler divergence of
        the softmax of the scores from that of full precision, by layer and bits; and the number of images.

    Raises:
        InputError: the scores cannot be computed or do not depend on a layer, or too little memory.
        LabelfreeError: scores are not finite.
    """
    weights = model.weights
    net, blob = _part_for(model.inference.net, scores)
    for name in layers:
        if not any(layer.name == name for layer in net.layer):
            raise InputError(
                f"weights.budget: the net's scores do not depend on layer {name}, so nothing says how many "
                f"bits it needs; give weights.layers.{name}.bits"
            )
    feed = calibration.feed
    offered = range(GRID_BITS[grid][0], GRID_BITS[grid][1] + 1)
    with closing(calibration.open_engine(net, weights, feed.shapes)) as engine:
        costs = Costs.of(net, engine.shapes, list(feed.shapes), [blob])
        behind = (costs.between(layer_index(net, name), len(net.layer)) for name in layers)
        per_image = sum(behind) * len(offered)
        feed = thinned(feed, max(least_images, int(work / max(per_image, 1))))
        images = len(feed)
        # The scores of all images are kept.
        held = FLOAT_BYTES * math.prod(engine.shapes.blobs[blob]) * images
        memory = calibration.memory
        micro_batch_size(costs.widest + held, images, memory)  # says so where not even one image fits
        memory = memory and memory - held
        alone = [_Alone.of(net, name) for name in layers]
        shard = Shard(engine, feed, [step for one in alone for step in one.steps], memory)
        if advice := shard.advice():
            progress.note(f"budget: {advice}")
        whole = Shard(engine, feed, [Step(len(net.layer), (), (blob,))], memory)
        progress.start("budget", shard.plan.work + whole.plan.work + per_image * images)
        full = _Scores.of(whole, blob, scores, progress)
        found = {
            one.layer.name: one.sensitivity(
                shard, full, _rounded(one.layer, weights[one.layer.name], grid, offered), progress
            )
            for one in alone
        }
    return found, images


def _part_for(net: NetParameter, scores: Output) -> tuple[NetParameter, str]:
    """The layers that the scores depend on, every blob name assigned once, and the scores' name there."""
    with_taps, [blob] = tapped(net, [scores])
    part = empty_like(net)
    part.layer.extend(needed_layers(with_taps.layer, [blob]))
    if not part.layer:
        raise InputError(
            f"the net's scores, blob {scores.blob!r}, cannot be computed from the images alone; "
            "check the bottoms of its Accuracy or loss layer"
        )
    flat = single_assignment(part)
    return flat, flat.layer[-1].top[list(part.layer[-1].top).index(blob)]


@dataclass(frozen=True)
class _Scores:
    """What the net in full precision gives.

    Attributes:
        blob: the scores' name.
        class_axis: of the scores.
        values: float32, a row for each image.
    """

    blob: str
    class_axis: int
    values: FloatArray

    @classmethod
    def of(cls, shard: Shard, blob: str, scores: Output, progress: Progress) -> _Scores:
        """Run a shard's only step.

        Raises:
            InputError: the scores have no axis with classes, or are the same for all images.
        """
        shape = shard.engine.blob_shape(blob, len(shard.feed))
        axis = scores.axis_of(shape)
        if axis is None or shape[0] != len(shard.feed):
            raise InputError(
                f"weights.budget: output {scores.blob} has the shape {shape} for {len(shard.feed)} images, "
                "not one score per class of each; give weights.bits"
            )
        values = np.empty(shape, np.float32)

        def keep(images: range, blobs: Mapping[str, FloatArray]) -> None:
            values[images.start : images.stop] = blobs[blob]

        shard.advance(visit=keep, progress=progress)
        return cls(blob, axis, values)

    def divergence(self, images: range, own: FloatArray, layer: str) -> float:
        """Of other scores for some images, the sum over these (and the mean over the places of each).

        Raises:
            LabelfreeError: scores are not finite; names the layer that is quantized.
        """
        full = self.values[images.start : images.stop]
        if not (np.isfinite(full).all() and np.isfinite(own).all()):
            raise LabelfreeError(f"{layer}: blob {self.blob} is not finite; layers before it overflow")
        found = divergences(scores_by_place(full, self.class_axis), scores_by_place(own, self.class_axis))
        return float(found.sum()) * len(full) / len(found)


def _rounded(
    layer: LayerParameter, blobs: Sequence[FloatArray], grid: str, offered: Iterable[int]
) -> dict[int, list[FloatArray]]:
    """A layer's blobs with each weight at its nearest level, by bits."""
    w = to_kernels(layer, blobs[0])
    found = {}
    for bits in offered:
        rounded = fit(w, make_grid(grid, bits))
        kernels = rounded.alpha[:, None].astype(np.float32) * rounded.Q
        found[bits] = [from_kernels(layer, kernels, blobs[0].shape), *blobs[1:]]
    return found


@dataclass(frozen=True)
class _Alone:
    """One layer of the net, to be quantized alone.

    Attributes:
        layer: the layer.
        place: where it stands.
        normalized: its tops that only BatchNorms read.
        live: the blobs that live before it.
    """

    layer: LayerParameter
    place: int
    normalized: list[str]
    live: list[str]

    @classmethod
    def of(cls, net: NetParameter, name: str) -> _Alone:
        """For a layer of a net with every blob name assigned once."""
        place = layer_index(net, name)
        layer = net.layer[place]
        normalized = [top for top in layer.top if only_normalized(net, top)]
        return cls(layer, place, normalized, live_blobs(net, place))

    @property
    def steps(self) -> list[Step]:
        """Of a sweep, all of them up to the layer: one for the moments of its tops, one for the scores."""
        return [Step(self.place, (), tuple(self.live))] * (2 if self.normalized else 1)

    def sensitivity(
        self, shard: Shard, full: _Scores, variants: Mapping[int, Sequence[FloatArray]], progress: Progress
    ) -> dict[int, float]:
        """Mean divergence of the scores, in nats, by the keys of ``variants``.

        Args:
            shard: has the steps of this layer before it.
            full: the scores in full precision.
            variants: other blobs of the layer.

        Raises:
            LabelfreeError: scores are not finite.
        """
        engine, name = shard.engine, self.layer.name
        original = engine.weights[name]
        moments: dict[int, dict[str, Moments]] = {}
        if self.normalized:
            measuring = _Variants(engine, self.place, {FULL: original, **variants}, [], self.normalized)

            def measure(_: range, before: Mapping[str, FloatArray]) -> None:
                for key in measuring.blobs:
                    new = measuring.run(key, before).moments
                    seen = moments.get(key)
                    moments[key] = {top: new[top].merged(seen[top]) for top in new} if seen else new

            shard.advance(visit=measure, progress=progress)
        trying = _Variants(engine, self.place, variants, list(self.layer.top), [])
        end = len(engine.net.layer)
        behind = engine.compile(self.place + 1, end, [full.blob])
        work = shard.costs.between(self.place, end)
        totals = dict.fromkeys(variants, 0.0)

        def add(images: range, before: Mapping[str, FloatArray]) -> None:
            for key in variants:
                tops = trying.run(key, before).blobs
                for top in self.normalized:
                    tops[top] = _restored(tops[top], moments[key][top], moments[FULL][top])
                feeds = {**before, **tops}
                own = behind.run({blob: feeds[blob] for blob in behind.inputs}).blobs[full.blob]
                totals[key] += full.divergence(images, own, name)
                progress.advance(work * len(images))

        shard.advance(visit=add, progress=progress)
        engine.set_blobs(name, original)
        return {key: max(0.0, total / len(shard.feed)) for key, total in totals.items()}


class _Variants:
    """One layer of an opened net with one set of blobs or another."""

    def __init__(
        self,
        engine: Engine,
        place: int,
        blobs: Mapping[int, Sequence[FloatArray]],
        outputs: Sequence[str],
        moments: Sequence[str],
    ) -> None:
        self.blobs = blobs
        self._engine = engine
        self._layer = engine.net.layer[place].name
        self._ranges = {}
        for key in blobs:
            engine.set_blobs(self._layer, blobs[key])
            self._ranges[key] = engine.compile(place, place + 1, outputs, moments)

    def run(self, key: int, before: Mapping[str, FloatArray]) -> RangeResult:
        """Run the layer with the blobs of a key; ``before`` is what lives before it."""
        self._engine.set_blobs(self._layer, self.blobs[key])
        chosen = self._ranges[key]
        return chosen.run({name: before[name] for name in chosen.inputs})


def _restored(blob: FloatArray, found: Moments, wanted: Moments) -> FloatArray:
    """A blob whose channels have the moments ``found``, moved and scaled so that they have ``wanted``."""
    scale = 1 / np.sqrt(variance_ratio(wanted, found))
    shape = (1, -1) + (1,) * (blob.ndim - 2)
    shift = wanted.mean - scale * found.mean
    return blob * scale.reshape(shape).astype(np.float32) + shift.reshape(shape).astype(np.float32)
