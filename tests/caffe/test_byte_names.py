"""Names that are no UTF-8, as nets made in China have: kept byte for byte, and the results are Caffe's."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from quantize.caffenet import Weights, read_prototxt
from quantize.caffenet.strings import to_text
from quantize.commands.config import load
from quantize.job.evaluation import evaluate_run
from quantize.job.run import Run
from tests.caffe.test_whole_job import IMAGES, PLUGIN

DIGITS = Path(__file__).parents[2] / "configs/models/digits"
GBK = "\u5377\u79ef1".encode("gbk")
assert len(GBK) == len(b"conv1")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The digits net with its first layer, and all that has its name in theirs, in GBK."""
    for name in ("digits.prototxt", "digits.caffemodel"):
        data = (DIGITS / name).read_bytes().replace(b"conv1", GBK)
        (tmp_path / name).write_bytes(b"# \xff\xb5\n" + data if name.endswith("prototxt") else data)
    (tmp_path / "config.yaml").write_text(f"""
name: digits
model: {{prototxt: digits.prototxt, weights: digits.caffemodel}}
data:
  calibration: {{source: {DIGITS}/calibration_lmdb, images: 200}}
  validation: {{source: {DIGITS}/test_lmdb, batch_size: 50}}
output: out
""")
    return tmp_path


def test_caffe_finds_the_layers_of_what_is_written(
    folder: Path, caffe_plugin: str, caffe_run: Callable[..., object]
) -> None:
    assert caffe_plugin == PLUGIN
    config = load(folder / "config.yaml")
    Run(config).quantize()
    prototxt, weights = folder / "out/digits_val.prototxt", folder / "out/digits_renorm.caffemodel"
    written = prototxt.read_bytes()
    assert b'name: "%b_alpha_term"' % GBK in written
    assert to_text(GBK + b"_alpha_term") in Weights.read(weights)
    assert b"\x0a\x10%b_alpha_term" % GBK in weights.read_bytes()
    assert to_text(GBK) in [layer.name for layer in read_prototxt(prototxt).layer]
    found = evaluate_run(config).accuracy["quantized"].top1
    assert found is not None
    done = caffe_run(
        [
            *("env", f"LD_PRELOAD={PLUGIN}", "caffe", "test", "--model", "net.prototxt"),
            *("--weights", "net.caffemodel", "--iterations", "16"),
        ],
        {
            "net.prototxt": re.sub(rb'source: "[^"]*test_lmdb"', b'source: "test_lmdb"', written),
            "net.caffemodel": weights,
            "test_lmdb": DIGITS / "test_lmdb",
        },
    )
    accuracy = re.search(r"caffe\.cpp:\d+\] \S*1 = ([\d.e-]+)\n", done.stderr)  # type: ignore[attr-defined]
    assert accuracy is not None, done.stderr  # type: ignore[attr-defined]
    assert round(float(accuracy[1]) * IMAGES) == round(found * IMAGES / 100)
