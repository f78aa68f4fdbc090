"""Our pipeline against the published method run the published way through pycaffe, on the same images.

Needs the folder with real Caffe that scripts/caffe_root makes. The published way holds all images in one
batch, so the number of images is bounded by memory (ResNet-18: about 60 MB per image).

    python -m benchmarks.published [--images FOLDER] [--runs 1] [--renorm 100] [--activations 40]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import yaml

from benchmarks.measure import Measurement, in_new_process, measured
from benchmarks.models import INPUT, MODELS, make_images, read_net
from benchmarks.stages import Setting, prepare
from quantize.caffenet import TRAIN, format_prototxt
from quantize.commands.config import load
from quantize.host import available_threads
from quantize.job.prototxts import deploy_prototxt
from quantize.job.run import Run

NET = "resnet18"
WORKER = Path(__file__).with_name("published_worker.py")
DEFAULT_ROOT = Path.home() / ".cache" / "labelfree" / "caffe-bullseye"


def published(setting: Setting, root: Path, renorm: int, activations: int) -> dict[str, Measurement]:
    """Run the worker; a measurement per stage, the peak being that of the whole."""
    with tempfile.TemporaryDirectory(dir=root / "tmp") as name:
        folder = Path(name)
        shutil.copy(WORKER, folder)
        shutil.copy(setting.weights("full"), folder / "model.caffemodel")
        for count, file, prototxt, stored in (
            (renorm, "renorm.npy", "train.prototxt", False),
            (activations, "activations.npy", "test.prototxt", True),
        ):
            ((pixels, _),) = setting.feed(count, TRAIN).batches(count)
            np.save(folder / file, pixels)
            net = deploy_prototxt(read_net(NET), INPUT)
            net.layer[0].input_param.shape[0].dim[0] = count
            for layer in net.layer:
                if layer.type == "BatchNorm":
                    layer.batch_norm_param.use_global_stats = stored
            (folder / prototxt).write_text(format_prototxt(net))
        inside = Path("/tmp") / folder.name
        done = subprocess.run(
            [root / "enter", "python3", inside / WORKER.name, inside],
            check=True,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OPENBLAS_NUM_THREADS": str(setting.threads)},
        )
    answer = json.loads(done.stdout.splitlines()[-1])
    return {stage: Measurement(*times, answer["peak"]) for stage, times in answer["times"].items()}


def ours(setting: Setting, renorm: int, activations: int) -> Measurement:
    """`labelfree quantize` from files to files."""
    config = setting.folder / "config.yaml"
    values = {
        "name": NET,
        "model": {"prototxt": str(MODELS / f"{NET}.prototxt"), "weights": str(setting.weights("full"))},
        "data": {"calibration": {"source": str(setting.images), "images": renorm}},
        "renorm": {"images": renorm},
        "activations": {"images": activations},
        "threads": setting.threads,
        "output": str(setting.folder / "out"),
    }
    config.write_text(yaml.safe_dump(values))
    with measured() as found:
        Run(load(config)).quantize(force=True)
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--images", type=Path, help="a folder of photographs; default: generated images")
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--renorm", type=int, default=100, help="images of renorm")
    parser.add_argument("--activations", type=int, default=40, help="images of the activations stage")
    parser.add_argument("--threads", type=int, default=available_threads())
    parser.add_argument("--caffe-root", type=Path, default=DEFAULT_ROOT)
    arguments = parser.parse_args()
    counts = (arguments.renorm, arguments.activations)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lmdb = make_images(folder, max(64, *counts), arguments.images)
        setting = Setting(NET, folder, lmdb, arguments.threads)
        in_new_process(prepare, setting)
        for _ in range(arguments.runs):
            before = in_new_process(ours, setting, *counts)
            theirs = published(setting, arguments.caffe_root, *counts)
            after = in_new_process(ours, setting, *counts)
            seconds = sum(stage.seconds for stage in theirs.values())
            cpu = sum(stage.cpu_seconds for stage in theirs.values())
            peak = theirs["weights"].peak
            for stage, found in theirs.items():
                print(f"published {stage}: {found.seconds:.1f} s, processor time {found.cpu_seconds:.1f} s")
            print(f"published in all: {seconds:.1f} s, processor time {cpu:.1f} s, peak {peak >> 20} MiB")
            for run in (before, after):
                print(
                    f"ours: {run}; {seconds / run.seconds:.0f} times faster, "
                    f"{cpu / run.cpu_seconds:.0f} times less processor time, "
                    f"1/{peak / run.peak:.1f} of the memory",
                    flush=True,
                )


if __name__ == "__main__":
    main()
