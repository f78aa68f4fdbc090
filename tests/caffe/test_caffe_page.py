"""docs/caffe.md: every command on the page runs, the ones for Caffe in real Caffe."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from quantize.commands.config import load
from quantize.commands.layers import put_layers
from quantize.job.run import Run
from tests.commands.test_layers import caffe, files, ours  # noqa: F401 - a fixture
from tests.test_docs import blocks

ROOT = Path(__file__).parents[2]
BLOCKS = list(blocks(ROOT / "docs/caffe.md"))


@pytest.fixture
def home(caffe: Path, caffe_root: Path, tmp_path: Path) -> Path:  # noqa: F811
    """A home with a Caffe source tree in it, and the folder of scripts/caffe_root where that looks for it."""
    (tmp_path / "caffe").symlink_to(caffe)
    (tmp_path / "cache/labelfree").mkdir(parents=True)
    (tmp_path / "cache/labelfree/caffe-bullseye").symlink_to(caffe_root)
    return tmp_path


def run(script: str, home: Path) -> str:
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=ROOT,
        env={
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "HOME": str(home),
            "XDG_CACHE_HOME": str(home / "cache"),
        },
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, f"{script}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_commands_outside_of_caffe(home: Path) -> None:
    install, remove, write, make_root = (block.text for block in BLOCKS if block.kind == "sh")
    before = files(home / "caffe")
    run(install, home)
    assert files(home / "caffe") == before | ours()
    run(remove, home)
    assert files(home / "caffe") == before
    run(write, home)
    assert (home / "act_quantize" / "Makefile").exists()
    printed = run(make_root, home)
    usage = re.search(r"^  (.* python3 -c 'import caffe')$", printed, re.MULTILINE)
    assert usage is not None, printed
    run(usage[1], home)


def test_commands_in_caffe(
    caffe_run: Callable[..., "subprocess.CompletedProcess[str]"], tmp_path: Path
) -> None:
    out, digits = tmp_path / "out", ROOT / "configs/models/digits"
    Run(load(ROOT / "configs/digits.yaml", {"output": str(out)})).quantize()
    put_layers(tmp_path / "act_quantize")
    val = (out / "digits_val.prototxt").read_text().replace(f"{digits}/", "")
    names = ("digits_deploy.prototxt", "digits_renorm.caffemodel")
    brought = {
        "out/digits/digits_val.prototxt": val,
        **{f"out/digits/{name}": out / name for name in names},
        "test_lmdb": digits / "test_lmdb",
        **{f"act_quantize/{path.name}": path for path in (tmp_path / "act_quantize").iterdir()},
    }
    in_shell, in_python = (block for block in BLOCKS if block.kind.endswith(" caffe"))
    assert (in_shell.kind, in_python.kind) == ("sh caffe", "python caffe")
    script = f"({in_shell.text})\npython3 - <<'END'\n{in_python.text}END\n"
    done = caffe_run(["env", "GLOG_minloglevel=0", "sh", "-euc", script], brought)
    assert done.returncode == 0, done.stdout + done.stderr
    accuracy = re.search(r"caffe\.cpp:\d+\] \S+ = ([\d.]+)\n", done.stderr)
    assert accuracy is not None, done.stderr
    assert float(accuracy[1]) > 0.9
    assert re.search(r"^layers 13$", done.stdout, re.MULTILINE)
