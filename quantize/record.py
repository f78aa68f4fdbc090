"""report.json as types: what a run found, stage by stage.

JSON exists at the edge only: `RunRecord.parse` reads it, `RunRecord.to_json` writes it, and in between the
parts of the program hand on these types. A digest in the file tells what labelfree wrote from what somebody
has changed, so that what is read back need not be checked bit by bit.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    JsonValue,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
)

from quantize.settings import Config, StatisticsName

StageName = Literal["weights", "renorm", "activations"]
STAGES: tuple[StageName, ...] = get_args(StageName)
"""In the order in which they run."""
ImagesFrom = Literal["validation", "held_out", "calibration"]
"""What a net was evaluated on: images of data.validation, calibration images that no stage had used, or those
that the stages had used."""

Dependencies = dict[str, JsonValue]
"""What a stage's result depends on: setting or file, and its value or hash."""


# ---- What the stages find ----


@dataclass(frozen=True)
class QuantizedLayer:
    """What stage 1 did to one layer.

    Attributes:
        name: the layer.
        bits: bits per weight.
        grid: name of the grid.
        kernels: number of kernels n.
        weights: number of weights n * k.
        loss: the sum over kernels of ||w - alpha * Q||^2.
        sqnr_db: 10 log10(||w||^2 / loss), None where the loss is 0.
        output_sqnr_db: of the layer's output against full precision, measured by the data-aware solver.
        nearest_sqnr_db: the same with every weight at its nearest level; None with other solvers.
        shared_by: the other layers that have the same weights.
    """

    name: str
    bits: int
    grid: str
    kernels: int
    weights: int
    loss: float
    sqnr_db: float | None
    output_sqnr_db: float | None = None
    nearest_sqnr_db: float | None = None
    shared_by: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Budget:
    """What was found and chosen for ``weights.budget``.

    Attributes:
        limit: the setting, mean bits per weight.
        mean_bits: per weight, over all quantized layers.
        images: how many the divergences are means over.
        divergence: by layer whose bits were free and by bits (a JSON key, so as text), in nats.
    """

    limit: float
    mean_bits: float
    images: int
    divergence: dict[str, dict[str, float]]


@dataclass(frozen=True)
class BatchNormShift:
    """How far the statistics of one BatchNorm layer had moved.

    Attributes:
        name: the layer.
        channels: number of channels.
        values: values per channel that were measured.
        mean_shift: root mean square over channels of (new mean - old mean) / old standard deviation.
        variance_ratio: geometric mean over channels of new variance / old variance.
        dead: number of channels that have one value for all images.
    """

    name: str
    channels: int
    values: int
    mean_shift: float
    variance_ratio: float
    dead: int = 0


@dataclass(frozen=True)
class Reader:
    """One bottom of a layer.

    Attributes:
        layer: the layer.
        bottom: which of its bottoms, from 0.
    """

    layer: str
    bottom: int


@dataclass(frozen=True)
class Quantizer:
    """An ActQuantize layer.

    Attributes:
        name: of the layer.
        step: the quantization step a.
        levels: the largest code.
        signed: whether codes go down to -levels; otherwise to 0.
        readers: who reads what it makes. Empty: everybody, for it takes the place of the ReLU of its name.
    """

    name: str
    step: float
    levels: int
    signed: bool
    readers: list[Reader]

    @property
    def codes(self) -> str:
        """The codes, for people."""
        return f"{-self.levels if self.signed else 0}..{self.levels}"


@dataclass(frozen=True)
class QuantizedActivation(Quantizer):
    """What stage 3 found for one site: an ActQuantize layer and what it was fitted to.

    Attributes:
        behind: the layer that makes the values; of an input of the net the input's name.
        clipped: share of all values beyond the last code by half a step or more.
        minimum: the least value.
        maximum: the largest value.
        sqnr_db: 10 log10(||x||^2 / ||x - a * q||^2), None where the values are 0 or the loss is.
        dead: whether every value was 0.
        histogram: how many values that are not 0 lie in each of equally wide parts of ``minimum`` to
            ``maximum``.
    """

    behind: str
    clipped: float
    minimum: float
    maximum: float
    sqnr_db: float | None
    dead: bool
    histogram: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Coverage:
    """How much of the net's work is quantized.

    Attributes:
        macs: multiply-accumulates per image, of all layers whose shapes are known.
        weights: share of them with quantized weights, 0 to 1.
        inputs: share whose inputs are on codes.
        both: share with both.
        in_float: by layer with work of which one or the other is not so the reason.
    """

    macs: int
    weights: float
    inputs: float
    both: float
    in_float: dict[str, str]


