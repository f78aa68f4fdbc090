"""The ncnn target against labelfree's own engine, with ncnn itself: codes layer by layer, and refusals."""

import re
from pathlib import Path

import numpy as np
import pytest

import quantize
from quantize.caffenet import InferenceNet, format_prototxt
from quantize.commands.config import load
from quantize.data import open_source
from quantize.engines.onnx.engine import OnnxEngine
from quantize.errors import InputError
from quantize.exports.integers import IntegerNet, whole_codes
from quantize.exports.ncnn import export_ncnn
from quantize.exports.target import Exported
from quantize.job.run import Run
from tests.exports.test_ncnn_layers import run
from tests.families import FAMILIES, family
from tests.nets import parse, random_weights
from tests.stages.test_sites import quantized_net

ncnn = pytest.importorskip("ncnn")

ROOT = Path(__file__).parents[2]
IMAGE = (3, 17, 15)
NET = """
name: "all kinds"
layer { name: "in" type: "Input" top: "data" input_param { shape { dim: [1, 3, 17, 15] } } }
layer { name: "conv1" type: "Convolution" bottom: "data" top: "conv1"
  convolution_param { num_output: 16 kernel_size: 3 pad: 1 bias_term: false } }
layer { name: "bn1" type: "BatchNorm" bottom: "conv1" top: "conv1" }
layer { name: "scale1" type: "Scale" bottom: "conv1" top: "conv1" scale_param { bias_term: true } }
layer { name: "relu1" type: "ReLU" bottom: "conv1" top: "conv1" }
layer { name: "deep" type: "Convolution" bottom: "conv1" top: "deep"
  convolution_param { num_output: 16 group: 16 kernel_size: 3 pad: 1 } }
layer { name: "bn2" type: "BatchNorm" bottom: "deep" top: "deep" }
layer { name: "scale2" type: "Scale" bottom: "deep" top: "deep" scale_param { bias_term: true } }
layer { name: "relu2" type: "ReLU" bottom: "deep" top: "deep" }
layer { name: "six" type: "Clip" bottom: "deep" top: "deep" clip_param { min: 0 max: 1.5 } }
layer { name: "grouped layer" type: "Convolution" bottom: "deep" top: "groups of 8"
  convolution_param { num_output: 24 group: 2 kernel_h: 3 kernel_w: 1 pad_h: 2 dilation: [2, 1] } }
layer { name: "bn3" type: "BatchNorm" bottom: "groups of 8" top: "groups of 8" }
layer { name: "relu3" type: "ReLU" bottom: "groups of 8" top: "groups of 8" }
layer { name: "linear" type: "Convolution" bottom: "groups of 8" top: "linear"
  convolution_param { num_output: 16 kernel_size: 1 } }
layer { name: "bn4" type: "BatchNorm" bottom: "linear" top: "linear" }
layer { name: "wide" type: "Convolution" bottom: "linear" top: "wide"
  convolution_param { num_output: 16 kernel_size: 3 pad: 1 } }
layer { name: "bn5" type: "BatchNorm" bottom: "wide" top: "wide" }
layer { name: "sum" type: "Eltwise" bottom: "conv1" bottom: "wide" top: "sum" }
layer { name: "relu_sum" type: "ReLU" bottom: "sum" top: "sum" }
layer { name: "pool" type: "Pooling" bottom: "sum" top: "pool" pooling_param { kernel_size: 3 stride: 2 } }
layer { name: "odd" type: "Convolution" bottom: "pool" top: "odd"
  convolution_param { num_output: 13 kernel_size: 3 stride: 2 pad: 1 } }
layer { name: "relu_odd" type: "PReLU" bottom: "odd" top: "odd" }
layer { name: "up" type: "Deconvolution" bottom: "odd" top: "up"
  convolution_param { num_output: 4 kernel_size: 2 stride: 2 } }
layer { name: "relu_up" type: "ReLU" bottom: "up" top: "up" }
layer { name: "fc1" type: "InnerProduct" bottom: "up" top: "fc1" inner_product_param { num_output: 12 } }
layer { name: "relu_fc1" type: "ReLU" bottom: "fc1" top: "fc1" }
layer { name: "drop" type: "Dropout" bottom: "fc1" top: "fc1" }
layer { name: "fc2" type: "InnerProduct" bottom: "fc1" top: "fc2" inner_product_param { num_output: 7 } }
layer { name: "prob" type: "Softmax" bottom: "fc2" top: "prob" }
"""


