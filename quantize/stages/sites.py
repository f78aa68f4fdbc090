"""Where activations are quantized: found from the net alone (docs/method.md, "Stage 3").

A *site* is a blob at a place of the net whose values are to be on a grid of codes, for all who read it or for
some of them. Which step and codes fit its values is for `activations` to find.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from quantize.caffenet import LayerParameter, NetParameter, foreign_fields, single_assignment
from quantize.caffenet.quantized import QUANTIZER_TYPES
from quantize.caffenet.quantizers import origins
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
    graph = _Graph(net, inputs)
    if settings.scope == "relu":
        found = graph.activations()
    else:
        found = graph.inputs_of(set(quantized), settings.sums, settings.input)
    names = {name for layer in net.layer for name in (layer.name, *layer.bottom, *layer.top)}
    names.update(taken)
    return [graph.site(blob, readers, names) for blob, readers in found.items()]


class _Graph:
    """An inference net with every blob name assigned once, and who makes and reads its blobs."""

    def __init__(self, net: NetParameter, inputs: Collection[str]) -> None:
        self.inputs = inputs
        self.layers = list(single_assignment(net).layer)
        self.given_names = {
            Reader(layer.name, i): blob for layer in net.layer for i, blob in enumerate(layer.bottom)
        }
        self.relus = set(plain_relus(net))
        self.origins = origins(single_assignment(net), inputs)
        self.makers = {top: layer for layer in self.layers for top in layer.top}
        self.readers: defaultdict[str, list[Reader]] = defaultdict(list)
        self.blobs: dict[Reader, str] = {}
        for layer in self.layers:
            for number, blob in enumerate(layer.bottom):
                self.readers[blob].append(Reader(layer.name, number))
                self.blobs[Reader(layer.name, number)] = blob
        self.varying = set(inputs)
        for layer in self.layers:
            if self.varying.intersection(layer.bottom):
                self.varying.update(layer.top)

    def site(self, blob: str, readers: Collection[Reader], names: set[str]) -> Site:
        """A site; a new layer gets a name that is not in ``names``, which is added to them."""
        maker = self.makers.get(blob)
        if maker is not None and self._is_relu(blob):
            return Site(maker.name, blob, maker.name)
        name = stem = f"{self.given_names[next(iter(readers))]}_quantized"
        number = 1
        while name in names:
            number += 1
            name = f"{stem}_{number}"
        names.add(name)
        return Site(name, blob, maker.name if maker is not None else blob, tuple(readers))

    def activations(self) -> dict[str, list[Reader]]:
        """The blobs of plain ReLUs and of ReLU6 in all its forms, and all their readers."""
        found: dict[str, list[Reader]] = {}
        for layer in self.layers:
            if layer.name in self.relus or _clips_from_zero(layer):
                blob = self._cut_off(layer.top[0])
                if self.readers[blob] or self._is_relu(blob):
                    found[blob] = self.readers[blob]
        return found

    def _cut_off(self, blob: str) -> str:
        """The blob as it is behind the Clip and ReLU layers that alone read it."""
        while len(self.readers[blob]) == 1:
            reader = self._layer(self.readers[blob][0])
            if reader.name not in self.relus and reader.type != "Clip":
                break
            blob = reader.top[0]
        return blob

    def inputs_of(self, quantized: set[str], sums: bool, with_inputs: bool) -> dict[str, list[Reader]]:
        """The blobs that quantized layers read, traced back, and who of their readers wants codes."""
        wanting = self._wanting(quantized, sums)
        found: dict[str, list[Reader]] = {}
        for blob in (*self.inputs, *self.makers):
            readers = [reader for reader in self.readers[blob] if reader in wanting]
            maker = self.makers.get(blob)
            passed_on = maker is not None and any(
                Reader(maker.name, number) in wanting for number in range(len(maker.bottom))
            )
            is_input = self.origins[blob] in self.inputs
            coded = maker is not None and maker.type in QUANTIZER_TYPES
            if not readers or coded or (is_input and not with_inputs) or blob not in self.varying:
                continue
            if not (passed_on and self.origins[blob] != blob):
                found[blob] = readers
        return found

    def _wanting(self, quantized: set[str], sums: bool) -> set[Reader]:
        """Who wants codes: quantized layers, sums, and what passes values on to nobody but these.

        A layer that passes on the values of a plain ReLU does for the sake of any reader: where the ReLU
        becomes a quantizer, all see codes.
        """
        wanting: set[Reader] = set()
        for layer in reversed(self.layers):
            own = [Reader(layer.name, number) for number in range(len(layer.bottom))]
            if layer.name in quantized or (sums and _is_sum(layer)):
                wanting.update(own)
            elif layer.bottom and all(self.origins[top] != top for top in layer.top):
                wants = [bool(readers) and wanting.issuperset(readers) for readers in self._behind(layer)]
                some = any(wanting.intersection(readers) for readers in self._behind(layer))
                if some and (all(wants) or self._is_relu(self.origins[layer.bottom[0]])):
                    wanting.update(own if layer.type == "Concat" else own[:1])
        return wanting

    def _behind(self, layer: LayerParameter) -> list[list[Reader]]:
        return [self.readers[top] for top in layer.top]

    def _is_relu(self, blob: str) -> bool:
        """Whether a plain ReLU makes the blob."""
        return blob in self.makers and self.makers[blob].name in self.relus

    def _layer(self, reader: Reader) -> LayerParameter:
        return next(layer for layer in self.layers if layer.name == reader.layer)


def _clips_from_zero(layer: LayerParameter) -> bool:
    """Whether the layer is what is called ReLU6."""
    return layer.type == "ReLU6" or (layer.type == "Clip" and layer.clip_param.min == 0)


def _is_sum(layer: LayerParameter) -> bool:
    """Whether the layer adds values: those of several blobs, or of a window."""
    if layer.type == "Pooling":
        return layer.pooling_param.pool == layer.pooling_param.AVE
    return layer.type == "Eltwise" and layer.eltwise_param.operation == layer.eltwise_param.SUM
