"""The settings as types: what each stage needs. How they are written in YAML is `commands.config`'s."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    Strict,
    model_serializer,
    model_validator,
)

UNITS = {"": 1, "b": 1} | {
    name: base**power
    for power, letter in enumerate("kmgt", start=1)
    for name, base in ((f"{letter}b", 1000), (f"{letter}ib", 1024), (letter, 1024))
}


MAX_AXES = 31
"""Of a blob in Caffe, without the batch axis."""
MAX_AXIS = (1 << 20) - 1


def parse_size(value: object) -> int | None:
    """Bytes from ``2GiB``, ``500 MB``, ``123456`` or ``unlimited`` (None).

    Raises:
        ValueError: not a size, or not above zero.
    """
    if value is None or value == "unlimited":
        return None
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(value))
    if isinstance(value, bool) or match is None or match[2].lower() not in UNITS:
        raise ValueError("not a size; write for example 2GiB, 500MB or unlimited")
    size = int(float(match[1]) * UNITS[match[2].lower()])
    if size <= 0:
        raise ValueError("must be above zero; write for example 2GiB")
    return size


def parse_list(value: object) -> object:
    """A list of texts, as a command's words; a plain string counts as a list of one."""
    return [value] if isinstance(value, str) else value


def parse_values(value: object) -> object:
    """The values of an input that takes no images: a path, a number, or lists of numbers."""
    if isinstance(value, bool) or not isinstance(value, str | Path | int | float | list):
        raise ValueError(
            "give a folder of .npy files, a .npy, .npz or HDF5 file, a number or a list of numbers"
        )
    return value


def parse_shape(value: object) -> list[int]:
    """A shape from ``[3, 224, 224]``, ``3,224,224`` or ``3x224x224``.

    Raises:
        ValueError: not a shape.
    """
    parts = value.replace("x", ",").split(",") if isinstance(value, str) else value
    if isinstance(parts, list) and 0 < len(parts) <= MAX_AXES:
        axes = [int(part) if isinstance(part, str) and part.strip().isdecimal() else part for part in parts]
        if all(type(axis) is int and 0 < axis <= MAX_AXIS for axis in axes):
            return axes
    raise ValueError("not a shape without the batch axis; write for example 3,224,224")


def parse_shapes(value: object) -> object:
    """The shape of the images' input, or those of several inputs by name."""
    if isinstance(value, dict):
        return {name: parse_shape(shape) for name, shape in value.items()}
    return value if value is None else parse_shape(value)


def check_size(value: object) -> object:
    """A height and a width."""
    if isinstance(value, list | tuple) and len(value) == 2:
        return value
    raise ValueError("expected [height, width], as in resize: [256, 256]")


Whole = Annotated[int, Strict()]
"""A number; ``true`` is none, although Python counts it as 1."""
Bytes = Annotated[int | None, BeforeValidator(parse_size)]
Command = Annotated[list[str], Field(min_length=1), BeforeValidator(parse_list)]
Size = Annotated[tuple[Whole, Whole], BeforeValidator(check_size)]
InputValues = Annotated[float | list[Any] | Path, BeforeValidator(parse_values)]
"""What goes into an input that takes no images (`data.values.open_values`)."""
InputShapes = Annotated[list[int] | dict[str, list[int]] | None, BeforeValidator(parse_shapes)]
Augment = Literal["train", "test"]
GridName = Literal["power_of_two", "fixed_point", "uniform"]
DEFAULT_MEMORY = 2 << 30
MEASURED_IMAGES = 1000
"""What statistics of the images' own take: their noise is all theirs (docs/accuracy.md)."""
PUBLISHED_IMAGES = 400
"""What the paper's authors took for the steps of activations."""
StatisticsName = Literal["paired", "measured"]
SolverName = Literal["optimal", "reference", "data_aware"]
"""What quantizes weights."""
GRID_BITS = {"power_of_two": (2, 5), "fixed_point": (2, 8), "uniform": (2, 8)}


class Section(BaseModel):
    """A mapping of the YAML file: unknown keys are errors and values keep their types."""

    model_config = ConfigDict(extra="forbid", strict=False, frozen=True)


def _default(section: Section, name: str, value: object) -> None:
    """Give a field that the user has not set another default; it still counts as not set."""
    if name not in section.model_fields_set:
        section.__dict__[name] = value


