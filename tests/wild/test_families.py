"""Nets of every family of forks through the commands, without their caffe.proto, with random weights."""

import json
import re
from pathlib import Path

import lmdb
import numpy as np
import pytest

from quantize.caffenet import InferenceNet, NetParameter, Weights, read_prototxt
from quantize.caffenet.norms import norm_places, stored_statistics
from quantize.caffenet.schema import AnnotatedDatum, BlobProto, Datum
from tests.conftest import Labelfree
from tests.nets import random_weights, write_photos
from tests.wild.nets import FAMILIES, RECURRENT, SSD_TRAINED, Family

IMAGES = 12
RAW_TYPES = {"float16": (BlobProto.FLOAT16, "<f2"), "float64": (BlobProto.DOUBLE, "<f8")}


def write_family(name: str, folder: Path) -> Family:
    """Prototxt, caffemodel and images of a family."""
    family = FAMILIES[name]
    (folder / "net.prototxt").write_text(f'name: "{name}"\n{family.text}')
    test = InferenceNet.of(read_prototxt(folder / "net.prototxt"))
    weights = random_weights(test.net, {"data": family.image})
    with open(folder / "net.caffemodel", "wb") as file:
        weights.write(file)
    if family.raw:
        store_raw(folder / "net.caffemodel", family.raw)
    write_photos(folder / "images", IMAGES, family.image[1:])
    if family.annotated:
        annotate(folder / "images")
    return family


def store_raw(path: Path, name: str) -> None:
    """Blobs as NVCaffe writes them."""
    number, dtype = RAW_TYPES[name]
    net = NetParameter.FromString(path.read_bytes())
    for layer in net.layer:
        for blob in layer.blobs:
            blob.raw_data = np.array(blob.data, dtype).tobytes()
            blob.raw_data_type = number
            blob.ClearField("data")
    path.write_bytes(net.SerializeToString())


