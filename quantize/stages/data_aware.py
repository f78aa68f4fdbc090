"""Quantize weights so that each layer's output is what the full-precision net's is, from unlabeled images.

The layers are taken in network order. Both nets advance together over all calibration images: the
full-precision net as it is, the other with the weights quantized so far and its BatchNorms re-estimated
(as in `renorm`). At each layer the second moments of what goes in and what should come out are collected
and the kernels rounded with them (see `rounding`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise

import numpy as np

from quantize.arrays import FloatArray, Floats
from quantize.caffenet import LayerParameter, NetParameter, Weights, single_assignment, users
from quantize.caffenet.kernels import from_kernels, outputs, to_kernels
from quantize.caffenet.model import Model
from quantize.caffenet.norms import norm_places
from quantize.caffenet.patches import Patches
from quantize.data.feed import Feed
from quantize.engines.base import Engine, OpenEngine
from quantize.errors import LabelfreeError
from quantize.numerics.decibels import decibels
from quantize.numerics.grids import make_grid
from quantize.numerics.rounding import DAMPINGS, Problem, Statistics, chosen_damping, round_kernels
from quantize.numerics.solvers import fit
from quantize.progress import SILENT, Progress
from quantize.settings import GridChoice, StatisticsName
from quantize.stages import renorm
from quantize.sweep.pair import beside, both_weights, full_layers, names_of_one_net, of_layers
from quantize.sweep.plan import Step, depth_order
from quantize.sweep.run import Shard

PATCHES = 1 << 16
"""Patches per layer, about: of each image the same number, at random places."""
ROWS = 2048
"""Patches that are added to the sums at once: adding a large H costs as much as multiplying a few patches."""
FOLDS = 2
"""Of the images: what is fitted to one is tested on the other (`rounding.chosen_damping`)."""
MAX_COLUMNS = 7168
"""Layers with longer kernels are rounded to the nearest level: H of two folds would take more than 800 MB."""


@dataclass(frozen=True)
class CalibrationSweep:
    """Images for the stage weights, and how they are run through a net.

    Attributes:
        feed: the calibration images.
        open_engine: opens a net for running.
        memory: bytes that the blobs of all images may take; None: no bound.
        statistics: those that renorm will give the BatchNorms.
    """

    feed: Feed
    open_engine: OpenEngine
    memory: int | None
    statistics: StatisticsName = "paired"


@dataclass(frozen=True)
class DataAwareFit:
    """A quantized layer.

    Attributes:
        alpha: float64 (n,).
        Q: float32 (n, k).
        bias: float32 (n,): the bias that keeps the mean of the output; None where the layer's own stays.
        output_sqnr_db: of the output against the full-precision net's: E y^2 / E (y - alpha Q x)^2.
        nearest_sqnr_db: the same with each weight at its nearest level; both None where an error is 0.
    """

    alpha: Floats
    Q: FloatArray
    bias: FloatArray | None
    output_sqnr_db: float | None
    nearest_sqnr_db: float | None


def data_aware(
    model: Model,
    chosen: Mapping[str, GridChoice],
    calibration: CalibrationSweep,
    progress: Progress = SILENT,
) -> dict[str, DataAwareFit]:
    """Quantize the layers in ``chosen``.

    Args:
        model: in full precision.
        chosen: grid by layer name.
        calibration: the images.

    Raises:
        LabelfreeError: a blob is not finite.
    """
    feed, weights = calibration.feed, model.weights
    tour = _Tour.of(model, calibration, chosen)
    found: dict[str, DataAwareFit] = {}
    blobs: dict[str, list[FloatArray]] = {}
    both = both_weights(weights, weights, tour.ordered.layer)
    with names_of_one_net(), closing(calibration.open_engine(tour.net, both, feed.shapes)) as engine:
        patches = {stop.place: stop.patches(engine) for stop in tour.stops}
        steps = [stop.step(patches[stop.place]) for stop in tour.stops]
        shard = Shard(engine, feed, steps, calibration.memory)
        if advice := shard.advice():
            progress.note(f"weights: {advice}")
        sums: dict[str, LayerMoments] = {}
        for stop in tour.stops:
            here = {
                layer.name: LayerMoments(
                    layer,
                    patches[stop.place][layer.name],
                    len(feed),
                    _mean_is_free(layer, tour.ordered, weights),
                )
                for layer in stop.seen
                if layer.name in patches[stop.place]
            }
            moments = shard.advance(blobs, partial(_add, here, feed.seed))
            sums |= here
            repaired = renorm.update(stop.norms, moments)
            blobs = {name: new.blobs for name, new in repaired.items()}
            for uses in stop.rounded:
                layer = uses[0]
                seen = {use.name: sums.pop(use.name) for use in uses if use.name in sums}
                fits = _rounded(uses, weights[layer.name], chosen[layer.name], seen)
                found |= fits
                for use in uses:
                    if use in stop.seen:  # a use that has been passed stays what it was in this sweep
                        blobs[use.name] = _folded(use, fits[use.name], weights[use.name])
                progress.advance(weights[layer.name][0].size)
    return found


@dataclass(frozen=True)
class _Stop:
    """A place of the sweep: the quantized net is before some layers, the full-precision net behind them.

    Attributes:
        place: in the net of both.
        seen: the layers that are to be quantized, here or at a later stop, and see their input here.
        rounded: those to be quantized here, each with the others that have its weights.
        norms: the BatchNorms whose statistics are decided here.
    """

    place: int
    seen: list[LayerParameter]
    rounded: list[list[LayerParameter]]
    norms: list[renorm.Norm]

    def patches(self, engine: Engine) -> dict[str, Patches]:
        """How the layers see their bottoms, without those that `Patches` does not provide for."""
        found = {}
        for layer in self.seen:
            bottom, top = (engine.shapes.blobs[name] for name in (layer.bottom[0], beside(layer.top[0])))
            patches = Patches.of(layer, bottom, top, engine.weights[layer.name][0].shape)
            if patches is not None and patches.columns <= MAX_COLUMNS:
                found[layer.name] = patches
        return found

    def step(self, provided: Collection[str]) -> Step:
        """What the sweep does to get here, to measure for the layers that are provided for."""
        layers = [layer for layer in self.seen if layer.name in provided]
        shown = [name for layer in layers for name in (layer.bottom[0], beside(layer.top[0]))]
        moments = (*renorm.measured(self.norms), *renorm.references(self.norms))
        return Step(self.place, moments, tuple(dict.fromkeys(shown)))


@dataclass(frozen=True)
class _Tour:
    """The way of both nets together: always the full-precision net first, one group of layers ahead.

    Attributes:
        ordered: the layers of one net.
        net: those of both.
        stops: as far as the last layer to be quantized.
    """

    ordered: NetParameter
    net: NetParameter
    stops: list[_Stop]

    @classmethod
    def of(cls, model: Model, calibration: CalibrationSweep, chosen: Collection[str]) -> _Tour:
        """For a model, its images and the layers to quantize."""
        inputs = list(calibration.feed.shapes)
        net = single_assignment(model.inference.net)
        same = users(net)
        uses = {name: same.get(name, [name]) for name in chosen}
        names = {use for each in uses.values() for use in each}
        ordered, cuts = depth_order(net, lambda layer: norm_places(layer) is not None or layer.name in names)
        groups = [list(ordered.layer[start:stop]) for start, stop in pairwise([0, *cuts])]
        while groups and not any(layer.name in names for layer in groups[-1]):
            groups.pop()
        layers = full_layers(groups[0], inputs)
        paired = model.weights if calibration.statistics == "paired" else None
        stops = []
        passed: dict[str, LayerParameter] = {}
        for before, behind in pairwise(groups):
            layers += [*before, *full_layers(behind, inputs)]
            seen = [layer for layer in behind if layer.name in names]
            passed |= {layer.name: layer for layer in seen}
            # Layers that share weights are quantized when the last of them has seen its input.
            ready = [name for name, each in uses.items() if all(use in passed for use in each)]
            rounded = [[passed[use] for use in uses.pop(name)] for name in ready]
            norms = [
                _norm(layer, model.weights, paired) for layer in behind if norm_places(layer) is not None
            ]
            stops.append(_Stop(len(layers), seen, rounded, norms))
        return cls(ordered, of_layers(ordered, layers), stops)


def _norm(layer: LayerParameter, weights: Weights, full: Weights | None) -> renorm.Norm:
    """A BatchNorm, its statistics paired with full precision's where the blobs of that are given."""
    reference = renorm.Reference.of(layer, beside(layer.bottom[0]), full) if full is not None else None
    return renorm.Norm.of(layer, weights, reference)


