"""What every image keeps behind each step of a sweep, so that all of it fits into memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np
import numpy.typing as npt

from quantize.arrays import FLOAT_BYTES
from quantize.caffenet import LayerParameter, NetParameter, Shapes, live_blobs, needed_layers
from quantize.errors import InputError

ALIGNMENT = 64


RESERVE = 32
"""One part in so many of the memory is left for gaps between the arrays kept and for images being read."""


MICRO_BATCH_BYTES = 64 << 20
"""What one micro-batch may hold at the widest layer: large enough to keep the cores busy, small enough for
the rest of the memory bound."""


MAX_MICRO_BATCH = 256


IN_FLIGHT = 2
"""Micro-batches being run at a time: while one is being ended the threads are at the next."""


EVEN = 8
"""Micro-batches are multiples of this, or powers of two below it, so that threads get equal shares."""


COST_PER_VALUE = 8
"""Work of writing and reading one value, in multiply-accumulates."""


SOURCE_COST_PER_VALUE = 500
"""Work of decoding and transforming one value of an input image, in multiply-accumulates."""


@dataclass(frozen=True)
class Step:
    """Run all images up to layer ``stop``, measure some blobs there and show others.

    Attributes:
        stop: the place in the net.
        measured: blobs whose moments over all images are wanted.
        outputs: blobs whose values are wanted, micro-batch by micro-batch.
    """

    stop: int
    measured: tuple[str, ...]
    outputs: tuple[str, ...] = ()


def depth_order(
    net: NetParameter, boundary: Callable[[LayerParameter], bool]
) -> tuple[NetParameter, list[int]]:
    """The net with its layers ordered by how many boundary layers lie on the longest path to them.

    A boundary layer counts itself. Layers of one depth stay in their order, so boundary layers at the same
    depth of parallel branches stand together and can be handled in one step.

    Args:
        net: with every blob name assigned once (``caffenet.single_assignment``).

    Returns:
        The reordered net, and for each depth d = 0, 1, ... the index of the first layer deeper than d.
    """
    depth: dict[str, int] = {}
    keyed: list[tuple[int, LayerParameter]] = []
    for layer in net.layer:
        own = max((depth.get(bottom, 0) for bottom in layer.bottom), default=0) + boundary(layer)
        depth.update(dict.fromkeys(layer.top, own))
        keyed.append((own, layer))
    keyed.sort(key=lambda pair: pair[0])
    ordered = NetParameter()
    ordered.CopyFrom(net)
    del ordered.layer[:]
    ordered.layer.extend(layer for _, layer in keyed)
    deepest = keyed[-1][0] if keyed else 0
    return ordered, [sum(own <= d for own, _ in keyed) for d in range(deepest + 1)]


@dataclass(frozen=True)
class Costs:
    """What the layers of a net take, per image.

    Attributes:
        work: work of the layers before each place, in multiply-accumulates (index 0 .. number of layers).
        source: work of reading one image.
        live: bytes of the frontier at each place.
        widest: bytes of the bottoms and tops of the widest layer.
        once: work of the layers that only the first step needs; it is not in ``work``, as nothing of it is
            ever done again.
    """

    work: tuple[float, ...]
    source: float
    live: tuple[int, ...]
    widest: int
    once: float = 0.0

    @classmethod
    def of(
        cls,
        net: NetParameter,
        shapes: Shapes,
        inputs: Sequence[str],
        outputs: Sequence[str],
        steps: Sequence[Step] = (),
    ) -> Costs:
        """The costs of an inference net with every blob name assigned once.

        Args:
            outputs: blobs that are wanted when the net has run.
            steps: of a sweep; none: the net is run as a whole.
        """
        values = {name: int(np.prod(shape, dtype=object)) for name, shape in shapes.blobs.items()}
        per_layer = [
            shapes.macs.get(layer.name, 0) + COST_PER_VALUE * sum(values[top] for top in layer.top)
            for layer in net.layer
        ]
        once = 0.0
        if len(steps) > 1:
            later = [name for step in steps[1:] for name in (*step.measured, *step.outputs)]
            again = {layer.name for layer in needed_layers(net.layer[: steps[-1].stop], later)}
            for place, layer in enumerate(net.layer[: steps[0].stop]):
                if layer.name not in again:
                    once += per_layer[place]
                    per_layer[place] = 0
        live = [
            sum(aligned(values[name] * FLOAT_BYTES) for name in live_blobs(net, place, outputs))
            for place in range(len(net.layer) + 1)
        ]
        widest = max(
            (sum(values[b] for b in (*layer.bottom, *layer.top)) * FLOAT_BYTES for layer in net.layer),
            default=0,
        )
        source = SOURCE_COST_PER_VALUE * sum(values[name] for name in inputs)
        return cls(tuple(accumulate(per_layer, initial=0.0)), source, tuple(live), widest, once)

    def between(self, origin: int | None, stop: int) -> float:
        """Work of the layers from a place on (None: and of reading the image) up to another."""
        return self.work[stop] - (self.work[origin] if origin is not None else -self.source)

    def held(self, kept: Sequence[int | None]) -> tuple[int, ...]:
        """Bytes of the frontiers at some places; None: of none."""
        return tuple(0 if place is None else self.live[place] for place in kept)


@dataclass(frozen=True)
class Route:
    """How a group of images goes through all steps.

    Attributes:
        images: how many images go this way.
        origin: per step the place whose frontier it starts from; None: from the source.
        keep: per step the place whose frontier is kept from then on; None: what is kept stays.
        held_bytes: per step the bytes of the frontier kept behind it, per image.
        work: per image over all steps, in multiply-accumulates.
    """

    images: int
    origin: tuple[int | None, ...]
    keep: tuple[int | None, ...]
    held_bytes: tuple[int, ...]
    work: float


@dataclass(frozen=True)
class Plan:
    """The routes, in the order of the images; the micro-batch; and what one plain pass would cost."""

    routes: tuple[Route, ...]
    micro_batch: int
    plain_work: float

    @property
    def work(self) -> float:
        """Work of the whole sweep, in multiply-accumulates."""
        return sum(route.work * route.images for route in self.routes)

    @property
    def kept_bytes(self) -> int:
        """The most bytes that are kept at a time, old and new frontiers of the chunks being run included."""
        images = sum(route.images for route in self.routes)
        held_by_step = zip(*(route.held_bytes for route in self.routes), strict=True)
        return max(
            (
                sum(route.images * bytes_held for route, bytes_held in zip(self.routes, held, strict=True))
                + in_flight(self.micro_batch, images) * max(held)
                for held in held_by_step
            ),
            default=0,
        )


def aligned(size: int) -> int:
    """``size`` rounded up so that arrays laid one behind the other stay aligned."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def micro_batch_size(widest: int, images: int, memory: int | None) -> int:
    """Images per micro-batch, so that the widest layer takes a small part of the memory.

    Raises:
        InputError: not even one image fits.
    """
    if memory is not None and widest > memory:
        raise InputError(
            f"memory: {memory} bytes is too small for even one image of this net; "
            f"the least that would do is {widest} bytes ({-(-widest // (1 << 20))}MiB)"
        )
    allowed = MICRO_BATCH_BYTES if memory is None else min(MICRO_BATCH_BYTES, memory // 4)
    return even_batch(allowed // max(widest, 1), images)


def even_batch(most: int, images: int) -> int:
    """A micro-batch of at most ``most`` images, or of one, that threads can share evenly."""
    size = max(1, min(most, MAX_MICRO_BATCH))
    even = size - size % min(EVEN, 1 << size.bit_length() - 1)
    return min(even, images)


def in_flight(batch: int, images: int) -> int:
    """How many images are being run at a time: their old and new frontiers are kept."""
    return min(IN_FLIGHT * batch, images)


def plan(costs: Costs, steps: Sequence[Step], images: int, memory: int | None) -> Plan:
    """A cheap way of passing ``images`` images through ``steps`` within ``memory`` bytes.

    With at most b bytes kept per image, the best is to keep, behind every step, the last frontier before its
    cut that fits into b: whatever can be computed from an earlier frontier can be computed from a later one
    with less work. So each b gives one way, and only the sizes that occur matter as b. The memory bound is on
    the sum over all images; of all mixtures of ways under a bound on one sum, one of at most two is the
    cheapest (work over bytes: it lies on an edge of the lower convex hull).

    The sizes rise and fall along the net, and so does the best mixture. At a *joint* all images keep the same
    frontier, the last that fits for all. Between two joints one mixture of two ways is used; dynamic
    programming finds the joints for which the sum of the work is least.

    Raises:
        InputError: the memory is too small for even one image.
    """
    batch = micro_batch_size(costs.widest, images, memory)
    plain = (costs.source + costs.once + costs.work[steps[-1].stop]) * images if steps else 0.0
    frontiers = images + in_flight(batch, images)
    most = frontiers * max(costs.live)
    memory = most if memory is None else min(memory - memory // RESERVE, most)
    joints = _joints(costs, steps, memory // frontiers)
    best: dict[_Joint, tuple[float, tuple[_Stretch, ...]]] = {joints[0]: (0.0, ())}
    for number, joint in enumerate(joints[:-1]):
        before, stretches = best[joint]
        ways = _ways(costs, steps, joint)
        for end in joints[number + 1 :]:
            # The last way keeps the most: no mixture takes less work.
            least = before + images * ways[-1].work[end.done - joint.done - 1]
            if end in best and least >= best[end][0]:
                continue
            stretch = _stretch(costs, ways, joint, end, images, batch, memory)
            if stretch is None:
                continue
            total = before + stretch.work
            if end not in best or total < best[end][0]:
                best[end] = (total, (*stretches, stretch))
    return Plan(_routes(costs, steps, best[joints[-1]][1], images), batch, plain)


@dataclass(frozen=True)
class _Joint:
    """Behind the first ``done`` steps all images keep the frontier at ``place``; None: nothing."""

    done: int
    place: int | None


@dataclass(frozen=True)
class _Way:
    """One image's way from a joint on.

    Attributes:
        held: the place whose frontier is kept behind each step.
        work: of all steps up to each step.
    """

    held: list[int | None]
    work: list[float]


@dataclass(frozen=True)
class _Stretch:
    """The first ``many`` images go one way from joint to joint, the others another.

    Attributes:
        large, small: the places whose frontiers are kept behind each step, for both.
        work: for all images.
    """

    many: int
    large: tuple[int | None, ...]
    small: tuple[int | None, ...]
    work: float


def _joints(costs: Costs, steps: Sequence[Step], most: int) -> list[_Joint]:
    """The start, wherever a later frontier of at most ``most`` bytes can be kept than before, and the end."""
    joints = [_Joint(0, None)]
    for done, step in enumerate(steps[:-1], 1):
        place = _latest(costs, joints[-1].place, step.stop, most)
        if place != joints[-1].place:
            joints.append(_Joint(done, place))
    return [*joints, _Joint(len(steps), None)]


def _latest(costs: Costs, held: int | None, stop: int, bound: int) -> int | None:
    """The last place up to ``stop`` whose frontier fits into the bound; ``held`` if none behind it does."""
    backwards = range(stop, held or 0, -1)
    return next((place for place in backwards if 0 < costs.live[place] <= bound), held)


def _ways(costs: Costs, steps: Sequence[Step], joint: _Joint) -> list[_Way]:
    """From a joint to the last step, one way for each size that a frontier may have."""
    sizes = sorted({0, *costs.live[(joint.place or 0) + 1 : steps[-1].stop + 1]})
    ways = []
    for bound in sizes:
        way = _Way([], [])
        held, work = joint.place, 0.0
        for step in steps[joint.done :]:
            work += costs.between(held, step.stop)
            held = _latest(costs, held, step.stop, bound)
            way.held.append(held)
            way.work.append(work)
        ways.append(way)
    return ways


def _stretch(
    costs: Costs, ways: Sequence[_Way], start: _Joint, end: _Joint, images: int, batch: int, memory: int
) -> _Stretch | None:
    """The cheapest mixture of two ways between two joints; None where none keeps the bound."""
    length = end.done - start.done
    ending: dict[tuple[int | None, ...], float] = {}
    for way in ways:
        before_last = way.held[length - 2] if length > 1 else start.place
        if end.place is None or (before_last or 0) <= end.place:
            held = (*way.held[: length - 1], end.place)
            ending[held] = way.work[length - 1]
    endings, works = list(ending), np.array(list(ending.values()))
    if not endings:
        return None
    many = _shares(np.array([costs.held(each) for each in endings]), images, batch, memory)
    work = many * works + (images - many) * works[:, None]
    work[(many < 0) | (works > works[:, None])] = np.inf
    small, large = np.unravel_index(work.argmin(), work.shape)
    if not np.isfinite(work[small, large]):
        return None
    return _Stretch(int(many[small, large]), endings[large], endings[small], float(work[small, large]))


def _shares(held: npt.NDArray[np.int64], images: int, batch: int, memory: int) -> npt.NDArray[np.int64]:
    """How many images, in whole micro-batches, may go one way if the others go another.

    Args:
        held: bytes that an image keeps behind each step, (ways, steps).

    Returns:
        By the way of the others and by the way of the many; -1 if not even the way of the others fits.
    """
    large, small = held, held[:, None]
    spare = memory - in_flight(batch, images) * np.maximum(large, small) - images * small
    more = large - small
    many: npt.NDArray[np.int64]
    many = np.where(more > 0, spare // np.maximum(more, 1), images).min(axis=2).clip(None, images)
    many = np.where(many == images, many, many // batch * batch)
    many[(spare < 0).any(axis=2)] = -1
    return many


def _routes(
    costs: Costs, steps: Sequence[Step], stretches: Sequence[_Stretch], images: int
) -> tuple[Route, ...]:
    """The routes of the groups of images that go the same way on every stretch."""
    borders = sorted({0, images, *(stretch.many for stretch in stretches)})
    routes = []
    for first, last in pairwise(borders):
        held: list[int | None] = []
        for stretch in stretches:
            held += stretch.large if first < stretch.many else stretch.small
        origin = [None, *held[:-1]]
        keep = [new if new != old else None for old, new in zip(origin, held, strict=True)]
        work = costs.once + sum(costs.between(o, step.stop) for o, step in zip(origin, steps, strict=True))
        routes.append(Route(last - first, tuple(origin), tuple(keep), costs.held(held), work))
    return tuple(routes)
