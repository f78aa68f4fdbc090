"""Devices and pipes wherever a file is named: one line and exit code 2, at once. Each reader has a bound."""

import os
import subprocess
import sys

import pytest

from quantize.errors import InputError
from quantize.job.store import read_record
from tests.conftest import Job
from tests.test_troubleshooting import replace

SECONDS = 60
OPTIONS = ("--config", "--prototxt", "--weights", "--calibration")


def labelfree(job: Job, *arguments: str) -> str:
    """The one line that a command ends with."""
    done = subprocess.run(
        [sys.executable, "-m", "quantize.cli", "--quiet", *arguments],
        cwd=job.folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=SECONDS,
    )
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1
    return done.stderr


@pytest.fixture
def endless(job: Job) -> list[str]:
    os.mkfifo(job.folder / "pipe")
    return ["/dev/zero", "pipe"]


def test_options(job: Job, endless: list[str]) -> None:
    for option in OPTIONS:
        for path in endless:
            given = ["--config", "config.yaml", option, path]
            assert path in labelfree(job, "quantize", *given)


def test_inspect_and_init(job: Job, endless: list[str]) -> None:
    for path in endless:
        assert path in labelfree(job, "inspect", path)
        assert path in labelfree(job, "inspect", "net.prototxt", path)
        assert path in labelfree(job, "inspect", "net.prototxt", "--caffe-proto", path)
        files = ["--prototxt", "net.prototxt", "--calibration", "train_lmdb", "--config", "new.yaml"]
        assert path in labelfree(job, "init", *files, "--weights", path)


def test_files_that_files_name(job: Job, endless: list[str]) -> None:
    net, quantize = job.folder / "net.prototxt", ["quantize", "--config", "config.yaml"]
    for path in endless:
        mean = [*quantize, "--set", f"data.transform.mean_file={path}"]
        assert f"{path}: a " in labelfree(job, *mean)
        (job.folder / "list.txt").write_text(f"{path} 1\n")
        listed = labelfree(job, *quantize, "--calibration", "list.txt", "--set", "renorm.images=1")
        assert "list.txt, line 1: " in listed
        assert f"{path}: " in listed
    replace(net, "mean_value: 100", 'mean_file: "/dev/zero"')
    assert "/dev/zero: a device, not a file; the mean_file was expected" in labelfree(job, *quantize)
    (job.folder / "list.txt").write_text("/dev/zero 1\n")
    assert "list.txt" in labelfree(job, "make-lmdb", "list.txt", "new_lmdb")


def test_a_report_that_never_ends(job: Job) -> None:
    job.out.mkdir()
    os.symlink("/dev/zero", job.out / "report.json")
    with pytest.raises(InputError, match=r"report.json: a device, not a file"):
        read_record(job.out)
