"""A fork's net in the forms of Caffe 1.0: the same values, and a file that Caffe 1.0 reads."""

from pathlib import Path

import numpy as np
import pytest
from google.protobuf import text_format

from quantize.caffenet import (
    InferenceNet,
    NetParameter,
    Weights,
    format_prototxt,
    load_weights,
    read_prototxt,
)
from quantize.caffenet.bvlc import in_bvlc_forms
from quantize.caffenet.model import Model
from quantize.engines.onnx.engine import OnnxEngine
from tests.families import HEAD, dense, layer
from tests.nets import random_weights
from tests.wild.nets import IMAGE, bare, bn, norm, nv, segnet

LAYERS = {
    "NVCaffe": nv("c", "data", 6, "scale_filler { value: 1 }"),
    "PSPNet": bn("c", "data", 6),
    "SegNet": segnet("c", "data", 6),
    "SENet": bare("c", "data", 6)
    + layer("n", "CuDNNBatchNorm", "c", "n", "batch_norm_param { eps: 0.01 } include { phase: TEST }"),
    "engines": layer(
        "c", "CuDNNConvolution", "data", "c", "convolution_param { num_output: 6 kernel_size: 3 }"
    )
    + layer("r", "MKLReLU", "c", "c"),
}


def model_of(text: str, folder: Path, seed: int = 0) -> tuple[NetParameter, Weights]:
    """A net as read and its blobs."""
    (folder / "net.prototxt").write_text(text)
    net = read_prototxt(folder / "net.prototxt")
    weights = random_weights(InferenceNet.of(net).net, {"data": IMAGE}, seed)
    with open(folder / "net.caffemodel", "wb") as file:
        weights.write(file)
    return net, weights


def scores(net: NetParameter, weights: Weights) -> np.ndarray:
    test = InferenceNet.of(net)
    engine = OnnxEngine(test.net, weights, {"data": IMAGE}, 1)
    data = np.random.default_rng(1).normal(size=(3, *IMAGE)).astype(np.float32)
    runner = engine.compile(0, len(test.net.layer), [test.scores])
    return runner.run({"data": data}).blobs[test.scores]


@pytest.mark.parametrize("fork", LAYERS)
def test_the_forms_of_caffe_give_the_same_values(fork: str, tmp_path: Path) -> None:
    text = (
        "default_forward_type: FLOAT16 "
        + HEAD
        + LAYERS[fork]
        + dense("fc", "n" if fork == "SENet" else "c", 3)
    )
    net, weights = model_of(text, tmp_path)
    stock = in_bvlc_forms(net)
    parsed = NetParameter()
    text_format.Parse(format_prototxt(stock), parsed)
    assert {layer.type for layer in parsed.layer} <= {
        *("Input", "Convolution", "BatchNorm", "Scale", "ReLU", "InnerProduct"),
    }
    for each in parsed.layer:
        assert not each.batch_norm_param.HasField("scale_filler")
    model = Model.load(tmp_path / "net.prototxt", tmp_path / "net.caffemodel", write="bvlc")
    assert model.net == stock
    loaded = model.weights
    np.testing.assert_allclose(scores(stock, loaded), scores(net, weights), rtol=1e-5, atol=1e-5)
    for name in ("c_bn", "n"):
        if name in loaded and fork != "SegNet":
            assert [blob.shape for blob in loaded[name]] == [(6,), (6,), (1,)]


def test_shared_blobs_stay_shared(tmp_path: Path) -> None:
    names = " ".join(f"param {{ name: 'b{i}' }}" for i in range(5))
    text = HEAD + bare("c", "data", 3)
    for number, bottom in ((1, "data"), (2, "c")):
        fields = f"batch_norm_param {{ scale_bias: true }} {names}"
        text += layer(f"n{number}", "BatchNorm", bottom, f"n{number}", fields)
    text += layer("sum", "Eltwise", "n1 n2")
    net, weights = model_of(text, tmp_path)
    weights.replace("n2", weights["n1"])
    with open(tmp_path / "net.caffemodel", "wb") as file:
        weights.write(file)
    stock = in_bvlc_forms(net)
    assert [param.name for param in stock.layer[3].param] == ["b3", "b4"]
    loaded = load_weights(tmp_path / "net.caffemodel", stock)
    np.testing.assert_allclose(scores(stock, loaded), scores(net, weights), rtol=1e-5, atol=1e-5)


def test_names_that_are_taken(tmp_path: Path) -> None:
    text = HEAD + bare("n_scale", "data", 3) + norm("n", "n_scale", "BN", "")
    net, weights = model_of(text, tmp_path)
    stock = in_bvlc_forms(net)
    assert [each.name for each in stock.layer] == ["data", "n_scale", "n", "n_scale_2"]
    model = Model.of(stock, tmp_path / "net.caffemodel")
    np.testing.assert_allclose(scores(stock, model.weights), scores(net, weights), rtol=1e-5, atol=1e-5)


def test_a_net_of_caffe_stays_as_it_is(tmp_path: Path) -> None:
    text = HEAD + bare("c", "data", 3) + norm("n", "c", "BatchNorm", "") + norm("s", "c", "Scale", "")
    net, weights = model_of(text, tmp_path)
    assert in_bvlc_forms(net) == net
    again = load_weights(tmp_path / "net.caffemodel", net)
    assert [blob.shape for blob in again["s"]] == [(3,)]
    assert again.layers() == weights.layers()
