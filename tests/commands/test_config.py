"""The configuration: what is accepted, and the one line that each mistake gives."""

import os
from pathlib import Path
from typing import Any

import pytest

from quantize.commands.config import load
from quantize.errors import InputError
from quantize.settings import Config, GridChoice, parse_size

LEAST = {"name": "net", "model.prototxt": "net.prototxt", "model.weights": "net.caffemodel", "output": "out"}


def write(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(text)
    return path


def error_of(*assignments: str, path: Path | None = None, **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        load(path, {**LEAST, **options} if path is None else options, assignments)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_the_defaults_are_the_contract() -> None:
    config = load(None, LEAST)
    assert (config.weights.bits, config.weights.grid, config.weights.solver) == (4, "power_of_two", "optimal")
    assert (config.weights.first_last.bits, config.weights.first_last.grid) == (8, "fixed_point")
    assert (config.renorm.images, config.data.augment, config.memory) == (64, "train", 2 << 30)
    assert config.renorm.statistics == "paired"
    assert (config.activations.largest_code, config.activations.images) == (127, 64)
    assert config.engine == "auto"
    assert config.data.seed == 0


def test_paths_start_at_the_yaml_file_and_expand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELS", str(tmp_path / "models"))
    path = write(
        tmp_path,
        "name: a\nmodel: {prototxt: a.prototxt, weights: $MODELS/a.caffemodel}\n"
        "data: {calibration: {source: ../images}}\noutput: ~/out\n",
    )
    config = load(path)
    assert config.model.prototxt == tmp_path / "a.prototxt"
    assert config.model.weights == tmp_path / "models/a.caffemodel"
    assert config.data.calibration is not None
    assert config.data.calibration.source == tmp_path / "../images"
    assert config.output == Path.home() / "out"


def test_options_replace_the_file_and_set_replaces_both(tmp_path: Path) -> None:
    path = write(
        tmp_path, "name: a\nmodel: {prototxt: a, weights: b}\noutput: o\nengine: onnx\nweights: {bits: 3}\n"
    )
    config = load(path, {"engine": "caffe"}, ["weights.bits=5", "memory=1GiB"])
    assert (config.engine, config.weights.bits, config.memory) == ("caffe", 5, 1 << 30)


def test_without_a_file_the_name_comes_from_the_prototxt() -> None:
    options = {key: value for key, value in LEAST.items() if key != "name"}
    assert load(None, {**options, "model.prototxt": "some/my net.prototxt"}).name == "my_net"


def test_bits_and_budget_on_the_command_line_replace_each_other(tmp_path: Path) -> None:
    files = "model: {prototxt: p, weights: w}\nname: n\noutput: o\n"
    path = write(tmp_path, f"{files}weights: {{bits: 4, layers: {{a: {{bits: 5}}, b: {{skip: true}}}}}}\n")
    config = load(path, None, ["weights.budget=3.5"])
    assert (config.weights.budget, config.weights.layers["a"].bits) == (3.5, 5)
    assert load(path, None, ["weights.budget=null"]).weights.bits == 4
    path = write(tmp_path, f"{files}weights: {{budget: 3.5}}\n")
    config = load(path, None, ["weights.bits=3"])
    assert (config.weights.budget, config.weights.bits) == (None, 3)
    path = write(tmp_path, f"{files}weights: {{bits: 4, budget: 3.5}}\n")
    assert "give one of them" in error_of(path=path)


def test_overrides_inherit_what_they_do_not_name() -> None:
    config = load(
        None, LEAST, ["weights.bits=3", "weights.layers.fc8.grid=fixed_point", "weights.first_last.bits=6"]
    )
    assert (config.weights.layers["fc8"].bits, config.weights.layers["fc8"].grid) == (3, "fixed_point")
    assert (config.weights.first_last.bits, config.weights.first_last.grid) == (6, "fixed_point")
    assert config.weights.depthwise is None
    config = load(None, LEAST, ["weights.depthwise.bits=5"])
    assert config.weights.depthwise == GridChoice(bits=5, grid="fixed_point")


@pytest.mark.parametrize(
    ("assignment", "parts"),
    [
        ("weights.bit=3", ["weights.bit", "unknown key", "did you mean bits?"]),
        ("wieghts.bits=3", ["wieghts", "did you mean weights?"]),
        ("weights.layers.fc8.bist=3", ["weights.layers.fc8.bist", "did you mean bits?"]),
        ("weights.bits=7", ["weights", "power_of_two has 2 to 5 bits, not 7"]),
        ("weights.budget=1.5", ["weights.budget", "1.5", "greater than or equal to 2"]),
        ("weights.budget=nan", ["weights.budget"]),
        ("weights={bits: 3, budget: 3.5}", ["weights", "budget stands instead of bits; give one of them"]),
        ("weights={budget: 3.5, layers: {a: {grid: uniform}}}", ["give layers.a.bits", "budget"]),
        ("weights.bits=four", ["weights.bits", "'four'", "integer"]),
        ("weights.grid=octal", ["weights.grid", "'octal'", "power_of_two"]),
        ("memory=0", ["memory", "above zero"]),
        ("renorm.memory=0", ["renorm.memory", "above zero"]),
        ("renorm.memory=-1", ["renorm.memory", "-1", "2GiB"]),
        ("renorm.memory=2 potatoes", ["renorm.memory", "'2 potatoes'", "2GiB"]),
        ("renorm.images=true", ["renorm.images", "True", "integer"]),
        ("renorm.images=0", ["renorm.images", "greater than or equal to 1"]),
        ("activations.levels=300", ["activations.levels", "255"]),
        ("name=../x", ["name", "'../x'"]),
        ("caffe.python=[]", ["caffe.python"]),
        ("data.transform.mean_value=x", ["data.transform.mean_value", "'x'"]),
        ("weights", ["--set weights", "expected key=value"]),
        ("=3", ["--set =3", "expected key=value"]),
        ("weights.=3", ["--set weights.=3", "expected key=value"]),
        ("data.transform.resize=[64]", ["data.transform.resize", "[64]", "[height, width]", "[256, 256]"]),
        ("data.transform.resize=64", ["data.transform.resize", "64", "[height, width]"]),
        ("output=", ["output is empty; give it a value"]),
        ("renorm.images=", ["renorm.images is empty; give it a value or leave it out"]),
        ("data=", ["data is empty"]),
        ("data=photos", ["data is a section", "calibration", "write data: {calibration: {source: photos}}"]),
        ("data.calibration=a/b", ["data.calibration is a section", "write calibration: {source: a/b}"]),
        ("renorm=5", ["renorm is a section with the keys augment, bias_correction, images, memory", "'5'"]),
        ("weights.layers=[fc8]", ["weights.layers is a section with names as keys"]),
        ("weights.layers={fc8: 8}", ["weights.layers.fc8 is a section with the keys bits, grid, skip"]),
        ("model.prototxt={path: x}", ["model.prototxt", "expected a path, not a section"]),
        ("output=[x]", ["output", "expected a path, not a list"]),
        ("weights.bits=[", ["--set", "not valid YAML"]),
        ("name.first=x", ["name", "valid string"]),
    ],
)
def test_a_mistake_names_key_value_and_remedy(assignment: str, parts: list[str]) -> None:
    message = error_of(assignment)
    for part in parts:
        assert part in message


def test_an_empty_option_is_not_the_current_folder() -> None:
    for key in ("output", "model.prototxt", "model.weights", "data.calibration.source"):
        assert f"{key} is empty" in error_of(**{key: ""})


def test_a_missing_key_is_named() -> None:
    options = {key: value for key, value in LEAST.items() if key != "output"}
    with pytest.raises(InputError, match="output is missing; give --output, or a file with --config"):
        load(None, options)


def test_all_missing_keys_are_named_with_the_options_that_give_them(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        load(None, {"data.calibration.source": "photos"})
    assert str(caught.value) == (
        "options: model.prototxt, model.weights and output are missing; "
        "give --prototxt, --weights and --output, or a file with --config"
    )
    path = write(tmp_path, "model: {prototxt: a}\noutput: o\n")
    with pytest.raises(InputError) as caught:
        load(path)
    assert str(caught.value) == (
        f"{path}: name and model.weights are missing; "
        "write them in the file, or give --set name=... and --weights"
    )


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("- a\n- b\n", "not a configuration"),
        ("a: [", "not valid YAML"),
        ("a: 1\na: 2\n", "'a' is given twice"),
        ("a: &x [1]\nb: *x\n", "aliases"),
        ("name: !!python/object/apply:os.system ['true']\n", "not valid YAML"),
        ("[" * 5000, "not valid YAML"),
        ("a: \x00", "not valid YAML"),
        ("output: $NO_SUCH_VARIABLE/x\n", "$NO_SUCH_VARIABLE, which is not set"),
    ],
)
def test_a_file_that_is_no_configuration(tmp_path: Path, text: str, part: str) -> None:
    assert part in error_of(path=write(tmp_path, text))


def test_what_may_never_end_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    device = error_of(path=Path("/dev/zero"))
    assert "/dev/zero: a device, not a file; the configuration was expected" in device
    assert "pipe: a pipe, not a file" in error_of(path=tmp_path / "pipe")
    assert "larger than 1 MiB" in error_of(path=write(tmp_path, "#" * (2 << 20)))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    assert "cannot read the configuration" in error_of(path=tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("2GiB", 2 << 30),
        ("500 MB", 500_000_000),
        ("1.5k", 1536),
        (123456, 123456),
        ("unlimited", None),
        (None, None),
    ],
)
def test_sizes(text: object, size: int | None) -> None:
    assert parse_size(text) == size


