"""report.json and report.html in the output folder: how they are written, and read back."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from quantize.errors import InputError, LabelfreeError
from quantize.files import read_file
from quantize.job.output import OutputFolder
from quantize.job.results import Results
from quantize.progress import Progress
from quantize.record import RunRecord
from quantize.report.page import render

REPORT = "report.json"
PAGE = "report.html"
MAX_REPORT_BYTES = 64 << 20


def read_record(output: Path) -> RunRecord:
    """The content of report.json.

    Raises:
        InputError: there is none, or it is not one of ours.
    """
    path = output / REPORT
    if not path.exists():
        raise InputError(f"{output}: nothing quantized here yet; run `labelfree quantize` first")
    try:
        return RunRecord.parse(read_file(path, "report", MAX_REPORT_BYTES))
    except ValueError as error:
        raise InputError(f"{path}: {error}; run `labelfree quantize` again") from error


def previous_record(output: Path, name: str, progress: Progress) -> RunRecord | None:
    """The record of an earlier run called ``name``; None where there is none that can be used."""
    path = output / REPORT
    try:
        if not path.exists():
            return None
        previous = RunRecord.parse(read_file(path, "report", MAX_REPORT_BYTES))
    except (InputError, ValueError) as error:
        progress.note(f"{path}: not usable ({error}); nothing is taken over from it")
        return None
    return previous if previous.name == name else None


def write_record(folder: OutputFolder, record: RunRecord) -> None:
    """Write report.json.

    Raises:
        LabelfreeError: it could not be written.
    """
    folder.write(REPORT, record.to_json(indent=1).encode() + b"\n")


def write_page(folder: OutputFolder, results: Results, record: RunRecord) -> None:
    """Write report.html from a record and the models that it tells of.

    Args:
        folder: the folder.
        results: the models.
        record: the content of report.json.

    Raises:
        InputError: a caffemodel cannot be read.
        LabelfreeError: the page could not be written.
    """
    renormed = results.after("renorm") if record.stages.renorm is not None else None
    page = render(record, results.given.model, results.after("weights"), renormed)
    folder.write(PAGE, page.encode())


def show_page(folder: OutputFolder, results: Results, record: RunRecord, progress: Progress) -> None:
    """`write_page`; what goes wrong with it is said but does not undo the work that it shows."""
    try:
        write_page(folder, results, record)
    except Exception as error:
        folder.remove(PAGE)
        progress.note(
            f"{PAGE} could not be made ({type(error).__name__}: {error}); see `labelfree --verbose report`"
        )


def add_to_report(results: Results, added: Callable[[RunRecord], RunRecord], progress: Progress) -> None:
    """Write both again with what has been found about results, if these are still what the folder holds.

    What goes wrong is said.

    Args:
        results: the models.
        added: a record with what has been found.
        progress: what hears of it.
    """
    output = results.given.config.output
    try:
        with closing(OutputFolder(output)) as folder:
            now = read_record(output)
            if now.stages == results.stages:
                now = added(now)
                write_record(folder, now)
                show_page(folder, results, now, progress)
    except LabelfreeError as error:
        progress.note(f"not added to {REPORT}: {error}")
