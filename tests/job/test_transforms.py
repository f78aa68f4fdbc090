"""Nets as they are published, without a word about their transform: it is chosen, checked, and kept."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml

from quantize.caffenet import TRAIN, InferenceNet, NetParameter, format_prototxt, read_prototxt
from quantize.commands.config import load
from quantize.data import Images, Transform, open_source
from quantize.data.feed import Feed
from quantize.job.evaluation import evaluate_run
from quantize.job.prototxts import deploy_prototxt
from quantize.job.run import Run
from quantize.measure.transform_check import Scaling
from quantize.settings import RenormSettings
from tests.conftest import Labelfree
from tests.heard import Heard
from tests.nets import CROPPED, RESIDUAL, parse, random_weights, trained_statistics, write_photos

PHOTOS = 100


@dataclass(frozen=True)
class Published:
    """A deploy prototxt, a caffemodel trained with some transform, and photographs of the net's size."""

    folder: Path

    @property
    def options(self) -> dict[str, str]:
        return {
            "--prototxt": str(self.folder / "deploy.prototxt"),
            "--weights": str(self.folder / "net.caffemodel"),
            "--calibration": str(self.folder / "photos"),
        }

    def command(self, *words: str, output: str | None = "out") -> list[str]:
        given = {**self.options, **({"--output": str(self.folder / output)} if output else {})}
        return [*words, *(part for option in given.items() for part in option)]


def publish(folder: Path, values: Scaling, text: str = RESIDUAL) -> Published:
    """A net whose BatchNorms stored what images like the photographs give with a transform."""
    folder.mkdir()
    deploy = deploy_prototxt(parse(text), {"data": CROPPED})
    (folder / "deploy.prototxt").write_text(format_prototxt(deploy))
    source = open_source(write_photos(folder / "training", 300, CROPPED[1:]))
    net: NetParameter = InferenceNet.of(deploy).net
    transform = Transform(mean_value=values.mean, scale=values.scale)
    feed = Feed({"data": Images(source, transform, TRAIN, None)})
    with open(folder / "net.caffemodel", "wb") as file:
        trained_statistics(net, random_weights(net, {"data": CROPPED}), feed).write(file)
    photos = open_source(write_photos(folder / "lmdb", PHOTOS, CROPPED[1:], seed=1))
    (folder / "photos").mkdir()
    for number in range(PHOTOS):
        pixels = np.ascontiguousarray(photos.read(number).pixels.transpose(1, 2, 0))
        assert cv2.imwrite(str(folder / "photos" / f"{number:03}.png"), pixels)
    return Published(folder)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Published:
    return publish(tmp_path_factory.mktemp("published") / "net", Scaling((104, 117, 123)))


@pytest.fixture
def published(template: Published, tmp_path: Path) -> Published:
    return Published(Path(shutil.copytree(template.folder, tmp_path / "net")))


CHOSEN = "data.transform: mean 104/117/123, no scale: fits best: means"


def test_the_two_lines_of_the_readme(published: Published, labelfree: Labelfree) -> None:
    """Quantize chooses the transform, says so, writes it down; evaluate takes the same."""
    code, _, err = labelfree(*published.command("quantize"))
    assert code == 0, err
    assert CHOSEN in err
    assert "warning" not in err
    assert "resizing" not in err
    report = json.loads((published.folder / "out/report.json").read_text())
    assert report["settings"]["data"]["transform"]["mean_value"] == [104, 117, 123]
    code, out, err = labelfree(*published.command("evaluate", "--json"))
    assert code == 0, err
    explicit = load(
        None,
        {
            "model.prototxt": published.options["--prototxt"],
            "model.weights": published.options["--weights"],
            "data.calibration.source": published.options["--calibration"],
            "data.transform.mean_value": [104, 117, 123],
            "output": str(published.folder / "out"),
        },
    )
    assert json.loads(out)["agreement"] == evaluate_run(explicit).agreement


