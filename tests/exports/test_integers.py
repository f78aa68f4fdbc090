"""The neutral form computes what the given net does."""

import json

import numpy as np
import pytest

import quantize
from quantize.caffenet import InferenceNet
from quantize.caffenet.model import Model
from quantize.errors import InputError
from quantize.exports.integers import IntegerNet
from quantize.exports.scales import scales_json
from quantize.measure.outputs import net_outputs
from tests.exports.quantized import images_for, input_text, model_of, quantized, scores_of, sqnr
from tests.families import FAMILIES, conv, family, layer
from tests.nets import RESIDUAL, parse, random_weights

EXACT = 100
"""Decibels between results that differ by the rounding of float32."""
SLICED = (
    conv("conv1", "data", 8)
    + layer("relu1", "ReLU", "conv1", "conv1")
    + layer(
        "conv2", "Convolution", "conv1", "conv2", "convolution_param { num_output: 16 kernel_size: 3 pad: 1 }"
    )
)


def with_shortcut(source: str) -> str:
    """Layers that pad 8 channels of a blob with zeros and add them to 16 of another."""
    text = layer("halves", "Slice", source, "low high", "slice_param { axis: 1 }")
    for half in ("low", "high"):
        text += layer(f"zero_{half}", "Power", half, f"zero_{half}", "power_param { scale: 0 }")
    text += layer("padded", "Concat", f"zero_low {source} zero_high", "padded")
    return text + layer("sum", "Eltwise", "conv2 padded") + layer("relu", "ReLU", "sum", "sum")


def same(model: Model, net: IntegerNet) -> float:
    """The least closeness of the outputs of a model and of its neutral form."""
    feeds = images_for(model)
    found = []
    for output, blob in zip(net_outputs(model.net), map(net.blob_of, net_outputs(model.net)), strict=True):
        given = output.blob if output.before is None else None
        if given is not None:
            found.append(sqnr(scores_of(model, feeds, given), scores_of(net, feeds, blob)))
    return min(found)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_computes_what_it_did(name: str) -> None:
    model = quantize.quantize_weights(model_of(family(name)))
    net = IntegerNet.of(model)
    assert same(model, net) > EXACT
    assert not any(each.name.endswith("_alpha_term") for each in net.net.layer)
    if name not in ("densenet", "se", "yolo", "mtcnn"):
        assert not any(each.type in ("BatchNorm", "Scale") for each in net.net.layer)
        assert any((each.scale < 0).any() for each in net.layers.values())


def test_codes_are_kept_and_scales_are_folded_in_float64() -> None:
    model = quantize.quantize_weights(model_of(family("resnet")))
    net, given = IntegerNet.of(model), {each.name: each for each in model.layers}
    mean, variance, factor = model.weights["c2/bn"]
    gamma, beta = model.weights["c2/scale"]
    alpha, shift = model.weights["c2_alpha_term"]
    bias = model.weights["c2"][1]
    deviation = np.sqrt(variance.astype(np.float64) / factor[0] + 1e-5)
    found = net.layers["c2"]
    assert np.array_equal(found.codes, given["c2"].codes)
    assert (found.bits, found.grid) == (4, "power_of_two")
    np.testing.assert_allclose(found.scale, alpha.astype(np.float64) * gamma / deviation, rtol=1e-12)
    before = bias.astype(np.float64) * alpha + shift
    np.testing.assert_allclose(found.bias, (before - mean / factor[0]) * gamma / deviation + beta, rtol=1e-9)


@pytest.mark.parametrize("source", ["conv1", "subsampled", "pooled"])
def test_zero_padded_shortcuts_become_a_convolution(source: str) -> None:
    """Alone behind a convolution its channels go into that; otherwise it is one with weights 0 and 1."""
    text = SLICED
    if source == "subsampled":
        text += layer(
            "subsampled",
            "Convolution",
            "conv1",
            "subsampled",
            "convolution_param { num_output: 8 group: 8 kernel_size: 1 bias_term: false }",
        )
    elif source == "pooled":
        fields = "pooling_param { pool: AVE kernel_size: 3 stride: 1 pad: 1 }"
        text += layer("pooled", "Pooling", "conv1", "pooled", fields)
    model = quantize.quantize_weights(model_of(text + with_shortcut(source)))
    net = IntegerNet.of(model)
    assert same(model, net) > EXACT
    assert not any(each.type in ("Slice", "Power", "Concat") for each in net.net.layer)
    names = [each.name for each in net.net.layer]
    assert ("subsampled" in names) is False
    padded = net.layers["padded"]
    assert padded.codes.shape == (16, 8)
    assert not padded.codes[:4].any()
    assert not padded.codes[12:].any()
    if source != "subsampled":
        assert np.array_equal(padded.codes[4:12], np.eye(8))


def test_a_concat_of_other_things_stays() -> None:
    model = quantize.quantize_weights(model_of(family("inception")))
    kinds = [each.type for each in IntegerNet.of(model).net.layer]
    assert kinds.count("Concat") == 2


