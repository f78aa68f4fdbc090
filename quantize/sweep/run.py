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
from quantize.sweep.plan import IN_FLIGHT, Costs, Route, Step, plan

Result = TypeVar("Result")


def overlapped(begun: Iterable[Callable[[], Result]]) -> Iterator[Result]:
    """What micro-batches give, in their order; IN_FLIGHT of them are begun before the first is ended."""
    running: deque[Callable[[], Result]] = deque()
    for end in begun:
        running.append(end)
        if len(running) == IN_FLIGHT:
            yield running.popleft()()
    for end in running:
        yield end()


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
        self.plan = plan(self.costs, steps, len(feed), memory)

    def run(self, measured: Callable[[Step, dict[str, Moments]], None], progress: Progress = SILENT) -> None:
        """Pass all images through all steps.

        Args:
            measured: called after each step with the moments over all images; it may change the engine's
                blobs of layers at or behind the step's cut.
        """
        arena = Arena(self.plan.kept_bytes)
        groups: list[_Group] = []
        first = 0
        for route in self.plan.routes:
            groups.append(_Group(self, route, range(first, first + route.images), arena))
            first += route.images
        for number, step in enumerate(self.steps):
            found: list[dict[str, Moments]] = []
            # Those whose frontiers grow the most come last, into the room that the others have left.
            for group in sorted(groups, key=lambda group: group.growth(number)):
                found.extend(group.step(number, step, progress))
            measured(step, {name: reduce(Moments.merged, (m[name] for m in found)) for name in step.measured})


class _Group:
    """The images of one route, in chunks of one micro-batch, and the blobs that are kept of each chunk."""

    def __init__(self, sweep: Sweep, route: Route, images: range, arena: Arena) -> None:
        self.sweep = sweep
        self.route = route
        self.batch = sweep.plan.micro_batch
        self.images = images
        self.arena = arena
        self.kept: list[dict[str, FloatArray]] = [{} for _ in range(0, len(images), self.batch)]

    def growth(self, number: int) -> int:
        """By how many bytes per image the frontier grows at a step."""
        held = (0, *self.route.held_bytes)
        return held[number + 1] - held[number]

    def step(self, number: int, step: Step, progress: Progress) -> Iterator[dict[str, Moments]]:
        """Run one step for all chunks and yield each chunk's moments."""
        engine, costs = self.sweep.engine, self.sweep.costs
        origin, keep = self.route.origin[number], self.route.keep[number]
        held = [] if origin is None else live_blobs(engine.net, origin)
        wanted = held if keep is None else live_blobs(engine.net, keep)
        last = number == len(self.sweep.steps) - 1
        fresh = [] if last else [name for name in wanted if name not in held]
        runner = engine.compile(origin or 0, step.stop, fresh, step.measured, own_layout=True)
        work = costs.between(origin, step.stop)

        def begin(chunk: int, feeds: Mapping[str, FloatArray]) -> Callable[[], dict[str, Moments]]:
            count = min(self.batch, len(self.images) - chunk * self.batch)
            room = {name: self.arena.take(engine.blob_shape(name, count)) for name in fresh}
            finish = runner.begin({name: feeds[name] for name in runner.inputs}, room)

            def end() -> dict[str, Moments]:
                moments = finish().moments
                self._keep(chunk, {} if last else {**self.kept[chunk], **room}, wanted)
                progress.advance(work * count)
                return moments

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
        batches = self.sweep.feed.batches(self.batch, self.images.start, self.images.stop)
        return (batch.feeds for batch in batches)
