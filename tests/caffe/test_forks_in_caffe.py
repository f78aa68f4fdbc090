"""Layers of forks in the forms of Caffe 1.0 (model.write: bvlc): pycaffe computes what the forks do."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from quantize.caffenet import InferenceNet, Weights, format_prototxt, load_weights, read_prototxt
from quantize.caffenet.bvlc import in_bvlc_forms
from quantize.commands.config import load
from quantize.engines.onnx.engine import OnnxEngine
from quantize.job.run import Run
from tests.caffenet.test_bvlc import LAYERS, model_of
from tests.families import HEAD, dense
from tests.wild.nets import IMAGE
from tests.wild.test_families import write_family


def ours(net_path: Path, weights: Weights, feeds: dict[str, np.ndarray]) -> tuple[str, np.ndarray]:
    """The scores of a prototxt, by the embedded engine."""
    test = InferenceNet.of(read_prototxt(net_path))
    engine = OnnxEngine(test.net, weights, {name: feed.shape[1:] for name, feed in feeds.items()}, 1)
    return test.scores, engine.compile(0, len(test.net.layer), [test.scores]).run(feeds).blobs[test.scores]


@pytest.mark.parametrize("fork", LAYERS)
def test_caffe_computes_what_the_fork_does(
    fork: str, tmp_path: Path, caffe_forward: Callable[..., list[np.ndarray]]
) -> None:
    net, weights = model_of(HEAD + LAYERS[fork] + dense("fc", "n" if fork == "SENet" else "c", 3), tmp_path)
    feeds = {"data": np.random.default_rng(1).normal(size=(1, *IMAGE)).astype(np.float32)}
    scores, wanted = ours(tmp_path / "net.prototxt", weights, feeds)
    stock = in_bvlc_forms(net)
    caffemodel = io.BytesIO()
    load_weights(tmp_path / "net.caffemodel", stock).write(caffemodel)
    [found] = caffe_forward(format_prototxt(stock), caffemodel.getvalue(), feeds, [scores])
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())


def test_a_job_whose_results_are_of_caffe(
    tmp_path: Path, caffe_forward: Callable[..., list[np.ndarray]]
) -> None:
    """NVCaffe's net and fp16 caffemodel go in, what Caffe 1.0 runs comes out."""
    write_family("nvcaffe", tmp_path)
    net = tmp_path / "net.prototxt"
    net.write_text(net.read_text().replace("engine: CUDNN", ""))  # which a Caffe without a GPU refuses
    (tmp_path / "job.yaml").write_text(
        "name: nv\nmodel: {prototxt: net.prototxt, weights: net.caffemodel, write: bvlc}\n"
        "data: {calibration: {source: images}}\noutput: out\n"
    )
    Run(load(tmp_path / "job.yaml", assignments=["threads=1"])).quantize()
    deploy, caffemodel = tmp_path / "out/nv_deploy.prototxt", tmp_path / "out/nv_renorm.caffemodel"
    feeds = {"data": np.random.default_rng(1).normal(100, 50, size=(1, *IMAGE)).astype(np.float32)}
    scores, wanted = ours(deploy, Weights.read(caffemodel), feeds)
    [found] = caffe_forward(deploy.read_text(), caffemodel.read_bytes(), feeds, [scores])
    assert np.abs(found - wanted).max() <= 0.02 * np.abs(wanted).max()
    assert "forward_type" not in deploy.read_text()
