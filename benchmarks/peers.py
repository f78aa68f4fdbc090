"""Our nets and images through other tools for post-training quantization, as a Markdown table.

The tools live in an environment of their own:

    python3 -m venv /tmp/peers
    /tmp/peers/bin/pip install onnx onnxruntime nncf
    python -m benchmarks.peers configs/digits.yaml --python /tmp/peers/bin/python --settings 8/8,4/8

The others get the net in full precision as an ONNX model, and the images as the net is fed. All are
calibrated on the same ones, ours too. Weights are on the uniform grid, with 8 bits in the first and the last
layer. The second number of a setting counts as everybody does: 4 means codes 0..15.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import onnx
from onnx import helper, numpy_helper

from benchmarks.accuracy import Subject, checked_settings
from quantize.arrays import FloatArray
from quantize.caffenet import NetParameter, single_assignment
from quantize.caffenet.model import Model
from quantize.commands.config import load
from quantize.data.feed import Feed
from quantize.engines.onnx.engine import OnnxEngine, Translation
from quantize.engines.onnx.graph import Graph
from quantize.measure.closeness import divergences
from quantize.measure.outputs import net_outputs, tapped
from quantize.settings import WeightSettings

WORKER = Path(__file__).with_name("peers_worker.py")
INPUT, OUTPUT = "images", "scores"
OURS = {"labelfree fast": "optimal", "labelfree best": "data_aware"}
BATCH = 50


@dataclass(frozen=True)
class Result:
    """What a tool makes of the test images.

    Attributes:
        tool: its name and version.
        scores: (images, classes).
        seconds: that quantizing took.
    """

    tool: str
    scores: FloatArray
    seconds: float


def as_onnx(subject: Subject) -> onnx.ModelProto:
    """The net in full precision: input ``images``, output ``scores``, any batch, no external data."""
    net, blob = scores_of(subject)
    with closing(OnnxEngine(net, subject.model.weights, subject.calibration.shapes, 1)) as engine:
        translation = Translation(engine, Graph())
        for layer in net.layer:
            if layer.bottom:
                translation.add(layer)
        translation.output(translation.blob(blob))
        model, [fed], external = translation.graph.model()
    for tensor in model.graph.initializer:
        if tensor.name in external:
            tensor.CopyFrom(numpy_helper.from_array(external[tensor.name], tensor.name))
    [made] = model.graph.output
    names = {fed: INPUT, made.name: OUTPUT}
    for node in model.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
    [shape] = subject.calibration.shapes.values()
    del model.graph.input[:], model.graph.output[:]
    dims: list[str | int | None] = ["batch", *shape]
    model.graph.input.append(helper.make_tensor_value_info(INPUT, onnx.TensorProto.FLOAT, dims))
    model.graph.output.append(helper.make_tensor_value_info(OUTPUT, onnx.TensorProto.FLOAT, ["batch", None]))
    onnx.checker.check_model(model)
    return model


def scores_of(subject: Subject, net: NetParameter | None = None) -> tuple[NetParameter, str]:
    """The net in full precision, or what became of it, and the name of its class scores in there."""
    main = next(output for output in net_outputs(subject.model.net) if output.is_main)
    with_taps, [blob] = tapped(net or subject.model.inference.net, [main])
    flat = single_assignment(with_taps)
    place = max(i for i, layer in enumerate(with_taps.layer) if blob in layer.top)
    return flat, flat.layer[place].top[list(with_taps.layer[place].top).index(blob)]


def scores(subject: Subject, model: Model) -> FloatArray:
    """The class scores of a net for all test images."""
    net, blob = scores_of(subject, model.inference.net)
    with closing(subject.open_engine(net, model.weights, subject.validation.shapes)) as engine:
        runner = engine.compile(0, len(net.layer), [blob])
        found = [runner.run(batch.feeds).blobs[blob] for batch in subject.validation.batches(BATCH)]
    return np.concatenate([made.reshape(len(made), -1) for made in found])


def images_of(feed: Feed) -> FloatArray:
    """What goes into the only input, all images."""
    return np.concatenate([next(iter(batch.feeds.values())) for batch in feed.batches(BATCH)])


def theirs(python: Path, folder: Path, setting: str) -> Iterator[Result]:
    """What the other tools of an environment make of the files in a folder."""
    listed = subprocess.run([python, WORKER, folder, setting], check=True, stdout=subprocess.PIPE, text=True)
    for line in listed.stdout.splitlines():
        if line.startswith("{"):
            found = json.loads(line)
            yield Result(found["tool"], np.load(folder / found["scores"]), found["seconds"])


def ours(subject: Subject, setting: str, numbers: list[int]) -> Iterator[Result]:
    """What labelfree makes of the same images."""
    bits, activation_bits = map(int, setting.split("/"))
    general = {"bits": bits, "grid": "uniform", "first_last": {"bits": 8, "grid": "uniform"}}
    activations = subject.config.activations.model_copy(update={"levels": 2**activation_bits - 1})
    for name, solver in OURS.items():
        start = time.monotonic()
        model = subject.quantized(solver, (WeightSettings.model_validate(general), activations), numbers)
        seconds = time.monotonic() - start
        yield Result(name, scores(subject, model), seconds)


def row(name: str, setting: str, result: Result, full: FloatArray, labels: list[int | None]) -> str:
    """One line of the table."""
    own = result.scores.argmax(axis=1)
    right = own == np.array(labels)
    error = 100 * right.std() / np.sqrt(len(right))
    agreement = 100 * (own == full.argmax(axis=1)).mean()
    kl = divergences(full, result.scores).mean()
    cells = [name, setting, result.tool, f"{100 * right.mean():.2f} ± {error:.2f}"]
    return f"| {' | '.join([*cells, f'{agreement:.2f}', f'{kl:.4f}', f'{result.seconds:.0f}'])} |"


@click.command(help=__doc__)
@click.argument("configs", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--python", required=True, type=click.Path(exists=True, path_type=Path), help="Theirs.")
@click.option("--settings", default="8/8,4/8,2/8,4/4", show_default=True, callback=checked_settings)
@click.option("--count", type=click.IntRange(1), default=256, show_default=True, help="Calibration images.")
@click.option("--images", type=click.IntRange(1), help="Validation images (default: all).")
def main(
    configs: tuple[Path, ...], python: Path, settings: list[str], count: int, images: int | None
) -> None:
    """Print the table."""
    click.echo("| net | bits | tool | top-1 | agreement | KL, nats | seconds |")
    click.echo("| --- " * 7 + "|")
    for path in configs:
        subject = Subject(load(path), "paired", count, images)
        labels = [label for batch in subject.validation.batches(BATCH) for label in batch.labels]
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            onnx.save(as_onnx(subject), folder / "full.onnx")
            np.save(folder / "calibration.npy", images_of(subject.calibration))
            np.save(folder / "test.npy", images_of(subject.validation))
            full = scores(subject, subject.model)
            for setting in settings:
                numbers = list(range(len(subject.calibration)))
                for result in (*theirs(python, folder, setting), *ours(subject, setting, numbers)):
                    click.echo(row(subject.config.name, setting, result, full, labels))


if __name__ == "__main__":
    main()
