"""`labelfree export` and `evaluate --runtime` on the results in an output folder."""

import json
from contextlib import closing
from pathlib import Path

import numpy as np
import onnx
import pytest

import quantize
from quantize.caffenet.model import Model
from quantize.commands.export import export_json, export_text
from quantize.engines import exported as exported_module
from quantize.errors import InputError
from quantize.exports.onnx import OnnxOptions
from quantize.job.evaluation import evaluate_run
from quantize.job.export import evaluate_exported, export_run, pixels_of
from quantize.job.given import Given
from quantize.job.output import OutputFolder
from quantize.job.results import Results
from quantize.job.run import Run
from quantize.job.store import add_to_report, read_record
from quantize.record import Stages
from tests.conftest import Job
from tests.heard import Heard

SETTINGS = ("activations.levels=255", "activations.sums=true")


@pytest.fixture
def done(job: Job, monkeypatch: pytest.MonkeyPatch) -> Job:
    monkeypatch.setattr("quantize.measure.exported.LEAST_SECONDS", 0)
    Run(job.config(*SETTINGS)).quantize()
    return job


@pytest.mark.parametrize(("written_for", "runtime"), [("ort", "onnx"), ("openvino", "openvino")])
def test_the_file_is_small_close_and_runs_in_integers(done: Job, written_for: str, runtime: str) -> None:
    options = OnnxOptions(written_for)  # type: ignore[arg-type]
    found = export_run(done.config(*SETTINGS), "onnx", options=options, images=16)
    [path] = found.paths
    assert path == done.out / "residual.onnx"
    assert found.paths[path] == path.stat().st_size
    assert list(found.in_float) == ["conv1"]
    assert found.notes == ()
    compared = found.comparison
    assert compared is not None
    assert compared.images == 16
    assert (compared.kernels.integer, compared.kernels.floating) == (5, 1)
    assert compared.sqnr_db is None or compared.sqnr_db > 35
    assert compared.agreement is not None
    assert compared.agreement > 90
    assert min(compared.seconds, compared.float_seconds) > 0
    assert not (done.out / "residual_float.onnx").exists()

    scored = evaluate_exported(done.config(*SETTINGS), runtime)
    own = evaluate_run(done.config(*SETTINGS))
    assert scored.images == own.images == 15
    assert scored.accuracy["quantized"] == own.accuracy["quantized"]
    close, wanted = scored.closeness[runtime], scored.closeness["quantized"]
    assert close.sqnr_db == pytest.approx(wanted.sqnr_db, abs=1)
    assert scored.accuracy[runtime].top1 is not None


def test_pixels(done: Job) -> None:
    config = done.config(*SETTINGS)
    found = export_run(config, "onnx", done.folder / "pixels", takes_pixels=True, images=8)
    [path] = found.paths
    assert path == done.folder / "pixels/residual.onnx"
    assert found.in_float == {}
    assert found.comparison is not None
    assert found.comparison.kernels.floating == 0
    assert found.comparison.agreement is not None
    assert found.comparison.agreement > 80
    model = onnx.load(path)
    assert {entry.key: entry.value for entry in model.metadata_props} == {
        "labelfree.mean": "100.0,100.0,100.0",
        "labelfree.scale": "0.02",
    }
    scored = evaluate_exported(config, "onnx", path)
    assert scored.closeness["onnx"].sqnr_db == pytest.approx(scored.closeness["quantized"].sqnr_db, abs=2)


def test_pixels_of_a_mean_image_are_refused(done: Job, tmp_path: Path) -> None:
    mean = tmp_path / "mean.binaryproto"
    proto = quantize.caffenet.BlobProto()
    proto.shape.dim.extend((1, 3, 11, 11))
    proto.data.extend(np.full(363, 100.0))
    mean.write_bytes(proto.SerializeToString())
    config = done.config(*SETTINGS, f"data.transform.mean_file={mean}")
    with pytest.raises(InputError, match=r"a mean for each pixel .*mean\.binaryproto"):
        pixels_of(Given(config))


def test_the_python_api_writes_the_same_file(done: Job) -> None:
    export_run(done.config(*SETTINGS), "onnx", images=4)
    model = Model.load(done.out / "residual_deploy.prototxt", done.out / "residual_renorm.caffemodel")
    [path] = quantize.export(model, done.folder / "api", name="residual")
    assert path.read_bytes() == (done.out / "residual.onnx").read_bytes()
    with pytest.raises(InputError, match="cannot be a file's name"):
        quantize.export(model, done.folder / "api", name="a/b")


def test_the_python_api_takes_the_transform_of_the_prototxt(done: Job) -> None:
    model = Model.load(done.out / "residual_val.prototxt", done.out / "residual_renorm.caffemodel")
    [path] = quantize.export(model, done.folder / "api", pixels=True, input_shape=(3, 9, 9))
    said = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    assert said == {"labelfree.mean": "100.0,100.0,100.0", "labelfree.scale": "0.02"}
    with pytest.raises(InputError, match=r"export.*transform.*nonsense"):
        quantize.export(model, done.folder / "api", pixels=True, transform={"nonsense": 1})


def test_what_is_not_quantized_is_refused_and_nothing_written(job: Job) -> None:
    with pytest.raises(InputError, match="nothing quantized here yet"):
        export_run(job.config(), "onnx", job.folder / "new")
    model = Model.load(job.folder / "net.prototxt", job.folder / "net.caffemodel")
    with pytest.raises(InputError, match="no layer has quantized weights"):
        quantize.export(model, job.folder / "new", input_shape=(3, 9, 9))
    assert not (job.folder / "new").exists()


