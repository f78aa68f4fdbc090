"""A wrong transform is never announced as a victory."""

from pathlib import Path

import pytest

from quantize.commands.config import load
from quantize.commands.evaluation import evaluation_text
from quantize.job.evaluation import evaluate_run
from quantize.job.run import Run
from quantize.measure.plausible import doubt

DIGITS = Path(__file__).parents[2] / "configs/digits.yaml"


@pytest.mark.parametrize(
    ("full", "final", "agreement", "images", "classes", "words"),
    [
        (98.6, 98.1, 99.5, 800, 10, None),
        (98.6, 98.75, 99.6, 800, 10, None),  # an image more or less
        (60.0, 61.5, 90.0, 500, 1000, None),  # 1.5 points where 50 images changed: chance
        (60.0, 68.0, 75.0, 500, 1000, "the quantized network is 8.00 points of top-1 above full precision"),
        (7.12, 79.9, 8.0, 800, 10, "full precision is right on only 7.12 % of the images, chance on 10 %"),
        (18.0, 17.0, 95.0, 800, 10, "right on only 18.00 %"),
        (25.0, 25.0, 95.0, 800, 10, None),
        (54.0, 54.0, 99.0, 800, 2, "chance on 50 %"),
        (75.0, 75.0, 99.0, 800, 2, None),
        (1.0, 70.0, 2.0, 500, 0, "69.00 points"),  # the number of classes is not known
        (None, None, 50.0, 500, 10, None),
    ],
)
def test_what_cannot_be_is_said(
    full: float | None, final: float | None, agreement: float, images: int, classes: int, words: str | None
) -> None:
    found = doubt(full, final, agreement, images, classes)
    if words is None:
        assert found is None
    else:
        assert found is not None
        assert words in found
        assert "data.transform" in found


@pytest.mark.parametrize("statistics", ["paired", "measured"])
def test_digits_with_a_wrong_transform(tmp_path: Path, statistics: str) -> None:
    """Measured statistics repair what the scale spoils: the quantized net is far above full precision."""
    wrong = ["data.transform={scale: 5, mean_value: [0]}", f"renorm.statistics={statistics}"]
    config = load(DIGITS, {"output": str(tmp_path / "out")}, wrong)
    Run(config).quantize()
    found = evaluate_run(config)
    full, final = found.accuracy["fp32"].top1, found.accuracy["quantized"].top1
    assert full is not None
    assert final is not None
    assert (final - full > 20) == (statistics == "measured")
    words = "points of top-1 above full precision" if statistics == "measured" else "chance on 10 %"
    text = evaluation_text(found)
    assert "won" not in text
    warning = text.splitlines()[-1]
    assert warning.startswith("warning: full precision is right on only")
    assert words in warning
    assert "data.transform is probably not the transform of training" in warning
    page = (tmp_path / "out/report.html").read_text()
    first, second = page.split('<li class="warning">')[1:3]
    assert "Images probably do not come as in training. no mean, scale 5: means" in first
    assert words in second
