"""Data-aware rounding: every step against brute force, and the two nets advancing together."""

from itertools import product
from pathlib import Path

import numpy as np
import pytest

from quantize.caffenet import InferenceNet, NetParameter, Weights, infer_shapes
from quantize.caffenet.kernels import from_kernels, to_kernels
from quantize.caffenet.patches import Patches
from quantize.data import Transform
from quantize.data.feed import Feed
from quantize.engines import engine_opener
from quantize.errors import InputError, LabelfreeError
from quantize.job.evaluation import evaluate_run
from quantize.job.run import Run
from quantize.numerics.grids import Grid, make_grid
from quantize.numerics.rounding import (
    BLOCK,
    DAMPINGS,
    Nearest,
    Problem,
    Rounding,
    Statistics,
    chosen_damping,
    coordinate_descent,
    recursion,
    refitted,
    round_kernels,
    start_alphas,
)
from quantize.numerics.solvers import fit
from quantize.settings import CaffeProcess, GridChoice, WeightSettings
from quantize.stages.data_aware import Calibration, LayerMoments, data_aware
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

GRIDS = [
    *(("power_of_two", bits) for bits in range(2, 6)),
    *(("uniform", bits) for bits in (2, 3, 8)),
    *(("fixed_point", bits) for bits in (2, 4, 8)),
]
ONNX = engine_opener("onnx", CaffeProcess(), 1)


def statistics(groups: int, n: int, k: int, patches: int, seed: int = 0) -> tuple[np.ndarray, Statistics]:
    """Weights and the moments of correlated patches, whose outputs are those of slightly other patches."""
    rng = np.random.default_rng(seed)
    weights = rng.normal(0, 0.3, (groups, n, k))
    full = np.abs(rng.normal(size=(groups, patches, k)) @ rng.normal(size=(groups, k, k)) / np.sqrt(k))
    x = full + rng.normal(0, 0.1, full.shape)
    y = full @ weights.swapaxes(1, 2)
    moments = Statistics(
        x.swapaxes(1, 2) @ x / patches, y.swapaxes(1, 2) @ x / patches, np.square(y).mean(axis=1)
    )
    return weights, moments


def problem_of(groups: int, n: int, k: int, patches: int = 500, seed: int = 0) -> Problem:
    return Problem.of(*statistics(groups, n, k, patches, seed))


def factor_of(problem: Problem) -> np.ndarray:
    return np.linalg.cholesky(problem.H).swapaxes(1, 2)


# ---- The objective ----


def test_the_target_and_the_error_are_what_they_are_defined_to_be() -> None:
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(300, 6)), rng.normal(size=(300, 4))
    moments = Statistics((x.T @ x / 300)[None], (y.T @ x / 300)[None], np.square(y).mean(axis=0)[None])
    q = rng.normal(size=(1, 4, 6))
    np.testing.assert_allclose(moments.error(q)[0], np.square(y - x @ q[0].T).mean(axis=0))
    weights = rng.normal(size=(1, 4, 6))
    problem = Problem.of(weights, moments, damping=1e-12)
    np.testing.assert_allclose(problem.target[0], np.linalg.lstsq(x, y, rcond=None)[0].T, rtol=1e-6)
    # The objective differs from the error by a constant.
    other = rng.normal(size=(1, 4, 6))
    gain = moments.error(q) - moments.error(other)
    np.testing.assert_allclose(problem.loss(q) - problem.loss(other), gain, rtol=1e-6)


def test_damping_pulls_towards_the_weights() -> None:
    weights, moments = statistics(1, 3, 8, patches=40)
    problem = Problem.of(weights, moments, damping=0.05)
    d = 0.05 * np.trace(moments.H[0]) / 8
    q = np.random.default_rng(0).normal(size=(1, 3, 8))
    damped = moments.error(q) + d * np.square(q - weights).sum(axis=2)
    least = moments.error(problem.target) + d * np.square(problem.target - weights).sum(axis=2)
    np.testing.assert_allclose(problem.loss(q), damped - least)
    strongly = Problem.of(weights, moments, damping=1e9)
    np.testing.assert_allclose(strongly.target, weights, rtol=1e-6)


