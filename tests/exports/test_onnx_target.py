"""ONNX files in onnxruntime and OpenVINO: what they compute, and that they do it in integers.

Scores cannot be those of labelfree's engine bit for bit: codes are rounded to even there and up here, and
sums of floats have another order. So closeness is held to what the reference nets are seen to reach.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, numpy_helper

import quantize
from quantize.arrays import FloatArray, Shape
from quantize.caffenet.model import Model
from quantize.engines.exported import Pixels, open_exported
from quantize.errors import InputError, LabelfreeError
from quantize.exports.integers import IntegerNet
from quantize.exports.onnx import OnnxOptions, export_onnx
from quantize.record import Kernels
from tests.exports.quantized import IMAGE, RUNTIMES, images_for, model_of, quantized, scores_of, sqnr
from tests.families import FAMILIES, act, add, conv, dense, family, layer, pool
from tests.nets import SEVERAL, parse

CLOSE = 38
"""Decibels of scores that differ by a few codes of the last place."""
EXACT = 100
WITH_WEIGHTS = ("Convolution", "InnerProduct", "Deconvolution")
Runtime = Literal["ort", "openvino"]


def written(net: IntegerNet, folder: Path, *options: Any, **more: Any) -> tuple[Path, dict[str, str]]:
    exported = export_onnx(net, "net", OnnxOptions(*options, **more))
    [path] = exported.write(folder)
    return path, dict(exported.floats)


def run(
    path: Path, runtime: Runtime, feeds: dict[str, FloatArray], *blobs: str
) -> tuple[list[FloatArray], Kernels]:
    file = open_exported(RUNTIMES[runtime], path, blobs, 1)
    return [file.run(feeds).blobs[blob] for blob in blobs], file.kernels()


def checked(
    model: Model, folder: Path, runtime: Runtime = "ort", least: float = CLOSE, **options: Any
) -> dict[str, str]:
    """Export a quantized model and hold its outputs to the engine's and its kernels to what is said."""
    net, feeds = IntegerNet.of(model), images_for(model)
    path, floats = written(net, folder, runtime, **options)
    found, kernels = run(path, runtime, feeds, *net.outputs)
    for blob, values in zip(net.outputs, found, strict=True):
        assert sqnr(scores_of(model, feeds, blob), values) > least, blob
    layers = sum(each.type in WITH_WEIGHTS for each in net.net.layer)
    assert kernels.integer == layers - len(floats), floats
    return floats