def test_results_that_lack_a_stage_are_exported_and_that_is_said(job: Job) -> None:
    Run(job.config()).quantize(["weights"])
    found = export_run(job.config(), "onnx", images=4)
    assert found.notes == ("not finished: renorm has not run", "not finished: activations has not run")
    assert set(found.in_float.values()) >= {"activations are not quantized (labelfree activations-quan)"}
    assert found.comparison is not None
    assert found.comparison.kernels.integer == 0


def test_layers_that_labelfree_does_not_run_are_left_out_and_that_is_said(job: Job) -> None:
    with open(job.folder / "net.prototxt", "a") as file:
        file.write('layer { name: "odd" type: "DetectionHead" bottom: "fc2" top: "odd" }\n')
    Run(job.config()).quantize()
    found = export_run(job.config(), "onnx", images=4)
    left_out = "not in the files, for labelfree does not know what they compute: odd (DetectionHead)"
    assert left_out in found.notes
    assert [value.name for value in onnx.load(job.out / "residual.onnx").graph.output] == ["fc2"]


def test_changed_results_are_refused(done: Job) -> None:
    with open(done.out / "residual_renorm.caffemodel", "ab") as file:
        file.write(b"x")
    with pytest.raises(InputError, match=r"not the file that report\.json tells of"):
        export_run(done.config(*SETTINGS), "onnx")


def test_without_the_runtime_the_file_is_written_and_the_pip_line_said(
    done: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(exported_module.RUNTIMES, "openvino", "no_such_module")
    found = export_run(done.config(*SETTINGS), "onnx", options=OnnxOptions("openvino"))
    assert found.comparison is None
    assert found.notes == ("not compared: openvino is not installed (pip install 'labelfree[openvino]')",)
    with pytest.raises(InputError, match=r"install it with: pip install 'labelfree\[openvino\]'"):
        evaluate_exported(done.config(*SETTINGS), "openvino")


def test_a_file_that_is_not_there(done: Job) -> None:
    with pytest.raises(InputError, match=r"residual\.onnx: not there; run `labelfree export` first"):
        evaluate_exported(done.config(*SETTINGS), "onnx")


def test_what_is_printed(done: Job) -> None:
    found = export_run(done.config("activations.levels=255"), "onnx", images=4)
    text = export_text(found)
    assert "in full precision" in text
    assert "images per second, one at a time" in text
    assert "in float: conv1: reads the input data" in text
    told = json.loads(export_json(found))
    assert told["files"] == {str(done.out / "residual.onnx"): found.files["residual.onnx"]}
    assert told["comparison"]["kernels"]["integer"] == 5


def test_the_report_tells_of_the_files(done: Job) -> None:
    config = done.config(*SETTINGS)
    evaluate_run(config)
    before, heard = read_record(done.out), Heard()
    assert before.exports == []
    assert "<h2>Files</h2>" not in (done.out / "report.html").read_text()
    found = export_run(config, "onnx", images=4, progress=heard)
    tables = export_run(config, "caffe", done.folder / "other", progress=heard)
    assert heard.notes == []
    record = read_record(done.out)
    assert record.exports == [found, tables]
    assert record.model_copy(update={"exports": []}) == before
    page = (done.out / "report.html").read_text()
    assert found.model_bytes is not None
    assert found.float_bytes is not None
    assert found.comparison is not None
    assert f'<td class="n">{found.model_bytes / 1000:.1f} kB</td>' in page
    assert f">{found.float_bytes / found.model_bytes:.1f}×</td>" in page
    assert f">{found.comparison.agreement:.2f}</td>" in page
    assert "<dd>In float: conv1: reads the input data" in page
    for name in tables.files:
        assert f'<td title="{done.folder / "other"}">{name}</td>' in page


def test_the_report_tells_of_the_last_files_of_a_kind(done: Job) -> None:
    config = done.config(*SETTINGS)
    export_run(config, "onnx", done.folder / "other", images=4)
    tables = export_run(config, "ranges")
    assert [each.target for each in read_record(done.out).exports] == ["onnx", "ranges"]
    last = export_run(config, "onnx", images=4)
    assert read_record(done.out).exports == [tables, last]
    over = export_run(config, "onnx", options=OnnxOptions("openvino"), images=4)
    assert list(over.paths) == list(last.paths)
    assert read_record(done.out).exports == [tables, over]
    Run(config).quantize(resume=True)
    assert read_record(done.out).exports == [tables, over]
    Run(config).quantize(("activations",))
    assert read_record(done.out).exports == []
    assert "<h2>Files</h2>" not in (done.out / "report.html").read_text()


def test_files_that_the_report_cannot_tell_of_are_there_all_the_same(done: Job) -> None:
    config, heard = done.config(*SETTINGS), Heard()
    before = (done.out / "report.json").read_bytes()
    with closing(OutputFolder(done.out)):
        [path, *_] = export_run(config, "ranges", done.folder / "other", progress=heard).paths
    assert path.exists()
    [note] = heard.notes
    assert note.startswith(f"not added to report.json: output: {done.out}: another labelfree run is writing")
    made_before = Results(Given(config), Stages())  # of results that are no longer in the folder
    add_to_report(made_before, lambda record: record.model_copy(update={"tool": "changed"}), heard)
    assert len(heard.notes) == 1
    assert (done.out / "report.json").read_bytes() == before
