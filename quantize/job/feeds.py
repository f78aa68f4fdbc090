"""From the configuration to the images a net is fed with: which source, which transform, which input blob."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from quantize.caffenet import (
    TEST,
    TRAIN,
    InferenceNet,
    NetParameter,
    TransformationParameter,
    data_layer,
    declared_shape,
)
from quantize.data.feed import Feed
from quantize.data.loader import Images
from quantize.data.sources import FileSource, Selection, Source, open_source
from quantize.data.transform import Transform, shape_text
from quantize.errors import InputError
from quantize.progress import SILENT, Progress
from quantize.settings import Config

ImagesFrom = Literal["validation", "held_out", "calibration"]
RESIZE_PER_CROP = 256 / 224
"""Photographs of any size are resized so that the shorter side is this much longer than the crop, the common
convention of ImageNet training."""


def calibration_feed(config: Config, net: NetParameter, images: int, progress: Progress = SILENT) -> Feed:
    """The first ``images`` calibration images, transformed as ``renorm.augment`` says.

    Raises:
        InputError: no calibration source, fewer images than asked for, or a transform that cannot be.
    """
    calibration = config.data.calibration
    if calibration is None:
        raise InputError(
            "data.calibration.source is missing: renorm, activations, weights.budget and weights.solver "
            "data_aware need unlabeled images; give an LMDB, an image folder or a list file"
        )
    if calibration.images is not None:
        images = min(images, calibration.images)
    phase = TRAIN if config.renorm.augment == "train" else TEST
    source = open_source(calibration.source)
    return _feed(config, net, source, images, phase, progress)


def validation_feed(
    config: Config, net: NetParameter, images: int | None = None, progress: Progress = SILENT
) -> Feed:
    """The first ``images`` validation images (all where None), transformed for the TEST phase.

    Without a validation source these are calibration images, the ones behind those that renorm uses where
    there are any.

    Raises:
        InputError: neither source, or as `calibration_feed`.
    """
    if config.data.validation is not None:
        return _feed(config, net, open_source(config.data.validation.source), images, TEST, progress)
    if config.data.calibration is None:
        raise InputError(
            "data.validation.source is missing: evaluate needs images; give an LMDB or a list file"
        )
    source = open_source(config.data.calibration.source)
    used = images_used(config)
    if len(source) > used:
        progress.note(f"no validation images: measuring on calibration images from number {used} on, unused")
        return _feed(config, net, source, images, TEST, progress, first=used)
    progress.note("no validation images: measuring on calibration images, which the net has been fitted to")
    return _feed(config, net, source, images, TEST, progress)


def images_used(config: Config) -> int:
    """How many calibration images, counted from the first, the stages look at."""
    used = max(config.renorm.images, config.activations.images)
    if config.weights.solver == "data_aware":
        used = max(used, config.weights.images)
    calibration = config.data.calibration
    return used if calibration is None or calibration.images is None else min(used, calibration.images)


def evaluation_images(config: Config) -> ImagesFrom:
    """Which images `validation_feed` gives."""
    if config.data.validation is not None or config.data.calibration is None:
        return "validation"
    source = open_source(config.data.calibration.source)
    try:
        return "held_out" if len(source) > images_used(config) else "calibration"
    finally:
        source.close()


def _feed(
    config: Config,
    net: NetParameter,
    source: Source,
    images: int | None,
    phase: int,
    progress: Progress,
    first: int = 0,
) -> Feed:
    blob = InferenceNet.of(net).blob
    transform = effective_transform(net, phase, config)
    if (
        isinstance(source, FileSource)
        and transform.crop_size
        and not (transform.resize or transform.resize_short)
    ):
        transform, how = resized_before_crop(transform)
        progress.note(f"{source.path}: {how}")
    source = Selection(source, range(first, len(source))) if first else source
    feed = Images(source, transform, phase, images, config.data.seed, config.threads)
    expected = declared_shape(net, blob)
    if expected is not None and expected != feed.shape:
        raise InputError(
            f"{source.path}: images are {shape_text(feed.shape)} when transformed but input {blob} "
            f"is {shape_text(expected)}; set data.transform.crop_size, resize or resize_short"
        )
    return Feed(blob, feed)


def resized_before_crop(transform: Transform) -> tuple[Transform, str]:
    """A transform with a crop and with the resizing of photographs that goes with it, and what that is.

    With a mean image it is the size of that image, which was made of images resized so; else the shorter side
    becomes a little longer than the crop.
    """
    size = transform.mean_size
    if size is not None:
        how = f"resizing to {size[0]}x{size[1]}, the size of the mean_file (data.transform.resize)"
        return replace(transform, resize=size), how
    short = round(transform.crop_size * RESIZE_PER_CROP)
    how = f"resizing the shorter side to {short} (data.transform.resize_short)"
    return replace(transform, resize_short=short), how


def image_shape(config: Config, net: NetParameter) -> tuple[int, ...] | None:
    """(channels, height, width) of an input image, as far as net and configuration tell."""
    declared = declared_shape(net, InferenceNet.of(net).blob)
    if declared is not None:
        return declared
    if config.data.calibration is not None:
        return calibration_feed(config, net, 1).images.shape
    if config.data.validation is not None:
        return validation_feed(config, net, 1).images.shape
    return None


def effective_transform(net: NetParameter, phase: int, config: Config) -> Transform:
    """The transform of a phase: the prototxt's (of the other phase if need be), then ``data.transform``.

    A net with an Input layer and no crop_size anywhere gets the crop that its input's shape needs, and gray
    images where that has one channel.
    """
    layer = data_layer(net, phase) or data_layer(net, TRAIN + TEST - phase)
    base = config.model.prototxt.parent
    param = layer.transform_param if layer is not None else TransformationParameter()
    transform = Transform.from_proto(param, base)
    if layer is not None and layer.type == "ImageData" and layer.image_data_param.new_height:
        size = (layer.image_data_param.new_height, layer.image_data_param.new_width)
        transform = replace(transform, resize=size)
    given = config.data.transform.model_dump(exclude_none=True)
    if "mean_value" in given:
        given |= {"mean_value": tuple(given["mean_value"]), "mean_file": given.get("mean_file")}
    elif "mean_file" in given:
        given["mean_value"] = ()
    shape = declared_shape(net, InferenceNet.of(net).blob)
    if not (transform.crop_size or "crop_size" in given or "resize" in given) and shape is not None:
        given["crop_size"] = shape[-1] if len(shape) == 3 and shape[1] == shape[2] else 0
    if not (transform.force_color or {"force_color", "force_gray"} & given.keys()):
        given["force_gray"] = transform.force_gray or (shape is not None and shape[0] == 1)
    return replace(transform, **given)


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
        param.mean_file = str(transform.mean_file.resolve())
    if transform.force_color:
        param.force_color = True
    if transform.force_gray:
        param.force_gray = True
    return param
