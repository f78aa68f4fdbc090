"""Where activations are quantized in nets of many families, and that what is written is what was meant."""

import numpy as np
import pytest

from quantize.arrays import FloatArray
from quantize.caffenet import InferenceNet, NetGraph, NetParameter, Weights, infer_shapes, single_assignment
from quantize.caffenet.model import Model
from quantize.caffenet.quantized import alpha_terms
from quantize.caffenet.quantizers import with_quantizers
from quantize.caffenet.traits import Trait, traits_of
from quantize.data.feed import Feed
from quantize.data.values import Values
from quantize.engines import engine_opener
from quantize.errors import LabelfreeError
from quantize.record import QuantizerLayer
from quantize.settings import ActivationSettings, CaffeProcess, WeightSettings
from quantize.stages.activations import activations_quan, fit_steps
from quantize.stages.coverage import coverage
from quantize.stages.sites import find_sites
from quantize.stages.weights import (
    choices,
    to_be_quantized,
    weights_quan,
)
from tests.families import FAMILIES, HEAD, INPUT, conv, dense, family, layer
from tests.nets import parse, random_weights

INPUTS = {
    "resnet": "stem/relu right_a/relu sum1/relu c2/relu gap_quantized",
    "mobilenet_v2": "stem_quantized dw1_quantized project1_quantized expand2_quantized dw2_quantized "
    "sum2_quantized gap_quantized",
    "lite": "stem_quantized dw1_quantized project1_quantized gap_quantized",
    "mtcnn": "conv1_quantized conv2_quantized",
    "yolo": "conv1_quantized conv2_quantized conv3_quantized route_quantized",
    "se": "conv1/relu squeeze_quantized down/relu gap_quantized",
    "densenet": "bn1/relu bn2/relu concat2_quantized pool_quantized",
    "inception": "conv1/relu both_quantized max_quantized",
}
RELUS = {
    "resnet": "stem/relu right_a/relu sum1/relu c2/relu sum2/relu",
    "mobilenet_v2": "stem_quantized dw1_quantized expand2_quantized dw2_quantized last_quantized",
    "lite": "stem_quantized dw1_quantized expand2/relu",
    "mtcnn": "",
    "yolo": "",
    "se": "conv1/relu down/relu sum/relu",
    "densenet": "bn1/relu bn2/relu",
    "inception": "conv1/relu a/relu b/relu",
}


def settings(**values: object) -> ActivationSettings:
    return ActivationSettings.model_validate(values)


def sites_of(net: NetParameter, **values: object) -> list[str]:
    test = InferenceNet.of(net)
    quantized = to_be_quantized(test.net, WeightSettings())
    return [site.name for site in find_sites(test.net, test.inputs, quantized, settings(**values))]


@pytest.mark.parametrize("name", FAMILIES)
def test_what_quantized_layers_read(name: str) -> None:
    assert sites_of(family(name)) == INPUTS[name].split()


@pytest.mark.parametrize("name", FAMILIES)
def test_what_relus_make(name: str) -> None:
    assert sites_of(family(name), scope="relu") == RELUS[name].split()


def test_the_input_and_the_branches_of_sums() -> None:
    assert sites_of(family("lite"), input=True)[0] == "data_quantized"
    assert sites_of(family("resnet"), sums=True) == [
        *("stem/relu", "left_quantized", "right_a/relu", "right_b_quantized", "sum1/relu", "c2/relu"),
        *("c3_quantized", "sum2/relu", "gap_quantized"),
    ]


def values_feed(x: FloatArray) -> Feed:
    """The rows of an array as what goes into the net."""
    return Feed({"data": Values("x", x.shape[1:], len(x), lambda i: x[i], str)})


