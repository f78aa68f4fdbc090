"""Our caffe.proto says what real Caffe's says: every message, field, enum and default."""

from __future__ import annotations

import subprocess

import numpy as np
import pytest
from google.protobuf import descriptor_pb2

from quantize.caffenet.schema import DESCRIPTOR

SERIALIZE = """
import sys
from caffe.proto import caffe_pb2
sys.stdout.buffer.write(caffe_pb2.DESCRIPTOR.serialized_pb)
"""


@pytest.fixture(scope="module")
def theirs(caffe_python: list[str]) -> descriptor_pb2.FileDescriptorProto:
    done = subprocess.run([*caffe_python, "-c", SERIALIZE], check=True, stdout=subprocess.PIPE)
    return descriptor_pb2.FileDescriptorProto.FromString(done.stdout)


@pytest.fixture(scope="module")
def ours() -> descriptor_pb2.FileDescriptorProto:
    file = descriptor_pb2.FileDescriptorProto()
    DESCRIPTOR.CopyToProto(file)
    return file


def facts(file: descriptor_pb2.FileDescriptorProto) -> dict[str, tuple[object, ...]]:
    """What a file defines, by full name."""
    found: dict[str, tuple[object, ...]] = {}

    def add_enum(scope: str, enum: descriptor_pb2.EnumDescriptorProto) -> None:
        for value in enum.value:
            found[f"{scope}.{enum.name}.{value.name}"] = (value.number,)

    def add_message(scope: str, message: descriptor_pb2.DescriptorProto) -> None:
        name = f"{scope}.{message.name}"
        found[name] = ("message",)
        for enum in message.enum_type:
            add_enum(name, enum)
        for nested in message.nested_type:
            add_message(name, nested)
        for field in message.field:
            found[f"{name}.{field.name}"] = (
                field.number,
                field.type,
                field.type_name,
                field.label,
                default(field),
                field.options.packed,
            )

    for enum in file.enum_type:
        add_enum(file.package, enum)
    for message in file.message_type:
        add_message(file.package, message)
    return found


def default(field: descriptor_pb2.FieldDescriptorProto) -> object:
    """A field's default; None: it has none. A float counts as its value: one protoc writes more digits."""
    if field.HasField("default_value") and field.type == descriptor_pb2.FieldDescriptorProto.TYPE_FLOAT:
        return np.float32(field.default_value)
    return field.default_value if field.HasField("default_value") else None


def test_everything_of_caffe_is_ours(
    ours: descriptor_pb2.FileDescriptorProto, theirs: descriptor_pb2.FileDescriptorProto
) -> None:
    wanted, found = facts(theirs), facts(ours)
    assert len(wanted) > 500
    wrong = {name: (fact, found.get(name)) for name, fact in wanted.items() if found.get(name) != fact}
    assert not wrong


def test_what_only_we_have_is_no_number_of_theirs(
    ours: descriptor_pb2.FileDescriptorProto, theirs: descriptor_pb2.FileDescriptorProto
) -> None:
    """Fields of other versions of Caffe may be there, under numbers that are free."""
    wanted, found = facts(theirs), facts(ours)
    extra = {name for name in found.keys() - wanted.keys() if found[name] != ("message",)}
    taken = {(name.rpartition(".")[0], fact[0]) for name, fact in wanted.items() if fact != ("message",)}
    assert not {name for name in extra if (name.rpartition(".")[0], found[name][0]) in taken}
