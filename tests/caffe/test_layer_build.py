"""The layer's own test program, and its GPU code under nvcc where that is installed."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
LAYERS = HERE.parents[1] / "caffe_layers"

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")


@pytest.fixture
def include(tmp_path: Path) -> Path:
    """A folder in which the layer's header has its place in Caffe's tree."""
    place = tmp_path / "include" / "caffe" / "layers" / "act_quantize.hpp"
    place.parent.mkdir(parents=True)
    shutil.copyfile(LAYERS / "act_quantize.hpp", place)
    return tmp_path / "include"


def nvcc(*args: str | Path) -> None:
    done = subprocess.run(["nvcc", "-std=c++17", *args], stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0, done.stderr


def caffe_headers(caffe_root: Path) -> list[str | Path]:
    """Options that add Caffe's headers and what these include, after the compiler's own."""
    folders = ["usr/local/include", "usr/include", "usr/include/x86_64-linux-gnu/openblas-pthread"]
    options = [f"-Xcompiler=-idirafter,{caffe_root / folder}" for folder in folders]
    return ["-I", HERE / "cuda_stubs", *options]


@pytest.mark.usefixtures("caffe_plugin")
def test_the_test_program_passes(caffe_run) -> None:
    done = caffe_run(["make", "-C", "/usr/local/src/labelfree", "test"], {})
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\[  PASSED  \] \d+ tests", done.stdout)


@needs_nvcc
def test_gpu_code_compiles_against_caffe(caffe_root: Path, include: Path, tmp_path: Path) -> None:
    nvcc("-I", include, *caffe_headers(caffe_root), "-c", LAYERS / "act_quantize.cu", "-o", tmp_path / "a.o")


@needs_nvcc
def test_gpu_code_rounds_as_the_cpu_even_with_fast_maths(
    caffe_root: Path, include: Path, tmp_path: Path
) -> None:
    ptx = tmp_path / "act_quantize.ptx"
    options = ["-use_fast_math", "-ptx", "-I", include, *caffe_headers(caffe_root)]
    nvcc(*options, LAYERS / "act_quantize.cu", "-o", ptx)
    arithmetic = set(re.findall(r"\b(?:div|add|mul|sub|fma|mad)\.[a-z.]*f(?:32|64)\b", ptx.read_text()))
    assert arithmetic == {
        *("div.rn.ftz.f32", "add.rn.ftz.f32", "mul.rn.ftz.f32"),
        *("div.rn.f64", "add.rn.f64", "mul.rn.f64"),
    }


@needs_nvcc
def test_gpu_equals_cpu(include: Path, tmp_path: Path) -> None:
    program = tmp_path / "act_quantize_gpu"
    nvcc(
        "-I", include, "-I", HERE / "cuda_standin", "-I", LAYERS, HERE / "act_quantize_gpu.cu", "-o", program
    )
    if shutil.which("nvidia-smi") is None:
        pytest.skip("compiled; no GPU to run it on")
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