def annotate(path: Path) -> None:
    """Datums in an LMDB as SSD writes them: with boxes, and no class."""
    with lmdb.open(str(path)) as environment, environment.begin(write=True) as writing:
        for key, value in list(writing.cursor()):
            datum = Datum.FromString(value)
            datum.label = -1
            writing.put(key, AnnotatedDatum(datum=datum, type=0).SerializeToString())


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_through_the_commands(
    name: str, tmp_path: Path, labelfree: Labelfree, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = write_family(name, tmp_path)
    monkeypatch.chdir(tmp_path)
    shown = labelfree("inspect", "net.prototxt", "net.caffemodel", "--json")
    assert shown.code == 0, shown.err
    rows = {row["name"]: row["plan"] for row in json.loads(shown.out)["layers"]}
    assert tuple(each for each, plan in rows.items() if plan.startswith("carried over")) == family.trailing

    files = ["--prototxt", "net.prototxt", "--weights", "net.caffemodel", "--calibration", "images"]
    made = labelfree("init", *files, "--config", "job.yaml")
    assert made.code == 0, made.err
    looked = labelfree("doctor", "--config", "job.yaml")
    assert "FAIL" not in looked.out.replace("FAIL  output", ""), looked.out

    small = ["--set", "renorm.images=6", "--set", "activations.images=6", "--set", "threads=1"]
    done = labelfree("quantize", "--config", "job.yaml", *small)
    assert done.code == 0, done.err
    out = tmp_path / "out" / name
    for path in out.glob("*.prototxt"):
        text = path.read_text()
        for part in family.kept:
            assert part in text, (path.name, part)
        written = {layer.name: layer for layer in read_prototxt(path).layer}
        given = {layer.name: layer for layer in read_prototxt("net.prototxt").layer}
        for trailing in family.trailing:
            assert written[trailing].type == given[trailing].type

    scored = labelfree("evaluate", "--config", "job.yaml", *small, "--json")
    assert scored.code == 0, scored.err
    found = json.loads(scored.out)["outputs"]
    assert {each["blob"] for each in found} == set(family.outputs)
    for each in found:
        print(name, json.dumps(each))
    check_statistics(tmp_path, name)

    exported = labelfree("export", "--config", "job.yaml", "--to", "onnx")
    assert exported.code == 0, exported.err
    assert list(out.rglob("*.onnx"))
    close = re.findall(r"against labelfree's scores, .* SQNR (\S+) dB", exported.out)
    assert all(float(decibels) > 30 for decibels in close), exported.out
    assert "against labelfree's scores" in exported.out


def test_a_detector_as_it_is_trained(
    tmp_path: Path, labelfree: Labelfree, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its data layer is of a fork, too; both phases keep what they have."""
    write_family("ssd", tmp_path)
    monkeypatch.chdir(tmp_path)
    Path("net.prototxt").write_text(f'name: "ssd" {SSD_TRAINED}')
    Path("job.yaml").write_text(
        "name: ssd\nmodel: {prototxt: net.prototxt, weights: net.caffemodel}\nthreads: 1\n"
        "data: {calibration: {source: images}, validation: {source: images, batch_size: 2}}\noutput: out\n"
    )
    done = labelfree("quantize", "--config", "job.yaml")
    assert done.code == 0, done.err
    assert "transform_param.resize_param is a field of a fork of Caffe and is not applied" in done.err
    val = Path("out/ssd_val.prototxt").read_text()
    for part in ("multibox_loss_param", "min_scale: 0.3", "resize_mode: WARP"):
        assert part in val, part
    scored = labelfree("evaluate", "--config", "job.yaml", "--json")
    assert scored.code == 0, scored.err
    found = json.loads(scored.out)
    assert {each["blob"] for each in found["outputs"]} == {"mbox_loc", "conf_flatten"}
    assert found["fp32"]["top1"] is None


def check_statistics(folder: Path, name: str) -> None:
    """What normalizes has other statistics than before, and its scale and shift are as they were."""
    net = InferenceNet.of(read_prototxt(folder / "net.prototxt")).net
    before = Weights.read(folder / "net.caffemodel")
    after = Weights.read(folder / "out" / name / f"{name}_renorm.caffemodel")
    assert after.raw_types == []
    norms = [layer for layer in net.layer if norm_places(layer) is not None]
    assert norms or name == "segnet"
    for layer in norms:
        places = norm_places(layer)
        assert places is not None
        old, new = before[layer.name], after[layer.name]
        assert [blob.size for blob in old] == [blob.size for blob in new]
        (old_mean, _), (new_mean, variance) = (stored_statistics(each, places) for each in (old, new))
        assert not np.array_equal(old_mean, new_mean)
        assert (variance >= 0).all()
        for place in places.affine or ():
            np.testing.assert_array_equal(old[place].ravel(), new[place].ravel())


def test_what_nobody_runs_in_the_middle_is_said_at_once(
    tmp_path: Path, labelfree: Labelfree, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("net.prototxt").write_text(RECURRENT)
    rows = labelfree("inspect", "net.prototxt")
    assert rows.code == 0, rows.err
    weights = Weights()
    rng = np.random.default_rng(0)
    net = read_prototxt("net.prototxt")
    shapes = {"conv1": [(8, 3, 3, 3), (8,)], "conv1/bn": [(8,), (8,), (1,)], "conv1/scale": [(8,), (8,)]}
    shapes |= {"lstm": [(24, 8), (24,), (24, 6)], "fc": [(7, 3), (7,)]}
    for layer in net.layer:
        if layer.name in shapes:
            weights.add(layer, [np.abs(rng.normal(size=shape)) + 0.1 for shape in shapes[layer.name]])
    with open("net.caffemodel", "wb") as file:
        weights.write(file)
    write_photos(tmp_path / "images", 4, (17, 17))
    files = ["--prototxt", "net.prototxt", "--weights", "net.caffemodel", "--calibration", "images"]
    refused = labelfree("quantize", *files, "-o", "out")
    assert refused.code == 2
    [line] = [line for line in refused.err.splitlines() if line.startswith("labelfree: ")]
    first, *_, last = line.split(". ")
    assert "layer 'lstm' (LSTM)" in first
    assert "know this type, and the run needs what it makes" in first
    assert "engine: caffe" in first
    assert "'pooled' (PSROIPooling)" in line
    assert last.startswith("Known types are: ")
    done = labelfree("quantize", *files, "-o", "out", "--stages", "weights")
    assert done.code == 0, done.err
