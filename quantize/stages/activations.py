"""Stage 3: one quantization step per ReLU, and ReLU -> ActQuantize (He & Cheng 2018, section 3.3).

For the output x >= 0 of a ReLU over the calibration images, the step a minimises ||x - a * q||^2 with
q = clip(floor(x / a + 0.5), 0, levels). The BatchNorms use their stored statistics, so one forward pass is
enough: every micro-batch runs through the whole net once and leaves a histogram per ReLU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import closing
from itertools import cycle

import numpy as np

from quantize.arrays import FLOAT_BYTES
from quantize.caffenet import NetParameter, Weights, foreign_fields, single_assignment
from quantize.caffenet.quantized import Quantizer, become_quantizer
from quantize.data.feed import Batch, Feed
from quantize.engines.base import OpenEngine, RangeResult
from quantize.host import available_threads, pool
from quantize.numerics import histogram
from quantize.numerics.decibels import decibels
from quantize.numerics.histogram import Histogram
from quantize.progress import SILENT, Progress
from quantize.record import QuantizedActivation
from quantize.settings import ActivationSettings
from quantize.sweep.plan import IN_FLIGHT, even_batch
from quantize.sweep.run import overlapped

BINS = 48
"""Of the histogram kept for the report."""
MICRO_BATCH_BYTES = 96 << 20
"""What all ReLU outputs of one micro-batch may take; so much is held IN_FLIGHT + 1 times."""


def plain_relus(net: NetParameter) -> list[str]:
    """Names of the ReLU layers of an inference net that can be quantized.

    Those are the ones without a negative slope and without a field of a fork that may change the results.
    """
    return [
        layer.name
        for layer, foreign in zip(net.layer, foreign_fields(net), strict=True)
        if layer.type == "ReLU" and not layer.relu_param.negative_slope and foreign is None
    ]


def activations_quan(
    net: NetParameter,
    weights: Weights,
    feed: Feed,
    settings: ActivationSettings,
    open_engine: OpenEngine,
    progress: Progress = SILENT,
) -> list[QuantizedActivation]:
    """Find the step of every ReLU.

    Args:
        net: the inference net (TEST phase, no data layers).
        weights: its blobs.
        feed: the calibration images.
        settings: levels and solver.
        open_engine: opens a net for running.

    Returns:
        One finding per plain ReLU in network order; empty for a net without.
    """
    relus = plain_relus(net)
    if not relus:
        return []
    flat = single_assignment(net)
    tops = {layer.name: layer.top[0] for layer in flat.layer if layer.name in relus}
    del flat.layer[1 + max(i for i, layer in enumerate(flat.layer) if layer.name in relus) :]
    histograms = collect(flat, weights, feed, [tops[name] for name in relus], open_engine, progress)
    solve = histogram.optimal_step if settings.solver == "optimal" else histogram.reference_step
    levels = settings.largest_code
    return [_finding(name, histograms[tops[name]], solve, levels) for name in relus]


def with_act_quantize(net: NetParameter, found: Sequence[QuantizedActivation]) -> NetParameter:
    """The net with every ReLU that has a step made an ActQuantize layer: same name, bottom and top."""
    changed = NetParameter()
    changed.CopyFrom(net)
    by_name = {activation.name: activation for activation in found}
    for layer in changed.layer:
        if layer.type == "ReLU" and layer.name in by_name:
            step = by_name[layer.name]
            become_quantizer(layer, Quantizer(step.step, 0, step.levels))
    return changed


def collect(
    net: NetParameter,
    weights: Weights,
    feed: Feed,
    blobs: Sequence[str],
    open_engine: OpenEngine,
    progress: Progress = SILENT,
) -> dict[str, Histogram]:
    """Histograms of ``blobs`` over all images, in one forward pass.

    Args:
        net: an inference net with every blob name assigned once.
    """
    histograms = {name: Histogram() for name in blobs}
    with closing(open_engine(net, weights, feed.shapes)) as engine:
        per_image = sum(math.prod(engine.shapes.blobs[name]) for name in blobs) * FLOAT_BYTES
        batch = even_batch(MICRO_BATCH_BYTES // per_image, len(feed))
        runner = engine.compile(0, len(net.layer), list(blobs), own_layout=True)
        progress.start("activations", len(feed))
        # One set is being counted while the net fills the others.
        sets = cycle(
            {name: np.empty(engine.blob_shape(name, batch), np.float32) for name in blobs}
            for _ in range(IN_FLIGHT + 1)
        )

        def begin(images: Batch) -> Callable[[], tuple[int, RangeResult]]:
            into = {
                name: buffer[: engine.blob_shape(name, len(images))[0]] for name, buffer in next(sets).items()
            }
            finish = runner.begin(images.feeds, into)
            return lambda: (len(images), finish())

        counting: list[Future[None]] = []
        with pool(available_threads(), "labelfree-histograms") as threads:
            for images, filled in overlapped(map(begin, feed.batches(batch))):
                for done in counting:
                    done.result()
                counting = [threads.submit(histograms[name].update, filled.blobs[name]) for name in blobs]
                progress.advance(images)
            for done in counting:
                done.result()
    return histograms


def _finding(
    name: str, seen: Histogram, solve: Callable[[Histogram, int], float], levels: int
) -> QuantizedActivation:
    step = float(np.float32(solve(seen, levels)))
    loss = histogram.loss(seen, step, levels)
    means, counts = seen.means()
    energy = float(np.sum(counts * means**2))
    return QuantizedActivation(
        name=name,
        step=step,
        levels=levels,
        clipped=histogram.clipped_share(seen, step, levels),
        maximum=seen.maximum,
        sqnr_db=decibels(energy, loss),
        dead=seen.dead,
        histogram=[int(n) for n in np.histogram(means, BINS, (0, seen.maximum or 1), weights=counts)[0]],
    )
