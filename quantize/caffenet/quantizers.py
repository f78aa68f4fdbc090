"""Where ActQuantize layers stand in a net: how they are put there."""

from __future__ import annotations

from collections.abc import Iterable

from quantize.caffenet.graph import Bottom, NetGraph
from quantize.caffenet.phases import exists, filter_net
from quantize.caffenet.quantized import Quantizer, become_quantizer
from quantize.caffenet.schema import TEST, LayerParameter, NetParameter
from quantize.record import QuantizerLayer, Reader

MOST_SIGNED_LEVELS = 127
"""Of codes of both signs, so that they fit a byte."""


def with_quantizers(net: NetParameter, quantizers: Iterable[QuantizerLayer]) -> NetParameter:
    """A copy of a net with some ActQuantize layers.

    One without readers takes the place of the ReLU of its name: same bottom and top. Any other is put in
    front of the first of its readers: in place where nobody else reads the blob, otherwise with a top of its
    own name that its readers read instead.

    Args:
        net: the net with all its phases; readers are layers of the TEST phase.
        quantizers: with names that no other layer has, and no blob where there are readers.
    """
    changed = NetParameter()
    changed.CopyFrom(net)
    graph = NetGraph(filter_net(net, TEST))
    order = [Reader(*bottom) for bottom in graph.read]
    for quantizer in quantizers:
        if not quantizer.readers:
            for layer in changed.layer:
                if layer.name == quantizer.name and layer.type == "ReLU":
                    _become(layer, quantizer)
            continue
        first = min(quantizer.readers, key=order.index)
        blob = graph.read[Bottom(first.layer, first.bottom)]
        in_place = {Reader(*bottom) for bottom in graph.readers_of(blob)} == set(quantizer.readers)
        _insert(changed, quantizer, first, in_place)
    return changed


def _become(layer: LayerParameter, quantizer: QuantizerLayer) -> None:
    become_quantizer(
        layer, Quantizer(quantizer.step, -quantizer.levels if quantizer.signed else 0, quantizer.levels)
    )


def _insert(net: NetParameter, quantizer: QuantizerLayer, first: Reader, in_place: bool) -> None:
    reading = {r: layer for r in quantizer.readers for layer in net.layer if _is(layer, r.layer)}
    blob = reading[first].bottom[first.bottom]
    top = blob if in_place else quantizer.name
    layer = LayerParameter(name=quantizer.name, bottom=[blob], top=[top])
    _become(layer, quantizer)
    # It is needed wherever one of its readers is.
    if all(reader.include or reader.exclude for reader in reading.values()):
        layer.include.extend(reading[first].include)
        layer.exclude.extend(reading[first].exclude)
    for reader, reads in reading.items():
        reads.bottom[reader.bottom] = top
    place = next(i for i, each in enumerate(net.layer) if _is(each, first.layer))
    net.layer.insert(place, layer)


def _is(layer: LayerParameter, name: str) -> bool:
    """Whether a layer is the one of that name in the TEST phase."""
    return layer.name == name and exists(layer, TEST)
