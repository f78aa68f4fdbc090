"""Which layers exist: by phase, stage and level, and by what can be computed from the images alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from quantize.caffenet.schema import TEST, TRAIN, LayerParameter, NetParameter, NetStateRule
from quantize.errors import InputError

NAMESAKE = "#"
"""Between the name that several layers have and the number that tells them apart."""
TRANSFORMING_TYPES = ("Data", "ImageData", "MemoryData", "WindowData")


@dataclass(frozen=True)
class InferenceNet:
    """A net as it runs in the TEST phase.

    Attributes:
        net: the layers that images alone determine.
        blob: the input blob.
        scores: the blob with one score per class.
    """

    net: NetParameter
    blob: str
    scores: str

    @classmethod
    def of(cls, net: NetParameter) -> InferenceNet:
        """The TEST phase of a net with all its phases.

        Raises:
            InputError: nothing feeds the net.
        """
        filtered = filter_net(net, TEST)
        blobs = data_blobs(filtered)
        return cls(inference_net(filtered, blobs[:1]), blobs[0], scores_blob(filtered))


def filter_net(net: NetParameter, phase: int, stages: Iterable[str] = (), level: int = 0) -> NetParameter:
    """A copy with only the layers that the state includes (``Net::FilterNet``), checked by ``check_net``.

    Args:
        net: the net as read.
        phase: TRAIN or TEST.
        stages: the stages that are set.
        level: the level.

    Raises:
        InputError: a layer has include as well as exclude rules, or what is left is no sound net.
    """
    kept = _without_layers(net)
    for layer in net.layer:
        if layer.include and layer.exclude:
            raise InputError(
                f"{_where(net, layer)} has include and exclude rules; Caffe allows one kind only"
            )
        if _exists(layer, phase, set(stages), level):
            kept.layer.add().CopyFrom(layer)
    check_net(kept)
    return kept


def name_apart(net: NetParameter, stages: Iterable[str] = (), level: int = 0) -> None:
    """Give every layer of a phase a name of its own, in place: "crop", "crop#2", "crop#3".

    Caffe allows one name for several layers. It looks for a layer of the net by each name in the caffemodel,
    and takes the first. So the first of the TEST phase keeps its name, and with it what the caffemodel holds;
    those behind it have no blobs, or share them. TRAIN-only layers give way.

    Args:
        net: the net with all its phases.
        stages: the stages that are set.
        level: the level.
    """
    given = set(stages)
    found = [
        (layer, [phase for phase in (TEST, TRAIN) if _exists(layer, phase, given, level)])
        for layer in net.layer
    ]
    taken = {layer.name for layer in net.layer}
    used: dict[int, set[str]] = {TEST: set(), TRAIN: set()}
    numbers: Counter[str] = Counter()
    for layer, phases in sorted(found, key=lambda each: TEST not in each[1]):
        name = layer.name
        while any(layer.name in used[phase] for phase in phases) or (
            layer.name != name and layer.name in taken
        ):
            numbers[name] += 1
            layer.name = f"{name}{NAMESAKE}{numbers[name] + 1}"
        taken.add(layer.name)
        for phase in phases:
            used[phase].add(layer.name)


def check_net(net: NetParameter) -> None:
    """Check that a filtered net hangs together: names, bottoms that exist, tops with one source each.

    Raises:
        InputError: naming the layer and the blob.
    """
    if not net.layer:
        raise InputError(f"net {net.name!r} has no layers in this phase; check its include and exclude rules")
    names = Counter(layer.name for layer in net.layer)
    known: set[str] = set()
    for layer in net.layer:
        if not layer.type:
            raise InputError(f"{_where(net, layer)} has no type")
        if names[layer.name] > 1:
            raise InputError(
                f"{_where(net, layer)}: {names[layer.name]} layers of one phase have this name, so their "
                "weights cannot be told apart; rename all but one"
            )
        for bottom in layer.bottom:
            if bottom not in known:
                raise InputError(f"{_where(net, layer)} reads {bottom!r}, which no layer before it makes")
        for index, top in enumerate(layer.top):
            in_place = index < len(layer.bottom) and layer.bottom[index] == top
            if (top in known and not in_place) or top in layer.top[:index]:
                raise InputError(
                    f"{_where(net, layer)} makes {top!r}, which is made before; rename one of the two"
                )
        known.update(layer.top)


def inference_net(net: NetParameter, inputs: Collection[str]) -> NetParameter:
    """The part of a filtered net that can be computed from the blobs ``inputs`` (the images).

    Left out are layers that feed data, losses and Accuracy, layers without tops, and whatever needs a blob
    that is then missing, such as the labels. DummyData beside the images stays: it is the same for all.
    """
    kept = _without_layers(net)
    known = set(inputs)
    for layer in net.layer:
        if is_data_layer(layer) and (layer.type != "DummyData" or known.intersection(layer.top)):
            continue
        if layer.top and not is_measure(layer) and known.issuperset(layer.bottom):
            kept.layer.add().CopyFrom(layer)
            known.update(layer.top)
        else:
            known.difference_update(set(layer.top).intersection(layer.bottom))
    return kept


def data_blobs(net: NetParameter) -> list[str]:
    """The blobs that feed a filtered net, images first: the tops of its data layers.

    Blobs that are only read as labels (the second or a later bottom of a loss or of Accuracy), and blobs
    that nobody reads, come after the others; among their like, DummyData comes last.
    """
    layers = sorted(filter(is_data_layer, net.layer), key=lambda layer: layer.type == "DummyData")
    tops = [top for layer in layers for top in layer.top]
    images: set[str] = set()
    for layer in net.layer:
        images.update(layer.bottom[:1] if is_measure(layer) else layer.bottom)
    return sorted(tops, key=lambda top: top not in images)


def scores_blob(net: NetParameter) -> str:
    """The blob with a filtered net's class scores: (N, classes), before any Softmax.

    That is what the last Accuracy reads, else what the last loss reads, else the last top. (The last, as the
    auxiliary classifiers of nets such as GoogLeNet come before the real one.)

    Raises:
        InputError: no layer has a top.
    """
    layers = list(net.layer)
    accuracies = [layer for layer in layers if layer.type == "Accuracy" and layer.bottom]
    losses = [layer for layer in layers if layer.type.endswith("Loss") and layer.bottom]
    made = [layer for layer in layers if layer.top and not is_measure(layer)]
    if accuracies or losses:
        name = (accuracies or losses)[-1].bottom[0]
    elif made:
        name = made[-1].top[0]
    else:
        raise InputError(f"net {net.name!r} has no layer that makes a blob, so there are no scores to read")
    makers = [layer for layer in made if name in layer.top]
    if makers and makers[-1].type == "Softmax" and name not in makers[-1].bottom:
        return makers[-1].bottom[0]
    return name


def is_data_layer(layer: LayerParameter) -> bool:
    """Whether the layer feeds the net: it has tops and no bottoms (Parameter, which holds weights, aside)."""
    return bool(layer.top) and not layer.bottom and layer.type != "Parameter"


def is_measure(layer: LayerParameter) -> bool:
    """Whether the layer is a loss or Accuracy."""
    return layer.type.endswith(("Loss", "Accuracy"))


def data_layer(net: NetParameter, phase: int) -> LayerParameter | None:
    """The layer with a transform that feeds the net in a phase, if there is one."""
    return next((layer for layer in filter_net(net, phase).layer if layer.type in TRANSFORMING_TYPES), None)


def declared_shape(net: NetParameter, blob: str) -> tuple[int, ...] | None:
    """The shape of one image that an Input layer declares for ``blob``, if one does."""
    for layer in filter_net(net, TEST).layer:
        if layer.type == "Input" and blob in layer.top and layer.input_param.shape:
            shapes = layer.input_param.shape
            return tuple(shapes[min(list(layer.top).index(blob), len(shapes) - 1)].dim[1:])
    return None


def _meets(rule: NetStateRule, phase: int, stages: set[str], level: int) -> bool:
    """``Net::StateMeetsRule``."""
    return (
        (not rule.HasField("phase") or rule.phase == phase)
        and (not rule.HasField("min_level") or level >= rule.min_level)
        and (not rule.HasField("max_level") or level <= rule.max_level)
        and stages.issuperset(rule.stage)
        and stages.isdisjoint(rule.not_stage)
    )


def _exists(layer: LayerParameter, phase: int, stages: set[str], level: int) -> bool:
    """Whether a layer is there in a state (``Net::FilterNet``)."""
    rules = layer.include or layer.exclude
    return not rules or any(_meets(rule, phase, stages, level) for rule in rules) == bool(layer.include)


def _without_layers(net: NetParameter) -> NetParameter:
    copy = NetParameter()
    copy.CopyFrom(net)
    copy.ClearField("layer")
    return copy


def _where(net: NetParameter, layer: LayerParameter) -> str:
    return f"net {net.name!r}, layer {layer.name!r} ({layer.type or 'no type'})"
