"""Results side by side."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from quantize.commands.compare import compare_json, compare_text, differing, paired, read_results
from quantize.errors import InputError
from quantize.job.evaluation import evaluate_run
from quantize.job.run import Run
from quantize.measure.significance import mcnemar
from tests.conftest import Job


@pytest.fixture
def results(make_job: Callable[[str], Job]) -> dict[str, Path]:
    """Three results of one model, the last neither finished nor evaluated; and one on other images."""
    job = make_job("job")
    folders = {name: job.folder / f"out/{name}" for name in ("four", "two", "raw", "others")}
    given = {
        "four": [],
        "two": ["weights.bits=2", "activations.levels=255"],
        "raw": [],
        "others": [f"data.validation.source={job.folder / 'train_lmdb'}"],
    }
    for name, assignments in given.items():
        config = job.config(*assignments, f"output={folders[name]}")
        Run(config).quantize(("weights",) if name == "raw" else ("weights", "renorm", "activations"))
        if name != "raw":
            evaluate_run(config)
    return folders


def test_side_by_side(results: dict[str, Path]) -> None:
    found = read_results([results[name] for name in ("four", "two", "raw")])
    text = compare_text(found)
    rows = {line.split("  ")[0].strip(): line for line in text.splitlines()}
    assert text.splitlines()[0].split() == ["four", "two", "raw"]
    assert rows["unfinished"].split("  ")[-1].strip() == "no renorm, no activations"
    for result in found:
        assert f"({result.record.sizes.model / result.record.sizes.packed:.1f}x smaller)" in rows["packed"]
    assert rows["weights.bits"].split() == ["weights.bits", "4", "2", "4"]
    assert rows["activations.levels"].split() == ["activations.levels", "-", "255", "-"]
    assert "renorm.images" not in text
    assert "output" not in rows
    for result in found[:2]:
        accuracy, agreement = result.accuracy, result.record.evaluation.agreement  # type: ignore[union-attr]
        assert f"{accuracy.top1:.2f} %" in rows["top-1"]  # type: ignore[union-attr]
        assert f"{agreement:.2f} %" in rows["agreement"]
    assert "note: raw has not been evaluated" in text
    assert "top-1: " in text
    assert "McNemar" in text or "right on the same images" in text


def test_pairs_are_counted_image_by_image(results: dict[str, Path]) -> None:
    found = read_results([results["four"], results["two"]])
    pair = paired(*found)
    assert pair is not None
    one, other = (result.accuracy for result in found)
    assert one is not None
    assert other is not None
    images = found[0].record.evaluation.images  # type: ignore[union-attr]
    lost = round(images * (one.top1 - other.top1) / 100)  # type: ignore[operator]
    assert pair.first_only - pair.second_only == lost
    assert pair.p_value == mcnemar(pair.first_only, pair.second_only)


def test_other_images_are_not_paired(results: dict[str, Path]) -> None:
    found = read_results([results["four"], results["others"]])
    assert paired(*found) is None
    assert "note: others was not evaluated on the same images as four" in compare_text(found)
    found = read_results([results["four"], results["raw"]])
    assert paired(*found) is None


def test_json_has_the_same(results: dict[str, Path]) -> None:
    found = read_results([results["four"], results["two"], results["raw"]])
    content = json.loads(compare_json(found))
    assert content["settings"] == dict(differing(found))
    assert content["settings"]["weights.bits"] == [4, 2, 4]
    assert [each["missing"] for each in content["results"]] == [[], [], ["renorm", "activations"]]
    four, two, raw = content["results"]
    assert four["quantized"]["top1"] is not None
    assert (raw["fp32"], raw["quantized"], raw["agreement"]) == (None, None, None)
    assert four["mean_bits"] > two["mean_bits"]
    assert np.diff([four["sizes"]["packed"], two["sizes"]["packed"]]) < 0
    assert content["paired"][1] is None


def test_one_result_is_not_enough(results: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="at least two output folders"):
        read_results([results["four"]])
    with pytest.raises(InputError, match="nothing quantized here yet"):
        read_results([results["four"], tmp_path])


def test_the_same_settings_are_said(results: dict[str, Path]) -> None:
    found = read_results([results["four"], results["raw"]])
    assert "all settings are the same" in compare_text(found)
