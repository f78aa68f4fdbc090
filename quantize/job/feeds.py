"""From the configuration to the images a net is fed with: which source, which transform, which input blob."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

from quantize.arrays import Shape
from quantize.caffenet import (
    TEST,
    TRAIN,
    TransformationParameter,
    data_layer,
    foreign_fields,
)
from quantize.caffenet.strings import from_path
from quantize.caffenet.traits import Trait, traits_of
from quantize.data.feed import Feed
from quantize.data.loader import Images
from quantize.data.sources import FileSource, Source
from quantize.data.transform import Transform, shape_text
from quantize.data.values import Values
from quantize.errors import InputError
from quantize.job.given import Given
from quantize.job.inputs import (
    check_counts,
    check_inputs,
    check_order,
    image_input,
    images_present,
    is_placeholder,
    placeholder_text,
    told_shapes,
    values_of,
)
from quantize.progress import SILENT, Progress
from quantize.record import ImagesFrom, StageName
from quantize.settings import Config, Fed

RESIZE_PER_CROP = 256 / 224
"""Photographs of any size are resized so that the shorter side is this much longer than the crop, the common
convention of ImageNet training."""
SIZES_LOOKED_AT = 32
"""Image files whose size decides whether images are resized at all."""


def stage_feed(given: Given, stage: StageName, progress: Progress = SILENT) -> Feed:
    """The calibration images that a stage looks at: as many as it asks for, or all where there are fewer.

    Raises:
        InputError: as `calibration_feed`, or there are fewer images than the user has asked for.
    """
    return calibration_feed(given, stage_images(given, stage, progress), progress)


def stage_images(given: Given, stage: StageName, progress: Progress = SILENT) -> int:
    """How many calibration images a stage looks at.

    Raises:
        InputError: fewer are there than the user has asked for; defaults ask for nothing.
    """
    settings, calibration = getattr(given.config, stage), given.config.data.calibration
    present = calibration_images(given)
    if calibration is None:
        return int(settings.images)
    where = calibration.source or "data.calibration.inputs"
    cure = f"set data.calibration.images={present}, which holds for all stages, or give more images"
    if (calibration.images or 0) > present:
        raise InputError(
            f"{where}: data.calibration.images asks for {calibration.images} images but it "
            f"holds {present}: {cure}"
        )
    available = calibration.images or present
    if settings.images > available and calibration.images is None:
        if "images" in settings.model_fields_set:
            raise InputError(
                f"{where}: {stage}.images asks for {settings.images} images but it holds {present}: {cure}"
            )
        progress.note(f"{where} holds {present} images: all of them are used")
    return int(min(settings.images, available))


def calibration_images(given: Given) -> int:
    """How many calibration images there are."""
    calibration = given.config.data.calibration
    return 0 if calibration is None else images_present(given, calibration, "data.calibration")


def calibration_feed(given: Given, images: int, progress: Progress = SILENT) -> Feed:
    """The first ``images`` calibration images, transformed as ``data.augment`` says.

    Raises:
        InputError: no calibration source, fewer images than asked for, or a transform that cannot be.
    """
    config, calibration = given.config, given.config.data.calibration
    if calibration is None:
        raise InputError(
            "data.calibration.source is missing: renorm, activations, weights.budget and weights.solver "
            "data_aware need unlabeled images; give an LMDB, an image folder or a list file"
        )
    if calibration.images is not None:
        images = min(images, calibration.images)
    return _feed(given, "calibration", images, calibration_phase(config), progress)


def calibration_phase(config: Config) -> int:
    """The phase whose transform calibration images get."""
    return TRAIN if config.data.augment == "train" else TEST


def validation_feed(given: Given, images: int | None = None, progress: Progress = SILENT) -> Feed:
    """The first ``images`` validation images (all where None), transformed for the TEST phase.

    Without a validation source these are calibration images, the ones behind those that renorm uses where
    there are any.

    Raises:
        InputError: neither source, or as `calibration_feed`.
    """
    config = given.config
    if config.data.validation is not None:
        return _feed(given, "validation", images, TEST, progress)
    if config.data.calibration is None:
        raise InputError(
            "data.validation.source is missing: evaluate needs images; give an LMDB or a list file"
        )
    used = images_used(config)
    if calibration_images(given) > used:
        progress.note(f"no validation images: measuring on calibration images from number {used} on, unused")
        return _feed(given, "calibration", images, TEST, progress, first=used)
    progress.note("no validation images: measuring on calibration images, which the net has been fitted to")
    return _feed(given, "calibration", images, TEST, progress)


def images_used(config: Config) -> int:
    """How many calibration images, counted from the first, the stages look at."""
    used = max(config.renorm.images, config.activations.images)
    if config.weights.solver == "data_aware" or config.weights.budget is not None:
        used = max(used, config.weights.images)
    calibration = config.data.calibration
    return used if calibration is None or calibration.images is None else min(used, calibration.images)


def evaluation_images(given: Given) -> ImagesFrom:
    """Which images `validation_feed` gives."""
    config = given.config
    if config.data.validation is not None or config.data.calibration is None:
        return "validation"
    return "held_out" if calibration_images(given) > images_used(config) else "calibration"


def input_shapes(given: Given) -> dict[str, Shape]:
    """By input the shape of one image's values, as far as net, configuration and images tell."""
    config, told = given.config, told_shapes(given)
    if told.keys() >= set(given.inference.inputs):
        return told
    if config.data.calibration is not None:
        return calibration_feed(given, 1).shapes
    if config.data.validation is not None:
        return validation_feed(given, 1).shapes
    return told


