"""report.json as types: what a run found, stage by stage.

JSON exists at the edge only: `RunRecord.parse` reads it, `RunRecord.to_json` writes it, and in between the
parts of the program hand on these types. A digest in the file tells what labelfree wrote from what somebody
has changed, so that what is read back need not be checked bit by bit.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
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
    """What the stage weights did to one layer.

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
class QuantizerLayer:
    """An ActQuantize layer and its place.

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
class QuantizedActivation(QuantizerLayer):
    """What the stage activations found for one site: an ActQuantize layer and what it was fitted to.

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
    """How often a net is right on the images with a label; all is None without any.

    Attributes:
        top1: percent of them whose label is the best class.
        top5: percent of them whose label is among the five best.
        top1_interval: what top1 may be on other images like these, 95 % (Wilson), in percent.
        right: on which images top-1 is right: bits in their order, most significant first, as base64.
    """

    top1: float | None
    top5: float | None
    top1_interval: tuple[float, float] | None = None
    right: str | None = None


@dataclass(frozen=True)
class Paired:
    """Top-1 of two nets on the same images; in an evaluation the first one is full precision.

    Attributes:
        first_only: images on which the first alone is right.
        second_only: images on which the second alone is right.
        p_value: how probable it is that two equally good nets differ so much (McNemar, exact, two-sided).
    """

    first_only: int
    second_only: int
    p_value: float


@dataclass(frozen=True)
class Closeness:
    """How close a blob of a net is to that of full precision, over all images.

    Attributes:
        agreement: percent of the places at which both put the same class first; None where there are no
            class scores.
        divergence: mean Kullback-Leibler divergence of the softmax of the scores from that of full
            precision, in nats: 0 where every probability is the same; None likewise.
        sqnr_db: 10 log10(||full||^2 / ||full - own||^2), None where the loss is 0.
    """

    agreement: float | None
    divergence: float | None
    sqnr_db: float | None


@dataclass(frozen=True)
class OutputCloseness:
    """One output of the nets.

    Attributes:
        blob: its name; of a Softmax that of what it reads.
        classes: scores per place; None where it holds no class scores.
        places: per image, each with scores of its own; 1 for a classifier.
        presumed: whether it counts as class scores because an InnerProduct makes it, and for nothing else.
        closeness: by candidate, full precision apart.
    """

    blob: str
    classes: int | None
    places: int | None
    presumed: bool
    closeness: dict[str, Closeness]


@dataclass(frozen=True)
class Evaluation:
    """Nets on the same images.

    Attributes:
        images: how many.
        labeled: how many of them have a label that accuracy could be counted with.
        accuracy: by candidate: ``fp32``, perhaps ``without_renorm``, and ``quantized``.
        outputs: how close they are to full precision, in network order.
        scores: the output that accuracy and agreement are about; None where the net has no class scores, or
            several that none stands out of.
        paired: top-1 against that of full precision, by candidate; empty without labels.
        missing: stages that have not run: the quantized net is an unfinished one.
        images_from: which images these are.
        labels_hash: of their labels, where accuracy was counted: tells the same images from others.
    """

    images: int
    labeled: int
    accuracy: dict[str, Accuracy]
    outputs: list[OutputCloseness]
    scores: str | None
    paired: dict[str, Paired] = field(default_factory=dict)
    missing: list[StageName] = field(default_factory=list)
    images_from: ImagesFrom = "validation"
    labels_hash: str | None = None

    @property
    def main(self) -> OutputCloseness | None:
        """The output that accuracy and agreement are about."""
        return next((output for output in self.outputs if output.blob == self.scores), None)

    @property
    def closeness(self) -> dict[str, Closeness]:
        """Of the main output, by candidate; empty where there is none."""
        return self.main.closeness if self.main is not None else {}

    @property
    def agreement(self) -> float | None:
        """The quantized net's agreement with full precision; None where there are no class scores."""
        close = self.closeness.get("quantized")
        return close.agreement if close is not None else None

    @property
    def classes(self) -> int:
        """Of the main output; 0 where there is none."""
        return (self.main.classes if self.main is not None else None) or 0


# ---- What is exported ----


