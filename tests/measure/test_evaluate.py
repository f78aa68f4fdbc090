"""What is measured on nets of several kinds, and what is said of it: never of accuracy without classes."""

import base64
from pathlib import Path

import cv2
import numpy as np
import pytest

from quantize.caffenet import TEST, InferenceNet, NetParameter, Weights, read_prototxt
from quantize.caffenet.model import Model
from quantize.commands.config import load
from quantize.commands.evaluation import evaluation_json, evaluation_text
from quantize.data import Transform
from quantize.data.feed import Feed
from quantize.engines import engine_opener
from quantize.errors import InputError, LabelfreeError
from quantize.job.evaluation import evaluate_run
from quantize.job.run import Run
from quantize.measure.evaluate import evaluate
from quantize.measure.outputs import net_outputs
from quantize.measure.significance import wilson
from quantize.record import Evaluation
from quantize.settings import CaffeProcess, Config
from tests.heard import Heard
from tests.nets import images_of, parse, random_weights, write_images

ONNX = engine_opener("onnx", CaffeProcess(), 1)
IMAGES = 23
SHAPE = (3, 9, 9)
STEM = """
name: "net"
layer { name: "data" type: "Input" top: "data" input_param { shape { dim: [1, 3, 9, 9] } } }
layer { name: "conv" type: "Convolution" bottom: "data" top: "conv"
  convolution_param { num_output: 8 kernel_size: 3 } }
layer { name: "bn" type: "BatchNorm" bottom: "conv" top: "conv" }
layer { name: "relu" type: "ReLU" bottom: "conv" top: "conv" }
"""
LABELS = """
layer { name: "label" type: "Input" top: "label" input_param { shape { dim: [1, 10] } } }
"""


def convolution(name: str, outputs: int) -> str:
    return f"""layer {{ name: "{name}" type: "Convolution" bottom: "conv" top: "{name}"
        convolution_param {{ num_output: {outputs} kernel_size: 3 }} }}\n"""


def product(name: str, outputs: int) -> str:
    return f"""layer {{ name: "{name}" type: "InnerProduct" bottom: "conv" top: "{name}"
        inner_product_param {{ num_output: {outputs} }} }}\n"""


def unary(name: str, kind: str, bottom: str, top: str) -> str:
    return f'layer {{ name: "{name}" type: "{kind}" bottom: "{bottom}" top: "{top}" }}\n'


CLASSIFIER = STEM + product("fc", 7) + unary("prob", "Softmax", "fc", "prob")
IN_PLACE = STEM + product("fc", 7) + unary("prob", "Softmax", "fc", "fc")
LANDMARKS = (
    LABELS
    + STEM
    + product("marks", 10)
    + 'layer { name: "loss" type: "EuclideanLoss" bottom: "marks" bottom: "label" top: "loss" }\n'
)
DETECTOR = STEM + "".join(
    convolution(f"class{i}", 4)
    + unary(f"prob{i}", "Softmax", f"class{i}", f"prob{i}")
    + convolution(f"box{i}", 6)
    for i in range(4)
)
SEGMENTATION = STEM + convolution("score", 5) + unary("prob", "Softmax", "score", "prob")


def job(folder: Path, text: str) -> Config:
    """A job for a net of random weights, with labels 0 .. 6 for the validation images."""
    (folder / "net.prototxt").write_text(text)
    test = InferenceNet.of(parse(text))
    inputs = {"data": SHAPE, "label": (10,)}
    weights = random_weights(test.net, {blob: inputs[blob] for blob in test.inputs})
    with open(folder / "net.caffemodel", "wb") as file:
        weights.write(file)
    write_images(folder / "train_lmdb", 20)
    write_images(folder / "test_lmdb", IMAGES, seed=1)
    options = {
        "model.prototxt": str(folder / "net.prototxt"),
        "model.weights": str(folder / "net.caffemodel"),
        "data.calibration.source": str(folder / "train_lmdb"),
        "data.validation.source": str(folder / "test_lmdb"),
        "output": str(folder / "out"),
    }
    given = ["data.transform={crop_size: 9, scale: 0.02, mean_value: 100}"]
    return load(None, options, [*given, "weights.first_last={bits: 3, grid: power_of_two}"])


def evaluated(folder: Path, text: str) -> tuple[Config, Evaluation]:
    config = job(folder, text)
    Run(config).quantize()
    return config, evaluate_run(config)


