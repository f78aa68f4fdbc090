"""What the report says, as data: one row per layer in network order, and the numbers behind the plots."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from quantize.arrays import Floats
from quantize.caffenet import LayerParameter, NetGraph, NetParameter, stored_statistics
from quantize.caffenet.kernels import to_kernels
from quantize.caffenet.model import Model
from quantize.caffenet.norms import places_of
from quantize.caffenet.quantized import alpha_of
from quantize.caffenet.traits import Trait, traits_of
from quantize.numerics.grids import make_grid
from quantize.record import BatchNormShift, QuantizedActivation, QuantizedLayer, RunRecord

DEAD_VARIANCE = 1e-10
"""A channel whose variance is below this share of its layer's median does not depend on the image."""


@dataclass(frozen=True)
class Row:
    """One line of the layer table.

    Attributes:
        name: the layer with weights; a BatchNorm or what else is quantized behind none has a row of its own.
        weights: what the stage weights did to it.
        output: output SQNR in decibels by version.
        norm: how the stage renorm moved its BatchNorm.
        activation: what the stage activations found for what it makes.
        same_as: the layer whose weights it shares and that has the record of them, if any.
    """

    name: str
    weights: QuantizedLayer | None = None
    output: Mapping[str, float | None] = field(default_factory=dict)
    norm: BatchNormShift | None = None
    activation: QuantizedActivation | None = None
    same_as: str | None = None

    @property
    def is_low_bit(self) -> bool:
        """Whether it has the coarse grid, not that of the first and last layer."""
        return self.weights is not None and self.weights.bits < 8


def rows_of(record: RunRecord, net: NetParameter) -> list[Row]:
    """The lines of the table, in network order.

    Args:
        record: the content of report.json.
        net: the full-precision inference net.
    """
    stages = record.stages
    quantized = {layer.name: layer for layer in stages.weights.layers} if stages.weights else {}
    norms = {layer.name: layer for layer in stages.renorm.layers} if stages.renorm else {}
    activations = {a.behind: a for a in stages.activations.layers} if stages.activations else {}
    outputs = {layer.name: layer.sqnr_db for layer in record.output_sqnr.layers} if record.output_sqnr else {}
    same_as = {user: layer.name for layer in quantized.values() for user in layer.shared_by}
    graph = NetGraph(net)
    done: set[str] = set()
    rows = []
    for layer in graph.net.layer:
        if layer.name in done:
            continue
        followers: list[LayerParameter] = []
        if Trait.KERNELS in traits_of(layer):
            followers = graph.followers(layer.name, Trait.AFFINE | Trait.ELEMENTWISE)
        group = [layer.name, *(follower.name for follower in followers)]
        norm = next((norms[name] for name in group if name in norms), None)
        activation = next((activations[name] for name in reversed(group) if name in activations), None)
        weights = quantized.get(layer.name)
        if weights or norm or activation or layer.name in same_as:
            output = outputs.get(layer.name, {})
            rows.append(Row(layer.name, weights, output, norm, activation, same_as.get(layer.name)))
            done.update(group)
    return rows


@dataclass(frozen=True)
class WeightPlot:
    """A layer's weights in units of their kernels' alpha, and the levels of the grid."""

    name: str
    units: Floats
    levels: Floats
    logarithmic: bool


def weight_plot(record: QuantizedLayer, full: Model, quantized: Model) -> WeightPlot:
    """The weights of a layer as its grid sees them: w / alpha, where alpha is not 0."""
    layer = next(layer for layer in full.inference.net.layer if layer.name == record.name)
    alpha = np.asarray(alpha_of(quantized.weights, record.name), np.float64)
    kernels = to_kernels(layer, full.weights[record.name][0])
    used = alpha != 0
    grid = make_grid(record.grid, record.bits)
    Q = to_kernels(layer, quantized.weights[record.name][0])
    largest = np.abs(Q).max(initial=0)
    # The reference solver chooses among variants of one shape: the one whose levels all Q are.
    fitting = [v for v in grid.variants if np.isin(np.unique(Q), grid.levels(v)).all()]
    levels = min(
        (grid.levels(v) for v in fitting or [grid.canonical]), key=lambda levels: abs(levels.max() - largest)
    )
    return WeightPlot(
        record.name,
        (kernels[used] / alpha[used, None]).reshape(-1).astype(np.float64),
        levels,
        record.grid == "power_of_two",
    )


@dataclass(frozen=True)
class NormPlot:
    """Statistics of one BatchNorm before and after renorm, float64 (channels,)."""

    name: str
    mean: Floats
    variance: Floats
    new_mean: Floats
    new_variance: Floats

    @property
    def dead(self) -> int:
        """Channels that do not vary any more."""
        typical = np.median(self.new_variance)
        return int((self.new_variance <= DEAD_VARIANCE * typical).sum()) if typical > 0 else 0


def norm_plot(layer: LayerParameter, before: Model, after: Model) -> NormPlot:
    """The statistics of a BatchNorm layer in two versions of a model."""
    places = places_of(layer)
    old, new = (stored_statistics(model.weights[layer.name], places) for model in (before, after))
    return NormPlot(layer.name, *old, *new)
