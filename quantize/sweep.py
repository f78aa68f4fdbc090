"""Runs a net over many images, range by range, in bounded memory.

Between two steps of a sweep something about the net changes (renorm puts in the statistics just measured), so
all images must pass a cut before any may go on. What the next ranges need of an image, the blobs live at some
place of the net, is its *frontier*. The frontiers of all images may be larger than the memory allowed. Then
some images keep an earlier, smaller frontier, or none at all, and recompute from there: `plan` says which.

Why the result is exact: every image passes every layer with the same parameters whatever is kept, and the
moments of micro-batches are merged in float64, so only the order of rounding differs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import accumulate

import numpy as np
import numpy.typing as npt

from quantize.caffenet import LayerParameter, NetParameter, Shapes, live_blobs
from quantize.data.loader import Images
from quantize.engines.base import Engine, FloatArray, Moments
from quantize.errors import InputError
from quantize.progress import SILENT, Progress

FLOAT_BYTES = 4
ALIGNMENT = 64
MICRO_BATCH_BYTES = 64 << 20
"""What one micro-batch may hold at the widest layer: large enough to keep the cores busy, small enough for
the rest of the memory bound."""
MAX_MICRO_BATCH = 256
COST_PER_VALUE = 8
"""Work of writing and reading one value, in multiply-accumulates."""
SOURCE_COST_PER_VALUE = 500
"""Work of decoding and transforming one value of an input image, in multiply-accumulates."""


@dataclass(frozen=True)
class Feed:
    """Images and the input blob that they go into."""

    blob: str
    images: Images


@dataclass(frozen=True)
class Step:
    """Run all images up to layer ``stop`` and measure the blobs ``measured`` as they stand there."""

    stop: int
    measured: tuple[str, ...]


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
    """

    work: tuple[float, ...]
    source: float
    live: tuple[int, ...]
    widest: int

    @classmethod
    def of(cls, net: NetParameter, shapes: Shapes, inputs: Sequence[str], outputs: Sequence[str]) -> Costs:
        """The costs of an inference net with every blob name assigned once."""
        values = {name: int(np.prod(shape, dtype=object)) for name, shape in shapes.blobs.items()}
        per_layer = [
            shapes.macs.get(layer.name, 0) + COST_PER_VALUE * sum(values[top] for top in layer.top)
            for layer in net.layer
        ]
        live = [
            sum(aligned(values[name] * FLOAT_BYTES) for name in live_blobs(net, place, outputs))
            for place in range(len(net.layer) + 1)
        ]
        widest = max(
            (sum(values[b] for b in (*layer.bottom, *layer.top)) * FLOAT_BYTES for layer in net.layer),
            default=0,
        )
        source = SOURCE_COST_PER_VALUE * sum(values[name] for name in inputs)
        return cls(tuple(accumulate(per_layer, initial=0.0)), source, tuple(live), widest)


@dataclass(frozen=True)
class Route:
    """How a group of images goes through all steps.

    Attributes:
        images: how many images go this way.
        origin: per step the place whose frontier it starts from; None: from the source.
        keep: per step the place whose frontier is kept from then on; None: what is kept stays.
        kept_bytes: the largest frontier kept, per image.
        work: per image over all steps, in multiply-accumulates.
    """

    images: int
    origin: tuple[int | None, ...]
    keep: tuple[int | None, ...]
    kept_bytes: int
    work: float


@dataclass(frozen=True)
class Plan:
    """One or two routes, the micro-batch, and what one plain pass would cost."""

    routes: tuple[Route, ...]
    micro_batch: int
    plain_work: float

    @property
    def work(self) -> float:
        """Work of the whole sweep, in multiply-accumulates."""
        return sum(route.work * route.images for route in self.routes)

    @property
    def kept_bytes(self) -> int:
        """Bytes of all arenas."""
        return sum(_arena_bytes(route, self.micro_batch) for route in self.routes)


