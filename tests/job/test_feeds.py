"""Which images a net is fed with."""

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import pytest

from quantize import caffenet
from quantize.caffenet import TEST, BlobProto, InferenceNet, load_schema, read_prototxt
from quantize.commands.config import load
from quantize.commands.init import initial_config
from quantize.data import Images, Transform, open_source
from quantize.data.feed import Feed, thinned
from quantize.errors import InputError
from quantize.job.feeds import (
    calibration_feed,
    effective_transform,
    images_used,
    stage_feed,
    validation_feed,
)
from quantize.job.given import Given
from quantize.progress import Progress
from quantize.settings import Config
from tests.heard import Heard
from tests.nets import parse, random_weights, write_images


@pytest.mark.parametrize(
    ("channels", "given", "gray"), [(1, "{}", True), (3, "{}", False), (3, "{force_gray: true}", True)]
)
def test_a_net_of_one_channel_gets_gray_images(tmp_path: Path, channels: int, given: str, gray: bool) -> None:
    net = parse(
        'layer { name: "in" type: "Input" top: "in" '
        f"input_param {{ shape {{ dim: [1, {channels}, 8, 8] }} }} }}"
        'layer { name: "relu" type: "ReLU" bottom: "in" top: "relu" }'
    )
    assert cv2.imwrite(str(tmp_path / "a.png"), np.full((8, 8, 3), (10, 20, 30), np.uint8))
    options = {
        "model.prototxt": "p",
        "model.weights": "w",
        "output": "o",
        "data.calibration.source": str(tmp_path),
    }
    config = load(None, options, [f"data.transform={given}"])
    assert effective_transform(Given(config, net), TEST).force_gray is gray
    if channels == 1:
        assert calibration_feed(Given(config, net), 1).shapes == {"in": (1, 8, 8)}


def test_a_scale_of_0_is_questioned() -> None:
    text = (
        'layer { name: "in" type: "Data" top: "in" transform_param { scale: %s } }'
        'layer { name: "out" type: "ReLU" bottom: "in" top: "out" }'
    )
    options = {"model.prototxt": "p", "model.weights": "w", "output": "o"}
    for scale, assignments in (("0", []), ("1", ["data.transform.scale=0"])):
        with pytest.raises(InputError, match="scale is 0, which makes every pixel 0"):
            effective_transform(Given(load(None, options, assignments), parse(text % scale)), TEST)


def test_fields_of_a_fork_in_a_transform_are_said_not_to_be_applied(tmp_path: Path) -> None:
    pytest.importorskip("grpc_tools")
    ours = Path(caffenet.__file__).with_name("caffe.proto").read_text()
    head = "message TransformationParameter {"
    assert head in ours
    (tmp_path / "fork.proto").write_text(ours.replace(head, head + "optional uint32 crop_h = 11;"))
    (tmp_path / "net.prototxt").write_text(
        'layer { name: "data" type: "Data" top: "data" transform_param { crop_size: 8 crop_h: 6 } }'
        'layer { name: "relu" type: "ReLU" bottom: "data" top: "relu" }'
    )
    net = read_prototxt(tmp_path / "net.prototxt", load_schema(tmp_path / "fork.proto"))
    assert cv2.imwrite(str(tmp_path / "a.png"), np.zeros((9, 9, 3), np.uint8))
    options = {
        "model.prototxt": "p",
        "model.weights": "w",
        "output": "o",
        "data.calibration.source": str(tmp_path),
    }
    notes: list[str] = []
    progress = Progress()
    progress.note = notes.append  # type: ignore[method-assign]
    calibration_feed(Given(load(None, options), net), 1, progress)
    assert any(
        note.startswith(
            "layer 'data': transform_param.crop_h is a field of a fork of Caffe and is not applied"
        )
        for note in notes
    )


@pytest.mark.parametrize(("solver", "used"), [("optimal", 30), ("data_aware", 70)])
def test_images_that_weights_are_fitted_to_are_used_images(solver: str, used: int) -> None:
    options = {"model.prototxt": "p", "model.weights": "w", "output": "o"}
    counts = ["weights.images=70", "renorm.images=20", "activations.images=30"]
    assert images_used(load(None, options, [*counts, f"weights.solver={solver}"])) == used


