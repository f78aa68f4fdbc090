"""What a run opens and reads, and what a large folder of images costs, on the digits.

    python -m benchmarks.reading [--images 200000] [--runs 3]

The folder holds hard links to the images that the digits network is calibrated on. What is counted is what
Python opens to read (its audit events).
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import cv2

from benchmarks.measure import Measurement, in_new_process, measured, spread
from quantize.commands.config import load
from quantize.data.sources import open_source
from quantize.job.run import Run

DIGITS = Path(__file__).resolve().parents[1] / "configs"
FEW = 1000


def run(output: Path, source: Path | None) -> Measurement:
    """All three stages."""
    given = [f"output={output}", "data.transform.force_gray=true", "threads=1"]
    if source is not None:
        given += [f"data.calibration.source={source}", "data.calibration.images=null"]
    config = load(DIGITS / "digits.yaml", assignments=given)
    with measured() as found:
        Run(config).quantize()
    return found


def opened(output: Path) -> Counter[str]:
    """The files that a run opens to read, and how often."""
    found: Counter[str] = Counter()

    def hear(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(arguments[0], str | os.PathLike):
            path, mode, _ = arguments
            if mode is not None and not set(mode) & set("wax+"):
                found[os.path.basename(os.path.dirname(path)) + "/" + os.path.basename(path)] += 1

    sys.addaudithook(hear)
    run(output, None)
    return found


def make_folder(folder: Path, count: int) -> Path:
    """A folder of so many images."""
    source = open_source(DIGITS / "models/digits/calibration_lmdb")
    folder.mkdir()
    for number in range(count):
        path = folder / f"{number:07}.png"
        if number < FEW:
            cv2.imwrite(str(path), source.read(number % len(source)).pixels[0])
        else:
            os.link(folder / f"{number % FEW:07}.png", path)
    return folder


def main() -> None:
    """Print the counts and the times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--images", type=int, default=200_000)
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "out"
        for name, count in sorted(in_new_process(opened, output).items()):
            if name.endswith((".caffemodel", ".mdb", ".prototxt", "report.json")):
                print(f"{name}: read {count} times")
        for count in (FEW, arguments.images):
            images = make_folder(Path(folder) / f"images{count}", count)
            runs = [in_new_process(run, output, images) for _ in range(arguments.runs)]
            print(
                f"{count:,} images: {spread([each.seconds for each in runs])} s, "
                f"processor time {spread([each.cpu_seconds for each in runs])} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
