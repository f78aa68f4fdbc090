"""The weights stage: ResNet-18 and VGG16-BN with random weights, from caffemodel to caffemodel.

python -m benchmarks.weights [--runs 5] [--solver optimal]
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from benchmarks.measure import Measurement, in_new_process, measured, spread
from benchmarks.models import random_weights, read_net
from quantize.caffenet import InferenceNet
from quantize.caffenet.model import Model
from quantize.settings import WeightSettings
from quantize.stages.weights import choices, weights_quan

NETS = ("resnet18", "resnet50", "vgg16_bn")


def make_model(name: str, path: Path) -> None:
    """Write a caffemodel."""
    with open(path, "wb") as file:
        random_weights(InferenceNet.of(read_net(name))).write(file)


def quantize(name: str, path: Path, solver: str) -> Measurement:
    """Read a caffemodel, quantize its weights, write the result."""
    net = read_net(name)
    with measured() as found:
        model = Model.of(net, path)
        chosen = choices(model.inference.net, WeightSettings())
        quantized, _ = weights_quan(model, chosen, "reference" if solver == "reference" else "optimal")
        with open(path.with_suffix(".quantized"), "wb") as file:
            quantized.weights.write(file)
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--solver", choices=("optimal", "reference"), default="optimal")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for name in NETS:
            path = Path(folder) / f"{name}.caffemodel"
            in_new_process(make_model, name, path)
            runs = [in_new_process(quantize, name, path, arguments.solver) for _ in range(arguments.runs)]
            print(
                f"{name}: {spread([run.seconds for run in runs])} s, "
                f"processor time {spread([run.cpu_seconds for run in runs])} s, "
                f"model {path.stat().st_size >> 20} MiB, peak {max(run.peak for run in runs) >> 20} MiB",
                flush=True,
            )


if __name__ == "__main__":
    main()
