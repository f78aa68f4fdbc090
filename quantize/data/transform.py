"""Caffe's data transformation: what happens to an image between its source and the net."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
from google.protobuf.message import DecodeError

from quantize.arrays import FloatArray, Shape
from quantize.caffenet import TRAIN, BlobProto, TransformationParameter
from quantize.caffenet.other_formats import other_format
from quantize.caffenet.strings import to_path
from quantize.data.decode import MAX_PIXELS
from quantize.data.sources import Pixels
from quantize.errors import InputError
from quantize.files import read_file

ImageShape = tuple[int, int, int]
MAX_MEAN_BYTES = 256 << 20
MAX_CHANNELS = 512
"""OpenCV's limit (CV_CN_MAX), which resizing has."""


@dataclass(frozen=True)
class Transform:
    """out = (crop(resize(pixels)) - mean) * scale, mirrored or not, in float32; as caffe::DataTransformer.

    Args:
        crop_size: side of the square cut out: at a random place in TRAIN, from the centre in TEST; 0: none.
        mirror: flip left to right with probability 1/2, in TRAIN and in TEST alike, as Caffe does.
        scale: factor after the mean is subtracted.
        mean_value: one mean for all channels, or one per channel.
        mean_file: a binaryproto BlobProto of (1, channels, height, width), the image's size before the
            crop; the mean is cropped and mirrored as the image is.
        force_color: decode encoded images to BGR whatever they are; raw pixels stay as they are.
        force_gray: decode encoded images to gray.
        resize_short: first resize so that the shorter side has this many pixels (bilinear, the longer
            side rounded half to even); 0: not. Ours, for images of various sizes.
        resize: first resize to (height, width), bilinear, as new_height and new_width of ImageData do;
            None: not.

    Raises:
        InputError: impossible or contradicting settings.
    """

    crop_size: int = 0
    mirror: bool = False
    scale: float = 1.0
    mean_value: tuple[float, ...] = ()
    mean_file: Path | None = None
    force_color: bool = False
    force_gray: bool = False
    resize_short: int = 0
    resize: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        """Check the settings against each other; files and images are checked when they are seen."""
        if self.crop_size < 0:
            raise InputError(f"crop_size is {self.crop_size}: it must be 0 (no crop) or more")
        if self.resize_short < 0:
            raise InputError(f"resize_short is {self.resize_short}: it must be 0 (no resizing) or more")
        if self.resize is not None and min(self.resize) <= 0:
            raise InputError(f"resize is {list(self.resize)}: height and width must be positive")
        if self.resize is not None and self.resize_short:
            raise InputError("resize and resize_short are both set: keep one")
        if self.mean_file is not None and self.mean_value:
            raise InputError("mean_file and mean_value are both set: keep one, as Caffe demands")
        if self.force_color and self.force_gray:
            raise InputError("force_color and force_gray are both set: keep one, as Caffe demands")
        if not math.isfinite(self.scale) or not all(map(math.isfinite, self.mean_value)):
            raise InputError("scale and mean_value must be finite numbers")

    @classmethod
    def from_proto(cls, param: TransformationParameter, base: Path) -> Transform:
        """Take over a layer's transform_param; a relative mean_file starts at the folder ``base``."""
        return cls(
            crop_size=param.crop_size,
            mirror=param.mirror,
            scale=param.scale,
            mean_value=tuple(param.mean_value),
            mean_file=base / to_path(param.mean_file) if param.HasField("mean_file") else None,
            force_color=param.force_color,
            force_gray=param.force_gray,
        )

    @property
    def color(self) -> bool | None:
        """How encoded images are to be decoded; see Source.read."""
        return True if self.force_color else False if self.force_gray else None

    @property
    def mean_size(self) -> tuple[int, int] | None:
        """Height and width that an image must have before the crop, for the mean of mean_file; None: any.

        Raises:
            InputError: the file cannot be read.
        """
        return None if self.mean_file is None else self._mean_image.shape[1:]

    def shape_of(self, image: ImageShape) -> ImageShape:
        """ImageShape that an image of shape (channels, height, width) gets.

        Raises:
            InputError: the image is smaller than the crop, or the mean does not fit it; the message
                lacks the image's name.
        """
        channels, height, width = image[0], *self._resized_size(image)
        if self.mean_file is not None and self._mean_image.shape != (channels, height, width):
            raise InputError(
                f"the mean of {self.mean_file} is {shape_text(self._mean_image.shape)} but the image is"
                f" {shape_text((channels, height, width))}: use the mean of these images, or mean_value"
            )
        if len(self.mean_value) not in (0, 1, channels):
            raise InputError(
                f"{len(self.mean_value)} mean_value for an image of {channels} channels: give 1 or {channels}"
            )
        if not self.crop_size:
            return channels, height, width
        if self.crop_size > min(height, width):
            raise InputError(
                f"crop_size {self.crop_size} is larger than the image"
                f" ({shape_text((channels, height, width))}): set resize_short, or a smaller crop_size"
            )
        return channels, self.crop_size, self.crop_size

    def __call__(
        self, pixels: Pixels, phase: int, rng: np.random.Generator, out: FloatArray | None = None
    ) -> FloatArray:
        """Transform one image.

        Args:
            pixels: uint8 or float32, shape (channels, height, width).
            phase: TRAIN or TEST.
            rng: decides on the mirror, then on the crop's top and left; Caffe's generator is another one.
            out: float32 array of the shape that shape_of gives, to write into.

        Returns:
            ``out``, or a new array.

        Raises:
            InputError: as shape_of.
        """
        channels, height, width = self.shape_of(pixels.shape)
        pixels = self._resized(pixels)
        mirrored = self.mirror and rng.integers(2) == 1
        top, left = pixels.shape[1] - height, pixels.shape[2] - width
        if phase == TRAIN and self.crop_size:
            top, left = int(rng.integers(top + 1)), int(rng.integers(left + 1))
        else:
            top, left = top // 2, left // 2
        window = np.s_[:, top : top + height, left : left + width]
        flip = np.s_[:, :, ::-1] if mirrored else np.s_[:]
        if out is None:
            out = np.empty((channels, height, width), np.float32)
        out[...] = pixels[window][flip]
        if self.mean_file is not None:
            out -= self._mean_image[window][flip]
        elif self.mean_value:
            out -= np.array(self.mean_value, np.float32).reshape(-1, 1, 1)
        if self.scale != 1:
            out *= np.float32(self.scale)
        return out

    @cached_property
    def _mean_image(self) -> FloatArray:
        """The mean_file's blob, shape (channels, height, width)."""
        assert self.mean_file is not None
        return read_mean(self.mean_file)

    def _resized_size(self, image: ImageShape) -> tuple[int, int]:
        """Height and width after resizing."""
        _, height, width = image
        if self.resize is not None:
            height, width = self.resize
        elif self.resize_short:
            height, width = short_side_size(height, width, self.resize_short)
        return height, width

    def _resized(self, pixels: Pixels) -> Pixels:
        return resized(pixels, self._resized_size(pixels.shape))


