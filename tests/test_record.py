"""report.json: what is written can be read again, and nothing else can."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest

from quantize.commands.config import load
from quantize.record import CaffeTest, Export, FileComparison, Kernels, RunRecord, Sizes, Stages
from quantize.settings import Config

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
OPTIONS = {"model.prototxt": "p", "model.weights": "w", "output": "o"}


def record_of(config: Config) -> RunRecord:
    return RunRecord(
        tool="labelfree 9",
        name=config.name,
        versions={"numpy": "2"},
        settings=config,
        inputs={"prototxt": "00"},
        stages=Stages(),
        prototxts={"p_val.prototxt": "11"},
        caffe_test=CaffeTest(None, "images"),
        sizes=Sizes(model=3, written=2, packed=1),
    )


def signed(content: dict[str, Any]) -> bytes:
    """A report with the digest that labelfree would give it."""
    text = json.dumps(content, sort_keys=True).encode()
    return json.dumps({**content, "digest": hashlib.sha256(text).hexdigest()}).encode()


@pytest.mark.parametrize(
    "config",
    [
        *(load(path) for path in CONFIGS),
        load(None, OPTIONS, ["weights.budget=3.5", "weights.layers={a: {bits: 8, grid: uniform}}"]),
        load(None, OPTIONS, ["weights.layers={a: {skip: true}}", "renorm.memory=unlimited"]),
        load(None, OPTIONS, ["data.transform={mean_value: 5, resize: [8, 9]}", "caffe.python=python2"]),
    ],
    ids=lambda config: config.name,
)
def test_what_is_written_is_read(config: Config) -> None:
    record = record_of(config)
    assert RunRecord.parse(record.to_json(indent=1).encode()) == record


def exported(target: str, folder: str, runtime: str | None = None) -> Export:
    compared = FileComparison(64, None, 99.5, 0.001, 0.002, Kernels(5, 1))
    in_float = {"conv1": "reads the input"}
    return Export(target, runtime, Path(folder), {"a.bin": 3}, 3, 9, in_float, ("slow",), compared)


def test_exports_are_read_as_they_were_written() -> None:
    """Wherever they are: a folder's name need not be UTF-8."""
    record = record_of(load(None, OPTIONS)).with_export(exported("onnx", os.fsdecode(b"/o/\xff")))
    assert RunRecord.parse(record.to_json(indent=1).encode()) == record


def test_an_export_takes_the_place_of_the_one_before() -> None:
    first, other = exported("onnx", "a", "onnx"), exported("mnn", "a")
    beside, over = exported("onnx", "b", "openvino"), exported("onnx", "a", "openvino")
    elsewhere = exported("onnx", "c", "onnx")
    record = record_of(load(None, OPTIONS))
    for export, left in (
        (first, [first]),
        (other, [first, other]),  # which has the plain pair in common with others
        (beside, [first, other, beside]),
        (elsewhere, [other, beside, elsewhere]),
        (exported("onnx", "c", "onnx"), [other, beside, elsewhere]),
        (over, [other, elsewhere, over]),
        (first, [other, first]),
    ):
        record = record.with_export(export)
        assert record.exports == left


def test_a_report_from_before_there_were_exports_is_read() -> None:
    record = record_of(load(None, OPTIONS))
    content = json.loads(record.to_json())
    del content["exports"], content["digest"]
    assert RunRecord.parse(signed(content)) == record


def test_what_there_is_not_has_no_key() -> None:
    content = json.loads(record_of(load(None, OPTIONS)).to_json())
    assert content["stages"] == {}
    assert not {"evaluation", "output_sqnr"} & content.keys()


@pytest.mark.parametrize(
    "text", [b"", b"[]", b"{}", b"[" * 100_000, b'{"a": ' * 100_000, b"\xff", b'{"digest": 1}']
)
def test_other_text_is_refused(text: bytes) -> None:
    with pytest.raises(ValueError, match="not a report of labelfree, or changed since"):
        RunRecord.parse(text)


def test_a_changed_report_is_refused() -> None:
    text = record_of(load(None, OPTIONS)).to_json()
    with pytest.raises(ValueError, match="changed since"):
        RunRecord.parse(text.replace('"packed": 1', '"packed": 0').encode())


VERSION_0_1 = {
    **{"tool": "labelfree 0.1.0", "name": "net", "versions": {}, "settings": {"name": "net"}, "inputs": {}},
    "stages": {"weights": {"layers": [], "skipped": [], "key": "0", "seconds": 1.0, "outputs": {}}},
    "sizes": {"model": 3, "written": 2, "packed": 1},
}


@pytest.mark.parametrize(
    "content",
    [
        VERSION_0_1,
        {**VERSION_0_1, "tool": "labelfree 0.1.0", "stages": 3},
        {**json.loads(record_of(load(None, OPTIONS)).to_json()), "tool": "labelfree 0.1.0", "format": 3},
    ],
)
def test_a_report_of_another_version_is_named(content: dict[str, Any]) -> None:
    content.pop("digest", None)
    with pytest.raises(ValueError, match=r"^written by labelfree 0.1.0, another version of labelfree$"):
        RunRecord.parse(signed(content))
