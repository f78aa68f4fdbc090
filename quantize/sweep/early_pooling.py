"""MAX pooling moved in front of BatchNorm, where what waits at a cut is four times smaller.

BatchNorm with what follows it up to a MAX pooling is often a monotone function of each value: the maximum of
its values in a window is its value of the maximum; of the minimum, where the function falls. That holds for
float32 too, as rounding is monotone. So the pooling can run first, and the statistics are still those of the
values before it.
"""

from __future__ import annotations

import numpy as np

from quantize.caffenet import (
    LayerParameter,
    NetGraph,
    NetParameter,
    Weights,
    foreign_fields,
    layer_index,
    names_in,
    unused_name,
)
from quantize.caffenet.shape_rules import ShapeError, height_and_width
from quantize.caffenet.traits import Trait, traits_of


def with_early_pooling(net: NetParameter, weights: Weights) -> tuple[NetParameter, Weights]:
    """The net with every MAX pooling behind a BatchNorm, Scales, ReLUs and the like moved in front of it.

    Where a Scale is negative, the signs go in as Scale layers before and behind the pooling. Layers with
    fields of a fork stay where they are, as nobody knows what they compute.

    Args:
        net: an inference net with every blob name assigned once.
        weights: its blobs. A Scale that has none here counts as positive: for planning.

    Returns:
        A net that computes the same, save that the BatchNorms moved over read pooled values; and its blobs.
    """
    changed = NetParameter()
    changed.CopyFrom(net)
    weights = weights.copy()
    graph = NetGraph(net)
    foreign = {layer.name for layer, field in zip(net.layer, foreign_fields(net), strict=True) if field}
    for pool in filter(_shrinks, net.layer):
        chain = _monotone_chain(graph, pool)
        if chain and foreign.isdisjoint((pool.name, *chain)):
            _move(changed, weights, pool.name, chain)
    return changed, weights


def _shrinks(layer: LayerParameter) -> bool:
    """Whether it is a MAX pooling with fewer outputs than inputs and a pixel in every window."""
    param = layer.pooling_param
    if layer.type != "Pooling" or param.pool != param.MAX or param.global_pooling or len(layer.top) != 1:
        return False
    try:
        kernel = height_and_width(param, "kernel_size", "kernel_h", "kernel_w")
        stride = height_and_width(param, "stride")
    except ShapeError:  # to be refused where shapes are inferred, with the layer's name
        return False
    return max(stride) > 1 and all(s <= k for s, k in zip(stride, kernel, strict=True))


def _monotone_chain(graph: NetGraph, pool: LayerParameter) -> list[str]:
    """The layers from a BatchNorm up to the pooling that nobody else reads from; none if others do."""
    chain: list[str] = []
    layer = pool
    while graph.only_reader(layer.bottom[0]):
        if layer.type == "BatchNorm":
            return chain
        maker = graph.makers.get(layer.bottom[0])
        if maker is None or len(maker.top) != 1 or not (Trait.RISING in traits_of(maker) or _is_scale(maker)):
            return []
        layer = maker
        chain.insert(0, layer.name)
    return []


def _is_scale(layer: LayerParameter) -> bool:
    """Whether it multiplies each channel by a number, whose sign says whether it rises or falls."""
    param = layer.scale_param
    return layer.type == "Scale" and len(layer.bottom) == 1 and param.axis == 1 and param.num_axes == 1


def _move(net: NetParameter, weights: Weights, pool: str, chain: list[str]) -> None:
    """Have the pooling read what the chain reads, and the chain what the pooling writes."""
    layers = [net.layer[layer_index(net, name)] for name in chain]
    moved = LayerParameter()
    moved.CopyFrom(net.layer[layer_index(net, pool)])
    before, between, after = layers[0].bottom[0], layers[-1].top[0], moved.top[0]
    moved.bottom[0], moved.top[0] = before, between
    layers[0].bottom[0], layers[-1].top[0] = between, after
    del net.layer[layer_index(net, pool)]
    place = layer_index(net, chain[0])
    scales = [weights[layer.name][0] for layer in layers if layer.type == "Scale" and layer.name in weights]
    signs = np.prod([np.sign(scale) for scale in scales], axis=0) if scales else np.ones(1)
    if (signs >= 0).all():
        net.layer.insert(place, moved)
        return
    flip, back = (unused_name(f"{pool}_{kind}", names_in(net)) for kind in ("signs", "signs_back"))
    moved.bottom[0], moved.top[0] = flip, back
    around = [
        LayerParameter(name=flip, type="Scale", bottom=[before], top=[flip]),
        moved,
        LayerParameter(name=back, type="Scale", bottom=[back], top=[between]),
    ]
    for offset, layer in enumerate(around):
        net.layer.insert(place + offset, layer)
        if layer is not moved:
            weights.add(layer, [np.where(signs < 0, -1, 1).astype(np.float32)])
