"""Exported files of the results in an output folder: written, and compared with what they were made from."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Mapping
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np

from quantize.arrays import FloatArray
from quantize.caffenet import TEST, read_prototxt, schema_of
from quantize.caffenet.model import Model
from quantize.data.feed import Feed
from quantize.engines import engine_opener
from quantize.engines.exported import Pixels, check_installed, is_installed, open_exported
from quantize.errors import InputError
from quantize.exports.integers import IntegerNet
from quantize.exports.onnx import OnnxOptions
from quantize.exports.target import Exported
from quantize.exports.targets import TARGETS, Order
from quantize.host import available_threads, using_threads
from quantize.job.evaluation import check_files, check_results
from quantize.job.feeds import (
    calibration_feed,
    calibration_images,
    effective_transform,
    evaluation_images,
    input_shapes,
    validation_feed,
)
from quantize.job.given import Given
from quantize.job.labels import with_labels_that_fit
from quantize.job.output import Files, OutputFolder
from quantize.job.results import Results
from quantize.job.store import add_to_report, read_record
from quantize.measure.evaluate import evaluate
from quantize.measure.exported import compare_file
from quantize.measure.outputs import Output, net_outputs, tapped
from quantize.progress import SILENT, Progress
from quantize.record import Evaluation, Export, FileComparison
from quantize.settings import Config, GridChoice

IMAGES = 64
"""So many are compared by default."""
ONNX_RUNTIMES: dict[str, Literal["ort", "openvino"]] = {"onnx": "ort", "openvino": "openvino"}


def export_run(
    config: Config,
    target: str,
    folder: Path | None = None,
    options: OnnxOptions = OnnxOptions(),  # noqa: B008 - frozen
    takes_pixels: bool = False,
    fold: bool = True,
    images: int = IMAGES,
    progress: Progress = SILENT,
) -> Export:
    """Export what is in the output folder.

    What was made is added to its report.json and report.html.

    Args:
        config: the settings.
        target: one of `TARGETS`.
        folder: where the files go; None: the output folder.
        options: how an ONNX file is written.
        takes_pixels: an ONNX file takes pixels of 8 bits, transformed as the configuration says.
        fold: alpha, BatchNorm and Scale into the weights of a plain Caffe pair.
        images: so many calibration images are compared, or all where there are fewer.
        progress: what hears where that cannot be added to the report.

    Raises:
        InputError: nothing has been quantized, or a target cannot express it; nothing is written.
    """
    given = Given(config)
    with closing(given):
        model, results = _result(given)
        shapes = input_shapes(given)
        if takes_pixels:
            options = replace(options, pixels=pixels_of(given))
        kind, net = TARGETS[target], IntegerNet.of(model, shapes)
        exported = kind.write(Order(model, net, config.name, options, fold))
        whole = IntegerNet.folded(given.model, shapes)
        plain = kind.write(Order(given.model, whole, config.name, replace(options, pixels=None), fold))
        folder = config.output if folder is None else folder
        with closing(OutputFolder(folder)):
            exported.write(folder)
        notes = [*exported.notes, *(f"not finished: {stage} has not run" for stage in results.stages.missing)]
        notes += _left_out(model) if target != "caffe" else []
        runtime, comparison = _runtime(target, options), None
        if runtime is not None and not is_installed(runtime):
            notes.append(f"not compared: {runtime} is not installed (pip install 'labelfree[{runtime}]')")
        elif runtime is not None and (feed := _some_images(given, images)) is None:
            notes.append("not compared: no images (data.calibration)")
        elif runtime is not None and feed is not None:
            path = folder / f"{config.name}{kind.model[0]}"
            with using_threads(config.threads):
                comparison = _compared(given, net, model, path, plain, runtime, feed)
        names = {f"{config.name}{ending}" for ending in kind.model} & set(exported.files)
        found = Export(
            target,
            runtime,
            folder,
            {name: len(content) for name, content in exported.files.items()},
            sum(len(exported.files[name]) for name in names) or None,
            _float_bytes(config, target, plain, names),
            dict(exported.floats),
            tuple(notes),
            comparison,
        )
        at = replace(found, folder=folder.resolve())
        add_to_report(results, lambda record: record.with_export(at), progress)
    return found


def _left_out(model: Model) -> list[str]:
    """A sentence about the layers behind the net that nobody knows how to run, where there are any."""
    test = model.inference
    names = [f"{layer.name} ({layer.type})" for layer in test.whole.layer if layer.name in test.trailing]
    why = "not in the files, for labelfree does not know what they compute"
    return [f"{why}: {', '.join(names)}"] if names else []


def _runtime(target: str, options: OnnxOptions) -> str | None:
    """The runtime that opens the files; None where none does."""
    runtimes = TARGETS[target].runtimes
    return next(
        (each for each in runtimes if options.runtime == ONNX_RUNTIMES.get(each, options.runtime)), None
    )


def _float_bytes(config: Config, target: str, plain: Exported, names: Collection[str]) -> int | None:
    """Of the model in full precision; of a Caffe result that is the given caffemodel."""
    if target == "caffe":
        return config.model.weights.stat().st_size
    return sum(len(plain.files[name]) for name in names) or None


def evaluate_exported(
    config: Config,
    runtime: str,
    path: Path | None = None,
    images: int | None = None,
    progress: Progress = SILENT,
) -> Evaluation:
    """Evaluate an exported file beside full precision and the quantized net that it was made from.

    Args:
        config: the settings.
        runtime: one of `engines.exported.RUNTIMES`.
        path: the file; None: as `export_run` has written it.
        images: the first so many; None: all.
        progress: what hears how far it is.

    Raises:
        InputError: there is no such file, it does not fit the results, or the runtime is not installed.
    """
    check_installed(runtime)
    given = Given(config)
    with closing(given):
        model, results = _result(given)
        ending = next(target.model[0] for target in TARGETS.values() if runtime in target.runtimes)
        path = config.output / f"{config.name}{ending}" if path is None else path
        if not path.exists():
            raise InputError(f"{path}: not there; run `labelfree export` first, or give --file")
        net, outputs = IntegerNet.of(model, input_shapes(given)), net_outputs(given.net)
        names = [net.blob_of(output) for output in outputs]
        feed = with_labels_that_fit(validation_feed(given, images, progress), given.net, progress)
        candidates = {"fp32": given.model, "quantized": model}
        with using_threads(config.threads):
            file = open_exported(runtime, path, names, config.threads or available_threads())
            opener = engine_opener(config.engine, config.caffe, config.threads)
            found = evaluate(candidates, outputs, feed, opener, progress, {runtime: file})
        return replace(found, missing=results.stages.missing, images_from=evaluation_images(given))


def pixels_of(given: Given) -> Pixels:
    """What the net's transform makes of pixels.

    Raises:
        InputError: it is not the same for all pixels of a channel.
    """
    transform = effective_transform(given, TEST)
    if transform.mean_file is not None:
        raise InputError(
            f"--input pixels: the transform has a mean for each pixel ({transform.mean_file}), not for each "
            "channel: give data.transform.mean_value, or use --input float"
        )
    if not transform.scale > 0:
        raise InputError(f"--input pixels: data.transform.scale is {transform.scale}; it must be positive")
    channels = next(iter(input_shapes(given).values()))[0]
    mean = transform.mean_value or (0.0,)
    return Pixels(np.array(mean * (channels if len(mean) == 1 else 1), np.float64), transform.scale)


def _result(given: Given) -> tuple[Model, Results]:
    """The quantized model in the output folder, with the one that it was made from; the results it is of."""
    config, record = given.config, read_record(given.config.output)
    check_results(given, record)
    check_files(config, record)
    path = config.output / Files.of(config.name).val
    net = read_prototxt(path, schema_of(given.net))
    stage = record.stages.weights
    grids = {
        layer.name: GridChoice(bits=layer.bits, grid=layer.grid)
        for layer in (stage.layers if stage is not None else ())
    }
    results = Results(given, record.stages)
    return Model(net, results.final.weights, path, grids, full=given.model), results


def _some_images(given: Given, count: int) -> Feed | None:
    """Calibration images, or validation images where there are no others."""
    if given.config.data.calibration is not None:
        return calibration_feed(given, min(count, calibration_images(given)))
    if given.config.data.validation is not None:
        feed = validation_feed(given)
        return feed.subset(range(min(count, len(feed))))
    return None


def _compared(
    given: Given,
    net: IntegerNet,
    model: Model,
    path: Path,
    plain: Exported,
    runtime: str,
    feed: Feed,
) -> FileComparison:
    """The file at ``path`` against the quantized net in our engine and the plain file in full precision."""
    config, outputs = given.config, net_outputs(given.net)
    output = next((each for each in outputs if each.is_main), outputs[-1])
    blob, threads = net.blob_of(output), config.threads or available_threads()
    [images] = feed.unlabeled().batches(len(feed))
    scores = _scores(config, model, output, images.feeds)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        plain.write(folder)
        full = open_exported(runtime, folder / path.name, [blob], threads)
        file = open_exported(runtime, path, [blob], threads)
        return compare_file(file, full, images.feeds, scores, output.axis_of(scores.shape))


def _scores(config: Config, model: Model, output: Output, feeds: Mapping[str, FloatArray]) -> FloatArray:
    """An output of the quantized net in labelfree's engine."""
    net, [name] = tapped(model.inference.net, [output])
    shapes = {blob: values.shape[1:] for blob, values in feeds.items()}
    opener = engine_opener(config.engine, config.caffe, config.threads)
    with closing(opener(net, model.weights, shapes)) as engine:
        return engine.compile(0, len(net.layer), [name]).run(feeds).blobs[name]
