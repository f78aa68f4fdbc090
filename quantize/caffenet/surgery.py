"""Changes of a net's graph. Functions that return None change the net they are given: copy it first."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from quantize.caffenet.schema import LayerParameter, NetParameter


def layer_index(net: NetParameter, name: str) -> int:
    """The place of a layer in ``net.layer``.

    Raises:
        KeyError: there is no such layer.
    """
    for index, layer in enumerate(net.layer):
        if layer.name == name:
            return index
    raise KeyError(name)


def insert_after(net: NetParameter, name: str, layer: LayerParameter) -> None:
    """Put ``layer`` right behind the layer called ``name`` (KeyError if there is none).

    Bottoms and tops are left as they are: for a layer of the same bottom and top, that is, in place.
    """
    index = layer_index(net, name)
    net.layer.insert(index + 1, layer)


def replace_layer(net: NetParameter, name: str, layer: LayerParameter) -> None:
    """Put ``layer`` in the place of the layer called ``name`` (KeyError if there is none)."""
    net.layer[layer_index(net, name)].CopyFrom(layer)


def remove_layer(net: NetParameter, name: str) -> None:
    """Take the layer called ``name`` out (KeyError if there is none)."""
    del net.layer[layer_index(net, name)]


def live_blobs(net: NetParameter, index: int, outputs: Iterable[str] = ()) -> list[str]:
    """The blobs that exist before layer ``index`` and are still needed: what to keep to go on from there.

    Those are the names that a layer from ``index`` on reads before any of them writes it, in the order of
    reading, and those of ``outputs`` (wanted when the net has run) that no layer from ``index`` on writes.
    """
    live: dict[str, None] = {}
    written: set[str] = set()
    for layer in net.layer[index:]:
        live.update((bottom, None) for bottom in layer.bottom if bottom not in written)
        written.update(layer.top)
    live.update((output, None) for output in outputs if output not in written)
    return list(live)


def needed_layers(layers: Sequence[LayerParameter], wanted: Iterable[str]) -> list[LayerParameter]:
    """Those of some layers that the blobs ``wanted``, as they stand behind the last one, depend on."""
    needed = set(wanted)
    kept = []
    for layer in reversed(layers):
        if needed.intersection(layer.top):
            needed.difference_update(layer.top)
            needed.update(layer.bottom)
            kept.append(layer)
    return kept[::-1]


def single_assignment(net: NetParameter) -> NetParameter:
    """A copy in which no layer overwrites a blob; who reads an overwritten blob reads its new name.

    The first to write a name keeps it; a layer that writes it again gets a top called ``<blob>_<layer>``
    (made unique where that is taken). Layer names stay.
    """
    copy = NetParameter()
    copy.CopyFrom(net)
    taken = {name for layer in net.layer for name in (*layer.bottom, *layer.top)}
    current: dict[str, str] = {}
    for layer in copy.layer:
        bottoms = [current.setdefault(bottom, bottom) for bottom in layer.bottom]
        tops = []
        for top in layer.top:
            if top in current:
                current[top] = _unique(f"{top}_{layer.name}", taken)
            else:
                current[top] = top
            tops.append(current[top])
        layer.bottom[:] = bottoms
        layer.top[:] = tops
    return copy


def _unique(name: str, taken: set[str]) -> str:
    candidate, count = name, 1
    while candidate in taken:
        count += 1
        candidate = f"{name}_{count}"
    taken.add(candidate)
    return candidate