class ModelFiles(Section):
    """The trained network."""

    prototxt: Path = Field(description="the network's layers")
    weights: Path = Field(description="the network's trained blobs (caffemodel)")
    caffe_proto: Path | None = Field(None, description="a fork's caffe.proto, where it has fields of its own")
    write: Literal["as_read", "bvlc"] = Field(
        "as_read",
        description="the forms of a fork's layers that are written: the fork's, or those of Caffe 1.0 where "
        "they say the same",
    )
    stages: Annotated[list[str], BeforeValidator(parse_list)] = Field(
        [], description="stages that are set, for include and exclude rules that name them"
    )
    level: Whole = Field(0, description="the level, for rules with min_level and max_level")


class Fed(Section):
    """What goes into the net's inputs."""

    source: Path | None = Field(None, description="the images: LMDB folder, image folder or list file")
    inputs: dict[str, InputValues] = Field(
        {},
        description="values of the inputs that take no images, by name: a folder of .npy files, a .npy, "
        ".npz or HDF5 file, or numbers that are the same for all images",
    )

    @model_validator(mode="after")
    def _feeds_something(self) -> Fed:
        if self.source is None and not self.inputs:
            raise ValueError("give source, or inputs for a net that takes no images")
        return self


class Calibration(Fed):
    """The unlabeled images."""

    images: Whole | None = Field(
        None, ge=1, description="use the first so many (default: as many as a stage asks)"
    )


class Validation(Fed):
    """The labeled images that `evaluate` and `caffe test` use."""

    batch_size: Whole = Field(50, ge=1, description="of the Data layer in NAME_val.prototxt")


