"""What a net is run for: its outputs, and which of them hold class scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from quantize.arrays import Shape
from quantize.caffenet import (
    TEST,
    InferenceNet,
    LayerParameter,
    NetGraph,
    NetParameter,
    filter_net,
    is_measure,
    unused_name,
)
from quantize.errors import InputError

CLASSES_AXIS = 1
"""Of an InnerProduct's (N, classes)."""


@dataclass(frozen=True)
class Output:
    """A blob that a net is run for.

    Attributes:
        blob: its name. What a Softmax makes is looked at before the Softmax.
        before: the layer that overwrites the blob, before which it is to be read; None: it stays to the end.
        class_axis: the axis that has one score per class, as the prototxt counts it; None where it has none.
        presumed: whether nothing but the layer's type, InnerProduct, speaks for class scores.
        is_main: whether these are the scores that the net is about.
    """

    blob: str
    before: str | None = None
    class_axis: int | None = None
    presumed: bool = False
    is_main: bool = False

    def axis_of(self, shape: Shape) -> int | None:
        """The class axis in a blob of some shape, counted from 0; None where that has no two classes.

        A presumed one only of (N, classes).
        """
        if self.class_axis is None or (self.presumed and len(shape) != 2):
            return None
        axis = self.class_axis + len(shape) if self.class_axis < 0 else self.class_axis
        return axis if 0 < axis < len(shape) and shape[axis] > 1 else None


def net_outputs(net: NetParameter) -> list[Output]:
    """The outputs of a net in the TEST phase, in network order.

    Those are the tops that no layer reads which is run (see `InferenceNet`), and what losses and Accuracy
    layers compare with labels. Class scores are what a Softmax, an Accuracy or a softmax loss reads, and the
    output of a net that has but one where an InnerProduct makes it. The main ones are the last that an
    Accuracy reads, else the last that a softmax loss reads (auxiliary classifiers come before the real one),
    else the only ones.

    Args:
        net: with all its phases.
    """
    graph = NetGraph(filter_net(net, TEST))
    test = InferenceNet.of(graph.net)
    made = NetGraph(test.net).makers
    measures = [layer for layer in graph.net.layer if is_measure(layer)]
    read = {blob for bottom, blob in graph.read.items() if bottom.layer not in test.trailing}
    compared = {bottom for layer in measures for bottom in layer.bottom}
    axes: dict[str, int | None] = {}
    for blob, maker in made.items():
        if blob not in read or blob in compared:
            is_softmax = maker.type == "Softmax" and maker.bottom[0] in made
            axes[maker.bottom[0] if is_softmax else blob] = maker.softmax_param.axis if is_softmax else None
    main = None
    for layer in sorted(measures, key=lambda layer: layer.type == "Accuracy"):
        axis = _axis_compared(layer)
        if axis is not None and layer.bottom[0] in made:
            maker = made[layer.bottom[0]]
            main = layer.bottom[0] if layer.bottom[0] in axes else maker.bottom[0]
            axes[main] = axis if axes[main] is None else axes[main]
    classes = [blob for blob, axis in axes.items() if axis is not None]
    presumed = None
    if len(axes) == 1 and not classes and not compared & made.keys():
        [only] = axes
        presumed = only if made[only].type == "InnerProduct" else None
    if main is None:
        main = classes[0] if len(classes) == 1 else presumed
    return [
        Output(
            graph.given_names[blob],
            graph.overwriter(blob),
            CLASSES_AXIS if blob == presumed else axes[blob],
            blob == presumed,
            blob == main,
        )
        for blob in made
        if blob in axes
    ]


def class_scores(net: NetParameter, what: str) -> Output:
    """The main output of a net.

    Args:
        net: with all its phases.
        what: needs it, for the message.

    Raises:
        InputError: no output has class scores, or several that none stands out of.
    """
    outputs = net_outputs(net)
    main = next((output for output in outputs if output.is_main), None)
    if main is None:
        names = ", ".join(output.blob for output in outputs)
        raise InputError(
            f"{what} needs one output with class scores, which a Softmax, an Accuracy or a softmax loss "
            f"reads; this net's outputs are: {names}"
        )
    return main


def _axis_compared(layer: LayerParameter) -> int | None:
    """The class axis of what a measure compares with labels; None where that is not one score per class."""
    if layer.type == "Accuracy":
        return layer.accuracy_param.axis
    if layer.type == "InfogainLoss":
        return layer.infogain_loss_param.axis
    return layer.softmax_param.axis if layer.type == "SoftmaxWithLoss" else None


def tapped(net: NetParameter, outputs: Sequence[Output]) -> tuple[NetParameter, list[str]]:
    """A net that keeps its outputs to the end, and their names there.

    Args:
        net: the inference net, or one made of it that has its layers.
        outputs: of the net with all its phases.

    Raises:
        InputError: the net lacks a layer.
    """
    copy = NetParameter()
    copy.CopyFrom(net)
    taken = {top for layer in net.layer for top in layer.top}
    names = []
    for output in outputs:
        name = output.blob
        if output.before is not None:
            name = unused_name(name, taken)
            overwriters = [i for i, layer in enumerate(copy.layer) if layer.name == output.before]
            if not overwriters:
                raise InputError(f"the net has no layer {output.before!r} any more; quantize again")
            identity = LayerParameter(name=f"{name} (output)", type="Power", bottom=[output.blob], top=[name])
            copy.layer.insert(overwriters[-1], identity)
            taken.add(name)
        names.append(name)
    return copy, names
