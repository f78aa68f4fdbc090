"""What the result of each stage depends on: `--resume` does a stage again where any of it has changed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

from pydantic import BaseModel, JsonValue

from quantize import __version__
from quantize.caffenet import TEST, TRAIN, NetParameter
from quantize.errors import InputError
from quantize.files import open_file
from quantize.host import available_threads
from quantize.job.feeds import effective_transform
from quantize.job.inputs import image_input
from quantize.job.output import Files
from quantize.record import STAGES, Dependencies, RunRecord, StageName
from quantize.settings import Config

READ_BLOCK = 1 << 20
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
    "renorm.augment": WITH_IMAGES,
    "renorm.memory": {"weights": DATA_AWARE_OR_BUDGET, "renorm": ALWAYS},
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
    "data.seed": WITH_IMAGES,
    "engine": WITH_IMAGES,
    "caffe": WITH_IMAGES,
    "threads": WITH_IMAGES,
}
"""Settings and files, and which stage's result depends on them. Memory and threads are among them because
they decide in which order sums are added up: they change the last digits."""
MODEL_FILES = ("model.prototxt", "model.caffe_proto", "model.weights")
READ_BY_NO_STAGE = ("name", "output", "data.validation")


def model_hashes(config: Config) -> dict[str, str]:
    """The sha256 of every file of the section ``model``, by its key there.

    Raises:
        InputError: a file cannot be read.
    """
    model = config.model
    paths = {"prototxt": model.prototxt, "weights": model.weights, "caffe_proto": model.caffe_proto}
    return {key: sha256(path) for key, path in paths.items() if path is not None}


def made_from(record: RunRecord, config: Config, inputs: Mapping[str, str]) -> bool:
    """Whether results were made from the model that a configuration names.

    Args:
        record: of the results.
        config: the settings.
        inputs: the configuration's `model_hashes`.
    """
    before, now = record.settings.model, config.model
    return record.inputs == inputs and (before.stages, before.level) == (now.stages, now.level)


def dependencies(
    config: Config, net: NetParameter, inputs: Mapping[str, str], stage: StageName
) -> Dependencies:
    """What the result of a stage depends on, by `READ`: the settings' values and the files' hashes.

    Args:
        config: the settings.
        net: the net to quantize, with all its phases.
        inputs: its `model_hashes`.
        stage: the stage.

    Raises:
        InputError: a file cannot be read.
    """
    read = [what for what, stages in READ.items() if stage in stages and stages[stage].holds(config)]
    return {what: _value(config, net, inputs, stage, what) for what in read}


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


def _value(
    config: Config, net: NetParameter, inputs: Mapping[str, str], stage: StageName, what: str
) -> JsonValue:
    if what == "version":
        return __version__
    if what in MODEL_FILES:
        return inputs.get(what.removeprefix("model."))
    if what == STAGE_BEFORE:
        files = Files.of(config.name)
        path = config.output / (files.quantized if stage == "renorm" else files.renorm)
        return sha256(path) if path.exists() else None
    if what == IMAGES_INPUT:
        return image_input(config, net)
    setting: object = reduce(getattr, what.split("."), config)
    if what == "data.calibration":
        return {"setting": _json(setting), "files": _fingerprint(config)}
    if what == "data.transform":
        return {"setting": _json(setting), "mean_file": _mean_files(config, net)}
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


def _mean_files(config: Config, net: NetParameter) -> JsonValue:
    """Hashes of the mean images that are subtracted, which the prototxt may name too."""
    found = {effective_transform(net, phase, config).mean_file for phase in (TRAIN, TEST)}
    return [sha256(path) for path in sorted(path for path in found if path is not None)]


def _fingerprint(config: Config) -> JsonValue:
    """A hash of what identifies the calibration images: names, sizes and times of their files."""
    if config.data.calibration is None:
        return None
    calibration = config.data.calibration
    paths = [path for path in (calibration.source, *calibration.inputs.values()) if isinstance(path, Path)]
    try:
        entries = [entry for path in paths for entry in _identities(path)]
    except OSError as error:
        raise InputError(f"{error.filename}: cannot read: {error.strerror}; check the path") from error
    return hashlib.sha256(json.dumps(entries).encode()).hexdigest()


def _identities(source: Path) -> Iterator[tuple[str, int, int]]:
    for path in sorted(source.rglob("*")) if source.is_dir() else [source]:
        if path.name != "lock.mdb":
            status = path.stat()
            yield str(path), status.st_size, status.st_mtime_ns


def sha256(path: Path) -> str:
    """The hash of a file's content.

    Raises:
        InputError: the file cannot be read.
    """
    digest = hashlib.sha256()
    with open_file(path, "file") as file:
        while block := file.read(READ_BLOCK):
            digest.update(block)
    return digest.hexdigest()