def disturbed(patches: int, noise: float, seed: int, k: int = 60) -> Statistics:
    """The moments of patches that are seen with noise, and of what they give undisturbed with `TRUE`."""
    rng = np.random.default_rng(seed)
    full = rng.normal(size=(1, patches, k)) * np.linspace(0.1, 2, k)
    x, y = full + noise * rng.normal(size=full.shape), full @ TRUE.swapaxes(1, 2)
    y += 0.5 * rng.normal(size=y.shape)
    moments = x.swapaxes(1, 2) @ x / patches, y.swapaxes(1, 2) @ x / patches, np.square(y).mean(axis=1)
    return Statistics(*moments)


TRUE = np.random.default_rng(1).normal(size=(1, 8, 60))


def test_few_images_are_not_believed() -> None:
    """The damping is about the best of all on images never seen: the more, the less there is to fit to."""
    unseen = disturbed(100_000, 0.3, seed=9)
    chosen = {}
    for patches in (40, 100, 20_000):
        whole = disturbed(patches, 0.3, seed=2)
        halves = (disturbed(patches // 2, 0.3, seed=seed) for seed in (2, 3))
        chosen[patches] = chosen_damping(TRUE, *halves)
        errors = {d: unseen.error(Problem.of(TRUE, whole, d).target).sum() for d in DAMPINGS}
        assert errors[chosen[patches]] < 1.1 * min(errors.values())
        assert errors[chosen[patches]] < 1.01 * unseen.error(TRUE).sum()
        if patches == 40:
            assert errors[DAMPINGS[0]] > 2 * unseen.error(TRUE).sum()
    assert chosen[40] > chosen[20_000]


# ---- The steps ----


@pytest.mark.parametrize("k", [5, BLOCK, 2 * BLOCK + 7])
def test_the_recursion_is_babais_and_optimal_brain_quantization(k: int) -> None:
    """Blocked, over groups: the same as rounding one weight and solving for the others again, each time."""
    problem, nearest = problem_of(2, 3, k), Nearest(make_grid("power_of_two", 3))
    alpha = np.full((2, 3), 0.1)
    found = recursion(problem.target, factor_of(problem), alpha, nearest)
    for group, n in product(range(2), range(3)):
        H, w = problem.H[group], problem.target[group, n].copy()
        for i in reversed(range(k)):
            level = nearest(w[i], alpha[group, n])
            assert found[group, n, i] == level
            # What the free weights before i must become to minimise the objective (Hassibi & Stork 1993).
            error = w[i] - alpha[group, n] * level
            w[:i] += np.linalg.solve(H[:i, :i], H[:i, i]) * error
            w[i] -= error


@pytest.mark.parametrize("k", [8, 2 * BLOCK + 7])
def test_a_sweep_is_one_descent_over_the_coordinates(k: int) -> None:
    problem, nearest = problem_of(2, 2, k), Nearest(make_grid("uniform", 3))
    alpha = np.full((2, 2), 0.15)
    start = nearest(problem.target, alpha[:, :, None])
    loss = problem.loss(alpha[:, :, None] * start)
    found = coordinate_descent(problem, Rounding(alpha, start, start @ problem.H, loss), nearest)
    for group, n in product(range(2), range(2)):
        H, w, q = problem.H[group], problem.target[group, n], start[group, n].copy()
        for i in reversed(range(k)):
            tried = []
            for level in nearest.levels:
                q[i] = level
                error = w - alpha[group, n] * q
                tried.append(error @ H @ error)
            q[i] = nearest.levels[np.argmin(tried)]
        np.testing.assert_array_equal(found.Q[group, n], q)
    np.testing.assert_allclose(found.QH, found.Q @ problem.H)


def test_the_refit_is_the_best_alpha() -> None:
    problem = problem_of(2, 3, 9)
    Q = np.round(problem.target * 3)
    Q[0, 0] = 0
    found = refitted(problem, Q, Q @ problem.H, np.full((2, 3), 7.0))
    assert found.alpha[0, 0] == 7
    for change in (-1e-3, 1e-3):
        worse = problem.loss((found.alpha + change)[:, :, None] * Q)
        assert (worse >= found.loss).all()
    np.testing.assert_allclose(found.loss, problem.loss(found.alpha[:, :, None] * Q))


@pytest.mark.parametrize(("name", "bits"), GRIDS)
def test_no_step_raises_the_objective(name: str, bits: int) -> None:
    grid = make_grid(name, bits)
    problem, nearest = problem_of(3, 5, 20), Nearest(grid)
    alpha, _ = start_alphas(problem, grid, nearest)
    Q = nearest(problem.target, alpha[:, :, None])
    loss = problem.loss(alpha[:, :, None] * Q)
    first = Rounding(alpha, Q, Q @ problem.H, loss)
    for _ in range(4):
        found = coordinate_descent(problem, first, nearest)
        swept = problem.loss(first.alpha[:, :, None] * found.Q)
        assert (swept <= loss * (1 + 1e-12)).all()
        assert (found.loss <= swept * (1 + 1e-12)).all()
        first, loss = found, found.loss


@pytest.mark.parametrize(("name", "bits"), GRIDS)
def test_the_rounding_is_on_the_grid_and_better_than_the_nearest_levels(name: str, bits: int) -> None:
    grid = make_grid(name, bits)
    problem = problem_of(2, 6, 30)
    found = round_kernels(problem, grid)
    assert np.isin(found.Q, grid.levels(grid.canonical)).all()
    np.testing.assert_allclose(found.loss, problem.loss(found.alpha[:, :, None] * found.Q))
    plain = fit(problem.target.reshape(-1, 30), grid)
    nearest = problem.loss((plain.alpha[:, None] * plain.Q).reshape(2, 6, 30))
    assert found.loss.sum() < nearest.sum() * 0.8
    assert (found.loss < nearest).mean() > 0.7


def test_the_rounding_is_near_the_best_there_is() -> None:
    """Tiny kernels, all of {-1, 0, 1}^6, each with its best alpha."""
    grid = make_grid("power_of_two", 2)
    problem = problem_of(1, 40, 6)
    found = round_kernels(problem, grid)
    candidates = np.array([q for q in product((-1.0, 0.0, 1.0), repeat=6) if any(q)])
    QH = candidates @ problem.H[0]
    gain = (QH @ problem.target[0].T) ** 2 / np.einsum("qk,qk->q", QH, candidates)[:, None]
    least = problem.loss(np.zeros((1, 40, 6)))[0] - gain.max(axis=0)
    assert (found.loss[0] >= least * (1 - 1e-9)).all()
    assert found.loss.sum() <= 1.25 * least.sum()
    assert (found.loss[0] <= least * (1 + 1e-9)).mean() > 0.5


# ---- Bad input ----


@pytest.mark.parametrize(("name", "bits"), GRIDS)
def test_dead_inputs_few_patches_and_nothing_at_all(name: str, bits: int) -> None:
    grid: Grid = make_grid(name, bits)
    weights, moments = statistics(2, 3, 12, patches=5)  # singular
    moments.H[1], moments.B[1], moments.energy[1] = 0, 0, 0  # this group never sees an input
    moments.H[0, 4] = moments.H[0, :, 4] = moments.B[0, :, 4] = 0  # a dead channel
    problem = Problem.of(weights, moments)
    np.testing.assert_allclose(problem.target[1], weights[1])
    np.testing.assert_allclose(problem.target[0, :, 4], weights[0, :, 4])
    found = round_kernels(problem, grid)
    assert np.isfinite(found.alpha).all()
    assert np.isin(found.Q, grid.levels(grid.canonical)).all()
    plain = fit(weights[1], grid)
    assert (found.loss[1] <= plain.loss * 1.05 + 1e-12).all()
    zeros = round_kernels(Problem(np.zeros((1, 2, 5)), np.eye(5)[None]), grid)
    assert not (zeros.alpha[:, :, None] * zeros.Q).any()


# ---- Patches ----

LAYERS = [
    "num_output: 6 kernel_size: 3 pad: 1",
    "num_output: 6 kernel_size: 3 stride: 2 dilation: 2 pad: 2 group: 2",
    "num_output: 8 kernel_h: 2 kernel_w: 3 pad_h: 1 pad_w: 0 stride_h: 1 stride_w: 2 group: 4",
    "num_output: 4 kernel_size: 1 bias_term: false group: 4",
]


@pytest.mark.parametrize("text", LAYERS)
def test_patches_times_kernels_are_the_outputs(text: str) -> None:
    net = parse(
        f'layer {{ name: "c" type: "Convolution" bottom: "data" top: "c" convolution_param {{ {text} }} }}'
    )
    check_patches(net, (4, 9, 8), per_image=7)


@pytest.mark.parametrize("options", ["", "transpose: true", "axis: 2"])
def test_rows_times_kernels_are_the_outputs(options: str) -> None:
    net = parse(
        'layer { name: "c" type: "InnerProduct" bottom: "data" top: "c" '
        f"inner_product_param {{ num_output: 5 {options} }} }}"
    )
    check_patches(net, (4, 3, 2), per_image=2)


def check_patches(net: NetParameter, shape: tuple[int, ...], per_image: int) -> None:
    weights = random_weights(net, {"data": shape})
    shapes = infer_shapes(net, {"data": (1, *shape)})
    x = np.random.default_rng(0).normal(size=(3, *shape)).astype(np.float32)
    top = ONNX(net, weights, {"data": shape}).compile(0, 1, ["c"]).run({"data": x}).blobs["c"]
    layer, (blob, *bias) = net.layer[0], weights["c"]
    patches = Patches.of(layer, shapes.blobs["data"], shapes.blobs["c"], blob.shape)
    assert patches is not None
    kernels = to_kernels(layer, blob).reshape(patches.groups, -1, patches.columns)
    for count in (per_image, 1000):
        places = patches.sample(range(3), count, seed=0)
        assert places.shape == (3, min(count, patches.places))
        assert all(len(set(row)) == len(row) for row in places.tolist())
        made = patches.inputs(x, places) @ kernels.swapaxes(1, 2)
        if bias:
            made += bias[0].reshape(patches.groups, 1, -1)
        np.testing.assert_allclose(made, patches.outputs(top, places), rtol=1e-4, atol=1e-5)


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
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> tuple[NetParameter, Weights, Calibration]:
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
    return net, weights, Calibration(feed, ONNX, None)


def scores(net: NetParameter, weights: Weights, calibration: Calibration) -> np.ndarray:
    inference = InferenceNet.of(net)
    engine = ONNX(inference.net, weights, calibration.feed.shapes)
    runner = engine.compile(0, len(inference.net.layer), [inference.scores])
    batches = calibration.feed.batches(40)
    return np.concatenate([runner.run(batch.feeds).blobs[inference.scores] for batch in batches])


@pytest.mark.parametrize(("bits", "grid"), [(2, "power_of_two"), (4, "power_of_two"), (3, "uniform")])
def test_the_scores_come_nearer_to_full_precision(
    calibrated: tuple[NetParameter, Weights, Calibration], bits: int, grid: str
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
    calibrated: tuple[NetParameter, Weights, Calibration], monkeypatch: pytest.MonkeyPatch
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
    recording = Calibration(calibration.feed, opened, None)  # type: ignore[arg-type]
    changed, quantized, _ = quantized_weights(net, weights, chosen, "data_aware", calibration=recording)
    final, _ = renorm_weights(InferenceNet.of(changed).net, quantized, calibration.feed, ONNX, None)
    assert len(engines) == 1
    for name in ("bn1", "bn_left", "bn_right_a", "bn_right_b", "bn_fc1"):
        np.testing.assert_allclose(seen[name][0], final[name][0], rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(seen[name][1], final[name][1], rtol=2e-2)  # biased and unbiased


def test_less_memory_gives_the_same(calibrated: tuple[NetParameter, Weights, Calibration]) -> None:
    net, weights, calibration = calibrated
    chosen = choices(InferenceNet.of(net).net, WeightSettings())
    free = data_aware(model_of(net, weights), chosen, calibration)
    tight = data_aware(model_of(net, weights), chosen, Calibration(calibration.feed, ONNX, memory=200_000))
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
    calibration = Calibration(Feed({"data": images}), ONNX, None)
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
    calibrated: tuple[NetParameter, Weights, Calibration],
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
