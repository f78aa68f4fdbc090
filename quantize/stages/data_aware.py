"""Quantize weights so that each layer's output is what the full-precision net's is, from unlabeled images.

The layers are taken in network order. Both nets advance together over all calibration images: the
full-precision net as it is, the other with the weights quantized so far and its BatchNorms re-estimated
(as in `renorm`). At each layer the second moments of what goes in and what should come out are collected
and the kernels rounded with them (see `rounding`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
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
from quantize.numerics.rounding import Problem, Statistics, round_kernels
from quantize.numerics.solvers import fit
from quantize.progress import SILENT, Progress
from quantize.settings import GridChoice, StatisticsName
from quantize.stages import renorm
from quantize.sweep.pair import beside, both_weights, full_layers, names_of_one_net, of_layers
from quantize.sweep.plan import Step, depth_order
from quantize.sweep.run import Shard

PATCHES = 1 << 16
"""Patches per layer, about: of each image the same number, at random places."""
ROWS = 4096
"""Patches that are added to the sums at once: adding a large H costs as much as multiplying a few patches."""
MAX_COLUMNS = 10240
"""Layers with longer kernels are rounded to the nearest level: their H would take more than 800 MB."""


@dataclass(frozen=True)
class Calibration:
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
    calibration: Calibration,
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
    def of(cls, model: Model, calibration: Calibration, chosen: Collection[str]) -> _Tour:
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
        self.count = 0
        self._waiting: list[tuple[FloatArray, FloatArray]] = []
        groups, n, k = patches.groups, outputs(layer) // patches.groups, patches.columns
        self._xx: Floats = np.zeros((groups, k, k))
        self._yx: Floats = np.zeros((groups, n, k))
        self._yy: Floats = np.zeros((groups, n))
        self._x: Floats = np.zeros((groups, k))
        self._y: Floats = np.zeros((groups, n))

    def update(self, bottom: FloatArray, top: FloatArray, images: range, seed: int) -> None:
        """Add a micro-batch."""
        places = self.patches.sample(images, self.per_image, seed)
        x = self.patches.inputs(bottom, places)
        y = self.patches.outputs(top, places)
        self._waiting.append((x, y))
        if sum(inputs.shape[1] for inputs, _ in self._waiting) >= ROWS:
            self._add()

    def _add(self) -> None:
        """Add what waits to the sums."""
        if not self._waiting:
            return
        x, y = (np.concatenate(arrays, axis=1) for arrays in zip(*self._waiting, strict=True))
        self._waiting.clear()
        self.count += x.shape[1]
        for group, (inputs, wanted) in enumerate(zip(x, y, strict=True)):
            # numpy computes half of a product of a matrix with its own transpose.
            self._xx[group] += inputs.T @ inputs
            self._yx[group] += wanted.T @ inputs
        self._yy += np.square(y, dtype=np.float64).sum(axis=1)
        self._x += x.sum(axis=1, dtype=np.float64)
        self._y += y.sum(axis=1, dtype=np.float64)

    @property
    def means(self) -> tuple[Floats, Floats]:
        """E x (G, k) and E y (G, n)."""
        self._add()
        return self._x / self.count, self._y / self.count

    def bias(self, kernels: Floats) -> FloatArray:
        """The bias with which ``kernels`` (G, n, k) keep the mean of the output: float32 (G * n,)."""
        x, y = self.means
        bias: FloatArray = (y - np.einsum("gnk,gk->gn", kernels, x)).reshape(-1).astype(np.float32)
        return bias

    @property
    def statistics(self) -> Statistics:
        """The second moments; around the means if those are free."""
        self._add()
        H, B, energy = (sums / self.count for sums in (self._xx, self._yx, self._yy))
        if self.centered:
            x, y = self.means
            H = H - x[:, :, None] * x[:, None, :]
            B = B - y[:, :, None] * x[:, None, :]
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
    statistics = _together(list(seen.values()))
    groups, n, k = statistics.B.shape
    problem = Problem.of(w.reshape(groups, n, k).astype(np.float64), statistics)
    best = round_kernels(problem, grid)
    kernels = best.alpha[:, :, None] * best.Q
    before = (nearest.alpha[:, None] * nearest.Q).reshape(groups, n, k)
    whole = DataAwareFit(
        best.alpha.reshape(-1),
        best.Q.reshape(-1, k).astype(np.float32),
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


def _together(seen: Sequence[LayerMoments]) -> Statistics:
    """The second moments over several uses of the same weights."""
    parts = [(moments.statistics, moments.count) for moments in seen]
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
