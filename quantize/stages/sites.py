"""Where activations are quantized: found from the net alone (docs/method.md, "Stage 3").

A *site* is a blob at a place of the net whose values are to be on a grid of codes, for all who read it or for
some of them. Which step and codes fit its values is for `activations` to find.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from quantize.caffenet import (
    LayerParameter,
    NetGraph,
    NetParameter,
    dependent_layers,
    foreign_fields,
    names_in,
    unused_name,
)
from quantize.caffenet.graph import Bottom
from quantize.caffenet.traits import passed_on
from quantize.record import Reader
from quantize.settings import ActivationSettings


@dataclass(frozen=True)
class Site:
    """A blob to quantize.

    Attributes:
        name: of the ActQuantize layer: that of the ReLU that becomes one, or a new one.
        blob: in the net with every blob name assigned once.
        behind: the layer that makes the blob; of an input of the net the input's name.
        readers: who is to read codes; empty: everybody, for the ReLU that makes the blob is replaced.
    """

    name: str
    blob: str
    behind: str
    readers: tuple[Reader, ...] = ()


def plain_relus(net: NetParameter) -> list[str]:
    """Names of the ReLU layers of an inference net that can become ActQuantize layers.

    Those are the ones without a negative slope and without a field of a fork that may change the results.
    """
    return [
        layer.name
        for layer, foreign in zip(net.layer, foreign_fields(net), strict=True)
        if layer.type == "ReLU" and not layer.relu_param.negative_slope and foreign is None
    ]


def find_sites(
    net: NetParameter,
    inputs: Collection[str],
    quantized: Collection[str],
    settings: ActivationSettings,
    taken: Iterable[str] = (),
) -> list[Site]:
    """The sites of a net, in its order.

    With ``scope: relu`` the outputs of all plain ReLUs, behind the Clip where one cuts them off (ReLU6), and
    of Clips from 0 on. With ``scope: inputs`` what quantized layers read (and with ``sums`` the branches of
    sums), as far back as layers only pass values on, so that one quantizer serves many readers.

    Args:
        net: the inference net.
        inputs: the blobs it is fed with.
        quantized: the layers whose weights are quantized.
        settings: scope, input and sums.
        taken: names of layers and blobs that a new layer may not have, besides the net's own.
    """
    search = _Search(net, inputs)
    if settings.scope == "relu":
        readers_of = search.activations()
    else:
        readers_of = search.inputs_of(set(quantized), settings.sums, settings.input)
    names = {*names_in(net), *taken}
    return [search.site(blob, readers, names) for blob, readers in readers_of.items()]


class _Search:
    """An inference net in which sites are looked for."""

    def __init__(self, net: NetParameter, inputs: Collection[str]) -> None:
        self.inputs = inputs
        self.graph = NetGraph(net)
        self.layers = list(self.graph.net.layer)
        self.relus = set(plain_relus(net))
        varying = dependent_layers(self.layers, inputs)
        self.varying = {*inputs, *(top for layer in varying for top in layer.top)}

    def site(self, blob: str, readers: Iterable[Bottom], names: set[str]) -> Site:
        """A site; a new layer gets a name that is not in ``names``, which is added to them."""
        maker = self.graph.makers.get(blob)
        if maker is not None and self._is_relu(blob):
            return Site(maker.name, blob, maker.name)
        name = unused_name(f"{self.graph.given_names[blob]}_quantized", names)
        names.add(name)
        return Site(
            name, blob, maker.name if maker is not None else blob, tuple(Reader(*each) for each in readers)
        )

    def activations(self) -> dict[str, list[Bottom]]:
        """The blobs of plain ReLUs and of ReLU6 in all its forms, and all their readers."""
        readers_of: dict[str, list[Bottom]] = {}
        for layer in self.layers:
            if layer.name in self.relus or _clips_from_zero(layer):
                blob = self._cut_off(layer.top[0])
                readers = self.graph.readers_of(blob)
                if readers or self._is_relu(blob):
                    readers_of[blob] = readers
        return readers_of

    def _cut_off(self, blob: str) -> str:
        """The blob as it is behind the Clip and ReLU layers that alone read it."""
        reader = self.graph.only_reader(blob)
        while reader is not None and (reader.name in self.relus or reader.type == "Clip"):
            blob = reader.top[0]
            reader = self.graph.only_reader(blob)
        return blob

    def inputs_of(self, quantized: set[str], sums: bool, with_inputs: bool) -> dict[str, list[Bottom]]:
        """The blobs that quantized layers read, traced back, and who of their readers wants codes."""
        wanting = self._wanting(quantized, sums)
        readers_of: dict[str, list[Bottom]] = {}
        for blob in (*self.inputs, *self.graph.makers):
            readers = [reader for reader in self.graph.readers_of(blob) if reader in wanting]
            maker, origin = self.graph.makers.get(blob), self.graph.origin(blob)
            is_codes = origin == blob and self.graph.coder(blob) is not None
            if not readers or is_codes or (origin in self.inputs and not with_inputs):
                continue
            traced_back = maker is not None and origin != blob and not wanting.isdisjoint(_bottoms(maker))
            if blob in self.varying and not traced_back:
                readers_of[blob] = readers
        return readers_of

    def _wanting(self, quantized: set[str], sums: bool) -> set[Bottom]:
        """Who wants codes: quantized layers, sums, and what passes values on to nobody but these.

        A layer that passes on the values of a plain ReLU does for the sake of any reader: where the ReLU
        becomes a quantizer, all see codes.
        """
        wanting: set[Bottom] = set()
        for layer in reversed(self.layers):
            own = _bottoms(layer)
            if layer.name in quantized or (sums and _is_sum(layer)):
                wanting.update(own)
            elif layer.bottom and all(self.graph.origin(top) != top for top in layer.top):
                wants = [bool(readers) and wanting.issuperset(readers) for readers in self._behind(layer)]
                some = any(wanting.intersection(readers) for readers in self._behind(layer))
                if some and (all(wants) or self._is_relu(self.graph.origin(layer.bottom[0]))):
                    wanting.update(own[: len(passed_on(layer))])
        return wanting

    def _behind(self, layer: LayerParameter) -> list[list[Bottom]]:
        return [self.graph.readers_of(top) for top in layer.top]

    def _is_relu(self, blob: str) -> bool:
        """Whether a plain ReLU makes the blob."""
        return blob in self.graph.makers and self.graph.makers[blob].name in self.relus


def _bottoms(layer: LayerParameter) -> list[Bottom]:
    return [Bottom(layer.name, number) for number in range(len(layer.bottom))]


def _clips_from_zero(layer: LayerParameter) -> bool:
    """Whether the layer is what is called ReLU6."""
    return layer.type == "ReLU6" or (layer.type == "Clip" and layer.clip_param.min == 0)


def _is_sum(layer: LayerParameter) -> bool:
    """Whether the layer adds values: those of several blobs, or of a window."""
    if layer.type == "Pooling":
        return layer.pooling_param.pool == layer.pooling_param.AVE
    return layer.type == "Eltwise" and layer.eltwise_param.operation == layer.eltwise_param.SUM
