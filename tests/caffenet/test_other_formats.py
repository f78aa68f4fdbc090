"""Files that people give for a prototxt or a caffemodel and that are none: what they are and what to do."""

import gzip
import io
import pickle
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from quantize.caffenet import BlobProto, Weights, read_prototxt
from quantize.caffenet.other_formats import is_text, other_format
from quantize.errors import InputError


def zipped(name: str, content: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(name, content)
    return file.getvalue()


def npz() -> bytes:
    file = io.BytesIO()
    np.savez(file, conv1=np.ones((2, 2)))
    return file.getvalue()


def npy() -> bytes:
    file = io.BytesIO()
    np.save(file, np.ones((2, 2)))
    return file.getvalue()


def onnx_model() -> bytes:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "graph", [x], [x])
    model: onnx.ModelProto = helper.make_model(graph, producer_name="somebody")
    return model.SerializeToString()


def tar() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("net.caffemodel"))
    return file.getvalue()


def mean_image() -> bytes:
    return BlobProto(num=1, channels=3, height=2, width=2, data=[0.5] * 12).SerializeToString()


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 244\n"
FILES: dict[str, tuple[Callable[[], bytes], str]] = {
    "lfs": (lambda: LFS, "a git-LFS pointer; run `git lfs pull`"),
    "html": (lambda: b"\n<!DOCTYPE html>\n<html lang=en>\n", "a web page (HTML); it was saved instead of"),
    "json": (lambda: b'{\n "nodes": [\n', "a JSON file; labelfree reads Caffe models"),
    "zip": (lambda: zipped("net.caffemodel", b"1"), "a zip archive; unpack it"),
    "gzip": (lambda: gzip.compress(b"net"), "compressed with gzip; unpack it"),
    "tar": (tar, "a tar archive; unpack it"),
    "pth": (lambda: zipped("resnet18/data.pkl", b"1"), "a PyTorch file; labelfree reads Caffe models"),
    "old pth": (lambda: pickle.dumps(OrderedDict(a=1), 2), "a PyTorch file"),
    "npz": (npz, "a numpy archive (npz)"),
    "npy": (npy, "a numpy array"),
    "onnx": (onnx_model, "an ONNX model; labelfree reads Caffe models"),
    "tflite": (lambda: b"\x1c\0\0\0TFL3\0\0", "a TensorFlow Lite model"),
    "hdf5": (lambda: b"\x89HDF\r\n\x1a\n\0\0", "an HDF5 snapshot; give the .caffemodel"),
    "darknet cfg": (lambda: b"# yolo\n[net]\nbatch=64\n", "a Darknet cfg"),
    "darknet weights": (lambda: b"\0\0\0\0\2\0\0\0\0\0\0\0" + bytes(16), "a Darknet weights file"),
    "mean": (mean_image, "a mean image (binaryproto); that is for data.transform.mean_file"),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    ("read", "wanted"),
    [(read_prototxt, "not a net's prototxt but "), (Weights.read, "not a caffemodel but ")],
)
def test_the_message_says_what_it_is(
    tmp_path: Path, name: str, read: Callable[[Path], object], wanted: str
) -> None:
    make, expected = FILES[name]
    (tmp_path / "file").write_bytes(make())
    with pytest.raises(InputError) as caught:
        read(tmp_path / "file")
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'file'}: {wanted}{expected}")
    assert "\n" not in message


def test_the_two_files_swapped(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(b'# \xbe\xed\nname: "net"\nlayer { name: "a" type: "ReLU" }\n')
    with pytest.raises(InputError, match=r"text: text, not a caffemodel; .*changed places"):
        Weights.read(tmp_path / "text")
    (tmp_path / "binary").write_bytes(b"\x0a\x09CaffeNet1\xa2\x06\x02\x0a\x00")
    with pytest.raises(InputError, match=r"binary: a binary file, not a net's prototxt; .*changed places"):
        read_prototxt(tmp_path / "binary")


@given(st.binary(max_size=5000))
def test_any_bytes_are_looked_at_in_no_time(data: bytes) -> None:
    other_format(data)
    is_text(data)


@pytest.mark.parametrize("piece", [b"#\n", b"<!--", b" ", b"\n", b"PK\x03\x04", b"[", b"{ ", b"#\n \n"])
def test_long_repetitions_are_looked_at_in_no_time(piece: bytes) -> None:
    other_format(piece * 4096)
