"""A net whose Reshape layers name the one image that they were written for, with several images."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from quantize.caffenet import InferenceNet, format_prototxt, load_weights, read_net
from quantize.commands.config import load
from quantize.data.make_lmdb import make_datum, write_lmdb
from quantize.engines.onnx.engine import OnnxEngine
from quantize.job.run import Run
from tests.caffe.conftest import CaffeForward
from tests.nets import parse, random_weights

SHAPE = (3, 8, 8)
NET = """
layer { name: "in" type: "Input" top: "data" input_param { shape { dim: %d dim: 3 dim: 8 dim: 8 } } }
layer { name: "c1" type: "Convolution" bottom: "data" top: "c1"
  convolution_param { num_output: 8 kernel_size: 3 } }
layer { name: "relu" type: "ReLU" bottom: "c1" top: "c1" }
layer { name: "turn" type: "Reshape" bottom: "c1" top: "turn"
  reshape_param { shape { dim: %d dim: 4 dim: -1 dim: 6 } } }
layer { name: "c2" type: "Convolution" bottom: "turn" top: "c2"
  convolution_param { num_output: 6 kernel_size: 3 } }
layer { name: "flat" type: "Reshape" bottom: "c2" top: "flat" reshape_param { shape { dim: %d dim: -1 } } }
layer { name: "fc" type: "InnerProduct" bottom: "flat" top: "fc" inner_product_param { num_output: 7 } }
"""


def images(count: int) -> np.ndarray:
    return np.random.default_rng(3).integers(0, 256, (count, *SHAPE)).astype(np.float32)


@pytest.fixture
def model(tmp_path: Path) -> Callable[[int], tuple[Path, Path]]:
    """The two files of the net for a batch."""

    def make(batch: int) -> tuple[Path, Path]:
        prototxt, weights = tmp_path / "net.prototxt", tmp_path / "net.caffemodel"
        prototxt.write_text(NET % ((batch,) * 3))
        net = InferenceNet.of(read_net(prototxt)).net
        with open(weights, "wb") as file:
            random_weights(net, {"data": SHAPE}).write(file)
        return prototxt, weights

    return make


@pytest.mark.parametrize("batch", [1, 4])
def test_any_batch_gives_what_the_batch_of_the_net_gives(
    batch: int, model: Callable[[int], tuple[Path, Path]], caffe_forward: CaffeForward
) -> None:
    prototxt, weights = model(batch)
    wanted = np.concatenate(
        [
            caffe_forward(prototxt, weights, {"data": images(8)[first : first + batch]}, ["fc"])[0]
            for first in range(0, 8, batch)
        ]
    )
    net = read_net(prototxt)
    whole = caffe_forward(format_prototxt(net), weights, {"data": images(8)}, ["fc"])[0]
    np.testing.assert_allclose(whole, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())
    engine = OnnxEngine(InferenceNet.of(net).net, load_weights(weights, net), {"data": SHAPE}, 1)
    ours = engine.compile(0, len(engine.net.layer), ["fc"]).run({"data": images(8)}).blobs["fc"]
    engine.close()
    np.testing.assert_allclose(ours, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("batch", [1, 4])
def test_the_job_on_such_a_net(
    batch: int,
    model: Callable[[int], tuple[Path, Path]],
    tmp_path: Path,
    caffe_run: Callable[..., object],
    caffe_forward: CaffeForward,
    caffe_plugin: str,
) -> None:
    """Both prototxts run in Caffe: one image in the one, five in the other."""
    prototxt, weights = model(batch)
    pixels = images(20).astype(np.uint8)
    write_lmdb(((f"{i:04d}", make_datum(image, i % 7)) for i, image in enumerate(pixels)), tmp_path / "lmdb")
    given = {
        "name": "net",
        "model.prototxt": str(prototxt),
        "model.weights": str(weights),
        "data.calibration.source": str(tmp_path / "lmdb"),
        "data.validation.source": str(tmp_path / "lmdb"),
        "output": str(tmp_path / "out"),
    }
    settings = ["renorm.images=20", "activations.images=20", "data.validation.batch_size=5"]
    Run(load(None, given, settings)).quantize()
    files = tmp_path / "out/net_val.prototxt", tmp_path / "out/net_renorm.caffemodel"
    text = re.sub(r'source: "[^"]*lmdb"', 'source: "lmdb"', files[0].read_text())
    script = (
        f"import ctypes, json, caffe\nctypes.CDLL({caffe_plugin!r}, ctypes.RTLD_GLOBAL)\n"
        "net = caffe.Net('net.prototxt', caffe.TEST, weights='net.caffemodel')\n"
        "print(json.dumps([net.forward() and net.blobs['fc'].data.tolist() for _ in range(4)]))\n"
    )
    done = caffe_run(
        ["python3", "-c", script],
        {"net.prototxt": text, "net.caffemodel": files[1], "lmdb": tmp_path / "lmdb"},
    )
    assert done.returncode == 0, done.stderr  # type: ignore[attr-defined]
    scores = np.array(json.loads(done.stdout.splitlines()[-1])).reshape(20, 7)  # type: ignore[attr-defined]
    deploy = tmp_path / "out/net_deploy.prototxt"
    assert parse(deploy.read_text()).layer[0].input_param.shape[0].dim[0] == 1
    for place in (0, 7, 19):
        one = caffe_forward(deploy, files[1], {"data": images(20)[place : place + 1]}, ["fc"])[0]
        np.testing.assert_allclose(one[0], scores[place], rtol=0, atol=1e-5 * np.abs(scores).max())
