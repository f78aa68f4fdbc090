"""Where ActQuantize layers stand in a net: how they are put there, and which blobs are on codes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from quantize.caffenet.fork import foreign_fields
from quantize.caffenet.phases import exists, filter_net
from quantize.caffenet.quantized import Quantizer, become_quantizer
from quantize.caffenet.schema import TEST, LayerParameter, NetParameter
from quantize.caffenet.surgery import single_assignment
from quantize.caffenet.traits import Trait, passed_on, traits_of
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
    flat = single_assignment(filter_net(net, TEST))
    blobs = {Reader(layer.name, i): blob for layer in flat.layer for i, blob in enumerate(layer.bottom)}
    order = list(blobs)
    for quantizer in quantizers:
        if not quantizer.readers:
            for layer in changed.layer:
                if layer.name == quantizer.name and layer.type == "ReLU":
                    _become(layer, quantizer)
            continue
        read = blobs[quantizer.readers[0]]
        in_place = {reader for reader in order if blobs[reader] == read} == set(quantizer.readers)
        _insert(changed, quantizer, min(quantizer.readers, key=order.index), in_place)
    return changed


def _become(layer: LayerParameter, found: QuantizerLayer) -> None:
    become_quantizer(layer, Quantizer(found.step, -found.levels if found.signed else 0, found.levels))


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


def origins(net: NetParameter, inputs: Iterable[str] = ()) -> dict[str, str]:
    """Of every blob the one whose values it holds: itself, unless layers made it that pass values on.

    A Concat passes values on where all its bottoms hold those of one blob.

    Args:
        net: with every blob name assigned once.
        inputs: the blobs that no layer makes.
    """
    found = {blob: blob for blob in inputs}
    for layer, foreign in zip(net.layer, foreign_fields(net), strict=True):
        found.update((bottom, bottom) for bottom in layer.bottom if bottom not in found)
        held = {found[bottom] for bottom in passed_on(layer)} if foreign is None else set()
        one = held.pop() if len(held) == 1 else None
        found.update((top, one or top) for top in layer.top)
    return found


def coded_by(net: NetParameter) -> Mapping[str, str]:
    """The blobs on codes, and the ActQuantize layers that made them so.

    Args:
        net: with every blob name assigned once.
    """
    makers = {top: layer for layer in net.layer for top in layer.top}
    return {
        blob: makers[origin].name
        for blob, origin in origins(net).items()
        if origin in makers and Trait.CODES in traits_of(makers[origin])
    }
