"""Which images a net is fed with."""

from pathlib import Path

import cv2
import numpy as np
import pytest

from quantize import caffenet
from quantize.caffenet import TEST, load_schema, read_prototxt
from quantize.commands.config import load
from quantize.data import Images, Transform, open_source
from quantize.data.feed import Feed, thinned
from quantize.errors import InputError
from quantize.job.feeds import calibration_feed, effective_transform, images_used
from quantize.progress import Progress
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
        assert calibration_feed(config, net, 1).shapes == {"in": (1, 8, 8)}


def test_a_scale_of_0_is_questioned() -> None:
    text = 'layer { name: "in" type: "Data" top: "in" transform_param { scale: %s } }'
    options = {"model.prototxt": "p", "model.weights": "w", "output": "o"}
    for scale, assignments in (("0", []), ("1", ["data.transform.scale=0"])):
        with pytest.raises(InputError, match="scale is 0, which makes every pixel 0"):
            effective_transform(parse(text % scale), TEST, load(None, options, assignments))


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
    calibration_feed(load(None, options), net, 1, progress)
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
    assert whole.labels is not None
    found = next(few.batches(4))
    np.testing.assert_array_equal(found.feeds["data"], whole.feeds["data"][[0, 2, 4, 6]])
    np.testing.assert_array_equal(found.labels, whole.labels[[0, 2, 4, 6]])
    assert len(thinned(feed, 100)) == 9
