"""The documentation: every command in it runs, every link leads somewhere, what is generated is current."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import cv2
import numpy as np
import pytest

from quantize.caffenet import InferenceNet, Weights, format_prototxt, read_prototxt
from quantize.commands.config import load
from quantize.data import open_source
from quantize.job.prototxts import deploy_prototxt
from tests.caffe.conftest import caffe_plugin, caffe_root, caffe_run  # noqa: F401 - fixtures
from tests.nets import parse, random_weights

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    ROOT / "configs/README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
RUN_ELSEWHERE = ("caffe.md", "troubleshooting.md")
"""Pages with tests of their own: tests/caffe/test_caffe_page.py and tests/test_troubleshooting.py."""
OTHERS = ("python ncnn", "python opencv")
"""Kinds of blocks of deploy.md, which has a test for them."""
OPENCV4 = Path(sys.prefix) / "opencv4"
"""Where scripts/setup_env puts an OpenCV that reads Caffe networks; the one beside it does not."""
NOT_AGAIN = ("scripts/test", "scripts/demo")
"""The first runs this test; the second has one of its own."""


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Its kind is ``sh``, ``python run``, ``sh caffe`` or ``python caffe`` (run where Caffe is),
    ``python ncnn`` or ``python opencv`` (run with ncnn, or OpenCV 4), ``sh benchmark`` (takes minutes; only
    its options are checked), or that of something to read: ``text``, ``python``.
    """

    kind: str
    text: str


def blocks(page: Path) -> Iterator[Block]:
    text = page.read_text(encoding="utf-8")
    for match in re.finditer(r"^ *```([^\n]*)\n(.*?)^ *```$", text, re.MULTILINE | re.DOTALL):
        yield Block(match[1].strip(), match[2])


@dataclass(frozen=True)
class Place:
    """A folder with a copy of what the project's documentation leans on."""

    folder: Path

    def run(self, script: str, **variables: str) -> str:
        binaries = Path(sys.executable).parent
        environment = {
            **os.environ,
            "PATH": f"{binaries}:{os.environ['PATH']}",
            "LABELFREE_VENV": str(binaries.parent),
            "HOME": str(self.folder),
            **variables,
        }
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script],
            cwd=self.folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, f"{script}\n{done.stdout}\n{done.stderr}"
        return done.stdout


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("docs") / "labelfree"
    for name in ("configs", "scripts"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    # The environment is there already: this one.
    (folder / "scripts/setup_env").write_text("#!/bin/sh\n")
    user_files(folder)
    return Place(folder)


PAIR = """
layer { name: "image" type: "Input" top: "image" input_param { shape { dim: [1, 3, 32, 32] } } }
layer { name: "target" type: "Input" top: "target" input_param { shape { dim: [1, 4] } } }
layer { name: "conv" type: "Convolution" bottom: "image" top: "conv"
  convolution_param { num_output: 8 kernel_size: 5 stride: 4 } }
layer { name: "bn" type: "BatchNorm" bottom: "conv" top: "conv" }
layer { name: "relu" type: "ReLU" bottom: "conv" top: "conv" }
layer { name: "fc1" type: "InnerProduct" bottom: "conv" top: "fc1" inner_product_param { num_output: 8 } }
layer { name: "both" type: "Concat" bottom: "fc1" bottom: "target" top: "both" }
layer { name: "fc2" type: "InnerProduct" bottom: "both" top: "fc2" inner_product_param { num_output: 4 } }
"""


def user_files(folder: Path) -> None:
    """What a reader of your-model.md brings along: a network without data layers, photographs, some labels.

    The network is that of the digits, made to look at the sum of three colors of photographs: it wants
    104/117/123 subtracted, as most do, and computes what the digits network does.
    """
    config = load(ROOT / "configs/digits.yaml")
    net = deploy_prototxt(read_prototxt(config.model.prototxt), {"data": (3, 8, 8)})
    net.name = "net"
    (folder / "net.prototxt").write_text(format_prototxt(net))
    weights = Weights.read(config.model.weights)
    contrast, mean, mean_of_digits, scale_of_digits = 12, np.array([104, 117, 123]), 5, 0.125
    weights.replace("conv1", [weights["conv1"][0].repeat(3, axis=1) * scale_of_digits / (3 * contrast)])
    with open(folder / "net.caffemodel", "wb") as file:
        weights.write(file)
    (folder / "photos").mkdir()
    assert config.data.calibration is not None
    source = open_source(config.data.calibration.source)
    lines = []
    for number in range(1050):
        image = source.read(number % len(source))
        digit = np.kron(image.pixels[0], np.ones((3, 4), np.uint8))[:, :, None].astype(np.int64)
        pixels = (contrast * (digit - mean_of_digits) + mean).astype(np.uint8)
        path = folder / "photos" / f"{number:04d}.png"
        assert cv2.imwrite(str(path), pixels)
        if number < 100:
            lines.append(f"photos/{path.name} {image.label}\n")
    (folder / "labeled.txt").write_text("".join(lines))
    (folder / "pair.prototxt").write_text(PAIR)
    shapes = {"image": (3, 32, 32), "target": (4,)}
    with open(folder / "pair.caffemodel", "wb") as file:
        random_weights(InferenceNet.of(parse(PAIR)).net, shapes).write(file)
    np.save(folder / "targets.npy", np.random.default_rng(0).normal(size=(1050, 4)))


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.name not in RUN_ELSEWHERE], ids=lambda page: page.name
)
def test_every_command_runs(place: Place, page: Path) -> None:
    for block in blocks(page):
        if block.kind == "sh":
            lines = [line for line in block.text.splitlines() if line.split(" ")[0] not in NOT_AGAIN]
            # The network here is for 8x8 pixels, so `init` chose a shorter side of 9 and not 256.
            place.run("\n".join(lines).replace("--resize-short 256", "--resize-short 9"))


