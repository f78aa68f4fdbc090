"""Nets whose layers share weights, or have several tops, through the whole job: the files in real Caffe."""

import re
from pathlib import Path

import numpy as np
import pytest

from quantize.caffenet import InferenceNet, Weights, infer_shapes, load_weights, read_prototxt
from quantize.commands.config import load
from quantize.engines.onnx.engine import OnnxEngine
from quantize.job.run import Run
from tests.caffe.conftest import CaffeForward
from tests.nets import parse, write_images

IMAGE = (3, 12, 12)
HEAD = """
layer { name: "join" type: "Concat" bottom: "left4" bottom: "right4" top: "join" }
layer { name: "fc" type: "InnerProduct" bottom: "join" top: "fc" inner_product_param { num_output: 7 } }
"""


def branch(side: str, bias: str = "") -> str:
    """Three layers whose weights the other branch has, too; the biases of the second are their own."""
    own = bias or "lr_mult: 2"
    return f"""
layer {{ name: "conv1_{side}" type: "Convolution" bottom: "{side}" top: "{side}1"
  param {{ name: "w1" }} param {{ name: "b1" }} convolution_param {{ num_output: 8 kernel_size: 3 }} }}
layer {{ name: "relu1_{side}" type: "ReLU" bottom: "{side}1" top: "{side}1" }}
layer {{ name: "conv2_{side}" type: "Convolution" bottom: "{side}1" top: "{side}2"
  param {{ name: "w2" }} param {{ {own} }} convolution_param {{ num_output: 12 kernel_size: 3 pad: 1 }} }}
layer {{ name: "relu2_{side}" type: "ReLU" bottom: "{side}2" top: "{side}3" }}
layer {{ name: "fc_{side}" type: "InnerProduct" bottom: "{side}3" top: "{side}4"
  param {{ name: "w3" }} param {{ name: "b3" }} inner_product_param {{ num_output: 10 }} }}
"""


SIAMESE = f"""
name: "siamese"
layer {{ name: "data" type: "Input" top: "data" input_param {{ shape {{ dim: 1 dim: 3 dim: 12 dim: 12 }} }} }}
layer {{ name: "cut" type: "Slice" bottom: "data" top: "left" top: "right"
  slice_param {{ axis: 2 slice_point: 6 }} }}
{branch("left")}{branch("right")}{HEAD}"""
NORM = """
layer {{ name: "norm_{0}" type: "BatchNorm" bottom: "{0}2" top: "{0}2" param {{ name: "mean" lr_mult: 0 }}
  param {{ name: "variance" lr_mult: 0 }} param {{ name: "factor" lr_mult: 0 }} }}
layer {{ name: "scale_{0}" type: "Scale" bottom: "{0}2" top: "{0}2" param {{ name: "gain" }}
  param {{ name: "shift" }} scale_param {{ bias_term: true }} }}
"""
NORMED = SIAMESE
for side in ("left", "right"):
    NORMED = NORMED.replace(
        f'layer {{ name: "relu2_{side}"', NORM.format(side) + f'layer {{ name: "relu2_{side}"'
    )
MANY = """
name: "many"
layer { name: "data" type: "Input" top: "data" input_param { shape { dim: 1 dim: 3 dim: 12 dim: 12 } } }
layer { name: "cut" type: "Slice" bottom: "data" top: "left" top: "right"
  slice_param { axis: 2 slice_point: 6 } }
layer { name: "first" type: "Convolution" bottom: "data" top: "first"
  convolution_param { num_output: 4 kernel_size: 1 } }
layer { name: "both" type: "Convolution" bottom: "left" bottom: "right" top: "l" top: "r"
  convolution_param { num_output: 8 kernel_size: 3 } }
layer { name: "relu" type: "ReLU" bottom: "r" top: "r" }
layer { name: "bare" type: "Convolution" bottom: "l" bottom: "r" top: "left4" top: "right4"
  convolution_param { num_output: 6 kernel_size: 3 bias_term: false } }
layer { name: "fc" type: "InnerProduct" bottom: "join" top: "fc" inner_product_param { num_output: 7 } }
"""
MANY = MANY.replace('layer { name: "fc"', 'layer { name: "join" type: "Concat" bottom: "left4" '
                    'bottom: "right4" top: "join" }\nlayer { name: "fc"')  # fmt: skip


