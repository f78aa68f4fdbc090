"""Exported files against full precision in the same runtime: size, speed, closeness, layers in integers.

The nets have random weights, BatchNorm statistics of a few smooth random images, 4-bit weights, 255 levels
and sums on codes. The files take turns, one thread, so that a busy machine slows down all of them.

    python -m benchmarks.export [--nets resnet18,mobilenet_v2] [--batches 1,32] [--seconds 5] [--data YAML]

With ``--data`` the configuration of a trained network with labeled images: it is quantized into a folder of
its own, and the exported files' top-1, closeness and size are printed too.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

import quantize
from benchmarks.exported_nets import NETS, net_of
from benchmarks.models import random_weights
from quantize.arrays import FloatArray
from quantize.caffenet import InferenceNet
from quantize.caffenet.model import Model
from quantize.commands.config import load
from quantize.data.feed import Batch
from quantize.engines import engine_opener
from quantize.engines.exported import ExportedFile, Pixels, is_installed, open_exported
from quantize.exports.integers import IntegerNet
from quantize.exports.onnx import OnnxOptions, export_onnx
from quantize.job.export import evaluate_exported, export_run
from quantize.job.feeds import calibration_feed, calibration_images, input_shapes
from quantize.job.given import Given
from quantize.job.run import Run
from quantize.settings import CaffeProcess

RUNTIMES = {"onnx": "ort", "openvino": "openvino"}
VARIANTS = {
    "4/8": (),
    "4/8 best": ("weights.solver=data_aware",),
    "8/8": ("weights.bits=8", "weights.grid=uniform"),
}
"""Bits of weights and activations, and settings beside those that a runtime wants."""
IMAGES = 8
IMAGES_COMPARED = 1000
INPUT = {"data": (3, 224, 224)}
PIXELS = Pixels(np.array([104.0, 117.0, 123.0]), 0.017)


def smooth_images(count: int) -> FloatArray:
    """Images (count, 3, 224, 224) of 16x16 squares of random colors, as the net's values."""
    coarse = np.random.default_rng(0).normal(size=(count, 3, 14, 14))
    return np.kron(coarse, np.ones((1, 1, 16, 16))).astype(np.float32)


def quantized_pair(name: str) -> tuple[Model, Model]:
    """A net in full precision and quantized."""
    net = net_of(name)
    test = InferenceNet.of(net)
    path = Path(f"{name}.prototxt")
    images = smooth_images(IMAGES)
    raw = Model(net, random_weights(test), path)
    feed = quantize.Images(images, raw)
    measured = {"statistics": "measured", "images": IMAGES}
    fitted = quantize.renorm(raw, feed, settings=measured)
    full = Model(net, fitted.weights, path)
    small = quantize.quantize(
        full,
        quantize.Images(images, full),
        renorm={"images": IMAGES},
        activations={"levels": 255, "sums": True, "images": IMAGES},
    )
    return full, small


