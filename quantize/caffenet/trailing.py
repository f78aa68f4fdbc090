"""Layers behind which there is nothing to quantize and which nobody here can run: what detectors end in."""

from __future__ import annotations

from collections.abc import Collection

from quantize.caffenet.fork import foreign_fields
from quantize.caffenet.graph import single_assignment
from quantize.caffenet.schema import LayerParameter, NetParameter
from quantize.caffenet.shape_rules import has_rule
from quantize.caffenet.traits import Trait, traits_of


def trailing_layers(net: NetParameter, computed: Collection[str]) -> set[str]:
    """The names of the layers that no stage needs and that are carried over as they are.

    Those are layers of unknown types (PriorBox, DetectionOutput, Proposal, Python and the like) or with
    fields of a fork that may change what they compute, and all that depend on them, as long as no layer with
    blobs and no class scores depend on them in turn.

    Args:
        net: a filtered net.
        computed: the names of its layers that are computed from its inputs.
    """
    flat = single_assignment(net)
    odd: set[str] = set()
    made: set[str] = set()
    """By odd layers."""
    for layer, foreign in zip(flat.layer, foreign_fields(flat), strict=True):
        known = has_rule(layer.type) and foreign is None and made.isdisjoint(layer.bottom)
        if layer.name in computed and not known:
            odd.add(layer.name)
            made.update(layer.top)
    wanted: set[str] = set()
    for layer in reversed(flat.layer):
        if Trait.SCORES in traits_of(layer):
            wanted.update(layer.bottom[:1])
        elif layer.name in computed and (_has_blobs(layer) or wanted.intersection(layer.top)):
            wanted.update(layer.bottom)
            odd.discard(layer.name)
    return odd


def _has_blobs(layer: LayerParameter) -> bool:
    return bool(traits_of(layer) & (Trait.BLOBS | Trait.KERNELS))