def short_side_size(height: int, width: int, short: int) -> tuple[int, int]:
    """Height and width whose shorter one is ``short``, with the same aspect."""
    if height < width:
        return short, round(width * short / height)
    return round(height * short / width), short


def resized(pixels: Pixels, size: tuple[int, int]) -> Pixels:
    """Resize (channels, height, width) pixels to (height, width) ``size``, bilinear as cv::resize.

    Raises:
        InputError: the result would be too large.
    """
    channels = pixels.shape[0]
    if pixels.shape[1:] == size:
        return pixels
    if size[0] * size[1] > MAX_PIXELS or channels > MAX_CHANNELS:
        raise InputError(
            f"resizing {shape_text(pixels.shape)} to {size[0]}x{size[1]} would take too much memory"
        )
    interleaved: npt.NDArray[Any] = np.ascontiguousarray(pixels.transpose(1, 2, 0))
    result: Pixels = cv2.resize(interleaved, size[::-1], interpolation=cv2.INTER_LINEAR)  # type: ignore[assignment]
    planar: Pixels = result.reshape(*size, channels).transpose(2, 0, 1)
    return planar


def read_mean(path: Path) -> FloatArray:
    """Read a mean image: a binaryproto BlobProto, as compute_image_mean of Caffe writes.

    Returns:
        float32 array (channels, height, width).

    Raises:
        InputError: the file is missing or damaged, or its blob is not one image.
    """
    try:
        data = read_file(path, "mean_file", MAX_MEAN_BYTES)
    except InputError as error:
        raise InputError(
            f"{error} (a relative mean_file of a prototxt starts at the prototxt's folder; "
            "data.transform.mean_file replaces it)"
        ) from None
    try:
        blob = BlobProto.FromString(data)
    except DecodeError as error:
        other = other_format(data)
        what = f"but {other.what}; give the BlobProto, or mean_value" if other else "(binaryproto)"
        raise InputError(f"{path}: the mean_file is not a BlobProto {what}") from error
    shape = (
        tuple(blob.shape.dim)
        if blob.HasField("shape")
        else (blob.num, blob.channels, blob.height, blob.width)
    )
    values = np.array(blob.data or blob.double_data, np.float32)
    if len(shape) != 4 or shape[0] != 1 or min(shape) <= 0 or math.prod(shape) != len(values):
        raise InputError(
            f"{path}: the mean_file's blob is {shape_text(shape)} with {len(values)} values;"
            " it must be one image"
        )
    if not np.isfinite(values).all():
        raise InputError(f"{path}: the mean_file holds values that are not finite")
    return values.reshape(shape[1:])


def shape_text(shape: Shape) -> str:
    """Return a shape as in messages: 3x224x224."""
    return "x".join(map(str, shape))
