"""The whole job: what it writes, what it skips, and that nothing is ever half written."""

import json
import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from quantize.caffenet import InferenceNet, Weights, read_prototxt
from quantize.errors import InputError, LabelfreeError
from quantize.files import Writable
from quantize.job.evaluation import evaluate_run
from quantize.job.output import OutputFolder
from quantize.job.run import Run
from quantize.progress import Progress
from quantize.record import RunRecord
from quantize.settings import ActivationSettings
from tests.conftest import Job
from tests.heard import Heard

FILES = {
    "residual_quantized.caffemodel",
    "residual_renorm.caffemodel",
    "residual_val.prototxt",
    "residual_deploy.prototxt",
    "report.json",
    "report.html",
}


def contents(folder: Path) -> dict[str, bytes]:
    """The output files but for the reports, which hold times."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.stem != "report"}


def test_the_files_and_what_is_in_them(job: Job) -> None:
    record = Run(job.config()).quantize()
    assert {path.name for path in job.out.iterdir()} == FILES
    assert RunRecord.parse((job.out / "report.json").read_bytes()) == record
    val = read_prototxt(job.out / "residual_val.prototxt")
    deploy = read_prototxt(job.out / "residual_deploy.prototxt")
    final = Weights.read(job.out / "residual_renorm.caffemodel")
    assert [layer.type for layer in InferenceNet.of(val).net.layer].count("ActQuantize") == 4
    # What the last ReLU makes is averaged before a quantized layer reads it.
    assert [layer.name for layer in val.layer if layer.type == "ReLU"] == ["relu_sum"]
    test_data = next(layer for layer in val.layer if layer.include and layer.include[0].phase == 1)
    assert test_data.data_param.source == str(job.folder / "test_lmdb")
    assert test_data.data_param.batch_size == 5
    assert deploy.layer[0].type == "Input"
    assert list(deploy.layer[0].input_param.shape[0].dim) == [1, 3, 9, 9]
    assert [layer.name for layer in InferenceNet.of(deploy).net.layer] == [
        layer.name for layer in InferenceNet.of(val).net.layer
    ]
    assert {layer.name for layer in deploy.layer[1:]} >= {
        n for n in final.layers() if n.endswith("_alpha_term")
    }


def test_the_report_holds_what_the_contract_says(job: Job) -> None:
    Run(job.config()).quantize()
    report = json.loads((job.out / "report.json").read_text())
    layer = report["stages"]["weights"]["layers"][1]
    assert (layer["name"], layer["bits"], layer["grid"]) == ("left", 4, "power_of_two")
    assert layer["loss"] > 0
    assert 10 < layer["sqnr_db"] < 40
    assert {"mean_shift", "variance_ratio"} <= report["stages"]["renorm"]["layers"][0].keys()
    assert {"step", "clipped"} <= report["stages"]["activations"]["layers"][0].keys()
    for stage in report["stages"].values():
        assert stage["seconds"] > 0
        assert stage["peak_memory_bytes"] > 1 << 20
    assert report["sizes"]["packed"] < report["sizes"]["model"] / 2
    assert report["versions"]["onnxruntime"]
    assert report["settings"]["weights"]["bits"] == 4


def test_single_stages_make_the_same_as_one_run(make_job: Callable[[str], Job]) -> None:
    whole, parts = make_job("whole"), make_job("parts")
    Run(whole.config()).quantize()
    for stage in ("weights", "renorm", "activations"):
        Run(parts.config()).quantize((stage,))
    expected, found = contents(whole.out), contents(parts.out)
    assert found.keys() == expected.keys()
    for name, content in expected.items():
        assert found[name].replace(b"/parts/", b"/whole/") == content, name


def test_a_stage_without_the_one_before_says_which(job: Job) -> None:
    with pytest.raises(InputError, match=r"residual_quantized.caffemodel.*labelfree quantize"):
        Run(job.config()).quantize(("renorm",))
    with pytest.raises(InputError, match=r"residual_renorm.caffemodel"):
        Run(job.config()).quantize(("activations",))


def test_redoing_a_stage_drops_what_was_built_on_it(job: Job) -> None:
    Run(job.config()).quantize()
    record = Run(job.config("weights.bits=3")).quantize(("weights",))
    assert list(record.stages.done) == ["weights"]
    assert not (job.out / "residual_renorm.caffemodel").exists()
    assert "ActQuantize" not in (job.out / "residual_val.prototxt").read_text()


def test_resume_skips_only_what_fits(job: Job) -> None:
    Run(job.config()).quantize()
    before = contents(job.out)

    def done(*assignments: str, **flags: bool) -> list[str]:
        heard = Heard()
        Run(job.config(*assignments), heard).quantize(resume=True, **flags)
        return [note.split(":")[0] for note in heard.notes if "skipped" in note]

    assert done() == ["weights", "renorm", "activations"]
    assert contents(job.out) == before
    assert done(force=True) == []
    assert done("activations.images=11") == ["weights", "renorm"]
    assert done("renorm.images=19") == ["weights"]
    assert done("weights.bits=3") == []
    (job.out / "residual_renorm.caffemodel").write_bytes(b"damaged")
    assert done("weights.bits=3") == ["weights"]


def test_resume_makes_the_page_that_a_killed_run_had_no_time_for(job: Job) -> None:
    Run(job.config()).quantize()
    before = (job.out / "report.json").read_bytes()
    (job.out / "report.html").unlink()
    Run(job.config()).quantize(resume=True)
    assert (job.out / "report.html").exists()
    assert (job.out / "report.json").read_bytes() == before


@pytest.mark.parametrize("spoil", [b"{", b'{"stages": 3}', b"[" * 100_000])
def test_resume_takes_nothing_from_a_report_that_is_not_ours(job: Job, spoil: bytes) -> None:
    Run(job.config()).quantize(("weights",))
    (job.out / "report.json").write_bytes(spoil)
    heard = Heard()
    record = Run(job.config(), heard).quantize(("weights",), resume=True)
    assert list(record.stages.done) == ["weights"]
    assert not any("skipped" in note for note in heard.notes)
    assert any("nothing is taken over" in note for note in heard.notes)


def test_a_changed_report_is_noticed(job: Job) -> None:
    Run(job.config()).quantize(("weights",))
    path = job.out / "report.json"
    path.write_text(path.read_text().replace('"bits": 4', '"bits": 5'))
    with pytest.raises(InputError, match="changed since"):
        evaluate_run(job.config())


def test_the_same_settings_give_the_same_bytes(make_job: Callable[[str], Job]) -> None:
    job = make_job("job")
    Run(job.config()).quantize()
    first = contents(job.out)
    Run(job.config()).quantize()
    assert contents(job.out) == first


def test_evaluate_counts_labels_and_agreement(job: Job) -> None:
    Run(job.config()).quantize()
    found = evaluate_run(job.config())
    assert found.images == 15
    assert 0 <= found.agreement <= 100
    for accuracy in found.accuracy.values():
        assert accuracy.top1 is not None
        assert accuracy.top5 is not None
        assert accuracy.top1 <= accuracy.top5
    assert evaluate_run(job.config(), 7).images == 7


def test_evaluate_before_quantize_says_so(job: Job) -> None:
    with pytest.raises(InputError, match="nothing quantized here yet"):
        evaluate_run(job.config())


def test_a_folder_in_use_is_refused(job: Job) -> None:
    held = OutputFolder(job.out)
    with pytest.raises(InputError, match="another labelfree run"):
        Run(job.config()).quantize()
    held.close()
    Run(job.config()).quantize(("weights",))


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    folder = OutputFolder(tmp_path)
    (tmp_path / "a").write_text("old")

    def fail_half_way(file: Writable) -> None:
        file.write(b"new")
        raise OSError(28, os.strerror(28))

    with pytest.raises(LabelfreeError, match=r"cannot write: No space"):
        folder.write("a", fail_half_way)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text() == "old"


class Counted(Progress):
    """Counts advances, and kills the process at one of them."""

    def __init__(self, deadly: int = 0) -> None:
        self.advances = 0
        self.deadly = deadly

    def advance(self, amount: float = 1.0) -> None:  # noqa: ARG002
        self.advances += 1
        if self.advances == self.deadly:
            os.kill(os.getpid(), signal.SIGKILL)


def run_until(yaml: Path, deadly: int) -> None:
    """The job, killed at its advance of number ``deadly``."""
    Run(Job(yaml.parent).config("memory=40000"), Counted(deadly)).quantize()


def test_killed_and_resumed_is_the_same_as_not_killed(make_job: Callable[[str], Job]) -> None:
    whole, killed = make_job("whole"), make_job("killed")
    counted = Counted()
    Run(whole.config("memory=40000"), counted).quantize()
    context = multiprocessing.get_context("spawn")
    for quarter in (1, 2, 3):
        deadly = quarter * counted.advances // 4
        process = context.Process(target=run_until, args=(killed.yaml, deadly))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        for path in killed.out.glob("*.caffemodel"):
            Weights.read(path)
    Run(killed.config("memory=40000")).quantize(resume=True)
    found = {n: c.replace(b"/killed/", b"/whole/") for n, c in contents(killed.out).items()}
    assert found == contents(whole.out)


def test_blobs_of_old_files_are_written_in_the_shapes_of_caffe(
    make_job: Callable[[str], Job],
) -> None:
    old, new = make_job("old"), make_job("new")
    weights = Weights.read(old.folder / "net.caffemodel")
    for layer in ("fc1", "fc2", "scale1"):
        weights.replace(layer, [blob.reshape((1,) * (4 - blob.ndim) + blob.shape) for blob in weights[layer]])
    with open(old.folder / "net.caffemodel", "wb") as file:
        weights.write(file)
    Run(old.config()).quantize()
    Run(new.config()).quantize()
    for name in ("residual_quantized.caffemodel", "residual_renorm.caffemodel"):
        ours, theirs = Weights.read(old.out / name), Weights.read(new.out / name)
        for layer in ("fc1", "fc2"):
            assert [blob.shape for blob in ours[layer]] == [blob.shape for blob in theirs[layer]]
        for layer in theirs.layers():
            for own, other in zip(ours[layer], theirs[layer], strict=True):
                np.testing.assert_array_equal(own.reshape(other.shape), other)


def test_dead_relus_and_negative_slopes_are_reported(job: Job) -> None:
    text = (job.folder / "net.prototxt").read_text()
    sloped = 'name: "relu_sum" type: "ReLU" bottom: "sum" top: "sum" relu_param { negative_slope: 0.1 }'
    text = text.replace('name: "relu_sum" type: "ReLU" bottom: "sum" top: "sum"', sloped)
    (job.folder / "net.prototxt").write_text(text)
    weights = Weights.read(job.folder / "net.caffemodel")
    gamma, beta = weights["scale1"]
    weights.replace("scale1", [np.zeros_like(gamma), np.full_like(beta, -1)])
    with open(job.folder / "new.caffemodel", "wb") as file:
        weights.write(file)
    os.replace(job.folder / "new.caffemodel", job.folder / "net.caffemodel")
    heard = Heard()
    record = Run(job.config(), heard).quantize()
    assert any("relu1 is dead" in note for note in heard.notes)
    assert record.stages.activations is not None
    found = {layer.name: layer for layer in record.stages.activations.layers}
    assert found.keys() == {"relu1", "relu_right_a", "pool_quantized", "relu_fc1"}
    assert found["relu1"].step > 0
    assert (found["pool_quantized"].behind, found["pool_quantized"].signed) == ("pool", True)
    assert found["pool_quantized"].minimum < 0 < found["pool_quantized"].maximum


def test_the_shares_of_the_work_are_in_the_record(job: Job) -> None:
    record = Run(job.config()).quantize(("weights",))
    assert record.coverage is not None
    assert (record.coverage.weights, record.coverage.inputs, record.coverage.both) == (1, 0, 0)
    record = Run(job.config()).quantize(("renorm", "activations"))
    assert record.coverage is not None
    assert record.coverage.in_float == {"conv1": "reads the net's input data (activations.input)"}
    first = 9 * 9 * 6 * 27
    assert record.coverage.both == pytest.approx(1 - first / record.coverage.macs)
    config = job.config().model_copy(update={"activations": ActivationSettings(input=True)})
    record = Run(config).quantize(("activations",))
    assert record.coverage is not None
    assert record.coverage.both == 1
    assert not record.coverage.in_float


def test_every_layer_skipped_is_questioned(job: Job) -> None:
    names = [layer.name for layer in read_prototxt(job.folder / "net.prototxt").layer]
    skips = [
        f"weights.layers.{name}.skip=true"
        for name in names
        if name.startswith(("conv", "right", "fc", "left"))
    ]
    heard = Heard()
    record = Run(job.config(*skips), heard).quantize()
    assert record.stages.weights is not None
    assert not record.stages.weights.layers
    assert "weights: weights.layers skips every layer; no weights are quantized" in heard.notes


def test_layers_behind_all_work_may_be_of_any_type(job: Job) -> None:
    """A type nobody knows stops the net's evaluation, not its quantization."""
    strange = 'layer { name: "boxes" type: "NobodyKnows" bottom: "fc2" top: "boxes" }\n'
    with open(job.folder / "net.prototxt", "a") as file:
        file.write(strange)
    assert list(Run(job.config()).quantize().stages.done) == ["weights", "renorm", "activations"]
    assert 'type: "NobodyKnows"' in (job.out / "residual_val.prototxt").read_text()