def test_thinned_images_are_spread_evenly(tmp_path: Path) -> None:
    source = open_source(write_images(tmp_path / "lmdb", 10))
    feed = Feed({"data": Images(source, Transform(), TEST, 9)})
    few = thinned(feed, 4)
    names = few.inputs["data"].source
    assert [names.name(number) for number in range(len(few))] == [source.name(i) for i in (0, 2, 4, 6)]
    whole = next(feed.batches(9))
    assert None not in whole.labels
    found = next(few.batches(4))
    np.testing.assert_array_equal(found.feeds["data"], whole.feeds["data"][[0, 2, 4, 6]])
    assert found.labels == [whole.labels[number] for number in (0, 2, 4, 6)]
    assert len(thinned(feed, 100)) == 9


PLAIN = (
    'layer { name: "in" type: "Input" top: "in" input_param { shape { dim: [1, 3, 8, 8] } } }'
    'layer { name: "relu" type: "ReLU" bottom: "in" top: "relu" }'
)


def config_for(source: Path, *assignments: str) -> Config:
    """A job whose images are in ``source``."""
    options = {"model.prototxt": "p", "model.weights": "w", "output": "o"}
    return load(None, {**options, "data.calibration.source": str(source)}, assignments)


def write_files(folder: Path, sizes: Sequence[tuple[int, int]]) -> Path:
    """Image files of random pixels."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number, size in enumerate(sizes):
        assert cv2.imwrite(str(folder / f"{number:03}.png"), rng.integers(0, 256, (*size, 3), np.uint8))
    return folder


def test_images_as_large_as_the_input_are_taken_as_they_are(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "photos", [(8, 8)] * 5)
    heard = Heard()
    feed = calibration_feed(Given(config_for(folder), parse(PLAIN)), 5, heard)
    pixels = next(feed.batches(5)).feeds["in"]
    for number, found in enumerate(pixels):
        stored = cv2.imread(str(folder / f"{number:03}.png"))
        assert stored is not None
        np.testing.assert_array_equal(found, stored.transpose(2, 0, 1))
    assert heard.notes == []


@pytest.mark.parametrize("sizes", [[(9, 9)] * 4, [(8, 8)] * 40 + [(30, 20)]])
def test_images_of_other_sizes_are_resized_and_that_is_said(
    tmp_path: Path, sizes: list[tuple[int, int]]
) -> None:
    """Also where one image of many is of another size: it is among those that are looked at, or refused."""
    folder = write_files(tmp_path / "photos", sizes[::-1])
    heard = Heard()
    feed = calibration_feed(Given(config_for(folder), parse(PLAIN)), len(sizes), heard)
    assert feed.shapes == {"in": (3, 8, 8)}
    guess = "images are not all 8x8 as the net wants them: resizing the shorter side to 9"
    assert sum(guess in note for note in heard.notes) == 1
    said = Heard()
    calibration_feed(Given(config_for(folder, "data.transform.resize_short=12"), parse(PLAIN)), 1, said)
    assert not any("resizing" in note for note in said.notes)


def test_held_out_images_come_as_those_for_calibration(tmp_path: Path) -> None:
    """They lie behind the used ones in the same folder, and are resized alike."""
    folder = write_files(tmp_path / "photos", [(20, 30)] * 10)
    config = config_for(folder, "data.calibration.images=6")
    heard = Heard()
    feed = validation_feed(Given(config, parse(PLAIN)), None, heard)
    assert (len(feed), feed.shapes) == (4, {"in": (3, 8, 8)})
    assert any("resizing the shorter side to 9" in note for note in heard.notes)
    resized = cv2.resize(cv2.imread(str(folder / "006.png")), (14, 9))[0:8, 3:11]
    np.testing.assert_array_equal(next(feed.batches(1)).feeds["in"][0], resized.transpose(2, 0, 1))


def test_where_no_number_is_given_all_images_are_used_and_that_is_noted(tmp_path: Path) -> None:
    lmdb = write_images(tmp_path / "lmdb", 12, (3, 8, 8))
    for stage in ("weights", "renorm", "activations"):
        heard = Heard()
        assert len(stage_feed(Given(config_for(lmdb), parse(PLAIN)), stage, heard)) == 12
        assert [note.startswith(f"{lmdb} holds 12 images: all of them are used") for note in heard.notes] == [
            True
        ]
        with pytest.raises(InputError, match=rf"{stage}.images asks for 13 images but it holds 12"):
            stage_feed(Given(config_for(lmdb, f"{stage}.images=13"), parse(PLAIN)), stage)
        cured = config_for(lmdb, f"{stage}.images=13", "data.calibration.images=12")
        assert len(stage_feed(Given(cured, parse(PLAIN)), stage, heard)) == 12
    for defaults in ("renorm.statistics=measured", "activations.solver=reference"):
        stage = defaults.split(".")[0]
        assert len(stage_feed(Given(config_for(lmdb, defaults), parse(PLAIN)), stage)) == 12
    few = config_for(lmdb, "data.calibration.images=5", "renorm.images=9")
    assert len(stage_feed(Given(few, parse(PLAIN)), "renorm")) == 5
    with pytest.raises(InputError, match=r"data.calibration.images asks for 13 images but it holds 12"):
        stage_feed(Given(config_for(lmdb, "data.calibration.images=13"), parse(PLAIN)), "renorm")


def test_photographs_are_resized_to_the_size_of_the_mean_image(tmp_path: Path) -> None:
    """As the images were that it is the mean of: 256x256 with a crop of 227 for the nets of Caffe's zoo."""
    mean = np.arange(3 * 20 * 24, dtype=np.float32).reshape(3, 20, 24)
    blob = BlobProto(num=1, channels=3, height=20, width=24, data=mean.ravel().tolist())
    (tmp_path / "mean.binaryproto").write_bytes(blob.SerializeToString())
    (tmp_path / "net.prototxt").write_text(
        'name: "mean"\n'
        'layer { name: "data" type: "Data" top: "data" top: "label" '
        'transform_param { crop_size: 17 mean_file: "mean.binaryproto" } }\n'
        'layer { name: "ip" type: "InnerProduct" bottom: "data" top: "ip" '
        "inner_product_param { num_output: 2 } }"
    )
    net = parse((tmp_path / "net.prototxt").read_text())
    with open(tmp_path / "net.caffemodel", "wb") as file:
        random_weights(InferenceNet.of(net).net, {"data": (3, 17, 17)}).write(file)
    (tmp_path / "photos").mkdir()
    photo = np.random.default_rng(0).integers(0, 256, (40, 64, 3)).astype(np.uint8)
    assert cv2.imwrite(str(tmp_path / "photos/a.png"), photo)
    options = {
        "model.prototxt": str(tmp_path / "net.prototxt"),
        "model.weights": str(tmp_path / "net.caffemodel"),
        "output": "o",
        "data.calibration.source": str(tmp_path / "photos"),
        "data.augment": "test",
    }
    config = load(None, options)
    heard = Heard()
    feed = calibration_feed(Given(config, net), 1, heard)
    told = "images are not all 20x24 as the mean_file is: resizing to 20x24 (data.transform.resize)"
    assert heard.notes == [f"{tmp_path / 'photos'}: {told}"]
    wanted = cv2.resize(photo, (24, 20)).transpose(2, 0, 1) - mean
    np.testing.assert_array_equal(next(feed.batches(1)).feeds["data"][0], wanted[:, 1:18, 3:20])

    initial = initial_config(net, config.model, tmp_path / "photos", tmp_path)
    assert "transform: {resize: [20, 24]}" in initial.yaml
    assert told in initial.guesses

    assert cv2.imwrite(str(tmp_path / "photos/a.png"), cv2.resize(photo, (24, 20)))
    heard = Heard()
    feed = calibration_feed(Given(config, net), 1, heard)
    np.testing.assert_array_equal(next(feed.batches(1)).feeds["data"][0], wanted[:, 1:18, 3:20])
    assert heard.notes == []  # as large as the mean already

    assert cv2.imwrite(str(tmp_path / "photos/a.png"), photo)
    (tmp_path / "mean.binaryproto").unlink()
    initial = initial_config(net, config.model, tmp_path / "photos", tmp_path)
    assert "transform: {}" in initial.yaml
    assert any(
        "size before the crop, for" in guess and "cannot read the mean_file" in guess
        for guess in initial.guesses
    )