def test_init_writes_what_fits(published: Published, labelfree: Labelfree) -> None:
    path = published.folder / "net.yaml"
    command = published.command("init", "--config", str(path), output=None)
    code, out, err = labelfree(*command)
    assert code == 0, err
    assert f"guessed: {CHOSEN}" in out
    data = yaml.safe_load(path.read_text())["data"]
    assert data["transform"] == {"crop_size": 9, "mean_value": [104, 117, 123]}
    assert data["calibration"] == {"source": "photos", "images": PHOTOS - PHOTOS // 5}
    assert labelfree("quantize", "--config", str(path))[0] == 0
    code, out, err = labelfree("evaluate", "--config", str(path), "--json")
    assert json.loads(out)["images"] == PHOTOS - RenormSettings().images
    assert "unused" in err


def test_a_wrong_transform_is_a_warning_everywhere(published: Published, labelfree: Labelfree) -> None:
    """Full precision cannot be right with it, and renorm would hide that."""
    wrong = ("--set", "data.transform.scale=0.017")
    code, out, err = labelfree(*published.command("doctor", *wrong))
    assert code == 0
    line = next(line for line in out.splitlines() if line.startswith("warn  transform"))
    assert "no mean, scale 0.017: means" in line
    assert "mean 104/117/123, no scale fits better" in line
    assert "--set 'data.transform={mean_value: [104, 117, 123], scale: 1}'" in line
    code, out, err = labelfree(*published.command("quantize", *wrong))
    assert code == 0
    for printed in (err, out):
        assert "warning: no mean, scale 0.017: means" in printed
    page = (published.folder / "out/report.html").read_text()
    first = page[page.index('<li class="') :][:400]
    assert "no mean, scale 0.017" in first
    code, out, err = labelfree("--quiet", *published.command("quantize", *wrong))
    assert (code, err) == (0, "")
    assert "warning: no mean, scale 0.017: means" in out


def test_what_the_remedy_says_is_a_remedy(published: Published) -> None:
    config = load(None, as_keys(published), ["data.transform={mean_value: [104, 117, 123], scale: 1}"])
    heard = Heard()
    Run(config, heard).quantize(("weights",))
    assert heard.warnings == []


def as_keys(published: Published) -> dict[str, object]:
    return {
        "model.prototxt": published.options["--prototxt"],
        "model.weights": published.options["--weights"],
        "data.calibration.source": published.options["--calibration"],
        "output": str(published.folder / "out"),
    }


def test_what_a_yaml_file_says_is_not_overruled(published: Published) -> None:
    """A configuration without a mean feeds raw pixels, with a warning."""
    heard = Heard()
    Run(load(None, as_keys(published)), heard).quantize(("weights",))
    assert ["no mean, no scale: means" in warning for warning in heard.warnings] == [True]


def test_what_the_prototxt_says_is_tried(published: Published) -> None:
    """A transform that is not among the usual ones: the prototxt's own is what fits."""
    values = Scaling((60, 70, 80), 0.05)
    other = publish(published.folder / "other", values)
    text = (other.folder / "deploy.prototxt").read_text()
    param = "mean_value: 60 mean_value: 70 mean_value: 80 scale: 0.05"
    layer = f'layer {{ name: "data" type: "Data" top: "data" transform_param {{ {param} }} }}'
    net = read_prototxt(other.folder / "deploy.prototxt")
    del net.layer[0]
    (other.folder / "deploy.prototxt").write_text(layer + format_prototxt(net))
    assert text != (other.folder / "deploy.prototxt").read_text()
    heard = Heard()
    Run(load(None, as_keys(other)), heard, choose_transform=True).quantize(("weights",))
    assert (heard.warnings, [note for note in heard.notes if "data.transform" in note]) == ([], [])
    Run(load(None, as_keys(other), ["data.transform.scale=0.01"]), heard).quantize(("weights",))
    assert "mean 60/70/80, scale 1/20 (as the prototxt says) fits better" in heard.warnings[0]


def test_without_batch_norm_the_usual_mean_is_taken_and_said_to_be_a_guess(tmp_path: Path) -> None:
    lines = [line for line in RESIDUAL.splitlines() if '"BatchNorm"' not in line]
    plain = publish(tmp_path / "plain", Scaling((104, 117, 123)), "\n".join(lines))
    heard = Heard()
    Run(load(None, as_keys(plain)), heard, choose_transform=True).quantize(("weights",))
    why = "that is usual, and cannot be checked: the net has no BatchNorm"
    assert f"data.transform: mean 104/117/123, no scale: {why}" in heard.notes
    assert "data.transform cannot be checked: the net has no BatchNorm" in heard.notes
