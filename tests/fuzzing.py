"""Damaged and hostile input through the real command line, each case in a process of its own.

A case is a folder with a small job of which one input has been mutated, and the commands that run on it.
Whatever happens, a command must do its work, or say in one line why not and end with exit code 2 (bad input)
or 1 (the work failed). Anything else is a bug: a traceback, a warning, more lines than one, a signal, more
than the memory or the time allowed, a file left half written, or one written outside the case's folder.

Cases depend on kind and number alone, so one that failed can be run again.
"""

from __future__ import annotations

import importlib
import math
import os
import pkgutil
import random
import re
import resource
import shutil
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import cv2
import matplotlib.backends.backend_agg
import matplotlib.font_manager  # noqa: F401 - here, as it makes a cache below the home folder
import numpy as np
import yaml

import quantize
from quantize import cli
from quantize.caffenet import (
    BlobProto,
    Datum,
    InferenceNet,
    NetParameter,
    Weights,
    format_prototxt,
    infer_shapes,
    read_prototxt,
)
from quantize.caffenet.shape_rules import _rules as shape_rules
from quantize.data.make_lmdb import make_datum, write_lmdb
from quantize.data.sources import open_source
from quantize.errors import InputError
from quantize.files import PART_SUFFIX
from tests.nets import RESIDUAL, parse, random_weights, write_images

MODELS = Path(__file__).resolve().parents[1] / "configs" / "models"
IMAGES = 12
MOST_WEIGHTS = 100_000
PAGE_EVERY = 10
"""Cases of which one draws report.html: its plots take longer than all else, and their faults are caught."""
ADDRESS_SPACE = 3 << 30
MEMORY = 2 << 30
CPU_SECONDS = 10
WALL_SECONDS = 60
"""Other programs may keep the processor busy; what counts is CPU_SECONDS."""
GENERATOR_FAILED, NOT_CAUGHT = 98, 99
DECODER_NOTE = re.compile(
    r"libpng (warning|error): |Corrupt JPEG data: |Premature end of JPEG|Warning: unknown JFIF"
    r"|Invalid SOS parameters"
)
"""What libpng and libjpeg write to standard error themselves, whatever their caller wants."""

YAML = f"""
name: digits
model: {{prototxt: net.prototxt, weights: net.caffemodel}}
data:
  calibration: {{source: train_lmdb, images: {IMAGES}}}
  validation: {{source: test_lmdb, batch_size: 4}}
  transform: {{}}
  seed: 0
engine: auto
weights:
  bits: 4
  grid: power_of_two
  solver: reference
  first_last: {{bits: 8, grid: fixed_point}}
  layers: {{res2a_branch2a: {{skip: true}}}}
renorm: {{images: 6, augment: train, memory: 2GiB}}
activations: {{bits: 8, images: 5, solver: optimal}}
threads: 1
output: out
"""

for module in pkgutil.walk_packages(quantize.__path__, "quantize."):
    if module.name != "quantize.engines.caffe.worker":  # runs where Caffe is
        importlib.import_module(module.name)  # here, once, instead of in every case

PHOTOS_AS_DIGITS = ("data.transform.resize=[8, 8]", "data.transform.force_gray=true")

Command = list[str]
Mutate = Callable[[random.Random, Path], list[Command]]
KINDS: dict[str, Mutate] = {}


def kind(mutate: Mutate) -> Mutate:
    """Register a mutation of the job in a folder; it gives the commands to run there."""
    KINDS[mutate.__name__] = mutate
    return mutate


# ---- The seeds ----