def write_model(folder: Path, text: str, only: tuple[str, ...] = ("",)) -> None:
    """A prototxt, the blobs of the layers whose names end with one of ``only``, and images."""
    folder.mkdir(exist_ok=True)
    (folder / "net.prototxt").write_text(text)
    net = InferenceNet.of(parse(text)).net
    rng = np.random.default_rng(5)
    weights = Weights()
    for layer in net.layer:
        shapes = infer_shapes(net, {"data": (1, *IMAGE)}).params[layer.name]
        blobs = [(rng.normal(0, 0.3, shape)).astype(np.float32) for shape in shapes]
        if layer.type == "BatchNorm":
            blobs = [400 * blobs[0], np.full_like(blobs[1], 4e4), np.ones(1, np.float32)]
        if blobs and layer.name.endswith(only):
            weights.add(layer, blobs)
    with open(folder / "net.caffemodel", "wb") as file:
        weights.write(file)
    write_images(folder / "images", 24, IMAGE)


def run_job(folder: Path, *assignments: str) -> None:
    given = {
        "name": "net",
        "model.prototxt": str(folder / "net.prototxt"),
        "model.weights": str(folder / "net.caffemodel"),
        "data.calibration.source": str(folder / "images"),
        "output": str(folder / "out"),
    }
    settings = ["renorm.images=20", "activations.images=20", "weights.images=20", *assignments]
    settings.append("renorm.bias_correction=false")  # which leaves alone what is shared, and nothing else
    Run(load(None, given, settings)).quantize()


def computed(prototxt: Path, weights: Path, blobs: list[str]) -> list[np.ndarray]:
    net = read_prototxt(prototxt)
    test = InferenceNet.of(net)
    engine = OnnxEngine(test.net, load_weights(weights, net), {"data": IMAGE}, 1)
    found = engine.compile(0, len(test.net.layer), blobs).run({"data": images()}).blobs
    engine.close()
    return [found[name] for name in blobs]


def energy(x: np.ndarray) -> float:
    return float(np.square(x, dtype=np.float64).sum())


def images() -> np.ndarray:
    return np.random.default_rng(1).uniform(0, 255, (4, *IMAGE)).astype(np.float32)


