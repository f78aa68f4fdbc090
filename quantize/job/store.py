"""report.json and report.html in the output folder: how they are written, and read back.

A digest in report.json tells what labelfree wrote from what somebody has changed, so that what is read back
need not be checked bit by bit.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from quantize.caffenet import InferenceNet, NetParameter, Weights, load_weights
from quantize.errors import InputError
from quantize.files import read_file
from quantize.job.output import Files, OutputFolder
from quantize.progress import Progress
from quantize.report.page import Caffemodels, render
from quantize.settings import Config

REPORT = "report.json"
PAGE = "report.html"
MAX_REPORT_BYTES = 64 << 20


def read_report(output: Path) -> dict[str, Any]:
    """The content of report.json.

    Raises:
        InputError: there is none, or it is not one of ours.
    """
    path = output / REPORT
    if not path.exists():
        raise InputError(f"{output}: nothing quantized here yet; run `labelfree quantize` first")
    try:
        return _parsed(read_file(path, "report", MAX_REPORT_BYTES))
    except ValueError as error:
        raise InputError(f"{path}: {error}; run `labelfree quantize` again") from error


def previous_report(output: Path, name: str, progress: Progress) -> dict[str, Any]:
    """The report of an earlier run called ``name``, or an empty one where there is none that can be used."""
    path = output / REPORT
    previous: dict[str, Any] = {}
    try:
        if path.exists():
            previous = _parsed(read_file(path, "report", MAX_REPORT_BYTES))
    except (InputError, ValueError) as error:
        progress.note(f"{path}: not usable ({error}); nothing is taken over from it")
    if previous.get("name") != name:
        return {"inputs": {}, "stages": {}}
    return previous


def write_report(folder: OutputFolder, report: dict[str, Any]) -> None:
    """Write report.json; the report gets its digest.

    Raises:
        LabelfreeError: it could not be written.
    """
    report["digest"] = _digest(json.loads(json.dumps(report)))
    with folder.writing(REPORT) as file:
        file.write(json.dumps(report, indent=1).encode() + b"\n")


def write_page(folder: OutputFolder, config: Config, net: NetParameter, report: dict[str, Any]) -> None:
    """Write report.html from a report and the caffemodels in the folder.

    Args:
        folder: the folder.
        config: the settings of the run.
        net: the full-precision net, with all its phases.
        report: the content of report.json.

    Raises:
        InputError: a caffemodel cannot be read.
        LabelfreeError: the page could not be written.
    """
    files = Files.of(config.name)
    renormed = folder.path / files.renorm
    weights = Caffemodels(
        full=load_weights(config.model.weights, net),
        quantized=Weights.read(folder.path / files.quantized),
        renorm=Weights.read(renormed) if renormed.exists() else None,
    )
    page = render(report, InferenceNet.of(net).net, weights)
    with folder.writing(PAGE) as file:
        file.write(page.encode())


def show_page(
    folder: OutputFolder, config: Config, net: NetParameter, report: dict[str, Any], progress: Progress
) -> None:
    """`write_page`; what goes wrong with it is said but does not undo the work that it shows."""
    try:
        write_page(folder, config, net, report)
    except Exception as error:
        folder.remove(PAGE)
        progress.note(
            f"{PAGE} could not be made ({type(error).__name__}: {error}); see `labelfree --verbose report`"
        )


def _parsed(content: bytes) -> dict[str, Any]:
    """A report as it was written.

    Raises:
        ValueError: it is not a report of labelfree, or somebody has changed it.
    """
    try:
        report = json.loads(content)
        if isinstance(report, dict) and report.get("digest") == _digest(report):
            return report
    except (ValueError, RecursionError):
        pass
    raise ValueError("not a report of labelfree, or changed since")


def _digest(report: dict[str, Any]) -> str:
    """A hash of everything else in a report."""
    content = {key: value for key, value in report.items() if key != "digest"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
