"""Stage 3: one quantization step per site (He & Cheng 2018, section 3.3).

For the values x of a site over the calibration images, the step a minimises ||x - a * q||^2 with
q = clip(floor(x / a + 0.5), lowest, levels); lowest is 0 where no value is negative, otherwise -levels.
The BatchNorms use their stored statistics, so one forward pass is enough: every micro-batch runs through the
whole net once and leaves a histogram per site.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import closing
from dataclasses import replace
from itertools import cycle

import numpy as np

from quantize.arrays import FLOAT_BYTES, FloatArray
from quantize.caffenet import NetParameter, Weights, names_in, single_assignment
from quantize.caffenet.model import Model
from quantize.caffenet.quantized import alpha_terms
from quantize.caffenet.quantizers import MOST_SIGNED_LEVELS, with_quantizers
from quantize.data.feed import Batch, Feed
from quantize.engines.base import OpenEngine, RangeResult
from quantize.errors import LabelfreeError
from quantize.host import available_threads, pool
from quantize.numerics import histogram
from quantize.numerics.decibels import decibels
from quantize.numerics.histogram import Histogram
from quantize.progress import SILENT, Progress
from quantize.record import QuantizedActivation
from quantize.settings import ActivationSettings
from quantize.stages.sites import Site, find_sites
from quantize.sweep.plan import IN_FLIGHT, even_batch
from quantize.sweep.run import overlapped

BINS = 48
"""Of the histogram kept for the report."""
MICRO_BATCH_BYTES = 96 << 20
"""What all sites of one micro-batch may take; so much is held IN_FLIGHT + 1 times."""


def activations_quan(
    model: Model,
    feed: Feed,
    settings: ActivationSettings,
    open_engine: OpenEngine,
    progress: Progress = SILENT,
) -> tuple[Model, list[QuantizedActivation]]:
    """Quantize the activations of a model.

    Args:
        model: with quantized weights and the statistics that fit them.
        feed: the calibration images.
        settings: where to quantize, levels and solver.
        open_engine: opens a net for running.

    Returns:
        The model with its ActQuantize layers, and one finding for each.

    Raises:
        LabelfreeError: a value is NaN or infinite.
    """
    test = model.inference
    sites = find_sites(test.net, list(feed.shapes), alpha_terms(test.net), settings, names_in(model.net))
    found = fit_steps(model, feed, sites, settings, open_engine, progress)
    full = model.full or (None if model.is_quantized else model)
    return replace(model, net=with_quantizers(model.net, found), full=full), found


def fit_steps(
    model: Model,
    feed: Feed,
    sites: Sequence[Site],
    settings: ActivationSettings,
    open_engine: OpenEngine,
    progress: Progress = SILENT,
) -> list[QuantizedActivation]:
    """Find the step of every site; as `activations_quan`."""
    if not sites:
        return []
    flat = single_assignment(model.inference.net)
    blobs = {site.blob for site in sites}
    makers = [number for number, layer in enumerate(flat.layer) if blobs.intersection(layer.top)]
    del flat.layer[max(makers, default=0) + 1 :]
    histograms = collect(flat, model.weights, feed, [site.blob for site in sites], open_engine, progress)
    return [_finding(site, histograms[site.blob], settings) for site in sites]


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
        made = [name for name in blobs if name not in engine.inputs]
        per_image = sum(math.prod(engine.shapes.blobs[name]) for name in blobs) * FLOAT_BYTES
        batch = even_batch(MICRO_BATCH_BYTES // per_image, len(feed))
        runner = engine.compile(0, len(net.layer), made)
        progress.start("activations", len(feed))
        # One set is being counted while the net fills the others.
        sets = cycle(
            {name: np.empty(engine.blob_shape(name, batch), np.float32) for name in made}
            for _ in range(IN_FLIGHT + 1)
        )

        def begin(images: Batch) -> Callable[[], tuple[Batch, RangeResult]]:
            into = {
                name: buffer[: engine.blob_shape(name, len(images))[0]] for name, buffer in next(sets).items()
            }
            finish = runner.begin(images.feeds, into)
            return lambda: (images, finish())

        counting: list[Future[None]] = []
        with pool(available_threads(), "labelfree-histograms") as threads:
            for images, filled in overlapped(map(begin, feed.batches(batch))):
                for done in counting:
                    done.result()
                values = {**images.feeds, **filled.blobs}
                counting = [threads.submit(_count, histograms[name], name, values[name]) for name in blobs]
                progress.advance(len(images))
            for done in counting:
                done.result()
    return histograms


def _count(histogram: Histogram, blob: str, values: FloatArray) -> None:
    try:
        histogram.update(values)
    except LabelfreeError as error:
        raise LabelfreeError(f"blob {blob!r}: {error}") from None


def _finding(site: Site, seen: Histogram, settings: ActivationSettings) -> QuantizedActivation:
    signed = seen.minimum < 0
    levels = min(settings.largest_code, MOST_SIGNED_LEVELS) if signed else settings.largest_code
    if settings.solver == "optimal":
        step = histogram.optimal_step(seen, levels, signed)
    else:
        step = histogram.reference_step(seen, levels)
    step = float(np.float32(step))
    means, counts = seen.means(signed)
    span = (seen.minimum, seen.maximum if seen.maximum > seen.minimum else seen.minimum + 1)
    return QuantizedActivation(
        name=site.name,
        step=step,
        levels=levels,
        signed=signed,
        readers=list(site.readers),
        behind=site.behind,
        clipped=histogram.clipped_share(seen, step, levels, signed),
        minimum=seen.minimum,
        maximum=seen.maximum,
        sqnr_db=decibels(float(np.sum(counts * means**2)), histogram.loss(seen, step, levels, signed)),
        dead=not means.size,
        histogram=[int(n) for n in np.histogram(means, BINS, span, weights=counts)[0]],
    )
