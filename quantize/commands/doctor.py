"""`labelfree doctor`: what works here, and for each fault the remedy."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import numpy as np

from quantize.caffenet import TRAIN, InferenceNet, LayerParameter, NetParameter, Weights, doubtful_norms
from quantize.data.transform import Transform
from quantize.engines import engine_opener
from quantize.engines.caffe.engine import Worker
from quantize.errors import LabelfreeError
from quantize.host import available_threads
from quantize.job.feeds import effective_transform
from quantize.job.run import LIBRARIES, Run
from quantize.progress import Progress
from quantize.settings import CaffeProcess, Config

MEMINFO = Path("/proc/meminfo")
PROBE = np.array([[[[-1.0, 0.24, 0.26, 99.0]]]], np.float32)
"""Input of the engine check."""
PROBED = {0: [0.0, 0.0, 0.5, 63.5], -127: [-1.0, 0.0, 0.5, 63.5]}
"""What ActQuantize layers of step 0.5 make of it, by threshold."""


@dataclass(frozen=True)
class Check:
    """One finding: what was looked at, how it is, and what was seen (with the remedy if it is not well).

    ``FAIL`` is what `quantize` would stop at, ``warn`` what it would go on with.
    """

    what: str
    state: Literal["ok", "warn", "FAIL"]
    seen: str


def _check(what: str, well: bool, seen: str) -> Check:
    return Check(what, "ok" if well else "FAIL", seen)


def examine(
    config: Config | None, process: CaffeProcess | None, choose_transform: bool = False
) -> Iterator[Check]:
    """All checks, one after another.

    Args:
        config: the job to check, if any.
        process: how to start pycaffe, where the Caffe engine is to be checked.
        choose_transform: see `Run`.
    """
    yield _check(
        "python", sys.version_info >= (3, 10), f"{platform.python_version()} (3.10 or newer is needed)"
    )
    for name in LIBRARIES:
        yield _library(name)
    yield Check("processors", "ok", f"{available_threads()} usable")
    yield _memory(config)
    yield _attempt("onnx engine", lambda: _engine("onnx", CaffeProcess()))
    if process is not None:
        worker = _attempt("caffe worker", lambda: _caffe_worker(process))
        yield worker
        if worker.state == "ok":
            yield _attempt("caffe plug-in", lambda: _engine("caffe", process))
    if config is not None:
        yield from _job(config, choose_transform)
        yield _output(config.output)


def _library(name: str) -> Check:
    try:
        return Check(name, "ok", version(name))
    except PackageNotFoundError:
        return Check(name, "FAIL", f"not installed: pip install {name}")


def _memory(config: Config | None) -> Check:
    try:
        fields = dict(line.split(":", 1) for line in MEMINFO.read_text().splitlines())
        available = int(fields["MemAvailable"].split()[0]) << 10
    except (OSError, KeyError, ValueError):
        return Check("memory", "ok", "unknown")
    needed = (config.memory if config else None) or 0
    shown = f"{available / 2**30:.1f} GiB available"
    if needed > available:
        return Check("memory", "FAIL", f"{shown}, `memory` allows {needed / 2**30:.1f} GiB: lower it")
    return Check("memory", "ok", shown)


def _attempt(what: str, work: Callable[[], str]) -> Check:
    try:
        return Check(what, "ok", work())
    except (LabelfreeError, OSError) as error:
        return Check(what, "FAIL", " ".join(str(error).split()))


def _engine(name: str, process: CaffeProcess) -> str:
    """Run two ActQuantize layers, of unsigned and of signed codes."""
    for threshold, wanted in PROBED.items():
        layer = LayerParameter(name="probe", type="ActQuantize", bottom=["data"], top=["probe"])
        layer.relu_param.negative_slope = 0.5
        layer.threshold_param.threshold = threshold
        engine = engine_opener(name, process, 1)(
            NetParameter(layer=[layer]), Weights(), {"data": PROBE.shape[1:]}
        )
        try:
            computed = engine.compile(0, 1, ["probe"]).run({"data": PROBE}).blobs["probe"]
        finally:
            engine.close()
        if computed.ravel().tolist() != wanted:
            raise LabelfreeError(
                f"its ActQuantize computes {computed.ravel().tolist()}: install ours (docs/caffe.md)"
            )
    return "runs, ActQuantize too"


def _caffe_worker(process: CaffeProcess) -> str:
    """Start pycaffe."""
    with closing(Worker(process.python, process.pycaffe_path, process.preload, 1)) as worker:
        return ", ".join(f"{name} {number}" for name, number in worker.versions.items())


class _Notes(Progress):
    """Keeps what a run would say about its guesses."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def note(self, text: str) -> None:
        if text not in self.texts:
            self.texts.append(text)


def _job(config: Config, choose_transform: bool) -> Iterator[Check]:
    """What `quantize` would look at before it begins."""
    heard = _Notes()
    runs: list[Run] = []

    def prototxt() -> str:
        run = Run(config, heard, choose_transform)
        test = InferenceNet.of(run.net)
        runs.append(run)
        more = f"; {len(test.trailing)} behind them are carried over" if test.trailing else ""
        return f"{len(test.net.layer)} layers from {', '.join(test.inputs)} to {test.scores}{more}"

    yield _attempt("model.prototxt", prototxt)
    if not runs:
        return
    checks = [_attempt(what, look) for what, look in runs[0].checks()]
    yield from checks
    if checks[0].state == "ok":
        norms = doubtful_norms(InferenceNet.of(runs[0].net).net, runs[0].given.model.weights)
        yield from (Check("BatchNorm", "FAIL", line) for line in norms)
    if all(check.state == "ok" for check in checks):
        yield _transform(runs[0])
    yield from (Check("note", "ok", text) for text in heard.texts)


def _transform(run: Run) -> Check:
    """What is not at its default, and how the images then fit the net's statistics of training."""
    try:
        run.choose_transform()
        transform = effective_transform(run.given, TRAIN)
        check = run.transform_check()
    except LabelfreeError as error:
        return Check("transform", "FAIL", str(error))
    chosen = {field.name: getattr(transform, field.name) for field in fields(transform)}
    shown = [f"{key} {value}" for key, value in chosen.items() if value != getattr(Transform(), key)]
    said = [", ".join(shown) or "none: pixels as they are"]
    if check is not None:
        said += [check.finding, check.remedy] if check.doubtful else [check.finding]
    return Check("transform", "warn" if check and check.doubtful else "ok", "; ".join(said))


def _output(path: Path) -> Check:
    path = Path(os.path.abspath(path))
    existing = next(p for p in (path, *path.parents) if p.exists())
    free = shutil.disk_usage(existing).free
    shown = f"{free / 1e9:.1f} GB free at {existing}"
    if not os.access(existing, os.W_OK | os.X_OK) or not existing.is_dir():
        return Check("output", "FAIL", f"cannot write to {existing}: choose another folder")
    return _check("output", free > 1 << 30, shown if free > 1 << 30 else f"{shown}: make room")
