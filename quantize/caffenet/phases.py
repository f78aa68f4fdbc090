"""Which layers exist: by phase, stage and level, and by what can be computed from the images alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from quantize.arrays import Shape
from quantize.caffenet.schema import TEST, TRAIN, LayerParameter, NetParameter, NetStateRule
from quantize.caffenet.text_faults import did_you_mean
from quantize.caffenet.trailing import trailing_layers
from quantize.caffenet.traits import Trait, traits_of
from quantize.errors import InputError

NAMESAKE = "#"
"""Between the name that several layers have and the number that tells them apart."""
NO_INPUT = (
    '; the net has no input in this phase: put layer { name: "data" type: "Input" top: "data" input_param { '
    "shape { dim: 1 dim: 3 dim: 224 dim: 224 } } }, with its own size, in front"
)
IMAGE_AXES = 3
"""Channels, height, width."""


@dataclass(frozen=True)
class InferenceNet:
    """A net as it runs in the TEST phase.

    Attributes:
        net: the layers to run: all that the inputs determine but for those in ``trailing``.
        inputs: the blobs that have to be fed, those that images can go into first (see ``input_blobs``).
        scores: the blob with one score per class.
        whole: all that the inputs determine: all but losses and what needs labels.
        trailing: the names of the layers that are carried over and not run (see ``trailing_layers``).
    """

    net: NetParameter
    inputs: tuple[str, ...]
    scores: str
    whole: NetParameter
    trailing: frozenset[str]

    @property
    def blob(self) -> str:
        """The input that images go into where nothing else is said: the first."""
        return self.inputs[0]

    @classmethod
    def of(cls, net: NetParameter) -> InferenceNet:
        """The TEST phase of a net with all its phases.

        Raises:
            InputError: nothing feeds the net.
        """
        filtered = filter_net(net, TEST)
        inputs = input_blobs(filtered)
        if not inputs:
            raise InputError(f"net {net.name!r} computes nothing from images{NO_INPUT}")
        _check_rows(filtered, inputs)
        whole = inference_net(filtered, inputs)
        trailing = frozenset(trailing_layers(filtered, {layer.name for layer in whole.layer}))
        run = _without(whole, trailing)
        return cls(run, inputs, scores_blob(_without(filtered, trailing)), whole, trailing)


def at_state(net: NetParameter, stages: Sequence[str], level: int) -> NetParameter:
    """The net with only the layers that some stages and a level include; rules about phases stay.

    So nobody need know stages and level from here on, not even who runs what is written.

    Args:
        net: the net as read; the stages in its ``state`` count too, as in Caffe.
        stages: the stages that are set.
        level: the level.

    Raises:
        InputError: no rule names a stage, or what is left in the TEST phase is no sound net.
    """
    rules = [rule for layer in net.layer for rule in (*layer.include, *layer.exclude)]
    stages_named = {stage for rule in rules for stage in (*rule.stage, *rule.not_stage)}
    named = ", ".join(sorted(stages_named))
    for stage in stages:
        if stage not in stages_named:
            raise InputError(
                f"net {net.name!r}: no rule names the stage {stage!r}; named are: {named or 'none'}"
            )
    if not any(map(_names_state, rules)):
        return net
    given = {*net.state.stage, *stages}
    chosen = _without_layers(net)
    for layer in net.layer:
        if not any(_names_state(rule) for rule in (*layer.include, *layer.exclude)):
            chosen.layer.add().CopyFrom(layer)
            continue
        met = [rule for rule in layer.include or layer.exclude if _meets(rule, None, given, level)]
        always = any(not rule.HasField("phase") for rule in met)
        if (layer.include and not met) or (layer.exclude and always):
            continue
        kept = chosen.layer.add()
        kept.CopyFrom(layer)
        remaining = kept.include if layer.include else kept.exclude
        del remaining[:]
        remaining.extend(NetStateRule(phase=rule.phase) for rule in met if not always)
    name_apart(chosen)
    try:
        filter_net(chosen, TEST)
    except InputError as error:
        remedy = f"the stages {named}: choose with model.stages" if named else "levels: choose model.level"
        raise InputError(f"{error}; the net's rules name {remedy}") from None
    return chosen


def filter_net(net: NetParameter, phase: int) -> NetParameter:
    """A copy with only the layers that a phase includes (``Net::FilterNet``), checked by ``check_net``.

    Args:
        net: the net; rules about stages and levels have been applied (``at_state``).
        phase: TRAIN or TEST.

    Raises:
        InputError: a layer has include as well as exclude rules, or what is left is no sound net.
    """
    kept = _without_layers(net)
    left_out: list[LayerParameter] = []
    for layer in net.layer:
        if layer.include and layer.exclude:
            raise InputError(
                f"{_where(net, layer)} has include and exclude rules; Caffe allows one kind only"
            )
        if exists(layer, phase):
            kept.layer.add().CopyFrom(layer)
        else:
            left_out.append(layer)
    check_net(kept, left_out)
    return kept


def name_apart(net: NetParameter) -> None:
    """Give every layer of a phase a name of its own, in place: "crop", "crop#2", "crop#3".

    Caffe allows one name for several layers. It looks for a layer of the net by each name in the caffemodel,
    and takes the first. So the first of the TEST phase keeps its name, and with it what the caffemodel holds;
    those behind it have no blobs, or share them. TRAIN-only layers give way.

    Args:
        net: the net with all its phases.
    """
    present = [(layer, [phase for phase in (TEST, TRAIN) if exists(layer, phase)]) for layer in net.layer]
    taken = {layer.name for layer in net.layer}
    used: dict[int, set[str]] = {TEST: set(), TRAIN: set()}
    numbers: Counter[str] = Counter()
    for layer, phases in sorted(present, key=lambda each: TEST not in each[1]):
        name = layer.name
        while any(layer.name in used[phase] for phase in phases) or (
            layer.name != name and layer.name in taken
        ):
            numbers[name] += 1
            layer.name = f"{name}{NAMESAKE}{numbers[name] + 1}"
        taken.add(layer.name)
        for phase in phases:
            used[phase].add(layer.name)


def check_net(net: NetParameter, left_out: Iterable[LayerParameter] = ()) -> None:
    """Check that a filtered net hangs together: names, bottoms that exist, tops with one source each.

    Args:
        net: the net.
        left_out: the layers that were filtered out.

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
                hint = _hint(bottom, left_out)
                if not hint:
                    hint = did_you_mean(bottom, known) if any(map(is_data_layer, net.layer)) else NO_INPUT
                raise InputError(
                    f"{_where(net, layer)} reads {bottom!r}, which no layer before it makes{hint}"
                )
        for index, top in enumerate(layer.top):
            in_place = index < len(layer.bottom) and layer.bottom[index] == top
            if (top in known and not in_place) or top in layer.top[:index]:
                raise InputError(
                    f"{_where(net, layer)} makes {top!r}, which is made before; rename one of the two"
                )
        known.update(layer.top)