def test_python_prints_what_is_shown(place: Place) -> None:
    """The page is one session; numbers may differ by a few images (engines round differently)."""
    shown = list(blocks(ROOT / "docs/python.md"))
    code, outputs = shown[::2], shown[1::2]
    assert {block.kind for block in code} == {"python run"}
    assert {block.kind for block in outputs} == {"text"}
    end = "print('=' * 9)\n"
    (place.folder / "page.py").write_text(end.join(block.text for block in code))
    printed = place.run("python -W error::UserWarning page.py").split(f"{'=' * 9}\n")
    number = r"-?\d+\.\d+"
    for output, text in zip(outputs, printed, strict=True):
        assert re.sub(number, "#", text) == re.sub(number, "#", output.text)
        found, expected = (list(map(float, re.findall(number, each))) for each in (text, output.text))
        assert found == pytest.approx(expected, abs=0.8)


@pytest.mark.parametrize("kind", OTHERS)
def test_other_runtimes_see_what_labelfree_sees(place: Place, kind: str) -> None:
    if not (find_spec("ncnn") if kind == "python ncnn" else OPENCV4.is_dir()):
        pytest.skip(f"nothing to run a {kind} block with: run scripts/setup_env dev")
    if not (place.folder / "out/digits/digits.param").exists():
        test_every_command_runs(place, ROOT / "docs/deploy.md")
    [code] = [block.text for block in blocks(ROOT / "docs/deploy.md") if block.kind == kind]
    zeros = "image = np.zeros((1, 8, 8), np.float32)"
    assert zeros in code
    (place.folder / "other.py").write_text(code.replace(zeros, "image = np.load('image.npy')"))
    config = load(ROOT / "configs/digits.yaml")
    assert config.data.validation is not None
    source = open_source(config.data.validation.source)
    right = 0
    for number in range(6):
        image = source.read(number)
        np.save(place.folder / "image.npy", (image.pixels.astype(np.float32) - 5) * 0.125)
        found = place.run("python other.py", PYTHONPATH=f"{OPENCV4}:{os.environ.get('PYTHONPATH', '')}")
        right += found.split() == ["class", str(image.label)]
    assert right >= 5


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_is_in_a_block_that_is_run(page: Path) -> None:
    kinds = {block.kind for block in blocks(page)}
    assert kinds <= {
        "sh",
        "sh caffe",
        "python caffe",
        "python run",
        "sh benchmark",
        "text",
        "python",
        *OTHERS,
    }
    if page.name not in RUN_ELSEWHERE:
        assert page.name == "your-model.md" or not kinds & {"sh caffe", "python caffe"}
        indented = re.findall(
            r"^ {4}(?:\$ |labelfree|caffe|python|make|scripts/|cd ).*", page.read_text(), re.M
        )
        assert all(line.startswith("    python -m benchmarks.") for line in indented), indented


