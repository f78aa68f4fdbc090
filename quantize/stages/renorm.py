"""Stage 2: re-estimated BatchNorm statistics (He & Cheng 2018, section 3.2).

Quantized weights shift the distribution of every layer's output, so the mean and variance that BatchNorm
stored in training no longer fit. They are measured again over the calibration images, each layer seeing
inputs normalised with the *batch* statistics of the layers before it, as in one forward pass of a batch of
all images in training mode. Every other layer behaves as in the TEST phase.
"""

from __future__ import annotations

import math
from contextlib import closing

import numpy as np
import numpy.typing as npt

from quantize.caffenet import (
    NetParameter,
    Weights,
    check_weights,
    infer_shapes,
    known_part,
    single_assignment,
)
from quantize.data.feed import Feed
from quantize.engines.base import OpenEngine
from quantize.errors import LabelfreeError
from quantize.numerics.moments import Moments
from quantize.progress import SILENT, Progress
from quantize.record import BatchNormShift
from quantize.sweep.early_pooling import with_early_pooling
from quantize.sweep.plan import Step, depth_order
from quantize.sweep.run import Sweep


def renorm(
    net: NetParameter,
    weights: Weights,
    feed: Feed,
    open_engine: OpenEngine,
    memory: int | None,
    progress: Progress = SILENT,
) -> tuple[Weights, list[BatchNormShift]]:
    """Re-estimate mean and variance of every BatchNorm.

    Args:
        net: the inference net (TEST phase, no data layers).
        weights: its blobs.
        feed: the calibration images.
        open_engine: opens a net for running.
        memory: bytes that the sweep may keep; None: no bound.

    Returns:
        The blobs with new statistics: mean, unbiased variance (m / (m - 1), m values per channel), scale
        factor 1, as Caffe's batch_norm_layer stores them; and the shifts in network order. A net without
        BatchNorm is returned as it came.

    Raises:
        InputError: a blob is missing or has the wrong shape.
        LabelfreeError: a statistic is not finite.
    """
    norms = [layer.name for layer in net.layer if layer.type == "BatchNorm"]
    if not norms:
        return weights, []
    known = known_part(net, [feed.blob])
    check_weights(known, weights, infer_shapes(known, {feed.blob: (1, *feed.images.shape)}))
    ordered, sweep_weights, steps, bottoms = sweep_net(net, weights)
    engine = open_engine(ordered, sweep_weights, {feed.blob: feed.images.shape})
    weights = weights.copy()
    shifts: dict[str, BatchNormShift] = {}

    def measured(step: Step, moments: dict[str, Moments]) -> None:
        for name in (n for n in norms if bottoms[n] in step.measured):
            found = moments[bottoms[name]]
            if not (np.isfinite(found.mean).all() and np.isfinite(found.m2).all()):
                raise LabelfreeError(
                    f"layer {name}: its input has statistics that are not finite; layers before it overflow"
                )
            shifts[name] = _shift(name, weights, found)
            engine.set_blobs(name, _stored(found.mean, found.m2 / found.count))
            weights.replace(name, _stored(found.mean, found.m2 / max(found.count - 1, 1)))

    with closing(engine):
        sweep = Sweep(engine, feed, steps, memory)
        progress.start("renorm", sweep.plan.work)
        sweep.run(measured, progress)
    return weights, [shifts[name] for name in norms]


def sweep_net(
    net: NetParameter, weights: Weights
) -> tuple[NetParameter, Weights, list[Step], dict[str, str]]:
    """What the sweep of `renorm` runs: the net up to its last BatchNorm, in depth order.

    Returns:
        The net, its blobs, the steps, and the blob that each BatchNorm layer, by its name, takes its
        statistics from.
    """
    flat = single_assignment(net)
    bottoms = {layer.name: layer.bottom[0] for layer in flat.layer if layer.type == "BatchNorm"}
    pooled, weights = with_early_pooling(flat, weights)
    ordered, cuts = depth_order(pooled, lambda layer: layer.type == "BatchNorm")
    steps = []
    for cut, following in zip(cuts, [*cuts[1:], cuts[-1]], strict=True):
        measured = [bottoms[b.name] for b in ordered.layer[cut:following] if b.type == "BatchNorm"]
        if measured:
            steps.append(Step(cut, tuple(dict.fromkeys(measured))))
    del ordered.layer[steps[-1].stop :]
    return ordered, weights, steps, bottoms


def _stored(
    mean: npt.NDArray[np.float64], variance: npt.NDArray[np.float64]
) -> list[npt.NDArray[np.float32]]:
    return [mean.astype(np.float32), variance.astype(np.float32), np.ones(1, np.float32)]


def _shift(name: str, weights: Weights, found: Moments) -> BatchNormShift:
    mean, variance, factor = (np.asarray(blob, np.float64).reshape(-1) for blob in weights[name])
    scale = 1 / factor[0] if factor[0] else 0.0
    mean, variance = mean * scale, variance * scale
    new_variance = found.m2 / max(found.count - 1, 1)
    alive = (variance > 0) & (new_variance > 0)
    deviations = (found.mean - mean)[alive] / np.sqrt(variance[alive])
    logs = np.log(new_variance[alive] / variance[alive])
    return BatchNormShift(
        name=name,
        channels=len(mean),
        values=found.count,
        mean_shift=float(np.sqrt(np.mean(deviations**2))) if alive.any() else 0.0,
        variance_ratio=math.exp(float(np.mean(logs))) if alive.any() else 1.0,
    )
