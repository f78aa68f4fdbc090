"""The prototxts that are written, for nets that feed themselves in every way there is."""

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest

from quantize.caffenet import NetParameter, check_net, filter_net, read_prototxt
from quantize.job.given import Given
from quantize.job.prototxts import caffe_test, deploy_prototxt, image_scores, validation_prototxt
from quantize.job.run import Run
from quantize.record import CaffeTest
from quantize.settings import Config
from tests.conftest import Job
from tests.nets import CROPPED, parse

BODY = """
layer { name: "conv" type: "Convolution" bottom: "data" top: "conv"
  convolution_param { num_output: CLASSES kernel_size: 9 } }
"""
LOSS = 'layer { name: "loss" type: "SoftmaxWithLoss" bottom: "conv" bottom: "truth" top: "loss" }'
PROB = 'layer { name: "prob" type: "Softmax" bottom: "conv" top: "prob" }'
INPUT = """
layer { name: "in" type: "Input" top: "data" input_param { shape { dim: [1, 3, 9, 9] } } }
"""
TWO_INPUTS = """
layer { name: "in" type: "Input" top: "data" input_param { shape { dim: [1, 3, 9, 9] } } }
layer { name: "in2" type: "Input" top: "truth" input_param { shape { dim: 1 } } }
"""
HDF5 = 'layer { name: "h" type: "HDF5Data" top: "data" top: "truth" hdf5_data_param { source: "x" } }'
LEVELDB = 'layer { name: "d" type: "Data" top: "data" data_param { source: "x" backend: LEVELDB } }'


def net_of(feed: str, loss: str = "", classes: int = 7) -> NetParameter:
    return parse(feed + BODY.replace("CLASSES", str(classes)) + loss)


def val_prototxt(net: NetParameter, config: Config, shapes: dict[str, tuple[int, ...]]) -> NetParameter:
    return validation_prototxt(net, Given(config, net), image_scores(net, shapes))


@pytest.mark.parametrize(
    ("feed", "loss", "label"),
    [
        (INPUT, PROB, "label"),
        (TWO_INPUTS, LOSS, "truth"),
        (HDF5, LOSS, "truth"),
        (LEVELDB, PROB, "label"),
    ],
)
def test_one_data_layer_feeds_images_and_labels(job: Job, feed: str, loss: str, label: str) -> None:
    val = filter_net(val_prototxt(net_of(feed, loss), job.config(), {"data": CROPPED}), 1)
    check_net(val)
    assert [layer.type for layer in val.layer][:2] == ["Data", "Convolution"]
    assert list(val.layer[0].top) == ["data", label]
    assert val.layer[0].data_param.source == str(job.folder / "test_lmdb")
    accuracies = [layer for layer in val.layer if layer.type == "Accuracy"]
    assert [(layer.accuracy_param.top_k, layer.bottom[1]) for layer in accuracies] == [(1, label), (5, label)]


def test_no_top_5_of_three_classes(job: Job) -> None:
    """Caffe would refuse the net."""
    val = val_prototxt(net_of(INPUT, PROB, classes=3), job.config(), {"data": CROPPED})
    assert [layer.accuracy_param.top_k for layer in val.layer if layer.type == "Accuracy"] == [1]


def test_no_accuracy_where_scores_are_maps(job: Job) -> None:
    net = net_of(INPUT, PROB)
    net.layer[1].convolution_param.kernel_size[0] = 3
    val = val_prototxt(net, job.config(), {"data": CROPPED})
    assert "Accuracy" not in [layer.type for layer in val.layer]


@pytest.mark.parametrize(
    "loss",
    [
        "",
        'layer { name: "loss" type: "EuclideanLoss" bottom: "conv" bottom: "truth" top: "loss" }',
        'layer { name: "sigmoid" type: "Sigmoid" bottom: "conv" top: "sigmoid" }',
    ],
)
def test_no_accuracy_where_nothing_says_classes(job: Job, loss: str) -> None:
    """A landmark regressor, say."""
    val = val_prototxt(
        net_of(TWO_INPUTS if "truth" in loss else INPUT, loss), job.config(), {"data": CROPPED}
    )
    assert "Accuracy" not in [layer.type for layer in val.layer]


@pytest.mark.parametrize("given", ["false", "true"])
def test_batch_norms_use_their_stored_statistics(job: Job, given: str) -> None:
    norm = f"""layer {{ name: "bn" type: "BatchNorm" bottom: "conv" top: "bn"
        batch_norm_param {{ use_global_stats: {given} eps: 0.5 }} }}"""
    net = net_of(INPUT, norm)
    for written in (
        val_prototxt(net, job.config(), {"data": CROPPED}),
        deploy_prototxt(net, {"data": CROPPED}),
    ):
        found = next(layer for layer in written.layer if layer.type == "BatchNorm").batch_norm_param
        assert found.HasField("use_global_stats") == (given == "true")
        assert found.eps == 0.5