def make_seed_job(folder: Path) -> None:
    """The digits network with a few of its images, in every form that images can have."""
    digits = MODELS / "digits"
    shutil.copyfile(digits / "digits.prototxt", folder / "net.prototxt")
    shutil.copyfile(digits / "digits.caffemodel", folder / "net.caffemodel")
    for name in ("train", "test"):
        source = open_source(digits / ("calibration_lmdb" if name == "train" else "test_lmdb"))
        images = [source.read(i) for i in range(IMAGES)]
        write_lmdb(
            ((f"{i:04}", make_datum(image.pixels, image.label)) for i, image in enumerate(images)),
            folder / f"{name}_lmdb",
        )
        if name == "train":
            write_pictures(folder, [image.pixels.astype(np.uint8) for image in images])
    mean = BlobProto(num=1, channels=1, height=8, width=8, data=[5.0] * 64)
    (folder / "mean.binaryproto").write_bytes(mean.SerializeToString())
    (folder / "config.yaml").write_text(YAML)


def write_pictures(folder: Path, pictures: list[np.ndarray[Any, Any]]) -> None:
    """An image folder, a list of it, and an LMDB of encoded Datums."""
    suffixes = (".png", ".jpg", ".bmp", ".pgm", ".webp", ".tiff")
    (folder / "photos").mkdir()
    lines, datums = [], []
    for i, pixels in enumerate(pictures):
        suffix = suffixes[i % len(suffixes)]
        _, encoded = cv2.imencode(suffix, pixels.transpose(1, 2, 0))
        (folder / "photos" / f"{i:02}{suffix}").write_bytes(encoded.tobytes())
        lines.append(f"photos/{i:02}{suffix} {i % 10}\n")
        datums.append((f"{i:04}", Datum(data=encoded.tobytes(), encoded=True, label=i % 10)))
    (folder / "list.txt").write_text("".join(lines))
    write_lmdb(datums, folder / "encoded_lmdb")


# ---- Mutations of bytes and text ----

NUMBERS = (
    *(0, 1, 2, 3, 5, 7, 8, 9, 16, 100, 127, 128, 255, 256, 1000, 32767, 65535, 65536, 10**6, 2**24, 10**9),
    *(2**31 - 1, 2**31, 2**32 - 1, 2**32, 10**12, 2**63 - 1, 2**63, 2**64 - 1, 10**30),
    *(-1, -2, -8, -(2**31), -(2**31) - 1, -(2**63)),
)
FLOATS = (
    0.0,
    -0.0,
    -1.0,
    0.5,
    1e-45,
    1e-38,
    1e-20,
    1e20,
    3e38,
    -3e38,
    float("inf"),
    float("-inf"),
    float("nan"),
)
TEXTS = (
    *("", " ", "data", "label", "conv1", "no such thing", "../../outside", "/", "/dev/zero", "/dev/null"),
    *(
        ".",
        "~",
        "$HOME/x",
        "$UNSET_VARIABLE",
        "a\nb",
        "\x1b[31mred",
        "\0",
        "x" * 5000,
        "\u202e\u00e9\U0001f600",
    ),
    *(
        "*",
        "%s%n{0}",
        "/proc/self/mem",
        "photos",
        "train_lmdb",
        "net.caffemodel",
        "config.yaml",
        "-1",
        "true",
    ),
)


def mutated_bytes(rng: random.Random, data: bytes, times: int) -> bytes:
    """Bits flipped, numbers overwritten, pieces cut, repeated and moved."""
    out = bytearray(data)
    for _ in range(times):
        at = rng.randrange(len(out) + 1)
        size = min(rng.choice((1, 2, 4, 8, 64, 1000)), len(out) - at)
        match rng.randrange(8):
            case 0 if out:
                out[at % len(out)] ^= 1 << rng.randrange(8)
            case 1 if out:
                out[at % len(out)] = rng.randrange(256)
            case 2:
                width = rng.choice((2, 4, 8))
                number = rng.choice(NUMBERS) % (1 << 8 * width)
                out[at : at + width] = number.to_bytes(width, rng.choice(("little", "big")))
            case 3:
                del out[at : at + size]
            case 4:
                out[at:at] = out[at : at + size]
            case 5:
                out[at:at] = bytes(rng.randrange(256) for _ in range(size))
            case 6 if rng.random() < 0.3:
                del out[at:]
            case _:
                out[at : at + size] = bytes([rng.choice((0, 0xFF, 0x80, 0x7F))]) * size
    return bytes(out)


