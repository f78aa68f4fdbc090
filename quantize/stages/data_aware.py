"""Quantize weights so that each layer's output is what the full-precision net's is, from unlabeled images.

The layers are taken in network order. Both nets advance together over all calibration images: the
full-precision net as it is, the other with the weights quantized so far and its BatchNorms re-estimated
(as in `renorm`). At each layer the second moments of what goes in and what should come out are collected
and the kernels rounded with them (see `rounding`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np

from quantize.arrays import FLOAT_BYTES, FloatArray, Floats
from quantize.caffenet import LayerParameter, NetParameter, Weights, live_blobs, single_assignment
from quantize.caffenet.kernels import from_kernels, to_kernels
from quantize.caffenet.patches import Patches
from quantize.data.feed import Feed
from quantize.engines.base import Engine, OpenEngine, RangeResult
from quantize.errors import LabelfreeError
from quantize.numerics.decibels import decibels
from quantize.numerics.grids import make_grid
from quantize.numerics.moments import Moments
from quantize.numerics.rounding import Problem, Statistics, round_kernels
from quantize.numerics.solvers import fit
from quantize.progress import SILENT, Progress
from quantize.settings import GridChoice
from quantize.sweep.plan import Costs, depth_order, micro_batch_size

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
    """

    net: NetParameter
    feed: Feed
    open_engine: OpenEngine
    memory: int | None


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
    feed, memory, open_engine = calibration.feed, calibration.memory, calibration.open_engine
    ordered, cuts = depth_order(
        single_assignment(calibration.net), lambda layer: layer.type == "BatchNorm" or layer.name in chosen
    )
    shapes = feed.shapes
    found: dict[str, DataAwareFit] = {}
    with (
        closing(open_engine(ordered, weights, shapes)) as full,
        closing(open_engine(ordered, weights, shapes)) as quantized,
    ):
        half = None if memory is None else memory // 2
        widest = Costs.of(ordered, full.shapes, list(shapes), ()).widest
        batch = micro_batch_size(widest, len(feed), half)
        pair = Pair(Frontier(full, feed, batch, half), Frontier(quantized, feed, batch, half))
        for cut, following in zip(cuts, [*cuts[1:], len(ordered.layer)], strict=True):
            if len(found) == len(chosen):
                break
            layers = ordered.layer[cut:following]
            norms = [layer for layer in layers if layer.type == "BatchNorm"]
            rounded = [layer for layer in layers if layer.name in chosen]
            centered = {layer.name: _mean_is_free(layer, ordered, weights) for layer in rounded}
            statistics = pair.measure(cut, following, rounded, centered, norms)
            for layer in rounded:
                found[layer.name] = one = _rounded(
                    layer, weights[layer.name], chosen[layer.name], statistics.get(layer.name)
                )
                kernels = (one.alpha[:, None] * one.Q).astype(np.float32)
                blobs = [from_kernels(layer, kernels, weights[layer.name][0].shape)]
                quantized.set_blobs(layer.name, blobs if one.bias is None else [*blobs, one.bias])
                progress.advance(kernels.size)
    return found


class Frontier:
    """A net and what it has computed so far for all images: the blobs that are live at ``place``.

    Where these would take more than ``memory`` bytes, what was kept before stays and later passes recompute
    from there.
    """

    def __init__(self, engine: Engine, feed: Feed, batch: int, memory: int | None) -> None:
        self.engine = engine
        self.feed = feed
        self.batch = batch
        self.memory = memory
        self.place: int | None = None
        self.kept: list[dict[str, FloatArray]] = []

    def run_to(
        self, stop: int, outputs: Sequence[str], moments: Sequence[str] = ()
    ) -> Iterator[tuple[range, RangeResult]]:
        """Run all images up to layer ``stop``: image numbers and result of each micro-batch."""
        live = live_blobs(self.engine.net, stop)
        size = sum(math.prod(self.engine.shapes.blobs[name]) for name in live) * FLOAT_BYTES
        keep = self.memory is None or size * len(self.feed) <= self.memory
        wanted = list(dict.fromkeys([*outputs, *(live if keep else ())]))
        runner = self.engine.compile(self.place or 0, stop, wanted, moments)
        start = 0
        for chunk, feeds in enumerate(self._feeds()):
            result = runner.run({name: feeds[name] for name in runner.inputs})
            if keep:
                kept = {name: result.blobs[name] for name in live}
                if self.place is None:
                    self.kept.append(kept)
                else:
                    self.kept[chunk] = kept
            count = min(self.batch, len(self.feed) - start)
            yield range(start, start + count), result
            start += count
        if keep:
            self.place = stop

    def _feeds(self) -> Iterator[Mapping[str, FloatArray]]:
        if self.place is None:
            for batch in self.feed.batches(self.batch):
                yield batch.feeds
        else:
            yield from self.kept


