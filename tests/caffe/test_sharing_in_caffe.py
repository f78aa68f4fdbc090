"""Layers that share blobs, or a name: what Caffe and we make of a prototxt and a caffemodel."""

from pathlib import Path

import numpy as np
import pytest

from quantize.caffenet import InferenceNet, NetParameter, load_weights, read_prototxt
from quantize.engines.caffe.engine import CaffeEngine
from quantize.engines.onnx.engine import OnnxEngine
from quantize.errors import InputError
from tests.caffe.conftest import CaffeForward

IMAGES = (5, 3, 4, 4)
Entries = list[tuple[str, list[np.ndarray]]]


def caffemodel(entries: Entries) -> bytes:
    """The layers of a caffemodel, one after the other; names may come again."""
    net = NetParameter()
    for name, blobs in entries:
        layer = net.layer.add(name=name)
        for blob in blobs:
            layer.blobs.add(data=blob.ravel()).shape.dim.extend(blob.shape)
    return net.SerializeToString()


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).normal(0, 0.5, shape).astype(np.float32)


def images(batch: int = IMAGES[0]) -> np.ndarray:
    return numbers(batch, *IMAGES[1:], seed=99)


def ours(prototxt: Path, weights: Path, batch: np.ndarray, blobs: list[str]) -> list[np.ndarray]:
    net = read_prototxt(prototxt)
    test = InferenceNet.of(net)
    engine = OnnxEngine(test.net, load_weights(weights, net), {test.blob: batch.shape[1:]}, 1)
    found = engine.compile(0, len(test.net.layer), blobs).run({test.blob: batch}).blobs
    engine.close()
    return [found[name] for name in blobs]


def written(text: str, entries: Entries, folder: Path) -> tuple[Path, Path]:
    """The two files of a net."""
    prototxt, weights = folder / "net.prototxt", folder / "net.caffemodel"
    prototxt.write_text(text)
    weights.write_bytes(caffemodel(entries))
    return prototxt, weights


def assert_as_in_caffe(
    text: str, entries: Entries, blobs: list[str], folder: Path, caffe_forward: CaffeForward
) -> list[np.ndarray]:
    prototxt, weights = written(text, entries, folder)
    wanted = caffe_forward(prototxt, weights, {"data": images()}, blobs)
    for own, blob in zip(ours(prototxt, weights, images(), blobs), wanted, strict=True):
        np.testing.assert_allclose(own, blob, rtol=0, atol=2e-6 * np.abs(blob).max())
    return wanted


INPUT = (
    'layer { name: "in" type: "Input" top: "data" input_param { shape { dim: 5 dim: 3 dim: 4 dim: 4 } } }\n'
)


def convolution(name: str, top: str, *params: str, bottom: str = "data", outputs: int = 6) -> str:
    shared = " ".join(f"param {{ {param} }}" for param in params)
    return (
        f'layer {{ name: "{name}" type: "Convolution" bottom: "{bottom}" top: "{top}" {shared}\n'
        f"  convolution_param {{ num_output: {outputs} kernel_size: 1 }} }}\n"
    )


W, B = 'name: "w"', 'name: "b"'
PAIR = INPUT + convolution("one", "x", W, B) + convolution("two", "y", W, B)
HALF = INPUT + convolution("one", "x", W) + convolution("two", "y", W)


def blobs(seed: int) -> list[np.ndarray]:
    return [numbers(6, 3, 1, 1, seed=seed), numbers(6, seed=seed)]


@pytest.mark.parametrize(
    ("text", "entries"),
    [
        (PAIR, [("one", blobs(1)), ("two", blobs(2))]),
        (PAIR, [("two", blobs(2)), ("one", blobs(1))]),
        (PAIR, [("one", blobs(1))]),
        (PAIR, [("two", blobs(2))]),
        (PAIR, [("one", blobs(1)), ("two", blobs(2)), ("other", blobs(3)), ("one", blobs(4))]),
        (HALF, [("one", blobs(1)), ("two", blobs(2))]),
        (HALF, [("two", blobs(2)), ("one", blobs(1))]),
    ],
)
def test_the_last_layer_of_the_file_counts(
    text: str, entries: Entries, tmp_path: Path, caffe_forward: CaffeForward
) -> None:
    x, y = assert_as_in_caffe(text, entries, ["x", "y"], tmp_path, caffe_forward)
    assert np.array_equal(x, y) == (text is PAIR)