class TransformKeys(Section):
    """From image to input blob, as Caffe's transform_param; replaces the prototxt's own."""

    crop_size: Whole | None = Field(None, ge=0, description="side of the square crop; 0: none")
    mirror: bool | None = Field(None, description="mirror every other image at random")
    scale: float | None = Field(None, description="factor after the mean is subtracted")
    mean_value: list[float] | None = Field(None, description="per channel (BGR), or one for all")
    mean_file: Path | None = Field(None, description="binaryproto with a mean image")
    force_color: bool | None = Field(None, description="decode images to three channels whatever they have")
    force_gray: bool | None = Field(None, description="decode images to one channel")
    resize_short: Whole | None = Field(None, ge=1, description="resize the shorter side to this first")
    resize: Size | None = Field(None, description="resize to [height, width] first")

    @model_validator(mode="before")
    @classmethod
    def _one_mean_for_all(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(values.get("mean_value"), int | float):
            return {**values, "mean_value": [values["mean_value"]]}
        return values

    @model_validator(mode="after")
    def _one_of_two(self) -> TransformKeys:
        for one, other in (
            ("resize", "resize_short"),
            ("mean_file", "mean_value"),
            ("force_color", "force_gray"),
        ):
            if getattr(self, one) and getattr(self, other):
                raise ValueError(f"{one} and {other} are both set: keep one")
        return self


class Data(Section):
    """Where images come from and how they become input blobs."""

    calibration: Calibration | None = Field(
        None,
        description="unlabeled images, for renorm and activations, weights.budget and solver data_aware",
    )
    validation: Validation | None = Field(None, description="labeled images")
    transform: TransformKeys = Field(
        TransformKeys(), description="overrides of the prototxt's transform_param"
    )
    input_shape: InputShapes = Field(
        None,
        description="[channels, height, width] of the images' input, or the shape of each by name, where the "
        "prototxt does not say it or says what is changed at run time",
    )
    augment: Augment = Field(
        "train",
        description="of calibration images; train: random crop and mirror as the TRAIN transform says, "
        "seeded; test: centre crop",
    )
    seed: Whole = Field(0, ge=0, description="of the random crops and mirrors")


class CaffeProcess(Section):
    """How `engine: caffe` starts pycaffe."""

    python: Command = Field(["python3"], description="the interpreter that has pycaffe: a command")
    pycaffe_path: str | None = Field(None, description="prepended to that interpreter's sys.path")
    preload: str | None = Field(None, description="a shared library with extra layers (LD_PRELOAD)")


class GridChoice(Section):
    """A grid and its number of bits."""

    bits: Whole = Field(4, ge=2, le=8, description="bits per weight")
    grid: GridName = Field(
        "power_of_two", description="the levels a weight may take, times the kernel's alpha"
    )

    @model_validator(mode="after")
    def _grid_has_the_bits(self) -> GridChoice:
        low, high = GRID_BITS[self.grid]
        if not low <= self.bits <= high:
            raise ValueError(f"grid {self.grid} has {low} to {high} bits, not {self.bits}")
        return self


class LayerChoice(GridChoice):
    """An override for one layer; a missing half is taken from the general setting."""

    skip: bool = Field(False, description="leave this layer's weights as they are")


class WeightSettings(GridChoice):
    """Of the stage weights."""

    budget: float | None = Field(
        None,
        ge=2,
        le=8,
        description="mean bits per weight, instead of bits: every layer gets the bits that change the "
        "net's output least; first_last, depthwise and those in weights.layers keep theirs",
    )
    solver: SolverName = Field(
        "optimal",
        description="data_aware: what changes each layer's output least on the calibration images; "
        "optimal: the least error of the weights; reference: the paper's iteration",
    )
    images: Whole = Field(1000, ge=1, description="calibration images, for solver data_aware and for budget")
    first_last: GridChoice = Field(
        GridChoice(bits=8, grid="fixed_point"), description="for the first and the last quantized layer"
    )
    depthwise: GridChoice | None = Field(
        None,
        description="for depthwise convolutions, whose few weights have few others to make up for them; such "
        "as {bits: 8, grid: fixed_point}; null: as the other layers",
    )
    layers: dict[str, LayerChoice] = Field({}, description="overrides by layer name: bits, grid, skip")

    @model_validator(mode="before")
    @classmethod
    def _fill_overrides(cls, values: Any) -> Any:
        """What an override does not name comes from this section; of first_last and depthwise 8 bits."""
        if not isinstance(values, dict):
            return values
        filled = dict(values)
        for key in ("first_last", "depthwise"):
            if isinstance(values.get(key), dict):
                filled[key] = {"bits": 8, "grid": "fixed_point", **values[key]}
        if isinstance(values.get("layers"), dict):
            general = {key: values[key] for key in ("bits", "grid") if key in values}
            filled["layers"] = {
                name: {**general, **choice} if isinstance(choice, dict) else choice
                for name, choice in values["layers"].items()
            }
        return filled

    @model_validator(mode="after")
    def _budget_is_for_the_others(self) -> WeightSettings:
        if self.budget is None:
            return self
        if "bits" in self.model_fields_set:
            raise ValueError("budget stands instead of bits; give one of them")
        for name, choice in self.layers.items():
            if not choice.skip and "bits" not in choice.model_fields_set:
                raise ValueError(f"give layers.{name}.bits: budget is for the layers that are not in layers")
        return self

    @model_serializer(mode="wrap")
    def _bits_or_budget(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Of the two only the one that counts, so that what is written can be read again."""
        dumped: dict[str, Any] = handler(self)
        if self.budget is not None:
            dumped.pop("bits", None)
        return dumped


class RenormSettings(Section):
    """Of the stage renorm."""

    statistics: StatisticsName = Field(
        "paired",
        description="paired: relative to full precision on the same images; measured: the images' own, as "
        "in the paper, and the default where weights.solver is reference",
    )
    images: Whole = Field(
        64, ge=1, description=f"calibration images; {MEASURED_IMAGES:,} where statistics are measured"
    )
    bias_correction: bool = Field(
        True,
        description="keep the mean of each quantized layer's output as in full precision, by its bias, where "
        "no BatchNorm follows; with paired statistics only, and not with solver data_aware, which does it",
    )
    augment: Augment | None = Field(
        None, exclude=True, description="the earlier place of `data.augment`, which holds for every stage"
    )
    memory: Bytes = Field(
        None, exclude=True, description="the earlier place of `memory`, which holds for every stage"
    )

    @model_validator(mode="after")
    def _measured_takes_more_images(self) -> RenormSettings:
        if self.statistics == "measured":
            _default(self, "images", MEASURED_IMAGES)
        return self


class ActivationSettings(Section):
    """Of the stage activations."""

    bits: Whole = Field(
        8,
        ge=4,
        le=8,
        description="the largest code is 2^(bits-1) - 1, as in the paper: 8 means codes 0..127, or -127..127 "
        "where values are negative; what others call 4 bits, codes 0..15, is levels: 15",
    )
    levels: Whole | None = Field(
        None,
        ge=1,
        le=255,
        description="the largest code, instead of bits; 255: full byte; of both signs no more than -127..127",
    )
    scope: Literal["relu", "inputs"] = Field(
        "inputs",
        description="inputs: whatever a quantized layer reads, but for the net's input; relu: the outputs of "
        "plain ReLUs and of ReLU6, as in the paper, and the default with a reference solver",
    )
    input: bool = Field(
        False, description="the net's input too, with scope inputs; pixels are bytes before it"
    )
    sums: bool = Field(
        False,
        description="what Eltwise sums and average poolings read too, with scope inputs: for runtimes "
        "that add codes",
    )
    images: Whole = Field(
        64, ge=1, description=f"calibration images; {PUBLISHED_IMAGES} with solver reference"
    )
    solver: Literal["optimal", "reference"] = Field("optimal", description="reference: the paper's iteration")

    @model_validator(mode="after")
    def _as_published(self) -> ActivationSettings:
        if self.solver == "reference":
            _default(self, "images", PUBLISHED_IMAGES)
            _default(self, "scope", "relu")
            if self.scope != "relu":
                raise ValueError(
                    "solver reference knows no codes of both signs; give scope relu, or solver optimal"
                )
        for name in ("input", "sums"):
            if getattr(self, name) and self.scope != "inputs":
                raise ValueError(f"{name}: true needs scope inputs")
        return self

    @property
    def largest_code(self) -> int:
        """The largest code of a quantized activation."""
        return self.levels if self.levels is not None else 2 ** (self.bits - 1) - 1


MOVED = {"augment": "data.augment", "memory": "memory"}
"""Keys of renorm that hold for every stage, and where they are now; the earlier places are read for good."""


class Config(Section):
    """Everything one run needs."""

    name: str = Field(description="prefix of every output file", pattern=r"^[\w][\w.+-]*$")
    model: ModelFiles
    data: Data = Field(Data())
    engine: Literal["auto", "onnx", "caffe"] = Field(
        "auto", description="what runs the network; auto is onnx"
    )
    caffe: CaffeProcess = Field(CaffeProcess())
    weights: WeightSettings = Field(WeightSettings())
    renorm: RenormSettings = Field(RenormSettings())
    activations: ActivationSettings = Field(ActivationSettings())
    threads: Whole | None = Field(
        None, ge=1, le=1024, description="default: the processors this process may use"
    )
    memory: Bytes = Field(
        DEFAULT_MEMORY,
        validate_default=False,
        description="bound on what is kept of all images between two layers; with less it takes longer",
    )
    output: Path = Field(description="folder for everything that is written")

    @model_validator(mode="before")
    @classmethod
    def _reference_is_the_paper(cls, values: Any) -> Any:
        """Who asks for the published solver means the published method."""
        if not isinstance(values, dict):
            return values
        weights = values.get("weights") or {}
        if not isinstance(weights, dict) or weights.get("solver") != "reference":
            return values
        published = {"renorm": {"statistics": "measured"}, "activations": {"scope": "relu"}}
        changed = dict(values)
        for name, defaults in published.items():
            section = values.get(name) or {}
            if isinstance(section, dict):
                changed[name] = {**defaults, **section}
        return changed

    @model_validator(mode="after")
    def _from_earlier_places(self) -> Config:
        """What `MOVED` keys say counts where it belongs."""
        moved = {name: getattr(self.renorm, name) for name in MOVED if name in self.renorm.model_fields_set}
        for name, section in (("augment", self.data), ("memory", self)):
            if name in moved and name in section.model_fields_set:
                raise ValueError(
                    f"{MOVED[name]} and renorm.{name}, its earlier place, are both given: keep the former"
                )
        if moved.get("augment") is not None:
            self.__dict__["data"] = self.data.model_copy()  # the default is everybody's
            self.data.__dict__["augment"] = moved["augment"]
        if "memory" in moved:
            self.__dict__["memory"] = moved["memory"]
        return self  # as before, neither counts as set: settings in a record are looked at again
