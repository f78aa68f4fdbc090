"""The command line as a person uses it: what it prints, its exit codes, and one line for every mistake."""

import fcntl
import json
import os
import pty
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import yaml

from quantize import cli
from quantize.caffenet import Weights, read_net
from quantize.caffenet.traits import Trait, traits_of
from quantize.errors import InputError
from quantize.numerics.grids import make_grid
from quantize.numerics.solvers import fit
from tests.conftest import Job, Labelfree, Outcome, assert_one_line

ROOT = Path(__file__).resolve().parents[1]


def test_the_usual_way(job: Job, labelfree: Labelfree) -> None:
    done = labelfree("quantize", "--config", job.yaml)
    assert done.code == 0, done.err
    assert "packed" in done.out
    val = job.out / "residual_val.prototxt"
    weights = job.out / "residual_renorm.caffemodel"
    assert f"caffe test --model {val} --weights {weights} --iterations 3" in done.out
    shown = labelfree("evaluate", "--config", job.yaml)
    assert "agreement" in shown.out
    found = json.loads(labelfree("--quiet", "evaluate", "--config", job.yaml, "--json").out)
    assert {"images", "fp32", "quantized", "agreement"} <= found.keys()
    assert {"top1", "top5"} <= found["fp32"].keys()
    low, high = found["fp32"]["top1_interval"]
    assert low < found["fp32"]["top1"] < high
    assert [output["blob"] for output in found["outputs"]] == ["fc2"]
    assert found["paired"]["quantized"].keys() == {"first_only", "second_only", "p_value"}
    assert found["missing"] == []
    assert found["images"] == 15


def test_without_a_yaml_file(job: Job, labelfree: Labelfree) -> None:
    options = {
        "--prototxt": job.folder / "net.prototxt",
        "--weights": job.folder / "net.caffemodel",
        "--calibration": job.folder / "train_lmdb",
        "--output": job.folder / "elsewhere",
    }
    given = [part for option in options.items() for part in option]
    done = labelfree("quantize", *given, "--set", "renorm.images=20", "--set", "activations.images=9")
    assert done.code == 0, done.err
    assert (job.folder / "elsewhere/net_renorm.caffemodel").exists()
    found = labelfree("evaluate", *given, "--json")
    assert json.loads(found.out)["images"] == 20
    assert "no validation images" in found.err


def test_stages_one_by_one(job: Job, labelfree: Labelfree) -> None:
    for command in ("weights-quan", "renorm", "activations-quan"):
        assert labelfree(command, "--config", job.yaml).code == 0
    assert labelfree("quantize", "--config", job.yaml, "--stages", "renorm,activations").code == 0
    again = labelfree("quantize", "--config", job.yaml, "--resume")
    assert again.err.count("skipped") == 3


def test_help_teaches_and_is_quick() -> None:
    command = [sys.executable, "-m", "quantize.cli", "--help"]
    help_text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "labelfree quantize --config" in help_text
    modules = subprocess.run(
        [sys.executable, "-X", "importtime", *command[1:]], capture_output=True, text=True, check=True
    ).stderr
    for heavy in ("numpy", "onnxruntime", "cv2", "google.protobuf", "pydantic", "rich"):
        assert f" {heavy}\n" not in modules


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["quantize", "--config", "none.yaml"], ["none.yaml", "cannot read the configuration"]),
        (["quantize"], ["--config FILE", "--prototxt, --weights, --calibration and --output"]),
        (["evaluate", "-q"], ["--config FILE", "--prototxt, --weights, --calibration and --output"]),
        (
            ["quantize", "--output", "o"],
            ["model.prototxt and model.weights are missing; give --prototxt and"],
        ),
        (["no-such-command"], ["no such command 'no-such-command'; see `labelfree --help`"]),
        (["quantize", "--stags", "weights"], ["--stags", "--stages", "see `labelfree quantize --help`"]),
        (["quantize", "--stages", "weights,lunch"], ["'lunch' is not a stage; these are: weights, renorm,"]),
        (["evaluate", "--images", "0"], ["invalid value for '--images'"]),
        (["init", "--prototxt", "net.prototxt"], ["missing option '--weights'"]),
        (["make-lmdb", "photos"], ["missing argument 'LMDB'"]),
        (["make-lmdb", "a", "b", "--resize", "256"], ["'256' is not HEIGHTxWIDTH, as in 256x256"]),
    ],
)
def test_wrong_use(labelfree: Labelfree, arguments: list[str], parts: list[str]) -> None:
    assert_one_line(labelfree(*arguments), *parts)


