"""`labelfree doctor`: what works here, and for each fault the remedy."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, fields
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np

from quantize.caffenet import (
    TRAIN,
    InferenceNet,
    LayerParameter,
    NetParameter,
    Weights,
    check_weights,
    infer_shapes,
    known_part,
)
from quantize.data.sources import open_source
from quantize.data.transform import Transform
from quantize.engines import engine_opener
from quantize.engines.caffe.engine import Worker
from quantize.errors import LabelfreeError
from quantize.host import available_threads
from quantize.job.feeds import effective_transform, image_shape
from quantize.job.run import LIBRARIES, read_model_prototxt
from quantize.settings import CaffeProcess, Config

REPORT_LIBRARIES = ("matplotlib", "Jinja2")
MEMINFO = Path("/proc/meminfo")
PROBE = np.array([[[[-1.0, 0.24, 0.26, 99.0]]]], np.float32)
"""Input of the engine check: an ActQuantize of step 0.5 makes 0, 0, 0.5 and 63.5 of it."""


@dataclass(frozen=True)
class Check:
    """One finding: what was looked at, whether it is well, and what was seen (with the remedy if not)."""

    what: str
    well: bool
    seen: str


def examine(config: Config | None, process: CaffeProcess | None) -> Iterator[Check]:
    """All checks, one after another.

    Args:
        config: the job to check, if any.
        process: how to start pycaffe, where the Caffe engine is to be checked.
    """
    yield Check(
        "python", sys.version_info >= (3, 10), f"{platform.python_version()} (3.10 or newer is needed)"
    )
    for name in (*LIBRARIES, *REPORT_LIBRARIES):
        yield _library(name)
    yield Check("processors", True, f"{available_threads()} usable")
    yield _memory(config)
    yield _attempt("onnx engine", lambda: _engine("onnx", CaffeProcess()))
    if process is not None:
        worker = _attempt("caffe worker", lambda: _caffe_worker(process))
        yield worker
        if worker.well:
            yield _attempt("caffe plug-in", lambda: _engine("caffe", process))
    if config is not None:
        yield from _job(config)


def _library(name: str) -> Check:
    try:
        return Check(name, True, version(name))
    except PackageNotFoundError:
        return Check(name, False, f"not installed: pip install {name}")


def _memory(config: Config | None) -> Check:
    try:
        fields = dict(line.split(":", 1) for line in MEMINFO.read_text().splitlines())
        available = int(fields["MemAvailable"].split()[0]) << 10
    except (OSError, KeyError, ValueError):
        return Check("memory", True, "unknown")
    needed = (config.renorm.memory if config else None) or 0
    shown = f"{available / 2**30:.1f} GiB available"
    if needed > available:
        return Check("memory", False, f"{shown}, renorm.memory allows {needed / 2**30:.1f} GiB: lower it")
    return Check("memory", True, shown)


def _attempt(what: str, work: Callable[[], str]) -> Check:
    try:
        return Check(what, True, work())
    except (LabelfreeError, OSError) as error:
        return Check(what, False, " ".join(str(error).split()))


def _engine(name: str, process: CaffeProcess) -> str:
    """Run one ActQuantize layer."""
    layer = LayerParameter(name="probe", type="ActQuantize", bottom=["data"], top=["probe"])
    layer.relu_param.negative_slope = 0.5
    engine = engine_opener(name, process, 1)(
        NetParameter(layer=[layer]), Weights(), {"data": PROBE.shape[1:]}
    )
    try:
        found = engine.compile(0, 1, ["probe"]).run({"data": PROBE}).blobs["probe"]
    finally:
        engine.close()
    if found.ravel().tolist() != [0.0, 0.0, 0.5, 63.5]:
        raise LabelfreeError(
            f"its ActQuantize computes {found.ravel().tolist()}: install ours (docs/caffe.md)"
        )
    return "runs, ActQuantize too"


def _caffe_worker(process: CaffeProcess) -> str:
    """Start pycaffe."""
    with closing(Worker(process.python, process.pycaffe_path, process.preload, 1)) as worker:
        return ", ".join(f"{name} {number}" for name, number in worker.versions.items())


def _job(config: Config) -> Iterator[Check]:
    nets: list[NetParameter] = []

    def prototxt() -> str:
        net = read_model_prototxt(config)
        test = InferenceNet.of(net)
        nets.append(net)
        return f"{len(test.net.layer)} layers from {test.blob} to {test.scores}"

    def weights() -> str:
        found = Weights.read(config.model.weights)
        shape = image_shape(config, nets[0])
        if shape is None:
            return f"{len(found.layers())} layers (not checked against the net: the image shape is unknown)"
        test = InferenceNet.of(nets[0])
        known = known_part(test.net, [test.blob])
        check_weights(known, found, infer_shapes(known, {test.blob: (1, *shape)}))
        return f"{len(found.layers())} layers, they fit the net"

    yield _attempt("model.prototxt", prototxt)
    if nets:
        yield _attempt("model.weights", weights)
        yield _attempt("transform", lambda: _transform(effective_transform(nets[0], TRAIN, config)))
    for name in ("calibration", "validation"):
        given = getattr(config.data, name)
        if given is not None:
            yield _attempt(f"data.{name}", partial(_source, given.source))
    yield _output(config.output)


def _transform(transform: Transform) -> str:
    """What is not at its default."""
    chosen = {field.name: getattr(transform, field.name) for field in fields(transform)}
    shown = [f"{key} {value}" for key, value in chosen.items() if value != getattr(Transform(), key)]
    return ", ".join(shown) or "none: pixels as they are"


def _source(path: Path) -> str:
    source = open_source(path)
    try:
        image = source.read(0)
        folders = f"; {source.folders.text}" if source.folders else ""
        return f"{len(source)} images, the first is {image.pixels.shape}{folders}"
    finally:
        source.close()


def _output(path: Path) -> Check:
    path = Path(os.path.abspath(path))
    existing = next(p for p in (path, *path.parents) if p.exists())
    free = shutil.disk_usage(existing).free
    shown = f"{free / 1e9:.1f} GB free at {existing}"
    if not os.access(existing, os.W_OK | os.X_OK) or not existing.is_dir():
        return Check("output", False, f"cannot write to {existing}: choose another folder")
    return Check("output", free > 1 << 30, shown if free > 1 << 30 else f"{shown}: make room")
