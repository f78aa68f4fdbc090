"""weights_quan -> renorm -> activations_quan: what a run reads, writes and skips.

Every stage leaves whole files behind, so that a later run can go on from any of them:

- weights: ``NAME_quantized.caffemodel``
- renorm: ``NAME_renorm.caffemodel``
- activations: nothing but the prototxts

and every stage rewrites ``NAME_val.prototxt``, ``NAME_deploy.prototxt`` and ``report.json``. When the last
stage asked for is over, ``report.html`` is made from the latter.
A stage that is done again makes the results of the stages behind it obsolete; they are removed.
"""

from __future__ import annotations

import hashlib
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from typing import TypedDict

from quantize import __version__
from quantize.caffenet import (
    TEST,
    InferenceNet,
    Weights,
    check_weights,
    doubtful_norms,
    filter_net,
    infer_shapes,
    known_part,
)
from quantize.caffenet.model import Model
from quantize.caffenet.quantized import with_alpha_terms
from quantize.caffenet.traits import Trait, traits_of
from quantize.data.feed import Feed
from quantize.engines import engine_opener
from quantize.errors import InputError
from quantize.host import peak_memory, reset_peak_memory, using_threads
from quantize.job.checks import Checks
from quantize.job.evaluation import measure_outputs
from quantize.job.feeds import input_shapes, read_model_prototxt, stage_feed
from quantize.job.output import Files, OutputFolder
from quantize.job.prototxts import caffe_test
from quantize.job.results import Results
from quantize.job.resume import changes, dependencies, made_from, model_hashes, sha256
from quantize.job.store import PAGE, previous_record, show_page, write_record
from quantize.job.transforms import says_transform, transform_check, with_chosen_transform
from quantize.measure.outputs import class_scores
from quantize.measure.transform_check import TransformCheck
from quantize.progress import SILENT, Progress
from quantize.record import (
    STAGES,
    ActivationsRecord,
    AnyStageRecord,
    Budget,
    Dependencies,
    RenormRecord,
    RunRecord,
    StageName,
    Stages,
    TransformRecord,
    WeightsRecord,
)
from quantize.settings import Config, GridChoice
from quantize.stages.activations import activations_quan
from quantize.stages.budget import keep_budget
from quantize.stages.data_aware import Calibration
from quantize.stages.renorm import renorm
from quantize.stages.weights import check_kernels, choices, unquantizable, weights_quan

LIBRARIES = (
    *("numpy", "protobuf", "onnx", "onnxruntime", "opencv-python-headless", "lmdb", "threadpoolctl"),
    *("matplotlib", "jinja2"),
)


class _Ran(TypedDict):
    """The fields that every `StageRecord` has."""

    depends_on: Dependencies
    seconds: float
    peak_memory_bytes: int
    outputs: dict[str, str]


@dataclass(frozen=True)
class _Begun:
    """A stage at work."""

    depends_on: Dependencies
    moment: float

    @classmethod
    def now(cls, depends_on: Dependencies) -> _Begun:
        reset_peak_memory()
        return cls(depends_on, time.monotonic())

    def ended(self, outputs: dict[str, str]) -> _Ran:
        return {
            "depends_on": self.depends_on,
            "seconds": time.monotonic() - self.moment,
            "peak_memory_bytes": peak_memory(),
            "outputs": outputs,
        }


