"""Nets as text: reading, with errors that say where, and writing."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import cast

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format
from google.protobuf.message import DecodeError

from quantize.caffenet.phases import name_apart
from quantize.caffenet.schema import NetParameter
from quantize.caffenet.upgrade import UnsupportedLayerError, upgrade_net
from quantize.errors import InputError

MAX_PROTOTXT_BYTES = 16 << 20
"""A prototxt has no weights; the largest known are below 1 MiB."""

_fork: type[NetParameter] | None = None
"""The schema of the one fork of Caffe that this process deals with, if any."""


def read_prototxt(path: str | Path, schema: type[NetParameter] | None = None) -> NetParameter:
    """Read a net's prototxt, upgrade it to the form of Caffe 1.0 and name its layers apart.

    Args:
        path: the file.
        schema: the NetParameter of a fork of Caffe (see ``load_schema``), which this process then uses for
            every net that it reads and writes. In the net given back, the fork's own fields are unknown
            fields, which protobuf carries along.

    Raises:
        InputError: one line with the file and, for faults in the text, line, column and field.
    """
    global _fork
    _fork = schema or _fork
    net = _parse(path, _read_text(path), _fork or NetParameter)
    try:
        upgrade_net(net)
    except UnsupportedLayerError as error:
        raise InputError(f"{path}: {error}") from None
    if not net.layer:
        raise InputError(f"{path}: the net has no layers; is this a net's prototxt?")
    name_apart(net)
    return net


def format_prototxt(net: NetParameter) -> str:
    """The net as prototxt; ``read_prototxt`` of it gives an equal net."""
    message = net if _fork is None else _fork.FromString(net.SerializeToString())
    return text_format.MessageToString(message, as_utf8=True)


def load_schema(path: str | Path) -> type[NetParameter]:
    """Compile the ``caffe.proto`` of a fork of Caffe (needs grpcio-tools) and give its NetParameter.

    Raises:
        InputError: the file cannot be read or compiled or is no caffe.proto, or grpcio-tools is missing.
    """
    path = Path(path).absolute()
    if not path.is_file():
        raise InputError(f"{path}: no such file; model.caffe_proto must be the caffe.proto of your Caffe")
    if find_spec("grpc_tools") is None:
        raise InputError(f"{path}: compiling a caffe.proto needs grpcio-tools; run: pip install grpcio-tools")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "fork.desc"
        options = [f"-I{path.parent}", f"--descriptor_set_out={out}", "--include_imports"]
        command = [sys.executable, "-m", "grpc_tools.protoc", *options, path.name]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            here = f"{path.name}:"
            faults = [line.split(here, 1)[1] for line in done.stderr.splitlines() if here in line]
            fault = faults[0] if faults else done.stderr.strip().rpartition("\n")[2]
            raise InputError(f"{path}: cannot be compiled: {fault}")
        files = descriptor_pb2.FileDescriptorSet.FromString(out.read_bytes())
    pool = descriptor_pool.DescriptorPool()
    for file in files.file:
        pool.Add(file)
    try:
        message = pool.FindMessageTypeByName("caffe.NetParameter")
    except KeyError:
        raise InputError(
            f"{path}: has no message caffe.NetParameter; give the caffe.proto of your Caffe"
        ) from None
    return cast(type[NetParameter], message_factory.GetMessageClass(message))


def _parse(path: str | Path, text: str, schema: type[NetParameter]) -> NetParameter:
    message = schema()
    try:
        text_format.Parse(text, message)
    except text_format.ParseError as error:
        raise InputError(_parse_message(path, error)) from None
    except RecursionError:
        raise InputError(f"{path}: braces are nested too deeply for a net") from None
    missing: list[str] = message.FindInitializationErrors()  # type: ignore[attr-defined]
    if missing:
        raise InputError(f"{path}: {missing[0]} is missing; the layer needs it")
    if isinstance(message, NetParameter):
        return message
    try:
        return NetParameter.FromString(message.SerializeToString())
    except DecodeError:
        raise InputError(
            f"{path}: the fork's caffe.proto redefines fields of Caffe 1.0; cannot go on"
        ) from None


def _read_text(path: str | Path) -> str:
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_PROTOTXT_BYTES + 1)
    except OSError as error:
        raise InputError(f"{path}: cannot read the prototxt: {error.strerror or error}") from None
    if len(data) > MAX_PROTOTXT_BYTES:
        raise InputError(f"{path}: larger than {MAX_PROTOTXT_BYTES >> 20} MiB; is this a net's prototxt?")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"{path}: line {line}: not UTF-8 text; is this a net's prototxt (and not the caffemodel)?"
        ) from None


def _parse_message(path: str | Path, error: text_format.ParseError) -> str:
    line, column = error.GetLine(), error.GetColumn()
    what = " ".join(str(error).split())
    if line is not None:
        what = what.removeprefix(f"{line}:{column} : ")
        where = f"{path}: line {line}, column {column}"
    else:
        where = str(path)
    if len(what) > 300:
        what = what[:300] + "..."
    if "has no field named" in what or "has no value named" in what:
        what = f"unknown field or value: {what.rstrip('.')}"
        what += ": if this belongs to a fork of Caffe, give its schema as model.caffe_proto (--caffe-proto)"
    return f"{where}: {what}"
