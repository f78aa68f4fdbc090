"""Statistics paired with full precision's: against the formula in float64, and what they are for."""

from pathlib import Path

import numpy as np
import pytest

from quantize.caffenet import TRAIN, InferenceNet, NetParameter, Weights, single_assignment
from quantize.caffenet.model import Model
from quantize.caffenet.quantized import correctable
from quantize.commands.config import load
from quantize.data import Transform
from quantize.data.feed import Feed
from quantize.engines import engine_opener
from quantize.errors import InputError
from quantize.numerics.moments import Moments, moments_of
from quantize.settings import CaffeProcess, Config, RenormSettings, WeightSettings
from quantize.stages.data_aware import CalibrationSweep, data_aware
from quantize.stages.renorm import Reference, renorm, stored_statistics, variance_ratio
from quantize.stages.weights import choices
from tests.heard import Heard
from tests.nets import (
    CROPPED,
    RESIDUAL,
    images_of,
    model_of,
    parse,
    quantized_weights,
    random_weights,
    renorm_weights,
    write_images,
)

ROOT = Path(__file__).resolve().parents[2]
COUNT = 23
OPEN = engine_opener("onnx", CaffeProcess(), 2)
NORMS = ("bn1", "bn_left", "bn_right_a", "bn_right_b", "bn_fc1")


@pytest.fixture(scope="module")
def feed(tmp_path_factory: pytest.TempPathFactory) -> Feed:
    path = write_images(tmp_path_factory.mktemp("images") / "lmdb", COUNT)
    transform = Transform(crop_size=9, mirror=True, scale=0.02, mean_value=(100.0,))
    return Feed({"data": images_of(path, transform, TRAIN)})


@pytest.fixture(scope="module")
def net() -> NetParameter:
    return parse(RESIDUAL)


@pytest.fixture(scope="module")
def full(net: NetParameter) -> Model:
    return Model(net, random_weights(InferenceNet.of(net).net, {"data": CROPPED}))


@pytest.fixture(scope="module")
def quantized(net: NetParameter, full: Model) -> tuple[NetParameter, Weights]:
    chosen = choices(full.inference.net, WeightSettings(bits=3))
    changed, weights, _ = quantized_weights(net, full.weights, chosen, "optimal")
    return InferenceNet.of(changed).net, weights


def inputs_of_norms(net: NetParameter, weights: Weights, feed: Feed) -> dict[str, Moments]:
    """The moments of what every BatchNorm reads, all images in one batch."""
    flat = single_assignment(net)
    bottoms = {layer.name: layer.bottom[0] for layer in flat.layer if layer.type == "BatchNorm"}
    pixels = next(feed.batches(COUNT)).feeds["data"]
    engine = OPEN(flat, weights, {"data": CROPPED})
    blobs = engine.compile(0, len(flat.layer), list(bottoms.values())).run({"data": pixels}).blobs
    return {name: moments_of(blobs[bottom]) for name, bottom in bottoms.items()}


