"""Which images a net is fed with."""

from pathlib import Path

import cv2
import numpy as np
import pytest

from quantize.caffenet import TEST, BlobProto
from quantize.commands.config import load
from quantize.commands.init import initial_config
from quantize.data import Images, Transform, open_source
from quantize.data.feed import Feed, thinned
from quantize.job.feeds import calibration_feed, effective_transform, images_used
from tests.heard import Heard
from tests.nets import parse, write_images


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
    assert effective_transform(net, TEST, config).force_gray is gray
    if channels == 1:
        assert calibration_feed(config, net, 1).images.shape == (1, 8, 8)


@pytest.mark.parametrize(("solver", "used"), [("optimal", 30), ("data_aware", 70)])
def test_images_that_weights_are_fitted_to_are_used_images(solver: str, used: int) -> None:
    options = {"model.prototxt": "p", "model.weights": "w", "output": "o"}
    counts = ["weights.images=70", "renorm.images=20", "activations.images=30"]
    assert images_used(load(None, options, [*counts, f"weights.solver={solver}"])) == used


def test_thinned_images_are_spread_evenly(tmp_path: Path) -> None:
    source = open_source(write_images(tmp_path / "lmdb", 10))
    feed = Feed("data", Images(source, Transform(), TEST, 9))
    few = thinned(feed, 4).images
    assert [few.source.name(number) for number in range(len(few))] == [source.name(i) for i in (0, 2, 4, 6)]
    np.testing.assert_array_equal(next(few.batches(4))[0], next(feed.images.batches(9))[0][[0, 2, 4, 6]])
    assert len(thinned(feed, 100).images) == 9


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
    (tmp_path / "photos").mkdir()
    photo = np.random.default_rng(0).integers(0, 256, (40, 64, 3)).astype(np.uint8)
    assert cv2.imwrite(str(tmp_path / "photos/a.png"), photo)
    options = {
        "model.prototxt": str(tmp_path / "net.prototxt"),
        "model.weights": "w",
        "output": "o",
        "data.calibration.source": str(tmp_path / "photos"),
        "renorm.augment": "test",
    }
    heard = Heard()
    feed = calibration_feed(load(None, options), net, 1, heard)
    told = "resizing to 20x24, the size of the mean_file (data.transform.resize)"
    assert heard.notes == [f"{tmp_path / 'photos'}: {told}"]
    wanted = cv2.resize(photo, (24, 20)).transpose(2, 0, 1) - mean
    np.testing.assert_array_equal(next(feed.images.batches(1))[0][0], wanted[:, 1:18, 3:20])

    initial = initial_config(net, tmp_path / "net.prototxt", Path("w"), tmp_path / "photos", tmp_path)
    assert "transform: {resize: [20, 24]}" in initial.yaml
    assert told in initial.guesses
    (tmp_path / "mean.binaryproto").unlink()
    initial = initial_config(net, tmp_path / "net.prototxt", Path("w"), tmp_path / "photos", tmp_path)
    assert "transform: {}" in initial.yaml
    assert any("the mean_file cannot be read" in guess for guess in initial.guesses)
