"""How much of a net's work has quantized weights and inputs on codes, and why the rest has not."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

from quantize.caffenet import LayerParameter, NetGraph, NetParameter
from quantize.caffenet.traits import Trait, traits_of
from quantize.record import Coverage
from quantize.stages.weights import unquantizable


def coverage(
    net: NetParameter, inputs: Collection[str], quantized: Collection[str], macs: Mapping[str, int]
) -> Coverage:
    """What share of the multiply-accumulates is quantized.

    Args:
        net: the inference net, with its ActQuantize layers.
        inputs: the blobs it is fed with.
        quantized: the layers whose weights are quantized.
        macs: multiply-accumulates per image by layer; others are left out.
    """
    graph = NetGraph(net)
    left_out = unquantizable(net)
    work = {name: count for name, count in macs.items() if count}
    on_codes = set()
    reasons: dict[str, str] = {}
    for layer in graph.net.layer:
        if layer.name not in work:
            continue
        read = [blob for blob in layer.bottom if graph.coder(blob) is None]
        if not read:
            on_codes.add(layer.name)
        why = list(_why_weights(layer, quantized, left_out))
        why += [_why_input(graph, graph.origin(blob), inputs) for blob in read]
        if why:
            reasons[layer.name] = "; ".join(dict.fromkeys(why))
    total = sum(work.values())

    def share(names: Collection[str]) -> float:
        return sum(work.get(name, 0) for name in names) / max(total, 1)

    return Coverage(
        macs=total,
        weights=share(set(quantized)),
        inputs=share(on_codes),
        both=share(on_codes.intersection(quantized)),
        in_float=reasons,
    )


def _why_weights(
    layer: LayerParameter, quantized: Collection[str], left_out: Mapping[str, str]
) -> Iterator[str]:
    if layer.name in quantized:
        return
    if Trait.KERNELS not in traits_of(layer):
        yield f"weights of type {layer.type} are not quantized"
    else:
        yield left_out.get(layer.name, "its weights are skipped (weights.layers)")


def _why_input(graph: NetGraph, blob: str, inputs: Collection[str]) -> str:
    """Why what comes from a blob is on no codes."""
    if blob in inputs:
        return f"reads the net's input {blob} (activations.input)"
    maker = graph.makers[blob]
    return f"reads what {maker.name} ({maker.type}) makes"
