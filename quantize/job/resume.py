"""What the result of each stage depends on: `--resume` does a stage again where any of it has changed."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial, reduce
from pathlib import Path

from pydantic import BaseModel, JsonValue

from quantize import __version__
from quantize.caffenet import TEST, TRAIN
from quantize.errors import InputError
from quantize.files import sha256
from quantize.host import available_threads
from quantize.job.feeds import calibration_phase, effective_transform, resizing, stage_images
from quantize.job.given import Given
from quantize.job.inputs import image_input
from quantize.record import STAGES, Dependencies, RunRecord, StageName
from quantize.settings import Config

LONGEST_SHOWN = 60


@dataclass(frozen=True)
class When:
    """When a stage reads something.

    Attributes:
        text: to follow "read".
        holds: whether it does so with these settings.
    """

    text: str
    holds: Callable[[Config], bool]


def _uses_images(config: Config) -> bool:
    return config.weights.solver == "data_aware" or config.weights.budget is not None


ALWAYS = When("always", lambda _: True)
DATA_AWARE_OR_BUDGET = When("with `weights.solver: data_aware` or `weights.budget`", _uses_images)
PAIRED = When("with `renorm.statistics: paired`", lambda config: config.renorm.statistics == "paired")

EVERY: Mapping[StageName, When] = dict.fromkeys(STAGES, ALWAYS)
WEIGHTS: Mapping[StageName, When] = {"weights": ALWAYS}
ACTIVATIONS: Mapping[StageName, When] = {"activations": ALWAYS}
WITH_IMAGES: Mapping[StageName, When] = {**EVERY, "weights": DATA_AWARE_OR_BUDGET}

STAGE_BEFORE = "the stage before"
IMAGES_INPUT = "the images' input"
READ: Mapping[str, Mapping[StageName, When]] = {
    "version": EVERY,
    "model.prototxt": EVERY,
    "model.caffe_proto": EVERY,
    "model.write": EVERY,
    "model.stages": EVERY,
    "model.level": EVERY,
    "model.weights": {"weights": ALWAYS, "renorm": PAIRED},
    STAGE_BEFORE: {"renorm": ALWAYS, "activations": ALWAYS},
    "weights.bits": WEIGHTS,
    "weights.grid": WEIGHTS,
    "weights.budget": WEIGHTS,
    "weights.solver": {"weights": ALWAYS, "renorm": PAIRED},
    "weights.images": {"weights": DATA_AWARE_OR_BUDGET},
    "weights.first_last": WEIGHTS,
    "weights.depthwise": WEIGHTS,
    "weights.layers": WEIGHTS,
    "renorm.statistics": {"weights": DATA_AWARE_OR_BUDGET, "renorm": ALWAYS},
    "renorm.images": {"renorm": ALWAYS},
    "renorm.bias_correction": {"renorm": PAIRED},
    "activations.bits": ACTIVATIONS,
    "activations.levels": ACTIVATIONS,
    "activations.scope": ACTIVATIONS,
    "activations.input": ACTIVATIONS,
    "activations.sums": ACTIVATIONS,
    "activations.images": ACTIVATIONS,
    "activations.solver": ACTIVATIONS,
    "data.calibration": WITH_IMAGES,
    IMAGES_INPUT: WITH_IMAGES,
    "data.transform": WITH_IMAGES,
    "data.input_shape": WITH_IMAGES,
    "data.augment": WITH_IMAGES,
    "data.seed": WITH_IMAGES,
    "engine": WITH_IMAGES,
    "caffe": WITH_IMAGES,
    "threads": WITH_IMAGES,
    "memory": {"weights": DATA_AWARE_OR_BUDGET, "renorm": ALWAYS},
}
"""Settings and files, and which stage's result depends on them. Memory and threads are among them because
they decide in which order sums are added up: they change the last digits."""
MODEL_FILES = ("model.prototxt", "model.caffe_proto", "model.weights")


def made_from(record: RunRecord, given: Given) -> bool:
    """Whether the results that a record is about were made from a job's model."""
    before, now = record.settings.model, given.config.model
    return record.inputs == given.hashes and (before.stages, before.level) == (now.stages, now.level)


