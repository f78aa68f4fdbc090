"""The packed form: byte for byte both ways, small, and safe against files that are not what they say."""

import gzip
import io
import json
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quantize.caffenet import LayerParameter, NetParameter, Weights
from quantize.errors import InputError
from quantize.exports.packed import packed as pack
from quantize.exports.packed import unpack
from quantize.job.run import Run
from quantize.numerics.grids import GRIDS, make_grid

PROTOTXT = b'name: "packed"\nlayer { name: "\xff" type: "Dropout" }\n'


def packed(tmp_path, caffemodel):
    given, file = tmp_path / "given.caffemodel", tmp_path / "net.lfq"
    given.write_bytes(caffemodel)
    file.write_bytes(pack(caffemodel, PROTOTXT))
    return file


def caffemodel(arrays):
    weights = Weights()
    for number, array in enumerate(arrays):
        weights.add(LayerParameter(name=f"layer {number}", type="Convolution"), [np.asarray(array, "<f4")])
    file = io.BytesIO()
    weights.write(file)
    return file.getvalue()


def returns(tmp_path, data):
    file = packed(tmp_path, data)
    prototxt, unpacked = unpack(file, tmp_path / "out", force=True)
    assert (prototxt.name, unpacked.name) == ("net.prototxt", "net.caffemodel")
    assert prototxt.read_bytes() == PROTOTXT
    assert unpacked.read_bytes() == data
    return file.stat().st_size


def test_a_result_returns_byte_for_byte_and_is_small(job):
    Run(job.config("weights.first_last.bits=4", "weights.first_last.grid=power_of_two")).quantize()
    given = job.out / "residual_renorm.caffemodel"
    size = returns(job.folder, given.read_bytes())
    floats = sum(blob.nbytes for _, blobs in Weights.read(given).entries() for blob in blobs)
    assert size < floats / 2  # biases, statistics and names of this net weigh as much as its 4-bit weights


@pytest.mark.parametrize("name", GRIDS)
def test_weights_take_the_bits_of_their_grid(tmp_path, name):
    rng = np.random.default_rng(0)
    for bits in GRIDS[name].allowed_bits:
        levels = make_grid(name, bits).levels(1)
        sizes = [returns(tmp_path, caffemodel([rng.choice(levels, count)])) for count in (1 << 15, 1 << 18)]
        assert sizes[1] - sizes[0] <= (bits * ((1 << 18) - (1 << 15)) / 8) * 1.01


def test_values_that_only_look_alike_are_kept_apart(tmp_path):
    odd = np.array([0.0, -0.0, np.inf, -np.inf, np.float32(1e-42)] * 300, "<f4")
    nans = np.array([0x7FC00000, 0x7FC00001, 0xFFC00000] * 500, "<u4").view("<f4")
    both = caffemodel([odd, nans])
    assert returns(tmp_path, both) < len(both) / 10


def test_counts_that_do_not_fill_a_byte_or_a_chunk(tmp_path):
    rng = np.random.default_rng(1)
    for count in (1, 7, 500, 501, (1 << 20) - 1, (1 << 20) + 1):
        returns(
            tmp_path, caffemodel([rng.integers(0, 5, count), rng.normal(size=3), rng.integers(0, 2, count)])
        )


def test_files_of_any_age(tmp_path):
    """V1 layers, doubles, unpacked floats: what is not a packed record of floats is carried over."""
    net = NetParameter(name="old")
    old = net.layers.add(name="conv")
    blob = old.blobs.add(num=1, channels=1, height=1, width=400)
    blob.data.extend([1.0, -1.0] * 200)
    twice = old.blobs.add(num=1, channels=1, height=1, width=100)
    twice.double_data.extend([0.1] * 100)
    unpacked = b"".join(b"\x2d" + np.float32(value).tobytes() for value in (1, 2, 1))  # field 5, 32 bits each
    unpacked += b"\x08\x01\x10\x01\x18\x01\x20\x03"
    layer = b"\x0a\x01x" + b"\x3a" + bytes([len(unpacked)]) + unpacked
    returns(tmp_path, net.SerializeToString())
    returns(tmp_path, b"\xa2\x06" + bytes([len(layer)]) + layer)