def test_alone_it_shows_the_help(labelfree: Labelfree) -> None:
    assert labelfree() == labelfree("--help")
    assert labelfree().code == 0


def test_the_help_has_every_command_by_use_and_whole(labelfree: Labelfree) -> None:
    text = labelfree("--help").out
    listed = text[text.index("Commands:") :]
    names = re.findall(r"^  (\S+)", listed, re.MULTILINE)
    assert names == list(cli.cli.commands)
    assert names[:2] == ["quantize", "evaluate"]
    assert "..." not in listed
    words = " ".join(listed.split())
    for command in cli.cli.commands.values():
        first = " ".join((command.help or "").split()).split(". ")[0].rstrip(".")
        assert first in words


@pytest.mark.parametrize("place", ["before", "after"])
def test_quiet_and_verbose_before_and_after_the_command(job: Job, labelfree: Labelfree, place: str) -> None:
    def run(option: str, *command: str | Path) -> Outcome:
        return labelfree(option, *command) if place == "before" else labelfree(*command, option)

    weights = ("weights-quan", "--config", job.yaml)
    assert run("--quiet", *weights).err == ""
    assert run("-q", *weights).err == ""
    assert "weights: " in labelfree(*weights).err
    with pytest.raises(InputError, match=r"none.yaml"):  # which Python shows with its traceback
        run("-v", "quantize", "--config", "none.yaml")


def test_as_a_module(job: Job) -> None:
    command = [sys.executable, "-m", "quantize", "inspect", str(job.folder / "net.prototxt")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "becomes ActQuantize" in done.stdout


def completions(line: str) -> list[str]:
    """What the Tab key offers at the end of a command line in bash."""
    words = line.split(" ")
    environment = {
        **os.environ,
        "_LABELFREE_COMPLETE": "bash_complete",
        "COMP_WORDS": line,
        "COMP_CWORD": str(len(words) - 1),
    }
    script = "from quantize.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("labelfree quantize --prototxt n", ["file,n"]),
        ("labelfree quantize --weights n", ["file,n"]),
        ("labelfree evaluate --calibration p", ["file,p"]),
        ("labelfree evaluate --validation p", ["file,p"]),
        ("labelfree quantize -o o", ["file,o"]),
        ("labelfree layers d", ["file,d"]),
        ("labelfree quantize --set weights.b", ["plain,weights.bits=", "plain,weights.budget="]),
        (
            "labelfree quantize --set data.transform.re",
            ["plain,data.transform.resize_short=", "plain,data.transform.resize="],
        ),
        ("labelfree quantize --stages re", ["plain,renorm"]),
        ("labelfree quantize --stages weights,", ["plain,weights,renorm", "plain,weights,activations"]),
        ("labelfree do", ["plain,doctor"]),
    ],
)
def test_the_tab_key(line: str, offered: list[str]) -> None:
    assert completions(line) == offered


def test_the_next_command_is_named_and_does_it(job: Job, labelfree: Labelfree) -> None:
    """From stage to stage, with the options that were given."""
    out = job.folder / "my results"
    options = ["--config", str(job.yaml), "-o", str(out), "-j", "1", "--shape", "3,9,9"]
    options += ["--set", "weights.bits=3"]
    command = ["weights-quan", *options]
    seen = []
    for _ in range(4):
        seen.append(command[0])
        done = labelfree(*command)
        assert done.code == 0, done.err
        following = re.search(r"^ next: labelfree (.*)$", done.out, re.MULTILINE)
        command = shlex.split(following[1]) if following else []
        assert command[1:] in (
            [],
            [
                *("--config", str(job.yaml), "--output", str(out), "--shape", "3,9,9"),
                *("--threads", "1", "--set", "weights.bits=3"),
            ],
        )
    assert seen == ["weights-quan", "renorm", "activations-quan", "evaluate"]
    assert command == []