def operators(path: Path) -> list[str]:
    """What onnxruntime runs."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(path.with_suffix(".optimized"))
    options.log_severity_level = 4
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return [node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node]


def constants(path: Path) -> dict[str, np.ndarray]:
    graph = onnx.load(path).graph
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}


@pytest.mark.parametrize("levels", [255, 127, 15])
@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_runs_in_integers_but_for_what_is_said(
    name: str, runtime: Runtime, levels: int, tmp_path: Path
) -> None:
    floats = checked(
        quantized(model_of(family(name)), levels), tmp_path, runtime, least=24 if levels < 100 else CLOSE
    )
    assert len(floats) == 1 or runtime == "ort" or name == "yolo"
    first = next(iter(floats))
    assert floats[first] == "reads the input data, which is not on codes (activations.input)"


def test_residual_sums_and_their_branches_are_integers_in_onnxruntime(tmp_path: Path) -> None:
    """The guard against the pitfalls: axes of scalars, float outputs, ReLUs and ranges between the parts."""
    net = IntegerNet.of(quantized(model_of(family("resnet"))))
    path, _ = written(net, tmp_path)
    kinds = operators(path)
    assert kinds.count("QLinearConv") == 5
    assert kinds.count("QLinearAdd") >= 1
    assert kinds.count("MatMulIntegerToFloat") == 1
    assert kinds.count("Conv") == 1
    model = onnx.load(path)
    scalars = {
        name for node in model.graph.node if node.op_type == "QuantizeLinear" for name in node.input[1:]
    }
    assert all(constants(path)[name].shape == () for name in scalars)
    convolutions = [node for node in model.graph.node if node.op_type == "Conv"]
    assert all(constants(path)[node.input[2]].dtype == np.float32 for node in convolutions)


def test_127_levels_are_cut_from_the_codes_for_onnxruntime_only(tmp_path: Path) -> None:
    net = IntegerNet.of(quantized(model_of(family("resnet")), levels=127))
    path, floats = written(net, tmp_path)
    clips = [node for node in onnx.load(path).graph.node if node.op_type == "Clip"]
    assert {constants(path)[node.input[2]].item() for node in clips} == {127}
    assert all(constants(path)[node.input[1]].dtype == np.uint8 for node in clips)
    assert operators(path).count("QLinearConv") == 5
    assert list(floats) == ["stem"]
    path, _ = written(net, tmp_path / "openvino", "openvino")
    clips = [node for node in onnx.load(path).graph.node if node.op_type == "Clip"]
    assert all(constants(path)[node.input[1]].dtype == np.float32 for node in clips)


def test_without_sums_it_is_said_what_stays_in_float_and_what_helps(tmp_path: Path) -> None:
    floats = checked(quantized(model_of(family("resnet")), sums=False), tmp_path)
    assert floats.keys() == {"stem", "left", "right_b", "c3"}
    assert "activations.sums: true" in floats["c3"]
    assert "--runtime openvino" in floats["c3"]
    assert checked(quantized(model_of(family("resnet")), sums=False), tmp_path, "openvino").keys() == {"stem"}


@pytest.mark.parametrize(
    ("grid", "bits"),
    [
        *(("power_of_two", bits) for bits in (3, 4, 5)),
        *((grid, bits) for grid in ("uniform", "fixed_point") for bits in (2, 3, 4, 5, 8)),
    ],
)
def test_grids(grid: str, bits: int, tmp_path: Path) -> None:
    """All whose levels are bytes run in integers; packed and a byte each they give the same, bit for bit."""
    text = conv("c1", "data", 8) + act("c1") + conv("c2", "c1", 8) + act("c2") + dense("fc", "c2", 5)
    chosen = {"bits": bits, "grid": grid}
    model = quantized(model_of(text), bits=bits, grid=grid, first_last=chosen)
    floats = checked(model, tmp_path)
    net, feeds = IntegerNet.of(model), images_for(model)
    if grid == "power_of_two" and bits == 5:
        assert floats["c2"] == "5-bit power_of_two weights are no bytes (weights.bits)"
    else:
        assert list(floats) == ["c1"]
    packed, _ = written(net, tmp_path / "packed")
    whole, _ = written(net, tmp_path / "int8", weights="int8")
    (first,), (second,) = (run(path, "ort", feeds, "fc")[0] for path in (packed, whole))
    assert np.array_equal(first, second)
    kinds = {tensor.data_type for tensor in onnx.load(packed).graph.initializer}
    assert (bits <= 4) == bool(kinds & {TensorProto.INT4, TensorProto.UINT4})
    assert TensorProto.INT32 not in kinds
    kinds = {tensor.data_type for tensor in onnx.load(whole).graph.initializer}
    assert not kinds & {TensorProto.INT4, TensorProto.UINT4}
    assert (TensorProto.INT32 in kinds) == ("c2" not in floats)


CONVOLUTIONS = {
    "depthwise": "num_output: 8 kernel_size: 3 pad: 1 group: 8",
    "groups": "num_output: 12 kernel_size: 3 group: 4 stride: 2",
    "dilated": "num_output: 6 kernel_size: 3 pad: 2 dilation: 2",
    "uneven": "num_output: 6 kernel_h: 1 kernel_w: 5 pad_h: 0 pad_w: 2 stride_h: 2 stride_w: 1",
    "without a bias": "num_output: 6 kernel_size: 3 bias_term: false",
}


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("fields", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_convolutions_of_every_kind(fields: str, runtime: Runtime, tmp_path: Path) -> None:
    text = conv("c1", "data", 8) + act("c1")
    text += layer("c2", "Convolution", "c1", "c2", f"convolution_param {{ {fields} }}")
    text += layer("bn", "BatchNorm", "c2", "c2") + act("c2") + dense("fc", "c2", 5)
    assert list(checked(quantized(model_of(text)), tmp_path, runtime)) == ["c1"]


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("fields", ["", "transpose: true", "axis: 2", "bias_term: false"])
def test_inner_products_of_every_kind(fields: str, runtime: Runtime, tmp_path: Path) -> None:
    text = conv("c1", "data", 8) + act("c1")
    text += layer("fc1", "InnerProduct", "c1", "fc1", f"inner_product_param {{ num_output: 9 {fields} }}")
    text += act("fc1") + dense("fc2", "fc1", 5)
    assert list(checked(quantized(model_of(text)), tmp_path, runtime)) == ["c1"]


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_subsampling_behind_a_sum(runtime: Runtime, tmp_path: Path) -> None:
    """As in ResNet-50: OpenVINO would move the strides in front of the sum, and lose the integers."""
    text = conv("a", "data", 8) + act("a") + conv("b", "a", 8) + add("s1", "a b") + act("s1")
    for name in ("c", "d"):
        text += conv(name, "s1", 8, 1, "stride: 2")
    text += act("c") + conv("e", "c", 8) + add("s2", "d e") + act("s2") + dense("fc", "s2", 5)
    assert list(checked(quantized(model_of(text), sums=runtime == "ort"), tmp_path, runtime)) == ["a"]


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_deconvolution(runtime: Runtime, tmp_path: Path) -> None:
    text = conv("c1", "data", 8) + act("c1")
    fields = "convolution_param { num_output: 6 kernel_size: 2 stride: 2 }"
    text += layer("up", "Deconvolution", "c1", "up", fields) + act("up") + dense("fc", "up", 5)
    floats = checked(quantized(model_of(text)), tmp_path, runtime)
    assert list(floats) == (["c1", "up"] if runtime == "ort" else ["c1"])


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_concat_of_unequal_steps(runtime: Runtime, tmp_path: Path) -> None:
    """With scope relu its parts are on codes of their own, so what reads it is not and stays in float."""
    text = conv("a", "data", 4) + act("a") + conv("b", "a", 4) + act("b") + conv("c", "a", 4) + act("c")
    text += layer("both", "Concat", "b c") + conv("d", "both", 6) + act("d") + dense("fc", "d", 5)
    model = model_of(text)
    images = quantize.Images(images_for(model), model)
    small = quantize.quantize(model, images, activations={"scope": "relu", "levels": 255})
    floats = checked(small, tmp_path, runtime)
    assert floats.keys() == {"a", "d"}
    assert "reads both, which is not on codes (activations.scope: inputs)" in floats["d"]
    assert list(checked(quantized(model), tmp_path, runtime)) == ["a"]


def test_codes_of_a_concat_are_made_in_front_of_it(tmp_path: Path) -> None:
    """So that the convolutions there run in integers; what comes out is the same."""
    text = conv("a", "data", 8) + act("a") + conv("b", "a", 4) + act("b") + conv("c", "a", 4)
    text += layer("both", "Concat", "b c") + conv("d", "both", 6) + act("d") + dense("fc", "d", 5)
    model = quantized(model_of(text))
    assert list(checked(model, tmp_path)) == ["a"]
    path, _ = written(IntegerNet.of(model), tmp_path)
    assert operators(path).count("QLinearConv") == 3


@pytest.mark.parametrize("least", [0.0, -0.5])
def test_relu6_becomes_a_range_of_codes(least: float, tmp_path: Path) -> None:
    """ReLU and Clip of floats are gone, wherever the range of codes ends."""
    for most in (0.3, 2, 100):
        clip = layer("clip", "Clip", "b", "b", f"clip_param {{ min: {least} max: {most} }}")
        relu = act("b") if least == 0 else ""
        text = conv("a", "data", 8) + act("a") + conv("b", "a", 4) + relu + clip + dense("fc", "b", 5)
        model = quantized(model_of(text))
        assert list(checked(model, tmp_path)) == ["a"]
        path, _ = written(IntegerNet.of(model), tmp_path)
        kinds = operators(path)
        assert kinds.count("QLinearConv") == 1
        bounds = [node.input[2] for node in onnx.load(path).graph.node if node.op_type == "Clip"]
        assert all(constants(path)[name].dtype == np.uint8 for name in bounds)


def test_several_outputs_and_a_softmax(tmp_path: Path) -> None:
    text = conv("a", "data", 8) + act("a") + dense("left", "a", 4) + dense("right", "a", 3)
    text += layer("prob", "Softmax", "right")
    for runtime in RUNTIMES:
        assert list(checked(quantized(model_of(text)), tmp_path, runtime)) == ["a"]  # type: ignore[arg-type]
    net = IntegerNet.of(quantized(model_of(text)))
    path, _ = written(net, tmp_path)
    graph = onnx.load(path).graph
    assert [value.name for value in graph.output] == ["left", "prob"]
    assert [value.name for value in graph.input] == ["data"]
    shown = [
        [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in graph.output
    ]
    assert shown == [["N", 4], ["N", 3]]
    model = quantized(model_of(text))
    [scores], _ = run(path, "ort", images_for(model), "right")
    assert sqnr(scores_of(model, images_for(model), "right"), scores) > CLOSE


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_net_that_is_partly_in_float(runtime: Runtime, tmp_path: Path) -> None:
    """Also between codes, where onnxruntime would quantize the weights on its own account."""
    skipped = {"layers": {"right_a": {"skip": True}, "fc": {"skip": True}}}
    floats = checked(quantized(model_of(family("resnet")), **skipped), tmp_path, runtime)
    assert floats.keys() == {"stem", "right_a", "fc"}
    assert floats["fc"] == "weights in full precision (weights.layers)"


def test_several_inputs(tmp_path: Path) -> None:
    model = quantized(model_of(parse(SEVERAL)))
    assert checked(model, tmp_path).keys() == {"conv_t", "conv_i", "fc_info"}


def test_names_of_any_characters(tmp_path: Path) -> None:
    text = conv("a b/ä", "data", 8) + act("a b/ä") + dense("t1", "a b/ä", 5)
    text = text.replace('bottom: "a" bottom: "b/ä"', 'bottom: "a b/ä"').replace(
        'top: "a" top: "b/ä"', 'top: "a b/ä"'
    )
    assert list(checked(quantized(model_of(text)), tmp_path)) == ["a b/ä"]


def edited(model: Model, name: str, change: Callable[[list[FloatArray]], list[FloatArray]]) -> Model:
    weights = model.weights.copy()
    weights.replace(name, change(weights[name]))
    return Model(model.net, weights, model.prototxt, model.grids)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_dead_kernels(runtime: Runtime, tmp_path: Path) -> None:
    """A scale of (nearly) nothing leaves the bias, however large it is beside it."""
    text = conv("a", "data", 8) + act("a") + conv("b", "a", 6) + act("b") + dense("fc", "b", 5)
    model = quantized(model_of(text))
    for nothing in (0.0, 1e-30, 1e-12, -1e-12):
        gamma = np.array([nothing, 1, 1, nothing, 1, -1], np.float32)
        dead = edited(model, "b/scale", lambda old, gamma=gamma: [old[0] * gamma, np.abs(old[1]) + 0.5])
        assert list(checked(dead, tmp_path, runtime)) == ["a"]


def test_a_bias_that_accumulators_cannot_hold_keeps_the_layer_in_float(tmp_path: Path) -> None:
    text = conv("a", "data", 8) + act("a") + conv("b", "a", 6) + act("b") + dense("fc", "b", 5)
    model = quantized(model_of(text))
    k = IntegerNet.of(model).layers["b"].codes.shape[1]
    assert k == 72
    step = IntegerNet.of(model).quantizers["a"].step
    scale = np.abs(IntegerNet.of(model).layers["b"].scale).max()
    large = edited(model, "b/scale", lambda old: [old[0], old[1] + np.float32(step * scale * 2.0**31)])
    net = IntegerNet.of(large)
    path, floats = written(net, tmp_path)
    assert floats.keys() == {"a"} or "a bias is too large" in floats["b"]
    [scores], _ = run(path, "ort", images_for(large), "fc")
    assert sqnr(scores_of(large, images_for(large), "fc"), scores) > CLOSE


def test_the_file_means_what_it_does_when_optimized(tmp_path: Path) -> None:
    """Computed as the standard says, operator by operator, it gives what the fused kernels give."""
    model = quantized(model_of(family("resnet")), levels=127)
    path, _ = written(IntegerNet.of(model), tmp_path)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    [plain] = session.run(["fc"], images_for(model))
    assert sqnr(scores_of(model, images_for(model), "fc"), plain) > CLOSE
    [fused], _ = run(path, "ort", images_for(model), "fc")
    assert sqnr(plain, fused) > CLOSE


def test_a_net_of_shared_weights_has_them_once(tmp_path: Path) -> None:
    shared = (
        'param {{ name: "w" }} param {{ name: "b" }} convolution_param {{ num_output: {} kernel_size: 3 }}'
    )

    def sized(name: str) -> int:
        text = conv("a", "data", 16) + act("a")
        text += layer("b", "Convolution", "a", "b", shared.format(32)) + act("b")
        text += layer(
            "c",
            "Convolution",
            "a",
            "c",
            shared.format(32).replace('"w"', f'"{name}"').replace('"b"', f'"{name}2"'),
        )
        text += act("c") + layer("both", "Concat", "b c") + dense("fc", "both", 5)
        path, floats = written(IntegerNet.of(quantized(model_of(text))), tmp_path / name)
        assert list(floats) == ["a"]
        return path.stat().st_size

    saved = sized("other") - sized("w")
    assert saved > 0.9 * (32 * 16 * 9 / 2)


# ---- Pixels ----

MEAN = np.array([104.3, 117.6, 123.1])
SCALE = 0.02


def pixels_and_values(shape: Shape = IMAGE, count: int = 24) -> tuple[np.ndarray, FloatArray]:
    pixels = np.random.default_rng(3).integers(0, 256, (count, *shape)).astype(np.uint8)
    return pixels, ((pixels - MEAN.reshape(-1, 1, 1)) * SCALE).astype(np.float32)


FIRST = {
    "padded": conv("a", "data", 8),
    "not padded": layer(
        "a", "Convolution", "data", "a", "convolution_param { num_output: 8 kernel_size: 3 }"
    ),
    "groups": conv("a", "data", 6, fields="group: 3"),
    "without a bias": layer(
        "a", "Convolution", "data", "a", "convolution_param { num_output: 8 kernel_size: 3 bias_term: false }"
    ),
    "inner product": dense("a", "data", 9),
}


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("first", FIRST.values(), ids=FIRST)
def test_pixels_go_into_the_first_layer(first: str, runtime: Runtime, tmp_path: Path) -> None:
    model = model_of(first + act("a") + dense("fc", "a", 5))
    _, values = pixels_and_values()
    small = quantize.quantize(model, quantize.Images(values, model), activations={"levels": 255})
    path, floats = written(IntegerNet.of(small), tmp_path, runtime, pixels=Pixels(MEAN, SCALE))
    assert floats == {}
    [scores], kernels = run(path, runtime, {"data": values}, "fc")
    assert kernels == Kernels(2, 0)
    # Around the image the mean is rounded to a pixel.
    assert sqnr(scores_of(small, {"data": values}, "fc"), scores) > (28 if "pad: 1" in first else CLOSE)


def test_pixels_are_bytes_and_the_file_says_what_becomes_of_them(tmp_path: Path) -> None:
    model = model_of(FIRST["not padded"] + act("a") + dense("fc", "a", 5))
    pixels, values = pixels_and_values()
    small = quantize.quantize(model, quantize.Images(values, model), activations={"levels": 255})
    path, _ = written(IntegerNet.of(small), tmp_path, pixels=Pixels(MEAN, SCALE))
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    [put] = session.get_inputs()
    assert (put.name, put.type, put.shape) == ("data", "tensor(uint8)", ["N", *IMAGE])
    [scores] = session.run(None, {"data": pixels})
    assert sqnr(scores_of(small, {"data": values}, "fc"), scores) > CLOSE
    file = open_exported("onnx", path, ["fc"], 1)
    assert np.array_equal(file.taken({"data": values})["data"], pixels)
    assert np.array_equal(file.run({"data": values}).blobs["fc"], scores)


def test_pixels_that_others_read_too_are_made_values(tmp_path: Path) -> None:
    text = conv("a", "data", 3) + act("a") + add("sum", "a data") + act("sum") + dense("fc", "sum", 5)
    model = model_of(text)
    _, values = pixels_and_values()
    small = quantize.quantize(model, quantize.Images(values, model), activations={"levels": 255})
    path, floats = written(IntegerNet.of(small), tmp_path, "openvino", pixels=Pixels(MEAN, SCALE))
    assert floats == {}
    [scores], _ = run(path, "openvino", {"data": values}, "fc")
    assert sqnr(scores_of(small, {"data": values}, "fc"), scores) > 28


def test_an_input_that_takes_no_pixels_is_refused(tmp_path: Path) -> None:
    net = IntegerNet.of(quantized(model_of(conv("a", "data", 8) + act("a") + dense("fc", "a", 5))))
    with pytest.raises(InputError, match="there are 1 means of channels"):
        written(net, tmp_path / "none", pixels=Pixels(MEAN[:1], SCALE))
    assert not (tmp_path / "none").exists()


# ---- Bad files ----


@pytest.mark.parametrize("runtime", RUNTIMES.values())
def test_files_that_are_none(runtime: str, tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    with pytest.raises(InputError, match=r"net\.onnx: cannot read the ONNX file"):
        open_exported(runtime, path, [], 1)
    path.write_bytes(b"\xff" * 100)
    with pytest.raises(InputError, match="not an ONNX file, or damaged"):
        open_exported(runtime, path, [], 1)
    path.write_bytes(b"")
    with pytest.raises(InputError, match="no blob 'fc' in it"):
        open_exported(runtime, path, ["fc"], 1)
    net = IntegerNet.of(quantized(model_of(family("resnet"))))
    content = export_onnx(net, "net", OnnxOptions()).files["net.onnx"]
    model = onnx.ModelProto.FromString(content)
    next(node for node in model.graph.node if node.op_type == "Conv").op_type = "Unknown"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(InputError, match="cannot open it"):
        open_exported(runtime, path, ["fc"], 1)


def test_a_runtime_that_fails_is_no_traceback(tmp_path: Path) -> None:
    path, _ = written(IntegerNet.of(quantized(model_of(family("resnet")))), tmp_path)
    for runtime in RUNTIMES.values():
        file = open_exported(runtime, path, ["fc"], 1)
        with pytest.raises(LabelfreeError):
            file.run({"data": np.zeros((2, 5, 17, 17), np.float32)})


@pytest.mark.parametrize("runtime", RUNTIMES.values())
def test_averages_of_codes_of_both_signs_are_exact_in_openvino_too(runtime: str, tmp_path: Path) -> None:
    """On bytes it would round every average, and pad with byte 0, which is no 0 there."""
    text = (
        conv("a", "data", 8)
        + act("a")
        + conv("b", "a", 8)
        + pool("p", "b", "AVE", "kernel_size: 3 stride: 2 pad: 1")
    )
    model = quantized(model_of(text + dense("fc", "p", 5)))
    net, feeds = IntegerNet.of(model), images_for(model)
    assert any(each.lowest < 0 for each in net.quantizers.values())
    for written_for in RUNTIMES:
        path, _ = written(net, tmp_path / written_for, written_for)
        found = open_exported(runtime, path, ["fc"], 1).run(feeds).blobs["fc"]
        assert sqnr(scores_of(model, feeds, "fc"), found) > CLOSE


@pytest.mark.parametrize("kind", ["MAX", "AVE"])
def test_pooling_between_convolutions(kind: str, tmp_path: Path) -> None:
    text = conv("a", "data", 8) + act("a") + conv("b", "a", 8) + act("b") + pool("p", "b", kind)
    text += conv("c", "p", 6) + act("c") + dense("fc", "c", 5)
    for runtime in RUNTIMES:
        assert list(checked(quantized(model_of(text)), tmp_path, runtime)) == ["a"]  # type: ignore[arg-type]