def test_one_size_in_two_shapes(tmp_path: Path, caffe_forward: CaffeForward) -> None:
    product = (
        'layer { name: "two" type: "InnerProduct" bottom: "x" top: "y" param { name: "w" share_mode: %s }\n'
        "  inner_product_param { num_output: 3 bias_term: false } }\n"
    )
    text = INPUT + convolution("one", "x", W, outputs=96).replace(
        "{ num_output", "{ bias_term: false num_output"
    )
    entries: Entries = [("one", [numbers(96, 3, 1, 1)]), ("two", [numbers(3, 96, seed=1)])]
    slim = text.replace('top: "x"', 'top: "wide"') + (
        'layer { name: "mean" type: "Pooling" bottom: "wide" top: "x"\n'
        "  pooling_param { pool: AVE global_pooling: true } }\n"
    )
    for kept in (entries, entries[:1], entries[1:]):
        assert_as_in_caffe(slim + product % "PERMISSIVE", kept, ["x", "y"], tmp_path, caffe_forward)
    with pytest.raises(InputError, match=r"layer 'two'.*shape \(3, 96\) but shares 'w' with layer 'one'"):
        ours(*written(slim + product % "STRICT", entries, tmp_path), images(), ["y"])
    with pytest.raises(AssertionError, match="Cannot share param 'w' owned by layer 'one'"):
        caffe_forward(slim + product % "STRICT", caffemodel(entries), {"data": images()}, ["y"])


def test_blobs_at_different_places(tmp_path: Path, caffe_forward: CaffeForward) -> None:
    """A convolution's bias is a Bias layer's blob, and a Scale multiplies by what it adds."""
    text = (
        INPUT
        + convolution("one", "x", "lr_mult: 1", 'name: "v"')
        + 'layer { name: "more" type: "Bias" bottom: "x" top: "y" param { name: "v" } }\n'
        + 'layer { name: "scale" type: "Scale" bottom: "y" top: "z" scale_param { bias_term: true }\n'
        '  param { name: "s" } param { name: "s" } }\n'
    )
    v, s = numbers(6, seed=7), numbers(6, seed=8)
    entries = [("one", blobs(1)), ("more", [v]), ("scale", [numbers(6, seed=9), s])]
    x, y, z = assert_as_in_caffe(text, entries, ["x", "y", "z"], tmp_path, caffe_forward)
    np.testing.assert_allclose(y - x, np.broadcast_to(v[:, None, None], x.shape), atol=1e-6)
    np.testing.assert_allclose(z, (y + 1) * s[:, None, None], atol=1e-6)


def test_a_name_that_comes_again_in_the_caffemodel(tmp_path: Path, caffe_forward: CaffeForward) -> None:
    text = INPUT + convolution("one", "x") + convolution("two", "y")
    entries = [("one", blobs(1)), ("two", blobs(2)), ("one", blobs(3)), ("gone", blobs(4)), ("gone", [])]
    x, _ = assert_as_in_caffe(text, entries, ["x", "y"], tmp_path, caffe_forward)
    alone = ours(*written(text, [("one", blobs(3)), ("two", blobs(2))], tmp_path), images(), ["x"])[0]
    np.testing.assert_allclose(x, alone, atol=1e-6)
    entries[0] = ("one", [numbers(5, 3, 1, 1), numbers(5)])
    with pytest.raises(AssertionError, match="Cannot copy param 0 weights from layer 'one'"):
        caffe_forward(text, caffemodel(entries), {"data": images()}, ["x"])
    with pytest.raises(InputError, match=r"layer 'one'.*blob 0 must have the shape"):
        ours(*written(text, entries, tmp_path), images(), ["x"])


def test_two_layers_of_one_name_with_one_blob(tmp_path: Path, caffe_forward: CaffeForward) -> None:
    text = INPUT + convolution("same", "x", W, B) + convolution("same", "y", W, B, bottom="x3")
    text = text.replace(
        'layer { name: "same"', 'layer { name: "cut" type: "Slice" bottom: "data" top: "x3" top: "rest"\n'
        "  slice_param { slice_point: 2 axis: 2 } }\nlayer { name: \"same\"", 1
    )  # fmt: skip
    for entries in ([("same", blobs(1)), ("same", blobs(2))], [("same", blobs(1))]):
        assert_as_in_caffe(text, entries, ["x", "y"], tmp_path, caffe_forward)


def test_two_layers_of_one_name_with_blobs_of_their_own(tmp_path: Path, caffe_forward: CaffeForward) -> None:
    """Caffe copies both into the first and leaves the second as its filler made it: all 0."""
    text = INPUT + convolution("same", "x") + convolution("same", "y")
    entries = [("same", blobs(1)), ("same", blobs(2))]
    x, y = caffe_forward(text, caffemodel(entries), {"data": images()}, ["x", "y"])
    assert x.any()
    assert not y.any()
    with pytest.raises(InputError, match=r"layer 'same#2'.*number 2 of the layers called 'same'"):
        ours(*written(text, entries, tmp_path), images(), ["x", "y"])


