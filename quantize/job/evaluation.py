"""What can be measured on the results in an output folder: the net before and after, on the same images."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path

from quantize.caffenet import InferenceNet, NetParameter, Weights, read_prototxt, schema_of
from quantize.caffenet.model import Model
from quantize.engines import engine_opener
from quantize.engines.base import OpenEngine
from quantize.errors import InputError, LabelfreeError
from quantize.host import using_threads
from quantize.job.feeds import (
    calibration_feed,
    calibration_images,
    evaluation_images,
    read_model_prototxt,
    validation_feed,
)
from quantize.job.labels import with_labels_that_fit
from quantize.job.output import Files, OutputFolder, is_held
from quantize.job.resume import made_from, model_hashes, sha256
from quantize.job.store import PAGE, REPORT, read_record, show_page, write_page, write_record
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
    net = read_model_prototxt(config)
    record = read_record(config.output)
    check_results(config, record)
    if is_held(config.output):
        progress.note(f"{config.output}: another labelfree run is writing here; this is what there is so far")
    candidates = _checked_candidates(config, net, record)
    if not without_renorm:
        candidates.pop("without_renorm", None)
    feed = with_labels_that_fit(validation_feed(config, net, images, progress), net, progress)
    open_engine = engine_opener(config.engine, config.caffe, config.threads)
    with using_threads(config.threads):
        found = evaluate(candidates, net_outputs(net), feed, open_engine, progress)
    found = replace(found, missing=record.stages.missing, images_from=evaluation_images(config))
    try:
        with closing(OutputFolder(config.output)) as folder:
            now = read_record(config.output)
            if now.stages == record.stages:
                now = now.model_copy(update={"evaluation": found})
                write_record(folder, now)
                show_page(folder, config, net, now, progress)
    except LabelfreeError as error:
        progress.note(f"not added to {REPORT}: {error}")
    return found


def report_run(config: Config) -> Path:
    """Make report.html again from what is in the output folder.

    Returns:
        Where it is.

    Raises:
        InputError: nothing has been quantized yet, or what is there is not of this job or not whole.
    """
    net = read_model_prototxt(config)
    record = read_record(config.output)
    check_results(config, record)
    with closing(OutputFolder(config.output)) as folder:
        _check_files(config, record)
        write_page(folder, config, net, record)
    return config.output / PAGE


def measure_outputs(
    config: Config, net: NetParameter, record: RunRecord, open_engine: OpenEngine, progress: Progress
) -> OutputSqnr | None:
    """The output SQNR of every quantized layer; None where there is nothing to measure it on."""
    stage = record.stages.weights
    records = stage.layers if stage is not None else []
    quantized = {name for layer in records for name in (layer.name, *layer.shared_by)}
    layers = [layer.name for layer in InferenceNet.of(net).net.layer if layer.name in quantized]
    if config.data.calibration is None or not layers:
        return None
    try:
        enough = images_to_measure(config.renorm.images + config.activations.images)
        feed = calibration_feed(config, net, min(enough, calibration_images(config)))
        candidates = _candidates(config, net, record)
        full = candidates.pop("fp32")
        found = output_sqnr(full, candidates, layers, feed, open_engine, progress)
    except LabelfreeError as error:
        progress.note(f"output SQNR is not measured: {error}")
        return None
    return OutputSqnr(len(feed), found)


def check_results(config: Config, record: RunRecord) -> None:
    """Check that what is in the output folder belongs to this job.

    Raises:
        InputError: it has another name, or was made from another model.
    """
    if record.name != config.name:
        raise InputError(
            f"{config.output}: holds the results of {record.name}, not of {config.name}; run `labelfree "
            "quantize`, or give its output or name"
        )
    if not made_from(record, config, model_hashes(config)):
        raise InputError(
            f"{config.output}: made from another model.prototxt or model.weights; run `labelfree quantize` "
            "again"
        )


def _checked_candidates(config: Config, net: NetParameter, record: RunRecord) -> dict[str, Model]:
    """`_candidates` of files that anybody may have changed.

    Raises:
        InputError: a file is not the one that the record tells of.
    """
    try:
        found = _candidates(config, net, record)
    except InputError:
        _check_files(config, record)
        raise
    _check_files(config, record)  # last: what becomes of files that have been read is no matter
    return found


def _candidates(config: Config, net: NetParameter, record: RunRecord) -> dict[str, Model]:
    """Full precision, perhaps quantized weights before renorm, and what the last stage has made."""
    files = Files.of(config.name)
    full = Model.of(net, config.model.weights, config.model.prototxt)
    found = {"fp32": full}
    weights = Weights.read(config.output / files.quantized)
    if record.stages.renorm is not None:
        found["without_renorm"] = full.holding(weights)
        weights = Weights.read(config.output / files.renorm)
    final = read_prototxt(config.output / files.val, schema_of(net))
    found["quantized"] = Model(final, weights)
    return found


def _check_files(config: Config, record: RunRecord) -> None:
    """Check that the files are those that the record tells of (InputError if not)."""
    for name, digest in record.outputs.items():
        path = config.output / name
        if not path.exists() or sha256(path) != digest:
            raise InputError(
                f"{path}: not the file that {REPORT} tells of: a run is writing here, or was "
                "killed; wait for it, or run `labelfree quantize --resume`"
            )
