"""Runs a net over many images, range by range, in bounded memory.

Between two steps of a sweep something about the net changes (renorm puts in the statistics just measured), so
all images must pass a cut before any may go on. What the next ranges need of an image, the blobs live at some
place of the net, is its *frontier*. The frontiers of all images may be larger than the memory allowed. Then
some images keep an earlier, smaller frontier, or none at all, and recompute from there: `plan` says which.

Why the result is exact: every image passes every layer with the same parameters whatever is kept, and the
moments of micro-batches are merged in float64, so only the order of rounding differs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import reduce
from typing import TypeVar

from quantize.arrays import FloatArray
from quantize.caffenet import live_blobs
from quantize.data.feed import Feed
from quantize.engines.base import Engine
from quantize.numerics.moments import Moments
from quantize.progress import SILENT, Progress
from quantize.sweep.arena import Arena
from quantize.sweep.plan import IN_FLIGHT, RESERVE, Costs, Route, Step, plan

Result = TypeVar("Result")
Visit = Callable[[range, Mapping[str, FloatArray]], None]
"""Gets numbers of images and the outputs of a step for them, which it may not keep."""
WORTH_SAYING = 1.1
"""More memory is spoken of where the work is so many times that of one pass."""


def overlapped(begun: Iterable[Callable[[], Result]]) -> Iterator[Result]:
    """What micro-batches give, in their order; IN_FLIGHT of them are begun before the first is ended."""
    running: deque[Callable[[], Result]] = deque()
    for end in begun:
        running.append(end)
        if len(running) == IN_FLIGHT:
            yield running.popleft()()
    for end in running:
        yield end()


class Shard:
    """Some images on their way through a net, all of them at the same step.

    It holds what is large: the net, the images, their frontiers. What a step finds goes out as moments, and
    what is decided from them comes back as blobs before the next one. Both are small, so shards can live in
    several processes, whose moments are merged.

    Args:
        engine: an inference net with every blob name assigned once.
        feed: the images.
        steps: in the order of the net; two may have the same place.
        memory: bytes the frontiers may take; None: no bound.

    Attributes:
        plan: what is kept and what is computed again.

    Raises:
        InputError: the memory is too small for even one image.
    """

    def __init__(self, engine: Engine, feed: Feed, steps: Sequence[Step], memory: int | None) -> None:
        self.engine = engine
        self.feed = feed
        self.steps = steps
        self.memory = memory
        self.costs = Costs.of(engine.net, engine.shapes, list(engine.inputs), (), steps)
        self.plan = plan(self.costs, steps, len(feed), memory)
        self._done = 0
        arena = Arena(self.plan.kept_bytes)
        self._groups: list[_Group] = []
        first = 0
        for route in self.plan.routes:
            self._groups.append(_Group(self, route, range(first, first + route.images), arena))
            first += route.images

    def advance(
        self,
        blobs: Mapping[str, Sequence[FloatArray]] | None = None,
        visit: Visit | None = None,
        progress: Progress = SILENT,
    ) -> dict[str, Moments]:
        """Take the next step with all images.

        Args:
            blobs: new blobs by layer, of layers at or behind the place of the step before.
            visit: is shown the step's outputs.
            progress: hears of the work done (see ``plan.work``).

        Returns:
            The moments over all images of the blobs that the step measures.
        """
        for layer, changed in (blobs or {}).items():
            self.engine.set_blobs(layer, changed)
        number, self._done = self._done, self._done + 1
        parts: list[dict[str, Moments]] = []
        # Those whose frontiers grow the most come last, into the room that the others have left.
        for group in sorted(self._groups, key=lambda group: group.growth(number)):
            parts.extend(group.step(number, visit, progress))
        measured = self.steps[number].measured
        return {name: reduce(Moments.merged, (m[name] for m in parts)) for name in measured}

    def advice(self) -> str | None:
        """What more memory would save; None where that is little."""
        times = self.plan.work / max(self.plan.plain_work, 1)
        if self.memory is None or times < WORTH_SAYING:
            return None
        images = len(self.feed)
        enough = plan(self.costs, self.steps, images, None).kept_bytes * RESERVE // (RESERVE - 1) + 1
        return (
            f"with memory {mebibytes(self.memory)} this takes {times:.1f} times the work of one pass, "
            f"for what is kept of {images} images is too large; {mebibytes(enough)} would do with one"
        )


def mebibytes(size: int) -> str:
    """A number of bytes as the configuration writes it, rounded up."""
    return f"{-(-size // (1 << 20))}MiB"


class _Group:
    """The images of one route, in chunks of one micro-batch, and the blobs that are kept of each chunk."""

    def __init__(self, shard: Shard, route: Route, images: range, arena: Arena) -> None:
        self.shard = shard
        self.route = route
        self.batch = shard.plan.micro_batch
        self.images = images
        self.arena = arena
        self.kept: list[dict[str, FloatArray]] = [{} for _ in range(0, len(images), self.batch)]

    def growth(self, number: int) -> int:
        """By how many bytes per image the frontier grows at a step."""
        held = (0, *self.route.held_bytes)
        return held[number + 1] - held[number]

    def step(self, number: int, visit: Visit | None, progress: Progress) -> Iterator[dict[str, Moments]]:
        """Run one step for all chunks and yield each chunk's moments."""
        engine, costs, step = self.shard.engine, self.shard.costs, self.shard.steps[number]
        origin, keep = self.route.origin[number], self.route.keep[number]
        held = [] if origin is None else live_blobs(engine.net, origin)
        wanted = held if keep is None else live_blobs(engine.net, keep)
        last = number == len(self.shard.steps) - 1
        fresh = [] if last else [name for name in wanted if name not in held]
        present = engine.inputs if origin is None else held
        shown = [name for name in step.outputs if name not in fresh and name not in present]
        runner = engine.compile(origin or 0, step.stop, [*fresh, *shown], step.measured)
        work = costs.between(origin, step.stop) + (0 if number else costs.once)

        def begin(chunk: int, feeds: Mapping[str, FloatArray]) -> Callable[[], dict[str, Moments]]:
            images = self.images[chunk * self.batch : (chunk + 1) * self.batch]
            room = {name: self.arena.take(engine.blob_shape(name, len(images))) for name in fresh}
            finish = runner.begin({name: feeds[name] for name in runner.inputs}, room)

            def end() -> dict[str, Moments]:
                result = finish()
                if visit is not None:
                    known = {**feeds, **result.blobs}
                    visit(images, {name: known[name] for name in step.outputs})
                self._keep(chunk, {} if last else {**self.kept[chunk], **room}, wanted)
                progress.advance(work * len(images))
                return result.moments

            return end

        return overlapped(begin(chunk, feeds) for chunk, feeds in enumerate(self._feeds(origin)))

    def _keep(self, chunk: int, blobs: Mapping[str, FloatArray], wanted: Sequence[str]) -> None:
        """Keep the blobs that are wanted; what was kept before and is not among them is given back."""
        kept = {name: array for name, array in blobs.items() if name in wanted}
        for name, array in self.kept[chunk].items():
            if name not in kept:
                self.arena.give(array)
        self.kept[chunk] = kept

    def _feeds(self, origin: int | None) -> Iterator[Mapping[str, FloatArray]]:
        if origin is not None:
            return iter(self.kept)
        batches = self.shard.feed.batches(self.batch, self.images.start, self.images.stop)
        return (batch.feeds for batch in batches)