def aligned(size: int) -> int:
    """``size`` rounded up so that blobs laid one behind the other stay aligned."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def micro_batch_size(widest: int, images: int, memory: int | None) -> int:
    """Images per micro-batch, so that the widest layer takes a small part of the memory.

    Raises:
        InputError: not even one image fits.
    """
    if memory is not None and widest > memory:
        raise InputError(
            f"renorm.memory: {memory} bytes is too small for even one image of this net; "
            f"the least that would do is {widest} bytes ({-(-widest // (1 << 20))}MiB)"
        )
    allowed = MICRO_BATCH_BYTES if memory is None else min(MICRO_BATCH_BYTES, memory // 4)
    return max(1, min(allowed // max(widest, 1), MAX_MICRO_BATCH, images))


def plan(costs: Costs, steps: Sequence[Step], images: int, memory: int | None) -> Plan:
    """The cheapest way of passing ``images`` images through ``steps`` within ``memory`` bytes.

    With at most b bytes kept per image, the best is to keep, at every step, the last frontier before its cut
    that fits into b: whatever can be computed from an earlier frontier can be computed from a later one
    with less work. So each b gives one `Route`, and only the live sizes that occur matter as b. The memory
    bound is on the sum over all images; the cheapest mixture of routes for a sum is a mixture of at most two
    (it lies on an edge of the lower convex hull of work over bytes), so all pairs are tried.

    Raises:
        InputError: the memory is too small for even one image.
    """
    batch = micro_batch_size(costs.widest, images, memory)
    places = range(1, max((step.stop for step in steps), default=0) + 1)
    bounds = sorted({0, *(costs.live[place] for place in places)})
    routes = [_route(costs, steps, bound) for bound in bounds]
    plain = costs.source + costs.work[steps[-1].stop] if steps else 0.0
    if memory is None:
        return Plan((_with_images(routes[-1], images),), batch, plain * images)
    best: tuple[Route, ...] = (_with_images(routes[0], images),)
    best_work = best[0].work * images
    for i, small in enumerate(routes):
        for large in routes[i:]:
            budget = memory - 2 * batch * (small.kept_bytes + large.kept_bytes)
            spare = budget - images * small.kept_bytes
            if spare < 0:
                continue
            extra = large.kept_bytes - small.kept_bytes
            many = images if extra == 0 else min(images, spare // extra)
            work = many * large.work + (images - many) * small.work
            if work < best_work:
                best_work = work
                pair = (_with_images(large, many), _with_images(small, images - many))
                best = tuple(route for route in pair if route.images)
    return Plan(best, batch, plain * images)


def _with_images(route: Route, images: int) -> Route:
    return Route(images, route.origin, route.keep, route.kept_bytes, route.work)


def _route(costs: Costs, steps: Sequence[Step], bound: int) -> Route:
    origin: list[int | None] = []
    keep: list[int | None] = []
    held: int | None = None
    work = 0.0
    for number, step in enumerate(steps):
        origin.append(held)
        work += costs.work[step.stop] - (costs.work[held] if held is not None else -costs.source)
        after = [p for p in range((held or 0) + 1, step.stop + 1) if 0 < costs.live[p] <= bound]
        last = number == len(steps) - 1
        held = after[-1] if after and not last else held
        keep.append(held if after and not last else None)
    kept_bytes = max((costs.live[place] for place in keep if place is not None), default=0)
    return Route(0, tuple(origin), tuple(keep), kept_bytes, work)


def _arena_bytes(route: Route, micro_batch: int) -> int:
    if route.kept_bytes == 0:
        return 0
    chunks = -(-route.images // micro_batch)
    return (chunks + 1) * micro_batch * route.kept_bytes


class Arena:
    """One buffer that holds the frontier of every chunk of images, old and new at the same time.

    The old frontier is laid out from one end and the new one from the other. Chunks are taken so that the new
    frontier grows into the place of chunks already read. A buffer one chunk larger than the larger of both
    frontiers is therefore enough, and it is never reallocated.
    """

    def __init__(self, chunks: int, largest: int) -> None:
        self.chunks = chunks
        self.buffer: npt.NDArray[np.uint8] = np.empty((chunks + 1) * largest, np.uint8)
        self.size = 0
        self.from_left = False

    def order(self) -> Iterator[int]:
        """Chunks in the order in which they may be replaced."""
        return iter(
            range(self.chunks) if not self.from_left or not self.size else reversed(range(self.chunks))
        )

    def old(self, chunk: int) -> npt.NDArray[np.uint8]:
        """Bytes of the frontier that is kept for a chunk."""
        return self._slot(chunk, self.size, self.from_left)

    def new(self, chunk: int, size: int) -> npt.NDArray[np.uint8]:
        """Room for a chunk's next frontier of ``size`` bytes."""
        return self._slot(chunk, size, not self.from_left)

    def advance(self, size: int) -> None:
        """All chunks have their next frontier: it becomes the one that is kept."""
        self.size = size
        self.from_left = not self.from_left

    def _slot(self, chunk: int, size: int, from_left: bool) -> npt.NDArray[np.uint8]:
        start = chunk * size if from_left else len(self.buffer) - (self.chunks - chunk) * size
        return self.buffer[start : start + size]


