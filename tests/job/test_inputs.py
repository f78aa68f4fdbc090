"""Nets with several inputs, with inputs that take no images, and with shapes that only the user knows."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest

from quantize.caffenet import TEST, InferenceNet, Weights, read_prototxt
from quantize.commands.config import load
from quantize.data import Images, open_source
from quantize.errors import InputError
from quantize.job.evaluation import evaluate_run
from quantize.job.feeds import calibration_feed, effective_transform, validation_feed
from quantize.job.given import Given
from quantize.job.inputs import told_shapes
from quantize.job.run import Run
from quantize.settings import Config
from tests.conftest import Labelfree, assert_one_line
from tests.heard import Heard
from tests.nets import SEVERAL, parse, random_weights, write_images, write_several

FEATURES = """
name: "features"
layer { name: "in" type: "Input" top: "features" input_param { shape { dim: [10, 12] } } }
layer { name: "fc1" type: "InnerProduct" bottom: "features" top: "fc1" inner_product_param { num_output: 9 } }
layer { name: "bn" type: "BatchNorm" bottom: "fc1" top: "fc1" }
layer { name: "relu" type: "ReLU" bottom: "fc1" top: "fc1" }
layer { name: "fc2" type: "InnerProduct" bottom: "fc1" top: "fc2" inner_product_param { num_output: 4 } }
"""


@pytest.fixture
def several(tmp_path: Path) -> Path:
    return write_several(tmp_path)


def test_each_image_goes_with_its_own_values(several: Path) -> None:
    config = load(several)
    net = Given(config).net
    assert InferenceNet.of(net).inputs == ("target", "image", "info")
    feed = calibration_feed(Given(config, net), 20)
    assert list(feed.shapes) == ["target", "image", "info"]
    assert len(feed) == 20
    batches = list(feed.batches(8))
    assert [len(batch) for batch in batches] == [8, 8, 4]
    targets = np.stack([np.load(several.parent / f"targets/{n:02}.npy") for n in range(20)])
    found = {name: np.concatenate([batch.feeds[name] for batch in batches]) for name in feed.shapes}
    np.testing.assert_array_equal(found["target"], targets.astype(np.float32))
    np.testing.assert_array_equal(found["info"], np.tile(np.float32([0.5, -1, 2]), (20, 1)))
    images = feed.inputs["image"]
    assert isinstance(images, Images)
    np.testing.assert_array_equal(found["image"], next(images.batches(20))[0])
    assert all(array.flags.c_contiguous for array in batches[0].feeds.values())


def test_images_that_no_stage_has_used_keep_their_values(several: Path) -> None:
    config = load(several, assignments=["renorm.images=13", "activations.images=5", "data.validation=null"])
    feed = validation_feed(Given(config))
    assert len(feed) == 7
    target = next(feed.batches(7)).feeds["target"]
    np.testing.assert_array_equal(target[0], np.load(several.parent / "targets/13.npy").astype(np.float32))
    assert None not in next(feed.batches(7)).labels


def test_images_in_subfolders_have_no_order_that_values_could_follow(several: Path) -> None:
    """The first ones of all folders come first; in a list they stand as the user says."""
    source = open_source(several.parent / "train_lmdb")
    names = []
    for number in range(20):
        names.append(f"photos/{'ab'[number // 10]}/{number:02}.png")
        (several.parent / names[-1]).parent.mkdir(parents=True, exist_ok=True)
        pixels = np.ascontiguousarray(source.read(number).pixels.transpose(1, 2, 0))
        assert cv2.imwrite(str(several.parent / names[-1]), pixels)
    (several.parent / "list.txt").write_text("\n".join(names))
    config = load(several)
    net = Given(config).net
    wanted = next(calibration_feed(Given(config, net), 20).batches(20)).feeds
    listed = load(several, {"data.calibration.source": str(several.parent / "list.txt")})
    found = next(calibration_feed(Given(listed, net), 20).batches(20)).feeds
    for blob, values in wanted.items():
        np.testing.assert_array_equal(found[blob], values)
    folder = load(several, {"data.calibration.source": str(several.parent / "photos")})
    with pytest.raises(InputError, match=r"inputs\.target: .*photos lie in subfolders, .* list file"):
        calibration_feed(Given(folder, net), 20)


def without(config: Path, name: str) -> None:
    text = config.read_text()
    for given in ("target: targets, ", "target: test_targets.npz, ", ", info: [0.5, -1, 2]"):
        if given.strip(", ").startswith(name):
            text = text.replace(given, "")
    config.write_text(text)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        (
            "target",
            [
                "input 'image' (images go into 'target')",
                "conv_i, bn_i, relu_i, both, fc1 and 5 more layers depend",
            ],
        ),
        ("info", ["input 'info' (images go into 'image')", "layers fc_info, join, relu_j, fc2, prob depend"]),
    ],
)
@pytest.mark.parametrize("command", ["quantize", "renorm", "evaluate"])
def test_an_input_that_nothing_feeds(
    several: Path,
    name: str,
    parts: list[str],
    command: str,
    labelfree: Labelfree,
) -> None:
    if command == "evaluate":
        assert labelfree("quantize", "--config", several).code == 0
    without(several, name)
    files = set(several.parent.glob("out/*"))
    outcome = labelfree(command, "--config", several)
    assert_one_line(outcome, f"data.{'validation' if command == 'evaluate' else 'calibration'}: ", *parts)
    assert set(several.parent.glob("out/*")) == files


def test_weights_need_no_images_and_nothing_vanishes(several: Path) -> None:
    record = Run(load(several, assignments=["data.calibration=null", "data.validation=null"])).quantize(
        ["weights"]
    )
    assert record.stages.weights is not None
    assert [layer.name for layer in record.stages.weights.layers] == [
        *("conv_t", "conv_i", "fc1", "fc_info", "fc2")
    ]
    for kind in ("deploy", "val"):
        written = read_prototxt(several.parent / f"out/several_{kind}.prototxt")
        assert {layer.name for layer in parse(SEVERAL).layer} <= {layer.name for layer in written.layer}
        shapes = {
            layer.top[0]: list(layer.input_param.shape[0].dim)
            for layer in written.layer
            if layer.type == "Input"
        }
        assert shapes == {"target": [1, 2, 9, 9], "image": [1, 3, 9, 9], "info": [1, 3]}


def drop_one(folder: Path) -> None:
    (folder / "targets/07.npy").unlink()


def add_one(folder: Path) -> None:
    np.save(folder / "targets/99.npy", np.zeros((2, 9, 9)))


def other_shape(folder: Path) -> None:
    for path in (folder / "targets").iterdir():
        np.save(path, np.zeros((2, 9, 8)))


def one_of_other_shape(folder: Path) -> None:
    np.save(folder / "targets/07.npy", np.zeros((9, 9)))


def not_an_array(folder: Path) -> None:
    (folder / "targets/07.npy").write_text("1 2 3")


def no_folder(folder: Path) -> None:
    os.rename(folder / "targets", folder / "target")


@pytest.mark.parametrize(
    ("spoil", "parts"),
    [
        (drop_one, ["targets: 19 values but", "train_lmdb holds 20 images", "one for each"]),
        (add_one, ["targets: 21 values but", "train_lmdb holds 20 images"]),
        (other_shape, ["has the shape 2x9x8 but input 'target' takes 2x9x9"]),
        (one_of_other_shape, ["07.npy is 9x9 and 00.npy is 2x9x9"]),
        (not_an_array, ["07.npy: not a .npy file, or a damaged one"]),
        (no_folder, ["targets: no such folder or file"]),
    ],
)
def test_values_that_do_not_fit(
    several: Path,
    spoil: Callable[[Path], None],
    parts: list[str],
    labelfree: Labelfree,
) -> None:
    """One line, before any stage has taken its time."""
    spoil(several.parent)
    assert_one_line(labelfree("quantize", "--config", several), "data.calibration.inputs.target: ", *parts)
    assert not list(several.parent.glob("out/*"))


def test_a_nan_in_a_file_is_found_when_it_is_read(several: Path, labelfree: Labelfree) -> None:
    values = np.zeros((2, 9, 9))
    values[1, 2, 3] = np.nan
    np.save(several.parent / "targets/07.npy", values)
    outcome = labelfree("quantize", "--config", several)
    assert_one_line(outcome, "data.calibration.inputs.target: ", "targets: 07.npy holds a NaN")
    assert not (several.parent / "out/several_renorm.caffemodel").exists()


@pytest.mark.parametrize(
    ("assignment", "parts"),
    [
        ("data.calibration.inputs.tarqet=targets", ["no such input; it has target, image, info"]),
        ("data.calibration.inputs.prob=1", ["data.calibration.inputs.prob: the net has no such input"]),
        ("data.calibration.inputs.image=1", ["data.calibration.source: inputs names every input"]),
        ("data.calibration.inputs.info=true", ["data.calibration.inputs.info: True: give a folder"]),
        ("data.calibration.inputs.info={a: 1}", ["data.calibration.inputs.info: {'a': 1}: give a folder"]),
        ("data.calibration.inputs.info=[1, 2]", ["inputs.info: a value for each image has the shape 2 but"]),
        ("data.calibration.inputs.info=$NOWHERE/x.npy", ["data.calibration.inputs.info: ", "is not set"]),
        ("data.calibration.inputs=3", ["data.calibration.inputs is a section with names as keys"]),
        ("data.input_shape={nothing: [3]}", ["data.input_shape: nothing: the net has no such input"]),
        ("data.input_shape=[3, 0, 5]", ["data.input_shape: [3, 0, 5]: not a shape"]),
        ("data.input_shape={info: x}", ["data.input_shape: {'info': 'x'}: not a shape"]),
        ("data.input_shape=[3, 1048576, 5]", ["data.input_shape: [3, 1048576, 5]: not a shape"]),
    ],
)
def test_inputs_that_cannot_be(
    several: Path,
    assignment: str,
    parts: list[str],
    labelfree: Labelfree,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(several.parent)
    monkeypatch.delenv("NOWHERE", raising=False)
    assert_one_line(labelfree("quantize", "--config", several, "--set", assignment), *parts)
    assert not list(several.parent.glob("out/*"))


def test_other_values_are_other_inputs_to_resume(several: Path) -> None:
    def skipped() -> list[str]:
        heard = Heard()
        Run(load(several), heard).quantize(resume=True)
        return [note.split(":")[0] for note in heard.notes if "skipped" in note]

    Run(load(several)).quantize()
    assert skipped() == ["weights", "renorm", "activations"]
    np.save(several.parent / "targets/07.npy", np.ones((2, 9, 9)))
    assert skipped() == ["weights"]


@pytest.fixture
def features(tmp_path: Path) -> Callable[..., Config]:
    """A net that takes no images, 30 values for it, and a job of its own."""
    (tmp_path / "net.prototxt").write_text(FEATURES)
    weights = random_weights(InferenceNet.of(parse(FEATURES)).net, {"features": (12,)})
    with open(tmp_path / "net.caffemodel", "wb") as file:
        weights.write(file)
    np.save(tmp_path / "features.npy", np.random.default_rng(0).normal(3, 2, size=(30, 12)))

    def config(*assignments: str) -> Config:
        given = {
            "model.prototxt": str(tmp_path / "net.prototxt"),
            "model.weights": str(tmp_path / "net.caffemodel"),
            "output": str(tmp_path / "out"),
        }
        inputs = f"data.calibration={{inputs: {{features: {tmp_path / 'features.npy'}}}}}"
        return load(None, given, [inputs, "renorm.images=20", "activations.images=20", *assignments])

    return config


def test_a_net_that_takes_no_images(features: Callable[..., Config]) -> None:
    config = features("renorm={images: 20}")
    Run(config).quantize()
    final, full = (
        Weights.read(path) for path in (config.output / "net_renorm.caffemodel", config.model.weights)
    )
    assert final["bn"][0].shape == full["bn"][0].shape
    assert not np.array_equal(final["bn"][0], full["bn"][0])
    deploy = read_prototxt(config.output / "net_deploy.prototxt")
    assert list(deploy.layer[0].input_param.shape[0].dim) == [1, 12]
    found = evaluate_run(config)
    assert found.images == 10  # those that no stage had used
    assert found.accuracy["fp32"].top1 is None
    feed = validation_feed(Given(config), 3)
    np.testing.assert_array_equal(
        next(feed.batches(3)).feeds["features"],
        np.load(config.data.calibration.inputs["features"])[20:23].astype(np.float32),  # type: ignore[index,union-attr]
    )


@pytest.mark.parametrize(
    ("assignment", "reason"),
    [
        ("renorm.images=31", "data.calibration.inputs: renorm.images asks for 31 images but it holds 30"),
        ("data.calibration.images=31", "data.calibration.images asks for 31 images but it holds 30"),
        ("data.calibration={inputs: {features: 1}}", "constants alone do not say how many images"),
        ("data.validation={inputs: {}}", "give source, or inputs for a net that takes no images"),
        ("data.calibration={source: nowhere}", "nowhere: no such LMDB"),
    ],
)
def test_values_that_are_too_few(features: Callable[..., Config], assignment: str, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        Run(features(assignment)).quantize()


# ---- Shapes ----


def net_of(*dim: int, layer: str = "Input", more: str = "") -> str:
    shape = f"input_param {{ shape {{ dim: [{', '.join(map(str, dim))}] }} }}" if dim else ""
    return (
        f'layer {{ name: "data" type: "{layer}" top: "data" {shape} {more} }}'
        'layer { name: "conv" type: "Convolution" bottom: "data" top: "conv" '
        "convolution_param { num_output: 2 kernel_size: 1 } }"
        'layer { name: "relu" type: "ReLU" bottom: "conv" top: "conv" }'
    )


@pytest.fixture
def shaped(tmp_path: Path) -> Callable[..., Path]:
    """A job whose images are 40 x 48 photographs."""

    def make(text: str, size: tuple[int, int] = (40, 48)) -> Path:
        (tmp_path / "net.prototxt").write_text(text)
        weights = random_weights(InferenceNet.of(parse(text)).net, {"data": (3, 8, 8)})
        with open(tmp_path / "net.caffemodel", "wb") as file:
            weights.write(file)
        (tmp_path / "photos").mkdir()
        for number in range(3):
            image = np.random.default_rng(number).integers(0, 256, (*size, 3), np.uint8)
            assert cv2.imwrite(str(tmp_path / f"photos/{number}.png"), image)
        (tmp_path / "config.yaml").write_text(
            "name: net\nmodel: {prototxt: net.prototxt, weights: net.caffemodel}\n"
            "data: {calibration: {source: photos, images: 3}}\noutput: out\n"
        )
        return tmp_path / "config.yaml"

    return make


def deploy_shape(yaml: Path) -> list[int]:
    return list(read_prototxt(yaml.parent / "out/net_deploy.prototxt").layer[0].input_param.shape[0].dim)


@pytest.mark.parametrize(
    ("dim", "size", "given", "said"),
    [
        ((1, 3, 16, 16), (40, 48), [], True),
        ((1, 3, 1, 1), (40, 48), [], True),
        ((1, 3, 32, 32), (40, 48), [], False),
        ((1, 3, 16, 16), (16, 16), ["data.transform={resize: [16, 16]}"], False),
        ((1, 3, 16, 16), (40, 48), ["data.input_shape=[3, 16, 16]"], False),
        ((1, 3, 16, 16), (40, 48), ["data.input_shape=3x40x40"], False),
    ],
)
def test_a_size_that_may_be_a_placeholder(
    shaped: Callable[..., Path], dim: tuple[int, ...], size: tuple[int, int], given: list[str], said: bool
) -> None:
    """Said, unless the images have that size or somebody has said it."""
    yaml = shaped(net_of(*dim), size)
    heard = Heard()
    Run(load(yaml, assignments=given), heard).quantize()
    about = [note for note in heard.notes if "if its size is set at run time" in note]
    assert bool(about) == said
    if said:
        assert f"input data is declared as 3x{dim[2]}x{dim[3]}" in about[0]
        assert "data.input_shape" in about[0]


@pytest.mark.parametrize(
    ("text", "given", "transform", "shape"),
    [
        (net_of(1, 3, 1, 1), ["--shape", "3,40,40"], [], [1, 3, 40, 40]),
        (net_of(1, 3, 1, 1), ["--set", "data.input_shape={data: [3, 24, 24]}"], [], [1, 3, 24, 24]),
        (net_of(1, 3, 16, 16), ["--shape", "data=3x20x48"], ["resize=[20, 48]"], [1, 3, 20, 48]),
        (net_of(), ["--shape", "3,40,40"], [], [1, 3, 40, 40]),
        (net_of(layer="HDF5Data"), ["--shape", "3,40,40"], [], [1, 3, 40, 40]),
        (net_of(1, 3, 24, 24), [], [], [1, 3, 24, 24]),
    ],
)
def test_the_shape_that_is_given_counts(
    shaped: Callable[..., Path],
    text: str,
    given: list[str],
    transform: list[str],
    shape: list[int],
    labelfree: Labelfree,
) -> None:
    yaml = shaped(text)
    keys = [argument for key in transform for argument in ("--set", f"data.transform.{key}")]
    done = labelfree("quantize", "--config", yaml, *given, *keys)
    assert done.code == 0, done.err
    assert deploy_shape(yaml) == shape
    done = labelfree("weights-quan", "--config", yaml, "--set", "data.calibration=null", *given, *keys)
    assert done.code == 0, done.err
    assert deploy_shape(yaml) == shape


def test_without_any_shape_no_deploy_prototxt(shaped: Callable[..., Path]) -> None:
    yaml = shaped(net_of())
    heard = Heard()
    Run(load(yaml, assignments=["data.calibration=null"]), heard).quantize(["weights"])
    assert not (yaml.parent / "out/net_deploy.prototxt").exists()
    assert any("net_deploy.prototxt needs the images' shape: give data.input_shape" in n for n in heard.notes)


def test_images_of_another_shape_name_what_can_be_given(shaped: Callable[..., Path]) -> None:
    config = load(shaped(net_of(1, 3, 24, 20)))
    with pytest.raises(InputError, match=r"images are 3x40x48 .* input data is 3x24x20; .*data\.input_shape"):
        Run(config).quantize()


def test_init_resizes_to_an_input_that_is_not_square(
    shaped: Callable[..., Path],
    labelfree: Labelfree,
    tmp_path: Path,
) -> None:
    shaped(net_of(1, 3, 48, 40))
    files = [
        f"--{key}={tmp_path / name}"
        for key, name in (("prototxt", "net.prototxt"), ("calibration", "photos"))
    ]
    init = ["init", *files, f"--weights={tmp_path / 'net.caffemodel'}", "--config", tmp_path / "new.yaml"]
    done = labelfree(*init)
    assert done.code == 0, done.err
    assert "guessed: images are resized to 48x40, the input's height and width" in done.out
    assert "resize: [48, 40]" in (tmp_path / "new.yaml").read_text()
    assert labelfree("quantize", "--config", tmp_path / "new.yaml").code == 0
    done = labelfree(*init, "--force", "--shape", "3,24,36")
    assert done.code == 0, done.err
    assert "resize: [24, 36]" in (tmp_path / "new.yaml").read_text()
    assert load(tmp_path / "new.yaml").data.input_shape == [3, 24, 36]


IMAGE_DATA = net_of(layer="ImageData", more="image_data_param { source: 'x' new_height: 20 new_width: 24 }")
BOTH_MEANS = net_of(layer="Data", more='transform_param { mean_value: 3 mean_file: "mean.binaryproto" }')


@pytest.mark.parametrize(
    ("text", "given", "parts"),
    [
        (
            net_of(1, 3, 24, 24),
            "{resize: [24, 24], resize_short: 24}",
            ["config.yaml: data.transform: ", "resize and resize_short are both set: keep one"],
        ),
        (
            net_of(1, 3, 24, 24),
            "{mean_value: 3, mean_file: mean.binaryproto}",
            ["data.transform: ", "mean_file and mean_value are both set"],
        ),
        (
            net_of(1, 3, 24, 24),
            "{force_color: true, force_gray: true}",
            ["data.transform: ", "force_color and force_gray are both set"],
        ),
        (BOTH_MEANS, "{}", ["net.prototxt: transform_param of layer 'data': mean_file and mean_value"]),
        (net_of(1, 3, 24, 24), "{scale: .inf}", ["data.transform: scale and mean_value must be finite"]),
    ],
)
def test_a_transform_that_contradicts_itself_names_file_and_key(
    shaped: Callable[..., Path],
    text: str,
    given: str,
    parts: list[str],
    labelfree: Labelfree,
) -> None:
    outcome = labelfree("quantize", "--config", shaped(text), "--set", f"data.transform={given}")
    assert_one_line(outcome, *parts)


@pytest.mark.parametrize(
    ("text", "given", "expected"),
    [
        (IMAGE_DATA, "{}", {"resize": (20, 24), "resize_short": 0}),
        (IMAGE_DATA, "{resize_short: 30}", {"resize": None, "resize_short": 30}),
        (
            net_of(layer="Data", more="transform_param { force_color: true }"),
            "{force_gray: true}",
            {"force_color": False, "force_gray": True},
        ),
        (
            net_of(layer="Data", more="transform_param { force_gray: true }"),
            "{force_color: true}",
            {"force_color": True, "force_gray": False},
        ),
    ],
)
def test_what_is_given_replaces_what_it_excludes(
    shaped: Callable[..., Path], text: str, given: str, expected: dict[str, object]
) -> None:
    config = load(shaped(text), assignments=[f"data.transform={given}"])
    transform = effective_transform(Given(config), TEST)
    assert {key: getattr(transform, key) for key in expected} == expected


# ---- Commands ----


def test_doctor_looks_at_every_input(several: Path, labelfree: Labelfree) -> None:
    well = labelfree("doctor", "--config", several)
    assert well.code == 0, well.out
    assert "from target, image, info to fc2" in well.out
    assert well.out.count("target 2x9x9, image 3x9x9, info 3 when transformed") == 2
    drop_one(several.parent)
    ill = labelfree("doctor", "--config", several)
    assert ill.code == 1
    assert "19 values but" in ill.out
    without(several, "info")
    assert "nothing feeds the net's input 'info'" in labelfree("doctor", "--config", several).out


def test_init_says_what_is_to_be_filled_in(
    several: Path,
    labelfree: Labelfree,
    tmp_path: Path,
) -> None:
    done = labelfree(
        *("init", f"--prototxt={tmp_path / 'net.prototxt'}", f"--weights={tmp_path / 'net.caffemodel'}"),
        *(f"--calibration={tmp_path / 'train_lmdb'}", "--config", tmp_path / "new.yaml"),
    )
    assert done.code == 0, done.err
    assert "images go into input target; say in the file what goes into image, info" in done.out
    outcome = labelfree("quantize", "--config", tmp_path / "new.yaml")
    assert_one_line(outcome, "data.calibration.inputs.image: ", "VALUES: no such folder or file")
    text = (tmp_path / "new.yaml").read_text()
    assert '"image": VALUES, "info": VALUES' in text
    filled = text.replace('"image": VALUES, "info": VALUES', '"target": targets, "info": 1')
    (tmp_path / "new.yaml").write_text(filled)
    assert labelfree("quantize", "--config", tmp_path / "new.yaml").code == 0
    assert several.exists()


def test_inspect_shows_the_whole_net(several: Path, labelfree: Labelfree) -> None:
    folder = several.parent
    done = labelfree("inspect", folder / "net.prototxt", folder / "net.caffemodel", "--json")
    assert done.code == 0, done.err
    rows = {row["name"]: row for row in json.loads(done.out)["layers"]}
    assert list(rows) == [layer.name for layer in parse(SEVERAL).layer if layer.type != "Input"]
    assert rows["conv_t"]["plan"] == rows["fc2"]["plan"] == "weights: 8 bits fixed_point"
    assert rows["both"]["shape"] == [12, 7, 7]
    changed = labelfree(
        *("inspect", folder / "net.prototxt", "--json", "--shape", "target=2,9,9", "--shape", "image=3,9,9"),
        *("--shape", "info=5"),
    )
    rows = {row["name"]: row for row in json.loads(changed.out)["layers"]}
    assert rows["fc_info"]["parameters"] == 4 * 5 + 4
    assert_one_line(
        labelfree("inspect", folder / "net.prototxt", "--shape", "what=3"), "--shape: what: the net has"
    )


DETECTOR = """
input: "data" input_shape { dim: 1 dim: 3 dim: 40 dim: 40 }
input: "im_info" input_shape { dim: 1 dim: 3 }
layer { name: "conv" type: "Convolution" bottom: "data" top: "conv"
  convolution_param { num_output: 6 kernel_size: 3 } }
