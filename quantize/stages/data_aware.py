"""Quantize weights so that each layer's output is what the full-precision net's is, from unlabeled images.

The layers are taken in network order. Both nets advance together over all calibration images: the
full-precision net as it is, the other with the weights quantized so far and its BatchNorms re-estimated
(as in `renorm`). At each layer the second moments of what goes in and what should come out are collected
and the kernels rounded with them (see `rounding`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import numpy as np

from quantize.arrays import FloatArray, Floats
from quantize.caffenet import LayerParameter, NetParameter, Weights, single_assignment
from quantize.caffenet.kernels import from_kernels, outputs, to_kernels
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
from quantize.sweep.pair import beside, both_weights, full_layers, of_layers
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
    """A net and the images to run through it.

    Attributes:
        net: the inference net (TEST phase, no data layers).
        feed: the calibration images.
        open_engine: opens a net for running.
        memory: bytes that the blobs of all images may take; None: no bound.
        statistics: those that renorm will give the BatchNorms.
    """

    net: NetParameter
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
        bias: float32 (n,): the bias that keeps the mean of the output, None where the layer has no bias.
        output_sqnr_db: of the output against the full-precision net's: E y^2 / E (y - alpha Q x)^2.
        nearest_sqnr_db: the same with each weight at its nearest level; both None where an error is 0.
    """

    alpha: Floats
    Q: FloatArray
    bias: FloatArray | None
    output_sqnr_db: float | None
    nearest_sqnr_db: float | None


def data_aware(
    weights: Weights,
    chosen: Mapping[str, GridChoice],
    calibration: Calibration,
    progress: Progress = SILENT,
) -> dict[str, DataAwareFit]:
    """Quantize the layers in ``chosen``.

    Args:
        weights: the net's blobs.
        chosen: grid by layer name.
        calibration: the net and its images.

    Raises:
        LabelfreeError: a blob is not finite.
    """
    feed = calibration.feed
    tour = _Tour.of(calibration, weights, chosen)
    found: dict[str, DataAwareFit] = {}
    blobs: dict[str, list[FloatArray]] = {}
    both = both_weights(weights, weights, tour.ordered.layer)
    with closing(calibration.open_engine(tour.net, both, feed.shapes)) as engine:
        patches = {stop.place: stop.patches(engine) for stop in tour.stops}
        steps = [stop.step(patches[stop.place]) for stop in tour.stops]
        shard = Shard(engine, feed, steps, calibration.memory)
        if advice := shard.advice():
            progress.note(f"weights: {advice}")
        for stop in tour.stops:
            sums = {
                layer.name: LayerMoments(
                    layer,
                    patches[stop.place][layer.name],
                    len(feed),
                    _mean_is_free(layer, tour.ordered, weights),
                )
                for layer in stop.rounded
                if layer.name in patches[stop.place]
            }
            moments = shard.advance(blobs, partial(_add, sums, feed.seed))
            blobs = {
                name: statistics.blobs for name, statistics in renorm.update(stop.norms, moments).items()
            }
            for layer in stop.rounded:
                found[layer.name] = one = _rounded(
                    layer, weights[layer.name], chosen[layer.name], sums.pop(layer.name, None)
                )
                kernels = (one.alpha[:, None] * one.Q).astype(np.float32)
                blobs[layer.name] = [from_kernels(layer, kernels, weights[layer.name][0].shape)]
                if one.bias is not None:
                    blobs[layer.name].append(one.bias)
                progress.advance(kernels.size)
    return found


