"""Mixed precision: the bits against brute force, the sensitivities against a straightforward computation."""

import json
import math
import re
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantize.caffenet import (
    InferenceNet,
    NetParameter,
    Weights,
    infer_shapes,
    layer_index,
    single_assignment,
)
from quantize.caffenet.kernels import from_kernels, to_kernels
from quantize.caffenet.model import Model
from quantize.commands.config import load
from quantize.commands.summary import print_summary
from quantize.data import Transform
from quantize.data.feed import Feed
from quantize.engines import engine_opener
from quantize.errors import InputError, LabelfreeError
from quantize.job.evaluation import evaluate_run
from quantize.job.run import Run
from quantize.measure.outputs import Output
from quantize.numerics.grids import make_grid
from quantize.numerics.moments import moments_of
from quantize.numerics.solvers import fit
from quantize.record import QuantizedLayer, RunRecord
from quantize.settings import CaffeProcess, WeightSettings
from quantize.stages.budget import Sensitivities, allocate, bits_left, keep_budget, sensitivities
from quantize.stages.data_aware import CalibrationSweep
from quantize.sweep.plan import Costs
from tests.conftest import Job
from tests.heard import Heard
from tests.nets import CROPPED, RESIDUAL, images_of, parse, random_weights, write_images

ROOT = Path(__file__).resolve().parents[2]
ONNX = engine_opener("onnx", CaffeProcess(), 1)
IMAGES = 21
NET = InferenceNet.of(parse(RESIDUAL)).net
SCORES = Output("fc2", class_axis=1)
EPSILON = 1e-5
"""Caffe's default of BatchNorm."""


# ---- Which bits ----


@st.composite
def knapsacks(draw: st.DrawFn) -> tuple[dict[str, int], Sensitivities, int]:
    """Numbers of weights, sensitivities (noisy, not always falling with the bits), and bits to spend."""
    names = [f"layer{i}" for i in range(draw(st.integers(1, 4)))]
    common = draw(st.sampled_from([1, 1, 16, 9 * 64]))
    counts = {name: common * draw(st.integers(1, 30)) for name in names}
    low, high = draw(st.sampled_from([(2, 5), (2, 8), (3, 3)]))
    values = st.floats(0, 4, allow_subnormal=False)
    found = {name: {b: draw(values) * 4.0**-b for b in range(low, high + 1)} for name in names}
    least, most = (sum(counts.values()) * bits for bits in (low, high))
    return counts, found, draw(st.integers(least, most + 5))


def brute_force(counts: dict[str, int], found: Sensitivities, bits: int) -> float:
    """The least sum of sensitivities among all choices within the bits."""
    return min(
        sum(found[name][b] for name, b in zip(counts, chosen, strict=True))
        for chosen in product(*(found[name] for name in counts))
        if sum(n * b for n, b in zip(counts.values(), chosen, strict=True)) <= bits
    )


@given(knapsacks())
def test_the_bits_are_the_best_there_are(case: tuple[dict[str, int], Sensitivities, int]) -> None:
    counts, found, bits = case
    chosen = allocate(counts, found, bits)
    assert list(chosen) == list(counts)
    assert sum(counts[name] * b for name, b in chosen.items()) <= bits
    own = sum(found[name][b] for name, b in chosen.items())
    assert own == pytest.approx(brute_force(counts, found, bits), rel=1e-12, abs=1e-300)


