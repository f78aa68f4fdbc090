"""The Python API: what the command line does, on objects instead of files (docs/python.md).

The functions take a `Model` and give a new one; models are never changed. Settings are the keys of
docs/configuration.md, section by section, and have the same defaults, checks and messages: what is wrong with
them, or with files and images, is an `InputError`. The same settings give the same numbers, bit for bit, as
the commands.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from quantize.arrays import FloatArray, Shape
from quantize.caffenet import TEST, doubtful_norms, filter_net
from quantize.caffenet.model import Model
from quantize.commands.config import checked
from quantize.data.feed import Feed, Input
from quantize.data.transform import shape_text
from quantize.data.values import Values
from quantize.engines import engine_opener
from quantize.engines.base import OpenEngine
from quantize.errors import InputError
from quantize.host import using_threads
from quantize.job.feeds import calibration_feed, calibration_images, stage_feed, validation_feed
from quantize.job.labels import with_labels_that_fit
from quantize.job.transforms import transform_check
from quantize.measure.evaluate import evaluate as compare
from quantize.measure.outputs import class_scores, net_outputs
from quantize.progress import Progress
from quantize.record import Closeness, StageName
from quantize.settings import Config
from quantize.stages.activations import activations_quan
from quantize.stages.budget import keep_budget
from quantize.stages.data_aware import Calibration
from quantize.stages.renorm import renorm as renormed
from quantize.stages.weights import check_kernels, check_unquantized, choices, weights_quan

Settings = Mapping[str, Any]
"""Keys of one section of the configuration, and their values."""


class Samples(Protocol):
    """Values by number: an array, a list of arrays, or whatever else reads them when they are needed."""

    def __len__(self) -> int:
        """Return how many there are."""

    def __getitem__(self, number: int, /) -> npt.ArrayLike:
        """Return number ``number``: an array (channels, height, width), or of what shape the input has."""


class Warnings(Progress):
    """Says nothing but what is probably wrong, as a Python warning."""

    def warn(self, text: str) -> None:
        """Something is probably wrong, and the result with it."""
        warnings.warn(text, stacklevel=2)


@dataclass(frozen=True)
class Runtime:
    """How nets are run, and who hears how far it is.

    >>> import quantize
    >>> runtime = quantize.Runtime(threads=1)
    >>> model = quantize.Model.load("digits.prototxt", "digits.caffemodel")
    >>> images = quantize.Images("test_lmdb", model, count=8)
    >>> quantize.evaluate(model, model, images, runtime=runtime).agreement
    100.0

    Attributes:
        engine: ``auto``, ``onnx`` or ``caffe``; auto is onnx.
        caffe: how pycaffe is started for the latter: the section ``caffe`` of the configuration.
        threads: None: as many as this process may use.
        memory: bound on what is kept between two layers, such as ``"2GiB"`` (``renorm.memory``).
        progress: receives the advance; by default only warnings are shown.
    """

    engine: Literal["auto", "onnx", "caffe"] = "auto"
    caffe: Settings = field(default_factory=dict)
    threads: int | None = None
    memory: int | str = "2GiB"
    progress: Progress = field(default_factory=Warnings)


DEFAULT_RUNTIME = Runtime()


class Images:
    """Images for a model.

    From a file or folder they are read when they are needed, and transformed as the prototxt says; random
    crops and mirrors come from ``seed``. Arrays go into the net as they are.

    >>> import numpy as np, quantize
    >>> model = quantize.Model.load("digits.prototxt", "digits.caffemodel")
    >>> images = quantize.Images("calibration_lmdb", model, count=100)
    >>> len(images), images.shapes
    (100, {'data': (1, 8, 8)})
    >>> noise = np.random.default_rng(0).normal(size=(20, 1, 8, 8))
    >>> len(quantize.Images(noise, model))
    20

    Args:
        source: an LMDB, an image folder or a list file; or an array (N, C, H, W) or other `Samples`, already
            transformed; or these by input for a net of several.
        model: the model that they are for.
        count: the first so many; None: all.
        labels: the classes of `Samples`, for `evaluate`; an LMDB or a list file has its own.
        inputs: with a file or folder: what goes into inputs that take no images
            (``data.calibration.inputs``).
        transform: replaces what the prototxt says (``data.transform``).
        input_shape: of the net's inputs, where the prototxt does not say it (``data.input_shape``).
        augment: train: crop and mirror at random, as the TRAIN transform says; test: as in the TEST phase, as
            images to evaluate with always are (``renorm.augment``).
        seed: of what is chosen at random (``data.seed``).

    Raises:
        InputError: there are no such images, fewer than ``count``, or they do not fit the model.
    """

    def __init__(
        self,
        source: str | Path | Samples | Mapping[str, Samples],
        model: Model,
        count: int | None = None,
        *,
        labels: Sequence[int] | npt.NDArray[np.integer[Any]] | None = None,
        inputs: Mapping[str, object] | None = None,
        transform: Settings | None = None,
        input_shape: Sequence[int] | Mapping[str, Sequence[int]] | None = None,
        augment: Literal["train", "test"] = "train",
        seed: int = 0,
    ) -> None:
        self.model = model
        self.augment = augment
        self.count = count
        self._transform_is_checked = False
        self._arrays: dict[str, Input] | None = None
        self._fed: dict[str, object] = {}
        self._data: dict[str, object] = {"seed": seed}
        if isinstance(source, str | Path):
            if labels is not None:
                raise InputError("labels: an LMDB or a list file has its own; leave them out")
            self._fed = {"source": source, "inputs": dict(inputs or {})}
            self._data = {
                **self._data,
                "transform": dict(transform or {}),
                "input_shape": _plain(input_shape),
            }
        elif transform or input_shape or inputs:
            raise InputError(
                "transform, input_shape and inputs are for files and folders; arrays go in as they are"
            )
        else:
            self._arrays = self._from_samples(source, labels)
        if count is not None and not 1 <= count <= self._present:
            raise InputError(f"count: {count} images asked for but there are {self._present}")
        _ = self.shapes  # reads the first image: whatever is wrong is told now

    def __len__(self) -> int:
        """Return the number of images."""
        return self._present if self.count is None else self.count

    @cached_property
    def _present(self) -> int:
        """How many there are, whatever ``count`` says."""
        if self._arrays is not None:
            return min(map(len, self._arrays.values()))
        return calibration_images(self._configuration())

    @cached_property
    def shapes(self) -> dict[str, Shape]:
        """By input of the net the shape of one image's values."""
        if self._arrays is not None:
            return {name: values.shape for name, values in self._arrays.items()}
        return calibration_feed(self._configuration(), self.model.net, 1).shapes

    def _configuration(self) -> Config:
        return _configuration(self.model, self, DEFAULT_RUNTIME, "Images", {})

    def _from_samples(
        self,
        source: Samples | Mapping[str, Samples],
        labels: Sequence[int] | npt.NDArray[np.integer[Any]] | None,
    ) -> dict[str, Input]:
        """What goes into each input of the net."""
        names = self.model.inference.inputs
        given = source if isinstance(source, Mapping) else {names[0]: source}
        if set(given) != set(names):
            raise InputError(
                f"values for the inputs {', '.join(given)} but the net has {', '.join(names)}: give each by "
                "its name"
            )
        declared = self.model.declared_shapes
        values = {name: _values(given[name], name, declared.get(name)) for name in names}
        counts = {name: len(each) for name, each in values.items()}
        if len(set(counts.values())) > 1:
            shown = ", ".join(f"{count} for {name}" for name, count in counts.items())
            raise InputError(f"different numbers of values for the inputs: {shown}")
        found: dict[str, Input] = dict(values)
        if labels is not None:
            classes = np.asarray(labels)
            if classes.shape != (counts[names[0]],) or classes.dtype.kind not in "iu":
                raise InputError(f"labels: {counts[names[0]]} whole numbers are needed, one for each image")
            found[names[0]] = _Labeled(values[names[0]], [int(label) for label in classes])
        return found

    def _stage_feed(self, config: Config, stage: StageName, progress: Progress) -> Feed:
        """What a stage looks at: as many images as it asks for, or all where there are fewer."""
        if self._arrays is None:
            return stage_feed(config, self.model.net, stage, progress)
        settings = getattr(config, stage)
        if settings.images > len(self) and "images" in settings.model_fields_set and self.count is None:
            raise InputError(f"{stage}.images asks for {settings.images} images but there are {len(self)}")
        return self._first(min(settings.images, len(self)), config)

    def _evaluation_feed(self, config: Config, progress: Progress) -> Feed:
        """All images, transformed as in the TEST phase."""
        if self._arrays is None:
            return validation_feed(config, self.model.net, self.count, progress)
        return self._first(len(self), config)

    def _first(self, count: int, config: Config) -> Feed:
        assert self._arrays is not None
        return Feed(self._arrays, config.data.seed).selected(range(count))

    def _check_transform(self, config: Config, full: Model | None, progress: Progress) -> None:
        """Warn where the transform does not fit the statistics of training, once."""
        if self._arrays is None and full is not None and not self._transform_is_checked:
            self._transform_is_checked = True
            check = transform_check(config, full)
            if check is not None and check.doubtful:
                progress.warn(f"{check.finding}; {check.remedy}")