@dataclass(frozen=True)
class Kernels:
    """How many layers with weights a runtime computes in integers, and how many in floats."""

    integer: int
    floating: int


@dataclass(frozen=True)
class FileComparison:
    """An exported file against what it was made from.

    Attributes:
        images: on how many.
        sqnr_db: of the scores, relative to those of the quantized net in labelfree's engine; None: the same.
        agreement: percent of the images on which both put the same class first; None without classes.
        seconds: that an image takes, the median; one image at a time.
        float_seconds: the same of the net in full precision, in the same runtime, the two taking turns.
        kernels: how much the runtime does in integers.
    """

    images: int
    sqnr_db: float | None
    agreement: float | None
    seconds: float
    float_seconds: float
    kernels: Kernels


@dataclass(frozen=True)
class Export:
    """Files that the results have been exported to.

    Attributes:
        target: the kind of files, as `labelfree export` calls it.
        runtime: that opens them, as `labelfree evaluate` calls it; None where none does.
        folder: where they are.
        files: their bytes by name.
        model_bytes: of those that are the model; None where they are tables for another one.
        float_bytes: of the net in full precision, exported the same way.
        in_float: the layers with weights that stay in float, and why.
        notes: what else there is to know.
        comparison: None where there are no images, or the runtime is not installed.
    """

    target: str
    runtime: str | None
    folder: Path
    files: dict[str, int]
    model_bytes: int | None
    float_bytes: int | None
    in_float: dict[str, str]
    notes: tuple[str, ...] = ()
    comparison: FileComparison | None = None

    @property
    def paths(self) -> dict[Path, int]:
        """The files' bytes by path."""
        return {self.folder / name: size for name, size in self.files.items()}

    @property
    def in_float_by_reason(self) -> dict[str, list[str]]:
        """The layers that stay in float, by why they do."""
        layers: dict[str, list[str]] = {}
        for name, why in self.in_float.items():
            layers.setdefault(why, []).append(name)
        return layers

    def replaces(self, earlier: Export) -> bool:
        """Whether it is for the same runtime as an earlier one of its target, or has written over its files.

        Files of several targets, such as the plain Caffe pair, are the same whoever writes them.
        """
        same_place = self.runtime == earlier.runtime or self.folder == earlier.folder
        return self.target == earlier.target and same_place


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
    """What the stage weights has done.

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
    """The stage renorm: what was measured, on how many images, and how far every BatchNorm has moved."""

    statistics: StatisticsName
    images: int
    layers: list[BatchNormShift]


class ActivationsRecord(StageRecord):
    """The stage activations: how many images were measured, and the step and codes of every site."""

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


@dataclass(frozen=True)
class CaffeTest:
    """Whether `caffe test` can count the accuracy with NAME_val.prototxt.

    Attributes:
        iterations: for all validation images; None where it cannot.
        needed: what it would need then.
    """

    iterations: int | None
    needed: str = ""


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
        caffe_test: whether `caffe test` can run them.
        sizes: of the model.
        coverage: how much of the net's work is quantized; None where no shapes are known.
        output_sqnr: of every quantized layer.
        evaluation: what `labelfree evaluate` has found for these stages.
        exports: what `labelfree export` has made of them, the last of each kind.
    """

    format: Literal[2] = 2
    tool: str
    name: str
    versions: dict[str, str]
    settings: Config
    inputs: dict[str, str]
    stages: Stages
    prototxts: dict[str, str]
    caffe_test: CaffeTest
    sizes: Sizes
    coverage: Coverage | None = None
    transform: TransformRecord | None = None
    output_sqnr: OutputSqnr | None = None
    evaluation: Evaluation | None = None
    exports: list[Export] = []

    @property
    def outputs(self) -> dict[str, str]:
        """sha256 of all files by name, report.json and report.html apart."""
        written = [stage.outputs for stage in self.stages.done.values()]
        return {name: digest for files in (*written, self.prototxts) for name, digest in files.items()}

    def with_export(self, export: Export) -> RunRecord:
        """The record with another export."""
        kept = [each for each in self.exports if not export.replaces(each)]
        return self.model_copy(update={"exports": [*kept, export]})

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
