"""The MNN target: its own converter takes the file, its runtime computes in integers what labelfree does."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from quantize.caffenet.model import Model
from quantize.engines.onnx.engine import OnnxEngine
from quantize.errors import InputError
from quantize.exports import mnn
from quantize.exports.integers import IntegerNet, whole_codes
from quantize.exports.mnn import export_mnn
from tests.families import family
from tests.stages.test_sites import quantized_net

pytest.importorskip("_tools", reason="MNN is not installed")

RUN = """
import sys
import MNN, numpy as np
from collections import Counter
net = MNN.Interpreter(sys.argv[1])
session = net.createSession({"numThread": 1, "precision": "high"})
images = np.load(sys.argv[2])
given, scores, kinds = net.getSessionInput(session), [], Counter()
def seen(tensors, info):
    kinds[info.getType()] += 1
    return True
for number, image in enumerate(images):
    given.copyFrom(
        MNN.Tensor(image[None].shape, MNN.Halide_Type_Float, image[None], MNN.Tensor_DimensionType_Caffe)
    )
    net.runSessionWithCallBackInfo(session, seen, seen)
    made = net.getSessionOutput(session, sys.argv[4])
    shape = made.getShape()
    host = MNN.Tensor(shape, MNN.Halide_Type_Float, np.zeros(shape, "f4"), MNN.Tensor_DimensionType_Caffe)
    made.copyToHostTensor(host)
    scores.append(np.array(host.getData()).reshape(-1))
np.savez(sys.argv[3], scores=np.array(scores), kinds=list(kinds), counts=list(kinds.values()))
"""
"""In a process of its own: MNN speaks to standard output."""


def in_mnn(content: bytes, images: np.ndarray, blob: str, folder: Path) -> tuple[np.ndarray, Counter[str]]:
    """Scores of images, and which kinds of layers have run how often per image."""
    (folder / "net.mnn").write_bytes(content)
    np.save(folder / "images.npy", images)
    subprocess.run(
        [sys.executable, "-c", RUN, "net.mnn", "images.npy", "found.npz", blob],
        cwd=folder,
        check=True,
        capture_output=True,
    )
    with np.load(folder / "found.npz") as found:
        kinds = dict(zip(found["kinds"].tolist(), found["counts"].tolist(), strict=True))
        return found["scores"], Counter({kind: count // (2 * len(images)) for kind, count in kinds.items()})


def made(name: str) -> tuple[Model, IntegerNet, dict[str, np.ndarray]]:
    quantized, weights, feeds = quantized_net(family(name), sums=True, input=True)
    model = Model(quantized, weights)
    return model, IntegerNet.of(model), feeds


def test_mnn_computes_the_same(tmp_path: Path) -> None:
    model, net, feeds = made("resnet")
    exported = export_mnn(net, "net")
    engine = OnnxEngine(model.inference.net, model.weights, {"data": feeds["data"].shape[1:]}, threads=1)
    wanted = engine.compile(0, len(model.inference.net.layer), ["fc"]).run(feeds).blobs["fc"]
    found, kinds = in_mnn(exported.files["net.mnn"], feeds["data"], "fc", tmp_path)
    assert np.abs(found - wanted).max() <= 0.02 * np.abs(wanted).max()
    convolutions = [layer for layer in net.net.layer if layer.type == "Convolution"]
    assert kinds["Convolution [ DT_INT8 ] "] == len(convolutions)
    assert kinds["Convolution"] == 1
    assert list(exported.floats) == ["fc"]


def test_the_weights_are_ours() -> None:
    _, net, _ = made("resnet")
    pipeline = json.loads(export_mnn(net, "net").files["net_mnn.json"])
    for layer in pipeline["algo"][0]["quantParams"]["layer"]:
        [weight] = layer["weight"]
        kernels = net.weights[weight["name"]][0]
        codes = np.rint(kernels.reshape(len(kernels), -1) / np.array(weight["scales"])[:, None])
        np.testing.assert_array_equal(codes, whole_codes(net.layers[weight["name"]]).codes)
        assert weight["clampMin"] <= codes.min() <= codes.max() <= weight["clampMax"]
        for tensor in (*layer["input"], *layer["output"]):
            [scale] = tensor["scales"]
            assert scale in {quantizer.step for quantizer in net.quantizers.values()}
            assert tensor["name"] in {name for layer in net.net.layer for name in (*layer.bottom, *layer.top)}


def test_what_mnn_lacks_is_told_in_its_words() -> None:
    _, net, _ = made("lite")
    with pytest.raises(InputError, match=r"MNN's converter cannot convert this net: .*Caffe::Clip.*; exp"):
        export_mnn(net, "net")


def test_codes_of_a_full_byte_are_refused() -> None:
    quantized, weights, _ = quantized_net(family("resnet"), levels=255)
    net = IntegerNet.of(Model(quantized, weights))
    with pytest.raises(
        InputError, match="blob 'stem': codes 0 to 255; for MNN they go to 127: quantize with"
    ):
        export_mnn(net, "net")


def test_without_mnn_there_is_the_file_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    _, net, _ = made("resnet")
    monkeypatch.setattr(mnn, "find_spec", lambda _name: None)
    exported = export_mnn(net, "net")
    assert set(exported.files) == {"net_plain.prototxt", "net_plain.caffemodel", "net_mnn.json"}
    assert exported.notes == ("MNN is not installed, so there is no net.mnn: pip install 'labelfree[mnn]'",)


def test_nothing_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MNN's command line installs a package for its log."""
    pip = tmp_path / "pip"
    pip.write_text(f"#!/bin/sh\ntouch {tmp_path}/called\n")
    pip.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    _, net, _ = made("resnet")
    assert "net.mnn" in export_mnn(net, "net").files
    assert not (tmp_path / "called").exists()
