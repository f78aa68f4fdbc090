"""What `evaluate` does with results that are not finished, not whole, or not of this job."""

import json
import shutil
from collections.abc import Callable

import pytest

from quantize.commands.evaluation import evaluation_json, evaluation_text
from quantize.errors import InputError
from quantize.job.evaluation import evaluate_run
from quantize.job.output import OutputFolder, is_held
from quantize.job.run import Run
from quantize.progress import Progress
from tests.conftest import Job
from tests.heard import Heard


@pytest.mark.parametrize(
    ("stages", "title", "missing"),
    [
        (("weights",), "quantized (no renorm, no activations)", ["renorm", "activations"]),
        (("weights", "renorm"), "quantized (no activations)", ["activations"]),
        (("weights", "renorm", "activations"), "quantized ", []),
    ],
)
def test_an_unfinished_net_is_called_so(
    job: Job, stages: tuple[str, ...], title: str, missing: list[str]
) -> None:
    Run(job.config()).quantize(stages)  # type: ignore[arg-type]
    found = evaluate_run(job.config())
    assert found.missing == missing
    text = evaluation_text(found)
    assert title in text
    assert ("not finished: " in text) == bool(missing)
    assert all(stage in text for stage in missing)
    assert json.loads(evaluation_json(found))["missing"] == missing
    page = (job.out / "report.html").read_text()
    assert ("unfinished: no activations" in page or "unfinished: no renorm" in page) == bool(missing)


def test_a_run_that_was_killed_in_renorm(job: Job) -> None:
    """The weights are new, the rest of the old run is gone."""
    Run(job.config()).quantize()
    before = evaluate_run(job.config())

    class Killed(Progress):
        def start(self, title: str, total: float) -> None:  # noqa: ARG002
            if title == "renorm":
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Run(job.config("weights.bits=2"), Killed()).quantize()
    found = evaluate_run(job.config())
    assert found.missing == ["renorm", "activations"]
    assert found.closeness != before.closeness
    assert "not finished: renorm and activations have not run" in evaluation_text(found)


def weights_of_other_settings(job: Job) -> None:
    Run(job.config("weights.bits=3", f"output={job.folder / 'other'}")).quantize(("weights",))
    shutil.copy(job.folder / "other/residual_quantized.caffemodel", job.out)


def no_renorm(job: Job) -> None:
    (job.out / "residual_renorm.caffemodel").unlink()


def an_edited_prototxt(job: Job) -> None:
    with open(job.out / "residual_val.prototxt", "a") as file:
        file.write("\n")


@pytest.mark.parametrize(
    ("spoil", "name"),
    [
        (weights_of_other_settings, "residual_quantized.caffemodel"),
        (no_renorm, "residual_renorm.caffemodel"),
        (an_edited_prototxt, "residual_val.prototxt"),
    ],
)
def test_files_that_the_report_does_not_tell_of(job: Job, spoil: Callable[[Job], None], name: str) -> None:
    """As after a kill between a file and the report: of which net would the figures be?"""
    Run(job.config()).quantize()
    spoil(job)
    with pytest.raises(InputError, match=rf"{name}: not the file that report.json tells of: .*--resume"):
        evaluate_run(job.config())
    Run(job.config()).quantize(resume=True)
    assert evaluate_run(job.config()).missing == []


def test_while_another_run_writes(job: Job) -> None:
    Run(job.config()).quantize(("weights",))
    assert not is_held(job.out)
    heard = Heard()
    other = OutputFolder(job.out)
    try:
        assert is_held(job.out)
        found = evaluate_run(job.config(), progress=heard)
    finally:
        other.close()
    assert found.missing == ["renorm", "activations"]
    assert any("another labelfree run is writing here" in note for note in heard.notes)
    assert any("not added to report.json" in note for note in heard.notes)


def test_the_results_of_another_model(job: Job) -> None:
    """Full precision would be one net and the quantized net another."""
    Run(job.config()).quantize()
    path = job.folder / "net.caffemodel"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.unlink()
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"made from another model.prototxt or model.weights"):
        evaluate_run(job.config())


def test_the_results_of_another_name(job: Job) -> None:
    Run(job.config()).quantize()
    with pytest.raises(InputError, match="holds the results of residual, not of other"):
        evaluate_run(job.config("name=other"))