# ---- What is measured on the nets ----


@dataclass(frozen=True)
class TransformFit:
    """How what the first BatchNorms see with one transform compares with what they stored in training.

    Attributes:
        transform: in words.
        mean_shift: root mean square over channels of (mean - stored mean) / stored deviation.
        variance_ratio: geometric mean over channels of variance / stored variance.
        misfit: mean over channels of the Kullback-Leibler divergence of the stored normal distribution from
            the one seen, in nats; 0: the same.
    """

    transform: str
    mean_shift: float
    variance_ratio: float
    misfit: float


@dataclass(frozen=True)
class TransformRecord:
    """What the transform check found.

    Attributes:
        chosen: which transform was chosen, and why; None where the user or the prototxt says it.
        layers: the BatchNorms looked at.
        images: how many images were looked at; 0 where nothing could be checked.
        given: the transform in question; None where nothing could be checked.
        tried: other transforms.
        doubtful: whether the given transform is probably not the one of training.
        finding: all that, in a sentence.
        remedy: what to do where it is doubtful, else empty.
    """

    chosen: str | None
    layers: list[str]
    images: int
    given: TransformFit | None
    tried: list[TransformFit]
    doubtful: bool
    finding: str
    remedy: str


@dataclass(frozen=True)
class LayerSqnr:
    """Output of one layer against full precision.

    Attributes:
        name: the layer.
        sqnr_db: 10 log10(||full||^2 / ||full - own||^2) by version; None where either is 0.
    """

    name: str
    sqnr_db: dict[str, float | None]


@dataclass(frozen=True)
class OutputSqnr:
    """The outputs of all quantized layers against full precision, measured on a few calibration images."""

    images: int
    layers: list[LayerSqnr]


@dataclass(frozen=True)
class Accuracy:
    """Percent of the images whose label is the best class, and among the five best; None without labels."""

    top1: float | None
    top5: float | None


@dataclass(frozen=True)
class Closeness:
    """How close the scores of a net are to those of full precision, over all images.

    Attributes:
        agreement: percent of the images on which both put the same class first.
        divergence: mean Kullback-Leibler divergence of the softmax of the scores from that of full
            precision, in nats: 0 where every probability is the same.
        sqnr_db: 10 log10(||full||^2 / ||full - own||^2) of the scores, None where the loss is 0.
    """

    agreement: float
    divergence: float
    sqnr_db: float | None


@dataclass(frozen=True)
class Evaluation:
    """Percent over ``images`` images.

    Attributes:
        images: how many.
        accuracy: by candidate.
        closeness: to the first candidate, by the name of every other one.
        classes: scores per image.
        images_from: which images these are.
    """

    images: int
    accuracy: dict[str, Accuracy]
    closeness: dict[str, Closeness]
    classes: int
    images_from: ImagesFrom = "validation"

    @property
    def agreement(self) -> float:
        """The last candidate's agreement with the first."""
        return list(self.closeness.values())[-1].agreement


# ---- The record of a run ----


