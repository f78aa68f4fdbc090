"""docs/troubleshooting.md keeps its word: every mistake in it is made here and prints what stands there."""

import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import pytest

from quantize import cli
from quantize.caffenet import BlobProto, Weights
from quantize.job.export import export_run
from quantize.job.output import OutputFolder
from quantize.job.run import Run
from tests.conftest import Job
from tests.nets import write_images

CAFFE_PROTO = Path(cli.__file__).with_name("caffenet") / "caffe.proto"
PAGE = Path(__file__).parents[1] / "docs" / "troubleshooting.md"
ENTRY = re.compile(r"<!-- (\w+) -->\n\n    \$ labelfree ([^\n]*)\n((?:    [^\n]*\n)+)")


@dataclass(frozen=True)
class Entry:
    """What the page says about one mistake: the command and what it prints."""

    name: str
    command: str
    printed: str


ENTRIES = [
    Entry(name, command, "".join(line[4:] + "\n" for line in printed.splitlines()))
    for name, command, printed in ENTRY.findall(PAGE.read_text(encoding="utf-8"))
]
MISTAKES: dict[str, Callable[[Job], object]] = {}


def mistake(make: Callable[[Job], object]) -> Callable[[Job], object]:
    """Register what a user does to a job that works; what it gives is kept until the command is over."""
    MISTAKES[make.__name__] = make
    return make


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@mistake
def nothing_given(_job: Job) -> None:
    """The command line is empty."""


@mistake
def misspelt_stage(_job: Job) -> None:
    """The command line has the bad value."""


@mistake
def no_config(_job: Job) -> None:
    """The command line names another file."""


@mistake
def no_weights_option(_job: Job) -> None:
    """The command line lacks something."""


@mistake
def no_prototxt(job: Job) -> None:
    (job.folder / "net.prototxt").unlink()


@mistake
def no_caffemodel(job: Job) -> None:
    (job.folder / "net.caffemodel").unlink()


@mistake
def misspelt_key(job: Job) -> None:
    replace(job.yaml, "renorm: {images: 20}", "renorm: {image: 20}")


@mistake
def not_a_number(job: Job) -> None:
    replace(job.yaml, "renorm: {images: 20}", "renorm: {images: all}")


@mistake
def too_many_bits(_job: Job) -> None:
    """The command line has the bad value."""


@mistake
def budget_too_small(job: Job) -> None:
    """The command line has the bad value."""
    replace(job.yaml, "source: train_lmdb", "source: train_lmdb, images: 20")


@mistake
def budget_without_classes(job: Job) -> None:
    replace(job.folder / "net.prototxt", 'type: "SoftmaxWithLoss"', 'type: "EuclideanLoss"')
    replace(job.folder / "net.prototxt", 'type: "Accuracy"', 'type: "EuclideanLoss"')


@mistake
def broken_yaml(job: Job) -> None:
    replace(job.yaml, "name: residual", "name: residual\n\tseed: 1")


@mistake
def unset_variable(job: Job) -> None:
    replace(job.yaml, "source: train_lmdb", "source: $IMAGENET/train_lmdb")


