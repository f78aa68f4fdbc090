"""The Python API: its examples run, it gives what the commands give, and it says what is wrong."""

import doctest
import io
import json
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import quantize
from quantize import api
from quantize.caffenet import InferenceNet, Weights, read_prototxt, stored_statistics
from quantize.caffenet import model as model_module
from quantize.caffenet.norms import with_stored_statistics
from quantize.commands.config import load
from quantize.data.feed import Feed
from quantize.job.evaluation import evaluate_run
from quantize.job.run import Run
from quantize.progress import Progress
from tests.conftest import Job
from tests.nets import parse, write_several

ROOT = Path(__file__).resolve().parents[1]
DIGITS = ROOT / "configs/models/digits"
FINDER = doctest.DocTestFinder(recurse=True)
EXAMPLES = [
    example
    for module in (api, model_module)
    for example in FINDER.find(module, extraglobs={"__name__": "__main__"})
    if example.examples
]


@pytest.fixture
def digits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder, with the digits in it."""
    shutil.copytree(DIGITS, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield tmp_path


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)
@pytest.mark.usefixtures("digits")
def test_examples(example: doctest.DocTest) -> None:
    said = io.StringIO()
    result = doctest.DocTestRunner().run(example, out=said.write)
    assert result.attempted
    assert not result.failed, said.getvalue()


def test_everything_public_has_an_example() -> None:
    names = {example.name.rsplit(".", 1)[1] for example in EXAMPLES}
    shown_by_others = {"Comparison", "Input", "InputError", "LabelfreeError", "Layer", "Model", "Progress"}
    assert set(quantize.__all__) - shown_by_others <= names
    assert {"load", "save"} <= names


def test_nothing_heavy_is_imported_with_the_package() -> None:
    code = """
import sys, quantize
heavy = {"numpy", "onnxruntime", "cv2", "google.protobuf", "pydantic", "quantize.api"} & set(sys.modules)
assert not heavy, heavy
assert set(quantize.__all__) <= set(dir(quantize))
for name in quantize.__all__:
    assert getattr(quantize, name).__name__ == name
assert quantize.quantize is quantize.api.quantize
assert "onnxruntime" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        _ = quantize.quantise  # type: ignore[attr-defined]


def test_the_package_is_the_command() -> None:
    for words in (["--version"], ["no-such-command"]):
        ours, command = (
            subprocess.run([sys.executable, "-m", module, *words], capture_output=True, text=True)
            for module in ("quantize", "quantize.cli")
        )
        assert ours.returncode == command.returncode
        assert ours.stdout == command.stdout


SETTINGS: dict[str, dict[str, dict[str, Any]]] = {
    "default": {},
    "data_aware": {"weights": {"solver": "data_aware", "bits": 3, "images": 20}},
    "published": {
        "weights": {"solver": "reference"},
        "renorm": {"images": 20},
        "activations": {"solver": "reference", "images": 12, "levels": 255},
    },
    "budget": {"weights": {"budget": 4.5, "images": 20}, "renorm": {"augment": "test"}},
    "sites": {"activations": {"input": True, "sums": True, "bits": 6}},
    "layers": {
        "weights": {"grid": "uniform", "layers": {"left": {"skip": True}, "fc1": {"bits": 6}}},
        "renorm": {"bias_correction": False},
    },
}


def assignments(settings: dict[str, dict[str, Any]]) -> list[str]:
    return [
        f"{section}.{key}={json.dumps(value)}"
        for section, keys in settings.items()
        for key, value in keys.items()
    ]