def quantized_net(
    net: NetParameter, seed: int = 0, **values: object
) -> tuple[NetParameter, Weights, dict[str, FloatArray]]:
    """A net with quantized weights and activations, its blobs, and images."""
    test = InferenceNet.of(net)
    weights = random_weights(test.net, INPUT)
    model, _ = weights_quan(Model(net, weights), choices(test.net, WeightSettings()), "optimal")
    x = np.random.default_rng(seed).normal(0, 2, (4, *INPUT["data"])).astype(np.float32)
    opener = engine_opener("onnx", CaffeProcess(), 1)
    small, _ = activations_quan(model, values_feed(x), settings(**values), opener)
    return small.net, small.weights, {"data": x}


def run(
    net: NetParameter, weights: Weights, feeds: dict[str, FloatArray], blobs: list[str]
) -> list[FloatArray]:
    """Blobs of a net with every name assigned once."""
    shapes = {name: x.shape[1:] for name, x in feeds.items()}
    engine = engine_opener("onnx", CaffeProcess(), 1)(net, weights, shapes)
    result = engine.compile(0, len(net.layer), [name for name in blobs if name not in feeds]).run(feeds)
    return [{**feeds, **result.blobs}[name] for name in blobs]


@pytest.mark.parametrize("values", [{}, {"input": True, "sums": True}, {"levels": 255}, {"bits": 4}], ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_quantized_layers_read_codes(name: str, values: dict[str, object]) -> None:
    """Every value that a quantized layer reads is a step times a whole number within the codes."""
    net, weights, feeds = quantized_net(family(name), **values)
    graph = NetGraph(InferenceNet.of(net).net)
    flat = graph.net
    kernels = [each for each in flat.layer if Trait.KERNELS in traits_of(each)]
    read = {blob for each in kernels for blob in each.bottom if blob != "data"}
    if values.get("input"):
        assert not any("data" in each.bottom for each in kernels)
    assert read
    for blob, x in zip(read, run(flat, weights, feeds, list(read)), strict=True):
        quantizer = graph.coder(blob)
        assert quantizer is not None
        threshold = quantizer.threshold_param.threshold
        codes = x.astype(np.float64) / np.float32(quantizer.relu_param.negative_slope)
        np.testing.assert_allclose(codes, np.rint(codes), atol=1e-4)
        assert np.rint(codes).min() >= min(threshold, 0)
        assert np.rint(codes).max() <= (abs(threshold) or 127)
        assert len(np.unique(np.rint(codes))) > 3


@pytest.mark.parametrize("name", FAMILIES)
def test_only_the_readers_meant_see_codes(name: str) -> None:
    """Sums, gates, Concats and poolings read what they read before, but for plain ReLUs."""
    net, _, _ = quantized_net(family(name))
    graph = NetGraph(InferenceNet.of(net).net)
    for each in graph.net.layer:
        for blob in each.bottom:
            coder = graph.coder(blob)
            if each.type in ("Eltwise", "Scale") and coder is not None:
                assert each.type == "Eltwise"
                assert coder.name.endswith("relu")


def test_a_fit_behind_the_clip() -> None:
    """ReLU6 as ReLU and Clip: the step fits what the Clip leaves, not what the ReLU makes."""
    net, weights, feeds = quantized_net(family("mobilenet_v2"))
    flat = single_assignment(InferenceNet.of(net).net)
    for each in flat.layer:
        if each.type == "ActQuantize" and each.name.split("_")[0] in ("stem", "dw1", "dw2", "expand2"):
            assert each.relu_param.negative_slope * 127 <= 2.02
    before = next(each.bottom[0] for each in flat.layer if each.type == "Clip")
    assert run(flat, weights, feeds, [before])[0].max() > 4


@pytest.mark.parametrize("scope", ["relu", "inputs"])
@pytest.mark.parametrize("name", ["mobilenet_v2", "lite"])
def test_relu6_on_codes_loses_little(name: str, scope: str) -> None:
    """Against the net with quantized weights alone; with steps for what the ReLU makes it is far more."""
    net, weights, feeds = quantized_net(family(name), scope=scope)
    test = InferenceNet.of(net)
    plain = NetParameter()
    plain.CopyFrom(test.net)
    for each in plain.layer:
        if each.type == "ActQuantize":
            each.type = "ReLU" if each.name.endswith("relu") else "Dropout"
            each.ClearField("relu_param")
    (wanted,), (found,) = (run(each, weights, feeds, [test.scores]) for each in (plain, test.net))
    assert np.sum((wanted - found) ** 2) < 2e-3 * np.sum(wanted**2)


def test_a_blob_that_others_read_too_stays() -> None:
    """The linear bottleneck goes into a sum in full and into the next convolution on codes."""
    net, _, _ = quantized_net(family("mobilenet_v2"))
    layers = {each.name: each for each in net.layer}
    assert list(layers["sum2"].bottom) == ["project1", "project2"]
    assert list(layers["expand2"].bottom) == ["project1_quantized"]
    assert list(layers["project1_quantized"].top) == ["project1_quantized"]
    # Read by nobody else, a blob is quantized in place.
    assert list(layers["gap_quantized"].top) == ["gap"]


def test_names_never_collide() -> None:
    text = (
        conv("c1", "data", 4)
        + layer("c1_quantized", "TanH", "c1", "c1_quantized_2")
        + conv("c2", "c1", 4)
        + conv("c3", "c1_quantized_2", 4)
        + layer("sum", "Eltwise", "c2 c3")
        + dense("fc", "sum", 3)
    )
    net, weights, feeds = quantized_net(parse(HEAD + text))
    names = [each.name for each in net.layer]
    assert len(set(names)) == len(names)
    assert "c1_quantized_3" in names
    assert list(next(each for each in net.layer if each.name == "c2").bottom) == ["c1_quantized_3"]
    assert list(next(each for each in net.layer if each.name == "c1_quantized").bottom) == ["c1"]
    run(single_assignment(InferenceNet.of(net).net), weights, feeds, ["fc"])


def test_phases_stay_sound() -> None:
    """A quantizer exists where one of its readers does, and a TRAIN-only layer keeps what it reads."""
    text = """
    layer { name: "data" type: "Input" top: "data" input_param { shape { dim: [1, 3, 17, 17] } } }
    layer { name: "aux" type: "TanH" bottom: "c1" top: "aux" include { phase: TRAIN } }
    """
    head, aux = (line.strip() + "\n" for line in text.strip().splitlines())
    body = conv("c1", "data", 4) + aux + conv("c2", "c1", 4) + dense("fc", "c2", 3)
    body = body.replace('top: "fc"', 'top: "fc" include { phase: TEST }')
    net, _, _ = quantized_net(parse(head + body))
    layers = {each.name: each for each in net.layer}
    assert [rule.phase for rule in layers["c2_quantized"].include] == [1]
    assert not layers["c1_quantized"].include
    assert list(layers["aux"].bottom) == ["c1"]


def test_what_is_the_same_for_all_images_is_left_alone() -> None:
    text = (
        'layer { name: "fixed" type: "DummyData" top: "fixed" dummy_data_param { shape { dim: [1, 5] } } }\n'
        + dense("constant", "fixed", 4)
        + dense("fc", "data", 4)
        + layer("sum", "Eltwise", "fc constant")
        + dense("out", "sum", 3)
    )
    assert sites_of(parse(HEAD + text)) == ["sum_quantized"]


def test_layers_that_keep_their_weights_need_no_codes() -> None:
    test = InferenceNet.of(family("mtcnn"))
    assert not find_sites(test.net, test.inputs, [], settings())
    [only] = find_sites(test.net, test.inputs, ["conv2"], settings())
    assert (only.name, only.behind) == ("conv1_quantized", "prelu1")


def test_shares_of_the_work() -> None:
    """By hand: the multiply-accumulates of the layers named, over all."""
    net, _, _ = quantized_net(family("mobilenet_v2"))
    test = InferenceNet.of(net)
    macs = infer_shapes(test.net, {"data": (1, *INPUT["data"])}).macs
    found = coverage(test.net, test.inputs, alpha_terms(test.net), macs)
    per_layer = {"stem": 9 * 9 * 8 * 27, "dw1": 81 * 8 * 9, "project1": 81 * 4 * 8, "expand2": 81 * 12 * 4}
    per_layer |= {"dw2": 81 * 12 * 9, "project2": 81 * 4 * 12, "last": 81 * 16 * 4, "fc": 16 * 7}
    total = sum(per_layer.values())
    assert found.macs == total
    assert found.weights == 1
    assert found.inputs == found.both == pytest.approx(1 - per_layer["stem"] / total)
    assert found.in_float == {"stem": "reads the net's input data (activations.input)"}
    relus = InferenceNet.of(quantized_net(family("mobilenet_v2"), scope="relu")[0])
    found = coverage(relus.net, relus.inputs, alpha_terms(relus.net), macs)
    codes = sum(per_layer[name] for name in ("dw1", "project1", "dw2", "project2"))
    assert found.inputs == pytest.approx(codes / total)
    assert found.in_float["expand2"] == "reads what project1/scale (Scale) makes"


def test_an_activation_that_is_constant() -> None:
    """A blob of one value gets a step with which that value is exact; one of zeros any."""
    net = parse(
        HEAD + conv("c1", "data", 4, norm=False) + layer("t", "Power", "c1", "t", "") + dense("fc", "t", 3)
    )
    test = InferenceNet.of(net)
    weights = random_weights(test.net, INPUT)
    x = np.zeros((4, *INPUT["data"]), np.float32)
    sites = find_sites(test.net, test.inputs, ["fc"], settings())
    opener = engine_opener("onnx", CaffeProcess(), 1)
    for bias, signed in ((3.0, False), (-3.0, True), (0.0, False)):
        weights.replace("c1", [weights["c1"][0], np.full(4, bias, np.float32)])
        [found] = fit_steps(Model(net, weights), values_feed(x), sites, settings(), opener)
        code = round(bias / found.step)
        assert found.step * code == pytest.approx(bias, rel=1e-6)
        assert (found.signed, found.dead) == (signed, bias == 0)


def test_values_that_overflow_are_named() -> None:
    huge = layer("t", "Power", "c1", "t", "power_param { scale: 1e38 }")
    net = parse(HEAD + conv("c1", "data", 4, norm=False) + huge + dense("fc", "t", 3))
    test = InferenceNet.of(net)
    weights = random_weights(test.net, INPUT)
    x = np.random.default_rng(0).normal(0, 9, (4, *INPUT["data"])).astype(np.float32)
    sites = find_sites(test.net, test.inputs, ["fc"], settings())
    opener = engine_opener("onnx", CaffeProcess(), 1)
    with pytest.raises(LabelfreeError, match="blob 't': activations hold NaN or infinity"):
        fit_steps(Model(net, weights), values_feed(x), sites, settings(), opener)


def test_settings_that_make_no_sense() -> None:
    assert settings(solver="reference").scope == "relu"
    for values, words in (
        ({"solver": "reference", "scope": "inputs"}, "no codes of both signs"),
        ({"scope": "relu", "sums": True}, "sums: true needs scope inputs"),
        ({"scope": "relu", "input": True}, "input: true needs scope inputs"),
        ({"levels": 0}, "greater than or equal to 1"),
        ({"levels": 256}, "less than or equal to 255"),
    ):
        with pytest.raises(ValueError, match=words):
            settings(**values)


def test_a_quantizer_for_no_relu_changes_nothing() -> None:
    net = family("mtcnn")
    names = [each.name for each in net.layer]
    written = with_quantizers(net, [QuantizerLayer("q", 0.5, 7, True, [])])
    assert [each.name for each in written.layer] == names  # no ReLU of that name
    assert not any(Trait.CODES in traits_of(each) for each in written.layer)