def normalized(moments: Moments, weights: Weights, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation of every channel behind a BatchNorm."""
    mean, variance = stored_statistics(weights[name])
    scale = np.sqrt(variance + 1e-5)
    return (moments.mean - mean) / scale, np.sqrt(moments.m2 / moments.count) / scale


# ---- What they are for ----


@pytest.mark.parametrize("factor", [1.0, 0.75])
@pytest.mark.parametrize("memory", [None, 60_000])
def test_nothing_quantized_gives_back_what_is_stored(
    full: Model, feed: Feed, memory: int | None, factor: float
) -> None:
    weights = full.weights.copy()
    for name in NORMS:
        mean, variance, _ = weights[name]
        weights.replace(name, [mean * factor, variance * factor, np.full(1, factor, np.float32)])
    original = Model(full.net, weights)
    renormed, shifts = renorm_weights(full.inference.net, weights, feed, OPEN, memory, full=original)
    for name in NORMS:
        mean, variance, one = renormed[name]
        wanted_mean, wanted_variance = stored_statistics(weights[name])
        np.testing.assert_allclose(mean, wanted_mean, rtol=1e-6, atol=1e-6 * np.sqrt(wanted_variance.max()))
        np.testing.assert_allclose(variance, wanted_variance, rtol=1e-6)
        assert one == 1
    assert all(shift.mean_shift < 1e-6 for shift in shifts)
    assert all(shift.variance_ratio == pytest.approx(1, abs=1e-6) for shift in shifts)


def test_every_normalized_channel_has_full_precisions_mean_and_deviation(
    full: Model, quantized: tuple[NetParameter, Weights], feed: Feed
) -> None:
    net, weights = quantized
    renormed, _ = renorm_weights(net, weights, feed, OPEN, None, full=full)
    wanted, seen = (
        inputs_of_norms(full.inference.net, full.weights, feed),
        inputs_of_norms(net, renormed, feed),
    )
    for name in NORMS:
        for ours, theirs in zip(
            normalized(seen[name], renormed, name), normalized(wanted[name], full.weights, name), strict=True
        ):
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)
    plain, _ = renorm_weights(net, weights, feed, OPEN, None)
    seen = inputs_of_norms(net, plain, feed)
    mean, _ = normalized(seen["bn_fc1"], plain, "bn_fc1")
    assert np.abs(mean - normalized(wanted["bn_fc1"], full.weights, "bn_fc1")[0]).max() > 0.1


def test_the_result_does_not_depend_on_memory_micro_batch_or_threads(
    full: Model, quantized: tuple[NetParameter, Weights], feed: Feed
) -> None:
    """The memory bounds micro-batches, too: to all images, 8, 2 or 1."""
    expected, _ = renorm_weights(*quantized, feed, OPEN, None, full=full)
    for threads in (5, 1, 2):
        opener = engine_opener("onnx", CaffeProcess(), threads)
        for memory in (None, 160_000, 40_000, 20_000):
            found, _ = renorm_weights(*quantized, feed, opener, memory, full=full)
            for name in NORMS:
                for got, wanted in zip(found[name], expected[name], strict=True):
                    np.testing.assert_allclose(got, wanted, rtol=2e-5, atol=1e-5)


# ---- The formula, in float64, on a net small enough to be written out ----

SMALL = """
  layer { name: "data" type: "Input" top: "data" input_param { shape { dim: 1 dim: 3 dim: 9 dim: 9 } } }
  layer { name: "a" type: "Convolution" bottom: "data" top: "a"
    convolution_param { num_output: 5 kernel_size: 1 } }
  layer { name: "bn_a" type: "BatchNorm" bottom: "a" top: "a" batch_norm_param { eps: 0.01 } }
  layer { name: "relu" type: "ReLU" bottom: "a" top: "a" }
  layer { name: "b" type: "Convolution" bottom: "a" top: "b"
    convolution_param { num_output: 4 kernel_size: 1 bias_term: false } }
  layer { name: "bn_b" type: "BatchNorm" bottom: "b" top: "b" }
"""


def by_hand(
    pixels: np.ndarray, full: Weights, weights: Weights, epsilon: dict[str, float]
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Both nets in float64, layer by layer; every formula as it is written in docs/method.md."""
    x = x_full = np.moveaxis(pixels.astype(np.float64), 1, 0).reshape(3, -1)
    found = {}
    for conv in "ab":
        name = f"bn_{conv}"
        kernels, *bias = (blob.astype(np.float64) for blob in weights[conv])
        full_kernels, *full_bias = (blob.astype(np.float64) for blob in full[conv])
        x = kernels.reshape(len(kernels), -1) @ x + (bias[0][:, None] if bias else 0)
        x_full = full_kernels.reshape(len(kernels), -1) @ x_full + (full_bias[0][:, None] if bias else 0)
        (mu, s2), e = stored_statistics(full[name]), epsilon[name]
        total = x.var(axis=1) * (s2 + e) / x_full.var(axis=1)
        mean = x.mean(axis=1) - (x_full.mean(axis=1) - mu) * np.sqrt(total / (s2 + e))
        found[name] = mean, total - e
        x = np.maximum((x - mean[:, None]) / np.sqrt(total)[:, None], 0)
        x_full = np.maximum((x_full - mu[:, None]) / np.sqrt(s2 + e)[:, None], 0)
    return found


@pytest.fixture(scope="module")
def small() -> tuple[NetParameter, Weights, Weights]:
    """A net, its blobs, and blobs with other kernels."""
    net = InferenceNet.of(parse(SMALL)).net
    weights = random_weights(net, {"data": CROPPED})
    changed = weights.copy()
    for name in "ab":
        kernels, *bias = weights[name]
        noise = np.random.default_rng(1).normal(0, 0.1, kernels.shape)
        changed.replace(name, [kernels * 1.3 + noise, *bias])
    return net, weights, changed


def test_it_is_the_formula(small: tuple[NetParameter, Weights, Weights], feed: Feed) -> None:
    net, weights, changed = small
    pixels = next(feed.batches(COUNT)).feeds["data"]
    expected = by_hand(pixels, weights, changed, {"bn_a": 0.01, "bn_b": 1e-5})
    renormed, _ = renorm_weights(net, changed, feed, OPEN, None, full=model_of(net, weights))
    for name, (mean, variance) in expected.items():
        np.testing.assert_allclose(renormed[name][0], mean, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(renormed[name][1], variance, rtol=1e-5)


# ---- Channels that say nothing, statistics that are none ----


def moments(values: np.ndarray) -> Moments:
    return moments_of(values.T.reshape(1, values.shape[1], values.shape[0]).astype(np.float32))


def test_a_constant_channel_only_moves_its_mean() -> None:
    rng = np.random.default_rng(0)
    lively = rng.normal(3, 2, 100)
    # Dead in both nets, in full precision only, in the quantized one only; and one that is alive.
    full = moments(np.stack([np.full(100, 5.0), np.full(100, 1e4), lively, lively], axis=1))
    seen = moments(np.stack([np.full(100, 7.0), lively, np.full(100, -2.0), 2 * lively], axis=1))
    np.testing.assert_allclose(variance_ratio(full, seen), [1, 1, 1, 4], rtol=1e-6)
    reference = Reference("x", np.arange(4.0), np.full(4, 0.5), 1e-3)
    mean, variance = reference.paired(full, seen)
    np.testing.assert_allclose(variance, [0.5, 0.5, 0.5, 4 * 0.501 - 1e-3], rtol=1e-6)
    np.testing.assert_allclose(mean[:3], (reference.mean + seen.mean - full.mean)[:3])


def test_a_variance_that_would_be_negative_is_0_and_the_mean_still_right() -> None:
    values = np.random.default_rng(0).normal(3, 2, (100, 1))
    full, seen = moments(values), moments(values / 1000)
    reference = Reference("x", np.ones(1), np.ones(1), 1e-2)
    mean, variance = reference.paired(full, seen)
    assert variance == 0
    np.testing.assert_allclose((seen.mean - mean) / 0.1, (full.mean - 1) / np.sqrt(1.01), rtol=1e-6)


@pytest.mark.parametrize("case", ["no statistics", "no variance", "dead", "dead in full precision"])
def test_nothing_becomes_a_nan(small: tuple[NetParameter, Weights, Weights], feed: Feed, case: str) -> None:
    net, weights, changed = (part.copy() if isinstance(part, Weights) else part for part in small)
    mean, variance, _ = weights["bn_a"]
    if case == "no statistics":  # Caffe takes mean and variance 0 then
        for blobs in (weights, changed):
            blobs.replace("bn_a", [mean, variance, np.zeros(1, np.float32)])
    elif case == "no variance":
        for blobs in (weights, changed):
            blobs.replace("bn_a", [mean, np.where(np.arange(5) == 2, 0, variance), np.ones(1, np.float32)])
    else:
        kernels, bias = (blob.copy() for blob in weights["a"])
        kernels[1] = 0
        weights.replace("a", [kernels, bias])
        if case == "dead":
            changed.replace("a", [kernels, bias + 1])
    renormed, shifts = renorm_weights(net, changed, feed, OPEN, None, full=model_of(net, weights))
    for name in ("bn_a", "bn_b"):
        assert all(np.isfinite(blob).all() for blob in renormed[name])
        assert (renormed[name][1] >= 0).all()
    assert all(np.isfinite([shift.mean_shift, shift.variance_ratio]).all() for shift in shifts)
    if case == "no statistics":
        same, _ = renorm_weights(net, weights, feed, OPEN, None, full=model_of(net, weights))
        np.testing.assert_allclose(same["bn_a"][0], 0, atol=1e-6)
        np.testing.assert_allclose(same["bn_a"][1], 0, atol=1e-6)


def test_errors_name_layers_as_the_files_do(feed: Feed) -> None:
    net = InferenceNet.of(parse(SMALL.replace('type: "ReLU"', 'type: "NobodyKnows"'))).net
    weights = random_weights(InferenceNet.of(parse(SMALL)).net, {"data": CROPPED})
    with pytest.raises(InputError, match=r"^layer 'relu' \(NobodyKnows\)"):
        renorm_weights(net, weights, feed, OPEN, None, full=model_of(net, weights))


# ---- Inside the data-aware solver ----


@pytest.mark.parametrize("statistics", ["paired", "measured"])
def test_the_solver_fits_to_the_statistics_that_renorm_gives(
    net: NetParameter, full: Model, feed: Feed, monkeypatch: pytest.MonkeyPatch, statistics: str
) -> None:
    seen: dict[str, list[np.ndarray]] = {}

    def opened(*given: object) -> object:
        engine = OPEN(*given)  # type: ignore[arg-type]
        original = engine.set_blobs

        def recorded(layer: str, blobs: list[np.ndarray]) -> None:
            seen[layer] = blobs
            original(layer, blobs)

        monkeypatch.setattr(engine, "set_blobs", recorded)
        return engine

    calibration = CalibrationSweep(feed, opened, None, statistics)  # type: ignore[arg-type]
    chosen = choices(full.inference.net, WeightSettings(bits=3))
    changed, weights, _ = quantized_weights(net, full.weights, chosen, "data_aware", calibration=calibration)
    reference = full if statistics == "paired" else None
    final, _ = renorm_weights(InferenceNet.of(changed).net, weights, feed, OPEN, None, full=reference)
    biased = 1e-3 if statistics == "paired" else 2.5e-2
    for name in NORMS:
        np.testing.assert_allclose(seen[name][0], final[name][0], rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(seen[name][1], final[name][1], rtol=2 * biased)


def test_nothing_to_round_leaves_the_solver_with_what_is_stored(full: Model, feed: Feed) -> None:
    """8 bits of the first layer alone: the layers behind are fitted as if nothing had happened."""
    chosen = {"fc2": WeightSettings(bits=8, grid="uniform")}
    found = data_aware(full, chosen, CalibrationSweep(feed, OPEN, None))
    assert found["fc2"].output_sqnr_db is not None
    assert found["fc2"].output_sqnr_db > 35


# ---- Biases, where no BatchNorm follows ----

BARE = """
  layer { name: "data" type: "Input" top: "data" input_param { shape { dim: 1 dim: 3 dim: 9 dim: 9 } } }
  layer { name: "a" type: "Convolution" bottom: "data" top: "a"
    convolution_param { num_output: 5 kernel_size: 3 } }
  layer { name: "relu_a" type: "ReLU" bottom: "a" top: "a" }
  layer { name: "no_bias" type: "Convolution" bottom: "a" top: "no_bias"
    convolution_param { num_output: 4 kernel_size: 3 bias_term: false } }
  layer { name: "relu_b" type: "ReLU" bottom: "no_bias" top: "no_bias" }
  layer { name: "c" type: "Convolution" bottom: "no_bias" top: "c"
    convolution_param { num_output: 4 kernel_size: 3 } }
  layer { name: "norm" type: "BatchNorm" bottom: "c" top: "c" }
  layer { name: "fc" type: "InnerProduct" bottom: "c" top: "fc" inner_product_param { num_output: 6 } }
"""


@pytest.mark.parametrize("memory", [None, 20_000])
def test_the_means_of_outputs_are_kept_by_biases(feed: Feed, memory: int | None) -> None:
    net = InferenceNet.of(parse(BARE)).net
    full = model_of(net, random_weights(net, {"data": CROPPED}))
    changed, weights, _ = quantized_weights(
        net, full.weights, choices(net, WeightSettings(bits=2)), "optimal"
    )
    biases = correctable(changed)
    assert biases == {name: f"{name}_alpha_term" for name in ("a", "c", "fc")}
    corrected, _ = renorm_weights(changed, weights, feed, OPEN, memory, full=full, biases=True)

    def means(net: NetParameter, weights: Weights, layer: str) -> np.ndarray:
        """Of the layer's output, behind its alpha."""
        flat = single_assignment(net)
        top = next(each for each in reversed(flat.layer) if each.name.startswith(layer)).top[0]
        pixels = next(feed.batches(COUNT)).feeds["data"]
        engine = OPEN(flat, weights, {"data": CROPPED})
        return moments_of(engine.compile(0, len(flat.layer), [top]).run({"data": pixels}).blobs[top]).mean

    for name in ("a", "fc"):
        wanted = means(net, full.weights, name)
        np.testing.assert_allclose(means(changed, corrected, name), wanted, rtol=1e-4, atol=1e-4)
        assert np.abs(means(changed, weights, name) - wanted).max() > 1e-2
        (_, bias), (alpha, shift) = corrected[name], corrected[f"{name}_alpha_term"]
        np.testing.assert_allclose(shift, bias * (1 - alpha), rtol=1e-4, atol=1e-5)
    # The BatchNorm behind c takes its mean away, and without a bias there is nothing to write to.
    for name in ("c", "c_alpha_term", "no_bias", "no_bias_alpha_term"):
        for old, new in zip(weights[name], corrected[name], strict=True):
            np.testing.assert_array_equal(old, new)


def test_it_says_whose_mean_cannot_be_kept(feed: Feed) -> None:
    net = InferenceNet.of(parse(BARE)).net
    full = model_of(net, random_weights(net, {"data": CROPPED}))
    settings = WeightSettings(bits=2)
    changed, weights, _ = quantized_weights(net, full.weights, choices(net, settings), "optimal")
    for asked in (True, False):
        heard = Heard()
        renorm(
            model_of(changed, weights), feed, RenormSettings(bias_correction=asked), OPEN, None, heard, full
        )
        said = [note for note in heard.notes if "is not kept" in note]
        assert len(said) == asked
        # Not of c, which a BatchNorm follows, and not of those that have a bias.
        assert all("the mean of what no_bias puts out" in note for note in said)


def test_nothing_quantized_leaves_the_biases(feed: Feed) -> None:
    net = InferenceNet.of(parse(BARE)).net
    full = model_of(net, random_weights(net, {"data": CROPPED}))
    chosen = choices(net, WeightSettings(bits=2))
    changed, weights, _ = quantized_weights(net, full.weights, chosen, "optimal")
    for name in chosen:
        blob, *bias = full.weights[name]
        weights.replace(name, [blob, *bias])
        ones = np.ones(len(weights[f"{name}_alpha_term"][0]))
        weights.replace(f"{name}_alpha_term", [ones, *(0 * b for b in bias)])
    corrected, _ = renorm_weights(changed, weights, feed, OPEN, None, full=full, biases=True)
    for name in ("a", "fc"):
        np.testing.assert_allclose(corrected[name][1], full.weights[name][1], rtol=1e-5, atol=1e-5)


# ---- Blobs that layers share ----

SIAMESE = """
  layer { name: "data" type: "Input" top: "data" input_param { shape { dim: 1 dim: 3 dim: 9 dim: 9 } } }
  layer { name: "other" type: "Power" bottom: "data" top: "other" power_param { scale: -0.5 shift: 0.7 } }
  layer { name: "one" type: "Convolution" bottom: "data" top: "one" param { name: "w" } param { name: "b" }
    convolution_param { num_output: 4 kernel_size: 3 } }
  layer { name: "two" type: "Convolution" bottom: "other" top: "two" param { name: "w" } param { name: "b" }
    convolution_param { num_output: 4 kernel_size: 3 } }
  layer { name: "norm_one" type: "BatchNorm" bottom: "one" top: "one"
    param { name: "m" } param { name: "v" } param { name: "f" } }
  layer { name: "norm_two" type: "BatchNorm" bottom: "two" top: "two"
    param { name: "m" } param { name: "v" } param { name: "f" } }
  layer { name: "sum" type: "Eltwise" bottom: "one" bottom: "two" top: "sum" }
  layer { name: "again" type: "Convolution" bottom: "sum" top: "again" param { name: "u" }
    convolution_param { num_output: 4 kernel_size: 1 bias_term: false } }
  layer { name: "relu" type: "ReLU" bottom: "again" top: "again" }
  layer { name: "and_again" type: "Convolution" bottom: "again" top: "and_again" param { name: "u" }
    convolution_param { num_output: 4 kernel_size: 1 bias_term: false } }
"""


@pytest.fixture(scope="module")
def siamese() -> Model:
    net = InferenceNet.of(parse(SIAMESE)).net
    weights = random_weights(net, {"data": CROPPED})
    for one, two in (("one", "two"), ("norm_one", "norm_two"), ("again", "and_again")):
        weights.replace(two, weights[one])
    return model_of(net, weights)


@pytest.mark.parametrize("statistics", ["paired", "measured"])
def test_shared_statistics_are_those_of_all_that_is_read(siamese: Model, feed: Feed, statistics: str) -> None:
    changed = siamese.weights.copy()
    kernels, bias = siamese.weights["one"]
    for name in ("one", "two"):
        changed.replace(name, [1.5 * kernels, bias + 1])
    full = siamese if statistics == "paired" else None
    renormed, _ = renorm_weights(siamese.net, changed, feed, OPEN, None, full=full)
    seen, wanted = (inputs_of_norms(siamese.net, w, feed) for w in (changed, siamese.weights))
    together, reference = (m["norm_one"].merged(m["norm_two"]) for m in (seen, wanted))
    mean, variance = stored_statistics(siamese.weights["norm_one"])
    if statistics == "paired":
        mean, variance = Reference("", mean, variance, 1e-5).paired(reference, together)
    else:
        mean, variance = together.mean, together.m2 / (together.count - 1)
    for name in ("norm_one", "norm_two"):
        np.testing.assert_allclose(renormed[name][0], mean, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(renormed[name][1], variance, rtol=1e-4)


def test_shared_statistics_of_nothing_quantized_stay(siamese: Model, feed: Feed) -> None:
    renormed, _ = renorm_weights(siamese.net, siamese.weights, feed, OPEN, None, full=siamese)
    mean, variance = stored_statistics(siamese.weights["norm_one"])
    np.testing.assert_allclose(renormed["norm_two"][0], mean, atol=1e-6)
    np.testing.assert_allclose(renormed["norm_two"][1], variance, rtol=1e-6)


def test_shared_weights_are_fitted_to_all_that_they_see(siamese: Model, feed: Feed) -> None:
    """Side by side and one behind the other: one alpha and Q, a bias for each use."""
    chosen = {name: WeightSettings(bits=2) for name in ("one", "again")}
    found = data_aware(siamese, chosen, CalibrationSweep(feed, OPEN, None))
    assert set(found) == {"one", "two", "again", "and_again"}
    for first, second in (("one", "two"), ("again", "and_again")):
        np.testing.assert_array_equal(found[first].Q, found[second].Q)
        np.testing.assert_array_equal(found[first].alpha, found[second].alpha)
    assert found["one"].bias is not None
    assert found["two"].bias is not None
    assert np.abs(found["one"].bias - found["two"].bias).max() > 1e-3
    assert found["again"].bias is None
    # Over both uses the error is less than with the kernels that the first use alone would have.
    alone = NetParameter()
    alone.CopyFrom(siamese.net)
    for layer in alone.layer:
        del layer.param[:]
    first = data_aware(
        model_of(alone, siamese.weights), {"one": chosen["one"]}, CalibrationSweep(feed, OPEN, None)
    )["one"]
    pixels = next(feed.batches(COUNT)).feeds["data"]
    kernels = siamese.weights["one"][0].reshape(4, -1)
    errors = []
    for fit in (found["one"], first):
        error = 0.0
        for x in (pixels, 0.7 - 0.5 * pixels):
            windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), axis=(2, 3))
            columns = np.moveaxis(windows, 1, 3).reshape(-1, kernels.shape[1]).astype(np.float64)
            error += (columns @ (kernels - fit.alpha[:, None] * fit.Q).T).var(axis=0).sum()
        errors.append(error)
    assert errors[0] <= errors[1] * 1.001


# ---- Settings ----


def settings(**changes: object) -> Config:
    given = {"name": "n", "model": {"prototxt": "a", "weights": "b"}, "output": "o", **changes}
    return Config.model_validate(given)


def test_the_published_solver_means_the_published_statistics() -> None:
    assert settings().renorm.statistics == "paired"
    assert settings(weights={"solver": "data_aware"}).renorm.statistics == "paired"
    assert settings(weights={"solver": "reference"}).renorm.statistics == "measured"
    asked = settings(weights={"solver": "reference"}, renorm={"statistics": "paired"})
    assert asked.renorm.statistics == "paired"


def test_published_settings_keep_the_published_numbers_of_images() -> None:
    assert settings().renorm.images == settings().activations.images == 64
    assert settings(renorm={"statistics": "measured"}).renorm.images == 1000
    assert settings(weights={"solver": "reference"}).renorm.images == 1000
    assert settings(weights={"solver": "reference"}, renorm={"images": 7}).renorm.images == 7
    assert settings(activations={"solver": "reference"}).activations.images == 400


@pytest.mark.parametrize("name", ["alexnet_bn", "resnet18", "resnet50", "vgg16_bn"])
def test_the_papers_networks_are_measured(name: str) -> None:
    config = load(ROOT / f"configs/{name}.yaml")
    assert config.renorm.statistics == "measured"
    assert config.renorm.images == 1000