@dataclass(frozen=True)
class _Labeled:
    """Values with labels."""

    values: Values
    labels: list[int | None]

    @property
    def shape(self) -> Shape:
        return self.values.shape

    def __len__(self) -> int:
        return len(self.values)

    def batches(
        self, size: int, start: int = 0, stop: int | None = None
    ) -> Iterator[tuple[FloatArray, list[int | None]]]:
        first = start
        for rows, _ in self.values.batches(size, start, stop):
            yield rows, self.labels[first : first + len(rows)]
            first += len(rows)

    def selected(self, numbers: Sequence[int]) -> _Labeled:
        return _Labeled(self.values.selected(numbers), [self.labels[number] for number in numbers])

    def unlabeled(self) -> Values:
        return self.values


def _values(samples: Samples, name: str, declared: Shape | None) -> Values:
    """The values of one input."""
    if not len(samples):
        raise InputError(f"input {name}: no values")
    first = np.asarray(samples[0])
    if first.dtype == np.uint8:
        raise InputError(
            f"input {name}: these are 8-bit pixels, but arrays go into the net as they are: transform them "
            "first (crop, mean, scale), or give a folder or an LMDB, which the prototxt's transform is for"
        )
    if first.dtype.kind not in "fiub":
        raise InputError(f"input {name}: holds {first.dtype}, not numbers")
    if declared is not None and declared != first.shape:
        raise InputError(
            f"input {name}: an image is {shape_text(first.shape)} but the net says {shape_text(declared)}"
        )
    read: Callable[[int], npt.NDArray[Any]] = lambda number: np.asarray(samples[number])  # noqa: E731
    return Values(f"input {name}", first.shape, len(samples), read, "number {}".format)