layer { name: "relu" type: "ReLU" bottom: "conv" top: "conv" }
layer { name: "rpn" type: "Convolution" bottom: "conv" top: "rpn"
  convolution_param { num_output: 6 kernel_size: 1 } }
layer { name: "proposal" type: "Python" bottom: "rpn" bottom: "im_info" top: "rois"
  python_param { module: "rpn" layer: "ProposalLayer" } }
layer { name: "roi_pool" type: "ROIPooling" bottom: "conv" bottom: "rois" top: "pooled" }
layer { name: "fc6" type: "InnerProduct" bottom: "pooled" top: "fc6" inner_product_param { num_output: 8 } }
layer { name: "relu6" type: "ReLU" bottom: "fc6" top: "fc6" }
layer { name: "cls" type: "InnerProduct" bottom: "fc6" top: "cls" inner_product_param { num_output: 4 } }
"""


def test_layers_behind_a_type_that_needs_an_input_nobody_feeds(
    tmp_path: Path,
    labelfree: Labelfree,
) -> None:
    """A detector: its proposals need the size of the image, and its classifier the proposals."""
    net = parse(DETECTOR)
    weights = Weights()
    shapes = {"conv": (6, 3, 3, 3), "rpn": (6, 6, 1, 1), "fc6": (8, 24), "cls": (4, 8)}
    for layer in net.layer:
        if layer.name in shapes:
            kernels = np.random.default_rng(0).normal(size=shapes[layer.name]).astype(np.float32)
            weights.add(layer, [kernels, np.zeros(len(kernels), np.float32)])
    (tmp_path / "net.prototxt").write_text(DETECTOR)
    with open(tmp_path / "net.caffemodel", "wb") as file:
        weights.write(file)
    write_images(tmp_path / "lmdb", 4, (3, 40, 40))
    shown = labelfree("inspect", tmp_path / "net.prototxt", tmp_path / "net.caffemodel", "--json")
    assert shown.code == 0, shown.err
    rows = {row["name"]: row for row in json.loads(shown.out)["layers"]}
    assert list(rows) == ["conv", "relu", "rpn", "proposal", "roi_pool", "fc6", "relu6", "cls"]
    assert "type Python is unknown" in rows["proposal"]["plan"]
    assert rows["cls"]["plan"] == "weights: 8 bits fixed_point"
    assert rows["rpn"]["shape"] == [6, 38, 38]
    assert rows["fc6"]["shape"] is rows["fc6"]["parameters"] is None
    assert "without 5 layers of unknown size" in labelfree("inspect", tmp_path / "net.prototxt").out
    job = [
        *("--prototxt", tmp_path / "net.prototxt", "--weights", tmp_path / "net.caffemodel"),
        *("--output", tmp_path / "out", "--set", "activations.images=4", "--set", "renorm.images=4"),
    ]
    assert_one_line(
        labelfree("quantize", *job, "--calibration", tmp_path / "lmdb"),
        *(
            "input 'im_info' (images go into 'data')",
            "layers proposal, roi_pool, fc6, relu6, cls depend on it",
        ),
    )
    assert not list(tmp_path.glob("out/*"))
    assert labelfree("weights-quan", *job).code == 0
    deploy = read_prototxt(tmp_path / "out/net_deploy.prototxt")
    assert {layer.name for layer in net.layer} <= {layer.name for layer in deploy.layer}
    assert [layer.top[0] for layer in deploy.layer if layer.type == "Input"] == ["data", "im_info"]
    info = ("--set", "data.calibration.inputs.im_info=[40, 40, 1]", "--calibration", tmp_path / "lmdb")
    assert_one_line(labelfree("quantize", *job, *info), "layer 'proposal' (Python)", "engine: caffe")


def test_told_shapes_win_over_what_the_net_declares(several: Path) -> None:
    net = parse(SEVERAL)
    declared = {"target": (2, 9, 9), "image": (3, 9, 9), "info": (3,)}
    assert told_shapes(Given(load(several), net)) == declared
    one = load(several, assignments=["data.input_shape=[3, 20, 30]"])
    assert told_shapes(Given(one, net)) == {**declared, "image": (3, 20, 30)}
    by_name = load(several, assignments=["data.input_shape={info: [7], target: '2,5,5'}"])
    assert told_shapes(Given(by_name, net)) == {**declared, "info": (7,), "target": (2, 5, 5)}


# ---- Phases, stages and levels ----

ALL_IN_ONE = """
layer { name: "train" type: "Data" top: "data" top: "label" include { stage: "train" }
  data_param { source: "x" batch_size: 2 backend: LMDB } }