def written(weights: Weights) -> bytes:
    file = io.BytesIO()
    weights.write(file)
    return file.getvalue()


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_it_gives_what_the_command_gives(job: Job, settings: dict[str, dict[str, Any]]) -> None:
    config = job.config("renorm.images=20", "activations.images=12", *assignments(settings))
    Run(config).quantize()
    expected = evaluate_run(config)

    model = quantize.Model.load(job.folder / "net.prototxt", job.folder / "net.caffemodel")
    of_renorm = {"images": 20, **settings.get("renorm", {})}
    images = quantize.Images(job.folder / "train_lmdb", model, augment=of_renorm.pop("augment", "train"))
    sections = {
        "weights": {},
        **settings,
        "renorm": of_renorm,
        "activations": {"images": 12, **settings.get("activations", {})},
    }
    silent = quantize.Runtime(progress=Progress())
    small = quantize.quantize(model, images, **sections, runtime=silent)
    assert written(small.weights) == (job.out / "residual_renorm.caffemodel").read_bytes()
    deploy = InferenceNet.of(read_prototxt(job.out / "residual_deploy.prototxt"))
    own = InferenceNet.of(with_stored_statistics(small.net)).net
    assert [strip(layer) for layer in own.layer] == [strip(layer) for layer in deploy.net.layer]

    found = quantize.evaluate(model, small, quantize.Images(job.folder / "test_lmdb", model))
    close, accuracy = expected.closeness["quantized"], expected.accuracy
    assert (found.images, found.agreement, found.divergence, found.sqnr_db) == (
        expected.images,
        close.agreement,
        close.divergence,
        close.sqnr_db,
    )
    assert (found.top1, found.full_top5) == (accuracy["quantized"].top1, accuracy["fp32"].top5)

    step = quantize.quantize_weights(model, images, settings=sections["weights"], runtime=silent)
    assert written(step.weights) == (job.out / "residual_quantized.caffemodel").read_bytes()
    step = quantize.renorm(step, images, settings=sections["renorm"], runtime=silent)
    step = quantize.quantize_activations(step, images, settings=sections["activations"], runtime=silent)
    assert written(step.weights) == written(small.weights)
    assert step.net == small.net
    assert any(q.lowest < 0 for q in small.quantizers.values()) == ("input" in sections["activations"])
    again = quantize.Model.load(*small.save(job.folder / "saved"))
    assert [str(layer) for layer in again.layers] == [str(layer) for layer in small.layers]


def strip(layer: Any) -> str:
    """A layer without rules about phases, which a deploy prototxt has no use for."""
    copy = type(layer)()
    copy.CopyFrom(layer)
    del copy.include[:]
    return str(copy)


@pytest.fixture
def model(job: Job) -> quantize.Model:
    return quantize.Model.load(job.folder / "net.prototxt", job.folder / "net.caffemodel")


def feed_of(images: quantize.Images, fed: Any) -> Feed:
    """What goes into the net, calibrating or evaluating."""
    config = api._configuration(images.model, images, quantize.Runtime(), "test", {}, fed)
    if fed == "validation":
        return images._feed(config, "validation", Progress())
    return images._stage_feed(config, "renorm", Progress())


def test_arrays_count_as_the_images_they_hold(job: Job, model: quantize.Model) -> None:
    lmdb = quantize.Images(job.folder / "train_lmdb", model, count=15)
    array = np.concatenate([batch.feeds["data"] for batch in feed_of(lmdb, "calibration").batches(4)])
    assert array.shape == (15, 3, 9, 9)
    expected = quantize.quantize(model, lmdb, runtime=quantize.Runtime(progress=Progress()))
    for given in (array, list(array), {"data": array}, np.concatenate([array, array])):
        small = quantize.quantize(model, quantize.Images(given, model, count=15))
        assert written(small.weights) == written(expected.weights)
        assert small.net == expected.net


def test_labels_of_arrays_are_counted(job: Job, model: quantize.Model) -> None:
    lmdb = quantize.Images(job.folder / "test_lmdb", model)
    step = quantize.quantize_weights(model, bits=2)
    expected = quantize.evaluate(model, step, lmdb)
    batches = list(feed_of(lmdb, "validation").batches(4))
    array = np.concatenate([batch.feeds["data"] for batch in batches])
    labels = np.concatenate([batch.labels for batch in batches if batch.labels is not None])
    assert quantize.evaluate(model, step, quantize.Images(array, model, labels=labels)) == expected
    without = quantize.evaluate(model, step, quantize.Images(array, model))
    assert (without.top1, without.agreement) == (None, expected.agreement)


def test_a_net_of_several_inputs(tmp_path: Path) -> None:
    config = load(write_several(tmp_path))
    Run(config).quantize()
    model = quantize.Model.load(tmp_path / "net.prototxt", tmp_path / "net.caffemodel")
    images = quantize.Images(
        tmp_path / "train_lmdb",
        model,
        inputs={"target": str(tmp_path / "targets"), "info": [0.5, -1, 2]},
        transform={"scale": 0.02, "mean_value": 100},
    )
    sections = {"renorm": {"images": 20}, "activations": {"images": 20}}
    silent = quantize.Runtime(progress=Progress())
    small = quantize.quantize(model, images, **sections, runtime=silent)
    expected = (tmp_path / "out/several_renorm.caffemodel").read_bytes()
    assert written(small.weights) == expected
    (batch,) = feed_of(images, "calibration").batches(20)
    arrays = quantize.Images(batch.feeds, model)
    assert written(quantize.quantize(model, arrays, **sections).weights) == expected
    with pytest.raises(quantize.InputError, match="the net has target, image, info: give each"):
        quantize.Images({"image": batch.feeds["image"]}, model)
    with pytest.raises(quantize.InputError, match=r"19 for target, 20 for image"):
        quantize.Images({**batch.feeds, "target": batch.feeds["target"][1:]}, model)


