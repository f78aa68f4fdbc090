"""Labels of the images that a net is measured on: subfolders as classes, images without a label."""

import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest

from quantize.commands.doctor import examine
from quantize.data import open_source
from quantize.job.evaluation import evaluate_run
from quantize.job.run import Run
from quantize.record import Accuracy, Evaluation
from tests.conftest import Job
from tests.heard import Heard

CLASSES = 7
"""Of the job's net."""


@pytest.fixture(scope="module")
def quantized_template(job_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The job, quantized, and its validation images as files ``images/NUMBER.png``, in the LMDB's order."""
    folder = tmp_path_factory.mktemp("labels") / "job"
    shutil.copytree(job_template, folder)
    (folder / "images").mkdir()
    source = open_source(folder / "test_lmdb")
    for index in range(len(source)):
        pixels = source.read(index).pixels.transpose(1, 2, 0)
        assert cv2.imwrite(str(folder / "images" / f"{index:02}.png"), np.ascontiguousarray(pixels))
    Run(Job(folder).config()).quantize()
    return folder


@pytest.fixture
def quantized(quantized_template: Path, tmp_path: Path) -> Job:
    return Job(Path(shutil.copytree(quantized_template, tmp_path / "job")))


def evaluated(job: Job, source: str, heard: Heard | None = None) -> Evaluation:
    images = ("data.transform.resize=[11, 11]", f"data.validation.source={job.folder / source}")
    return evaluate_run(job.config(*images), progress=heard or Heard())


def labels(job: Job) -> list[int]:
    source = open_source(job.folder / "test_lmdb")
    found = [source.read(index).label for index in range(len(source))]
    return [label for label in found if label is not None]


def class_folders(job: Job, names: list[str]) -> Path:
    """The images below the folder that has their class's name."""
    for index, label in enumerate(labels(job)):
        folder = job.folder / "classes" / names[label % len(names)]
        folder.mkdir(parents=True, exist_ok=True)
        (job.folder / "images" / f"{index:02}.png").rename(folder / f"{index:02}.png")
    return job.folder / "classes"


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (list("abcdefg"), "7 folders taken as 7 classes: a is 0, g is 6"),
        (list("0123456"), "7 folders taken as classes, the numbers that are their names"),
    ],
)
def test_one_folder_per_class_gives_the_accuracy_of_the_labels(
    quantized: Job, names: list[str], text: str
) -> None:
    wanted = evaluated(quantized, "test_lmdb")
    folder = class_folders(quantized, names)
    heard = Heard()
    found = evaluated(quantized, "classes", heard)
    assert found.accuracy == wanted.accuracy
    assert found.labeled == found.images == len(labels(quantized))
    assert f"{folder}: {text}" in heard.notes
    config = quantized.config("data.transform.resize=[11, 11]", f"data.validation.source={folder}")
    (check,) = (check for check in examine(config, None) if check.what == "data.validation")
    assert check.seen.endswith(f"; {folder}: {text}")


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (list("abcdef"), "the net has 7 classes"),
        (["0", "1", "9"], "9 is none of the net's classes 0 to 6"),
    ],
)
def test_folders_that_cannot_be_the_classes_are_no_labels(
    quantized: Job, names: list[str], reason: str
) -> None:
    folder = class_folders(quantized, names)
    heard = Heard()
    found = evaluated(quantized, "classes", heard)
    assert found.labeled == 0
    assert found.accuracy["fp32"] == Accuracy(None, None)
    assert found.images == len(labels(quantized))
    (note,) = (note for note in heard.notes if note.startswith(f"{folder}: "))
    assert f"; but {reason}, so the images are read as unlabeled; a list of `path label` lines" in note


def test_images_beside_the_folders_leave_all_unlabeled(quantized: Job) -> None:
    folder = class_folders(quantized, list("abcdefg"))
    (folder / "a" / "00.png").rename(folder / "00.png")
    heard = Heard()
    assert evaluated(quantized, "classes", heard).labeled == 0
    assert f"{folder}: its images are read as unlabeled, for 00.png lies beside the subfolders" in heard.notes


def test_accuracy_is_that_of_the_labeled_images(quantized: Job) -> None:
    """The same as of a list of these images alone; agreement is that of all."""
    lines = [f"images/{index:02}.png {label}" for index, label in enumerate(labels(quantized))]
    some = [line for index, line in enumerate(lines) if index % 4]
    mixed = [line if index % 4 else line.split()[0] for index, line in enumerate(lines)]
    for name, content in (("all", lines), ("some", some), ("mixed", mixed)):
        (quantized.folder / name).write_text("\n".join(content))
    heard = Heard()
    found = evaluated(quantized, "mixed", heard)
    assert (found.images, found.labeled) == (len(lines), len(some))
    assert found.accuracy == evaluated(quantized, "some").accuracy
    assert found.agreement == evaluated(quantized, "all").agreement
    told = f"accuracy is that of the {len(some)} of {len(lines)} images that have a label"
    assert told in heard.notes
    report = json.loads((quantized.out / "report.json").read_text())
    assert report["evaluation"]["labeled"] == len(lines)  # of the last evaluation
