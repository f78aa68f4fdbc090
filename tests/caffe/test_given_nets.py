"""What users bring: deploy prototxts without Data layers, old formats, image files; real Caffe with them."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from google.protobuf import text_format

from quantize import cli
from quantize.caffenet import LayerParameter, NetParameter, filter_net, read_prototxt
from quantize.commands.config import load
from quantize.job.evaluation import evaluate_run
from quantize.job.run import Run
from quantize.settings import Config

CONFIGS = Path(__file__).parents[2] / "configs"
DIGITS = CONFIGS / "models/digits"
PLUGIN = "/usr/local/lib/libact_quantize.so"
TEST_IMAGES = 800


def old_deploy_net(statistics: str) -> str:
    """The digits net as people publish nets: an old ``input`` with its ``input_dim``, no data, no labels."""
    net = filter_net(read_prototxt(DIGITS / "digits.prototxt"), 1)
    layers = [layer for layer in net.layer if layer.type not in ("Data", "SoftmaxWithLoss", "Accuracy")]
    layers.append(LayerParameter(name="prob", type="Softmax", bottom=[layers[-1].top[0]], top=["prob"]))
    body = text_format.MessageToString(NetParameter(name="published", layer=layers))
    assert 'type: "BatchNorm"' in body
    body = body.replace('type: "BatchNorm"', f'type: "BatchNorm" batch_norm_param {{ {statistics} }}')
    return 'input: "data"\ninput_dim: 1 input_dim: 1 input_dim: 8 input_dim: 8\n' + body


def config_of(folder: Path) -> Config:
    return load(
        None,
        {
            "name": "published",
            "model.prototxt": str(folder / "deploy.prototxt"),
            "model.weights": str(DIGITS / "digits.caffemodel"),
            "data.calibration.source": str(DIGITS / "calibration_lmdb"),
            "data.validation.source": str(DIGITS / "test_lmdb"),
            "output": str(folder / "out"),
        },
        ["data.transform={scale: 0.125, mean_value: 5}", "renorm.images=997", "weights.solver=reference"],
    )


@pytest.mark.parametrize("statistics", ["use_global_stats: true", "use_global_stats: false"])
def test_caffe_test_of_a_deploy_prototxt(
    statistics: str, tmp_path: Path, caffe_plugin: str, caffe_run: Callable[..., object]
) -> None:
    assert caffe_plugin == PLUGIN
    (tmp_path / "deploy.prototxt").write_text(old_deploy_net(statistics))
    config = config_of(tmp_path)
    Run(config).quantize()
    ours = evaluate_run(config).accuracy["quantized"]
    text = (tmp_path / "out/published_val.prototxt").read_text()
    done = caffe_run(
        [
            *("env", f"LD_PRELOAD={PLUGIN}", "caffe", "test", "--model", "net.prototxt"),
            *("--weights", "net.caffemodel", "--iterations", str(TEST_IMAGES // 50)),
        ],
        {
            "net.prototxt": re.sub(r'source: "[^"]*"', 'source: "test_lmdb"', text),
            "net.caffemodel": tmp_path / "out/published_renorm.caffemodel",
            "test_lmdb": DIGITS / "test_lmdb",
        },
    )
    found = dict(re.findall(r"caffe\.cpp:\d+\] accuracy/(top-\d) = ([\d.e-]+)\n", done.stderr))  # type: ignore[attr-defined]
    assert found.keys() == {"top-1", "top-5"}, done.stderr  # type: ignore[attr-defined]
    for key, value in (("top1", found["top-1"]), ("top5", found["top-5"])):
        assert getattr(ours, key) == pytest.approx(100 * float(value), abs=0.01)
    assert ours.top1 is not None
    assert ours.top1 > 90


def test_caffe_reads_what_make_lmdb_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caffe_run: Callable[..., object]
) -> None:
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (3, 7, 5, 3), np.uint8)
    for index, picture in enumerate(pictures):
        cv2.imwrite(str(tmp_path / f"{index}.png"), picture)
    (tmp_path / "list.txt").write_text("".join(f"{index}.png {10 + index}\n" for index in range(3)))
    arguments = ["make-lmdb", str(tmp_path / "list.txt"), str(tmp_path / "lmdb")]
    monkeypatch.setattr(sys, "argv", ["labelfree", "--quiet", *arguments])
    cli.main()
    net = (
        'layer { name: "data" type: "Data" top: "data" top: "label" include { phase: TEST } '
        'data_param { source: "lmdb" batch_size: 3 backend: LMDB } }'
    )
    script = (
        "import caffe, json\n"
        "net = caffe.Net('net.prototxt', caffe.TEST)\n"
        "net.forward()\n"
        "print(json.dumps({name: blob.data.tolist() for name, blob in net.blobs.items()}))\n"
    )
    done = caffe_run(["python3", "-c", script], {"net.prototxt": net, "lmdb": tmp_path / "lmdb"})
    assert done.returncode == 0, done.stderr  # type: ignore[attr-defined]
    found = json.loads(done.stdout.splitlines()[-1])  # type: ignore[attr-defined]
    assert found["label"] == [10, 11, 12]
    np.testing.assert_array_equal(np.array(found["data"]), pictures.transpose(0, 3, 1, 2))