def test_the_command(tmp_path):
    data = caffemodel([np.arange(600) % 3])
    file = packed(tmp_path, data)
    command = [sys.executable, "-m", "quantize", "unpack", str(file), "--output", str(tmp_path / "there")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.count("wrote") == 2
    assert (tmp_path / "there/net.caffemodel").read_bytes() == data
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 2
    assert "net.prototxt: there is a file already; choose another folder or give --force" in again.stderr
    subprocess.run([*command, "--force"], check=True)


# ---- Hostile files ----


def rewritten(file, change):
    """A packed file with another header, and with the content that was behind it."""
    with gzip.open(file) as stream:
        header, rest = json.loads(stream.readline()), stream.read()
    header = change(header)
    text = header if isinstance(header, bytes) else json.dumps(header).encode() + b"\n"
    file.write_bytes(gzip.compress(text + rest))


@pytest.fixture
def file(tmp_path):
    return packed(tmp_path, caffemodel([np.arange(600) % 3, np.linspace(0, 1, 50)]))


def refused(file, words):
    with pytest.raises(InputError, match=words) as caught:
        unpack(file, file.parent / "out")
    assert "\n" not in str(caught.value)
    assert str(file) in str(caught.value)
    left = file.parent / "out"
    assert not left.exists() or not list(left.iterdir())


HUGE = 1 << 40


@pytest.mark.parametrize(
    "change",
    [
        {"labelfree": 2},
        {"labelfree": "1"},
        {"prototxt": HUGE},
        {"prototxt": -1},
        {"prototxt": True},
        {"prototxt": 1e3},
        {"caffemodel": HUGE},
        {"caffemodel": 0},
        {"caffemodel": 100},
        {"sha256": "0" * 64},
        {"sha256": None},
        {"extra": 1},
        {"blobs": None},
        {"blobs": {}},
        {"blobs": [1]},
        {"blobs": [[0, 1, 1]]},
        {"blobs": [[0, 1, 0, 1]]},
        {"blobs": [[0, 1, 13, 1]]},
        {"blobs": [[0, 1, 1, 3]]},
        {"blobs": [[0, 1, 1, 0]]},
        {"blobs": [[0, 0, 1, 1]]},
        {"blobs": [[-4, 1, 1, 1]]},
        {"blobs": [[0, HUGE, 1, 1]]},
        {"blobs": [[0, 10, 1, 1], [39, 10, 1, 1]]},
        {"blobs": [[0, 1 << 28, 12, 4096]], "caffemodel": 1 << 30},
    ],
    ids=str,
)
def test_sizes_that_cannot_be(file, change):
    rewritten(file, lambda header: {**header, **change})
    tracemalloc.start()
    refused(file, "not a file of `labelfree export --to caffe`, or damaged")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 64 << 20


@pytest.mark.parametrize("text", [b"[]\n", b"\n", b"", b"{}", b"1\n", b"[" * 100_000 + b"\n", b"\xff\n"])
def test_no_header(file, text):
    file.write_bytes(gzip.compress(text))
    refused(file, "it does not begin with what it holds")


def test_a_number_of_a_level_that_there_is_not(file):
    with gzip.open(file) as stream:
        line, rest = stream.readline(), stream.read()
    place = json.loads(line)["blobs"][0][0] + len(PROTOTXT) + 12
    file.write_bytes(gzip.compress(line + rest[:place] + b"\xff" + rest[place + 1 :]))
    refused(file, "a level of a number that there is not")


def test_more_behind_the_end(file):
    file.write_bytes(file.read_bytes() + gzip.compress(b"more"))
    refused(file, "its content is not that of the caffemodel that was packed")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x1f\x8b", b"\x1f\x8b\x08\x00" + b"\0" * 40])
def test_other_files(file, content):
    file.write_bytes(content)
    refused(file, "not a file of")


def test_no_file(tmp_path):
    with pytest.raises(InputError, match="cannot read the packed net"):
        unpack(tmp_path / "net.lfq", tmp_path)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damage_is_told(tmp_path_factory, data):
    """Whatever bytes change, or are missing, nothing is written, and one line says so."""
    folder = tmp_path_factory.mktemp("damage")
    file = packed(folder, caffemodel([np.arange(90) % 3, np.arange(60) % 2]))
    good = file.read_bytes()
    place = data.draw(st.integers(0, len(good) - 1))
    if data.draw(st.booleans()):
        bad = good[:place]
    else:
        bad = good[:place] + bytes([good[place] ^ data.draw(st.integers(1, 255))]) + good[place + 1 :]
    file.write_bytes(bad)
    given_bytes = (folder / "given.caffemodel").read_bytes()
    try:
        _, unpacked = unpack(file, folder / "out")
    except InputError:
        assert not (folder / "out").exists() or not list((folder / "out").iterdir())
    else:  # time, system and name in gzip's head mean nothing
        assert unpacked.read_bytes() == given_bytes