def quantize(
    model: Model,
    images: Images,
    bits: int | None = None,
    *,
    weights: Settings | None = None,
    renorm: Settings | None = None,
    activations: Settings | None = None,
    runtime: Runtime = DEFAULT_RUNTIME,
) -> Model:
    """All three stages, as `labelfree quantize` does them.

    >>> import quantize
    >>> model = quantize.Model.load("digits.prototxt", "digits.caffemodel")
    >>> images = quantize.Images("calibration_lmdb", model)
    >>> small = quantize.quantize(model, images, bits=3, weights={"first_last": {"bits": 6}})
    >>> [layer.bits for layer in small.layers if layer.bits][:4]
    [6, 3, 3, 3]

    Args:
        model: in full precision.
        images: unlabeled ones like those that the net will meet.
        bits: per weight (``weights.bits``; default 4).
        weights: other settings of stage 1.
        renorm: settings of stage 2.
        activations: settings of stage 3.
        runtime: how nets are run.

    Raises:
        InputError: bad settings or input.
        LabelfreeError: the work failed.
    """
    work = _Work.of(
        "quantize",
        model,
        images,
        runtime,
        weights=_with(weights, "weights", bits=bits),
        renorm=renorm,
        activations=activations,
    )
    with work.begun(model):
        return work.activations(work.renorm(work.weights(model), model))