def test_several_tops_and_shared_weights_become_layers_of_their_own() -> None:
    shared = 'param { name: "w" } param { name: "b" } convolution_param { num_output: 4 kernel_size: 3 }'
    text = conv("stem", "data", 3) + layer("two", "Convolution", "data stem", "left right", shared)
    text += layer("three", "Convolution", "stem", "third", shared)
    text += layer("join", "Concat", "left right third") + layer("fc", "InnerProduct", "join", "fc",
        "inner_product_param { num_output: 5 }")  # fmt: skip
    model = quantize.quantize_weights(model_of(text))
    net = IntegerNet.of(model)
    assert same(model, net) > EXACT
    assert all(len(each.top) == 1 for each in net.net.layer)
    assert not any(each.param for each in net.net.layer)
    assert np.array_equal(net.layers["two"].codes, net.layers["three"].codes)


@pytest.mark.parametrize(
    "fields", ["axis: 2", "transpose: true", "bias_term: false", "axis: -1 transpose: true"]
)
def test_inner_products_of_every_kind(fields: str) -> None:
    text = layer("fc1", "InnerProduct", "data", "fc1", f"inner_product_param {{ num_output: 6 {fields} }}")
    text += layer("fc2", "InnerProduct", "fc1", "fc2", "inner_product_param { num_output: 5 }")
    model = quantize.quantize_weights(model_of(text))
    assert same(model, IntegerNet.of(model)) > EXACT


def test_blobs_keep_the_names_that_they_end_with() -> None:
    net = IntegerNet.of(quantized(model_of(family("resnet"))))
    assert list(net.inputs) == ["data"]
    assert net.outputs == ("fc",)
    assert {"stem", "sum1", "c2", "gap"} <= net.shapes.blobs.keys()
    makers = {top: each.name for each in net.net.layer for top in each.top}
    assert makers["sum1"] == "sum1/relu"


def test_what_stays_in_float_is_said() -> None:
    model = model_of(family("resnet"))
    images = quantize.Images(images_for(model), model)
    weights_only = quantize.quantize_weights(model)
    assert set(IntegerNet.of(weights_only).floats.values()) == {
        "activations are not quantized (labelfree activations-quan)",
        "reads the input data, which is not on codes (activations.input)",
    }
    small = quantize.quantize(model, images, weights={"layers": {"c2": {"skip": True}}})
    assert IntegerNet.of(small).floats == {
        "stem": "reads the input data, which is not on codes (activations.input)",
        "c2": "weights in full precision (weights.layers)",
    }
    with_input = quantize.quantize(model, images, activations={"input": True})
    assert IntegerNet.of(with_input).floats == {}
    relus = quantize.quantize(model, images, activations={"scope": "relu"})
    assert IntegerNet.of(relus).floats.keys() == {"stem", "fc"}
    assert "reads gap, which is not on codes" in IntegerNet.of(relus).floats["fc"]


def test_a_net_that_is_not_quantized_is_refused() -> None:
    with pytest.raises(InputError, match="no layer has quantized weights"):
        IntegerNet.of(model_of(family("resnet")))


def test_a_layer_of_an_unknown_type_is_refused_by_name() -> None:
    known = conv("a", "data", 4) + layer("relu", "ReLU", "a", "a")
    odd, plain = (
        known + between + layer("fc", "InnerProduct", read, "fc", "inner_product_param { num_output: 5 }")
        for between, read in ((layer("odd", "FooBar", "a"), "odd"), ("", "a"))
    )
    net = parse('name: "net"\n' + input_text() + odd)
    model = quantize.quantize_weights(Model(net, model_of(plain).weights))
    with pytest.raises(InputError, match=r"layer 'odd' \(FooBar\): labelfree does not know what this type"):
        IntegerNet.of(model)


def test_a_shape_that_nobody_says_is_asked_for() -> None:
    net = parse(RESIDUAL)
    shapes = {"data": (3, 9, 9)}
    model = quantize.quantize_weights(Model(net, random_weights(InferenceNet.of(net).net, shapes)))
    with pytest.raises(InputError, match="input_shape"):
        IntegerNet.of(model)
    assert IntegerNet.of(model, shapes).outputs == ("fc2",)


def test_scales_json_says_how_outputs_follow_from_codes() -> None:
    """y = s * (Q . q) + bias, by hand for a 1x1 convolution."""
    model = quantized(model_of(family("resnet")))
    net = IntegerNet.of(model)
    told = json.loads(scales_json(net))
    found = told["layers"]["left"]
    tensor = told["tensors"][found["reads"]]
    feeds = images_for(model)
    read = scores_of(net, feeds, found["reads"]) / tensor["step"]
    q = np.rint(read)
    np.testing.assert_allclose(read, q, atol=1e-3)
    assert tensor["lowest"] <= q.min()
    assert q.max() <= tensor["highest"]
    products = np.einsum("nk,bkhw->bnhw", net.layers["left"].codes.astype(np.float64), q)
    s, bias = (np.array(found[key]).reshape(-1, 1, 1) for key in ("s", "bias"))
    assert sqnr(scores_of(net, feeds, found["makes"]), s * products + bias) > EXACT
    assert told["float"] == dict(net.floats)
