"""The two nets of data-aware rounding advancing together."""

from pathlib import Path

import numpy as np
import pytest

from quantize.caffenet import InferenceNet, NetParameter, Weights
from quantize.caffenet.kernels import from_kernels, to_kernels
from quantize.caffenet.patches import Patches
from quantize.data import Transform
from quantize.data.feed import Feed
from quantize.engines import engine_opener
from quantize.errors import InputError, LabelfreeError
from quantize.job.evaluation import evaluate_run
from quantize.job.run import Run
from quantize.numerics.grids import make_grid
from quantize.numerics.solvers import fit
from quantize.settings import CaffeProcess, GridChoice, WeightSettings
from quantize.stages.data_aware import CalibrationSweep, LayerMoments, data_aware
from quantize.stages.weights import choices
from tests.conftest import Job
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

ONNX = engine_opener("onnx", CaffeProcess(), 1)


def test_moments_do_not_depend_on_the_batch_and_agree_with_float64() -> None:
    layer = parse(
        'layer { type: "Convolution" bottom: "a" top: "b" '
        "convolution_param { num_output: 4 kernel_size: 3 group: 2 } }"
    ).layer[0]
    patches = Patches.of(layer, (1, 4, 8, 8), (1, 4, 6, 6), (4, 2, 3, 3))
    assert patches is not None
    rng = np.random.default_rng(0)
    x, y = (rng.normal(5, 1, shape).astype(np.float32) for shape in ((9, 4, 8, 8), (9, 4, 6, 6)))
    whole, parts = (LayerMoments(layer, patches, 9, centered=True) for _ in range(2))
    for moments in (whole, parts):
        moments.per_image = 11
    whole.update(x, y, range(9), seed=3)
    for part in (range(4), range(4, 8), range(8, 9)):
        parts.update(x[part.start : part.stop], y[part.start : part.stop], part, seed=3)
    places = patches.sample(range(9), 11, seed=3)
    columns = patches.inputs(x.astype(np.float64), places)
    for g in range(2):
        exact = np.cov(columns[g].T, bias=True)
        np.testing.assert_allclose(whole.statistics().H[g], exact, atol=1e-4)
        np.testing.assert_allclose(parts.statistics().H[g], exact, atol=1e-4)
    np.testing.assert_allclose(whole.statistics().B, parts.statistics().B, atol=1e-4)


# ---- Both nets together ----


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> tuple[NetParameter, Weights, CalibrationSweep]:
    net = parse(RESIDUAL)
    test = InferenceNet.of(net)
    images = images_of(
        write_images(tmp_path_factory.mktemp("images") / "lmdb", 120),
        Transform(crop_size=9, scale=0.02, mean_value=(100.0,)),
        phase=1,
    )
    feed = Feed({test.blob: images})
    weights = random_weights(test.net, {test.blob: CROPPED})
    weights, _ = renorm_weights(test.net, weights, feed, ONNX, None)
    return net, weights, CalibrationSweep(feed, ONNX, None)


def scores(net: NetParameter, weights: Weights, calibration: CalibrationSweep) -> np.ndarray:
    inference = InferenceNet.of(net)
    engine = ONNX(inference.net, weights, calibration.feed.shapes)
    runner = engine.compile(0, len(inference.net.layer), [inference.scores])
    batches = calibration.feed.batches(40)
    return np.concatenate([runner.run(batch.feeds).blobs[inference.scores] for batch in batches])