@dataclass(frozen=True)
class _Stop:
    """A place of the sweep: the quantized net is before some layers, the full-precision net behind them.

    Attributes:
        place: in the net of both.
        rounded: the layers to be quantized here.
        norms: the BatchNorms whose statistics are decided here.
    """

    place: int
    rounded: list[LayerParameter]
    norms: list[renorm.Norm]

    def patches(self, engine: Engine) -> dict[str, Patches]:
        """How the layers see their bottoms, without those that `Patches` does not provide for."""
        found = {}
        for layer in self.rounded:
            bottom, top = (engine.shapes.blobs[name] for name in (layer.bottom[0], beside(layer.top[0])))
            patches = Patches.of(layer, bottom, top, engine.weights[layer.name][0].shape)
            if patches is not None and patches.columns <= MAX_COLUMNS:
                found[layer.name] = patches
        return found

    def step(self, provided: Collection[str]) -> Step:
        """What the sweep does to get here, to measure for the layers that are provided for."""
        layers = [layer for layer in self.rounded if layer.name in provided]
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
    def of(cls, calibration: Calibration, weights: Weights, chosen: Collection[str]) -> _Tour:
        """For a net, its blobs and the layers to quantize."""
        inputs = list(calibration.feed.shapes)
        ordered, cuts = depth_order(
            single_assignment(calibration.net),
            lambda layer: layer.type == "BatchNorm" or layer.name in chosen,
        )
        groups = [list(ordered.layer[start:stop]) for start, stop in pairwise([0, *cuts])]
        while groups and not any(layer.name in chosen for layer in groups[-1]):
            groups.pop()
        layers = full_layers(groups[0], inputs)
        stops = []
        for before, behind in pairwise(groups):
            layers += [*before, *full_layers(behind, inputs)]
            rounded = [layer for layer in behind if layer.name in chosen]
            norms = [layer for layer in behind if layer.type == "BatchNorm"]
            paired = weights if calibration.statistics == "paired" else None
            stops.append(_Stop(len(layers), rounded, [_norm(layer, paired) for layer in norms]))
        return cls(ordered, of_layers(ordered, layers), stops)


def _norm(layer: LayerParameter, full: Weights | None) -> renorm.Norm:
    """A BatchNorm, its statistics paired with full precision's where the blobs of that are given."""
    bottom = layer.bottom[0]
    reference = renorm.Reference.of(layer, beside(bottom), full) if full is not None else None
    return renorm.Norm(layer.name, bottom, reference)


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
    return only_normalized(net, layer.top[0])


def only_normalized(net: NetParameter, blob: str) -> bool:
    """Whether BatchNorms read a blob and nothing else does.

    Args:
        net: with every blob name assigned once.
    """
    readers = [layer.type for layer in net.layer if blob in layer.bottom]
    return bool(readers) and all(reader == "BatchNorm" for reader in readers)


def _rounded(
    layer: LayerParameter, blobs: Sequence[FloatArray], choice: GridChoice, seen: LayerMoments | None
) -> DataAwareFit:
    w = to_kernels(layer, blobs[0])
    grid = make_grid(choice.grid, choice.bits)
    nearest = fit(w, grid)
    if seen is None:
        return DataAwareFit(nearest.alpha, nearest.Q, blobs[1].reshape(-1) if blobs[1:] else None, None, None)
    statistics = seen.statistics
    groups, n, k = statistics.B.shape
    problem = Problem.of(w.reshape(groups, n, k).astype(np.float64), statistics)
    found = round_kernels(problem, grid)
    kernels = found.alpha[:, :, None] * found.Q
    x, y = seen.means
    bias = None
    if blobs[1:]:
        bias = (y - np.einsum("gnk,gk->gn", kernels, x)).reshape(-1).astype(np.float32)
    before = (nearest.alpha[:, None] * nearest.Q).reshape(groups, n, k)
    return DataAwareFit(
        found.alpha.reshape(-1),
        found.Q.reshape(-1, k).astype(np.float32),
        bias,
        _sqnr(statistics, kernels),
        _sqnr(statistics, before),
    )


def _sqnr(statistics: Statistics, kernels: Floats) -> float | None:
    energy, error = float(statistics.energy.sum()), float(statistics.error(kernels).sum())
    return decibels(energy, error)
