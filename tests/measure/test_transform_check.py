"""The transform check: no right transform is doubted, and the usual mistakes are named."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from quantize.caffenet import (
    TRAIN,
    InferenceNet,
    NetParameter,
    Weights,
    read_prototxt,
    single_assignment,
)
from quantize.data import Images, Source, Transform, open_source
from quantize.data.feed import Feed
from quantize.data.sources import Image, Selection
from quantize.engines import engine_opener
from quantize.measure.transform_check import (
    COLOR,
    DOUBTFUL,
    IMAGES,
    Scaling,
    TransformCheck,
    check_transform,
    first_norms,
)
from quantize.settings import CaffeProcess
from tests.nets import CROPPED, RESIDUAL, model_of, parse, random_weights, trained_statistics, write_photos

DIGITS = Path(__file__).parents[2] / "configs/models/digits"
OPENER = engine_opener("onnx", CaffeProcess(), 1)
TRAINING, OTHERS = range(300), range(300, 600)
ALIKE = ({0}, {1}, {2, 6}, {3}, {4, 5}, {7}, {8}, {9}, {10}, {11})
"""Transforms of COLOR, by their place, that differ by less than anything can tell."""


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return open_source(write_photos(tmp_path_factory.mktemp("photos") / "lmdb", 600))


@pytest.fixture(scope="module")
def residual() -> NetParameter:
    return InferenceNet.of(parse(RESIDUAL)).net


class Swapped(Selection):
    """Images whose channels come in the opposite order."""

    def read(self, index: int, color: bool | None = None) -> Image:
        image = super().read(index, color)
        return replace(image, pixels=image.pixels[::-1])


def feed(source: Source, numbers: Sequence[int], values: Scaling, crop: int = 9) -> Feed:
    transform = Transform(crop_size=crop, mirror=True, mean_value=values.mean, scale=values.scale)
    chosen = (Swapped if values.swapped else Selection)(source, numbers)
    return Feed({"data": Images(chosen, transform, TRAIN, None)})


def trained(net: NetParameter, source: Source, values: Scaling) -> Weights:
    return trained_statistics(net, random_weights(net, {"data": CROPPED}), feed(source, TRAINING, values))


def mistakes(right: Scaling) -> list[Scaling]:
    """Five kinds: no mean, the mean in RGB order, no scale, another scale, neither."""
    found = [replace(right, mean=()), replace(right, mean=right.mean[::-1]), replace(right, scale=1.0)]
    found += [replace(right, scale=1 / 255), Scaling()]
    return [values for values in found if replace(values, about="") != replace(right, about="")]


@pytest.mark.parametrize("truth", range(len(COLOR)), ids=lambda number: str(COLOR[number]))
def test_whatever_the_net_was_trained_with_is_found(
    residual: NetParameter, photos: Source, truth: int
) -> None:
    weights = trained(residual, photos, COLOR[truth])
    alike = next(group for group in ALIKE if truth in group)
    for start in range(300, 600, IMAGES):
        numbers = range(start, min(start + IMAGES, 600))
        found = check_transform(
            model_of(residual, weights), feed(photos, numbers, COLOR[truth]), OPENER, choose=True
        )
        assert not found.doubtful, found.finding
        assert found.given is not None
        assert found.given.misfit < DOUBTFUL
        best = {COLOR.index(fit.values) for fit in found.best if fit.values is not None}
        assert truth in best
    for given in range(len(COLOR)):
        found = check_transform(model_of(residual, weights), feed(photos, OTHERS, COLOR[given]), OPENER)
        assert not (found.doubtful and given in alike), found.finding
        if found.doubtful:
            assert {COLOR.index(fit.values) for fit in found.better if fit.values} >= alike
    for wrong in mistakes(COLOR[truth]):
        assert check_transform(model_of(residual, weights), feed(photos, OTHERS, wrong), OPENER).doubtful, (
            str(wrong)
        )


def digits(values: Scaling, numbers: Sequence[int]) -> TransformCheck:
    """The digits network with a transform of another than its own, which is among those tried."""
    net = InferenceNet.of(read_prototxt(DIGITS / "digits.prototxt")).net
    weights = Weights.read(DIGITS / "digits.caffemodel")
    own = Scaling((5.0,), 0.125, about="as the prototxt says")
    source = open_source(DIGITS / "calibration_lmdb")
    return check_transform(model_of(net, weights), feed(source, numbers, values, 0), OPENER, [own])


def test_the_digits_network() -> None:
    """A real trained net, with images of 64 pixels and one channel."""
    right = Scaling((5.0,), 0.125)
    rng = np.random.default_rng(0)
    for count in (IMAGES, IMAGES, IMAGES, 16, 4):
        found = digits(right, sorted(rng.choice(997, count, replace=False)))
        assert not found.doubtful, found.finding
    for wrong in mistakes(right):
        found = digits(wrong, range(0, 997, 15))
        assert found.doubtful, found.finding
        assert found.better[0].transform == "mean 5, scale 1/8 (as the prototxt says)"
        assert found.remedy == "--set 'data.transform={mean_value: [5], scale: 0.125}'"


def test_a_wrong_transform_that_no_usual_one_explains_is_only_doubted_if_it_is_hopeless() -> None:
    net = InferenceNet.of(read_prototxt(DIGITS / "digits.prototxt")).net
    weights = Weights.read(DIGITS / "digits.caffemodel")
    source = open_source(DIGITS / "calibration_lmdb")

    def check(values: Scaling) -> TransformCheck:
        return check_transform(model_of(net, weights), feed(source, range(100), values, 0), OPENER)

    hopeless = check(Scaling())
    assert (hopeless.doubtful, hopeless.better) == (True, [])
    assert "no usual transform fits better" in hopeless.finding
    assert "check data.transform" in hopeless.remedy
    little = check(Scaling((), 0.125))
    assert (little.doubtful, little.remedy) == (False, "")


@pytest.mark.parametrize("factors", [(0.67, 0.67, 0.67), (0.8, 1.0, 1.2), (1.3, 1.3, 1.3)])
def test_images_unlike_those_of_training_are_not_held_against_the_transform(
    residual: NetParameter, photos: Source, factors: tuple[float, ...]
) -> None:
    """Darker, warmer and brighter ones: the statistics differ, but no other transform explains them."""

    class Changed(Selection):
        def read(self, index: int, color: bool | None = None) -> Image:
            pixels = super().read(index, color).pixels * np.array(factors, np.float32).reshape(3, 1, 1)
            return Image(pixels.clip(0, 255), None)

    weights = trained(residual, photos, COLOR[0])
    found = check_transform(
        model_of(residual, weights), feed(Changed(photos, OTHERS), range(300), COLOR[0]), OPENER
    )
    assert found.given is not None
    assert found.given.misfit > DOUBTFUL
    assert not found.doubtful, found.finding


def test_swapped_channels_are_said_where_no_other_transform_fits(
    residual: NetParameter, photos: Source
) -> None:
    """One mean for all channels: those of the images tell their order."""
    right = Scaling((127.5,), 1 / 127.5, swapped=True)
    weights = trained(residual, photos, right)
    assert not check_transform(model_of(residual, weights), feed(photos, OTHERS, right), OPENER).doubtful
    found = check_transform(
        model_of(residual, weights), feed(photos, OTHERS, replace(right, swapped=False)), OPENER
    )
    assert found.better[0].values == right
    assert "mean 127.5, scale 1/127.5, channels in the opposite order (RGB) fits better" in found.finding
    assert "reverse the input channels of the first layer's weights" in found.remedy


DATA_NORM = """
layer { name: "data" type: "Input" top: "data" input_param { shape { dim: [1, 3, 9, 9] } } }
layer { name: "data_bn" type: "BatchNorm" bottom: "data" top: "data_bn" batch_norm_param { eps: 0.001 } }
layer { name: "conv" type: "Convolution" bottom: "data_bn" top: "conv"
  convolution_param { num_output: 4 kernel_size: 3 } }
