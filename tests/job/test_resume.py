"""What the stages depend on: the table against what they do read, and `--resume` against the table."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from quantize.caffenet import read_prototxt
from quantize.data.sources import open_source
from quantize.job.evaluation import evaluate_run
from quantize.job.given import Given
from quantize.job.resume import IMAGES_INPUT, READ, STAGE_BEFORE, dependencies
from quantize.job.run import Run
from quantize.record import STAGES, StageName
from quantize.settings import MOVED, Config, Section
from tests.conftest import Job
from tests.heard import Heard
from tests.nets import write_images

READ_BY_NO_STAGE = ("name", "output", "data.validation", *(f"renorm.{name}" for name in MOVED))
"""The last ones are read where they are now."""


def keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every key of the configuration; those of a section in `READ` are the section's."""
    for name, field in model.model_fields.items():
        key = f"{prefix}{name}"
        parts = (field.annotation, *getattr(field.annotation, "__args__", ()))
        section = next((part for part in parts if isinstance(part, type) and issubclass(part, Section)), None)
        if section is None or key in READ or key in READ_BY_NO_STAGE:
            yield key
        else:
            yield from keys(section, f"{key}.")


def test_the_table_knows_every_setting() -> None:
    """Whoever adds a setting has to say which stage reads it."""
    assert set(keys(Config)) == {*READ, *READ_BY_NO_STAGE} - {"version", STAGE_BEFORE, IMAGES_INPUT}


def read_settings(config: Config, monkeypatch: pytest.MonkeyPatch, work: Callable[[], object]) -> set[str]:
    """The keys that some work reads, by looking at the attributes it takes."""
    places: dict[int, str] = {}

    def place(section: Section, prefix: str) -> None:
        places[id(section)] = prefix
        for name in type(section).model_fields:
            inner = getattr(section, name)
            if isinstance(inner, Section):
                place(inner, f"{prefix}{name}.")

    place(config, "")
    seen: set[str] = set()
    plain = Section.__getattribute__

    def watched(self: Section, name: str) -> Any:
        if id(self) in places and name in type(self).model_fields:
            seen.add(places[id(self)] + name)
        return plain(self, name)

    monkeypatch.setattr(Section, "__getattribute__", watched)
    try:
        work()
    finally:
        monkeypatch.setattr(Section, "__getattribute__", plain)
    return seen


OF_THE_SECTION = ("model", "data", "weights", "renorm", "activations")
"""Reading these is on the way to what is in them."""
OF_NO_CONSEQUENCE = (
    "name",  # of the files
    "output",  # where they are
    "engine",  # asked for when the run is made
    "caffe",
    "threads",
    "data.validation",  # its inputs' names only, which say into which input images go: `IMAGES_INPUT`
    "data.validation.inputs",
)


@pytest.mark.parametrize(
    "assignments",
    [
        (),
        ("weights.solver=data_aware", "weights.images=20"),
        ("weights.budget=4.5",),
        ("data.transform={scale: 0.5}", "activations.levels=255"),
    ],
)
def test_stages_read_what_the_table_says(
    job: Job, monkeypatch: pytest.MonkeyPatch, assignments: tuple[str, ...]
) -> None:
    config = job.config(*assignments)
    for stage in STAGES:
        run = Run(config)
        work = getattr(run, f"_{stage}")
        declared = set(dependencies(run.given, stage))
        found: list[set[str]] = []

        def observed(begun: Any, work: Callable[[Any], Any] = work, found: list[set[str]] = found) -> Any:
            done: list[Any] = []
            found.append(read_settings(config, monkeypatch, lambda: done.append(work(begun))))
            return done[0]

        setattr(run, f"_{stage}", observed)
        monkeypatch.setattr(run, "_checked", lambda model: model)  # looks at an image, but changes no result
        run.quantize((stage,))
        [seen] = found
        sections = {key.rsplit(".", 1)[0] for key in seen if "." in key}
        assert sections & set(OF_THE_SECTION), "the watch does not work"
        read = {key for key in seen if key not in (*OF_THE_SECTION, *OF_NO_CONSEQUENCE)}
        undeclared = {key for key in read if not any(key == d or key.startswith(f"{d}.") for d in declared)}
        assert not undeclared, stage


def again(job: Job, *assignments: str, stages: tuple[StageName, ...] = STAGES) -> list[str]:
    """The stages that a resumed run does."""
    heard = Heard()
    Run(job.config(*assignments), heard).quantize(stages, resume=True)
    skipped = {note.split(":")[0] for note in heard.notes if "skipped" in note}
    return [stage for stage in stages if stage not in skipped]