def model_of(text: str, **settings: object) -> quantize.Model:
    """A quantized net of random weights."""
    net = parse(text)
    inputs = {"data": IMAGE}
    weights = random_weights(InferenceNet.of(net).net, inputs)
    model = quantize.Model(net, weights)
    images = np.random.default_rng(1).normal(size=(16, *inputs["data"]))
    return quantize.quantize(model, quantize.Images(images, model), **settings)


@pytest.fixture(scope="module")
def model() -> quantize.Model:
    layers = {"wide": {"bits": 5}, "linear": {"bits": 8, "grid": "fixed_point"}, "odd": {"grid": "uniform"}}
    return model_of(NET, weights={"layers": layers})


def parameters(exported: Exported) -> dict[str, str]:
    """The lines of NAME.param by layer."""
    lines = exported.files["net.param"].decode().splitlines()[2:]
    return {line.split()[1]: line for line in lines}


def test_codes_layer_by_layer(model: quantize.Model, tmp_path: Path) -> None:
    net = IntegerNet.of(model)
    exported = export_ncnn(net, "net")
    image = np.random.default_rng(2).normal(size=(1, *IMAGE)).astype(np.float32)
    makers = {top: layer for layer in net.net.layer for top in layer.top}
    sites = [blob for blob, layer in makers.items() if layer.type == "ActQuantize"]
    assert len(sites) >= 8
    engine = OnnxEngine(net.net, net.weights, {"data": IMAGE}, threads=1)
    wanted = engine.compile(0, len(net.net.layer), [*sites, "prob"]).run({"data": image}).blobs
    names = [f"{re.sub(' ', '_', blob)}_codes" for blob in sites]
    *codes, prob = run(exported.files, tmp_path, {"data": image[0]}, [*names, "prob"])
    signs = set()
    for blob, found in zip(sites, codes, strict=True):
        own = wanted[blob] / net.quantizers[blob].step
        away = np.abs(found.reshape(-1) - own.reshape(-1))
        assert away.max() <= 2.01  # a code that is 1 away moves others in the layers behind it
        assert np.sum(away > 0.01) <= max(1, 0.05 * away.size)
        assert own.max() > 60
        signs.add(net.quantizers[blob].lowest < 0)
    assert signs == {True, False}
    assert np.abs(prob - wanted["prob"]).max() < 0.02


def test_a_trained_net(tmp_path: Path) -> None:
    """The network for digits: every layer's codes within 1 of labelfree's, and the same classes."""
    config = load(ROOT / "configs/digits.yaml", {"output": str(tmp_path / "out")})
    Run(config).quantize()
    pair = (tmp_path / "out/digits_deploy.prototxt", tmp_path / "out/digits_renorm.caffemodel")
    net = IntegerNet.of(quantize.Model.load(*pair))
    images = digits(40)
    sites = [layer.top[0] for layer in net.net.layer if layer.type == "ActQuantize"]
    assert len(sites) >= 9
    engine = OnnxEngine(net.net, net.weights, {"data": images.shape[1:]}, threads=1)
    wanted = engine.compile(0, len(net.net.layer), [*sites, "fc"]).run({"data": images}).blobs
    files = export_ncnn(net, "net").files
    away = []
    for number, image in enumerate(images):
        *codes, fc = run(files, tmp_path, {"data": image}, [*(f"{blob}_codes" for blob in sites), "fc"])
        for blob, found in zip(sites, codes, strict=True):
            own = np.rint(wanted[blob][number] / net.quantizers[blob].step)
            away.append(np.abs(found.reshape(-1) - own.reshape(-1)))
        assert fc.argmax() == wanted["fc"][number].argmax()
    assert max(each.max() for each in away) <= 1
    assert np.mean(np.concatenate(away)) < 5e-4


def digits(count: int) -> np.ndarray:
    """Test images as the network takes them."""
    config = load(ROOT / "configs/digits.yaml")
    assert config.data.validation is not None
    source = open_source(config.data.validation.source)
    pixels = np.stack([source.read(number).pixels for number in range(count)])
    return (pixels.astype(np.float32) - 5) * np.float32(0.125)