def quantize_weights(
    model: Model,
    images: Images | None = None,
    bits: int | None = None,
    *,
    settings: Settings | None = None,
    runtime: Runtime = DEFAULT_RUNTIME,
) -> Model:
    """Stage 1: weights onto a grid, as `labelfree weights-quan` does it.

    >>> import quantize
    >>> model = quantize.Model.load("digits.prototxt", "digits.caffemodel")
    >>> step = quantize.quantize_weights(model, bits=4)
    >>> layer = next(layer for layer in step.layers if layer.bits == 4)
    >>> layer.grid, layer.codes.shape == (len(layer.alpha), layer.codes[0].size)
    ('power_of_two', True)

    Args:
        model: in full precision.
        images: needed for ``solver: data_aware`` and for a ``budget`` only.
        bits: per weight (``weights.bits``; default 4).
        settings: others of the section ``weights``.
        runtime: how nets are run.

    Raises:
        InputError: bad settings or input.
        LabelfreeError: the work failed.
    """
    tree = _with(settings, "weights", bits=bits)
    work = _Work.of("quantize_weights", model, images, runtime, weights=tree)
    with work.begun(model):
        return work.weights(model)


def renorm(
    model: Model,
    images: Images,
    *,
    full: Model | None = None,
    settings: Settings | None = None,
    runtime: Runtime = DEFAULT_RUNTIME,
) -> Model:
    """Stage 2: BatchNorm statistics that fit the quantized weights, as `labelfree renorm` finds them.

    >>> import quantize
    >>> model = quantize.Model.load("digits.prototxt", "digits.caffemodel")
    >>> images = quantize.Images("calibration_lmdb", model)
    >>> step = quantize.quantize_weights(model, bits=4)
    >>> repaired = quantize.renorm(step, images, settings={"images": 32})
    >>> test = quantize.Images("test_lmdb", model)
    >>> quantize.evaluate(model, repaired, test).agreement > quantize.evaluate(model, step, test).agreement
    True

    Args:
        model: with quantized weights.
        images: unlabeled ones.
        full: the model in full precision, for ``statistics: paired``; None: what ``model`` was made from.
        settings: of the section ``renorm``.
        runtime: how nets are run.

    Raises:
        InputError: bad settings or input; full precision is needed and not known.
        LabelfreeError: the work failed.
    """
    weights = {} if model.solver is None else {"solver": model.solver}
    work = _Work.of("renorm", model, images, runtime, weights=weights, renorm=settings)
    with work.begun(model):
        return work.renorm(model, full)


def quantize_activations(
    model: Model,
    images: Images,
    bits: int | None = None,
    *,
    settings: Settings | None = None,
    runtime: Runtime = DEFAULT_RUNTIME,
) -> Model:
    """Stage 3: steps for what layers with quantized weights read, as `labelfree activations-quan` does it.

    >>> import quantize
    >>> model = quantize.Model.load("digits.prototxt", "digits.caffemodel")
    >>> images = quantize.Images("calibration_lmdb", model)
    >>> step = quantize.quantize_activations(quantize.quantize_weights(model), images, bits=8)
    >>> {(quantizer.lowest, quantizer.highest) for quantizer in step.quantizers.values()}
    {(0, 127)}

    Args:
        model: with quantized weights (with ``scope: relu`` mostly so).
        images: unlabeled ones.
        bits: of activations (``activations.bits``; default 8).
        settings: others of the section ``activations``.
        runtime: how nets are run.

    Raises:
        InputError: bad settings or input.
        LabelfreeError: the work failed.
    """
    tree = _with(settings, "activations", bits=bits)
    work = _Work.of("quantize_activations", model, images, runtime, activations=tree)
    with work.begun(model):
        return work.activations(model)