def dependencies(given: Given, stage: StageName, before: str | None = None) -> Dependencies:
    """What the result of a stage depends on, by `READ`: the settings' values and the files' hashes.

    Args:
        given: what the job starts from.
        stage: the stage.
        before: sha256 of what the stage before has written; None: it has not run.

    Raises:
        InputError: a file cannot be read.
    """
    read = [what for what, stages in READ.items() if stage in stages and stages[stage].holds(given.config)]
    return {what: before if what == STAGE_BEFORE else _value(given, stage, what) for what in read}


def changes(before: Dependencies, now: Dependencies) -> list[str]:
    """What has changed, one text each: ``renorm.images was 20, is 19``."""
    return [
        f"{what} {_change(before.get(what), now.get(what))}"
        for what in dict.fromkeys([*now, *before])
        if before.get(what) != now.get(what)
    ]


def _change(before: JsonValue, now: JsonValue) -> str:
    texts = [json.dumps(value) for value in (before, now)]
    if isinstance(now, dict) or any(len(text) > LONGEST_SHOWN for text in texts):
        return "has changed"
    return "was {}, is {}".format(*texts)


def _value(given: Given, stage: StageName, what: str) -> JsonValue:
    config = given.config
    if what == "version":
        return __version__
    if what in MODEL_FILES:
        return given.hashes.get(what.removeprefix("model."))
    if what == IMAGES_INPUT:
        return image_input(given)
    setting: object = reduce(getattr, what.split("."), config)
    if what == "data.calibration":
        return {"setting": _json(setting), "files": _fingerprint(given, stage)}
    if what == "data.transform":
        return {"setting": _json(setting), "mean_file": _mean_files(given), "resized": _resized(given)}
    if what == "threads":
        return available_threads()
    if what == "engine":
        return "onnx" if config.engine == "auto" else config.engine
    if what == "caffe" and config.engine != "caffe":
        return None
    return _json(setting)


def _json(setting: object) -> JsonValue:
    """A setting as JSON."""
    if isinstance(setting, BaseModel):
        dumped: JsonValue = setting.model_dump(mode="json")
        return dumped
    if isinstance(setting, dict):
        return {key: _json(value) for key, value in setting.items()}
    if isinstance(setting, list):
        return [_json(value) for value in setting]
    assert setting is None or isinstance(setting, str | int | float)
    return setting


def _mean_files(given: Given) -> JsonValue:
    """Hashes of the mean images that are subtracted, which the prototxt may name too."""
    found = {effective_transform(given, phase).mean_file for phase in (TRAIN, TEST)}
    paths = sorted(path for path in found if path is not None)
    return [given.once(path, partial(sha256, path)) for path in paths]


def _resized(given: Given) -> JsonValue:
    """What image files are resized to where nobody has said it: a few of all files decide."""
    calibration = given.config.data.calibration
    if calibration is None or calibration.source is None:
        return None
    transform = effective_transform(given, calibration_phase(given.config))
    found = resizing(given, calibration.source, transform)
    return found[1] if found is not None else None


def _fingerprint(given: Given, stage: StageName) -> JsonValue:
    """A hash of what identifies the images that a stage looks at: names, sizes and times of their files."""
    calibration = given.config.data.calibration
    if calibration is None:
        return None
    files: list[str] = []
    if calibration.source is not None:
        files += given.source(calibration.source).files(range(stage_images(given, stage)))
    paths = [path for path in calibration.inputs.values() if isinstance(path, Path)]
    try:
        files += [str(file) for path in paths for file in _files_of_values(path)]
        entries = [
            (file, status.st_size, status.st_mtime_ns) for file in files for status in (os.stat(file),)
        ]
    except OSError as error:
        raise InputError(f"{error.filename}: cannot read: {error.strerror}; check the path") from error
    return hashlib.sha256(json.dumps(entries).encode()).hexdigest()


def _files_of_values(path: Path) -> list[Path]:
    return sorted(path.rglob("*")) if path.is_dir() else [path]
