"""Full disks, folders that cannot be written, inputs that vanish, interrupts: one line and no damage."""

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import quantize.pipeline
from quantize import cli
from quantize.caffenet import Weights
from quantize.cli import INTERRUPTED
from quantize.pipeline import Run
from tests.conftest import Job

NOBODY = 65534
COMMAND = [sys.executable, "-m", "quantize.cli", "--quiet", "quantize", "--config"]
ROOT = Path(__file__).parents[1]


def quantize(
    job: Job, *more: str, before: Callable[[], object] | None = None
) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [*COMMAND, str(job.yaml), *more],
        preexec_fn=before,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def assert_one_line(done: "subprocess.CompletedProcess[str]", code: int, *parts: str) -> None:
    assert done.returncode == code, done.stderr
    lines = done.stderr.strip().splitlines()  # click ends the line in which ^C stands
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("labelfree: ")
    for part in parts:
        assert part in done.stderr


def test_no_space_for_the_result(job: Job) -> None:
    """A file of the size of a full disk: what was there stays, nothing half written is left."""
    assert quantize(job).returncode == 0
    before = {path.name: path.read_bytes() for path in job.out.iterdir()}
    most = (job.out / "residual_quantized.caffemodel").stat().st_size // 2

    def small_files() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))

    done = quantize(job, "--set", "weights.bits=3", before=small_files)
    assert_one_line(done, 1, "residual_quantized.caffemodel", "cannot write", "unchanged")
    assert {path.name: path.read_bytes() for path in job.out.iterdir()} == before


def test_a_folder_that_one_may_not_write(
    job: Job, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in (job.folder, *job.folder.parents[:3]):
        folder.chmod(0o755)
    Run(job.config(f"output={job.folder / 'elsewhere'}")).quantize(("weights",))  # imports
    monkeypatch.setattr(sys, "argv", ["labelfree", "--quiet", "quantize", "--config", str(job.yaml)])
    job.out.mkdir(mode=0o555)
    user = os.geteuid()
    if user == 0:  # who may write everywhere
        os.seteuid(NOBODY)
    try:
        with pytest.raises(SystemExit) as end:
            cli.main()
    finally:
        os.seteuid(user)
    done = subprocess.CompletedProcess([], int(end.value.code or 0), "", capsys.readouterr().err)
    assert_one_line(done, 2, "cannot write here")
    assert not list(job.out.iterdir())


def started(job: Job, *more: str) -> "subprocess.Popen[str]":
    """A run whose first stage is over."""
    command = [*COMMAND, str(job.yaml), *more]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (job.out / "report.json").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return process


def finished(process: "subprocess.Popen[str]") -> "subprocess.CompletedProcess[str]":
    _, err = process.communicate(timeout=120)
    return subprocess.CompletedProcess(process.args, process.returncode, "", err)


@pytest.mark.parametrize("removed", ["train_lmdb", "net.caffemodel"])
def test_inputs_that_vanish_while_running(job: Job, removed: str) -> None:
    process = started(job)
    path = job.folder / removed
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    done = finished(process)
    if done.returncode:
        assert_one_line(done, done.returncode, removed)
    for written in job.out.glob("*.caffemodel"):
        Weights.read(written)
    assert not list(job.out.glob(".*"))


@pytest.mark.parametrize("shortened", ["train_lmdb/data.mdb", "net.caffemodel"])
def test_inputs_that_shrink_while_running(job: Job, shortened: str) -> None:
    """Where a mapped file would kill the process."""
    process = started(job)
    os.truncate(job.folder / shortened, 100)
    done = finished(process)
    if done.returncode:
        assert_one_line(done, 2, shortened.split("/", maxsplit=1)[0])
    assert not list(job.out.glob(".*"))


def test_ctrl_c_in_the_middle(job: Job) -> None:
    process = started(job, "--set", "renorm.memory=40kB")
    process.send_signal(signal.SIGINT)
    done = finished(process)
    assert_one_line(done, INTERRUPTED, "interrupted")
    assert not list(job.out.glob(".*"))
    assert quantize(job, "--resume").returncode == 0


def test_two_runs_at_once(job: Job) -> None:
    first = started(job)
    second = quantize(job)
    assert finished(first).returncode == 0
    if second.returncode:
        assert_one_line(second, 2, "another labelfree run is writing here")
    assert not list(job.out.glob(".*"))