@pytest.mark.parametrize(("bits", "grid"), [(2, "power_of_two"), (4, "power_of_two"), (3, "uniform")])
def test_the_scores_come_nearer_to_full_precision(
    calibrated: tuple[NetParameter, Weights, CalibrationSweep], bits: int, grid: str
) -> None:
    net, weights, calibration = calibrated
    chosen = choices(InferenceNet.of(net).net, WeightSettings.model_validate({"bits": bits, "grid": grid}))
    wanted = scores(net, weights, calibration)
    errors = {}
    for solver in ("optimal", "data_aware"):
        changed, quantized, findings = quantized_weights(
            net, weights, chosen, solver, calibration=calibration
        )
        inference = InferenceNet.of(changed)
        quantized, _ = renorm_weights(inference.net, quantized, calibration.feed, ONNX, None)
        errors[solver] = np.square(scores(changed, quantized, calibration) - wanted).sum()
    assert errors["data_aware"] < 0.6 * errors["optimal"]
    assert [finding.name for finding in findings] == list(chosen)
    for finding in findings:
        assert finding.output_sqnr_db is not None
        assert finding.nearest_sqnr_db is not None
        assert finding.output_sqnr_db > finding.nearest_sqnr_db
    levels = make_grid(grid, bits).levels(make_grid(grid, bits).canonical)
    assert np.isin(quantized["right_a"][0], levels).all()
    # Everything that is not quantized, a BatchNorm or a bias is carried over.
    assert quantized["scale1"][0].tobytes() == weights["scale1"][0].tobytes()