@pytest.mark.parametrize(
    ("assignment", "expected"),
    [
        ("data.validation=null", []),
        ("data.validation.batch_size=3", []),
        ("engine=onnx", []),  # what auto is
        ("weights.images=7", []),  # only the data-aware solver looks at images
        ("caffe.python=python2", []),  # only engine: caffe starts it
        ("activations.levels=255", ["activations"]),
        ("renorm.images=19", ["renorm"]),
        ("data.seed=1", ["renorm", "activations"]),
        ("data.transform.scale=0.03", ["renorm", "activations"]),
        ("data.augment=test", ["renorm", "activations"]),
        ("weights.layers={left: {bits: 5}}", ["weights"]),
        ("weights.budget=4.5", ["weights"]),
    ],
)
def test_what_depends_on_a_setting(job: Job, assignment: str, expected: list[str]) -> None:
    before, now = Given(job.config()), Given(job.config(assignment))
    changed = [stage for stage in STAGES if dependencies(before, stage) != dependencies(now, stage)]
    assert changed == expected


def test_resume_does_what_has_changed_and_what_comes_behind(job: Job) -> None:
    Run(job.config()).quantize()
    assert again(job, "data.validation=null") == []
    assert again(job, "activations.images=11") == ["activations"]
    assert again(job, "activations.images=11", "renorm.images=19") == ["renorm", "activations"]
    assert again(job, "activations.images=11", "renorm.images=19") == []


def test_resume_says_why_a_stage_is_done_again(job: Job) -> None:
    Run(job.config()).quantize()
    heard = Heard()
    Run(job.config("renorm.images=19", "data.seed=1"), heard).quantize(resume=True)
    assert "renorm: done again: renorm.images was 20, is 19; data.seed was 0, is 1" in heard.notes
    (job.out / "residual_quantized.caffemodel").write_bytes(b"")
    Run(job.config("renorm.images=19", "data.seed=1"), heard).quantize(resume=True)
    assert "weights: done again: residual_quantized.caffemodel has changed" in heard.notes


def test_the_mean_file_is_read(job: Job) -> None:
    """Under the same name another mean image gives another result."""
    source = open_source(job.folder / "train_lmdb")
    shape = source.read(0).pixels.shape
    source.close()

    def write_mean(value: int) -> None:
        from quantize.caffenet import BlobProto

        mean = BlobProto(data=[value] * (shape[0] * shape[1] * shape[2]))
        mean.shape.dim.extend([1, *shape])
        (job.folder / "mean.binaryproto").write_bytes(mean.SerializeToString())

    write_mean(100)
    given = "data.transform={mean_file: " + str(job.folder / "mean.binaryproto") + "}"
    Run(job.config(given)).quantize()
    assert again(job, given) == []
    write_mean(90)
    assert again(job, given) == ["renorm", "activations"]


def test_the_schema_of_a_fork_is_read(job: Job) -> None:
    schema = job.folder / "caffe.proto"
    shutil.copy(Path(__file__).parents[2] / "quantize/caffenet/caffe.proto", schema)
    config = job.config(f"model.caffe_proto={schema}")

    def found(stage: StageName) -> object:
        return dependencies(Given(config), stage)

    before = [found(stage) for stage in STAGES]
    schema.write_text(schema.read_text() + "\n")
    for stage, old in zip(STAGES, before, strict=True):
        assert found(stage) != old


def test_another_validation_source_changes_the_prototxt_alone(job: Job) -> None:
    Run(job.config()).quantize()
    evaluate_run(job.config())
    kept = {path: path.read_bytes() for path in job.out.glob("*.caffemodel")}
    other = write_images(job.folder / "other_lmdb", 10)
    record = Run(job.config(f"data.validation.source={other}")).quantize(resume=True)
    assert {path: path.read_bytes() for path in job.out.glob("*.caffemodel")} == kept
    val = read_prototxt(job.out / "residual_val.prototxt")
    assert str(other) in [layer.data_param.source for layer in val.layer if layer.type == "Data"]
    assert record.settings.data.validation is not None
    assert record.settings.data.validation.source == other
    assert record.evaluation is None  # it was about other images
    assert json.loads((job.out / "report.json").read_text()) == json.loads(record.to_json())
    assert "not measured" in (job.out / "report.html").read_text()


def test_a_prototxt_that_was_edited_is_written_again(job: Job) -> None:
    Run(job.config()).quantize()
    before = (job.out / "residual_val.prototxt").read_bytes()
    (job.out / "residual_val.prototxt").write_text("layer {}")
    assert again(job) == []
    assert (job.out / "residual_val.prototxt").read_bytes() == before


def test_the_report_has_the_settings_that_a_stage_was_run_with(job: Job) -> None:
    """Not those of a later run of another stage."""
    Run(job.config("weights.bits=3")).quantize(("weights",))
    record = Run(job.config("weights.bits=5", "renorm.images=19")).quantize(("renorm",))
    assert (record.settings.weights.bits, record.settings.renorm.images) == (3, 19)
    assert "3-bit weights" in (job.out / "report.html").read_text()


def test_a_report_of_version_0_1_is_refused_in_one_line(job: Job) -> None:
    from tests.test_record import VERSION_0_1, signed

    Run(job.config()).quantize(("weights",))
    (job.out / "report.json").write_bytes(signed({**VERSION_0_1, "name": "residual"}))
    heard = Heard()
    Run(job.config(), heard).quantize(("weights",), resume=True)
    [said] = [note for note in heard.notes if "report.json" in note]
    assert "written by labelfree 0.1.0, another version of labelfree" in said