def mutated_text(rng: random.Random, text: str, times: int) -> str:
    """Numbers and words exchanged for odd ones, lines moved, pieces cut, or bytes mutated."""
    for _ in range(times):
        lines = text.split("\n")
        i, j = rng.randrange(len(lines)), rng.randrange(len(lines))
        match rng.randrange(9):
            case 0 | 1:
                text = _replaced(rng, text, r"-?\d+(\.\d+)?", str(rng.choice((*NUMBERS, *FLOATS))))
            case 2:
                text = _replaced(rng, text, r"\w+", rng.choice(re.findall(r"\w+", text) or ["x"]))
            case 3:
                text = _replaced(rng, text, r'"[^"]*"', f'"{rng.choice(TEXTS)}"')
            case 4:
                text = _replaced(
                    rng, text, r"[{}\[\]:,\"#'&*!|>%@-]", rng.choice(["{", "}", "", ":", '"', "[", "&a "])
                )
            case 5:
                lines[i], lines[j] = lines[j], lines[i]
                text = "\n".join(lines)
            case 6:
                lines.insert(i, lines[j])
                text = "\n".join(lines)
            case 7:
                del lines[i]
                text = "\n".join(lines)
            case _:
                text = mutated_bytes(rng, text.encode("utf-8", "surrogateescape"), 1).decode(
                    "utf-8", "surrogateescape"
                )
        text = text or "\n"
    return text


def _replaced(rng: random.Random, text: str, pattern: str, new: str) -> str:
    found = list(re.finditer(pattern, text))
    if not found:
        return text
    match = rng.choice(found)
    return text[: match.start()] + new + text[match.end() :]


def write_text(path: Path, text: str) -> None:
    path.write_bytes(text.encode("utf-8", "surrogateescape"))


# ---- Commands ----


def quantize_commands(rng: random.Random, *assignments: str) -> list[Command]:
    """Mostly the three stages and evaluate; sometimes one of the commands that look at the same files."""
    sets = [part for assignment in assignments for part in ("--set", assignment)]
    config = ["--config", "config.yaml", "--output", "out", *sets]
    match rng.randrange(10):
        case 0:
            return [["doctor", *config]]
        case 1:
            return [
                ["inspect", "net.prototxt", "net.caffemodel", "--shape", rng.choice(("1,8,8", "3,9,9"))],
                ["inspect", "net.prototxt", "--plan", "--json", "--shape", "1,8,8"],
            ]
        case 2:
            init = ["init", "--prototxt", "net.prototxt", "--weights", "net.caffemodel"]
            return [[*init, "--calibration", "train_lmdb", "--config", "out/new.yaml"]]
        case _:
            commands = [["quantize", *config]]
            if rng.random() < 0.2:
                commands.append(["quantize", "--resume", *config])
            if rng.random() < 0.3:
                commands.append(["evaluate", "--json", *config])
            return commands


# ---- Kinds ----


@kind
def prototxt(rng: random.Random, job: Path) -> list[Command]:
    """The text of a net."""
    text = (job / "net.prototxt").read_text()
    if rng.random() < 0.2:
        text = rng.choice(sorted(MODELS.glob("*.prototxt"))).read_text()
    write_text(job / "net.prototxt", mutated_text(rng, text, rng.choice((1, 1, 2, 4))))
    if rng.random() < 0.02:
        (job / "net.prototxt").write_text("layer { " * 100_000)
    return quantize_commands(rng)


