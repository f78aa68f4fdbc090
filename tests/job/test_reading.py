"""What a run opens and reads, counted where Python opens files: everything once."""

import os
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from quantize.commands.init import write_initial
from quantize.data.files import files_in_folder
from quantize.job.evaluation import evaluate_run
from quantize.job.run import Run
from quantize.record import STAGES
from quantize.settings import ModelFiles
from tests.conftest import Job
from tests.heard import Heard

_heard: list["Opened"] = []


class Opened:
    """How often files were opened to be read, and folders listed, by path below a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.reads: Counter[str] = Counter()
        self.listings: Counter[str] = Counter()

    def hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in ("os.listdir", "os.scandir"):
            self.listings[self.name(arguments[0])] += 1
        elif event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
            path, mode, _ = arguments
            if mode is not None and not set(mode) & set("wax+"):  # os.open has no mode, and reads nothing
                self.reads[self.name(path)] += 1

    def name(self, path: Any) -> str:
        text = os.path.abspath(os.fsdecode(path)) if not isinstance(path, int) else str(path)
        return os.path.relpath(text, self.folder)


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    for counter in _heard:
        counter.hear(event, arguments)


sys.addaudithook(_hook)  # cannot be taken away; without a counter it does nothing


@contextmanager
def counted(job: Job) -> Iterator[Opened]:
    counter = Opened(job.folder)
    _heard.append(counter)
    try:
        yield counter
    finally:
        _heard.remove(counter)


GIVEN, QUANTIZED, RENORM = (
    "net.caffemodel",
    "out/residual_quantized.caffemodel",
    "out/residual_renorm.caffemodel",
)


def test_a_run_reads_every_file_once(job: Job) -> None:
    with counted(job) as opened:
        Run(job.config()).quantize()
    assert opened.reads[GIVEN] == 1
    assert opened.reads[QUANTIZED] == opened.reads[RENORM] == 0  # handed on, hashed while written
    assert opened.reads["train_lmdb/data.mdb"] == opened.reads["test_lmdb/data.mdb"] == 1
    assert opened.reads["out/report.json"] == 0


@pytest.mark.parametrize(
    "given", [("weights.solver=data_aware", "weights.images=20"), ("weights.budget=4.5", "weights.images=20")]
)
def test_so_does_one_that_looks_at_images_in_every_stage(job: Job, given: tuple[str, ...]) -> None:
    with counted(job) as opened:
        Run(job.config(*given)).quantize()
    assert opened.reads[GIVEN] == opened.reads["train_lmdb/data.mdb"] == 1
    assert opened.reads[QUANTIZED] == opened.reads[RENORM] == 0


def test_stage_by_stage_a_caffemodel_is_read_and_perhaps_hashed(job: Job) -> None:
    Run(job.config()).quantize(("weights",))
    for stage in ("renorm", "activations"):
        with counted(job) as opened:
            Run(job.config()).quantize((stage,))  # type: ignore[arg-type]
        assert opened.reads[GIVEN] == 1
        assert opened.reads[QUANTIZED] <= 2
        assert opened.reads[RENORM] <= 2
        assert opened.reads["train_lmdb/data.mdb"] == 1


def test_a_run_with_nothing_to_do_hashes_what_is_there(job: Job) -> None:
    Run(job.config()).quantize()
    with counted(job) as opened:
        Run(job.config()).quantize(resume=True)
    assert opened.reads[GIVEN] == opened.reads[QUANTIZED] == 1
    assert opened.reads[RENORM] <= 2  # for the prototxts, too
    assert opened.reads["train_lmdb/data.mdb"] == 1


def test_evaluate_reads_and_hashes(job: Job) -> None:
    Run(job.config()).quantize()
    with counted(job) as opened:
        evaluate_run(job.config())
    assert opened.reads[GIVEN] == 1
    assert max(opened.reads[QUANTIZED], opened.reads[RENORM]) <= 2
    assert opened.reads["test_lmdb/data.mdb"] == 1


def test_a_run_can_be_run_again(job: Job) -> None:
    run = Run(job.config())
    first = run.quantize()
    again = run.quantize(force=True)
    assert again.outputs == first.outputs


def test_init_opens_the_images_once(job: Job) -> None:
    model = ModelFiles(prototxt=job.folder / "net.prototxt", weights=job.folder / "net.caffemodel")
    with counted(job) as opened:
        write_initial(model, job.folder / "train_lmdb", job.folder / "new.yaml", force=False)
    assert opened.reads[GIVEN] == opened.reads["train_lmdb/data.mdb"] == 1


# ---- Folders of images ----

IMAGES = 60


@pytest.fixture
def photos(job: Job) -> Path:
    folder = job.folder / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(IMAGES):
        coarse = rng.integers(0, 256, (4, 4, 3), np.uint8)
        image = cv2.resize(coarse, (9, 9), interpolation=cv2.INTER_CUBIC)
        assert cv2.imwrite(str(folder / f"{number:02}.png"), image)
    return folder


def test_a_folder_is_listed_once_and_few_of_its_files_are_opened(job: Job, photos: Path) -> None:
    with counted(job) as opened:
        Run(job.config(f"data.calibration.source={photos}", "data.validation=null")).quantize()
    assert opened.listings["photos"] == 1
    read = {name: count for name, count in opened.reads.items() if name.startswith("photos/")}
    assert sum(read.values()) < 4 * IMAGES  # the transform check looks at all 60, the stages at 20 or 12


def test_only_the_images_that_are_used_count(job: Job, photos: Path) -> None:
    config = job.config(f"data.calibration.source={photos}", "data.validation=null")

    def done_again() -> list[str]:
        notes = Heard()
        Run(config, notes).quantize(resume=True)
        skipped = {note.split(":")[0] for note in notes.notes if "skipped" in note}
        return [stage for stage in STAGES if stage not in skipped]

    Run(config).quantize()
    os.utime(photos / "40.png", (0, 0))
    (photos / "61.png").write_bytes((photos / "02.png").read_bytes())
    assert done_again() == []
    os.utime(photos / "15.png", (0, 0))  # renorm looks at 20, activations at 12
    assert done_again() == ["renorm", "activations"]
    os.utime(photos / "05.png", (0, 0))
    assert done_again() == ["renorm", "activations"]
    (photos / "000.png").write_bytes((photos / "02.png").read_bytes())  # now the first
    assert done_again() == ["renorm", "activations"]


def test_folders_take_turns_in_the_order_of_their_names(tmp_path: Path) -> None:
    for name in ("b/2.png", "b/1.png", "a/3.PNG", "a/4.jpeg", "a/5.png", "b/.png", "b/none", "a/.x.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    files, _ = files_in_folder(tmp_path)
    found = [os.path.relpath(file.path, tmp_path) for file in files]
    assert found == ["a/3.PNG", "b/1.png", "a/4.jpeg", "b/2.png", "a/5.png"]