@dataclass(frozen=True)
class Pair:
    """The full-precision net and the one being quantized, each at its place."""

    full: Frontier
    quantized: Frontier

    def measure(
        self,
        cut: int,
        following: int,
        layers: Sequence[LayerParameter],
        centered: Mapping[str, bool],
        norms: Sequence[LayerParameter],
    ) -> dict[str, LayerMoments]:
        """Bring both nets to ``layers`` and ``norms``, which begin at ``cut``, and measure for them.

        The BatchNorms get their new statistics; the moments of the layers are returned, without those that
        `Patches` does not provide for.
        """
        engine = self.quantized.engine
        sums: dict[str, LayerMoments] = {}
        for layer in layers:
            bottom, top = (engine.shapes.blobs[name] for name in (layer.bottom[0], layer.top[0]))
            blob = engine.weights[layer.name][0]
            patches = Patches.of(layer, bottom, top, blob.shape)
            if patches is not None and patches.columns <= MAX_COLUMNS:
                outputs, images = blob.size // patches.columns, len(self.full.feed)
                sums[layer.name] = LayerMoments(patches, outputs, images, centered[layer.name])
        measured = [layer for layer in layers if layer.name in sums]
        bottoms = list(dict.fromkeys(layer.bottom[0] for layer in measured))
        normed = list(dict.fromkeys(layer.bottom[0] for layer in norms))
        moments: dict[str, Moments] = {}
        seed = self.full.feed.seed
        # The full-precision net runs through the layers, the other one only up to them.
        ahead = self.full.run_to(following, [layer.top[0] for layer in measured]) if layers else None
        for seen, result in self.quantized.run_to(cut, bottoms, normed):
            for name in normed:
                new = result.moments[name]
                moments[name] = moments[name].merged(new) if name in moments else new
            if ahead is None:
                continue
            wanted = next(ahead)[1]
            for layer in measured:
                x, y = result.blobs[layer.bottom[0]], wanted.blobs[layer.top[0]]
                if not (np.isfinite(x).all() and np.isfinite(y).all()):
                    raise LabelfreeError(f"layer {layer.name}: its input or output is not finite")
                sums[layer.name].update(x, y, seen, seed)
        if ahead is not None:
            next(ahead, None)  # lets the generator end
        for layer in norms:
            found = moments[layer.bottom[0]]
            with np.errstate(over="ignore"):
                stored = [found.mean.astype(np.float32), (found.m2 / found.count).astype(np.float32)]
            if not all(np.isfinite(blob).all() for blob in stored):
                raise LabelfreeError(f"layer {layer.name}: its input has statistics that are not finite")
            engine.set_blobs(layer.name, [*stored, np.ones(1, np.float32)])
        return sums


class LayerMoments:
    """Sums over patches x (quantized net) and outputs y (full-precision net) of one layer.

    Args:
        patches: how the layer sees its bottom.
        outputs: channels of the top.
        images: how many will be seen.
        centered: whether means are to be removed, because they are free.
    """

    def __init__(self, patches: Patches, outputs: int, images: int, centered: bool) -> None:
        self.patches = patches
        self.per_image = -(-max(PATCHES, 8 * patches.columns) // images)
        self.centered = centered
        self.count = 0
        self._waiting: list[tuple[FloatArray, FloatArray]] = []
        groups, n, k = patches.groups, outputs // patches.groups, patches.columns
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
        for group, (inputs, outputs) in enumerate(zip(x, y, strict=True)):
            # numpy computes half of a product of a matrix with its own transpose.
            self._xx[group] += inputs.T @ inputs
            self._yx[group] += outputs.T @ inputs
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