layer { name: "bn" type: "BatchNorm" bottom: "conv" top: "conv" }
layer { name: "side" type: "Convolution" bottom: "data" top: "side"
  convolution_param { num_output: 5 kernel_size: 3 } }
layer { name: "side_relu" type: "ReLU" bottom: "side" top: "side" }
layer { name: "side_bn" type: "BatchNorm" bottom: "side" top: "side_bn" }
layer { name: "side_bn2" type: "BatchNorm" bottom: "side_bn" top: "side_bn" }
"""


def test_only_norms_without_one_in_front_are_looked_at() -> None:
    norms = first_norms(single_assignment(InferenceNet.of(parse(DATA_NORM)).net))
    assert [layer.name for layer in norms] == ["data_bn", "side_bn"]


def test_the_figures_are_what_the_formulas_say(photos: Source) -> None:
    """A BatchNorm right behind the images: numpy computes what it sees."""
    net = InferenceNet.of(parse("".join(DATA_NORM.splitlines(keepends=True)[:5]))).net
    weights = random_weights(net, {"data": CROPPED})
    mean, variance = np.array([90.0, 120.0, 128.0]), np.array([3000.0, 4000.0, 3500.0])
    factor = 2.5
    stored = [factor * mean, factor * variance, np.array([factor])]
    weights.replace("data_bn", [blob.astype(np.float32) for blob in stored])
    images = feed(photos, range(50), Scaling()).inputs["data"]
    pixels = next(iter(images.batches(50)))[0].astype(np.float64)
    seen, spread = pixels.mean(axis=(0, 2, 3)), pixels.var(axis=(0, 2, 3), ddof=1)
    shift = (seen - mean) / np.sqrt(variance + 1e-3)
    ratio = (spread + 1e-3) / (variance + 1e-3)
    found = check_transform(model_of(net, weights), Feed({"data": images}), OPENER)
    assert found.layers == ["data_bn"]
    assert found.images == 50
    assert found.given is not None
    assert found.given.mean_shift == pytest.approx(np.sqrt(np.mean(shift**2)), rel=1e-4)
    assert found.given.variance_ratio == pytest.approx(np.exp(np.mean(np.log(ratio))), rel=1e-4)
    divergence = 0.5 * (ratio + shift**2 - 1 - np.log(ratio))
    assert found.given.misfit == pytest.approx(np.mean(divergence), rel=1e-4)


@pytest.mark.parametrize(
    ("blobs", "why"),
    [
        ((0, 1, 1), "holds no statistics"),
        ((2, 3, 0), "holds no statistics"),
        (None, "the net has no BatchNorm"),
    ],
)
def test_what_cannot_be_checked_is_said(photos: Source, blobs: tuple[int, ...] | None, why: str) -> None:
    _, data, norm, *conv = DATA_NORM.splitlines()[:5]
    text = "\n".join([data, norm, *conv] if blobs else [data, *conv])
    text = text if blobs else text.replace('bottom: "data_bn"', 'bottom: "data"')
    net = InferenceNet.of(parse(text)).net
    weights = random_weights(net, {"data": CROPPED})
    if blobs is not None:
        sizes = zip((3, 3, 1), blobs, strict=True)
        weights.replace("data_bn", [np.full(size, value, np.float32) for size, value in sizes])
    found = check_transform(model_of(net, weights), feed(photos, range(9), Scaling()), OPENER)
    assert (found.given, found.doubtful, found.images) == (None, False, 0)
    assert why in found.finding
