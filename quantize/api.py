"""The Python API: what the command line does, on objects instead of files (docs/python.md).

The functions take a `Model` and give a new one; models are never changed. Settings are the keys of
docs/configuration.md, section by section, and have the same defaults, checks and messages: what is wrong with
them, or with files and images, is an `InputError`. The same settings give the same numbers, bit for bit, as
the commands.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from quantize.arrays import FloatArray, Shape
from quantize.caffenet.model import NAME, Model
from quantize.caffenet.phases import IMAGE_AXES
from quantize.commands.config import checked
from quantize.data.feed import Batch, Feed, Input
from quantize.data.transform import shape_text
from quantize.data.values import Values as FedValues
from quantize.engines import engine_opener
from quantize.errors import InputError
from quantize.host import using_threads
from quantize.job.feeds import calibration_feed, calibration_images, stage_feed, validation_feed
from quantize.job.given import Given
from quantize.job.inputs import told_shapes
from quantize.job.labels import with_labels_that_fit
from quantize.job.transforms import transform_check
from quantize.job.work import Work
from quantize.measure.evaluate import evaluate as compare
from quantize.measure.outputs import net_outputs
from quantize.progress import SILENT, Progress
from quantize.record import Closeness, StageName
from quantize.settings import Config
from quantize.stages.weights import check_unquantized

Settings = Mapping[str, Any]
"""Keys of one section of the configuration, and their values."""


@runtime_checkable
class Samples(Protocol):
    """Values by number: an array, a list of arrays, or whatever else reads them when they are needed."""

    def __len__(self) -> int:
        """Return how many there are."""

    def __getitem__(self, number: int, /) -> npt.ArrayLike:
        """Return number ``number``: an array (channels, height, width), or of what shape the input has."""


Values = Samples | Input | Iterable[npt.ArrayLike]
"""What goes into one input of a net, already transformed."""


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
        memory: bound on what is kept between two layers, such as ``"2GiB"`` (``memory``).
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
        source: an LMDB, an image folder or a list file; or, already transformed, an array (N, C, H, W) or
            other `Samples`, an iterable of arrays (which is gone through once, and kept), or whatever gives
            batches itself (`Input`); or these by input for a net of several.
        model: the model that they are for.
        count: the first so many; None: all.
        labels: the classes of `Samples`, for `evaluate`; an LMDB or a list file has its own.
        inputs: with a file or folder: what goes into inputs that take no images
            (``data.calibration.inputs``).
        transform: replaces what the prototxt says (``data.transform``).
        input_shape: of the net's inputs, where the prototxt does not say it (``data.input_shape``).
        augment: train: crop and mirror at random, as the TRAIN transform says; test: as in the TEST phase, as
            images to evaluate with always are (``data.augment``).
        seed: of what is chosen at random (``data.seed``).

    Raises:
        InputError: there are no such images, fewer than ``count``, or they do not fit the model.
    """

    def __init__(
        self,
        source: str | Path | Values | Mapping[str, Values],
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
        self._chosen: Sequence[int] | None = None
        self._fed: dict[str, object] = {}
        self._data: dict[str, object] = {"seed": seed}
        self._files: Given | None = None
        self._arrays: dict[str, Input] = {}
        if isinstance(source, str | Path):
            if labels is not None:
                raise InputError("labels: an LMDB or a list file has its own; leave them out")
            self._fed = {"source": source, "inputs": dict(inputs or {})}
            self._data |= {"transform": dict(transform or {}), "input_shape": _plain(input_shape)}
            self._files = Given(self._configuration(), model.net)
        elif transform or input_shape or inputs:
            raise InputError(
                "transform, input_shape and inputs are for files and folders; arrays go in as they are"
            )
        else:
            self._arrays = self._of_arrays(source, labels)
        if count is not None and not 1 <= count <= self._present:
            raise InputError(f"count: {count} images asked for but there are {self._present}")
        _ = self.shapes  # reads the first image: whatever is wrong is told now

    def __len__(self) -> int:
        """Return the number of images."""
        if self._chosen is not None:
            return len(self._chosen)
        return self._present if self.count is None else self.count

    @cached_property
    def _present(self) -> int:
        """How many there are, whatever ``count`` says."""
        if self._files is not None:
            return calibration_images(self._files)
        return min(map(len, self._arrays.values()))

    @cached_property
    def shapes(self) -> dict[str, Shape]:
        """By input of the net the shape of one image's values."""
        if self._files is not None:
            return calibration_feed(self._files, 1).shapes
        return {name: values.shape for name, values in self._arrays.items()}

    def batches(self, size: int, start: int = 0, stop: int | None = None) -> Iterator[Batch]:
        """Images ``start <= i < stop`` as they go into the net, in order, ``size`` at a time.

        >>> import quantize
        >>> model = quantize.Model.load("digits.prototxt", "digits.caffemodel")
        >>> images = quantize.Images("calibration_lmdb", model, count=100)
        >>> [batch.feeds["data"].shape for batch in images.batches(64)]
        [(64, 1, 8, 8), (36, 1, 8, 8)]

        Args:
            size: images per batch; the last may have fewer.
            start: the first image.
            stop: one behind the last; None: to the end.

        Raises:
            InputError: an image is damaged or of another shape; names it.
        """
        return self._feed(self._configuration(), "calibration", SILENT).batches(size, start, stop)

    def subset(self, numbers: Sequence[int]) -> Images:
        """Some of the images, by number.

        >>> import quantize
        >>> model = quantize.Model.load("digits.prototxt", "digits.caffemodel")
        >>> images = quantize.Images("calibration_lmdb", model)
        >>> len(images.subset(range(0, len(images), 10)))
        100

        Raises:
            InputError: there is no image of a number, or no number is given.
        """
        if not len(numbers) or not all(0 <= number < len(self) for number in numbers):
            raise InputError(f"subset: give at least one number, and only those from 0 to {len(self) - 1}")
        other = copy(self)
        chosen = range(len(self)) if self._chosen is None else self._chosen
        other._chosen = [chosen[number] for number in numbers]
        return other

    def _configuration(self) -> Config:
        return _configuration(self.model, self, DEFAULT_RUNTIME, "Images", {})

    def _of_arrays(
        self,
        source: Values | Mapping[str, Values],
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
        found = {name: _input(given[name], name, declared.get(name), self.count) for name in names}
        counts = {name: len(each) for name, each in found.items()}
        if len(set(counts.values())) > 1:
            shown = ", ".join(f"{count} for {name}" for name, count in counts.items())
            raise InputError(f"different numbers of values for the inputs: {shown}")
        if labels is not None:
            classes = np.asarray(labels)
            if classes.shape != (counts[names[0]],) or classes.dtype.kind not in "iu":
                raise InputError(f"labels: {counts[names[0]]} whole numbers are needed, one for each image")
            found[names[0]] = _Labeled(found[names[0]], [int(label) for label in classes])
        return found

    def _stage_feed(self, config: Config, stage: StageName, progress: Progress) -> Feed:
        """What a stage looks at: as many images as it asks for, or all where there are fewer."""
        if self._files is not None and self._chosen is None:
            return stage_feed(self._files.with_config(config), stage, progress)
        settings = getattr(config, stage)
        if settings.images > len(self) and "images" in settings.model_fields_set and self.count is None:
            raise InputError(f"{stage}.images asks for {settings.images} images but there are {len(self)}")
        return self._feed(config, "calibration", progress).subset(range(min(settings.images, len(self))))

    def _feed(self, config: Config, fed: Literal["calibration", "validation"], progress: Progress) -> Feed:
        """All images, to calibrate with, or transformed as in the TEST phase to evaluate with."""
        count = self._present if self.count is None else self.count
        if self._files is None:
            feed = Feed(self._arrays, config.data.seed).subset(range(count))
        elif fed == "validation":
            feed = validation_feed(self._files.with_config(config), self.count, progress)
        else:
            feed = calibration_feed(self._files.with_config(config), count, progress)
        return feed if self._chosen is None else feed.subset(self._chosen)

    def _check_transform(self, config: Config, full: Model | None, progress: Progress) -> None:
        """Warn where the transform does not fit the statistics of training, once."""
        if self._files is not None and full is not None and not self._transform_is_checked:
            self._transform_is_checked = True
            check = transform_check(self._files.with_config(config), full)
            if check is not None and check.doubtful:
                progress.warn(f"{check.finding}; {check.remedy}")


@dataclass(frozen=True)
class _Labeled:
    """Values with labels."""

    values: Input
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

    def subset(self, numbers: Sequence[int]) -> _Labeled:
        return _Labeled(self.values.subset(numbers), [self.labels[number] for number in numbers])


def _input(given: Values, name: str, declared: Shape | None, count: int | None) -> Input:
    """What goes into one input of the net.

    Args:
        given: for it.
        name: the input.
        declared: the shape of one image, where the net says it.
        count: no more of an iterable are needed; None: all.
    """
    if isinstance(given, Input):
        found, shape = given, tuple(given.shape)
    else:
        samples = given if isinstance(given, Samples) else _gone_through(given, declared, count)
        if not len(samples):
            raise InputError(f"input {name}: no values")
        first = _array(samples[0], name)
        if first.dtype == np.uint8:
            raise InputError(
                f"input {name}: these are 8-bit pixels, but arrays go into the net as they are: transform "
                "them first (crop, mean, scale), or give a folder or an LMDB, which the prototxt's transform "
                "is for"
            )
        shape = first.shape
        read: Callable[[int], npt.NDArray[Any]] = lambda number: _array(samples[number], name)  # noqa: E731
        found = FedValues(f"input {name}", shape, len(samples), read, "number {}".format)
    if declared is not None and declared != shape:
        raise InputError(
            f"input {name}: an image is {shape_text(shape)} but the net says {shape_text(declared)}"
        )
    return found


def _gone_through(
    images: Iterable[npt.ArrayLike], declared: Shape | None, count: int | None
) -> list[npt.NDArray[Any]]:
    """The images that an iterable gives, one by one or in batches, which have one axis more."""
    axes = IMAGE_AXES if declared is None else len(declared)
    found: list[npt.NDArray[Any]] = []
    for given in images:
        array = np.asarray(given)
        found.extend(array if array.ndim == axes + 1 else [array])
        if count is not None and len(found) >= count:
            break
    return found[:count]


def _array(values: npt.ArrayLike, name: str) -> npt.NDArray[Any]:
    """The values of one image."""
    try:
        array = np.asarray(values)
    except ValueError as error:  # lists of different lengths
        raise InputError(f"input {name}: not an array: {error}") from None
    if array.dtype.kind not in "fiub":
        raise InputError(f"input {name}: holds {array.dtype}, not numbers")
    return array


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
    work = _Stages.of(
        "quantize",
        model,
        images,
        runtime,
        weights=_with(weights, "weights", bits=bits),
        renorm=renorm,
        activations=activations,
    )
    with work.begun(model) as model:
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
    work = _Stages.of("quantize_weights", model, images, runtime, weights=tree)
    with work.begun(model) as model:
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
    work = _Stages.of("renorm", model, images, runtime, weights=weights, renorm=settings)
    with work.begun(model) as model:
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
    work = _Stages.of("quantize_activations", model, images, runtime, activations=tree)
    with work.begun(model) as model:
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
    open_engine = engine_opener(config.engine, config.caffe, config.threads)
    with using_threads(config.threads):
        feed = images._feed(config, "validation", runtime.progress)
        feed = with_labels_that_fit(feed, model.net, runtime.progress)
        found = compare(candidates, net_outputs(model.net), feed, open_engine, runtime.progress)
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


def export(
    model: Model,
    folder: str | Path,
    to: Literal["onnx", "caffe", "ncnn", "mnn", "ranges"] = "onnx",
    *,
    name: str | None = None,
    runtime: Literal["ort", "openvino"] = "ort",
    codes: Literal["packed", "int8"] = "packed",
    pixels: bool = False,
    keep_layers: bool = False,
    transform: Settings | None = None,
    input_shape: Sequence[int] | Mapping[str, Sequence[int]] | None = None,
) -> list[Path]:
    """Write a quantized model as files that are small and run in integers, as `labelfree export` does.

    >>> import quantize
    >>> model = quantize.Model.load("digits.prototxt", "digits.caffemodel")
    >>> images = quantize.Images("calibration_lmdb", model)
    >>> small = quantize.quantize(model, images, activations={"levels": 255, "sums": True})
    >>> [path] = quantize.export(small, "out", input_shape=images.shapes["data"])
    >>> path.name, path.stat().st_size < 60_000
    ('digits.onnx', True)

    Args:
        model: with quantized weights and activations.
        folder: made where it is not there.
        to: the kind of files.
        name: that theirs begin with; None: the net's.
        runtime: the one that an ONNX file is to be fast in.
        codes: of an ONNX file: weights of 4 bits two in a byte, or each in one, for onnxruntime before 1.23.
        pixels: an ONNX file takes pixels of 8 bits, of which the transform makes the net's values.
        keep_layers: a plain Caffe pair keeps alpha, BatchNorm and Scale as layers.
        transform: replaces what the prototxt says (``data.transform``).
        input_shape: of the net's inputs, where the prototxt does not say it (``data.input_shape``).

    Returns:
        The paths of the files.

    Raises:
        InputError: nothing is quantized, or the target cannot express it; nothing is written.
        LabelfreeError: a file could not be written.
    """
    from quantize.exports.integers import IntegerNet  # the rest of the API goes without onnxruntime
    from quantize.exports.onnx import OnnxOptions
    from quantize.exports.targets import TARGETS, Order
    from quantize.job.export import pixels_of

    name = (model.net.name or "model") if name is None else name
    if not NAME.fullmatch(name):
        raise InputError(f"{name!r} cannot be a file's name: use letters, digits and . + - _")
    data = {"transform": dict(transform or {}), "input_shape": _plain(input_shape)}
    given = Given(_configuration(model, None, DEFAULT_RUNTIME, "export", {"data": data}), model.net)
    taken = pixels_of(given) if pixels else None
    net = IntegerNet.of(model, told_shapes(given))
    order = Order(model, net, name, OnnxOptions(runtime, codes, taken), fold=not keep_layers)
    return TARGETS[to].write(order).write(folder)


@dataclass(frozen=True)
class _Stages:
    """The stages on models in memory.

    Attributes:
        work: what they do.
        images: what they look at, if there is any.
    """

    work: Work
    images: Images | None

    @classmethod
    def of(
        cls, where: str, model: Model, images: Images | None, runtime: Runtime, **sections: Settings | None
    ) -> _Stages:
        """Check the settings; ``where`` they were given, for messages."""
        config = _configuration(model, images, runtime, where, sections)

        def feed(stage: StageName) -> Feed:
            if images is None:
                raise InputError(
                    f"{stage}: weights.solver data_aware and weights.budget need images: give some"
                )
            return images._stage_feed(config, stage, runtime.progress)

        return cls(Work.of(config, feed, runtime.progress), images)

    @contextmanager
    def begun(self, model: Model) -> Iterator[Model]:
        """What is to be done before and around the stages; gives the model, checked against the images."""
        config = self.work.config
        with using_threads(config.threads):
            if self.images is not None:
                model = model.checked(self.images.shapes)
                full = model.full or (None if model.is_quantized else model)
                self.images._check_transform(config, full, self.work.progress)
            yield model

    def weights(self, model: Model) -> Model:
        """The stage weights."""
        check_unquantized(model.inference.net)
        _check_activations(model)
        return self.work.weights(model)[0]

    def renorm(self, model: Model, full: Model | None = None) -> Model:
        """The stage renorm."""
        _check_activations(model)
        return self.work.renorm(model, full)[0]

    def activations(self, model: Model) -> Model:
        """The stage activations."""
        _check_activations(model)
        small, found, _ = self.work.activations(model)
        if not found:
            self.work.progress.warn(
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
        data = {**images._data, "augment": images.augment}
        if images._fed:
            data[fed] = images._fed | ({"images": images.count} if fed == "calibration" else {})
    tree: dict[str, Any] = {
        "name": "model",
        "model": {"prototxt": model.prototxt or Path("net.prototxt"), "weights": Path()},
        "data": data,
        "engine": runtime.engine,
        "caffe": dict(runtime.caffe),
        "threads": runtime.threads,
        "memory": runtime.memory,
        "output": Path(),
    }
    tree |= {name: dict(settings) for name, settings in sections.items() if settings}
    for key, owner in (("memory", "Runtime"), ("augment", "Images")):
        if key in tree.get("renorm", ()):
            raise InputError(f"{where}: renorm.{key} holds for all stages: give it to {owner}({key}=...)")
    return checked(tree, where)


def _plain(shape: Sequence[int] | Mapping[str, Sequence[int]] | None) -> object:
    """A shape, or shapes by input, as the configuration wants them."""
    if isinstance(shape, Mapping):
        return {name: list(each) for name, each in shape.items()}
    return None if shape is None else list(shape)