@dataclass(frozen=True)
class Comparison:
    """A model against another, mostly a quantized one against full precision, on the same images.

    Attributes:
        images: how many.
        agreement: percent of the images on which both put the same class first; None without class scores.
        divergence: mean Kullback-Leibler divergence of the softmax of its scores from that of the other's, in
            nats.
        sqnr_db: of the scores, in decibels; None where they are the same.
        top1: percent of the images whose label it puts first; None without labels.
        top5: percent of the images whose label is among its five best; None without labels.
        full_top1: of the other.
        full_top5: of the other.
        p_value: how probable it is that two equally good models differ so much in top-1 (McNemar); None
            without labels.
    """

    images: int
    agreement: float | None
    divergence: float | None
    sqnr_db: float | None
    top1: float | None
    top5: float | None
    full_top1: float | None
    full_top5: float | None
    p_value: float | None


def evaluate(model: Model, small: Model, images: Images, *, runtime: Runtime = DEFAULT_RUNTIME) -> Comparison:
    """Compare two models on the same images, as `labelfree evaluate` does.

    >>> import quantize
    >>> model = quantize.Model.load("digits.prototxt", "digits.caffemodel")
    >>> small = quantize.quantize(model, quantize.Images("calibration_lmdb", model), bits=4)
    >>> found = quantize.evaluate(model, small, quantize.Images("test_lmdb", model))
    >>> found.agreement > 90 and found.full_top1 > found.top1 > 90
    True

    Args:
        model: in full precision.
        small: a quantized one.
        images: labeled ones, or with `Comparison.agreement` alone in mind unlabeled ones.
        runtime: how nets are run.

    Raises:
        InputError: bad input; a label does not fit the classes, or the models do not fit each other.
        LabelfreeError: scores are not finite.
    """
    config = _configuration(model, images, runtime, "evaluate", {}, fed="validation")
    candidates = {"fp32": model, "quantized": small}
    with using_threads(config.threads):
        feed = images._evaluation_feed(config, runtime.progress)
        feed = with_labels_that_fit(feed, model.net, runtime.progress)
        found = compare(candidates, net_outputs(model.net), feed, _opener(config), runtime.progress)
    close = found.closeness.get("quantized", Closeness(None, None, None))
    paired, accuracy = found.paired.get("quantized"), found.accuracy
    own, other = accuracy["quantized"], accuracy["fp32"]
    return Comparison(
        images=found.images,
        agreement=close.agreement,
        divergence=close.divergence,
        sqnr_db=close.sqnr_db,
        top1=own.top1,
        top5=own.top5,
        full_top1=other.top1,
        full_top5=other.top5,
        p_value=None if paired is None else paired.p_value,
    )


