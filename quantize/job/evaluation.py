"""What can be measured on the results in an output folder: the net before and after, on the same images."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path

from quantize.caffenet import read_prototxt, schema_of
from quantize.caffenet.model import Model
from quantize.engines import engine_opener
from quantize.engines.base import OpenEngine
from quantize.errors import InputError, LabelfreeError
from quantize.files import sha256
from quantize.host import using_threads
from quantize.job.feeds import calibration_feed, calibration_images, evaluation_images, validation_feed
from quantize.job.given import Given
from quantize.job.labels import with_labels_that_fit
from quantize.job.output import Files, OutputFolder, is_held
from quantize.job.results import Results
from quantize.job.resume import made_from
from quantize.job.store import PAGE, REPORT, add_to_report, read_record, write_page
from quantize.measure.evaluate import evaluate
from quantize.measure.outputs import net_outputs
from quantize.measure.sqnr import images_to_measure, output_sqnr
from quantize.progress import SILENT, Progress
from quantize.record import Evaluation, OutputSqnr, RunRecord
from quantize.settings import Config


def evaluate_run(
    config: Config, images: int | None = None, progress: Progress = SILENT, without_renorm: bool = False
) -> Evaluation:
    """Compare the full-precision net with the quantized one in the output folder.

    What is found is added to report.json and report.html.

    Args:
        config: the settings.
        images: the first so many; None: all.
        progress: what hears how far it is.
        without_renorm: evaluate the quantized weights before renorm too.

    Raises:
        InputError: nothing has been quantized yet, it was made from another model, or no images.
    """
    given, record = Given(config), read_record(config.output)
    with closing(given):
        return _evaluate(given, record, images, progress, without_renorm)


def _evaluate(
    given: Given, record: RunRecord, images: int | None, progress: Progress, without_renorm: bool
) -> Evaluation:
    config, net = given.config, given.net
    check_results(given, record)
    if is_held(config.output):
        progress.note(f"{config.output}: another labelfree run is writing here; this is what there is so far")
    results = Results(given, record.stages)
    candidates = _checked_candidates(results, record)
    if not without_renorm:
        candidates.pop("without_renorm", None)
    feed = with_labels_that_fit(validation_feed(given, images, progress), net, progress)
    open_engine = engine_opener(config.engine, config.caffe, config.threads)
    with using_threads(config.threads):
        found = evaluate(candidates, net_outputs(net), feed, open_engine, progress)
    found = replace(found, missing=record.stages.missing, images_from=evaluation_images(given))
    add_to_report(results, lambda now: now.model_copy(update={"evaluation": found}), progress)
    return found


def report_run(config: Config) -> Path:
    """Make report.html again from what is in the output folder.

    Returns:
        Where it is.

    Raises:
        InputError: nothing has been quantized yet, or what is there is not of this job or not whole.
    """
    given, record = Given(config), read_record(config.output)
    check_results(given, record)
    with closing(OutputFolder(config.output)) as folder:
        check_files(config, record)
        write_page(folder, Results(given, record.stages), record)
    return config.output / PAGE


def measure_outputs(results: Results, open_engine: OpenEngine, progress: Progress) -> OutputSqnr | None:
    """The output SQNR of every quantized layer; None where there is nothing to measure it on."""
    given, stages = results.given, results.stages
    config, full = given.config, given.model
    records = stages.weights.layers if stages.weights is not None else []
    quantized = {name for layer in records for name in (layer.name, *layer.shared_by)}
    layers = [layer.name for layer in full.inference.net.layer if layer.name in quantized]
    if config.data.calibration is None or not layers:
        return None
    versions = {"quantized": results.final}
    if stages.renorm is not None:
        versions = {"without_renorm": results.after("weights"), **versions}
    try:
        enough = images_to_measure(config.renorm.images + config.activations.images)
        feed = calibration_feed(given, min(enough, calibration_images(given)))
        found = output_sqnr(full, versions, layers, feed, open_engine, progress)
    except LabelfreeError as error:
        progress.note(f"output SQNR is not measured: {error}")
        return None
    return OutputSqnr(len(feed), found)


def check_results(given: Given, record: RunRecord) -> None:
    """Check that what is in the output folder belongs to this job.

    Raises:
        InputError: it has another name, or was made from another model.
    """
    config = given.config
    if record.name != config.name:
        raise InputError(
            f"{config.output}: holds the results of {record.name}, not of {config.name}; run `labelfree "
            "quantize`, or give its output or name"
        )
    if not made_from(record, given):
        raise InputError(
            f"{config.output}: made from another model.prototxt or model.weights; run `labelfree quantize` "
            "again"
        )


def _checked_candidates(results: Results, record: RunRecord) -> dict[str, Model]:
    """`_candidates` of files that anybody may have changed.

    Raises:
        InputError: a file is not the one that the record tells of.
    """
    config = results.given.config
    try:
        found = _candidates(results)
    except InputError:
        check_files(config, record)
        raise
    check_files(config, record)  # last: what becomes of files that have been read is no matter
    return found


def _candidates(results: Results) -> dict[str, Model]:
    """Full precision, perhaps quantized weights before renorm, and what the last stage has made.

    The last one is the net that was written, for it is what others run.
    """
    given = results.given
    path = given.config.output / Files.of(given.config.name).val
    final = Model(read_prototxt(path, schema_of(given.net)), results.final.weights)
    if results.stages.renorm is None:
        return {"fp32": given.model, "quantized": final}
    return {"fp32": given.model, "without_renorm": results.after("weights"), "quantized": final}


def check_files(config: Config, record: RunRecord) -> None:
    """Check that the files are those that the record tells of (InputError if not)."""
    for name, digest in record.outputs.items():
        path = config.output / name
        if not path.exists() or sha256(path) != digest:
            raise InputError(
                f"{path}: not the file that {REPORT} tells of: a run is writing here, or was "
                "killed; wait for it, or run `labelfree quantize --resume`"
            )
