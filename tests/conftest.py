"""A small job that tests can run: a residual net, its caffemodel and two LMDBs in a folder of their own.

With CI=true a skipped test counts as failed, but for what needs a GPU, its compiler, or the right to mount.
"""

import os
import shutil
import signal
import sys
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import hypothesis
import pytest

from quantize import cli
from quantize.caffenet import InferenceNet
from quantize.commands.config import load
from quantize.settings import Config
from tests.nets import CROPPED, RESIDUAL, parse, random_weights, write_images

# A shell that starts the tests in the background has them ignore Ctrl-C; so would the commands they start.
signal.signal(signal.SIGINT, signal.default_int_handler)

# How long an example takes says nothing on a machine that does other work as well.
hypothesis.settings.register_profile("no deadline", deadline=None)
hypothesis.settings.load_profile("no deadline")

EXPECTED_SKIPS = ("no GPU", "nvcc is not installed", "nobody may mount here")
YAML = """
name: residual
model: {prototxt: net.prototxt, weights: net.caffemodel}
data:
  calibration: {source: train_lmdb}
  validation: {source: test_lmdb, batch_size: 5}
renorm: {images: 20}
activations: {images: 12}
output: out
"""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    expected = any(reason in str(report.longrepr) for reason in EXPECTED_SKIPS)
    if report.skipped and os.environ.get("CI") == "true" and not expected:
        report.outcome = "failed"
        report.longrepr = f"unexpected skip in CI: {report.longrepr}"
    return report


@dataclass(frozen=True)
class Job:
    """A folder with everything one run needs."""

    folder: Path

    @property
    def yaml(self) -> Path:
        return self.folder / "config.yaml"

    @property
    def out(self) -> Path:
        return self.folder / "out"

    def config(self, *assignments: str) -> Config:
        return load(self.yaml, assignments=assignments)


@pytest.fixture(scope="session")
def job_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("job")
    (folder / "net.prototxt").write_text(RESIDUAL)
    weights = random_weights(InferenceNet.of(parse(RESIDUAL)).net, {"data": CROPPED})
    with open(folder / "net.caffemodel", "wb") as file:
        weights.write(file)
    write_images(folder / "train_lmdb", 20)
    write_images(folder / "test_lmdb", 15, seed=1)
    (folder / "config.yaml").write_text(YAML)
    return folder


@pytest.fixture
def make_job(job_template: Path, tmp_path: Path) -> Callable[[str], Job]:
    def make(name: str) -> Job:
        return Job(Path(shutil.copytree(job_template, tmp_path / name)))

    return make


@pytest.fixture
def job(make_job: Callable[[str], Job]) -> Job:
    return make_job("job")


class Outcome(NamedTuple):
    """How a command ended, and what it printed."""

    code: int
    out: str
    err: str


Labelfree = Callable[..., Outcome]


@pytest.fixture
def labelfree(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Labelfree:
    """The command line, in this process."""

    def run(*arguments: str | Path) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["labelfree", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = int(end.code or 0)
        printed = capsys.readouterr()
        return Outcome(code, printed.out, printed.err)

    return run


def assert_one_line(outcome: Outcome, *parts: str) -> None:
    """Exit code 2 and one line that has all the parts."""
    lines = [line for line in outcome.err.splitlines() if line.startswith("labelfree: ")]
    assert (outcome.code, len(lines)) == (2, 1), outcome
    assert "Traceback" not in outcome.err
    for part in parts:
        assert part in lines[0]