def test_renorm_looks_through_the_alphas(job: Job, model: quantize.Model) -> None:
    """The net that a model runs has its alphas, so renorm repairs a shift of some percent and no more.

    Of Qx without alpha the variances would be off by thousands.
    """
    images = quantize.Images(job.folder / "train_lmdb", model)
    runtime = quantize.Runtime(progress=Progress())
    fine = quantize.quantize_weights(model, settings={"bits": 8, "grid": "uniform"})
    step = quantize.renorm(fine, images, settings={"images": 20}, runtime=runtime)
    for layer in model.layers:
        if layer.type == "BatchNorm":
            (_, before), (_, after) = (stored_statistics(m.weights[layer.name]) for m in (model, step))
            np.testing.assert_allclose(after, before, rtol=0.2)
    with pytest.raises(quantize.InputError, match="has no layer 'conv1_alpha_term'"):
        replace(fine, net=model.net)


def test_full_precision_can_be_given(job: Job, model: quantize.Model) -> None:
    images = quantize.Images(job.folder / "train_lmdb", model)
    runtime = quantize.Runtime(progress=Progress())
    step = quantize.quantize_weights(model)
    expected = quantize.renorm(step, images, runtime=runtime)
    read = quantize.Model.load(*step.save(job.folder / "saved"))
    repaired = quantize.renorm(read, images, full=model, runtime=runtime)
    assert written(repaired.weights) == written(expected.weights)
    with pytest.raises(quantize.InputError, match="give full="):
        quantize.renorm(read, images)
    measured = quantize.renorm(read, images, settings={"statistics": "measured"})
    assert written(measured.weights) != written(expected.weights)


def test_what_is_not_quantized_stays_what_it_is(job: Job, model: quantize.Model) -> None:
    """Paired with itself, full precision gets back the statistics that it has."""
    images = quantize.Images(job.folder / "train_lmdb", model)
    same = quantize.renorm(model, images, runtime=quantize.Runtime(progress=Progress()))
    for layer in model.layers:
        if layer.type == "BatchNorm":
            for before, after in zip(
                stored_statistics(model.weights[layer.name]),
                stored_statistics(same.weights[layer.name]),
                strict=True,
            ):
                np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("digits")
def test_a_doubtful_transform_is_a_warning() -> None:
    model = quantize.Model.load("digits.prototxt", "digits.caffemodel")
    images = quantize.Images("calibration_lmdb", model, transform={"scale": 3, "mean_value": 100})
    with pytest.warns(UserWarning, match="data.transform"):
        quantize.quantize(model, images)


