"""Real Caffe for tests: the folder that ``scripts/caffe_root`` makes.

Without that folder the tests that need it are skipped; with CI=true or LABELFREE_REQUIRE_CAFFE=1 they fail.
"""

import base64
import io
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
STAMP = ".labelfree-caffe-root"

FORWARD = """
import base64, ctypes, io, sys, numpy, caffe
ctypes.CDLL(sys.argv[1], ctypes.RTLD_GLOBAL)
net = caffe.Net('net.prototxt', caffe.TEST, weights='net.caffemodel')
inputs = numpy.load('inputs.npz')
for name in inputs.files:
    net.blobs[name].reshape(*inputs[name].shape)
    net.blobs[name].data[...] = inputs[name]
net.forward()
found = io.BytesIO()
numpy.savez(found, **{str(i): net.blobs[name].data for i, name in enumerate(sys.argv[2:])})
print(base64.b64encode(found.getvalue()).decode())
"""
"""Prints blobs of a net that Caffe has read and run."""

CaffeRun = Callable[[Sequence[str], Mapping[str, str | bytes | Path]], "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def caffe_root() -> Path:
    """The folder with Caffe; LABELFREE_CAFFE_ROOT names another than the usual one."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    root = Path(os.environ.get("LABELFREE_CAFFE_ROOT") or cache / "labelfree" / "caffe-bullseye")
    if not (root / STAMP).is_file():
        reason = f"no Caffe in {root}: run scripts/caffe_root {root}"
        if os.environ.get("CI") == "true" or os.environ.get("LABELFREE_REQUIRE_CAFFE") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    return root


@pytest.fixture(scope="session")
def caffe_python(caffe_root: Path) -> list[str]:
    """The interpreter that has pycaffe, as a command."""
    return [str(caffe_root / "enter"), "python3"]


@pytest.fixture(scope="session")
def caffe_plugin(caffe_root: Path) -> str:
    """The ActQuantize plug-in built from caffe_layers/ as it is now: its path inside ``caffe_root``."""
    subprocess.run([SCRIPTS / "caffe_root", caffe_root], check=True, stdout=subprocess.DEVNULL)
    return "/usr/local/lib/libact_quantize.so"


@pytest.fixture
def caffe_run(caffe_root: Path) -> CaffeRun:
    """Runs a command inside ``caffe_root``, in a folder of its own that holds the given files.

    A file is given as its text, its bytes or the path of a file or folder to copy; its name may hold folders.
    """

    def run(
        args: Sequence[str], files: Mapping[str, str | bytes | Path]
    ) -> "subprocess.CompletedProcess[str]":
        folder = Path(tempfile.mkdtemp(dir=caffe_root / "tmp"))
        try:
            for name, content in files.items():
                place = folder / name
                place.parent.mkdir(parents=True, exist_ok=True)
                if isinstance(content, bytes):
                    place.write_bytes(content)
                elif isinstance(content, str):
                    place.write_text(content, encoding="utf-8")
                elif content.is_dir():
                    shutil.copytree(content, place)
                else:
                    shutil.copyfile(content, place)
            inside = f"/tmp/{folder.name}"
            command = [caffe_root / "enter", "sh", "-c", 'cd "$0" && exec "$@"', inside, *args]
            return subprocess.run(
                command,
                env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=600,
            )
        finally:
            shutil.rmtree(folder)

    return run


CaffeForward = Callable[[str | Path, bytes | Path, Mapping[str, np.ndarray], Sequence[str]], list[np.ndarray]]


@pytest.fixture
def caffe_forward(caffe_run: CaffeRun, caffe_plugin: str) -> CaffeForward:
    """Runs a net as pycaffe reads it from its two files: prototxt, caffemodel, inputs, names of blobs.

    A net that Caffe refuses is an AssertionError with what Caffe said.
    """

    def forward(
        prototxt: str | Path,
        caffemodel: bytes | Path,
        inputs: Mapping[str, np.ndarray],
        blobs: Sequence[str],
    ) -> list[np.ndarray]:
        arrays = io.BytesIO()
        np.savez(arrays, **dict(inputs))
        done = caffe_run(
            ["python3", "-c", FORWARD, caffe_plugin, *blobs],
            {"net.prototxt": prototxt, "net.caffemodel": caffemodel, "inputs.npz": arrays.getvalue()},
        )
        assert done.returncode == 0, done.stderr[-2000:]
        with np.load(io.BytesIO(base64.b64decode(done.stdout.splitlines()[-1]))) as found:
            return [found[str(number)] for number in range(len(blobs))]

    return forward