@pytest.mark.parametrize("values", [{}, {"input": True, "sums": True}], ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_families(name: str, values: dict[str, object], tmp_path: Path) -> None:
    quantized, weights, feeds = quantized_net(family(name), **values)
    model = quantize.Model(quantized, weights)
    net = IntegerNet.of(model)
    exported = export_ncnn(net, "net")
    outputs = list(net.outputs)
    engine = OnnxEngine(model.inference.net, weights, {"data": feeds["data"].shape[1:]}, threads=1)
    wanted = engine.compile(0, len(model.inference.net.layer), outputs).run(feeds).blobs
    for number, image in enumerate(feeds["data"]):
        for blob, found in zip(outputs, run(exported.files, tmp_path, {"data": image}, outputs), strict=True):
            own = wanted[blob][number]
            assert found.shape == own.shape
            assert np.abs(found - own).max() <= 0.03 * np.abs(wanted[blob]).max()
            assert np.median(np.abs(found - own)) <= 0.005 * np.abs(wanted[blob]).max()


def test_what_runs_in_integers(model: quantize.Model) -> None:
    """Every layer that can, and convolutions between two quantizers hand on codes."""
    exported = export_ncnn(IntegerNet.of(model), "net")
    assert set(exported.floats) == {"conv1", "wide", "up"}
    assert "input data" in exported.floats["conv1"]
    assert exported.floats["wide"] == "its weights reach 16384, int8 ends at 127"
    assert exported.floats["up"] == "ncnn has no Deconvolution in integers"
    lines = parameters(exported)
    assert " 8=101 9=3 -23310=2,0.0" in lines["deep"]  # depthwise, ReLU and Clip in it, codes out
    assert " 7=2 5=0 8=1" in lines["grouped_layer"]
    assert " 8=102" in lines["linear"]
    assert " 8=2" in lines["fc1"] and " 8=2" in lines["fc2"]  # noqa: PT018
    assert " 8=" not in lines["conv1"] + lines["wide"] + lines["up"]
    smaller = sum(layer.codes.size for name, layer in IntegerNet.of(model).layers.items() if name != "wide")
    assert (
        len(exported.files["net.bin"])
        < 4 * sum(blob.size for _, blobs in IntegerNet.of(model).weights.entries() for blob in blobs)
        - 2 * smaller
    )


def test_negative_scales_and_the_lowest_code(tmp_path: Path) -> None:
    """-128 times a negative scale: turned around it would be 128, which int8 does not have."""
    model = model_of(NET, weights={"bits": 8, "grid": "fixed_point"})
    net = IntegerNet.of(model)
    codes = {name: whole_codes(layer) for name, layer in net.layers.items()}
    lowest = [layer.scale[layer.codes.min(axis=1) == -128].min(initial=0) for layer in codes.values()]
    assert min(lowest) < 0
    test_codes_layer_by_layer(model, tmp_path)


def test_kernels_that_count_for_nothing(tmp_path: Path) -> None:
    """A BatchNorm's scale of 0 leaves the bias; of Q, which is not 0, nothing."""
    net = parse(NET)
    weights = random_weights(InferenceNet.of(net).net, {"data": IMAGE})
    for name in ("scale1", "scale2"):
        scale, shift = (blob.copy() for blob in weights[name])
        scale[[1, 4]] = 0, 1e-42
        weights.replace(name, [scale, shift])
    given = quantize.Model(net, weights)
    images = np.random.default_rng(1).normal(size=(16, *IMAGE))
    model = quantize.quantize(given, quantize.Images(images, given))
    assert whole_codes(IntegerNet.of(model).layers["deep"]).codes[1].any()
    test_codes_layer_by_layer(model, tmp_path)


def test_a_name_that_is_added_is_taken() -> None:
    text = NET.replace('"wide"', '"conv1_codes"')
    with pytest.raises(InputError, match="blob 'conv1_codes': labelfree needs this name; rename the blob"):
        export_ncnn(IntegerNet.of(model_of(text)), "net")


def test_the_table(model: quantize.Model) -> None:
    """What ncnn2int8 does with the plain net's weights gives our codes."""
    net = IntegerNet.of(model)
    lines = export_ncnn(net, "net").files["net.table"].decode().splitlines()
    table = {name: np.array(values, float) for name, *values in map(str.split, lines)}
    assert "grouped_layer" not in table  # ncnn2int8 has one scale for each group there
    for name in ("deep", "linear", "odd", "fc1", "fc2"):
        layer = whole_codes(net.layers[name])
        weights = net.weights[name][0].reshape(len(layer.codes), -1)
        found = np.rint(weights * table[f"{name}_param_0"][:, None])
        np.testing.assert_array_equal(np.abs(found), np.abs(layer.codes))
        [bottom] = next(each.bottom for each in net.net.layer if each.name == name)
        assert table[name] == pytest.approx([1 / net.quantizers[bottom].step])


def test_codes_of_a_full_byte_are_refused() -> None:
    model = model_of(NET, activations={"levels": 255})
    with pytest.raises(InputError, match=r"'relu1': codes 0 to 255; those of ncnn are -127 to 127: quantize"):
        export_ncnn(IntegerNet.of(model), "net")


def test_few_codes_keep_their_limit(tmp_path: Path) -> None:
    net = IntegerNet.of(model_of(NET, activations={"levels": 15}))
    image = 30 * np.random.default_rng(2).normal(size=IMAGE).astype(np.float32)
    sites = [layer.top[0] for layer in net.net.layer if layer.type == "ActQuantize"]
    reached = set()
    blobs = [f"{re.sub(' ', '_', blob)}_codes" for blob in sites]
    for blob, codes in zip(
        sites, run(export_ncnn(net, "net").files, tmp_path, {"data": image}, blobs), strict=True
    ):
        assert net.quantizers[blob].lowest <= codes.min() < codes.max() <= 15
        reached.add(codes.max())
    assert 15 in reached


def test_a_layer_that_ncnn_lacks_is_named() -> None:
    text = NET.replace('type: "PReLU"', 'type: "MVN"')
    with pytest.raises(InputError, match=r"layer 'relu_odd' \(MVN\): ncnn cannot do it: .*; export to onnx"):
        export_ncnn(IntegerNet.of(model_of(text)), "net")


def test_a_layer_without_bottoms_is_named() -> None:
    text = (
        NET + 'layer { name: "one" type: "DummyData" top: "one" dummy_data_param { shape { dim: [1, 7] } } }'
    )
    text += 'layer { name: "more" type: "Eltwise" bottom: "prob" bottom: "one" top: "more" }'
    with pytest.raises(
        InputError, match=r"layer 'one' \(DummyData\): ncnn cannot do it: not one of the types"
    ):
        export_ncnn(IntegerNet.of(model_of(text)), "net")


def test_outputs_keep_their_names(tmp_path: Path) -> None:
    text = NET.replace('layer { name: "prob" type: "Softmax" bottom: "fc2" top: "prob" }', "")
    text += 'layer { name: "last" type: "Dropout" bottom: "fc2" top: "end" }'
    text += 'layer { name: "side" type: "Split" bottom: "sum" top: "seen" }'
    net = IntegerNet.of(model_of(text))
    assert set(net.outputs) == {"end", "seen"}
    image = np.random.default_rng(2).normal(size=(1, *IMAGE)).astype(np.float32)
    engine = OnnxEngine(net.net, net.weights, {"data": IMAGE}, threads=1)
    wanted = engine.compile(0, len(net.net.layer), ["end", "seen"]).run({"data": image}).blobs
    end, seen = run(export_ncnn(net, "net").files, tmp_path, {"data": image[0]}, ["end", "seen"])
    assert np.abs(end - wanted["end"][0]).max() < 0.05 * np.abs(wanted["end"]).max()
    assert np.abs(seen - wanted["seen"][0]).max() <= 1.01 * net.quantizers["sum"].step


def test_names_are_words_and_differ() -> None:
    text = format_prototxt(parse(NET)).replace("groups of 8", "wide\\tone").replace('"linear"', '"wide_one"')
    lines = export_ncnn(IntegerNet.of(model_of(text)), "net").files["net.param"].decode().splitlines()
    layers, blobs = map(int, lines[1].split())
    assert layers == len(lines) - 2
    tops = [name for line in lines[2:] for name in tops_of(line)]
    assert len(tops) == len(set(tops)) == blobs


def test_numbers_are_short_and_exact() -> None:
    """Older versions of ncnn read no more than 15 characters of an element of an array."""
    lines = export_ncnn(IntegerNet.of(model_of(NET, activations={"levels": 15})), "net").files["net.param"]
    arrays = re.findall(r"-233\d\d=2,(\S+)", lines.decode())
    assert arrays
    for number in (number for array in arrays for number in array.split(",")):
        assert len(number) <= 15
        assert len(f"{np.float32(number):.8e}") == len(number)


def tops_of(line: str) -> list[str]:
    _, _, bottoms, tops, *names = line.split()
    return names[int(bottoms) : int(bottoms) + int(tops)]