@dataclass(frozen=True)
class _Work:
    """What the stages need besides a model."""

    config: Config
    images: Images | None
    progress: Progress
    open_engine: OpenEngine

    @classmethod
    def of(
        cls, where: str, model: Model, images: Images | None, runtime: Runtime, **sections: Settings | None
    ) -> _Work:
        """Check the settings; ``where`` they were given, for messages."""
        config = _configuration(model, images, runtime, where, sections)
        return cls(config, images, runtime.progress, _opener(config))

    @contextmanager
    def begun(self, model: Model) -> Iterator[None]:
        """What is to be done before and around the stages."""
        with using_threads(self.config.threads):
            if self.images is not None:
                model.check(self.images.shapes)
                full = model.full or (None if model.is_quantized else model)
                self.images._check_transform(self.config, full, self.progress)
            yield

    def feed(self, stage: StageName) -> Feed:
        """The images that a stage looks at."""
        if self.images is None:
            raise InputError(f"{stage}: weights.solver data_aware and weights.budget need images: give some")
        return self.images._stage_feed(self.config, stage, self.progress)

    def weights(self, model: Model) -> Model:
        """Stage 1."""
        settings, test = self.config.weights, model.inference
        check_unquantized(test.net)
        _check_activations(model)
        chosen = choices(test.net, settings)
        check_kernels(filter_net(model.net, TEST), model.weights, chosen)
        for line in doubtful_norms(test.net, model.weights):
            self.progress.note(f"weights: {line}")
        calibration = None
        if settings.solver == "data_aware" or settings.budget is not None:
            renorm = self.config.renorm
            feed = self.feed("weights")
            calibration = Calibration(feed, self.open_engine, renorm.memory, renorm.statistics)
            if settings.budget is not None:
                scores = class_scores(model.net, "weights.budget")
                chosen, _ = keep_budget(model, settings, calibration, scores, self.progress)
        return weights_quan(model, chosen, settings.solver, self.progress, calibration)[0]

    def renorm(self, model: Model, full: Model | None = None) -> Model:
        """Stage 2."""
        settings = self.config.renorm
        _check_activations(model)
        feed = self.feed("renorm")
        return renormed(model, feed, settings, self.open_engine, settings.memory, self.progress, full)[0]

    def activations(self, model: Model) -> Model:
        """Stage 3."""
        _check_activations(model)
        feed, settings = self.feed("activations"), self.config.activations
        small, found = activations_quan(model, feed, settings, self.open_engine, self.progress)
        if not found:
            self.progress.warn(
                "activations: nothing to quantize; with scope inputs that is what layers with quantized "
                "weights read"
            )
        return small


def _check_activations(model: Model) -> None:
    """Check that activations are quantized last: their steps fit the weights and statistics of then.

    Raises:
        InputError: they are quantized already.
    """
    for name in model.quantizers:
        raise InputError(
            f"layer {name!r} quantizes activations already, which comes last: start from the model before"
        )


def _with(settings: Settings | None, section: str, *, bits: int | None) -> Settings:
    """The settings of a section with ``bits``, which has an argument of its own."""
    given = dict(settings or {})
    if bits is not None and "bits" in given:
        raise InputError(f"{section}.bits is given twice: {bits} and {given['bits']}")
    return given if bits is None else {**given, "bits": bits}


def _configuration(
    model: Model,
    images: Images | None,
    runtime: Runtime,
    where: str,
    sections: Mapping[str, Settings | None],
    fed: Literal["calibration", "validation"] = "calibration",
) -> Config:
    """The checked settings.

    Args:
        where: they were given, for messages.
        sections: the stages' settings.
        fed: what the images are.
    """
    data: dict[str, Any] = {}
    if images is not None:
        data = dict(images._data)
        if images._fed:
            data[fed] = images._fed | ({"images": images.count} if fed == "calibration" else {})
    tree: dict[str, Any] = {
        "name": "model",
        "model": {"prototxt": model.prototxt or Path("net.prototxt"), "weights": Path()},
        "data": data,
        "engine": runtime.engine,
        "caffe": dict(runtime.caffe),
        "threads": runtime.threads,
        "output": Path(),
    }
    tree |= {name: dict(settings) for name, settings in sections.items() if settings}
    for key, owner in (("memory", "Runtime"), ("augment", "Images")):
        if key in tree.get("renorm", ()):
            raise InputError(f"{where}: renorm.{key} holds for all stages: give it to {owner}({key}=...)")
    augment = "train" if images is None else images.augment
    tree["renorm"] = {**tree.get("renorm", {}), "memory": runtime.memory, "augment": augment}
    return checked(tree, where)


def _opener(config: Config) -> OpenEngine:
    return engine_opener(config.engine, config.caffe, config.threads)


def _plain(shape: Sequence[int] | Mapping[str, Sequence[int]] | None) -> object:
    """A shape, or shapes by input, as the configuration wants them."""
    if isinstance(shape, Mapping):
        return {name: list(each) for name, each in shape.items()}
    return None if shape is None else list(shape)