@kind
def net(rng: random.Random, job: Path) -> list[Command]:
    """The fields and the graph of a net, with weights that fit wherever the net is possible."""
    message = read_prototxt(job / "net.prototxt")
    if rng.random() < 0.5:
        message = parse(RESIDUAL)
        (job / "config.yaml").write_text(YAML.replace("res2a_branch2a", "right_a"))
        for name in ("train_lmdb", "test_lmdb"):
            shutil.rmtree(job / name)
            write_images(job / name, IMAGES)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        mutate_net(rng, message)
    (job / "net.prototxt").write_text(format_prototxt(message))
    try:
        test = InferenceNet.of(message)
        shape = (3, 9, 9) if message.name == "residual" else (1, 8, 8)
        sizes = infer_shapes(test.net, {test.blob: (1, *shape)}).params.values()
        if sum(math.prod(blob) for blobs in sizes for blob in blobs) > MOST_WEIGHTS:
            raise InputError("possible, but work for minutes")
        weights = random_weights(test.net, {test.blob: shape})
    except Exception:
        weights = Weights.read(job / "net.caffemodel")
    with open(job / "net.caffemodel", "wb") as file:
        weights.write(file)
    return quantize_commands(rng)


def mutate_net(rng: random.Random, message: NetParameter) -> None:
    """One change of the layers' order, connections, types or parameters."""
    layers = message.layer
    layer, other = rng.choice(layers), rng.choice(layers)
    blobs = sorted({name for each in layers for name in (*each.bottom, *each.top)})
    match rng.randrange(9) if rng.random() < 0.25 else 9:
        case 0:
            layers.remove(layer)
        case 1:
            layers.append(layer)
        case 2:
            moved = type(layer)()
            moved.CopyFrom(layer)
            layers.remove(layer)
            layers.insert(rng.randrange(len(layers) + 1), moved)
        case 3:
            layer.type = rng.choice(sorted(shape_rules))
        case 4 if layer.bottom:
            layer.bottom[rng.randrange(len(layer.bottom))] = rng.choice((*blobs, *layer.top, *TEXTS[:5]))
        case 5 if layer.top:
            layer.top[rng.randrange(len(layer.top))] = rng.choice((*blobs, *TEXTS[:5]))
        case 6:
            layer.bottom.append(rng.choice(blobs))
        case 7:
            layer.top.append(rng.choice((*blobs, "new")))
        case 8:
            layer.name = rng.choice((other.name, *TEXTS)).replace("\0", "")
        case _:
            mutate_message(rng, rng.choice(layers), 0)


def mutate_message(rng: random.Random, message: Any, depth: int) -> None:
    """One field of a message, set or not, anywhere below it."""
    parameters = [f for f in message.DESCRIPTOR.fields if f.message_type and message.ListFields()]
    present = [f for f, _ in message.ListFields()]
    inside = [f for f in present if f.message_type is not None]
    if inside and depth < 3 and rng.random() < 0.8:
        chosen = rng.choice(inside)
        value = getattr(message, chosen.name)
        if chosen.is_repeated:
            value = rng.choice(value)
        mutate_message(rng, value, depth + 1)
        return
    chosen = rng.choice(
        list(message.DESCRIPTOR.fields) if rng.random() < 0.5 else present or parameters or [None]
    )
    if chosen is None:
        return
    if rng.random() < 0.1:
        message.ClearField(chosen.name)
        return
    if chosen.message_type is not None:
        target = getattr(message, chosen.name)
        target = target.add() if chosen.is_repeated else target
        if depth < 3:
            mutate_message(rng, target, depth + 1)
        return
    value = odd_value(rng, chosen)
    if chosen.is_repeated:
        values = getattr(message, chosen.name)
        if values and rng.random() < 0.5:
            values[rng.randrange(len(values))] = value
        else:
            values.append(value)
    else:
        setattr(message, chosen.name, value)


