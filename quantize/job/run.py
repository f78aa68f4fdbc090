"""weights_quan -> renorm -> activations_quan: what a run reads, writes and skips.

Every stage leaves whole files behind, so that a later run can go on from any of them:

- weights: ``NAME_quantized.caffemodel``
- renorm: ``NAME_renorm.caffemodel``
- activations: nothing but the prototxts

and every stage rewrites ``NAME_val.prototxt``, ``NAME_deploy.prototxt`` and ``report.json``. When the last
stage asked for is over, ``report.html`` is made from the latter.
A stage that is done again makes the results of the stages behind it obsolete; they are removed.

Within a run a model goes from stage to stage in memory, and so to the report.
"""

from __future__ import annotations

import hashlib
import platform
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from typing import TypedDict

from quantize import __version__
from quantize.caffenet import NetParameter
from quantize.caffenet.model import Model
from quantize.errors import InputError
from quantize.host import peak_memory, reset_peak_memory, using_threads
from quantize.job.checks import Checks
from quantize.job.evaluation import measure_outputs
from quantize.job.feeds import input_shapes, stage_feed
from quantize.job.given import Given
from quantize.job.output import Files, OutputFolder
from quantize.job.prototxts import caffe_test
from quantize.job.results import Results
from quantize.job.resume import changes, dependencies, made_from
from quantize.job.store import PAGE, previous_record, show_page, write_record
from quantize.job.transforms import says_transform, transform_check, with_chosen_transform
from quantize.job.work import Work
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
from quantize.settings import MOVED, Config, GridChoice

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
        self.given = Given(config)
        self.progress = progress
        self.files = Files.of(config.name)
        self.may_choose = choose_transform
        self.chosen: str | None = None
        self.record: RunRecord | None = None

    @property
    def config(self) -> Config:
        """The settings."""
        return self.given.config

    @property
    def net(self) -> NetParameter:
        """The given net with all its phases."""
        return self.given.net

    @property
    def work(self) -> Work:
        """The stages."""
        return Work.of(self.config, lambda stage: stage_feed(self.given, stage, self.progress), self.progress)

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
        with using_threads(self.config.threads), closing(self.given):
            for name in sorted(MOVED.keys() & self.config.renorm.model_fields_set):
                self.progress.note(f"renorm.{name} holds for every stage; write {MOVED[name]} instead")
            for _, look in self.checks(stages):
                look()
            self.choose_transform()
            with closing(OutputFolder(self.config.output)) as self.folder:
                return self._run([s for s in STAGES if s in stages], resume and not force)

    # ---- Checks ----

    def checks(self, stages: Sequence[StageName] = STAGES) -> Checks:
        """What must be right before some stages begin."""
        return Checks(self.given, self.work.open_engine, self.progress, stages)

    def choose_transform(self) -> None:
        """Take the transform that fits, where nobody has said one and the run may choose."""
        calibration = self.config.data.calibration
        fed = calibration is not None and calibration.source is not None
        if self.may_choose and fed and not self.chosen and not says_transform(self.config, self.net):
            config, self.chosen = with_chosen_transform(self.given)
            self.given = self.given.with_config(config)
            self.progress.note(f"data.transform: {self.chosen}")

    def transform_check(self) -> TransformCheck | None:
        """How the transform fits the net's statistics of training; None where there are no images."""
        return transform_check(self.given, self.given.model)

    @cached_property
    def _transform(self) -> TransformRecord | None:
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
        """The grid of every layer to quantize; see `Work.grids`."""
        return self.work.grids(self.given.model)

    # ---- Stages ----

    def _run(self, stages: Sequence[StageName], resume: bool) -> RunRecord:
        """Run stages in their order, but for those whose results are there, and make the report."""
        self.record = previous_record(self.config.output, self.config.name, self.progress)
        self.results = Results(self.given, self.record.stages if self.record is not None else Stages())
        done = [stage for stage in stages if self._do(stage, resume)]
        renewed = not done and self._renew(stages)
        assert self.record is not None
        if done or renewed or not (self.config.output / PAGE).exists():
            self._report(self.record)
        return self.record

    def _do(self, stage: StageName, resume: bool) -> bool:
        """Do a stage and write its files; whether there was anything to do."""
        earlier = STAGES[: STAGES.index(stage)]
        before = self.files.of_stage[earlier[-1]] if earlier else None
        depends_on = dependencies(self.given, stage, self.folder.digest(before) if before else None)
        if resume and self._is_done(stage, depends_on):
            self.progress.note(f"{stage}: skipped, its results fit the inputs and settings")
            return False
        transform = self._transform
        work = {"weights": self._weights, "renorm": self._renorm, "activations": self._activations}[stage]
        model, record = work(_Begun.now(depends_on))
        self._finish(stage, self.results.then(stage, record, model), transform)
        return True

    def _is_done(self, stage: StageName, depends_on: Dependencies) -> bool:
        """Whether a stage's result is there and still what it would be; if not any more, say why."""
        record = self.results.stages.done.get(stage)
        if record is None:
            return False
        reasons = changes(record.depends_on, depends_on)
        reasons += [
            f"{name} has changed"
            for name, digest in record.outputs.items()
            if self.folder.digest(name) != digest
        ]
        if reasons:
            self.progress.note(f"{stage}: done again: {'; '.join(reasons)}")
        return not reasons

    def _weights(self, begun: _Begun) -> tuple[Model, AnyStageRecord]:
        model, found = self.work.weights(self._checked(self.given.model))
        outputs = self._write_weights(self.files.quantized, model)
        return model, WeightsRecord(
            **begun.ended(outputs),
            layers=found.layers,
            skipped=found.skipped,
            kept=found.kept,
            doubtful=found.doubtful,
            budget=found.budget,
        )

    def _renorm(self, begun: _Begun) -> tuple[Model, AnyStageRecord]:
        model, statistics = self._result("weights"), self.config.renorm.statistics
        if statistics == "paired":
            model = replace(model, full=self.given.model, solver=self.config.weights.solver)
        model, shifts, images = self.work.renorm(model)
        outputs = self._write_weights(self.files.renorm, model)
        return model, RenormRecord(
            **begun.ended(outputs), statistics=statistics, images=images, layers=shifts
        )

    def _activations(self, begun: _Begun) -> tuple[Model, AnyStageRecord]:
        model, found, images = self.work.activations(self._result("renorm"))
        return model, ActivationsRecord(**begun.ended({}), images=images, layers=found)

    def _result(self, stage: StageName) -> Model:
        """The model that an earlier stage made.

        Raises:
            InputError: it has not been run, or with another model.
        """
        path = self.config.output / self.files.of_stage[stage]
        if self.record is None or stage not in self.results.stages.done or not path.exists():
            raise InputError(
                f"{path}: the result of the stage before this one is not there; run `labelfree quantize`, "
                f"or with `--stages {stage},...`"
            )
        if not made_from(self.record, self.given):
            raise InputError(
                f"{path}: made from another model.prototxt or model.weights; run the weights stage again"
            )
        return self._checked(self.results.after(stage))

    def _checked(self, model: Model) -> Model:
        """The model, checked as far as the shapes of inputs and layers are known."""
        return model.checked(input_shapes(self.given))

    # ---- Files ----

    def _finish(self, stage: StageName, results: Results, transform: TransformRecord | None) -> None:
        """Write the prototxts and the report for what there is now; drop what is behind the stage."""
        self.folder.remove(PAGE)  # lest a run that is killed from here on leaves a page about other results
        for later in STAGES[STAGES.index(stage) + 1 :]:
            if later in self.files.of_stage:
                self.folder.remove(self.files.of_stage[later])
        self.results = results
        self._write_record(
            RunRecord(
                tool=f"labelfree {__version__}",
                name=self.config.name,
                versions={"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}},
                settings=self._settings(STAGES[: STAGES.index(stage)]),
                inputs=self.given.hashes,
                transform=transform,
                stages=results.stages,
                prototxts=self._write_prototxts(results.prototxts(self.progress)),
                caffe_test=caffe_test(self.given),
                sizes=results.sizes(),
                coverage=results.coverage(),
            )
        )

    def _settings(self, kept: Sequence[StageName]) -> Config:
        """The settings of this run, with those of the stages in ``kept`` as they were run with before."""
        if self.record is None:
            return self.config
        return self.config.model_copy(update={stage: getattr(self.record.settings, stage) for stage in kept})

    def _renew(self, stages: Sequence[StageName]) -> bool:
        """Write again what no stage reads, where it has changed and no stage was done; whether it has.

        Args:
            stages: those that were asked for.
        """
        record = self.record
        if record is None:
            raise ValueError("no stage was asked for")
        prototxts = self.results.prototxts(self.progress)
        digests = {name: hashlib.sha256(text).hexdigest() for name, text in prototxts.items()}
        settings = self._settings([stage for stage in STAGES if stage not in stages])
        same_images = settings.data.validation == record.settings.data.validation
        new = record.model_copy(
            update={
                "settings": settings,
                "prototxts": digests,
                "caffe_test": caffe_test(self.given),
                "evaluation": record.evaluation if same_images and digests == record.prototxts else None,
            }
        )
        as_written = all(self.folder.digest(name) == digest for name, digest in digests.items())
        if as_written and new.to_json() == record.to_json():
            return False
        self.progress.note("prototxts: written again")
        self.folder.remove(PAGE)
        self._write_prototxts(prototxts)
        self._write_record(new)
        return True

    def _report(self, record: RunRecord) -> None:
        """Measure the output of every layer, where that has not been done, and make the page."""
        if record.output_sqnr is None:
            found = measure_outputs(self.results, self.work.open_engine, self.progress)
            record = self._write_record(record.model_copy(update={"output_sqnr": found}))
        show_page(self.folder, self.results, record, self.progress)

    def _write_record(self, record: RunRecord) -> RunRecord:
        write_record(self.folder, record)
        self.record = record
        return record

    def _write_weights(self, name: str, model: Model) -> dict[str, str]:
        """Write a caffemodel; its name and hash."""
        return {name: self.folder.write(name, model.weights.write)}

    def _write_prototxts(self, prototxts: Mapping[str, bytes]) -> dict[str, str]:
        """Write them; their names and hashes."""
        return {name: self.folder.write(name, text) for name, text in prototxts.items()}