def inference_net(net: NetParameter, inputs: Collection[str]) -> NetParameter:
    """The part of a filtered net that can be computed from the blobs ``inputs``.

    Left out are layers that feed data, losses and Accuracy, layers without tops, and whatever needs a blob
    that is then missing, such as the labels. DummyData beside the inputs stays: it is the same for all.
    """
    kept = _without_layers(net)
    known = set(inputs)
    for layer in net.layer:
        if is_data_layer(layer) and (not _is_constant(layer) or known.intersection(layer.top)):
            continue
        if layer.top and not is_measure(layer) and known.issuperset(layer.bottom):
            kept.layer.add().CopyFrom(layer)
            known.update(layer.top)
        else:
            known.difference_update(set(layer.top).intersection(layer.bottom))
    return kept


def input_blobs(net: NetParameter) -> tuple[str, ...]:
    """The blobs that a filtered net has to be fed with: the tops of its data layers that others read.

    Labels are none of them: what a loss or Accuracy reads behind its first bottom, and what a data layer
    makes behind its first top (but for Input and HDF5Data, whose tops may be anything), unless a layer with
    weights depends on it. DummyData feeds itself; its blobs are inputs only where there are no others.

    Returns:
        In the order of the net, but those first that images can go into: of three axes, or of unknown shape.
    """
    origins: dict[str, set[str]] = {}
    """By blob the data blobs that it depends on."""
    read: set[str] = set()
    weighted: set[str] = set()
    labels: set[str] = set()
    for layer in net.layer:
        if is_data_layer(layer):
            origins.update((top, {top}) for top in layer.top)
            labels.update(layer.top[1:] if Trait.ANYTHING not in traits_of(layer) else ())
            continue
        own = set().union(*(origins[bottom] for bottom in layer.bottom))
        origins.update(dict.fromkeys(layer.top, own))
        if Trait.BLOBS in traits_of(layer):
            weighted |= own
        if is_measure(layer):
            labels.update(*(origins[bottom] for bottom in layer.bottom[1:]))
        elif layer.top:
            read |= own
    data = [layer for layer in net.layer if is_data_layer(layer)]
    needed = read - (labels - weighted)
    fed = [(layer, top) for layer in data if not _is_constant(layer) for top in layer.top if top in needed]
    if not fed:
        fed = [(layer, top) for layer in data for top in layer.top if top in needed]
    fed.sort(key=lambda pair: not takes_images(_declared(*pair)))
    return tuple(top for _, top in fed)