Fault = Callable[[quantize.Model, Path], object]
FAULTS: dict[str, tuple[str, Fault]] = {
    "bits": (
        "quantize_weights: weights.bits: 9: ",
        lambda m, _: quantize.quantize_weights(m, bits=9),
    ),
    "twice": (
        "weights.bits is given twice: 3 and 4",
        lambda m, _: quantize.quantize_weights(m, bits=3, settings={"bits": 4}),
    ),
    "unknown key": (
        "quantize: renorm.image: unknown key; did you mean images?",
        lambda m, f: quantize.quantize(m, quantize.Images(f / "train_lmdb", m), renorm={"image": 3}),
    ),
    "unknown transform": (
        "Images: data.transform.crop: unknown key; did you mean crop_size?",
        lambda m, f: quantize.Images(f / "train_lmdb", m, transform={"crop": 3}),
    ),
    "no images": (
        "weights.budget need images",
        lambda m, _: quantize.quantize_weights(m, settings={"budget": 3}),
    ),
    "no such folder": ("nowhere", lambda m, f: quantize.Images(f / "nowhere", m)),
    "too many": ("there are 20", lambda m, f: quantize.Images(f / "train_lmdb", m, count=21)),
    "none": ("data.calibration.images: 0: ", lambda m, f: quantize.Images(f / "train_lmdb", m, count=0)),
    "too many for a stage": (
        "renorm.images asks for 21 images",
        lambda m, f: quantize.renorm(m, quantize.Images(f / "train_lmdb", m), settings={"images": 21}),
    ),
    "too many of an array": (
        "renorm.images asks for 21 images but there are 4",
        lambda m, _: quantize.renorm(m, quantize.Images(np.zeros((4, 3, 9, 9)), m), settings={"images": 21}),
    ),
    "pixels": (
        "input data: these are 8-bit pixels",
        lambda m, _: quantize.Images(np.zeros((4, 3, 9, 9), np.uint8), m),
    ),
    "texts": ("not numbers", lambda m, _: quantize.Images(np.array(["a", "b"]), m)),
    "empty": ("no values", lambda m, _: quantize.Images([], m)),
    "channels": (
        "layer 'conv1'",
        lambda m, _: quantize.quantize(m, quantize.Images(np.zeros((4, 5, 9, 9)), m)),
    ),
    "not finite": (
        "input data: number 2 holds a NaN",
        lambda m, _: quantize.renorm(m, quantize.Images(with_nan(), m)),
    ),
    "labels": (
        "labels: 4 whole numbers are needed",
        lambda m, _: quantize.Images(np.zeros((4, 3, 9, 9)), m, labels=[1, 2]),
    ),
    "labels of an LMDB": ("labels", lambda m, f: quantize.Images(f / "train_lmdb", m, labels=[1, 2])),
    "transform of an array": (
        "arrays go in as they are",
        lambda m, _: quantize.Images(np.zeros((4, 3, 9, 9)), m, transform={"scale": 2}),
    ),
    "twice quantized": (
        "it has been quantized",
        lambda m, _: quantize.quantize_weights(quantize.quantize_weights(m)),
    ),
    "activations first": (
        "comes last",
        lambda m, f: quantize.quantize_weights(
            quantize.quantize_activations(
                m, quantize.Images(f / "train_lmdb", m, count=4), settings={"scope": "relu"}
            )
        ),
    ),
    "memory": (
        r"renorm.memory holds for all stages: give it to Runtime\(memory=...\)",
        lambda m, f: quantize.renorm(
            m, quantize.Images(f / "train_lmdb", m), settings={"memory": "1GiB", "images": 3}
        ),
    ),
    "engine": (
        "evaluate: engine: 'tensorflow': ",
        lambda m, f: quantize.evaluate(
            m,
            m,
            quantize.Images(f / "train_lmdb", m),
            runtime=quantize.Runtime(engine="tensorflow"),  # type: ignore[arg-type]
        ),
    ),
}


def with_nan() -> np.ndarray[Any, Any]:
    values = np.zeros((4, 3, 9, 9))
    values[2, 1, 5, 5] = np.nan
    return values