def blobs_of(config: Config, name: str, *wanted: str) -> list[list[np.ndarray]]:
    """Blobs for all validation images, of full precision and of the quantized net, both without Softmax."""
    pairs = [
        (config.model.prototxt, config.model.weights),
        (config.output / f"{name}_deploy.prototxt", config.output / f"{name}_renorm.caffemodel"),
    ]
    transform = Transform(crop_size=9, scale=0.02, mean_value=(100.0,))
    images = images_of(config.data.validation.source, transform, TEST)  # type: ignore[union-attr, arg-type]
    [(pixels, _)] = list(images.batches(IMAGES))
    found = []
    for prototxt, weights in pairs:
        net = InferenceNet.of(read_prototxt(prototxt)).net
        kept = [layer for layer in net.layer if layer.type != "Softmax"]
        del net.layer[:]
        net.layer.extend(kept)
        engine = ONNX(net, Weights.read(weights), {"data": SHAPE})
        blobs = engine.compile(0, len(net.layer), wanted).run({"data": pixels}).blobs
        engine.close()
        found.append([blobs[blob].astype(np.float64) for blob in wanted])
    return found


def sqnr(full: np.ndarray, own: np.ndarray) -> float:
    return float(10 * np.log10(np.square(full).sum() / np.square(full - own).sum()))


def divergence(full: np.ndarray, own: np.ndarray) -> float:
    """Of the softmax over axis 1, mean over all else."""
    p, q = (np.exp(x) / np.exp(x).sum(axis=1, keepdims=True) for x in (full, own))
    return float((p * np.log(p / q)).sum(axis=1).mean())


@pytest.mark.parametrize("text", [CLASSIFIER, IN_PLACE], ids=["softmax", "softmax in place"])
def test_a_classifier_is_measured_before_its_softmax(tmp_path: Path, text: str) -> None:
    config, found = evaluated(tmp_path, text)
    [full], [own] = blobs_of(config, "net", "fc")
    assert found.scores == "fc"
    close = found.closeness["quantized"]
    assert close.agreement == pytest.approx(100 * (full.argmax(1) == own.argmax(1)).mean())
    assert close.divergence == pytest.approx(divergence(full, own), rel=1e-4)
    assert close.sqnr_db == pytest.approx(sqnr(full, own), abs=1e-3)
    labels = np.arange(IMAGES) % 7
    rights = [scores.argmax(1) == labels for scores in (full, own)]
    for name, right in zip(("fp32", "quantized"), rights, strict=True):
        accuracy = found.accuracy[name]
        assert accuracy.top1 == pytest.approx(100 * right.mean())
        assert accuracy.top1_interval == wilson(int(right.sum()), IMAGES)
        assert accuracy.right is not None
        bits = np.unpackbits(np.frombuffer(base64.b64decode(accuracy.right), np.uint8))[:IMAGES]
        np.testing.assert_array_equal(bits, right)
    paired = found.paired["quantized"]
    assert paired.first_only == (rights[0] & ~rights[1]).sum()
    assert paired.second_only == (rights[1] & ~rights[0]).sum()


def test_a_regressor_has_an_sqnr_and_no_accuracy(tmp_path: Path) -> None:
    config = job(tmp_path, LANDMARKS)
    Run(config).quantize(("weights",))
    transform = Transform(crop_size=9, scale=0.02, mean_value=(100.0,))
    net = read_prototxt(config.model.prototxt)
    feed = Feed({"data": images_of(tmp_path / "test_lmdb", transform, TEST)})
    full, noisy = Weights.read(config.model.weights), Weights.read(config.model.weights)
    noisy.replace("marks", [full["marks"][0] * 1.1, full["marks"][1]])
    candidates = candidates_of(net, full, noisy)
    found = evaluate(candidates, net_outputs(net), feed, ONNX)
    assert found.scores is None
    assert found.agreement is None
    assert found.accuracy["quantized"].top1 is None
    [output] = found.outputs
    assert (output.blob, output.classes, output.places) == ("marks", None, None)
    assert output.closeness["quantized"].sqnr_db == pytest.approx(20, abs=1.5)
    assert output.closeness["quantized"].agreement is None
    text = evaluation_text(found)
    assert text.splitlines()[-1] == f"on {IMAGES} images: no class scores, so nothing is said about accuracy"
    for word in ("top-1", "points"):
        assert word not in text


