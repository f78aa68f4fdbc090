"""Renorm, activations and evaluate against one plain forward pass of the same images through onnxruntime.

The plain pass is the full-precision net exported as one graph, with onnxruntime's own settings, its
optimisations on, the same number of threads and the batch that is fastest here. Both read the same LMDB
through the same loader, and they take turns, so that a busy machine slows down both.

    python -m benchmarks.stages [--images FOLDER] [--runs 5] [--rows renorm-resnet18-200,...]
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path

import onnxruntime

from benchmarks.measure import Measurement, in_new_process, measured, spread
from benchmarks.models import INPUT, fitted_model, make_images, read_net
from quantize.caffenet import TEST, TRAIN, InferenceNet, Weights, needed_layers
from quantize.caffenet.model import Model
from quantize.data.feed import Feed
from quantize.data.loader import Images
from quantize.data.sources import open_source
from quantize.data.transform import Transform
from quantize.engines import engine_opener
from quantize.engines.onnx.engine import OnnxEngine, Translation
from quantize.engines.onnx.graph import Graph
from quantize.host import available_threads
from quantize.measure.evaluate import evaluate
from quantize.measure.outputs import net_outputs
from quantize.settings import ActivationSettings, CaffeProcess, RenormSettings, WeightSettings
from quantize.stages.activations import activations_quan
from quantize.stages.renorm import renorm
from quantize.stages.weights import choices, weights_quan

PLAIN_BATCHES = (1, 4, 8, 16, 32)
TRIAL_IMAGES = 64
MEAN = (104.0, 117.0, 123.0)


@dataclass(frozen=True)
class Row:
    """One comparison: a stage, a net, so many images, the bound of memory, the ratio to reach."""

    stage: str
    net: str
    images: int
    memory: int | None
    target: float

    @property
    def name(self) -> str:
        """As ``--rows`` names it."""
        return f"{self.stage}-{self.net}-{self.images}"


ROWS = (
    Row("renorm", "resnet18", 200, None, 1.3),
    Row("renorm", "resnet18", 1000, 2 << 30, 1.6),
    Row("renorm", "resnet50", 1000, 2 << 30, 1.8),
    Row("activations", "resnet18", 400, None, 1.2),
    Row("evaluate", "resnet18", 400, None, 1 / 0.9),
)


@dataclass(frozen=True)
class Setting:
    """Where a row's net and images are."""

    net: str
    folder: Path
    images: Path
    threads: int

    def weights(self, kind: str) -> Path:
        """The caffemodel: ``full`` or ``quantized``."""
        return self.folder / f"{self.net}_{kind}.caffemodel"

    def feed(self, count: int, phase: int) -> Images:
        """The first images."""
        transform = Transform(crop_size=INPUT[-1], mirror=phase == TRAIN, mean_value=MEAN)
        return Images(open_source(self.images), transform, phase, count, threads=self.threads)


def prepare(setting: Setting) -> None:
    """Write a net's random weights and their quantized version."""
    net = read_net(setting.net)
    full = fitted_model(net, setting.feed(TRIAL_IMAGES, TRAIN), setting.threads)
    quantized, _ = weights_quan(full, choices(full.inference.net, WeightSettings()), "optimal")
    for kind, model in (("full", full), ("quantized", quantized)):
        with open(setting.weights(kind), "wb") as file:
            model.weights.write(file)


def plain_pass(setting: Setting, count: int, phase: int, batch: int) -> Measurement:
    """One forward pass of the whole net through onnxruntime."""
    test = InferenceNet.of(read_net(setting.net))
    engine = OnnxEngine(test.net, Weights.read(setting.weights("full")), {test.blob: INPUT}, 1)
    translation = Translation(engine, Graph())
    for layer in needed_layers(test.net.layer, [test.scores]):
        translation.add(layer)
    translation.output(translation.blob(test.scores))
    model, (name,), constants = translation.graph.model()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = setting.threads
    options.log_severity_level = 3
    values = [onnxruntime.OrtValue.ortvalue_from_numpy(array) for array in constants.values()]
    options.add_external_initializers(list(constants), values)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    images = setting.feed(count, phase)
    with measured() as found:
        for pixels, _ in images.batches(batch):
            session.run(None, {name: pixels})
    return found


def stage(setting: Setting, row: Row) -> Measurement:
    """The stage, from the opened net to its findings."""
    net = read_net(setting.net)
    opener = engine_opener("onnx", CaffeProcess(), setting.threads)
    images = setting.feed(row.images, phase_of(row))
    model = Model(net, Weights())
    model = model.holding(Weights.read(setting.weights("full" if row.stage == "evaluate" else "quantized")))
    feed = Feed({model.inference.blob: images})
    with measured() as found:
        if row.stage == "renorm":
            renorm(model, feed, RenormSettings(statistics="measured"), opener, row.memory)
        elif row.stage == "activations":
            activations_quan(model, feed, ActivationSettings(), opener)
        else:
            evaluate({"fp32": model}, net_outputs(net), feed, opener)
    return found


def phase_of(row: Row) -> int:
    """Evaluation uses the centre crop."""
    return TEST if row.stage == "evaluate" else TRAIN


def rows_named(text: str) -> list[Row]:
    """The rows that ``--rows`` asks for.

    Raises:
        ArgumentTypeError: there is no such row.
    """
    rows = {row.name: row for row in ROWS}
    names = text.split(",")
    for name in names:
        if name not in rows:
            raise argparse.ArgumentTypeError(f"no row {name!r}; these are: {', '.join(rows)}")
    return [rows[name] for name in names]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--images", type=Path, help="a folder of photographs; default: generated images")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=available_threads())
    parser.add_argument("--rows", type=rows_named, default=ROWS)
    arguments = parser.parse_args()
    rows = arguments.rows
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lmdb = make_images(folder, max(row.images for row in rows), arguments.images)
        nets = {row.net: Setting(row.net, folder, lmdb, arguments.threads) for row in rows}
        batches = {}
        for setting in nets.values():
            in_new_process(prepare, setting)
            trials = {b: in_new_process(plain_pass, setting, TRIAL_IMAGES, TRAIN, b) for b in PLAIN_BATCHES}
            batches[setting.net] = min(trials, key=lambda b: trials[b].cpu_seconds)
            print(f"{setting.net}: plain pass in batches of {batches[setting.net]}", flush=True)
        for row in rows:
            setting = nets[row.net]
            pairs = []
            for run in range(1, arguments.runs + 1):
                plain = in_new_process(plain_pass, setting, row.images, phase_of(row), batches[setting.net])
                ours = in_new_process(stage, setting, row)
                pairs.append((plain, ours))
                print(f"{row.name}, run {run}: {ours}; plain: {plain}", flush=True)
            print(
                f"{row.name}: seconds {spread([ours.seconds for _, ours in pairs], '.1f')}, "
                f"plain {spread([plain.seconds for plain, _ in pairs], '.1f')}; "
                f"ratio {spread([ours.seconds / plain.seconds for plain, ours in pairs])}, "
                f"of processor time {spread([o.cpu_seconds / p.cpu_seconds for p, o in pairs])}, "
                f"target {row.target:.2f}; "
                f"peak {max(ours.peak for _, ours in pairs) >> 20} MiB, "
                f"plain {max(plain.peak for plain, _ in pairs) >> 20} MiB; {len(pairs)} runs",
                flush=True,
            )


if __name__ == "__main__":
    main()
