"""Which BatchNorm and which ReLU belong to a layer with weights."""

from __future__ import annotations

from collections.abc import Collection

from quantize.caffenet import LayerParameter, NetParameter

LINEAR = frozenset({"BatchNorm", "Scale", "Bias"})
"""What only rescales a layer's output: its BatchNorm, and the Scale layers around it."""
ACTIVATIONS = frozenset(
    {"ReLU", "PReLU", "ELU", "Clip", "Sigmoid", "TanH", "Swish", "BNLL", "AbsVal", "ReLU6", "Power"}
)
"""What is applied to each value of a layer's output."""


def followers(net: NetParameter, name: str, types: Collection[str]) -> list[LayerParameter]:
    """The layers right behind layer ``name``, as long as each is the only reader and one of ``types``.

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
        if len(behind) != 1 or behind[0].type not in types:
            return found
        layer = behind[0]
        found.append(layer)