class Run:
    """One run of some stages in one output folder.

    Args:
        config: the settings.
        progress: what hears how far it is.
        choose_transform: where neither they nor the prototxt say what happens to the values of pixels, take
            the transform that fits the net's statistics of training.
    """

    def __init__(self, config: Config, progress: Progress = SILENT, choose_transform: bool = False) -> None:
        self.config = config
        self.progress = progress
        self.files = Files.of(config.name)
        self.open_engine = engine_opener(config.engine, config.caffe, config.threads)
        self.net = read_model_prototxt(config)
        self.may_choose = choose_transform
        self.chosen: str | None = None
        self.record: RunRecord | None = None

    @cached_property
    def inputs(self) -> dict[str, str]:
        """The hashes of the model's files."""
        return model_hashes(self.config)

    @property
    def stages(self) -> Stages:
        """What has been done so far, by this run and those before it."""
        return self.record.stages if self.record is not None else Stages()

    def quantize(
        self, stages: Sequence[StageName] = STAGES, resume: bool = False, force: bool = False
    ) -> RunRecord:
        """Run stages in order and write their files.

        Args:
            stages: at least one.
            resume: skip a stage whose files were made from the same inputs, with the same settings, by the
                same version.
            force: do every stage even so.

        Returns:
            What was written to report.json.

        Raises:
            InputError: bad input, or a stage before the first one asked for has not been run.
            LabelfreeError: the work failed.
        """
        with using_threads(self.config.threads):
            for _, look in self.checks(stages):
                look()
            self.choose_transform()
            with closing(OutputFolder(self.config.output)) as self.folder:
                return self._run([s for s in STAGES if s in stages], resume and not force)

    def _run(self, stages: Sequence[StageName], resume: bool) -> RunRecord:
        """Run stages in their order, but for those whose results are there."""
        works: dict[StageName, Callable[[_Begun], AnyStageRecord]] = {
            "weights": self._weights,
            "renorm": self._renorm,
            "activations": self._activations,
        }
        self.record = previous_record(self.config.output, self.config.name, self.progress)
        record: RunRecord | None = None
        for stage in stages:
            depends_on = dependencies(self.config, self.net, self.inputs, stage)
            if resume and self._is_done(stage, depends_on):
                self.progress.note(f"{stage}: skipped, its results fit the inputs and settings")
                continue
            transform = record.transform if record is not None else self._checked_transform()
            if stage == "activations":
                self.__dict__.pop("model", None)  # no longer needed: room for the stage
            record = self._finish(stage, works[stage](_Begun.now(depends_on)), transform)
        record = record or self._renewed(stages)
        if not (self.config.output / PAGE).exists():
            if record.output_sqnr is None:
                found = measure_outputs(self.config, self.net, record, self.open_engine, self.progress)
                record = self._write_record(record.model_copy(update={"output_sqnr": found}))
            show_page(self.folder, self.config, self.net, record, self.progress)
        return record

    def checks(self, stages: Sequence[StageName] = STAGES) -> Checks:
        """What must be right before some stages begin."""
        model = lambda: self.model  # noqa: E731 - read when it is looked at
        return Checks(self.config, self.net, model, self.open_engine, self.progress, stages)

    @cached_property
    def model(self) -> Model:
        """The given model.

        Raises:
            InputError: its caffemodel cannot be read or is damaged.
        """
        files = self.config.model
        return Model.of(self.net, files.weights, files.prototxt)

    def choose_transform(self) -> None:
        """Take the transform that fits, where nobody has said one and the run may choose."""
        calibration = self.config.data.calibration
        fed = calibration is not None and calibration.source is not None
        if self.may_choose and fed and not self.chosen and not says_transform(self.config, self.net):
            self.config, self.chosen = with_chosen_transform(self.config, self.model)
            self.progress.note(f"data.transform: {self.chosen}")

    def transform_check(self) -> TransformCheck | None:
        """How the transform fits the net's statistics of training; None where there are no images."""
        return transform_check(self.config, self.model)

    def _checked_transform(self) -> TransformRecord | None:
        """`transform_check` for the record; what it finds is said."""
        check = self.transform_check()
        if check is None:
            return None
        if check.doubtful:
            self.progress.warn(f"{check.finding}; {check.remedy}")
        elif check.given is None:
            self.progress.note(check.finding)
        return check.record(self.chosen)

    def grids(self) -> tuple[dict[str, GridChoice], Budget | None]:
        """The grid of every layer to quantize; with weights.budget as measured on the calibration images.

        Raises:
            InputError: bad settings or weights, or nothing that a budget could be measured on.
        """
        settings = self.config.weights
        chosen = choices(self.model.inference.net, settings)
        check_kernels(filter_net(self.net, TEST), self.model.weights, chosen)
        if settings.budget is None or self.calibration is None:
            return chosen, None
        scores = class_scores(self.net, "weights.budget")
        return keep_budget(self.model, settings, self.calibration, scores, self.progress)

    def _weights(self, begun: _Begun) -> WeightsRecord:
        model, test = self.model, self.model.inference
        self._check(model.weights)
        settings = self.config.weights
        if not choices(test.net, settings):
            self.progress.note("weights: weights.layers skips every layer; no weights are quantized")
        kept = unquantizable(test.net)
        doubtful = doubtful_norms(test.net, model.weights)
        for line in (*doubtful, *(f"{name} is not quantized: {reason}" for name, reason in kept.items())):
            self.progress.note(f"weights: {line}")
        chosen, budget = self.grids()
        quantized, layers = weights_quan(model, chosen, settings.solver, self.progress, self.calibration)
        outputs = self._write_weights(self.files.quantized, quantized.weights)
        done = {name for layer in layers for name in (layer.name, *layer.shared_by)} | kept.keys()
        skipped = [
            layer.name
            for layer in test.net.layer
            if Trait.KERNELS in traits_of(layer) and layer.name not in done
        ]
        return WeightsRecord(
            **begun.ended(outputs),
            layers=layers,
            skipped=skipped,
            kept=kept,
            doubtful=doubtful,
            budget=budget,
        )

    def _renorm(self, begun: _Begun) -> RenormRecord:
        settings = self.config.renorm
        model = self._read_result(self.files.quantized, "weights")
        if settings.statistics == "paired":
            model = replace(model, full=self.model, solver=self.config.weights.solver)
        feed = self._renorm_feed()
        renormed, shifts = renorm(model, feed, settings, self.open_engine, settings.memory, self.progress)
        if renormed.weights is model.weights:
            self.progress.note("renorm: the net has no BatchNorm layer; its weights are passed through")
        outputs = self._write_weights(self.files.renorm, renormed.weights)
        return RenormRecord(
            **begun.ended(outputs), statistics=settings.statistics, images=len(feed), layers=shifts
        )

    def _activations(self, begun: _Begun) -> ActivationsRecord:
        model = self._read_result(self.files.renorm, "renorm")
        feed = self._activations_feed()
        settings = self.config.activations
        _, found = activations_quan(model, feed, settings, self.open_engine, self.progress)
        if not found:
            self.progress.note("activations: the net has nothing to quantize")
        for activation in (a for a in found if a.dead):
            self.progress.note(f"activations: {activation.name} is dead: 0 on every calibration image")
        return ActivationsRecord(**begun.ended({}), images=len(feed), layers=found)

    @cached_property
    def calibration(self) -> Calibration | None:
        """What the data-aware solver and a budget need; None without them, as nothing else needs images."""
        weights, settings = self.config.weights, self.config.renorm
        if weights.solver != "data_aware" and weights.budget is None:
            return None
        feed = stage_feed(self.config, self.net, "weights", self.progress)
        return Calibration(feed, self.open_engine, settings.memory, settings.statistics)

    def _renorm_feed(self) -> Feed:
        return stage_feed(self.config, self.net, "renorm", self.progress)

    def _activations_feed(self) -> Feed:
        return stage_feed(self.config, self.net, "activations", self.progress)

    def _check(self, weights: Weights) -> None:
        """Check the blobs against the layers, as far as the shapes of inputs and layers are known."""
        one = {blob: (1, *shape) for blob, shape in input_shapes(self.config, self.net).items()}
        known = known_part(InferenceNet.of(self.net).net, one)
        check_weights(known, weights, infer_shapes(known, one))

    def _write_weights(self, name: str, weights: Weights) -> dict[str, str]:
        """Write a caffemodel; its name and hash."""
        with self.folder.writing(name) as file:
            weights.write(file)
        return {name: sha256(self.config.output / name)}

    def _read_result(self, name: str, stage: StageName) -> Model:
        """The model that an earlier stage made.

        Raises:
            InputError: it has not been run, or with another model.
        """
        path = self.config.output / name
        if self.record is None or stage not in self.stages.done or not path.exists():
            raise InputError(
                f"{path}: the result of the stage before this one is not there; run `labelfree quantize`, "
                f"or with `--stages {stage},...`"
            )
        if not made_from(self.record, self.config, self.inputs):
            raise InputError(
                f"{path}: made from another model.prototxt or model.weights; run the weights stage again"
            )
        weights = Weights.read(path)
        self._check(weights)
        return Model(with_alpha_terms(self.net, weights), weights, self.config.model.prototxt)

    def _is_done(self, stage: StageName, depends_on: Dependencies) -> bool:
        """Whether a stage's result is there and still what it would be; if not any more, say why."""
        record = self.stages.done.get(stage)
        if record is None:
            return False
        reasons = changes(record.depends_on, depends_on)
        reasons += [
            f"{name} has changed" for name in record.outputs if not self._has(name, record.outputs[name])
        ]
        if reasons:
            self.progress.note(f"{stage}: done again: {'; '.join(reasons)}")
        return not reasons

    def _has(self, name: str, digest: str) -> bool:
        path = self.config.output / name
        return path.exists() and sha256(path) == digest

    def _finish(self, stage: StageName, done: AnyStageRecord, transform: TransformRecord | None) -> RunRecord:
        """Write the prototxts and the report for what there is now; drop what is behind the stage."""
        self.folder.remove(PAGE)  # lest a run that is killed from here on leaves a page about other results
        written = {"weights": [self.files.quantized], "renorm": [self.files.renorm], "activations": []}
        for later in STAGES[STAGES.index(stage) + 1 :]:
            for name in written[later]:
                self.folder.remove(name)
        stages = self.stages.then(stage, done)
        results = Results(self.config, self.net, stages)
        return self._write_record(
            RunRecord(
                tool=f"labelfree {__version__}",
                name=self.config.name,
                versions={"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}},
                settings=self._settings(STAGES[: STAGES.index(stage)]),
                inputs=self.inputs,
                transform=transform,
                stages=stages,
                prototxts=self._write_prototxts(results.prototxts(self.progress)),
                caffe_test=caffe_test(self.net, self.config),
                sizes=results.sizes(),
                coverage=results.coverage(),
            )
        )

    def _settings(self, kept: Sequence[StageName]) -> Config:
        """The settings of this run, with those of the stages in ``kept`` as they were run with before."""
        if self.record is None:
            return self.config
        return self.config.model_copy(update={stage: getattr(self.record.settings, stage) for stage in kept})

    def _write_record(self, record: RunRecord) -> RunRecord:
        write_record(self.folder, record)
        self.record = record
        return record

    def _renewed(self, stages: Sequence[StageName]) -> RunRecord:
        """The record of a run that had no stage to do, with what has changed that no stage reads.

        Args:
            stages: those that were asked for.
        """
        record = self.record
        if record is None:
            raise ValueError("no stage was asked for")
        prototxts = Results(self.config, self.net, record.stages).prototxts(self.progress)
        digests = {name: hashlib.sha256(text).hexdigest() for name, text in prototxts.items()}
        settings = self._settings([stage for stage in STAGES if stage not in stages])
        same_images = settings.data.validation == record.settings.data.validation
        new = record.model_copy(
            update={
                "settings": settings,
                "prototxts": digests,
                "caffe_test": caffe_test(self.net, self.config),
                "evaluation": record.evaluation if same_images and digests == record.prototxts else None,
            }
        )
        if new.to_json() != record.to_json() or not all(self._has(*file) for file in digests.items()):
            self.progress.note("prototxts: written again")
            self.folder.remove(PAGE)
            self._write_prototxts(prototxts)
            self._write_record(new)
        return new

    def _write_prototxts(self, prototxts: Mapping[str, bytes]) -> dict[str, str]:
        """Write them; their names and hashes."""
        for name, text in prototxts.items():
            with self.folder.writing(name) as file:
                file.write(text)
        return {name: hashlib.sha256(text).hexdigest() for name, text in prototxts.items()}