@given(knapsacks(), st.integers(1, 40))
def test_larger_units_keep_the_budget_and_lose_little(
    case: tuple[dict[str, int], Sensitivities, int], units: int
) -> None:
    counts, found, bits = case
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("quantize.stages.budget.MAX_UNITS", units)
        chosen = allocate(counts, found, bits)
    assert sum(counts[name] * b for name, b in chosen.items()) <= bits
    own = sum(found[name][b] for name, b in chosen.items())
    # Every layer is rounded up by less than a unit.
    spare = bits - sum(n * min(found[name]) for name, n in counts.items())
    unit = max(math.gcd(*counts.values()), -(-spare // units))
    least = sum(n * min(found[name]) for name, n in counts.items())
    assert own <= brute_force(counts, found, max(least, bits - len(counts) * unit)) * (1 + 1e-12) + 1e-300


def test_a_large_network_is_allocated_exactly_in_little_time() -> None:
    rng = np.random.default_rng(0)
    counts = {f"layer{i}": 4096 * int(rng.integers(2, 600)) for i in range(60)}
    found = {name: {b: float(rng.uniform(0.5, 2)) * 4.0**-b for b in range(2, 9)} for name in counts}
    total = sum(counts.values())
    chosen = allocate(counts, found, int(3.5 * total))
    assert 3.49 * total < sum(counts[name] * b for name, b in chosen.items()) <= 3.5 * total
    # No exchange of one bit between two layers is better.
    spare = int(3.5 * total) - sum(counts[name] * b for name, b in chosen.items())
    for up, down in product(counts, counts):
        if up != down and chosen[up] < 8 and chosen[down] > 2 and counts[up] - counts[down] <= spare:
            gain = found[up][chosen[up]] - found[up][chosen[up] + 1]
            loss = found[down][chosen[down] - 1] - found[down][chosen[down]]
            assert gain <= loss


def test_the_bits_left_are_exact() -> None:
    """3.3 * 1000 is 3299.9999999999995 in floating point."""
    assert bits_left({"a": 100, "b": 900}, {"a": 8}, WeightSettings(budget=3.3)) == 3300 - 800


@pytest.mark.parametrize(
    ("budget", "grid", "message"),
    [
        (
            2.1,
            "power_of_two",
            r"weights\.budget: 2\.1 is too small: .* has 2 to 5 bits, .*give at least 2\.61,",
        ),
        (5.5, "power_of_two", r"weights\.budget: 5\.5 is too large: .*; give at most 5\.3, or another"),
        (2.6, "uniform", r"too small: weights\.grid uniform has 2 to 8 bits.*at least 2\.61,"),
    ],
)
def test_a_budget_out_of_reach_is_one_line(budget: float, grid: str, message: str) -> None:
    counts, fixed = {"a": 7, "b": 62}, {"a": 8}
    with pytest.raises(InputError, match=message) as caught:
        bits_left(counts, fixed, WeightSettings(budget=budget, grid=grid))  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    for named in (2.61, 5.3):  # what the lines name can be given
        assert bits_left(counts, fixed, WeightSettings(budget=named)) >= 2 * 62


def test_bounds_have_the_digits_that_they_need() -> None:
    counts, fixed = {"a": 100, "b": 50, "c": 1000, "d": 1}, {"a": 8, "b": 8, "c": 7}
    with pytest.raises(InputError, match=r"give at least (\S+), or") as caught:
        bits_left(counts, fixed, WeightSettings(budget=4))
    least = float(re.search(r"at least (\S+),", str(caught.value))[1])  # type: ignore[index]
    assert bits_left(counts, fixed, WeightSettings(budget=least)) in range(2, 6)


def test_a_budget_with_nothing_to_choose() -> None:
    with pytest.raises(InputError, match="nothing to choose; leave budget out"):
        bits_left({"a": 100, "b": 50}, {"a": 8, "b": 8}, WeightSettings(budget=4))


# ---- Sensitivities ----


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> CalibrationSweep:
    path = write_images(tmp_path_factory.mktemp("images") / "lmdb", IMAGES)
    images = images_of(path, Transform(crop_size=9, scale=0.02, mean_value=(100.0,)), phase=1)
    test = InferenceNet.of(parse(RESIDUAL))
    return CalibrationSweep(Feed({test.blob: images}), ONNX, None)


@pytest.fixture(scope="module")
def weights() -> Weights:
    return random_weights(NET, {"data": CROPPED})


@pytest.fixture(scope="module")
def model(weights: Weights) -> Model:
    return Model(parse(RESIDUAL), weights)


def run(net: NetParameter, weights: Weights, calibration: CalibrationSweep, blob: str) -> np.ndarray:
    """A blob for all images in one batch."""
    pixels = next(calibration.feed.batches(IMAGES)).feeds["data"]
    engine = ONNX(net, weights, {"data": CROPPED})
    return engine.compile(0, len(net.layer), [blob]).run({"data": pixels}).blobs[blob]


def divergence_by_hand(
    net: NetParameter, weights: Weights, calibration: CalibrationSweep, name: str, norm: str | None, bits: int
) -> float:
    """Quantize a layer, give its BatchNorm statistics that undo the shift, and compare probabilities."""
    net = single_assignment(net)
    layer = next(layer for layer in net.layer if layer.name == name)
    blob, *bias = weights[name]
    fitted = fit(to_kernels(layer, blob), make_grid("power_of_two", bits))
    changed = weights.copy()
    changed.replace(name, [from_kernels(layer, fitted.alpha[:, None] * fitted.Q, blob.shape), *bias])
    if norm is not None:
        full = moments_of(run(net, weights, calibration, layer.top[0]))
        own = moments_of(run(net, changed, calibration, layer.top[0]))
        mean, variance, _ = weights[norm]
        ratio = np.sqrt(own.m2 / full.m2)
        repaired = [own.mean - ratio * (full.mean - mean), (variance + EPSILON) * ratio**2 - EPSILON]
        changed.replace(norm, [*(np.float32(statistic) for statistic in repaired), np.ones(1, np.float32)])
    scores = InferenceNet.of(parse(RESIDUAL)).scores
    p, q = (np.exp(run(net, w, calibration, scores).astype(np.float64)) for w in (weights, changed))
    p, q = (x / x.sum(axis=1, keepdims=True) for x in (p, q))
    return float((p * np.log(p / q)).sum(axis=1).mean())


NORMS = {"left": "bn_left", "right_a": "bn_right_a", "right_b": "bn_right_b", "fc1": "bn_fc1"}


@pytest.mark.parametrize("memory", [None, 40_000])
def test_sensitivities_are_what_they_are_defined_to_be(
    calibration: CalibrationSweep, model: Model, weights: Weights, memory: int | None
) -> None:
    """Also where the memory is too little to keep what is before a layer, and micro-batches are small."""
    bounded = CalibrationSweep(calibration.feed, ONNX, memory)
    heard = Heard()
    found, images = sensitivities(model, list(NORMS), "power_of_two", bounded, SCORES, heard)
    assert images == IMAGES
    assert list(found) == list(NORMS)
    assert heard.done["budget"] == pytest.approx(heard.total["budget"])
    for name, norm in NORMS.items():
        assert list(found[name]) == [2, 3, 4, 5]
        for bits, value in found[name].items():
            wanted = divergence_by_hand(NET, weights, calibration, name, norm, bits)
            assert value == pytest.approx(wanted, rel=1e-2, abs=1e-7), (name, bits)


def test_without_a_batchnorm_or_with_another_reader_nothing_is_repaired(
    calibration: CalibrationSweep, weights: Weights
) -> None:
    net = NetParameter()
    net.CopyFrom(parse(RESIDUAL))
    del net.layer[layer_index(net, "bn_right_b")]
    for layer in net.layer:
        if layer.name == "bn_right_a":
            layer.top[:] = ["beside"]  # right_b reads what is not normalized
    found, _ = sensitivities(Model(net, weights), ["right_a", "right_b"], "power_of_two", calibration, SCORES)
    for name in found:
        wanted = divergence_by_hand(InferenceNet.of(net).net, weights, calibration, name, None, 3)
        assert found[name][3] == pytest.approx(wanted, rel=1e-3)


def test_a_net_that_costs_much_is_measured_on_fewer_images(
    calibration: CalibrationSweep, model: Model
) -> None:
    _, images = sensitivities(model, ["left"], "uniform", calibration, SCORES)
    assert images == IMAGES
    net = single_assignment(NET)
    costs = Costs.of(net, infer_shapes(net, {"data": (1, *CROPPED)}), ["data"], ["fc2"])
    behind = costs.between(layer_index(net, "left"), len(net.layer))
    work = 7 * behind * 7.5  # 2 to 8 bits
    for most, wanted in ((work, 7), (1.0, 3)):
        _, images = sensitivities(model, ["left"], "uniform", calibration, SCORES, work=most, least_images=3)
        assert images == wanted


def test_more_bits_of_the_uniform_grid_move_the_output_less(
    calibration: CalibrationSweep, model: Model
) -> None:
    found, _ = sensitivities(model, list(NORMS), "uniform", calibration, SCORES)
    for by_bits in found.values():
        assert list(by_bits) == list(range(2, 9))
        assert by_bits[2] > 4 * by_bits[4] > 16 * by_bits[6] > 0


def test_a_layer_without_influence_on_the_scores_is_named(
    calibration: CalibrationSweep, model: Model
) -> None:
    with pytest.raises(
        InputError, match=r"do not depend on layer right_b.*give weights\.layers\.right_b\.bits"
    ):
        sensitivities(model, ["left", "right_b"], "uniform", calibration, Output("left", class_axis=1))
    with pytest.raises(InputError, match="cannot be computed from the images alone"):
        sensitivities(model, ["left"], "uniform", calibration, Output("label", class_axis=1))


def test_scores_that_are_not_finite_are_one_line(
    calibration: CalibrationSweep, model: Model, weights: Weights
) -> None:
    huge = weights.copy()
    huge.replace("scale1", [np.full(6, 3e38, np.float32), np.full(6, 3e38, np.float32)])
    with pytest.raises(LabelfreeError, match="not finite"):
        sensitivities(Model(model.net, huge), ["left"], "uniform", calibration, SCORES)


def test_too_little_memory_says_how_much_would_do(calibration: CalibrationSweep, model: Model) -> None:
    tight = CalibrationSweep(calibration.feed, ONNX, 1000)
    with pytest.raises(InputError, match=r"^memory: 1000 bytes.*least that would do is (\d+)") as caught:
        sensitivities(model, ["left"], "uniform", tight, SCORES)
    least = int(str(caught.value).split("least that would do is ")[1].split()[0])
    enough = CalibrationSweep(calibration.feed, ONNX, least)
    assert sensitivities(model, ["left"], "power_of_two", enough, SCORES)


def test_overrides_and_the_ends_keep_their_bits(
    calibration: CalibrationSweep, model: Model, weights: Weights
) -> None:
    layers = {"left": {"bits": 6, "grid": "uniform"}, "right_a": {"skip": True}}
    settings = WeightSettings.model_validate({"budget": 5, "layers": layers})
    chosen, found = keep_budget(model, settings, calibration, SCORES)
    assert list(chosen) == ["conv1", "left", "right_b", "fc1", "fc2"]
    assert [chosen[name].bits for name in ("conv1", "left", "fc2")] == [8, 6, 8]
    assert chosen["left"].grid == "uniform"
    assert list(found.divergence) == ["right_b", "fc1"]
    counts = {name: weights[name][0].size for name in chosen}
    spent = sum(counts[name] * choice.bits for name, choice in chosen.items())
    assert found.mean_bits == spent / sum(counts.values()) <= 5


# ---- The whole job ----


def layers_of(record: RunRecord) -> list[QuantizedLayer]:
    assert record.stages.weights is not None
    return record.stages.weights.layers


def bits_of(record: RunRecord) -> dict[str, int]:
    return {layer.name: layer.bits for layer in layers_of(record)}


def test_the_whole_job(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    config = job.config("weights.budget=4.5", "weights.images=20")
    record = Run(config).quantize()
    assert record.stages.weights is not None
    budget = record.stages.weights.budget
    total = sum(layer.weights for layer in layers_of(record))
    mean = sum(layer.weights * layer.bits for layer in layers_of(record)) / total
    assert budget is not None
    assert budget.mean_bits == mean <= 4.5
    assert budget.images == 20
    assert list(budget.divergence) == list(NORMS)
    assert list(budget.divergence["left"]) == ["2", "3", "4", "5"]
    assert RunRecord.parse((job.out / "report.json").read_bytes()) == record
    settings = json.loads(record.to_json())["settings"]["weights"]
    assert settings["budget"] == 4.5
    assert "bits" not in settings
    page = (job.out / "report.html").read_text()
    assert "Bits within the budget" in page
    assert f"Weights of {mean:.2f} bits on average" in page
    chosen = budget.divergence["left"][str(bits_of(record)["left"])]
    assert f"<b>{chosen:.3g}</b>" in page
    print_summary(record, config, "labelfree evaluate")
    assert f"mean {mean:.2f} bits, median SQNR" in capsys.readouterr().out
    first = (job.out / "residual_renorm.caffemodel").read_bytes()
    Run(config).quantize(force=True)
    assert (job.out / "residual_renorm.caffemodel").read_bytes() == first


def test_without_a_budget_nothing_is_said_of_one(job: Job) -> None:
    record = Run(job.config()).quantize(("weights",))
    assert "budget" not in json.loads(record.to_json())["stages"]["weights"]
    assert "Bits within the budget" not in (job.out / "report.html").read_text()


@pytest.mark.parametrize("solver", ["reference", "data_aware"])
def test_every_solver_takes_the_bits(job: Job, solver: str) -> None:
    wanted = bits_of(Run(job.config("weights.budget=4.5", "weights.images=20")).quantize(("weights",)))
    given = ("weights.budget=4.5", f"weights.solver={solver}", "weights.images=20")
    record = Run(job.config(*given)).quantize(("weights",))
    assert bits_of(record) == wanted
    assert len(set(wanted.values())) > 2
    measured = [layer.output_sqnr_db for layer in layers_of(record)]
    assert all(value is not None for value in measured) == (solver == "data_aware")


def test_other_images_or_another_budget_are_another_result(job: Job) -> None:
    def done(*assignments: str) -> bool:
        heard = Heard()
        Run(job.config(*assignments), heard).quantize(("weights",), resume=True)
        return any("skipped" in note for note in heard.notes)

    assert not done("weights.budget=4.5", "weights.images=20")
    assert done("weights.budget=4.5", "weights.images=20")
    assert not done("weights.budget=4.5", "weights.images=19")
    assert not done("weights.budget=4.25", "weights.images=19")
    assert done("weights.budget=4.25", "weights.images=19", "renorm.images=7", "activations.images=5")
    with open(job.folder / "train_lmdb" / "data.mdb", "ab") as file:
        file.write(b"\0")
    assert not done("weights.budget=4.25", "weights.images=19")


def test_it_needs_images(job: Job) -> None:
    lines = job.yaml.read_text().splitlines()
    job.yaml.write_text("\n".join(line for line in lines if "calibration" not in line))
    with pytest.raises(InputError, match=r"data\.calibration\.source is missing: .*weights\.budget"):
        Run(job.config("weights.budget=4.5", "weights.images=20")).quantize(("weights",))
    assert not job.out.exists() or not list(job.out.iterdir())


def test_a_budget_out_of_reach_writes_nothing(job: Job) -> None:
    with pytest.raises(InputError, match=r"weights\.budget: 2.0 is too small"):
        Run(job.config("weights.budget=2", "weights.images=20")).quantize()
    assert not list(job.out.glob("*.caffemodel"))


def test_the_digits_come_nearer_at_the_same_mean_bits(tmp_path: Path) -> None:
    def divergence(name: str, *assignments: str) -> tuple[float, float]:
        given = (f"output={tmp_path / name}", *assignments)
        config = load(ROOT / "configs/digits.yaml", assignments=given)
        layers = layers_of(Run(config).quantize(("weights", "renorm")))
        total = sum(layer.weights for layer in layers)
        mean = sum(layer.weights * layer.bits for layer in layers) / total
        return evaluate_run(config).closeness["quantized"].divergence, mean

    same, mean = divergence("same", "weights.grid=uniform", "weights.bits=3")
    mixed, own_mean = divergence("mixed", "weights.grid=uniform", f"weights.budget={mean + 1e-6:.6f}")
    assert own_mean <= mean + 2e-6
    assert mixed < 0.8 * same