def odd_value(rng: random.Random, chosen: Any) -> Any:
    """A value of a field's type at or near its limits."""
    kinds = chosen
    if kinds.enum_type is not None:
        return rng.choice([value.number for value in kinds.enum_type.values])
    if kinds.cpp_type in (kinds.CPPTYPE_FLOAT, kinds.CPPTYPE_DOUBLE):
        return rng.choice(FLOATS)
    if kinds.cpp_type == kinds.CPPTYPE_BOOL:
        return rng.random() < 0.5
    if kinds.cpp_type == kinds.CPPTYPE_STRING:
        text = rng.choice(TEXTS)
        return text.encode() if kinds.type == kinds.TYPE_BYTES else text
    low, high = {
        kinds.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
        kinds.CPPTYPE_UINT32: (0, 2**32 - 1),
        kinds.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
        kinds.CPPTYPE_UINT64: (0, 2**64 - 1),
    }[kinds.cpp_type]
    return rng.choice([number for number in NUMBERS if low <= number <= high])


@kind
def caffemodel(rng: random.Random, job: Path) -> list[Command]:
    """The bytes of a caffemodel, or the values, shapes and names in it."""
    path = job / "net.caffemodel"
    if rng.random() < 0.4:
        path.write_bytes(mutated_bytes(rng, path.read_bytes(), rng.choice((1, 1, 3, 10))))
        return quantize_commands(rng)
    message = NetParameter.FromString(path.read_bytes())
    for _ in range(rng.choice((1, 1, 2))):
        layer = rng.choice([each for each in message.layer if each.blobs])
        blob = rng.choice(layer.blobs)
        match rng.randrange(6):
            case 0 | 1:
                values = np.array(blob.data, np.float32)
                odd = np.array(
                    rng.choices(FLOATS[:-3] if rng.random() < 0.7 else FLOATS, k=len(values)), np.float32
                )
                share = rng.choice((0.001, 0.1, 1.0))
                values = np.where(
                    np.random.default_rng(rng.randrange(2**32)).random(len(values)) < share, odd, values
                )
                blob.ClearField("data")
                blob.data.extend(values.tolist())
            case 2:
                blob.shape.dim.append(rng.choice([n for n in NUMBERS if -(2**63) <= n < 2**63]))
            case 3:
                blob.num = rng.choice([n for n in NUMBERS if -(2**31) <= n < 2**31])
            case 4:
                layer.name = rng.choice((*TEXTS[:5], rng.choice(message.layer).name))
            case _:
                mutate_message(rng, layer, 0)
    path.write_bytes(message.SerializeToString())
    return quantize_commands(rng)


@kind
def datum(rng: random.Random, job: Path) -> list[Command]:
    """The bytes of an LMDB, or the Datums in it."""
    name = rng.choice(("train_lmdb", "encoded_lmdb"))
    path = job / name / "data.mdb"
    if rng.random() < 0.4:
        path.write_bytes(mutated_bytes(rng, path.read_bytes(), rng.choice((1, 3, 10, 50))))
    else:
        source = open_source(job / name)
        records = []
        for i in range(len(source)):
            message = Datum.FromString(source._file.record(i)[1])  # type: ignore[attr-defined]
            value = message.SerializeToString()
            if rng.random() < 0.3:
                mutate_message(rng, message, 0)
                value = message.SerializeToString()
            if rng.random() < 0.2:
                value = mutated_bytes(rng, value, 2)
            records.append(value)
        shutil.rmtree(job / name)
        write_raw_lmdb(job / name, records)
    commands = quantize_commands(rng, f"data.calibration.source={name}")
    return [["make-lmdb", name, "out/new_lmdb"]] if rng.random() < 0.1 else commands


def write_raw_lmdb(path: Path, records: list[bytes]) -> None:
    import lmdb

    with lmdb.open(str(path), map_size=1 << 22) as environment, environment.begin(write=True) as transaction:
        for i, record in enumerate(records):
            transaction.put(f"{i:04}".encode(), record)


