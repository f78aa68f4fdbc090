"""`labelfree export --to` caffe, ncnn, mnn and ranges, `evaluate --runtime ncnn` and `unpack`."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import quantize
from quantize.caffenet import read_prototxt
from quantize.caffenet.quantized import ALPHA_SUFFIX
from quantize.exports.packed import unpack
from quantize.job.run import Run
from tests.conftest import Job

FILES = {
    "caffe": {
        *("residual_plain.prototxt", "residual_plain.caffemodel", "residual_scales.json", "residual.lfq"),
    },
    "ncnn": {"residual.param", "residual.bin", "residual.table"},
    "mnn": {"residual_plain.prototxt", "residual_plain.caffemodel", "residual_mnn.json", "residual.mnn"},
    "ranges": {
        *("residual_tpu_mlir.table", "residual_tensorrt.cache", "residual_amct.txt", "residual_qnn.json"),
        "residual_ranges.txt",
    },
}


@pytest.fixture(scope="module")
def quantized(job_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """One result for all tests here, which only add files to it."""
    job = Job(Path(shutil.copytree(job_template, tmp_path_factory.mktemp("quantized") / "job")))
    Run(job.config()).quantize()
    return job


def labelfree(job: Job, *words: str, fails: bool = False) -> str:
    """What a command prints; one line of error where it fails with code 2."""
    done = subprocess.run(
        [sys.executable, "-m", "quantize", "-q", *words, "--config", str(job.yaml)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == (2 if fails else 0), done.stderr
    if fails:
        assert done.stderr.count("\n") == 1
    return done.stderr if fails else done.stdout


@pytest.mark.parametrize("target", FILES)
def test_the_files_and_the_table(target: str, quantized: Job, tmp_path: Path) -> None:
    if target in ("ncnn", "mnn"):
        pytest.importorskip({"ncnn": "ncnn", "mnn": "_tools"}[target])
    folder = tmp_path / "exported"
    printed = labelfree(quantized, "export", "--to", target, "--output", str(folder), "--images", "5")
    assert {path.name for path in folder.iterdir()} == FILES[target]
    for path in folder.iterdir():
        assert f"{path} " in printed
    assert ("smaller" in printed) == (target != "ranges")
    assert ("on 5 images: SQNR" in printed) == (target == "ncnn")
    assert "in float: conv1: reads the input data, which is not on codes (activations.input)" in printed


def test_json(quantized: Job) -> None:
    found = json.loads(labelfree(quantized, "export", "--to", "ranges", "--json"))
    assert {Path(path).name for path in found["files"]} == FILES["ranges"]
    assert found["model_bytes"] is found["float_bytes"] is found["comparison"] is None
    found = json.loads(labelfree(quantized, "export", "--to", "caffe", "--json"))
    assert found["float_bytes"] == (quantized.folder / "net.caffemodel").stat().st_size
    assert found["model_bytes"] == (quantized.out / "residual.lfq").stat().st_size


def test_unpacking_gives_the_results_back(quantized: Job, tmp_path: Path) -> None:
    labelfree(quantized, "export", "--to", "caffe")
    command = [sys.executable, "-m", "quantize", "unpack", str(quantized.out / "residual.lfq")]
    subprocess.run([*command, "--output", str(tmp_path / "unpacked")], check=True, capture_output=True)
    ours = hashlib.sha256((quantized.out / "residual_renorm.caffemodel").read_bytes())
    theirs = hashlib.sha256((tmp_path / "unpacked" / "residual.caffemodel").read_bytes())
    assert ours.digest() == theirs.digest()
    prototxts = (quantized.out / "residual_deploy.prototxt", tmp_path / "unpacked" / "residual.prototxt")
    deploy, unpacked = map(read_prototxt, prototxts)
    assert [layer for layer in deploy.layer if layer.type != "Input"] == [
        layer for layer in unpacked.layer if layer.type != "Input"
    ]


def test_layers_are_kept_if_wanted(quantized: Job) -> None:
    labelfree(quantized, "export", "--to", "caffe", "--keep-layers")
    names = [layer.name for layer in read_prototxt(quantized.out / "residual_plain.prototxt").layer]
    assert f"left{ALPHA_SUFFIX}" in names
    assert "bn_left" in names


def test_evaluating_the_file(quantized: Job) -> None:
    pytest.importorskip("ncnn")
    labelfree(quantized, "export", "--to", "ncnn")
    found = json.loads(labelfree(quantized, "evaluate", "--runtime", "ncnn", "--json"))
    assert set(found) >= {"fp32", "quantized", "ncnn"}
    assert abs(found["ncnn"]["top1"] - found["quantized"]["top1"]) <= 100 / 15 + 0.01


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "damaged, or not a .param of ncnn, which begins with 7767517"),
        (b"\xff\x00" * 50, "damaged, or not a .param of ncnn"),
        (b"7767517\n1 1\nInput data 0\n", "damaged, or not a .param of ncnn"),
        (b"7767517\n1 1\nInput data 0 1 data\n", "it has no blob 'fc2'; export it again"),
        (b"7767517\n1 1\nInput data 0 1 fc2\n", "cannot read the weights of the ncnn net: No such file"),
    ],
)
def test_other_files_for_ncnn(content: bytes, words: str, quantized: Job, tmp_path: Path) -> None:
    pytest.importorskip("ncnn")
    path = tmp_path / "other.param"
    path.write_bytes(content)
    assert words in labelfree(quantized, "evaluate", "--runtime", "ncnn", "--file", str(path), fails=True)


@pytest.mark.parametrize("target", FILES)
def test_bad_input(target: str, job: Job) -> None:
    said = labelfree(job, "export", "--to", target, fails=True)
    assert "nothing quantized here yet; run `labelfree quantize` first" in said
    assert not list(job.folder.glob("out/*"))


def test_codes_of_a_full_byte_write_nothing(job: Job) -> None:
    Run(job.config("activations.levels=255")).quantize()
    before = sorted(job.out.iterdir())
    for target in ("ncnn", "mnn"):
        words = ("export", "--to", target, "--set", "activations.levels=255")
        said = labelfree(job, *words, fails=True)
        assert "codes 0 to 255" in said
        assert "quantize with activations.levels: 127" in said
    assert sorted(job.out.iterdir()) == before


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--to", "ncnn", "--codes", "int8"), "--codes is for --to onnx"),
        (("--to", "mnn", "--runtime", "openvino"), "--runtime is for --to onnx"),
        (("--to", "ranges", "--input", "pixels"), "--input is for --to onnx"),
        (("--to", "ncnn", "--keep-layers"), "--keep-layers is for --to caffe"),
        (("--to", "onx"), "'onx' is not one of 'onnx', 'caffe', 'ncnn', 'mnn', 'ranges'"),
    ],
)
def test_options_of_other_targets(words: tuple[str, ...], said: str, job: Job) -> None:
    assert said in labelfree(job, "export", *words, fails=True)


def test_from_python(quantized: Job, tmp_path: Path) -> None:
    pair = (quantized.out / "residual_deploy.prototxt", quantized.out / "residual_renorm.caffemodel")
    model = quantize.Model.load(*pair)
    for target in ("caffe", "ncnn", "ranges"):
        paths = quantize.export(model, tmp_path / target, target, name="residual")  # type: ignore[arg-type]
        assert {path.name for path in paths} == FILES[target]
    assert unpack(tmp_path / "caffe/residual.lfq", tmp_path)[1].read_bytes() == pair[1].read_bytes()
    quantize.export(model, tmp_path, "caffe", keep_layers=True)
    assert "bn_left" in (tmp_path / "residual_plain.prototxt").read_text()
