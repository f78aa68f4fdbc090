"""Which BatchNorm and which ReLU belong to a layer with weights."""

from __future__ import annotations

from quantize.caffenet import LayerParameter, NetParameter
from quantize.caffenet.traits import Trait, traits_of


def followers(net: NetParameter, name: str, traits: Trait) -> list[LayerParameter]:
    """The layers right behind layer ``name``, as long as each is the only reader and has one of ``traits``.

    Behind a layer of several tops those behind its first.

    Args:
        net: with every blob name assigned once (``caffenet.single_assignment``).
    """
    readers: dict[str, list[LayerParameter]] = {}
    for layer in net.layer:
        for bottom in layer.bottom:
            readers.setdefault(bottom, []).append(layer)
    found: list[LayerParameter] = []
    layer = next(layer for layer in net.layer if layer.name == name)
    while True:
        behind = readers.get(layer.top[0], [])
        if len(behind) != 1 or not traits_of(behind[0]) & traits:
            return found
        layer = behind[0]
        found.append(layer)