class Part(BaseModel):
    """A part of the record. Its JSON has no unknown keys, and none for what there is not."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_serializer(mode="wrap")
    def _without_what_there_is_not(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in handler(self).items() if value is not None}


class StageRecord(Part):
    """How a stage ran.

    Attributes:
        depends_on: what its result depends on; `--resume` does the stage again where any of it has changed.
        seconds: wall time.
        peak_memory_bytes: of the process, while the stage ran.
        outputs: sha256 of the files that the stage wrote, by name.
    """

    depends_on: Dependencies
    seconds: float
    peak_memory_bytes: int
    outputs: dict[str, str]


class WeightsRecord(StageRecord):
    """Stage 1.

    Attributes:
        layers: those quantized.
        skipped: those that the settings leave as they are.
        kept: those that cannot be quantized, and why.
        doubtful: lines about BatchNorms that cannot have come out of training so.
        budget: how a budget was spent.
    """

    layers: list[QuantizedLayer]
    skipped: list[str]
    kept: dict[str, str]
    doubtful: list[str]
    budget: Budget | None = None


class RenormRecord(StageRecord):
    """Stage 2: which statistics were measured, on how many images, and what every BatchNorm found."""

    statistics: StatisticsName
    images: int
    layers: list[BatchNormShift]


class ActivationsRecord(StageRecord):
    """Stage 3: how many images were measured, and the step and codes of every site."""

    images: int
    layers: list[QuantizedActivation]


AnyStageRecord = WeightsRecord | RenormRecord | ActivationsRecord


class Stages(Part):
    """The stages that have run; None for those that have not."""

    weights: WeightsRecord | None = None
    renorm: RenormRecord | None = None
    activations: ActivationsRecord | None = None

    @property
    def done(self) -> dict[StageName, AnyStageRecord]:
        """Those that have run, in their order."""
        records: tuple[AnyStageRecord | None, ...] = (self.weights, self.renorm, self.activations)
        return {name: record for name, record in zip(STAGES, records, strict=True) if record is not None}

    def then(self, name: StageName, record: AnyStageRecord) -> Stages:
        """Those before a stage, and the stage: what was behind it is obsolete."""
        before = STAGES[: STAGES.index(name)]
        kept: dict[str, AnyStageRecord] = {n: r for n, r in self.done.items() if n in before}
        return Stages().model_copy(update={**kept, name: record})

    @property
    def missing(self) -> list[StageName]:
        """Those that have not run."""
        return [name for name in STAGES if name not in self.done]


class Sizes(Part):
    """Bytes of the model: as given, as written, and packed at the bits chosen."""

    model: int
    written: int
    packed: int


class RunRecord(Part):
    """The content of report.json.

    Attributes:
        format: of the file; version 0.1 of labelfree wrote no number.
        tool: name and version of what wrote it.
        name: of the run: the prefix of its files.
        versions: of Python and the libraries.
        settings: what the stages were run with.
        inputs: sha256 of the model's files.
        transform: what was found about it before the first stage.
        stages: what each has found.
        prototxts: sha256 of the prototxts, by name.
        sizes: of the model.
        coverage: how much of the net's work is quantized; None where no shapes are known.
        output_sqnr: of every quantized layer.
        evaluation: what `labelfree evaluate` has found for these stages.
    """

    format: Literal[2] = 2
    tool: str
    name: str
    versions: dict[str, str]
    settings: Config
    inputs: dict[str, str]
    stages: Stages
    prototxts: dict[str, str]
    sizes: Sizes
    coverage: Coverage | None = None
    transform: TransformRecord | None = None
    output_sqnr: OutputSqnr | None = None
    evaluation: Evaluation | None = None

    @property
    def outputs(self) -> dict[str, str]:
        """sha256 of all files by name, report.json and report.html apart."""
        written = [stage.outputs for stage in self.stages.done.values()]
        return {name: digest for files in (*written, self.prototxts) for name, digest in files.items()}

    def to_json(self, indent: int | None = None) -> str:
        """The text of report.json, with its digest."""
        content = self.model_dump(mode="json")
        return json.dumps({**content, "digest": _digest(content)}, indent=indent)

    @classmethod
    def parse(cls, text: bytes) -> RunRecord:
        """A record as it was written.

        Raises:
            ValueError: it is not a report of labelfree, somebody has changed it, or another version wrote it.
        """
        content: object = None
        try:
            content = json.loads(text)
            ours = isinstance(content, dict) and content.pop("digest", None) == _digest(content)
        except (ValueError, RecursionError):
            ours = False
        if not ours or not isinstance(content, dict):
            raise ValueError("not a report of labelfree, or changed since")
        try:
            return cls.model_validate(content)
        except ValidationError:
            raise ValueError(f"written by {content.get('tool')}, another version of labelfree") from None


def _digest(content: dict[str, Any]) -> str:
    """A hash of everything else in a report."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