def on_a_terminal(columns: int, *arguments: str | Path) -> str:
    """What a command shows on a terminal with so many columns."""
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "NO_COLOR")}
    process = subprocess.Popen(
        [sys.executable, "-m", "quantize", *map(str, arguments)],
        cwd=ROOT,
        env={**environment, "TERM": "xterm"},
        stdin=its,
        stdout=its,
        stderr=its,
    )
    os.close(its)
    shown = b""
    with suppress(OSError):  # how the end of a terminal shows
        while part := os.read(ours, 1 << 16):
            shown += part
    os.close(ours)
    assert process.wait() == 0, shown
    return shown.decode()


def test_bars_and_rules_on_a_terminal_and_plain_lines_on_a_narrow_one(job: Job) -> None:
    wide = on_a_terminal(80, "quantize", "--config", job.yaml)
    assert "━━━" in wide
    assert "┃" in wide
    narrow = on_a_terminal(40, "quantize", "--config", job.yaml)
    assert not re.search("[━┃\x1b]", narrow)
    assert "renorm ...\r\n" in narrow
    assert re.search(
        r"^weights: \d+ layers, median SQNR .* dB, .* s, \d+ MB at most\r$", narrow, re.MULTILINE
    )


def bad_prototxt_missing(job: Job) -> None:
    (job.folder / "net.prototxt").unlink()


