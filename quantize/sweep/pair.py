"""The full-precision net beside the one being quantized: one net, so that both pass an image in one sweep."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager

from quantize.caffenet import LayerParameter, NetParameter, Weights
from quantize.errors import LabelfreeError

SUFFIX = " (full precision)"


def beside(name: str) -> str:
    """What a layer or a blob of the full-precision net is called beside the other one."""
    return name + SUFFIX


@contextmanager
def names_of_one_net() -> Iterator[None]:
    """Errors name layers and blobs as the files do, of whichever of the two nets they are."""
    try:
        yield
    except LabelfreeError as error:
        raise type(error)(str(error).replace(SUFFIX, "")) from error


def full_layers(layers: Iterable[LayerParameter], inputs: Collection[str]) -> list[LayerParameter]:
    """The layers under their names in the full-precision net.

    Args:
        inputs: the blobs that both nets read: the images.
    """
    renamed = []
    for layer in layers:
        copy = LayerParameter()
        copy.CopyFrom(layer)
        copy.name = beside(layer.name)
        copy.bottom[:] = [name if name in inputs else beside(name) for name in layer.bottom]
        copy.top[:] = [name if name in inputs else beside(name) for name in layer.top]
        renamed.append(copy)
    return renamed


def both_weights(quantized: Weights, full: Weights, layers: Iterable[LayerParameter]) -> Weights:
    """The blobs of both nets.

    Args:
        quantized: of the net being quantized.
        full: of the full-precision net, whose layers are ``layers``.
    """
    both = quantized.copy()
    for layer in layers:
        if layer.name in full:
            both.add(LayerParameter(name=beside(layer.name), type=layer.type), full[layer.name])
    return both


def of_layers(net: NetParameter, layers: Iterable[LayerParameter]) -> NetParameter:
    """The net with other layers, each of which has its blobs for itself.

    In a sweep layers that share a blob may need to differ for a while: each BatchNorm has its own statistics.
    """
    changed = NetParameter()
    changed.CopyFrom(net)
    del changed.layer[:]
    changed.layer.extend(layers)
    for layer in changed.layer:
        for param in layer.param:
            param.ClearField("name")
    return changed
