"""What can be measured on the results in an output folder: the net before and after, on the same images."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path

from quantize.caffenet import InferenceNet, NetParameter, Weights, load_weights, read_prototxt, schema_of
from quantize.caffenet.quantized import with_alpha_terms
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
from quantize.job.output import Files, OutputFolder
from quantize.job.store import PAGE, REPORT, read_record, show_page, write_page, write_record
from quantize.measure.evaluate import Candidate, evaluate
from quantize.measure.sqnr import Version, images_to_measure, output_sqnr
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
        InputError: nothing has been quantized yet, or no images.
    """
    net = read_model_prototxt(config)
    feed = validation_feed(config, net, images, progress)
    candidates = _candidates(config, net)
    if not without_renorm:
        candidates.pop("without_renorm", None)
    before = read_record(config.output)
    open_engine = engine_opener(config.engine, config.caffe, config.threads)
    with using_threads(config.threads):
        found = evaluate(candidates, feed, open_engine, progress)
    found = replace(found, images_from=evaluation_images(config))
    try:
        with closing(OutputFolder(config.output)) as folder:
            record = read_record(config.output)
            if record.stages == before.stages:
                record = record.model_copy(update={"evaluation": found})
                write_record(folder, record)
                show_page(folder, config, net, record, progress)
    except LabelfreeError as error:
        progress.note(f"not added to {REPORT}: {error}")
    return found


def report_run(config: Config) -> Path:
    """Make report.html again from what is in the output folder.

    Returns:
        Where it is.

    Raises:
        InputError: nothing has been quantized yet.
    """
    net = read_model_prototxt(config)
    record = read_record(config.output)
    with closing(OutputFolder(config.output)) as folder:
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
        candidates = _candidates(config, net)
        versions = {name: Version(c.net, c.weights) for name, c in candidates.items()}
        full = versions.pop("fp32")
        found = output_sqnr(full, versions, layers, feed, open_engine, progress)
    except LabelfreeError as error:
        progress.note(f"output SQNR is not measured: {error}")
        return None
    return OutputSqnr(len(feed), found)


def _candidates(config: Config, net: NetParameter) -> dict[str, Candidate]:
    """Full precision, quantized weights before renorm where renorm has run, and the final net, in that order.

    Raises:
        InputError: nothing has been quantized yet.
    """
    files = Files.of(config.name)
    quantized, renormed = config.output / files.quantized, config.output / files.renorm
    prototxt = config.output / files.val
    if not quantized.exists() or not prototxt.exists():
        raise InputError(f"{config.output}: nothing quantized here yet; run `labelfree quantize` first")
    full = InferenceNet.of(net)
    found = {"fp32": Candidate(full.net, load_weights(config.model.weights, net), full.scores)}
    weights = Weights.read(quantized)
    if renormed.exists():
        unrepaired = InferenceNet.of(with_alpha_terms(net, weights))
        found["without_renorm"] = Candidate(unrepaired.net, weights, unrepaired.scores)
        weights = Weights.read(renormed)
    final = InferenceNet.of(read_prototxt(prototxt, schema_of(net)))
    found["quantized"] = Candidate(final.net, weights, final.scores)
    return found