def bad_prototxt_truncated(job: Job) -> None:
    text = (job.folder / "net.prototxt").read_text()
    (job.folder / "net.prototxt").write_text(text[: len(text) // 2])


def bad_weights_missing(job: Job) -> None:
    (job.folder / "net.caffemodel").unlink()


def bad_weights_truncated(job: Job) -> None:
    content = (job.folder / "net.caffemodel").read_bytes()
    (job.folder / "net.caffemodel").write_bytes(content[: len(content) // 2])


def bad_weights_of_another_net(job: Job) -> None:
    text = (job.folder / "net.prototxt").read_text()
    (job.folder / "net.prototxt").write_text(text.replace("num_output: 12", "num_output: 13"))


def bad_weights_of_no_layer(job: Job) -> None:
    text = (job.folder / "net.prototxt").read_text()
    (job.folder / "net.prototxt").write_text(text.replace('name: "right_b"', 'name: "renamed"'))


def bad_weights_nan(job: Job) -> None:
    weights = Weights.read(job.folder / "net.caffemodel")
    blob = weights["right_a"][0].copy()
    blob.flat[3] = np.nan
    weights.replace("right_a", [blob])
    with open(job.folder / "nan.caffemodel", "wb") as file:
        weights.write(file)
    os.replace(job.folder / "nan.caffemodel", job.folder / "net.caffemodel")


def bad_lmdb_missing(job: Job) -> None:
    shutil.rmtree(job.folder / "train_lmdb")


def bad_lmdb_truncated(job: Job) -> None:
    path = job.folder / "train_lmdb/data.mdb"
    path.write_bytes(path.read_bytes()[:5000])


def bad_lmdb_empty_folder(job: Job) -> None:
    (job.folder / "train_lmdb/data.mdb").unlink()


def bad_too_few_images(job: Job) -> None:
    job.yaml.write_text(job.yaml.read_text().replace("images: 20", "images: 2000"))


def bad_no_quantizable_layer(job: Job) -> None:
    (job.folder / "net.prototxt").write_text(
        'layer { name: "data" type: "Input" top: "data" input_param { shape { dim: [1, 3, 9, 9] } } }\n'
        'layer { name: "relu" type: "ReLU" bottom: "data" top: "relu" }\n'
    )


def bad_crop_size(job: Job) -> None:
    text = (job.folder / "net.prototxt").read_text()
    (job.folder / "net.prototxt").write_text(text.replace("crop_size: 9", "crop_size: 90"))


def bad_label_less_net(job: Job) -> None:
    (job.folder / "net.prototxt").write_text("")


def bad_output_is_a_file(job: Job) -> None:
    (job.folder / "out").write_text("")


BAD = [
    (bad_prototxt_missing, ["net.prototxt"]),
    (bad_prototxt_truncated, ["net.prototxt"]),
    (bad_weights_missing, ["net.caffemodel"]),
    (bad_weights_truncated, ["net.caffemodel", "damaged"]),
    (bad_weights_of_another_net, ["fc1", "12", "13"]),
    (bad_weights_of_no_layer, ["renamed"]),
    (bad_weights_nan, ["right_a"]),
    (bad_lmdb_missing, ["train_lmdb"]),
    (bad_lmdb_truncated, ["train_lmdb"]),
    (bad_lmdb_empty_folder, ["train_lmdb"]),
    (bad_too_few_images, ["train_lmdb", "2000", "20"]),
    (bad_no_quantizable_layer, ["no layer to quantize"]),
    (bad_crop_size, ["crop_size", "90"]),
    (bad_label_less_net, ["net.prototxt"]),
    (bad_output_is_a_file, ["output", "out"]),
]


@pytest.mark.parametrize(("spoil", "parts"), BAD, ids=[spoil.__name__ for spoil, _ in BAD])
def test_bad_input_is_one_line_and_leaves_nothing(
    job: Job, labelfree: Labelfree, spoil: Callable[[Job], None], parts: list[str]
) -> None:
    spoil(job)
    assert_one_line(labelfree("quantize", "--config", job.yaml), *parts)
    assert not job.out.is_dir() or not list(job.out.iterdir())


def bad_unknown_layer(job: Job) -> None:
    text = (job.folder / "net.prototxt").read_text()
    (job.folder / "net.prototxt").write_text(text.replace('type: "Eltwise"', 'type: "ShuffleChannel"'))


def bad_mean_file(job: Job) -> None:
    text = (job.folder / "net.prototxt").read_text()
    (job.folder / "net.prototxt").write_text(text.replace("mean_value: 100", 'mean_file: "mean.binaryproto"'))
    (job.folder / "mean.binaryproto").write_bytes(b"no blob")


def bad_input_shape(job: Job) -> None:
    job.yaml.write_text(job.yaml.read_text().replace("data:\n", "data:\n  input_shape: [3, 12, 12]\n"))


def bad_budget(job: Job) -> None:
    set_key(job, "weights", "budget", 2.1)
    set_key(job, "weights", "images", 20)


def bad_memory(job: Job) -> None:
    set_key(job, "renorm", "memory", "1kB")


def set_key(job: Job, section: str, key: str, value: object) -> None:
    tree = yaml.safe_load(job.yaml.read_text())
    tree.setdefault(section, {})[key] = value
    job.yaml.write_text(yaml.safe_dump(tree))


def bad_validation(job: Job) -> None:
    shutil.rmtree(job.folder / "test_lmdb")


@pytest.mark.parametrize(
    "spoil",
    [
        *(spoil for spoil, _ in BAD),
        *(bad_unknown_layer, bad_mean_file, bad_input_shape, bad_budget, bad_memory, bad_validation),
    ],
)
def test_doctor_finds_what_quantize_refuses(
    job: Job, labelfree: Labelfree, spoil: Callable[[Job], None]
) -> None:
    """Both make the same checks: what one refuses the other names, in the same words."""
    spoil(job)
    examined = labelfree("doctor", "--config", job.yaml)
    assert examined.code == 1, examined.out
    assert not job.out.is_dir()
    refused = labelfree("quantize", "--config", job.yaml)
    assert_one_line(refused)
    faults = [line for line in examined.out.splitlines() if line.startswith("FAIL  ")]
    if spoil is bad_output_is_a_file:
        assert faults[-1].startswith("FAIL  output")
    else:
        message = refused.err.splitlines()[-1].removeprefix("labelfree: ")
        assert any(fault.endswith(f" {message}") for fault in faults), (message, faults)


@pytest.mark.parametrize(
    ("removed", "scope", "said"),
    [
        ("BatchNorm", "inputs", "no BatchNorm"),
        ("ReLU", "relu", "the net has nothing to quantize"),
        ("ReLU", "inputs", "codes -127..127"),
    ],
)
def test_a_net_without_a_kind_of_layer_says_so(
    job: Job, labelfree: Labelfree, removed: str, scope: str, said: str
) -> None:
    lines = (job.folder / "net.prototxt").read_text().splitlines()
    kept = [line for line in lines if f'type: "{removed}"' not in line]
    (job.folder / "net.prototxt").write_text("\n".join(kept))
    done = labelfree("quantize", "--config", job.yaml, "--set", f"activations.scope={scope}")
    assert done.code == 0, done.err
    assert said in done.err + done.out


def test_too_little_memory_names_the_least(job: Job, labelfree: Labelfree) -> None:
    outcome = labelfree("quantize", "--config", job.yaml, "--set", "memory=1kB")
    assert_one_line(outcome, "memory: 1000 bytes", "the least that would do")


def test_ctrl_c_is_exit_code_130_and_leaves_nothing(job: Job) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "quantize.cli", "quantize", "--config", str(job.yaml)],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    process.stderr.readline()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode in (0, 130)
    if process.returncode:
        assert "interrupted" in err
        assert "Traceback" not in err
    assert not list(job.out.glob(".*"))


@pytest.mark.parametrize("home", [None, "/dev/null/none"])
def test_without_a_home_nothing_but_results_is_printed(job: Job, home: str | None) -> None:
    """matplotlib and onnxruntime keep things below it, and fontconfig, which matplotlib calls."""
    (job.folder / "fonts.conf").write_text(
        '<?xml version="1.0"?><!DOCTYPE fontconfig SYSTEM "urn:fontconfig:fonts.dtd">'
        '<fontconfig><dir>/usr/share/fonts</dir><cachedir prefix="xdg">fontconfig</cachedir></fontconfig>'
    )
    environment = {**os.environ, "FONTCONFIG_FILE": str(job.folder / "fonts.conf")}
    for variable in ("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "MPLCONFIGDIR", "ORT_DISABLE_TELEMETRY"):
        environment.pop(variable, None)
    if home is not None:
        environment["HOME"] = home
    command = [sys.executable, "-m", "quantize.cli", "--quiet", "quantize", "--config", str(job.yaml)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert (job.out / "report.html").exists()


def test_nothing_is_kept_or_told_about_the_user(job: Job) -> None:
    """Of what lies in the home folder afterwards, all is matplotlib's."""
    home = job.folder / "home"
    home.mkdir()
    environment = {**os.environ, "HOME": str(home)}
    for variable in ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "ORT_DISABLE_TELEMETRY"):
        environment.pop(variable, None)
    command = [sys.executable, "-m", "quantize.cli", "--quiet", "quantize", "--config", str(job.yaml)]
    subprocess.run(command, env=environment, cwd=ROOT, check=True, capture_output=True)
    kept = [path.relative_to(home) for path in home.rglob("*") if path.is_file()]
    assert [path for path in kept if path.parts[1] not in ("matplotlib", "fontconfig")] == []


def test_inspect_shows_what_would_happen(job: Job, labelfree: Labelfree) -> None:
    shown = labelfree("inspect", job.folder / "net.prototxt", job.folder / "net.caffemodel")
    assert shown.code == 0, shown.err
    assert "weights: 4 bits power_of_two" in shown.out
    assert "becomes ActQuantize" in shown.out
    assert "then ActQuantize pool_quantized" in shown.out
    assert "quantized, of the multiply-accumulates: weights 100.0 %" in shown.out
    assert "in float: conv1: reads the net's input data" in shown.out
    plan = labelfree("inspect", job.folder / "net.prototxt", "--plan", "--images", "20", "--memory", "40kB")
    assert plan.code == 0, plan.err
    assert "times the work of one plain pass" in plan.out
    found = json.loads(labelfree("inspect", job.folder / "net.prototxt", "--json").out)
    assert found["parameters"] == sum(layer["parameters"] for layer in found["layers"])


@pytest.mark.parametrize(
    "assignments",
    [
        (),
        ("weights.budget=4.5", "weights.images=20"),
        ("weights.layers={left: {bits: 5}, fc1: {skip: true}}", "activations.levels=255"),
    ],
)
def test_inspect_shows_what_a_configuration_does(
    job: Job, labelfree: Labelfree, assignments: tuple[str, ...]
) -> None:
    """As `quantize` then does it."""
    given = [word for text in assignments for word in ("--set", text)]
    shown = labelfree("inspect", "--config", job.yaml, *given)
    assert shown.code == 0, shown.err
    found = json.loads(labelfree("-q", "inspect", "--config", job.yaml, *given, "--json").out)
    done = json.loads(labelfree("-q", "quantize", "--config", job.yaml, *given, "--json").out)
    plans = {layer["name"]: layer["plan"] for layer in found["layers"]}
    for layer in done["stages"]["weights"]["layers"]:
        plan = plans[layer["name"]].split("; then ActQuantize")[0]
        assert plan == f"weights: {layer['bits']} bits {layer['grid']}"
    quantized = [name for name, plan in plans.items() if plan.startswith("weights: ")]
    assert quantized == [layer["name"] for layer in done["stages"]["weights"]["layers"]]
    assert found["sizes"]["packed"] == done["sizes"]["packed"]
    assert found["budget"] == done["stages"]["weights"].get("budget")
    assert f"{done['sizes']['model'] / done['sizes']['packed']:.1f}x smaller" in shown.out
    largest = done["stages"]["activations"]["layers"][0]["levels"]
    assert f"activations: codes up to {largest} from" in shown.out
    assert f"{found['mean_bits']:.2f} bits on average" in shown.out


def test_inspect_wants_a_net_or_a_configuration(job: Job, labelfree: Labelfree) -> None:
    for arguments in ([], [job.folder / "net.prototxt", "--config", job.yaml]):
        assert_one_line(labelfree("inspect", *arguments), "give either a prototxt or --config FILE")
    plan = labelfree("inspect", "--config", job.yaml, "--plan")
    assert "20 images, micro-batches of" in plan.out  # renorm.images


@pytest.mark.parametrize(
    ("command", "following"),
    [
        (["quantize"], "evaluate"),
        (["quantize", "--stages", "weights"], "renorm"),
        (["weights-quan"], "renorm"),
    ],
)
def test_the_next_command_runs(job: Job, labelfree: Labelfree, command: list[str], following: str) -> None:
    done = labelfree(*command, "--config", job.yaml, "--output", job.folder / "two words")
    [line] = [line for line in done.out.splitlines() if line.strip().startswith("next: ")]
    words = shlex.split(line.split("next: ")[1])
    assert words[:2] == ["labelfree", following]
    assert labelfree(*words[1:]).code == 0


def test_what_caffe_test_needs_is_said(job: Job, labelfree: Labelfree) -> None:
    done = labelfree("quantize", "--config", job.yaml, "--set", "data.validation=null")
    assert "caffe test --model" not in done.out
    assert "would need labeled images in an LMDB: `labelfree make-lmdb IMAGES LMDB`" in done.out
    page = (job.out / "report.html").read_text()
    assert "caffe test -model" not in page
    assert "labelfree make-lmdb IMAGES LMDB" in page
    labelfree("quantize", "--config", job.yaml, "--resume")
    page = (job.out / "report.html").read_text()
    assert "caffe test -model residual_val.prototxt -weights residual_renorm.caffemodel -iterations 3" in page


def median_sqnr(job: Job, grid: str) -> float:
    """Of the layers that are neither the first nor the last, in decibels."""
    net, weights = read_net(job.folder / "net.prototxt"), Weights.read(job.folder / "net.caffemodel")
    names = [layer.name for layer in net.layer if Trait.KERNELS in traits_of(layer)][1:-1]
    found = []
    for name in names:
        w = weights[name][0].reshape(len(weights[name][0]), -1).astype(np.float64)
        found.append(10 * np.log10(np.square(w).sum() / fit(w, make_grid(grid, 4)).loss.sum()))
    return float(np.median(found))


def test_init_writes_a_configuration_that_runs(job: Job, labelfree: Labelfree) -> None:
    path = job.folder / "new.yaml"
    arguments = [
        "init",
        *("--prototxt", job.folder / "net.prototxt"),
        *("--weights", job.folder / "net.caffemodel"),
        *("--calibration", job.folder / "train_lmdb"),
        *("--config", path),
    ]
    done = labelfree(*arguments)
    assert done.code == 0, done.err
    assert "guessed: data.transform: as the prototxt says; mean 100, scale 1/50: means" in done.out
    assert "guessed: data.calibration.images 16 of 20: 4 are kept for evaluate" in done.out
    said = r"weights.grid power_of_two, .* SQNR of ([\d.]+) dB on it, of ([\d.]+) dB on uniform"
    found = re.search(said, done.out)
    assert found is not None
    for grid, decibels in zip(("power_of_two", "uniform"), found.groups(), strict=True):
        assert median_sqnr(job, grid) == pytest.approx(float(decibels), abs=0.06)
    assert labelfree("quantize", "--config", path).code == 0
    assert_one_line(labelfree(*arguments), "there already")


def test_doctor_finds_what_is_wrong(job: Job, labelfree: Labelfree) -> None:
    assert labelfree("doctor").code == 0
    well = labelfree("doctor", "--config", job.yaml)
    assert well.code == 0, well.out
    bad_weights_truncated(job)
    ill = labelfree("doctor", "--config", job.yaml)
    assert ill.code == 1
    assert "FAIL  model.weights" in ill.out


def test_a_norm_whose_statistics_are_ignored_is_named(job: Job, labelfree: Labelfree) -> None:
    path = job.folder / "net.caffemodel"
    weights = Weights.read(path)
    mean, variance, factor = weights["bn_left"]
    weights.replace("bn_left", [mean, variance, 0 * factor])
    with open(path, "wb") as file:
        weights.write(file)
    line = "BatchNorm bn_left: the third blob is 0"
    inspected = labelfree("inspect", job.folder / "net.prototxt", path)
    assert (inspected.code, inspected.err.count(line)) == (0, 1)
    as_json = json.loads(labelfree("inspect", job.folder / "net.prototxt", path, "--json").out)
    assert sum(line in note for note in as_json["notes"]) == 1
    ill = labelfree("doctor", "--config", job.yaml)
    assert (ill.code, ill.out.count(line)) == (1, 1)
    done = labelfree("quantize", "--config", job.yaml)
    assert (done.code, done.err.count(line)) == (0, 1)


def test_export_prints_what_the_file_is_worth(labelfree: Labelfree, job: Job) -> None:
    settings = ("--set", "activations.levels=255", "--set", "activations.sums=true")
    assert labelfree("-q", "quantize", "-c", job.yaml, *settings).code == 0
    done = labelfree("-q", "export", "-c", job.yaml, *settings, "--to", "onnx", "--images", "4")
    assert (done.code, done.err) == (0, "")
    assert "residual.onnx" in done.out
    assert "in float: conv1: reads the input data, which is not on codes (activations.input)" in done.out
    folder = job.folder / "files"
    words = ("export", "-c", job.yaml, *settings, "--to", "onnx", "--input", "pixels", "--images", "4")
    done = labelfree("-q", *words, "--output", folder, "--json")
    assert json.loads(done.out)["files"].keys() == {str(folder / "residual.onnx")}
    assert json.loads(done.out)["float_layers"] == {}
    scored = labelfree("-q", "evaluate", "-c", job.yaml, "--runtime", "onnx", "--json")
    assert scored.code == 0
    assert json.loads(scored.out).keys() >= {"fp32", "quantized", "onnx"}
    scored = labelfree(
        *("-q", "evaluate", "-c", job.yaml, "--runtime", "onnx", "--file", folder / "residual.onnx")
    )
    assert re.search(r"^onnx +\d+\.\d", scored.out, re.MULTILINE)
    assert "evaluation" not in json.loads((job.out / "report.json").read_text())


def test_export_without_a_yaml_file_writes_beside_the_results(labelfree: Labelfree, job: Job) -> None:
    files = ("--prototxt", job.folder / "net.prototxt", "--weights", job.folder / "net.caffemodel")
    words = (*files, "--calibration", job.folder / "train_lmdb", "--output", job.folder / "results")
    assert labelfree("-q", "quantize", *words).code == 0
    done = labelfree("-q", "export", *words, "--to", "onnx", "--images", "4")
    assert done.code == 0
    assert (job.folder / "results/net.onnx").exists()


def test_what_export_refuses_is_one_line(labelfree: Labelfree, job: Job) -> None:
    assert_one_line(labelfree("export", "-c", job.yaml, "--to", "onnx"), "nothing quantized here yet")
    assert_one_line(labelfree("export", "-c", job.yaml, "--to", "tflite"), "--to", "onnx")
    assert_one_line(labelfree("evaluate", "-c", job.yaml, "--file", "x.onnx"), "--file needs --runtime")
    assert_one_line(labelfree("evaluate", "-c", job.yaml, "--runtime", "onnx"), "nothing quantized here yet")
    assert labelfree("-q", "quantize", "-c", job.yaml, "--stages", "weights").code == 0
    assert_one_line(
        labelfree("evaluate", "-c", job.yaml, "--runtime", "onnx"), "run `labelfree export` first"
    )
