"""What must be right before a run begins: `quantize` stops at the first fault, `doctor` shows them all."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import closing
from dataclasses import dataclass

from quantize.caffenet import (
    TEST,
    filter_net,
    single_assignment,
)
from quantize.caffenet.norms import norm_places
from quantize.data.feed import Feed
from quantize.data.transform import shape_text
from quantize.engines.base import OpenEngine
from quantize.errors import InputError
from quantize.job.feeds import calibration_images, input_shapes, stage_feed, validation_feed
from quantize.job.given import Given
from quantize.job.labels import folders_as_classes
from quantize.measure.outputs import class_scores
from quantize.progress import Progress
from quantize.record import StageName
from quantize.settings import Config
from quantize.stages.budget import bits_left
from quantize.stages.sites import find_sites
from quantize.stages.weights import (
    check_kernels,
    check_unquantized,
    choices,
    free_layers,
    to_be_quantized,
)
from quantize.sweep.plan import Costs, micro_batch_size

LATER_STAGES: tuple[StageName, ...] = ("renorm", "activations")


@dataclass(frozen=True)
class Checks:
    """What is to be looked at before some stages run.

    Attributes:
        given: what the job starts from.
        open_engine: opens a net for running.
        progress: what hears of guesses.
        stages: the stages.
    """

    given: Given
    open_engine: OpenEngine
    progress: Progress
    stages: Collection[StageName]

    def __iter__(self) -> Iterator[tuple[str, Callable[[], str]]]:
        """What is looked at, and what looks and tells what it has seen.

        What looks raises LabelfreeError (mostly InputError) where something is wrong.
        """
        yield "model.weights", self._weights
        if self._fed:
            yield "data.calibration", self._calibration
            yield "layers", self._layers
        if self.config.data.validation is not None:
            yield "data.validation", self._validation

    @property
    def config(self) -> Config:
        """The settings."""
        return self.given.config

    @property
    def _fed(self) -> list[StageName]:
        """The stages whose calibration images are looked at."""
        settings = self.config.weights
        fitted = settings.solver == "data_aware" or settings.budget is not None
        fed: list[StageName] = ["weights"] if fitted else []
        return [stage for stage in (*fed, *LATER_STAGES) if stage in self.stages]

    def _weights(self) -> str:
        """The caffemodel against the net, and the settings against both."""
        model, settings = self.given.model, self.config.weights
        test = model.inference
        chosen = {}
        if "weights" in self.stages:
            check_unquantized(test.net)
            chosen = choices(test.net, settings)
        try:
            shapes = input_shapes(self.given)
        except InputError:  # the images are looked at next
            shapes = {}
        weights = model.checked(shapes).weights
        check_kernels(filter_net(model.net, TEST), weights, chosen)
        if "weights" in self.stages and settings.budget is not None:
            class_scores(model.net, "weights.budget")
            counts = {name: weights[name][0].size for name in chosen}
            free = free_layers(test.net, settings)
            bits_left(counts, {n: chosen[n].bits for n in chosen if n not in free}, settings)
        fit = "they fit the net" if shapes else "the shape of images, and so theirs, is not known"
        return f"{len(weights.layers())} layers, {fit}"

    def _calibration(self) -> str:
        """Enough images, the first of which can be read and has the net's size."""
        feeds = {stage: stage_feed(self.given, stage, self.progress) for stage in self._fed}
        counts = ", ".join(f"{len(feed):,} for {stage}" for stage, feed in feeds.items())
        next(feeds[self._fed[0]].batches(1, 0, 1))
        present = calibration_images(self.given)
        return f"{present:,} images: {counts}; {_shapes(feeds[self._fed[0]])} when transformed"

    def _layers(self) -> str:
        """That the engine can run what the stages run: all up to the last layer that one of them looks at."""
        model = self.given.model
        test = model.inference
        feed = stage_feed(self.given, self._fed[0])
        flat = single_assignment(test.net)
        sites: set[str] = set()
        if "activations" in self._fed:
            quantized = to_be_quantized(test.net, self.config.weights)
            found = find_sites(test.net, test.inputs, quantized, self.config.activations)
            sites = {site.blob for site in found}
        measured = [
            at
            for at, layer in enumerate(flat.layer)
            if sites.intersection(layer.top) or (norm_places(layer) is not None and "renorm" in self._fed)
        ]
        if self.config.weights.budget is None:
            del flat.layer[max(measured, default=-1) + 1 :]
        if not flat.layer:
            return "no BatchNorm and no activation to quantize: nothing has to be run"
        with closing(self.open_engine(flat, model.weights, feed.shapes)) as engine:
            engine.compile(0, len(flat.layer), [flat.layer[-1].top[0]])
            widest = Costs.of(engine.net, engine.shapes, list(engine.inputs), ()).widest
        if "renorm" in self._fed:
            micro_batch_size(widest, 1, self.config.memory)
        return f"{len(flat.layer)} of {len(test.net.layer)} layers have to be run, and all these can be"

    def _validation(self) -> str:
        """Images, the first of which can be read and has the net's size."""
        feed = validation_feed(self.given, None, self.progress)
        next(feed.batches(1, 0, 1))
        folders = folders_as_classes(feed, self.given.net)
        labels = f"; {folders[0]}" if folders else ""
        return f"{len(feed):,} images, {_shapes(feed)} when transformed{labels}"


def _shapes(feed: Feed) -> str:
    """The shapes of what goes into the inputs, by name where there are several."""
    shown = {blob: shape_text(shape) or "one number" for blob, shape in feed.shapes.items()}
    return ", ".join(f"{blob} {text}" if len(shown) > 1 else text for blob, text in shown.items())