@mistake
def half_a_caffemodel(job: Job) -> None:
    path = job.folder / "net.caffemodel"
    os.truncate(path, path.stat().st_size // 2)


@mistake
def files_swapped(job: Job) -> None:
    replace(
        job.yaml,
        "prototxt: net.prototxt, weights: net.caffemodel",
        "prototxt: net.caffemodel, weights: net.prototxt",
    )


@mistake
def lfs_pointer(job: Job) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943\nsize 4727\n"
    (job.folder / "net.caffemodel").write_text(pointer)


@mistake
def missing_brace(job: Job) -> None:
    replace(job.folder / "net.prototxt", "stride: 2 bias_term: false } }", "stride: 2 bias_term: false }")


@mistake
def misspelt_field(job: Job) -> None:
    replace(job.folder / "net.prototxt", "kernel_size: 1 stride: 2", "kernal_size: 1 stride: 2")


@mistake
def no_input(job: Job) -> None:
    path = job.folder / "net.prototxt"
    text = path.read_text()
    path.write_text('name: "residual"\n' + text[text.index('layer { name: "conv1"') :])


@mistake
def another_net(job: Job) -> None:
    replace(job.folder / "net.prototxt", "num_output: 12", "num_output: 10")


@mistake
def renamed_layer(job: Job) -> None:
    replace(job.folder / "net.prototxt", 'name: "right_b"', 'name: "conv_right_b"')


@mistake
def one_name_twice(job: Job) -> None:
    replace(job.folder / "net.prototxt", 'name: "right_b"', 'name: "right_a"')


@mistake
def quantized_before(job: Job) -> None:
    Run(job.config()).quantize(("weights",))


@mistake
def diverged(job: Job) -> None:
    weights = Weights.read(job.folder / "net.caffemodel")
    weights.replace("fc1", [np.full_like(blob, np.nan) for blob in weights["fc1"]])
    with open(job.folder / "net.caffemodel", "wb") as file:
        weights.write(file)


@mistake
def fork_field(job: Job) -> None:
    replace(
        job.folder / "net.prototxt", "kernel_size: 1 stride: 2", "kernel_size: 1 stride: 2 sparse_ratio: 0.5"
    )


@mistake
def fork_arithmetic(job: Job) -> None:
    fork_field(job)
    shutil.copyfile(CAFFE_PROTO, job.folder / "fork.proto")
    message = "message ConvolutionParameter {"
    replace(job.folder / "fork.proto", message, message + " optional float sparse_ratio = 9000;")


@mistake
def unknown_layer(job: Job) -> None:
    replace(job.folder / "net.prototxt", 'type: "Eltwise"', 'type: "WeightedSum"')


@mistake
def training_data_only(job: Job) -> None:
    """The second of two layers called data is that of the TEST phase."""
    before, train, test = (job.folder / "net.prototxt").read_text().split('layer { name: "data"')
    rest = test[test.index('layer { name: "conv1"') :]
    (job.folder / "net.prototxt").write_text(f'{before}layer {{ name: "data"{train}{rest}')


@mistake
def unfed_input(job: Job) -> None:
    replace(
        job.folder / "net.prototxt",
        'bottom: "left" bottom: "right_b"',
        'bottom: "left" bottom: "right_b" bottom: "mask"',
    )
    text = (job.folder / "net.prototxt").read_text()
    mask = 'layer { name: "mask" type: "Input" top: "mask" input_param { shape { dim: [1, 8, 5, 5] } } }\n'
    at = text.index('layer { name: "conv1"')
    (job.folder / "net.prototxt").write_text(text[:at] + mask + text[at:])


@mistake
def no_images(job: Job) -> None:
    replace(job.yaml, "source: train_lmdb", "source: trian_lmdb")


@mistake
def half_an_lmdb(job: Job) -> None:
    os.truncate(job.folder / "train_lmdb/data.mdb", 8192)


@mistake
def leveldb(job: Job) -> None:
    (job.folder / "train_leveldb").mkdir()
    for name in ("CURRENT", "MANIFEST-000002", "000005.ldb"):
        (job.folder / "train_leveldb" / name).touch()
    replace(job.yaml, "source: train_lmdb", "source: train_leveldb")


@mistake
def too_few_images(job: Job) -> None:
    replace(job.yaml, "renorm: {images: 20}", "renorm: {images: 1000}")


@mistake
def heic_photos(job: Job) -> None:
    (job.folder / "phone").mkdir()
    for index in range(20):
        (job.folder / "phone" / f"IMG_{index:04}.HEIC").touch()


@mistake
def misread_line(job: Job) -> None:
    Run(job.config()).quantize()
    (job.folder / "labeled.csv").write_text("# path,class\nphotos/00.png,cat\n")


@mistake
def too_few_values(job: Job) -> None:
    unfed_input(job)
    np.save(job.folder / "masks.npy", np.zeros((19, 8, 5, 5), np.float32))


@mistake
def crop_too_large(job: Job) -> None:
    replace(job.folder / "net.prototxt", "crop_size: 9", "crop_size: 224")


@mistake
def gray_images(job: Job) -> None:
    replace(job.yaml, "source: train_lmdb", "source: gray_lmdb")
    write_images(job.folder / "gray_lmdb", 20, (1, 11, 11))


@mistake
def damaged_photo(job: Job) -> None:
    (job.folder / "photos").mkdir()
    for index in range(20):
        cv2.imwrite(
            str(job.folder / "photos" / f"{index:02}.png"), np.full((11, 11, 3), 10 * index, np.uint8)
        )
    os.truncate(job.folder / "photos/07.png", 40)


@mistake
def wrong_labels(job: Job) -> None:
    replace(job.folder / "net.prototxt", "num_output: 7", "num_output: 5")
    weights = Weights.read(job.folder / "net.caffemodel")
    weights.replace("fc2", [blob[:5] for blob in weights["fc2"]])
    with open(job.folder / "net.caffemodel", "wb") as file:
        weights.write(file)
    Run(job.config()).quantize()


@mistake
def too_little_memory(_job: Job) -> None:
    """The command line has the bad value."""


@mistake
def no_pycaffe(_job: Job) -> None:
    """The command line asks for Caffe, which is not there."""


@mistake
def stage_before_missing(_job: Job) -> None:
    """Nothing has been run."""


@mistake
def nothing_quantized(_job: Job) -> None:
    """Nothing has been run."""


@mistake
def nothing_exported(job: Job) -> None:
    """Quantized, but not exported."""
    Run(job.config()).quantize()


@mistake
def mean_image_for_pixels(job: Job) -> None:
    """The transform subtracts a mean image."""
    mean = BlobProto(data=np.full(3 * 11 * 11, 100.0))
    mean.shape.dim.extend((1, 3, 11, 11))
    (job.folder / "mean.binaryproto").write_bytes(mean.SerializeToString())
    replace(job.yaml, "  validation:", "  transform: {mean_file: mean.binaryproto}\n  validation:")
    Run(job.config()).quantize()


@mistake
def results_of_another_model(job: Job) -> None:
    Run(job.config()).quantize(("weights",))
    replace(job.folder / "net.prototxt", 'name: "residual"', 'name: "other"')


@mistake
def results_of_a_killed_run(job: Job) -> None:
    Run(job.config()).quantize(("weights", "renorm"))
    (job.out / "residual_renorm.caffemodel").write_bytes(b"")


@mistake
def output_is_a_file(job: Job) -> None:
    job.out.write_text("")


@mistake
def two_runs(job: Job) -> OutputFolder:
    return OutputFolder(job.out)


@mistake
def config_is_there(_job: Job) -> None:
    """The job has a config.yaml."""


@mistake
def codes_of_a_full_byte(job: Job) -> None:
    replace(job.yaml, "activations: {", "activations: {levels: 255, ")
    Run(job.config()).quantize()


@mistake
def damaged_packed_net(job: Job) -> None:
    Run(job.config()).quantize()
    export_run(job.config(), "caffe")
    packed = job.out / "residual.lfq"
    packed.write_bytes(packed.read_bytes()[:-2000])


def test_the_page_has_all_mistakes() -> None:
    assert [entry.name for entry in ENTRIES] == list(MISTAKES)


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_the_mistake_prints_what_the_page_says(
    entry: Entry, job: Job, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    held = MISTAKES[entry.name](job)
    monkeypatch.chdir(job.folder)
    monkeypatch.delenv("IMAGENET", raising=False)
    monkeypatch.setattr(sys, "argv", ["labelfree", "--quiet", *shlex.split(entry.command)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    if isinstance(held, OutputFolder):
        held.close()
    printed = capsys.readouterr().err
    if entry.printed.endswith(" ...\n"):
        printed = printed[: len(entry.printed) - len("...\n")] + "...\n"
    assert printed == entry.printed
    assert end.value.code == 2