def test_the_statistics_of_the_norms_are_those_of_renorm(
    calibrated: tuple[NetParameter, Weights, CalibrationSweep], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the layers see is the net quantized so far, renormed as the stage renorm does it."""
    net, weights, calibration = calibrated
    seen: dict[str, list[np.ndarray]] = {}
    engines = []

    def opened(*given: object) -> object:
        engine = ONNX(*given)  # type: ignore[arg-type]
        original = engine.set_blobs

        def recorded(layer: str, blobs: list[np.ndarray]) -> None:
            seen[layer] = blobs
            original(layer, blobs)

        monkeypatch.setattr(engine, "set_blobs", recorded)
        engines.append(engine)
        return engine

    chosen = choices(InferenceNet.of(net).net, WeightSettings())
    recording = CalibrationSweep(calibration.feed, opened, None)  # type: ignore[arg-type]
    changed, quantized, _ = quantized_weights(net, weights, chosen, "data_aware", calibration=recording)
    final, _ = renorm_weights(InferenceNet.of(changed).net, quantized, calibration.feed, ONNX, None)
    assert len(engines) == 1
    for name in ("bn1", "bn_left", "bn_right_a", "bn_right_b", "bn_fc1"):
        np.testing.assert_allclose(seen[name][0], final[name][0], rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(seen[name][1], final[name][1], rtol=2e-2)  # biased and unbiased


def test_less_memory_gives_the_same(calibrated: tuple[NetParameter, Weights, CalibrationSweep]) -> None:
    net, weights, calibration = calibrated
    chosen = choices(InferenceNet.of(net).net, WeightSettings())
    free = data_aware(model_of(net, weights), chosen, calibration)
    tight = data_aware(
        model_of(net, weights), chosen, CalibrationSweep(calibration.feed, ONNX, memory=200_000)
    )
    # Smaller micro-batches round differently, and one weight at another level leads to others.
    apart = [abs((one.output_sqnr_db or 0) - (tight[name].output_sqnr_db or 0)) for name, one in free.items()]
    assert max(apart) < 1
    assert np.mean(apart) < 0.2


def test_depthwise_transposed_and_layers_that_are_not_provided_for(tmp_path: Path) -> None:
    net = parse(
        """
        layer { name: "data" type: "Input" top: "data" input_param { shape { dim: 1 dim: 3 dim: 9 dim: 9 } } }
        layer { name: "dw" type: "DepthwiseConvolution" bottom: "data" top: "dw"
          convolution_param { num_output: 6 kernel_size: 3 } }
        layer { name: "twice" type: "Convolution" bottom: "dw" bottom: "dw" top: "u" top: "v"
          convolution_param { num_output: 4 kernel_size: 1 } }
        layer { name: "sum" type: "Eltwise" bottom: "u" bottom: "v" top: "sum" }
        layer { name: "relu" type: "ReLU" bottom: "sum" top: "sum" }
        layer { name: "fc" type: "InnerProduct" bottom: "sum" top: "fc"
          inner_product_param { num_output: 5 transpose: true } }
        """
    )
    weights = random_weights(InferenceNet.of(net).net, {"data": (3, 9, 9)})
    images = images_of(
        write_images(tmp_path / "lmdb", 30), Transform(crop_size=9, scale=0.02, mean_value=(100.0,)), 1
    )
    calibration = CalibrationSweep(Feed({"data": images}), ONNX, None)
    chosen = {name: GridChoice(bits=3) for name in ("dw", "twice", "fc")}
    found = data_aware(model_of(net, weights), chosen, calibration)
    plain = fit(to_kernels(net.layer[2], weights["twice"][0]), make_grid("power_of_two", 3))
    np.testing.assert_array_equal(found["twice"].Q, plain.Q)
    assert found["twice"].output_sqnr_db is None
    wanted = scores(net, weights, calibration)
    errors = []
    for fits in (found, None):
        changed = weights.copy()
        for layer in (net.layer[1], net.layer[5]):
            blob, bias = weights[layer.name]
            w = to_kernels(layer, blob)
            one = fits[layer.name] if fits else fit(w, make_grid("power_of_two", 3))
            kernels = (one.alpha[:, None] * one.Q).astype(np.float32)
            new_bias = fits[layer.name].bias if fits else bias
            changed.replace(layer.name, [from_kernels(layer, kernels, blob.shape), new_bias])
        errors.append(np.square(scores(net, changed, calibration) - wanted).sum())
    assert errors[0] < 0.5 * errors[1]


def test_a_net_that_overflows_is_one_line(
    calibrated: tuple[NetParameter, Weights, CalibrationSweep],
) -> None:
    net, weights, calibration = calibrated
    huge = weights.copy()
    huge.replace("scale1", [np.full(6, 3e38, np.float32), np.full(6, 3e38, np.float32)])
    with pytest.raises(LabelfreeError, match="not finite"):
        data_aware(model_of(net, huge), choices(InferenceNet.of(net).net, WeightSettings()), calibration)


# ---- The whole job ----


def test_the_whole_job(job: Job) -> None:
    config = job.config("weights.solver=data_aware", "weights.images=20")
    record = Run(config).quantize()
    first = (job.out / "residual_renorm.caffemodel").read_bytes()
    assert record.stages.weights is not None
    layers = record.stages.weights.layers
    assert all(layer.output_sqnr_db > layer.nearest_sqnr_db - 1 for layer in layers)
    heard = Heard()
    Run(config, heard).quantize(resume=True)
    assert sum("skipped" in note for note in heard.notes) == 3
    Run(config).quantize(force=True)
    assert (job.out / "residual_renorm.caffemodel").read_bytes() == first
    found = evaluate_run(config)
    Run(job.config()).quantize()
    assert found.agreement >= evaluate_run(job.config()).agreement


def test_other_images_are_another_result(job: Job) -> None:
    Run(job.config("weights.solver=data_aware", "weights.images=20")).quantize(("weights",))
    heard = Heard()
    before = (job.out / "residual_quantized.caffemodel").read_bytes()
    Run(job.config("weights.solver=data_aware", "weights.images=19"), heard).quantize(
        ("weights",), resume=True
    )
    assert not any("skipped" in note for note in heard.notes)
    assert (job.out / "residual_quantized.caffemodel").read_bytes() != before


def test_it_needs_images(job: Job) -> None:
    lines = job.yaml.read_text().splitlines()
    job.yaml.write_text("\n".join(line for line in lines if "calibration" not in line))
    with pytest.raises(InputError, match=r"data\.calibration\.source is missing"):
        Run(job.config("weights.solver=data_aware")).quantize(("weights",))
    assert not job.out.exists() or not list(job.out.iterdir())