def _feed(
    given: Given,
    section: Literal["calibration", "validation"],
    images: int | None,
    phase: int,
    progress: Progress,
    first: int = 0,
) -> Feed:
    """What one section of the data feeds, from image ``first`` on; ``images`` of them, None: all."""
    config = given.config
    fed: Fed | None = getattr(config.data, section)
    assert fed is not None
    key = f"data.{section}"
    blob = image_input(given) if fed.source is not None else None
    test = given.inference
    check_inputs(test, fed, blob, key)
    told = told_shapes(given)
    values = {
        name: values_of(given, each, name, told.get(name), f"{key}.inputs.{name}")
        for name, each in fed.inputs.items()
    }
    present = images_present(given, fed, key)
    check_counts(values, fed, present)
    inputs: dict[str, Images | Values] = {**values}
    if fed.source is not None and blob is not None:
        check_order(given.source(fed.source), values)
        inputs[blob] = _images(given, fed.source, phase, progress)
    present -= first
    images = present if images is None else images
    if not 1 <= images <= present:
        remedy = "ask for at least 1" if images < 1 else "ask for fewer"
        where = fed.source or key
        raise InputError(f"{where}: {images} images asked for but it holds {present}: {remedy}")
    chosen = range(first, first + images)
    return Feed({name: inputs[name].subset(chosen) for name in test.inputs}, config.data.seed)


def _images(given: Given, path: Path, phase: int, progress: Progress) -> Images:
    """The images of a source, transformed: the first is seen now, any can be `subset`."""
    config, net, source = given.config, given.net, given.source(path)
    blob = image_input(given)
    transform = effective_transform(given, phase)
    for layer, foreign in zip(net.layer, foreign_fields(net), strict=True):
        if Trait.IMAGES in traits_of(layer) and foreign is not None:
            progress.note(
                f"layer {layer.name!r}: {foreign} is a field of a fork of Caffe and is not applied; say in "
                "data.transform what the images need"
            )
    how = resizing(given, path, transform)
    if how is not None:
        transform, text = how
        progress.note(f"{path}: {text}")
    images = given.once(
        ("images", path, transform, phase),
        lambda: Images(source, transform, phase, 1, config.data.seed, config.threads),
    )
    expected = told_shapes(given).get(blob or "")
    if expected is not None and expected != images.shape:
        raise InputError(
            f"{path}: images are {shape_text(images.shape)} when transformed but input {blob} "
            f"is {shape_text(expected)}; set data.transform.crop_size, resize or resize_short, or "
            "data.input_shape where the net takes any size"
        )
    told = config.data.input_shape is not None or expected is None
    if not told and is_placeholder(images.shape) and source.read(0).pixels.shape[1:] != images.shape[1:]:
        progress.note(placeholder_text(blob or "", images.shape, "data.input_shape"))
    return images