@kind
def mean_file(rng: random.Random, job: Path) -> list[Command]:
    """The mean image."""
    path = job / "mean.binaryproto"
    message = BlobProto.FromString(path.read_bytes())
    if rng.random() < 0.5:
        mutate_message(rng, message, 0)
        path.write_bytes(message.SerializeToString())
    if rng.random() < 0.6:
        path.write_bytes(mutated_bytes(rng, path.read_bytes(), rng.choice((1, 1, 3, 10))))
    text = (job / "net.prototxt").read_text().replace("mean_value: 5.0", 'mean_file: "mean.binaryproto"')
    (job / "net.prototxt").write_text(text)
    return quantize_commands(rng)


@kind
def config(rng: random.Random, job: Path) -> list[Command]:
    """The YAML file."""
    text = YAML
    if rng.random() < 0.2:
        text = rng.choice(sorted((MODELS.parent).glob("*.yaml"))).read_text()
    if rng.random() < 0.5:
        write_text(job / "config.yaml", mutated_text(rng, text, rng.choice((1, 1, 2, 4))))
        return quantize_commands(rng)
    tree = yaml.safe_load(YAML)
    for _ in range(rng.choice((1, 1, 2, 3))):
        node = tree
        while True:
            key = rng.choice(sorted(node, key=str))
            if not isinstance(node[key], dict) or not node[key] or rng.random() < 0.1:
                break
            node = node[key]
        odd: list[Any] = [*NUMBERS, *FLOATS, *TEXTS, None, True, [], {}, [1, 2], {"a": 1}, [[[]]], ["rm"]]
        node[rng.choice((key, key, key, "images", "skip", 1, "x y"))] = rng.choice(odd)
    (job / "config.yaml").write_text(yaml.safe_dump(tree, allow_unicode=rng.random() < 0.5))
    return quantize_commands(rng)


@kind
def image_list(rng: random.Random, job: Path) -> list[Command]:
    """A list file."""
    path = job / "list.txt"
    write_text(path, mutated_text(rng, path.read_text(), rng.choice((1, 2, 5))))
    if rng.random() < 0.3:
        path.write_bytes(mutated_bytes(rng, path.read_bytes(), 3))
    if rng.random() < 0.2:
        return [["make-lmdb", "list.txt", "out/new_lmdb"]]
    return quantize_commands(rng, "data.calibration.source=list.txt", *PHOTOS_AS_DIGITS)


@kind
def image(rng: random.Random, job: Path) -> list[Command]:
    """Image files."""
    for path in (job / "photos").iterdir():
        if rng.random() < 0.3:
            path.write_bytes(mutated_bytes(rng, path.read_bytes(), rng.choice((1, 2, 5))))
    if rng.random() < 0.3:
        return [["make-lmdb", "photos", "out/new_lmdb", "--resize-short", "8"]]
    return quantize_commands(rng, "data.calibration.source=photos", *PHOTOS_AS_DIGITS)


# ---- Running ----


@dataclass
class Outcome:
    """How one case ended: ``name`` is the column of the table, ``text`` what was printed."""

    name: str
    text: str
    is_bug: bool = False


@dataclass
class Tally:
    """The outcomes of one kind."""

    counts: Counter[str] = field(default_factory=Counter)
    bugs: list[tuple[int, Outcome]] = field(default_factory=list)
    messages: Counter[str] = field(default_factory=Counter)
    memory: int = 0
    seconds: float = 0.0


def run_case(kind_name: str, number: int, seed_job: Path, folder: Path) -> tuple[Outcome, Any]:
    """Run one case in a child process; its folder is left as it is."""
    if folder.exists():
        shutil.rmtree(folder)
    shutil.copytree(seed_job, folder)
    child = os.fork()
    if child == 0:
        _run_child(kind_name, number, folder)
    _, status, usage = os.wait4(child, 0)
    return judge(status, usage, folder), usage