def test_keys_in_their_earlier_place_are_pointed_out(job: Job) -> None:
    notes = Heard()
    Run(job.config("renorm.memory=1GiB", "renorm.augment=test"), notes).quantize(("weights",))
    assert "renorm.memory holds for every stage; write memory instead" in notes.notes
    assert "renorm.augment holds for every stage; write data.augment instead" in notes.notes
    report = json.loads((job.out / "report.json").read_text())
    assert (report["settings"]["memory"], report["settings"]["data"]["augment"]) == (1 << 30, "test")
    assert not {"memory", "augment"} & report["settings"]["renorm"].keys()


def test_the_page_is_made_again_where_it_is_missing(job: Job) -> None:
    """A run that was killed before it could make it has left everything else behind."""
    Run(job.config()).quantize()
    (job.out / "report.html").unlink()
    before = contents(job.out)
    Run(job.config()).quantize(resume=True)
    assert (job.out / "report.html").exists()
    assert contents(job.out) == before


def test_blobs_of_old_files_count_as_those_of_new_ones(make_job: Callable[[str], Job]) -> None:
    """Their shapes are always four numbers."""
    new, old = make_job("new"), make_job("old")
    weights = Weights.read(old.folder / "net.caffemodel")
    for name in weights.layers():
        weights.replace(name, [blob.reshape((1,) * (4 - blob.ndim) + blob.shape) for blob in weights[name]])
    (old.folder / "net.caffemodel").unlink()
    with open(old.folder / "net.caffemodel", "wb") as file:
        weights.write(file)
    for given in ((), ("weights.solver=data_aware", "weights.images=20")):
        found = []
        for job in (new, old):
            Run(job.config(*given)).quantize()
            final = Weights.read(job.out / "residual_renorm.caffemodel")
            found.append({name: [blob.reshape(-1) for blob in final[name]] for name in final.layers()})
        for name in found[0]:
            for one, other in zip(found[0][name], found[1][name], strict=True):
                np.testing.assert_array_equal(one, other)