def seconds_of(works: Mapping[str, Callable[[], object]], least: float) -> dict[str, float]:
    """The median time of each, taking turns."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for work in works.values():
        work()
    start = time.perf_counter()
    while time.perf_counter() - start < least or len(times[next(iter(works))]) < 3:
        for name, work in works.items():
            begun = time.perf_counter()
            work()
            times[name].append(time.perf_counter() - begun)
    return {name: statistics.median(found) for name, found in times.items()}


def work_of(file: ExportedFile, values: FloatArray) -> Callable[[], object]:
    """A run on images as the file takes them."""
    taken = file.taken({"data": values})
    return lambda: file.compute(taken)


def print_net(name: str, batches: list[int], least: float, folder: Path) -> None:
    """A line for every runtime and batch."""
    full, small = quantized_pair(name)
    net = IntegerNet.of(small, INPUT)
    [blob] = net.outputs
    engine = engine_opener("onnx", CaffeProcess(), 1)(small.inference.net, small.weights, INPUT)
    values = smooth_images(max([*batches, IMAGES]))
    last = len(small.inference.net.layer)
    scores = engine.compile(0, last, [blob]).run({"data": values[:IMAGES]}).blobs[blob]
    engine.close()
    plain = export_onnx(IntegerNet.folded(full, INPUT), "full", OnnxOptions()).write(folder)[0]
    for runtime, written_for in RUNTIMES.items():
        if not is_installed(runtime):
            print(f"{name}: {runtime} is not installed")
            continue
        files, stays = {"full": open_exported(runtime, plain, [blob], 1)}, {}
        for kind, pixels in (("codes", None), ("pixels", PIXELS)):
            options = OnnxOptions(written_for, pixels=pixels)  # type: ignore[arg-type]
            exported = export_onnx(net, kind, options)
            [path] = exported.write(folder / runtime)
            files[kind], stays[kind] = open_exported(runtime, path, [blob], 1), exported.floats
        size = plain.stat().st_size / (folder / runtime / "codes.onnx").stat().st_size
        found = files["codes"].run({"data": values[:IMAGES]}).blobs[blob]
        noise = float(np.square(scores - found).sum())
        sqnr = 10 * np.log10(float(np.square(scores).sum()) / noise) if noise else np.inf
        kernels = files["pixels"].kernels()
        print(
            f"{name:<14} {runtime:<9} {size:.2f}x smaller, {sqnr:.1f} dB, in integers {kernels.integer} of "
            f"{kernels.integer + kernels.floating} layers with pixels; in float: {', '.join(stays['codes'])}"
        )
        for batch in batches:
            works = {kind: work_of(file, values[:batch]) for kind, file in files.items()}
            took = seconds_of(works, least)
            faster = {kind: f"{took['full'] / seconds:.2f}x" for kind, seconds in took.items()}
            print(
                f"{'':<24} batch {batch:>2}: full {1000 * took['full'] / batch:.1f} ms per image, codes "
                f"{faster['codes']}, pixels {faster['pixels']} as fast",
                flush=True,
            )


def print_trained(path: Path, folder: Path) -> None:
    """Size, accuracy and closeness of a trained net's files, for each runtime with what it wants."""
    for kind, settings in VARIANTS.items():
        for runtime, written_for in RUNTIMES.items():
            if not is_installed(runtime):
                continue
            sums = "true" if runtime == "onnx" else "false"
            wanted = ["activations.levels=255", f"activations.sums={sums}", *settings]
            config = load(path, {"output": str(folder / kind / runtime)}, wanted)
            Run(config).quantize()
            for taken in (False, True):
                options = OnnxOptions(written_for)  # type: ignore[arg-type]
                outcome = export_run(
                    *(config, "onnx", folder / kind / f"{runtime}_{taken}", options, taken),
                    images=IMAGES_COMPARED,
                )
                [file] = outcome.paths
                scored = evaluate_exported(config, runtime, file)
                top1 = ", ".join(f"{name} {each.top1}" for name, each in scored.accuracy.items())
                close = outcome.comparison
                assert close is not None
                takes = "pixels" if taken else "floats"
                print(
                    f"{kind:<14} {runtime:<9} {takes}: {outcome.paths[file]} bytes; top-1 {top1}; against "
                    f"labelfree's scores {close.sqnr_db:.1f} dB, agreement {close.agreement} % on "
                    f"{close.images} images; {close.float_seconds / close.seconds:.2f}x as fast",
                    flush=True,
                )
    print_alternative(path, folder)


class Calibration(CalibrationDataReader):  # type: ignore[misc]
    """Images for onnxruntime's own tool."""

    def __init__(self, batches: Iterator[Batch]) -> None:
        self.batches = batches

    def get_next(self) -> dict[str, FloatArray] | None:
        """The next image's values, by input."""
        batch = next(self.batches, None)
        return None if batch is None else dict(batch.feeds)


def print_alternative(path: Path, folder: Path) -> None:
    """What onnxruntime's own tool makes of full precision: 8-bit weights per channel, 8-bit activations."""
    config = load(path, {"output": str(folder / "alternative")}, [])
    given = Given(config)
    net = IntegerNet.folded(given.model, input_shapes(given))
    [plain] = export_onnx(net, "plain", OnnxOptions()).write(folder)
    feed = calibration_feed(given, min(calibration_images(given), config.renorm.images))
    quantize_static(
        *(plain, folder / "alternative.onnx", Calibration(feed.batches(1))),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    Run(config).quantize()
    scored = evaluate_exported(config, "onnx", folder / "alternative.onnx")
    size = (folder / "alternative.onnx").stat().st_size
    print(f"{'8/8 by its tool':<14} onnx: {size} bytes; top-1 {scored.accuracy['onnx'].top1}")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nets", default=",".join(NETS), help="some of " + ", ".join(NETS))
    parser.add_argument("--batches", default="1,32", help="images at a time")
    parser.add_argument("--seconds", type=float, default=5, help="how long files take turns")
    parser.add_argument("--data", type=Path, help="the YAML file of a trained network with labeled images")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if given.data is not None:
            print_trained(given.data, Path(folder))
        for name in filter(None, given.nets.split(",")):
            print_net(name, [int(batch) for batch in given.batches.split(",")], given.seconds, Path(folder))


if __name__ == "__main__":
    main()