def quantized_in_caffe(
    folder: Path, caffe_forward: CaffeForward, blobs: list[str]
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Blobs of the given net and of what was written, in Caffe, which computes what we do."""
    found = []
    for prototxt, weights in (
        (folder / "net.prototxt", folder / "net.caffemodel"),
        (folder / "out/net_deploy.prototxt", folder / "out/net_renorm.caffemodel"),
    ):
        found.append(caffe_forward(prototxt, weights, {"data": images()}, blobs))
        for blob, ours in zip(found[-1], computed(prototxt, weights, blobs), strict=True):
            np.testing.assert_allclose(ours, blob, rtol=0, atol=1e-5 * np.abs(blob).max())
    return found[0], found[1]


@pytest.mark.parametrize("only", [("",), ("_left", "fc", "conv2_right")])
def test_shared_weights_are_those_of_a_net_that_has_them_twice(
    only: tuple[str, ...], tmp_path: Path, caffe_forward: CaffeForward
) -> None:
    shared, twice = tmp_path / "shared", tmp_path / "twice"
    write_model(shared, SIAMESE, only)
    run_job(shared)
    twice.mkdir()
    (twice / "net.prototxt").write_text(re.sub(r'param { name: "\w+" }', "param { lr_mult: 1 }", SIAMESE))
    with open(twice / "net.caffemodel", "wb") as file:
        load_weights(shared / "net.caffemodel", parse(SIAMESE)).write(file)
    write_images(twice / "images", 24, IMAGE)
    run_job(twice, "weights.layers.conv1_right={bits: 8, grid: fixed_point}")
    ours, theirs = (quantized_in_caffe(folder, caffe_forward, ["fc"]) for folder in (shared, twice))
    np.testing.assert_array_equal(ours[0], theirs[0])
    np.testing.assert_array_equal(ours[1], theirs[1])
    assert (ours[0][0] != ours[1][0]).all()


def test_one_alpha_for_shared_weights(tmp_path: Path, caffe_forward: CaffeForward) -> None:
    """Half of the blobs can go from what is written, and Caffe computes the same."""
    write_model(tmp_path, SIAMESE)
    run_job(tmp_path)
    net, weights = tmp_path / "out/net_deploy.prototxt", Weights.read(tmp_path / "out/net_renorm.caffemodel")
    for first, second in (("conv1_left", "conv1_right"), ("fc_left", "fc_right")):
        for name in ("", "_alpha_term"):
            for one, other in zip(weights[first + name], weights[second + name], strict=True):
                np.testing.assert_array_equal(one, other)
    half = Weights()
    for layer in read_prototxt(net).layer:
        if layer.name in weights and layer.name not in ("conv1_right", "fc_right"):
            half.add(layer, weights[layer.name])
    with open(tmp_path / "half.caffemodel", "wb") as file:
        half.write(file)
    whole = caffe_forward(net, tmp_path / "out/net_renorm.caffemodel", {"data": images()}, ["fc"])
    np.testing.assert_array_equal(
        caffe_forward(net, tmp_path / "half.caffemodel", {"data": images()}, ["fc"])[0], whole[0]
    )


@pytest.mark.parametrize("text", [SIAMESE, NORMED, MANY], ids=["siamese", "normed", "many"])
@pytest.mark.parametrize("solver", ["optimal", "data_aware"])
def test_every_output_is_close_to_full_precision(
    text: str, solver: str, tmp_path: Path, caffe_forward: CaffeForward
) -> None:
    write_model(tmp_path, text, ("_left", "both", "bare", "first", "fc", "conv2_right"))
    run_job(tmp_path, f"weights.solver={solver}")
    blobs = ["left4", "right4", "fc"]
    for full, own in zip(*quantized_in_caffe(tmp_path, caffe_forward, blobs), strict=True):
        assert 10 * np.log10(energy(full) / energy(full - own)) > 10


@pytest.mark.parametrize("text", [NORMED, MANY], ids=["normed", "many"])
def test_either_engine_gives_the_same(
    text: str, tmp_path: Path, caffe_python: list[str], caffe_plugin: str
) -> None:
    """Also where all layers of the second branch have the names of the first."""
    through_caffe = ("engine=caffe", f"caffe.python={caffe_python}", f"caffe.preload={caffe_plugin}")
    folders = tmp_path / "onnx", tmp_path / "caffe"
    for folder, settings in zip(folders, ((), through_caffe), strict=True):
        write_model(
            folder,
            text.replace("param { lr_mult: 2 }", 'param { name: "b2" }'),
            ("_left", "first", "both", "bare", "fc"),
        )
        one = re.sub(r'name: "(\w+)_right"', r'name: "\1_left"', (folder / "net.prototxt").read_text())
        (folder / "net.prototxt").write_text(one)
        run_job(folder, *settings)
    ours, theirs = (
        computed(folder / "out/net_deploy.prototxt", folder / "out/net_renorm.caffemodel", ["fc"])[0]
        for folder in folders
    )
    assert energy(ours - theirs) < 1e-4 * energy(ours)


def test_layers_of_one_name_are_those_of_a_net_that_names_them_apart(
    tmp_path: Path, caffe_forward: CaffeForward
) -> None:
    """All layers of the second branch have the names of the first, the ReLUs have none."""
    apart = SIAMESE.replace("param { lr_mult: 2 }", 'param { name: "b2" }')
    one = re.sub(r'name: "relu\d_\w+" ', "", re.sub(r'name: "(\w+)_right"', r'name: "\1_left"', apart))
    folders = tmp_path / "apart", tmp_path / "one"
    for folder, text in zip(folders, (apart, one), strict=True):
        write_model(folder, apart, ("_left", "fc"))
        (folder / "net.prototxt").write_text(text)
        run_job(folder)
    ours, theirs = (quantized_in_caffe(folder, caffe_forward, ["fc"]) for folder in folders)
    np.testing.assert_array_equal(ours[0], theirs[0])
    np.testing.assert_array_equal(ours[1], theirs[1])