def _add(sums: Mapping[str, LayerMoments], seed: int, images: range, blobs: Mapping[str, FloatArray]) -> None:
    """Add the blobs of a micro-batch to the sums of all layers.

    Raises:
        LabelfreeError: a blob is not finite.
    """
    for name, moments in sums.items():
        x, y = blobs[moments.layer.bottom[0]], blobs[beside(moments.layer.top[0])]
        if not (np.isfinite(x).all() and np.isfinite(y).all()):
            raise LabelfreeError(f"layer {name}: its input or output is not finite")
        moments.update(x, y, images, seed)


class LayerMoments:
    """Sums over patches x (quantized net) and outputs y (full-precision net) of one layer.

    Args:
        layer: the layer.
        patches: how it sees its bottom.
        images: how many will be seen.
        centered: whether means are to be removed, because they are free.
    """

    def __init__(self, layer: LayerParameter, patches: Patches, images: int, centered: bool) -> None:
        self.layer = layer
        self.patches = patches
        self.per_image = -(-max(PATCHES, 8 * patches.columns) // images)
        self.centered = centered
        groups, n, k = patches.groups, outputs(layer) // patches.groups, patches.columns
        self.folds = [_Sums.zeros(groups, n, k) for _ in range(FOLDS)]

    def update(self, bottom: FloatArray, top: FloatArray, images: range, seed: int) -> None:
        """Add a micro-batch: every other image to the same fold."""
        for number, sums in enumerate(self.folds):
            own = slice((number - images.start) % FOLDS, None, FOLDS)
            if images[own]:
                places = self.patches.sample(images[own], self.per_image, seed)
                sums.add(self.patches.inputs(bottom[own], places), self.patches.outputs(top[own], places))

    def count(self, folds: Iterable[int] = range(FOLDS)) -> int:
        """Patches seen, of some folds."""
        return sum(self.folds[fold].count for fold in folds)

    def statistics(self, folds: Iterable[int] = range(FOLDS)) -> Statistics:
        """The second moments over the images of some folds; around the means if those are free."""
        return _Sums.together([self.folds[fold] for fold in folds]).statistics(self.centered)

    def bias(self, kernels: Floats) -> FloatArray:
        """The bias with which ``kernels`` (G, n, k) keep the mean of the output: float32 (G * n,)."""
        whole = _Sums.together(self.folds)
        x, y = whole.x / whole.count, whole.y / whole.count
        bias: FloatArray = (y - np.einsum("gnk,gk->gn", kernels, x)).reshape(-1).astype(np.float32)
        return bias


@dataclass
class _Sums:
    """Of patches x and outputs y over some images.

    Attributes:
        xx, yx, yy: float64 (G, k, k), (G, n, k), (G, n): sums of x x^T, y x^T and y^2.
        x, y: float64 (G, k), (G, n).
        count: patches.
        waiting: what is not added yet.
    """

    xx: Floats
    yx: Floats
    yy: Floats
    x: Floats
    y: Floats
    count: int = 0
    waiting: list[tuple[FloatArray, FloatArray]] = field(default_factory=list)

    @classmethod
    def zeros(cls, groups: int, n: int, k: int) -> _Sums:
        xx, yx = np.zeros((groups, k, k)), np.zeros((groups, n, k))
        return cls(xx, yx, np.zeros((groups, n)), np.zeros((groups, k)), np.zeros((groups, n)))

    @classmethod
    def together(cls, parts: Sequence[_Sums]) -> _Sums:
        """The sums over all images of several."""
        for part in parts:
            part.flush()
        names = ("xx", "yx", "yy", "x", "y", "count")
        return cls(*(sum(getattr(part, name) for part in parts) for name in names))

    def add(self, x: FloatArray, y: FloatArray) -> None:
        """Add patches (G, p, k) and outputs (G, p, n)."""
        self.count += x.shape[1]
        self.waiting.append((x, y))
        if sum(inputs.shape[1] for inputs, _ in self.waiting) >= ROWS:
            self.flush()

    def flush(self) -> None:
        """Add what waits to the sums."""
        if not self.waiting:
            return
        one = len(self.waiting) == 1
        x, y = (
            self.waiting[0] if one else (np.concatenate(a, axis=1) for a in zip(*self.waiting, strict=True))
        )
        self.waiting.clear()
        for group, (inputs, wanted) in enumerate(zip(x, y, strict=True)):
            # numpy computes half of a product of a matrix with its own transpose.
            self.xx[group] += inputs.T @ inputs
            self.yx[group] += wanted.T @ inputs
        self.yy += np.square(y, dtype=np.float64).sum(axis=1)
        self.x += x.sum(axis=1, dtype=np.float64)
        self.y += y.sum(axis=1, dtype=np.float64)

    def statistics(self, centered: bool) -> Statistics:
        """The second moments; around the means if those are free."""
        self.flush()
        H, B, energy = (sums / self.count for sums in (self.xx, self.yx, self.yy))
        if centered:
            x, y = self.x / self.count, self.y / self.count
            H -= x[:, :, None] * x[:, None, :]
            B -= y[:, :, None] * x[:, None, :]
            energy = np.maximum(energy - y * y, 0)
        return Statistics(H, B, energy)


def _mean_is_free(layer: LayerParameter, net: NetParameter, weights: Weights) -> bool:
    """Whether a constant added to the layer's output changes nothing: its bias or BatchNorms take it away."""
    if len(weights[layer.name]) > 1:
        return True
    return renorm.only_normalized(net, layer.top[0])


def _rounded(
    uses: Sequence[LayerParameter],
    blobs: Sequence[FloatArray],
    choice: GridChoice,
    seen: Mapping[str, LayerMoments],
) -> dict[str, DataAwareFit]:
    """Quantize layers with the same weights: alpha and Q are the same for all, the biases their own.

    Args:
        blobs: of the first of them.
        seen: by name of the layers, without those that are not provided for.
    """
    w = to_kernels(uses[0], blobs[0])
    grid = make_grid(choice.grid, choice.bits)
    nearest = fit(w, grid)
    if not seen:
        return {use.name: DataAwareFit(nearest.alpha, nearest.Q, None, None, None) for use in uses}
    moments = list(seen.values())
    groups, columns = moments[0].patches.groups, moments[0].patches.columns
    grouped = w.reshape(groups, -1, columns).astype(np.float64)
    damping = _damping(grouped, moments)
    statistics = _together(moments, range(FOLDS))
    best = round_kernels(Problem.of(grouped, statistics, damping), grid)
    kernels = best.alpha[:, :, None] * best.Q
    before = (nearest.alpha[:, None] * nearest.Q).reshape(grouped.shape)
    whole = DataAwareFit(
        best.alpha.reshape(-1),
        best.Q.reshape(-1, columns).astype(np.float32),
        None,
        _sqnr(statistics, kernels),
        _sqnr(statistics, before),
    )
    return {
        use.name: replace(whole, bias=seen[use.name].bias(kernels))
        if use.name in seen and blobs[1:]
        else whole
        for use in uses
    }


def _damping(weights: Floats, seen: Sequence[LayerMoments]) -> float:
    """What is fitted to half of the images and best on the others; the largest where there is one image."""
    if not all(moments.count([fold]) for moments in seen for fold in range(FOLDS)):
        return DAMPINGS[-1]
    return chosen_damping(weights, *(_together(seen, [fold]) for fold in range(FOLDS)))


def _together(seen: Sequence[LayerMoments], folds: Collection[int]) -> Statistics:
    """The second moments over several uses of the same weights, over the images of some folds."""
    parts = [(moments.statistics(folds), moments.count(folds)) for moments in seen]
    if len(parts) == 1:
        return parts[0][0]
    total = sum(count for _, count in parts)
    H, B, energy = (
        sum((count / total) * getattr(statistics, name) for statistics, count in parts)
        for name in ("H", "B", "energy")
    )
    return Statistics(H, B, energy)


def _folded(layer: LayerParameter, found: DataAwareFit, blobs: Sequence[FloatArray]) -> list[FloatArray]:
    """The blobs of a layer with alpha in its weights.

    Args:
        blobs: as they were.
    """
    kernels = (found.alpha[:, None] * found.Q).astype(np.float32)
    bias = [found.bias.reshape(old.shape) if found.bias is not None else old for old in blobs[1:]]
    return [from_kernels(layer, kernels, blobs[0].shape), *bias]


def _sqnr(statistics: Statistics, kernels: Floats) -> float | None:
    energy, error = float(statistics.energy.sum()), float(statistics.error(kernels).sum())
    return decibels(energy, error)
