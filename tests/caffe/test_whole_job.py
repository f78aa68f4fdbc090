"""The whole job against real Caffe: `caffe test` runs what it writes, and either engine gives the same."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from quantize.caffenet import Weights, read_prototxt
from quantize.commands.config import load
from quantize.job.evaluation import evaluate_run
from quantize.job.run import Run
from quantize.record import Accuracy
from quantize.settings import Config

CONFIGS = Path(__file__).parents[2] / "configs"
PLUGIN = "/usr/local/lib/libact_quantize.so"
IMAGES = 800


def config_in(folder: Path, *assignments: str) -> Config:
    return load(CONFIGS / "digits.yaml", {"output": str(folder)}, assignments)


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    Run(config_in(folder)).quantize()
    return folder


def caffe_test(caffe_run: Callable[..., object], prototxt: Path, weights: Path) -> dict[str, float]:
    """Accuracy in percent by the name of the Accuracy layer's top, from `caffe test` over all test images."""
    text = prototxt.read_text()
    test_lmdb = CONFIGS / "models/digits/test_lmdb"
    text = re.sub(r'source: "[^"]*test_lmdb"', 'source: "test_lmdb"', text)
    done = caffe_run(
        [
            *("env", f"LD_PRELOAD={PLUGIN}", "caffe", "test", "--model", "net.prototxt"),
            *("--weights", "net.caffemodel", "--iterations", "16"),
        ],
        {"net.prototxt": text, "net.caffemodel": weights, "test_lmdb": test_lmdb},
    )
    found = re.findall(r"caffe\.cpp:\d+\] (\S+) = ([\d.e-]+)\n", done.stderr)  # type: ignore[attr-defined]
    assert found, done.stderr  # type: ignore[attr-defined]
    return {name: 100 * float(value) for name, value in found}


def assert_same_images(caffe: dict[str, float], ours: Accuracy) -> None:
    """The same number of right images."""
    for value, k in ((ours.top1, 1), (ours.top5, 5)):
        tops = [name for name in caffe if re.search(rf"(top|acc\w*)\D*{k}$", name)]
        assert len(tops) == 1, caffe
        assert value is not None
        assert round(caffe[tops[0]] * IMAGES / 100) == round(value * IMAGES / 100)


def test_evaluate_counts_what_caffe_test_counts(
    quantized: Path, caffe_plugin: str, caffe_run: Callable[..., object]
) -> None:
    assert caffe_plugin == PLUGIN
    found = evaluate_run(config_in(quantized))
    assert found.images == IMAGES
    models = CONFIGS / "models/digits"
    assert_same_images(
        caffe_test(caffe_run, models / "digits.prototxt", models / "digits.caffemodel"),
        found.accuracy["fp32"],
    )
    assert_same_images(
        caffe_test(caffe_run, quantized / "digits_val.prototxt", quantized / "digits_renorm.caffemodel"),
        found.accuracy["quantized"],
    )


def test_either_engine_gives_the_same(
    quantized: Path, caffe_python: list[str], caffe_plugin: str, tmp_path: Path
) -> None:
    through_caffe = config_in(
        tmp_path, "engine=caffe", f"caffe.python={caffe_python}", f"caffe.preload={caffe_plugin}"
    )
    Run(through_caffe).quantize()
    ours, theirs = (Weights.read(folder / "digits_renorm.caffemodel") for folder in (quantized, tmp_path))
    assert ours.layers() == theirs.layers()
    for name in ours.layers():
        for a, b in zip(ours[name], theirs[name], strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6 * np.abs(b).max())
    steps = [
        {layer.name: layer.relu_param.negative_slope for layer in net.layer if layer.type == "ActQuantize"}
        for net in (read_prototxt(folder / "digits_val.prototxt") for folder in (quantized, tmp_path))
    ]
    assert steps[0] == pytest.approx(steps[1], rel=1e-3)
    found = evaluate_run(through_caffe)
    assert found.agreement > 97
    assert found.accuracy["quantized"].top1 == evaluate_run(config_in(quantized)).accuracy["quantized"].top1


def test_the_deploy_prototxt_gives_the_same_scores_in_caffe(
    quantized: Path, caffe_plugin: str, caffe_run: Callable[..., object]
) -> None:
    script = (
        "import ctypes, numpy, caffe\n"
        f"ctypes.CDLL({caffe_plugin!r}, ctypes.RTLD_GLOBAL)\n"
        "net = caffe.Net('net.prototxt', caffe.TEST, weights='net.caffemodel')\n"
        "net.blobs['data'].data[...] = 0.25\n"
        "print(list(net.forward().values())[0].ravel().tolist())\n"
    )
    done = caffe_run(
        ["python3", "-c", script],
        {
            "net.prototxt": quantized / "digits_deploy.prototxt",
            "net.caffemodel": quantized / "digits_renorm.caffemodel",
        },
    )
    assert done.returncode == 0, done.stderr  # type: ignore[attr-defined]
    scores = np.array(json.loads(done.stdout.splitlines()[-1]))  # type: ignore[attr-defined]
    assert scores.shape == (10,)
    assert np.isfinite(scores).all()