def test_commands_of_benchmarks_have_the_options_that_are_shown() -> None:
    """Running them takes minutes; an option of a bad name or value ends with an error."""
    shown = [
        shlex.split(command, comments=True)
        for page in PAGES
        for command in re.findall(r"^ *(python -m benchmarks\..*)$", page.read_text(), re.MULTILINE)
    ]
    assert len(shown) >= 4
    for _, *arguments in shown:
        done = subprocess.run(
            [sys.executable, *arguments, "--help"], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, (arguments, done.stderr)
        for option in (argument for argument in arguments if argument.startswith("--")):
            assert f"{option} " in done.stdout, arguments


def test_what_needs_caffe_runs_in_caffe(
    place: Place,
    caffe_plugin: str,  # noqa: F811
    caffe_run: Callable[..., "subprocess.CompletedProcess[str]"],  # noqa: F811
) -> None:
    if not (place.folder / "out/net/net_val.prototxt").exists():
        test_every_command_runs(place, ROOT / "docs/your-model.md")
    val = (place.folder / "out/net/net_val.prototxt").read_text()
    files = {
        "out/net/net_val.prototxt": val.replace(f"{place.folder}/", ""),
        **{
            f"out/net/{name}": place.folder / "out/net" / name
            for name in ("net_deploy.prototxt", "net_renorm.caffemodel")
        },
        "val_lmdb": place.folder / "val_lmdb",
    }
    seen = []
    for block in blocks(ROOT / "docs/your-model.md"):
        if block.kind.endswith(" caffe"):
            interpreter = "python3" if block.kind.startswith("python") else "sh"
            command = [
                "env",
                f"LD_PRELOAD={caffe_plugin}",
                "GLOG_minloglevel=0",
                interpreter,
                "-ec" if interpreter == "sh" else "-c",
            ]
            done = caffe_run([*command, block.text], files)
            assert done.returncode == 0, done.stderr
            seen.append(done.stdout + done.stderr)
    assert len(seen) == 2
    accuracies = [float(value) for value in re.findall(r"caffe\.cpp:\d+\] \S+ = ([\d.e-]+)\n", seen[0])]
    ours = json.loads(place.run("labelfree -q evaluate --config net.yaml --validation val_lmdb --json"))
    assert 100 * accuracies[0] == pytest.approx(ours["quantized"]["top1"], abs=1e-4)
    assert "class" in seen[1]


def test_the_demo_prints_what_the_readme_shows(place: Place) -> None:
    """The table in README.md is what scripts/demo prints, to a few images (engines round differently)."""
    shown = re.search(
        r"^fp32 .*?^quantized [^\n]*", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL
    )
    printed = re.search(r"^fp32 .*?^quantized [^\n]*", place.run("scripts/demo"), re.MULTILINE | re.DOTALL)
    assert shown is not None
    assert printed is not None
    for left, right in zip(shown[0].splitlines(), printed[0].splitlines(), strict=True):
        numbers = [
            [float(n) for n in re.findall(r"[\d.]+", line.removeprefix("fp32"))[:2]] for line in (left, right)
        ]
        assert numbers[0] == pytest.approx(numbers[1], abs=0.8), (left, right)


def test_what_is_generated_is_current() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "scripts/make_docs", "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if target.startswith(("https://", "http://")):
            continue
        path, _, anchor = target.partition("#")
        other = (page.parent / path).resolve() if path else page
        assert other.exists(), target
        if anchor:
            assert anchor in anchors(other), target


def test_every_page_is_linked_from_the_readme() -> None:
    readme = (ROOT / "README.md").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert f"(docs/{page.name})" in readme, page.name


def test_every_command_and_option_is_in_the_help() -> None:
    """An option that a page mentions exists."""
    commands = (
        "quantize",
        "evaluate",
        "export",
        "inspect",
        "init",
        "make-lmdb",
        "doctor",
        "report",
        "renorm",
        "layers",
        "unpack",
    )
    helps = "".join(
        subprocess.run(
            [sys.executable, "-m", "quantize.cli", command, "--help"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for command in commands
    )
    for page in PAGES:
        for mentioned in re.findall(r"labelfree [a-z-]+[^`\n]*", page.read_text()):
            for option in re.findall(r" (--[a-z-]+)", mentioned):
                assert option in helps or option in ("--quiet", "--verbose", "--version"), (
                    page.name,
                    mentioned,
                )