def test_layers_without_blobs_may_have_one_name_or_none(tmp_path: Path, caffe_forward: CaffeForward) -> None:
    crop = (
        'layer { name: "crop" type: "Crop" bottom: "%s" bottom: "data" top: "%s" '
        "crop_param { axis: 2 offset: %d } }\n"
    )
    unnamed = 'layer { type: "%s" bottom: "%s" top: "%s" }\n'
    pad = convolution("conv", "large").replace("kernel_size: 1", "kernel_size: 1 pad: 2")
    text = (
        INPUT + pad + crop % ("large", "a", 0) + crop % ("large", "b", 2) + unnamed % ("TanH", "a", "c")
        + unnamed % ("ReLU", "b", "b") + unnamed % ("AbsVal", "c", "d")
        + 'layer { name: "crop" type: "Eltwise" bottom: "b" bottom: "d" top: "e" }\n'
    )  # fmt: skip
    assert_as_in_caffe(text, [("conv", blobs(1)), ("crop", [])], list("abcde"), tmp_path, caffe_forward)
    names = [layer.name for layer in read_prototxt(tmp_path / "net.prototxt").layer]
    assert names == ["in", "conv", "crop", "crop#2", "", "#2", "#3", "crop#3"]


def test_new_blobs_are_new_wherever_they_are_shared(tmp_path: Path, caffe_python: list[str]) -> None:
    prototxt, weights = written(HALF, [("one", blobs(1)), ("two", blobs(2))], tmp_path)
    net = read_prototxt(prototxt)
    test = InferenceNet.of(net)
    loaded = load_weights(weights, net)
    shapes = {"data": IMAGES[1:]}
    found = []
    for engine in (
        OnnxEngine(test.net, loaded, shapes, 1),
        CaffeEngine(test.net, loaded, shapes, caffe_python, threads=1),
    ):
        kernels, bias = numbers(6, 3, 1, 1, seed=5), numbers(6, seed=5)
        engine.set_blobs("two", [kernels, bias])
        np.testing.assert_array_equal(engine.weights["one"][0], kernels)
        np.testing.assert_array_equal(engine.weights["one"][1], loaded["one"][1])
        found.append(engine.compile(0, len(test.net.layer), ["x", "y"]).run({"data": images()}).blobs)
        engine.close()
    for name in ("x", "y"):
        np.testing.assert_allclose(found[0][name], found[1][name], atol=1e-6)
    difference = found[0]["y"] - found[0]["x"]
    np.testing.assert_allclose(
        difference, np.broadcast_to(difference[:1, :, :1, :1], difference.shape), atol=1e-6
    )


def test_more_param_than_blobs(tmp_path: Path, caffe_forward: CaffeForward) -> None:
    text = INPUT + 'layer { name: "relu" type: "ReLU" bottom: "data" top: "x" param { lr_mult: 1 } }\n'
    with pytest.raises(AssertionError, match="Too many params specified for layer relu"):
        caffe_forward(text, caffemodel([]), {"data": images()}, ["x"])
    with pytest.raises(InputError, match=r"layer 'relu' \(ReLU\): 1 param for 0 blobs"):
        ours(*written(text, [("other", blobs(1))], tmp_path), images(), ["x"])


def test_old_layers_share_by_name_too(tmp_path: Path, caffe_forward: CaffeForward) -> None:
    """V1: names and modes are lists of their own."""
    old = (
        'layers { name: "%s" type: CONVOLUTION bottom: "data" top: "%s" param: "w" param: "" '
        "convolution_param { num_output: 6 kernel_size: 1 } }\n"
    )
    product = (
        'layers { name: "three" type: INNER_PRODUCT bottom: "y" top: "z" param: "w" param: "" '
        "blob_share_mode: PERMISSIVE blob_share_mode: STRICT inner_product_param { num_output: 3 } }\n"
    )
    pool = (
        'layers { name: "mean" type: POOLING bottom: "x" top: "p" '
        "pooling_param { pool: AVE kernel_size: 4 } }\n"
    )
    text = 'input: "data" input_dim: 5 input_dim: 3 input_dim: 4 input_dim: 4\n'
    text += old % ("one", "x") + old % ("two", "y") + pool + product.replace('"y"', '"p"')
    for entries in (
        [("one", blobs(1)), ("two", blobs(2)), ("three", [numbers(3, 6), numbers(3)])],
        [("three", [numbers(3, 6), numbers(3)]), ("two", blobs(2)), ("one", blobs(1))],
    ):
        assert_as_in_caffe(text, entries, ["x", "y", "z"], tmp_path, caffe_forward)
