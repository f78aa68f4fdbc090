"""A net as a graph: which layers make and read a blob, and what follows from that."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from functools import cached_property
from itertools import chain, count
from typing import NamedTuple

from quantize.caffenet.fork import foreign_fields
from quantize.caffenet.schema import LayerParameter, NetParameter
from quantize.caffenet.traits import Trait, passed_on, traits_of


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
                current[top] = unused_name(f"{top}_{layer.name}", taken)
                taken.add(current[top])
            else:
                current[top] = top
            tops.append(current[top])
        layer.bottom[:] = bottoms
        layer.top[:] = tops
    return copy


def names_in(net: NetParameter) -> set[str]:
    """The names of all layers and blobs."""
    return {name for layer in net.layer for name in (layer.name, *layer.bottom, *layer.top)}


def unused_name(name: str, taken: Container[str]) -> str:
    """The first of ``name``, ``name_2``, ``name_3``, ... that is not taken."""
    numbered = (f"{name}_{number}" for number in count(2))
    return next(each for each in chain([name], numbered) if each not in taken)


class Bottom(NamedTuple):
    """Bottom ``number``, from 0, of the layer called ``layer``."""

    layer: str
    number: int


class NetGraph:
    """The makers and readers of a net's blobs.

    In a net with in-place layers a blob has one maker and some readers at each place that it is made. So all
    is said in the names of its `single_assignment`, where every blob is made once.

    Args:
        net: of one phase, or a part of it.

    Attributes:
        net: the net with every blob name assigned once.
        layers: its layers by name, in network order.
        makers: by blob the layer that makes it, in network order; the net's inputs have none.
        read: by bottom the blob that it reads, in network order.
        given_names: by blob its name in the net as it was given.
    """

    def __init__(self, net: NetParameter) -> None:
        self.net = single_assignment(net)
        self.layers = {layer.name: layer for layer in self.net.layer}
        self.makers = {top: layer for layer in self.net.layer for top in layer.top}
        self.read = {Bottom(layer.name, i): b for layer in self.net.layer for i, b in enumerate(layer.bottom)}
        self._readers: dict[str, list[Bottom]] = {}
        for bottom, blob in self.read.items():
            self._readers.setdefault(blob, []).append(bottom)
        self.given_names: dict[str, str] = {}
        for given, layer in zip(net.layer, self.net.layer, strict=True):
            self.given_names.update(zip(layer.bottom, given.bottom, strict=True))
            self.given_names.update(zip(layer.top, given.top, strict=True))

    def readers_of(self, blob: str) -> list[Bottom]:
        """The bottoms that read a blob, in network order."""
        return self._readers.get(blob, [])

    def only_reader(self, blob: str) -> LayerParameter | None:
        """The layer that reads a blob with one of its bottoms, where nothing else does."""
        readers = self.readers_of(blob)
        return self.layers[readers[0].layer] if len(readers) == 1 else None

    def followers(self, name: str, traits: Trait) -> list[LayerParameter]:
        """The layers right behind layer ``name``, as long as each alone reads and has one of ``traits``.

        Behind a layer of several tops those behind its first.
        """
        behind: list[LayerParameter] = []
        layer = self.only_reader(self.layers[name].top[0])
        while layer is not None and traits_of(layer) & traits:
            behind.append(layer)
            layer = self.only_reader(layer.top[0])
        return behind

    def overwriter(self, blob: str) -> str | None:
        """The name of the layer that overwrites a blob in the net as it was given."""
        given = self.given_names[blob]
        alike = [name for name in self.makers if self.given_names[name] == given]
        later = alike[alike.index(blob) + 1 :] if blob in self.makers else alike
        return self.makers[later[0]].name if later else None

    def origin(self, blob: str) -> str:
        """The blob whose values a blob holds: itself, unless layers made it that pass values on.

        A Concat passes values on where all its bottoms hold those of one blob.
        """
        return self._origins.get(blob, blob)

    @cached_property
    def _origins(self) -> dict[str, str]:
        """Of the blobs that hold another's values that one."""
        passed: dict[str, str] = {}
        for layer, foreign in zip(self.net.layer, foreign_fields(self.net), strict=True):
            held = {passed.get(bottom, bottom) for bottom in passed_on(layer)}
            if len(held) == 1 and foreign is None:
                passed.update(dict.fromkeys(layer.top, held.pop()))
        return passed

    def coder(self, blob: str) -> LayerParameter | None:
        """The ActQuantize layer whose codes a blob is on, if it is."""
        maker = self.makers.get(self.origin(blob))
        return maker if maker is not None and Trait.CODES in traits_of(maker) else None


def layer_index(net: NetParameter, name: str) -> int:
    """The place of a layer in ``net.layer``.

    Raises:
        KeyError: there is no such layer.
    """
    for index, layer in enumerate(net.layer):
        if layer.name == name:
            return index
    raise KeyError(name)


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


def dependent_layers(layers: Iterable[LayerParameter], blobs: Iterable[str]) -> list[LayerParameter]:
    """Those of some layers that depend on the blobs, directly or through others."""
    reached = set(blobs)
    dependent = []
    for layer in layers:
        if reached.intersection(layer.bottom):
            dependent.append(layer)
            reached.update(layer.top)
    return dependent