def test_without_validation_lmdb_data_layers_stay(make_job: Callable[[str], Job], tmp_path: Path) -> None:
    job = make_job("a")
    (tmp_path / "list.txt").write_text("x.png 3\n")
    net = net_of(LEVELDB)
    config = job.config(f"data.validation.source={tmp_path / 'list.txt'}")
    assert val_prototxt(net, config, {"data": CROPPED}) == net


def test_layers_that_feed_take_no_name_that_others_have(job: Job) -> None:
    """Caffe copies blobs into the first layer of a name: were that the new one, it would refuse the file."""
    net = net_of(INPUT.replace('top: "data"', 'top: "pixels"'))
    net.layer.insert(
        1, parse('layer { name: "data" type: "BatchNorm" bottom: "pixels" top: "data" }').layer[0]
    )
    net.layer.insert(2, parse('layer { name: "pixels" type: "ReLU" bottom: "data" top: "data" }').layer[0])
    for written in (
        filter_net(val_prototxt(net, job.config(), {"pixels": CROPPED}), 1),
        deploy_prototxt(net, {"pixels": CROPPED}),
    ):
        check_net(written)
        assert [layer.type for layer in written.layer][:3] in (
            ["Data", "BatchNorm", "ReLU"],
            ["Input", "BatchNorm", "ReLU"],
        )
        assert [layer.name for layer in written.layer][1:3] == ["data", "pixels"]


def test_a_quantized_net_has_the_class_scores_of_the_net_it_was(job: Job) -> None:
    """Behind its last InnerProduct stands a Scale layer."""
    text = (job.folder / "net.prototxt").read_text()
    layers = [line for line in text.splitlines() if "phase" not in line and '"label"' not in line]
    body = "\n".join(layers[next(i for i, line in enumerate(layers) if '"conv1"' in line) :])
    (job.folder / "net.prototxt").write_text(f'name: "residual" {INPUT} {body}')
    Run(job.config("data.transform={crop_size: 9, scale: 0.02, mean_value: 100}")).quantize()
    val = read_prototxt(job.out / "residual_val.prototxt")
    assert [layer.type for layer in val.layer][-3:] == ["Scale", "Accuracy", "Accuracy"]
    assert [layer.bottom[0] for layer in list(val.layer)[-2:]] == ["fc2", "fc2"]


# ---- What `caffe test` would need ----


def test_caffe_test_runs_over_all_images_of_an_lmdb(job: Job) -> None:
    assert caffe_test(Given(job.config(), net_of(INPUT, PROB))) == CaffeTest(3)  # 15 images, 5 at a time


@pytest.mark.parametrize(
    ("assignments", "needed"),
    [
        (["data.validation=null"], "labeled images in an LMDB: `labelfree make-lmdb IMAGES LMDB`"),
        (["data.validation.source=LIST"], "the images of LIST in an LMDB: `labelfree make-lmdb LIST LMDB"),
        (
            ["data.transform.resize_short=12"],
            "in an LMDB: `labelfree make-lmdb test_lmdb LMDB --resize-short 12`, then `--validation LMDB`",
        ),
        (["data.transform.resize=[9, 10]", "data.transform.crop_size=9"], "LMDB --resize 9x10`"),
    ],
)
def test_caffe_test_says_what_it_would_need(job: Job, assignments: list[str], needed: str) -> None:
    folder = job.folder / "photos"
    folder.mkdir()
    assert cv2.imwrite(str(folder / "a.png"), np.zeros((20, 30, 3), np.uint8))
    (job.folder / "list.txt").write_text("photos/a.png 3\n")
    given = [text.replace("LIST", str(job.folder / "list.txt")) for text in assignments]
    found = caffe_test(Given(job.config(*given), net_of(INPUT, PROB)))
    assert found.iterations is None
    text = found.needed.replace(str(job.folder / "list.txt"), "LIST").replace(f"{job.folder}/", "")
    assert needed in text
    assert ("--resize-short 10" in text) == ("LIST" in text)  # photographs: 9 * 256 / 224


def test_caffe_test_cannot_feed_a_second_input(job: Job) -> None:
    second = 'layer { name: "in2" type: "Input" top: "info" input_param { shape { dim: [1, 3] } } }'
    reads = 'layer { name: "read" type: "ReLU" bottom: "info" top: "read" }'
    found = caffe_test(Given(job.config(), net_of(INPUT + second, reads)))
    assert found.needed == "a layer that feeds the input info, which a Data layer does not"