def resizing(given: Given, path: Path, transform: Transform) -> tuple[Transform, str] | None:
    """`resized_before_crop` for the source that a path names."""
    look = partial(resized_before_crop, given.source(path), transform)
    return given.once(("resizing", path, transform), look)


def resized_before_crop(source: Source, transform: Transform) -> tuple[Transform, str] | None:
    """The transform with a resizing of image files that nobody has said, and what that is.

    With a mean image they get its size, as the images had that it is the mean of; else the shorter side
    becomes a little longer than the crop. None where something is said, where images come from an LMDB, made
    for a net, and where image files have the size that the mean or the crop needs: these are taken as they
    are.

    Raises:
        InputError: the mean image cannot be read.
    """
    crop = transform.crop_size
    if not isinstance(source, FileSource) or not crop or transform.resize or transform.resize_short:
        return None
    mean = transform.mean_size
    if all(size == (mean or (crop, crop)) for size in source.sizes(SIZES_LOOKED_AT)):
        return None
    if mean is not None:
        shown = f"{mean[0]}x{mean[1]}"
        how = f"images are not all {shown} as the mean_file is: resizing to {shown} (data.transform.resize)"
        return replace(transform, resize=mean), how
    short = round(crop * RESIZE_PER_CROP)
    how = (
        f"images are not all {crop}x{crop} as the net wants them: resizing the shorter side to {short} "
        "(data.transform.resize_short)"
    )
    return replace(transform, resize_short=short), how


def effective_transform(given: Given, phase: int) -> Transform:
    """The transform of a phase: the prototxt's (of the other phase if need be), then ``data.transform``.

    A net with an Input layer and no crop_size anywhere gets the crop that its input's shape needs, and gray
    images where that has one channel.
    """
    config, net = given.config, given.net
    layer = data_layer(net, phase) or data_layer(net, TRAIN + TEST - phase)
    base = config.model.prototxt.parent
    param = layer.transform_param if layer is not None else TransformationParameter()
    try:
        transform = Transform.from_proto(param, base)
    except InputError as error:
        name = layer.name if layer is not None else ""
        raise InputError(f"{config.model.prototxt}: transform_param of layer {name!r}: {error}") from error
    if layer is not None and layer.type == "ImageData" and layer.image_data_param.new_height:
        size = (layer.image_data_param.new_height, layer.image_data_param.new_width)
        transform = replace(transform, resize=size)
    keys = config.data.transform.model_dump(exclude_none=True)
    if "mean_value" in keys:
        keys |= {"mean_value": tuple(keys["mean_value"]), "mean_file": keys.get("mean_file")}
    elif "mean_file" in keys:
        keys["mean_value"] = ()
    # What data.transform says replaces also what it excludes.
    if "resize_short" in keys:
        transform = replace(transform, resize=None)
    if keys.get("force_color") or keys.get("force_gray"):
        transform = replace(transform, force_color=False, force_gray=False)
    shape = told_shapes(given).get(image_input(given) or "")
    if not (transform.crop_size or "crop_size" in keys or "resize" in keys) and shape is not None:
        keys["crop_size"] = shape[-1] if len(shape) == 3 and shape[1] == shape[2] else 0
    if not (transform.force_color or {"force_color", "force_gray"} & keys.keys()):
        keys["force_gray"] = transform.force_gray or (shape is not None and shape[0] == 1)
    try:
        transform = replace(transform, **keys)
    except InputError as error:
        raise InputError(f"data.transform: {error}") from error
    if transform.scale == 0:
        raise InputError(
            "scale is 0, which makes every pixel 0; leave it out, or give the net's factor "
            "(data.transform.scale)"
        )
    return transform


def to_proto(transform: Transform) -> TransformationParameter:
    """A transform as Caffe's transform_param, mean_file as an absolute path; resizing has no counterpart."""
    param = TransformationParameter()
    if transform.crop_size:
        param.crop_size = transform.crop_size
    if transform.mirror:
        param.mirror = True
    if transform.scale != 1:
        param.scale = transform.scale
    param.mean_value.extend(transform.mean_value)
    if transform.mean_file is not None:
        param.mean_file = from_path(transform.mean_file.resolve())
    if transform.force_color:
        param.force_color = True
    if transform.force_gray:
        param.force_gray = True
    return param