def takes_images(shape: Shape | None) -> bool:
    """Whether images can go into an input of this shape, which may be unknown."""
    return shape is None or len(shape) == IMAGE_AXES


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
    return bool(layer.top) and not layer.bottom and Trait.BLOBS not in traits_of(layer)


def is_measure(layer: LayerParameter) -> bool:
    """Whether the layer compares with labels: a loss, Accuracy, or what has a weight as a loss."""
    return Trait.COMPARES in traits_of(layer)


def _is_constant(layer: LayerParameter) -> bool:
    return Trait.CONSTANT in traits_of(layer)


def data_layer(net: NetParameter, phase: int) -> LayerParameter | None:
    """The layer with a transform that feeds the net in a phase, if there is one."""
    included = (layer for layer in net.layer if exists(layer, phase))
    return next((layer for layer in included if Trait.IMAGES in traits_of(layer)), None)


def declared_shape(net: NetParameter, blob: str) -> Shape | None:
    """The shape of one image that an Input layer declares for ``blob``, if one does."""
    for layer in filter_net(net, TEST).layer:
        if blob in layer.top:
            return _declared(layer, blob)
    return None


def _check_rows(net: NetParameter, inputs: Sequence[str]) -> None:
    """Check that Input layers declare as many rows for every input: one for each image.

    Raises:
        InputError: they do not.
    """
    rows = {}
    for layer in net.layer:
        for number, top in enumerate(layer.top):
            shapes = layer.input_param.shape
            if layer.type == "Input" and top in inputs and shapes:
                rows[top] = shapes[min(number, len(shapes) - 1)].dim[:1]
    if len(set(map(tuple, rows.values()))) > 1:
        shown = ", ".join(f"{top!r} {dim[0] if dim else 'none'}" for top, dim in rows.items())
        raise InputError(
            f"net {net.name!r}: its inputs have different numbers of rows ({shown}); labelfree runs images "
            "in batches, with one row of every input for each: declare them so"
        )


def _declared(layer: LayerParameter, top: str) -> Shape | None:
    """The shape of one image that an Input layer declares for its top."""
    shapes = layer.input_param.shape
    if layer.type != "Input" or not shapes:
        return None
    return tuple(shapes[min(list(layer.top).index(top), len(shapes) - 1)].dim[1:])


def _meets(rule: NetStateRule, phase: int | None, stages: Collection[str] = (), level: int = 0) -> bool:
    """``Net::StateMeetsRule``; for no phase: whether the rest of a rule is met."""
    return (
        (phase is None or not rule.HasField("phase") or rule.phase == phase)
        and (not rule.HasField("min_level") or level >= rule.min_level)
        and (not rule.HasField("max_level") or level <= rule.max_level)
        and all(stage in stages for stage in rule.stage)
        and not any(stage in stages for stage in rule.not_stage)
    )


def _names_state(rule: NetStateRule) -> bool:
    """Whether a rule is about stages or levels."""
    return bool(rule.stage or rule.not_stage) or rule.HasField("min_level") or rule.HasField("max_level")


def _hint(blob: str, left_out: Iterable[LayerParameter]) -> str:
    """Which layer would make a blob, had it not been left out."""
    for layer in left_out:
        if blob in layer.top:
            return (
                f"; layer {layer.name!r}, which makes it, is left out by its include or exclude rules: "
                "labelfree reads the TEST phase, so give a prototxt with a data layer or an Input layer there"
            )
    return ""


def exists(layer: LayerParameter, phase: int) -> bool:
    """Whether a layer is there in a phase (``Net::FilterNet``)."""
    rules = layer.include or layer.exclude
    return not rules or any(_meets(rule, phase) for rule in rules) == bool(layer.include)


def _without(net: NetParameter, names: Collection[str]) -> NetParameter:
    """A copy without the layers of some names."""
    kept = _without_layers(net)
    kept.layer.extend(layer for layer in net.layer if layer.name not in names)
    return kept


def _without_layers(net: NetParameter) -> NetParameter:
    copy = NetParameter()
    copy.CopyFrom(net)
    copy.ClearField("layer")
    return copy


def _where(net: NetParameter, layer: LayerParameter) -> str:
    return f"net {net.name!r}, layer {layer.name!r} ({layer.type or 'no type'})"
