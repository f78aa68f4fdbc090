"""What the three stages do with the settings of a job, whoever runs them: a command, or the Python API."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from quantize.caffenet import TEST, doubtful_norms, filter_net
from quantize.caffenet.model import Model
from quantize.caffenet.traits import Trait, traits_of
from quantize.caffenet.weights import raw_types_text
from quantize.data.feed import Feed
from quantize.engines import engine_opener
from quantize.engines.base import OpenEngine
from quantize.measure.outputs import class_scores
from quantize.progress import Progress
from quantize.record import BatchNormShift, Budget, QuantizedActivation, QuantizedLayer, StageName
from quantize.settings import Config, GridChoice
from quantize.stages.activations import activations_quan
from quantize.stages.budget import keep_budget
from quantize.stages.data_aware import CalibrationSweep
from quantize.stages.renorm import renorm
from quantize.stages.weights import check_kernels, check_unquantized, choices, unquantizable, weights_quan


@dataclass(frozen=True)
class WeightsFindings:
    """What the stage weights has found; the attributes are those of `record.WeightsRecord`."""

    layers: list[QuantizedLayer]
    skipped: list[str]
    kept: dict[str, str]
    doubtful: list[str]
    budget: Budget | None


@dataclass(frozen=True)
class Work:
    """The stages of a job.

    Attributes:
        config: the settings.
        feed: gives the images that a stage looks at; raises InputError where there are none.
        open_engine: opens a net for running.
        progress: what hears how far it is.
    """

    config: Config
    feed: Callable[[StageName], Feed]
    open_engine: OpenEngine
    progress: Progress

    @classmethod
    def of(cls, config: Config, feed: Callable[[StageName], Feed], progress: Progress) -> Work:
        """With the engine that the settings name."""
        return cls(config, feed, engine_opener(config.engine, config.caffe, config.threads), progress)

    def grids(self, model: Model) -> tuple[dict[str, GridChoice], Budget | None]:
        """The grid of every layer to quantize; with weights.budget as measured on the calibration images.

        Raises:
            InputError: bad settings or weights, or nothing that a budget could be measured on.
        """
        settings = self.config.weights
        chosen = choices(model.inference.net, settings)
        check_kernels(filter_net(model.net, TEST), model.weights, chosen)
        if settings.budget is None:
            return chosen, None
        scores = class_scores(model.net, "weights.budget")
        return keep_budget(model, settings, self._calibration(), scores, self.progress)

    def weights(self, model: Model) -> tuple[Model, WeightsFindings]:
        """The stage weights."""
        net, solver = model.inference.net, self.config.weights.solver
        check_unquantized(net)
        kept, doubtful = unquantizable(net), doubtful_norms(net, model.weights)
        if model.weights.raw_types:
            self.progress.note(f"weights: {raw_types_text(model.weights)}")
        for line in (*doubtful, *(f"{name} is not quantized: {reason}" for name, reason in kept.items())):
            self.progress.note(f"weights: {line}")
        chosen, budget = self.grids(model)
        if not chosen:
            self.progress.note("weights: weights.layers skips every layer; no weights are quantized")
        calibration = self._calibration() if solver == "data_aware" else None
        quantized, layers = weights_quan(model, chosen, solver, self.progress, calibration)
        done = {name for layer in layers for name in (layer.name, *layer.shared_by)} | kept.keys()
        skipped = [
            layer.name for layer in net.layer if Trait.KERNELS in traits_of(layer) and layer.name not in done
        ]
        return quantized, WeightsFindings(layers, skipped, kept, doubtful, budget)

    def renorm(self, model: Model, full: Model | None = None) -> tuple[Model, list[BatchNormShift], int]:
        """The stage renorm: the model, the shifts, and the number of images."""
        feed, settings = self.feed("renorm"), self.config.renorm
        memory = self.config.memory
        renormed, shifts = renorm(model, feed, settings, self.open_engine, memory, self.progress, full)
        if renormed.weights is model.weights:
            self.progress.note("renorm: the net has no BatchNorm layer; its weights are passed through")
        return renormed, shifts, len(feed)

    def activations(self, model: Model) -> tuple[Model, list[QuantizedActivation], int]:
        """The stage activations: the model, what has been found, and the number of images."""
        feed = self.feed("activations")
        small, found = activations_quan(model, feed, self.config.activations, self.open_engine, self.progress)
        if not found:
            self.progress.note("activations: the net has nothing to quantize")
        for activation in (each for each in found if each.dead):
            self.progress.note(f"activations: {activation.name} is dead: 0 on every calibration image")
        return small, found, len(feed)

    def _calibration(self) -> CalibrationSweep:
        """What the data-aware solver and a budget need."""
        statistics = self.config.renorm.statistics
        return CalibrationSweep(self.feed("weights"), self.open_engine, self.config.memory, statistics)