def test_a_detector_has_all_its_heads(tmp_path: Path) -> None:
    config, found = evaluated(tmp_path, DETECTOR)
    heads = [name for i in range(4) for name in (f"class{i}", f"box{i}")]
    assert [output.blob for output in found.outputs] == heads
    full, own = blobs_of(config, "net", *heads)
    for output, wide, narrow in zip(found.outputs, full, own, strict=True):
        close = output.closeness["quantized"]
        assert close.sqnr_db == pytest.approx(sqnr(wide, narrow), abs=1e-3)
        if output.blob.startswith("class"):
            assert (output.classes, output.places) == (4, 25)
            assert close.agreement == pytest.approx(100 * (wide.argmax(1) == narrow.argmax(1)).mean())
            assert close.divergence == pytest.approx(divergence(wide, narrow), rel=1e-4)
        else:
            assert (output.classes, output.places, close.agreement) == (None, None, None)
    assert found.scores is None
    text = evaluation_text(found)
    assert all(head in text for head in heads)
    assert "several outputs have class scores, and none is the main one" in text
    for word in ("top-1", "points"):
        assert word not in text
    assert '"agreement": null' in evaluation_json(found)
    page = (config.output / "report.html").read_text()
    assert "choose the same class" not in page
    assert "<h2>Outputs</h2>" in page


def test_a_segmentation_net_agrees_at_every_place(tmp_path: Path) -> None:
    config = job(tmp_path, SEGMENTATION)
    Run(config).quantize()
    heard = Heard()
    found = evaluate_run(config, progress=heard)
    [full], [own] = blobs_of(config, "net", "score")
    assert found.agreement == pytest.approx(100 * (full.argmax(1) == own.argmax(1)).mean())
    assert found.closeness["quantized"].divergence == pytest.approx(divergence(full, own), rel=1e-4)
    assert found.main is not None
    assert (found.main.classes, found.main.places) == (5, 25)
    assert found.accuracy["fp32"].top1 is None
    assert any("labels by place are not read, so no accuracy is counted" in note for note in heard.notes)
    text = evaluation_text(found)
    assert f"on {IMAGES} images, at 25 places each: agreement" in text
    assert "top-1" not in text


def test_a_plain_inner_product_counts_with_a_word_of_caution(tmp_path: Path) -> None:
    net = parse(STEM + product("fc", 7))
    weights = random_weights(InferenceNet.of(net).net, {"data": SHAPE})
    rng = np.random.default_rng(0)
    for number in range(5):
        assert cv2.imwrite(str(tmp_path / f"{number}.png"), rng.integers(0, 256, (9, 9, 3), np.uint8))
    feed = Feed({"data": images_of(tmp_path, Transform(), TEST)})
    found = evaluate(candidates_of(net, weights, weights), net_outputs(net), feed, ONNX)
    assert found.main is not None
    assert found.main.presumed
    assert evaluation_text(found).endswith("at most 0.00 points on them, if fc has class scores")


def candidates_of(net: NetParameter, *weights: Weights) -> dict[str, Model]:
    return {name: Model(net, w) for name, w in zip(("fp32", "quantized"), weights, strict=True)}


def test_values_that_are_not_finite_are_one_line(tmp_path: Path) -> None:
    """Of any output, the quantized net's too."""
    net = parse(DETECTOR)
    weights = random_weights(InferenceNet.of(net).net, {"data": SHAPE})
    huge = weights.copy()
    huge.replace("box2", [np.full_like(weights["box2"][0], 3e38), weights["box2"][1]])
    feed = Feed({"data": images_of(write_images(tmp_path / "lmdb", 5), Transform(crop_size=9), TEST)})
    with pytest.raises(LabelfreeError, match=r"^quantized: blob box2 is not finite"):
        evaluate(candidates_of(net, weights, huge), net_outputs(net), feed, ONNX)


def test_outputs_of_another_shape_are_one_line(tmp_path: Path) -> None:
    net, other = parse(CLASSIFIER), parse(CLASSIFIER.replace("num_output: 7", "num_output: 6"))
    candidates = {
        name: Model(each, random_weights(InferenceNet.of(each).net, {"data": SHAPE}))
        for name, each in (("fp32", net), ("quantized", other))
    }
    feed = Feed({"data": images_of(write_images(tmp_path / "lmdb", 5), Transform(crop_size=9), TEST)})
    with pytest.raises(InputError, match=r"output fc has the shape \(1, 6\) but \(1, 7\) in full precision"):
        evaluate(candidates, net_outputs(net), feed, ONNX)
    del other.layer[-2:]
    candidates["quantized"] = Model(other, candidates["quantized"].weights)
    with pytest.raises(InputError, match="has no output 'fc' any more; quantize again"):
        evaluate(candidates, net_outputs(net), feed, ONNX)