class Sweep:
    """A sweep of an opened net over images.

    Args:
        engine: an inference net with every blob name assigned once.
        feed: the calibration images.
        steps: in the order of the net.
        memory: bytes the frontiers may take; None: no bound.
    """

    def __init__(self, engine: Engine, feed: Feed, steps: Sequence[Step], memory: int | None) -> None:
        self.engine = engine
        self.feed = feed
        self.steps = steps
        self.costs = Costs.of(engine.net, engine.shapes, list(engine.inputs), ())
        self.plan = plan(self.costs, steps, len(feed.images), memory)

    def run(self, measured: Callable[[Step, dict[str, Moments]], None], progress: Progress = SILENT) -> None:
        """Pass all images through all steps.

        Args:
            measured: called after each step with the moments over all images; it may change the engine's
                blobs of layers at or behind the step's cut.
        """
        batch = self.plan.micro_batch
        groups: list[_Group] = []
        first = 0
        for route in self.plan.routes:
            groups.append(_Group(self, route, range(first, first + route.images), batch))
            first += route.images
        for number, step in enumerate(self.steps):
            found: list[dict[str, Moments]] = []
            for group in groups:
                found.extend(group.step(number, step, progress))
            measured(step, {name: reduce(Moments.merged, (m[name] for m in found)) for name in step.measured})


class _Group:
    """The images of one route, in chunks of one micro-batch, and what is kept of them."""

    def __init__(self, sweep: Sweep, route: Route, images: range, batch: int) -> None:
        self.sweep = sweep
        self.route = route
        self.chunks = [images[i : i + batch] for i in range(0, len(images), batch)]
        self.batch = batch
        self.arena = Arena(len(self.chunks), batch * route.kept_bytes)
        self.kept: dict[str, tuple[int, ...]] = {}

    def step(self, number: int, step: Step, progress: Progress) -> Iterator[dict[str, Moments]]:
        """Run one step for all chunks and yield each chunk's moments."""
        sweep, origin, keep = self.sweep, self.route.origin[number], self.route.keep[number]
        engine = sweep.engine
        kept_next = {} if keep is None else self._layout(keep)
        runner = engine.compile(origin or 0, step.stop, list(kept_next), step.measured)
        slot = self.batch * sum(aligned(int(np.prod(shape)) * FLOAT_BYTES) for shape in kept_next.values())
        costs = sweep.costs
        work = costs.work[step.stop] - (costs.work[origin] if origin is not None else -costs.source)
        for chunk, feeds in self._feeds(origin):
            room = self._views(self.arena.new(chunk, slot), kept_next, chunk) if keep is not None else None
            yield runner.run({name: feeds[name] for name in runner.inputs}, room).moments
            progress.advance(work * len(self.chunks[chunk]))
        if keep is not None:
            self.kept = kept_next
            self.arena.advance(slot)

    def _layout(self, place: int) -> dict[str, tuple[int, ...]]:
        engine = self.sweep.engine
        return {name: engine.shapes.blobs[name][1:] for name in live_blobs(engine.net, place)}

    def _feeds(self, origin: int | None) -> Iterator[tuple[int, Mapping[str, FloatArray]]]:
        if origin is None:
            first, last = self.chunks[0].start, self.chunks[-1].stop
            batches = self.sweep.feed.images.batches(self.batch, first, last)
            for chunk, (pixels, _) in enumerate(batches):
                yield chunk, {self.sweep.feed.blob: pixels}
        else:
            for chunk in self.arena.order():
                yield chunk, self._views(self.arena.old(chunk), self.kept, chunk)

    def _views(
        self, slot: npt.NDArray[np.uint8], layout: Mapping[str, tuple[int, ...]], chunk: int
    ) -> dict[str, FloatArray]:
        """A chunk's slot as one float32 array per blob."""
        count = len(self.chunks[chunk])
        views: dict[str, FloatArray] = {}
        offset = 0
        for name, shape in layout.items():
            size = int(np.prod(shape)) * FLOAT_BYTES
            views[name] = slot[offset : offset + count * size].view(np.float32).reshape(count, *shape)
            offset += self.batch * aligned(size)
        return views