@pytest.mark.parametrize(("message", "wrong"), FAULTS.values(), ids=FAULTS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_is_wrong_is_said(job: Job, model: quantize.Model, message: str, wrong: Fault) -> None:
    with pytest.raises(quantize.InputError, match=message):
        wrong(model, job.folder)


def test_nothing_to_quantize_is_a_warning(job: Job, model: quantize.Model) -> None:
    images = quantize.Images(job.folder / "train_lmdb", model, count=4)
    with pytest.warns(UserWarning, match="nothing to quantize; with scope inputs"):
        same = quantize.quantize_activations(model, images)
    assert same.net == model.net


# ---- Images from anywhere ----


class Squares:
    """An input of the user's own: row i of an array, read batch by batch."""

    shape = (3, 9, 9)

    def __init__(self, rows: np.ndarray[Any, Any], labels: list[int] | None = None) -> None:
        self.rows = rows
        self.labels = labels
        self.read = 0

    def __len__(self) -> int:
        return len(self.rows)

    def batches(self, size: int, start: int = 0, stop: int | None = None) -> Iterator[tuple[Any, Any]]:
        stop = len(self) if stop is None else min(stop, len(self))
        for first in range(start, stop, size):
            last = min(first + size, stop)
            self.read += last - first
            yield self.rows[first:last], None if self.labels is None else self.labels[first:last]

    def subset(self, numbers: Sequence[int]) -> "Squares":
        labels = None if self.labels is None else [self.labels[number] for number in numbers]
        return Squares(self.rows[list(numbers)], labels)


@pytest.fixture
def rows(job: Job, model: quantize.Model) -> np.ndarray[Any, Any]:
    lmdb = quantize.Images(job.folder / "train_lmdb", model)
    return np.concatenate([batch.feeds["data"] for batch in lmdb.batches(6)])


def test_streams_and_inputs_of_the_users_own_are_images(
    model: quantize.Model, rows: np.ndarray[Any, Any]
) -> None:
    def endless() -> Iterator[np.ndarray[Any, Any]]:
        yield from (rows[first : first + 7] for first in range(0, 14, 7))  # in batches, then one by one
        yield from rows[14:]
        while True:
            yield np.zeros_like(rows[0])

    assert isinstance(Squares(rows), quantize.Input)
    settings = {"images": 15}
    expected = quantize.quantize(model, quantize.Images(rows, model), renorm=settings, activations=settings)
    for source in (endless(), Squares(rows), {"data": Squares(rows)}, iter(list(rows))):
        images = quantize.Images(source, model, count=len(rows))
        assert (len(images), images.shapes) == (20, {"data": (3, 9, 9)})
        small = quantize.quantize(model, images, renorm=settings, activations=settings)
        assert written(small.weights) == written(expected.weights)
        assert small.net == expected.net


def test_labels_of_the_users_own_inputs(job: Job, model: quantize.Model) -> None:
    lmdb = quantize.Images(job.folder / "test_lmdb", model)
    batches = list(feed_of(lmdb, "validation").batches(4))
    array = np.concatenate([batch.feeds["data"] for batch in batches])
    labels = [label or 0 for batch in batches for label in batch.labels]
    step = quantize.quantize_weights(model, bits=2)
    expected = quantize.evaluate(model, step, lmdb)
    assert quantize.evaluate(model, step, quantize.Images(Squares(array, labels), model)) == expected


def test_subsets_are_images_too(job: Job, model: quantize.Model, rows: np.ndarray[Any, Any]) -> None:
    for source in (job.folder / "train_lmdb", rows, Squares(rows)):
        images = quantize.Images(source, model, augment="test")
        few = images.subset(range(10, 20)).subset([7, 0])
        assert len(few) == 2
        [batch] = few.batches(5)
        whole = next(iter(images.batches(20))).feeds["data"]
        np.testing.assert_array_equal(batch.feeds["data"], whole[[17, 10]])
        with pytest.raises(quantize.InputError, match="only those from 0 to 1"):
            few.subset([2])
    few = quantize.Images(job.folder / "train_lmdb", model, augment="test").subset(range(4, 12))
    alike = quantize.Images(next(iter(few.batches(8))).feeds, model)
    runtime = quantize.Runtime(progress=Progress())
    settings = {"images": 8}
    one, other = (quantize.renorm(model, each, settings=settings, runtime=runtime) for each in (few, alike))
    assert written(one.weights) == written(other.weights)


def test_a_folder_is_opened_once(job: Job, model: quantize.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    from quantize.data import lmdb_file

    opened: list[Path] = []
    original = lmdb_file.LmdbFile.__init__
    monkeypatch.setattr(
        lmdb_file.LmdbFile, "__init__", lambda self, path: (opened.append(path), original(self, path))[1]
    )
    images = quantize.Images(job.folder / "train_lmdb", model)
    small = quantize.quantize(model, images, runtime=quantize.Runtime(progress=Progress()))
    quantize.evaluate(model, small, images)
    assert opened == [job.folder / "train_lmdb/data.mdb"]


@pytest.mark.parametrize(
    ("message", "wrong"),
    [
        ("no values", lambda m: quantize.Images(iter([]), m)),
        (
            "an image is 3x8x9 but the net says 3x9x9",
            lambda m: quantize.Images(iter([np.zeros((3, 8, 9))]), m),
        ),
        ("holds <U1, not numbers", lambda m: quantize.Images(iter(["a"]), m)),
        ("input data: not an array", lambda m: quantize.Images([[[1], [1, 2]]], m)),
    ],
)
def test_streams_that_are_none(message: str, wrong: Callable[[quantize.Model], object]) -> None:
    net = parse(
        'layer { name: "in" type: "Input" top: "data" input_param { shape { dim: [1, 3, 9, 9] } } } '
        'layer { name: "r" type: "ReLU" bottom: "data" top: "r" }'
    )
    with pytest.raises(quantize.InputError, match=message):
        wrong(quantize.Model(net, Weights()))