def _run_child(kind_name: str, number: int, folder: Path) -> NoReturn:
    code = GENERATOR_FAILED
    try:
        for name, descriptor in (("stdout", 1), ("stderr", 2)):
            opened = os.open(folder / f"{name}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(opened, descriptor)
            os.close(opened)
            setattr(sys, name, os.fdopen(descriptor, "w"))
        os.chdir(folder)
        os.environ["TMPDIR"] = str(folder)
        commands = KINDS[kind_name](random.Random(f"{kind_name} {number}"), folder)
        (folder / "commands.txt").write_text("\n".join(map(str, commands)))
        resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
        signal.alarm(WALL_SECONDS)
        watch_writes(folder)
        if number % PAGE_EVERY:
            quantize.job.run.show_page = lambda *_: None
        code = NOT_CAUGHT
        code = _run_commands(commands)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _run_commands(commands: list[Command]) -> int:
    for command in commands:
        sys.argv = ["labelfree", "--quiet", *command]
        try:
            cli.main()
        except SystemExit as end:
            if end.code:
                return int(end.code)
    return 0


def watch_writes(folder: Path) -> None:
    """Say on standard error, where it shows as a fault, which path outside the folder is changed."""
    inside = f"{folder}{os.sep}"

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if (event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)) or event in (
            "os.mkdir",
            "os.remove",
            "os.rename",
            "os.rmdir",
            "os.truncate",
            "os.link",
            "os.symlink",
        ):
            changed = arguments[0]
        else:
            return
        if isinstance(changed, str | bytes | os.PathLike):
            path = os.path.abspath(os.fsdecode(changed))
            if not path.startswith(inside) and not path.startswith(("/dev/null", "/dev/tty", "/proc/self/")):
                os.write(2, f"wrote outside: {event} {path}\n".encode())

    sys.addaudithook(watch)


def judge(status: int, usage: Any, folder: Path) -> Outcome:
    """The outcome of a case from its exit status and from what it printed and left."""
    text = (folder / "stderr.txt").read_text(errors="replace")
    lines = [line for line in text.splitlines() if line.strip() and not DECODER_NOTE.match(line)]
    code = os.waitstatus_to_exitcode(status)
    doctor = (
        "['doctor'" in (folder / "commands.txt").read_text()[:10]
        if (folder / "commands.txt").exists()
        else False
    )

    def bug(name: str) -> Outcome:
        return Outcome(name, text, is_bug=True)

    if code == GENERATOR_FAILED:
        return bug("the generator failed")
    if code == -signal.SIGXCPU or code == -signal.SIGALRM or code == -signal.SIGKILL:
        return bug("hang")
    if code < 0:
        return bug(f"signal {-code}")
    if "wrote outside" in text:
        return bug("wrote outside")
    if "Traceback" in text or code == NOT_CAUGHT:
        return bug("traceback")
    if "unexpected" in text and "labelfree: unexpected" in text:
        return bug("unexpected error")
    if "out of memory" in text or usage.ru_maxrss << 10 > MEMORY:
        return bug("memory")
    if list(folder.glob(f"out/**/.*{PART_SUFFIX}")):
        return bug("half a file left")
    if code == 0:
        return bug("warnings") if lines else Outcome("done", text)
    if doctor and code == 1:
        return bug("warnings") if lines else Outcome("doctor says no", text)
    if len(lines) != 1 or not lines[0].startswith("labelfree: "):
        return bug("not one line")
    if code == 2:
        return Outcome("refused (2)", text)
    if code == 1:
        return Outcome("failed (1)", text)
    return bug(f"exit code {code}")


def run_kind(
    kind_name: str, numbers: range, seed_job: Path, folder: Path
) -> Iterator[tuple[int, Outcome, Any]]:
    """The outcomes of many cases of one kind."""
    for number in numbers:
        outcome, usage = run_case(kind_name, number, seed_job, folder)
        yield number, outcome, usage