def test_the_published_solver_means_the_published_scope() -> None:
    def scope(*settings: str) -> str:
        given = {"model.prototxt": "p", "model.weights": "w", "output": "o"}
        return load(None, given, settings).activations.scope

    assert scope() == "inputs"
    assert scope("weights.solver=reference") == scope("activations.solver=reference") == "relu"
    assert scope("weights.solver=reference", "activations.scope=inputs") == "inputs"


@pytest.mark.parametrize(
    ("earlier", "now", "value"),
    [("renorm.memory", "memory", "1GiB"), ("renorm.augment", "data.augment", "test")],
)
def test_keys_that_have_moved_are_read_where_they_were(
    tmp_path: Path, earlier: str, now: str, value: str
) -> None:
    def found(*assignments: str, path: Path | None = None) -> tuple[int | None, str]:
        config = load(path, LEAST if path is None else {}, assignments)
        again = Config.model_validate(config.model_dump(mode="json"))  # as in report.json
        assert again.model_dump() == config.model_dump()
        copied = config.model_copy(update={"data": config.data.model_copy(update={"seed": 1})})
        assert Config.model_validate(copied).data.augment == config.data.augment  # as in a new RunRecord
        return config.memory, config.data.augment

    assert found(f"{earlier}={value}") == found(f"{now}={value}") != found()
    section, _, name = earlier.rpartition(".")
    path = tmp_path / "a.yaml"
    given = "name: n\nmodel: {prototxt: a, weights: b}\noutput: o\n"
    path.write_text(f"{given}{section}: {{{name}: {value}}}\n")
    assert found(path=path) == found(f"{now}={value}")
    before = {"memory": "memory=3GiB", "data.augment": "data.augment=train"}[now]
    assert found(before, path=path) == found(before)  # the command line replaces what the file says
    new = f"{now}: {value}" if "." not in now else f"data: {{augment: {value}}}"
    path.write_text(f"{given}{section}: {{{name}: {value}}}\n{new}\n")
    message = error_of(path=path)
    assert f"{now} and {earlier}, its earlier place, are both given: keep the former" in message
    assert load(None, LEAST).data.augment == "train"  # the default is nobody's to change