layer { name: "deploy" type: "Input" top: "data" include { stage: "deploy" }
  input_param { shape { dim: [1, 3, 40, 40] } } }
layer { name: "conv" type: "Convolution" bottom: "data" top: "conv"
  convolution_param { num_output: 2 kernel_size: 1 } }
layer { name: "relu" type: "ReLU" bottom: "conv" top: "conv" }
layer { name: "loss" type: "SoftmaxWithLoss" bottom: "conv" bottom: "label" top: "loss"
  include { stage: "train" } }
layer { name: "more" type: "Power" bottom: "conv" top: "more" include { min_level: 2 } }
"""
TRAIN_ONLY = """
layer { name: "lmdb" type: "Data" top: "data" top: "label" include { phase: TRAIN }
  data_param { source: "x" batch_size: 2 backend: LMDB } }
layer { name: "conv" type: "Convolution" bottom: "data" top: "conv"
  convolution_param { num_output: 2 kernel_size: 1 } }
"""


def write_conv(folder: Path, text: str) -> None:
    (folder / "net.prototxt").write_text(text)
    weights = random_weights(InferenceNet.of(parse(net_of(1, 3, 8, 8))).net, {"data": (3, 8, 8)})
    with open(folder / "net.caffemodel", "wb") as file:
        weights.write(file)
    write_images(folder / "lmdb", 3, (3, 40, 40))


def test_stages_and_levels(tmp_path: Path, labelfree: Labelfree) -> None:
    write_conv(tmp_path, ALL_IN_ONE)
    model = ["--prototxt", tmp_path / "net.prototxt", "--weights", tmp_path / "net.caffemodel"]
    job = [*model, "--calibration", tmp_path / "lmdb", "--output", tmp_path / "out"]
    job += ["--set", "renorm.images=3", "--set", "activations.images=3"]
    hint = "the net's rules name the stages deploy, train: choose with model.stages"
    assert_one_line(labelfree("quantize", *job), "layer 'conv' (Convolution) reads 'data'", hint)
    assert_one_line(labelfree("inspect", tmp_path / "net.prototxt"), hint)
    outcome = labelfree("quantize", *job, "--set", "model.stages=depoly")
    assert_one_line(outcome, "no rule names the stage 'depoly'; named are: deploy, train")
    done = labelfree("quantize", *job, "--set", "model.stages=deploy", "--set", "model.level=2")
    assert done.code == 0, done.err
    for kind in ("deploy", "val"):
        written = read_prototxt(tmp_path / f"out/net_{kind}.prototxt")
        names = [layer.name for layer in written.layer if not layer.name.endswith("_alpha_term")]
        assert names == ["data" if kind == "deploy" else "deploy", "conv", "relu", "more"]
        assert not any(rule.stage for layer in written.layer for rule in layer.include)
    shown = labelfree("inspect", tmp_path / "net.prototxt", "--stage", "deploy", "--json")
    assert [row["name"] for row in json.loads(shown.out)["layers"]] == ["conv", "relu"]
    init = labelfree(
        *("init", *model, "--calibration", tmp_path / "lmdb", "--config", tmp_path / "new.yaml"),
        *("--stage", "deploy", "--level", "2"),
    )
    assert init.code == 0, init.err
    config = load(tmp_path / "new.yaml")
    assert (config.model.stages, config.model.level) == (["deploy"], 2)


def test_another_stage_is_another_net_to_resume(tmp_path: Path) -> None:
    write_conv(tmp_path, ALL_IN_ONE)
    given = {
        "model.prototxt": str(tmp_path / "net.prototxt"),
        "model.weights": str(tmp_path / "net.caffemodel"),
        "output": str(tmp_path / "out"),
    }
    Run(load(None, given, ["model.stages=deploy"])).quantize(["weights"])
    heard = Heard()
    Run(load(None, given, ["model.stages=deploy"]), heard).quantize(["weights"], resume=True)
    assert any("skipped" in note for note in heard.notes)
    heard = Heard()
    Run(load(None, given, ["model.stages=deploy", "model.level=2"]), heard).quantize(["weights"], resume=True)
    assert not any("skipped" in note for note in heard.notes)


def test_a_data_layer_of_the_training_phase_only(tmp_path: Path, labelfree: Labelfree) -> None:
    write_conv(tmp_path, TRAIN_ONLY)
    outcome = labelfree("inspect", tmp_path / "net.prototxt")
    assert_one_line(
        outcome,
        "layer 'conv' (Convolution) reads 'data', which no layer before it makes",
        "layer 'lmdb', which makes it, is left out by its include or exclude rules: ",
        "labelfree reads the TEST phase",
    )


def test_a_data_layer_of_the_test_phase_only(tmp_path: Path) -> None:
    """Its transform serves for calibration too."""
    text = TRAIN_ONLY.replace("TRAIN", "TEST").replace(
        "data_param", "transform_param { crop_size: 24 } data_param"
    )
    write_conv(tmp_path, text)
    given = {
        "model.prototxt": str(tmp_path / "net.prototxt"),
        "model.weights": str(tmp_path / "net.caffemodel"),
        "data.calibration.source": str(tmp_path / "lmdb"),
        "output": str(tmp_path / "out"),
    }
    config = load(None, given)
    assert calibration_feed(Given(config), 2).shapes == {"data": (3, 24, 24)}
