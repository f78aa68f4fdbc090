"""Forks of Caffe: their caffe.proto joined with ours, the nets that carry it, and the fields only they have.

A field's number says nothing between forks: 148 is ``clip_param`` in one, ``smooth_l1_loss_param`` in
another. A prototxt is text, in which only names count. So a fork's schema is joined with ours by name: what
both know has our number, what only the fork knows has a number that we do not use, and is to our
NetParameter an unknown field that protobuf carries along. The joined schema travels with its net in the
same way.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Any, NewType, cast

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
)
from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet

from quantize.caffenet.schema import DESCRIPTOR, ForkedNet, LayerParameter, NetParameter, V1LayerParameter
from quantize.caffenet.unknown_fields import Findings, extend
from quantize.caffenet.upgrade import UnsupportedLayerError
from quantize.errors import InputError
from quantize.files import read_file

Schema = NewType("Schema", bytes)
"""A FileDescriptorSet: the ``caffe.proto`` of a fork, joined with ours."""

MAX_PROTO_BYTES = 4 << 20
COMPILE_SECONDS = 60
FIRST_FREE_NUMBER = 60_000
"""Of fields and values whose number we use for something else. No fork known has numbers so high."""

WITHOUT_EFFECT: Mapping[str, str] = {
    "engine": "which implementation computes the layer",
    "cache": "whether what is read is kept in memory",
    "eltwise_mem_sharing": "whether blobs share memory",
    "conv_algos_override": "which cuDNN algorithms are used",
    "cudnn_convolution_algo_seeker": "how cuDNN algorithms are chosen",
    "cudnn_math_override": "which cuDNN arithmetic is used",
    "forward_type": "the precision of the values; labelfree computes in float32",
    "forward_math": "the precision of the arithmetic; labelfree computes in float32",
    "backward_type": "training",
    "backward_math": "training",
    "default_forward_type": "the precision of the values; labelfree computes in float32",
    "default_forward_math": "the precision of the arithmetic; labelfree computes in float32",
    "default_backward_type": "training",
    "default_backward_math": "training",
    "default_conv_algos_override": "which cuDNN algorithms are used",
    "default_cudnn_math_override": "which cuDNN arithmetic is used",
    "global_grad_scale": "training",
    "reduce_buckets": "how training is spread over machines",
    "debug": "what is printed",
    "multinode": "how training is spread over machines",
    "mn_activation_param": "how training is spread over machines",
    "mn_grad_compress_param": "how training is spread over machines",
}
"""Fields of forks that do not change what a layer computes, wherever they stand, and what they are for."""


def load_schema(path: str | Path) -> Schema:
    """Compile the ``caffe.proto`` of a fork of Caffe (needs grpcio-tools) and join it with ours.

    Raises:
        InputError: the file cannot be read or compiled or is no caffe.proto, or grpcio-tools is missing.
    """
    path = Path(path).absolute()
    read_file(path, "caffe.proto of your Caffe", MAX_PROTO_BYTES)
    if find_spec("grpc_tools") is None:
        raise InputError(f"{path}: compiling a caffe.proto needs grpcio-tools; run: pip install grpcio-tools")
    files = _compiled(path)
    forks = [file for file in files.file if file.package == "caffe"]
    if not any(message.name == "NetParameter" for file in forks for message in file.message_type):
        raise InputError(f"{path}: has no message caffe.NetParameter; give the caffe.proto of your Caffe")
    schema = Schema(_joined(files, forks).SerializeToString(deterministic=True))
    try:
        fork_class(schema)
    except (TypeError, KeyError) as error:
        fault = " ".join(str(error).split())[:200]
        raise InputError(f"{path}: cannot be joined with the caffe.proto of Caffe 1.0: {fault}") from None
    return schema


def with_unknown(schema: Schema | None, found: Findings) -> Schema:
    """A schema, or ours, that also has what a text was found to have besides."""
    if schema is not None:
        files = FileDescriptorSet.FromString(schema)
    else:
        files = FileDescriptorSet(file=[descriptor_pb2.FileDescriptorProto()])
        DESCRIPTOR.CopyToProto(files.file[0])
    extend(files.file[-1], found)
    return Schema(files.SerializeToString(deterministic=True))


@lru_cache(maxsize=4)
def fork_class(schema: Schema) -> type[NetParameter]:
    """The NetParameter of a schema."""
    pool = descriptor_pool.DescriptorPool()
    for file in FileDescriptorSet.FromString(schema).file:
        pool.Add(file)
    message = message_factory.GetMessageClass(pool.FindMessageTypeByName("caffe.NetParameter"))
    return cast(type[NetParameter], message)


def from_fork(net: NetParameter, schema: Schema) -> NetParameter:
    """Our NetParameter of a net that was read with a schema; it carries the schema along.

    Where the fork's default of a field is another than ours, the value is written out.

    Raises:
        UnsupportedLayerError: an old layer (V1) has a field of the fork, which only the fork can upgrade.
    """
    for old in net.layers:
        for field in _foreign(old, V1LayerParameter.DESCRIPTOR):
            raise UnsupportedLayerError(
                f"layer {old.name!r} is of an old form (`layers`) and has {field} of a fork of Caffe; "
                "upgrade the file with that fork's upgrade_net_proto_text"
            )
        _write_defaults(old, V1LayerParameter.DESCRIPTOR)
    for layer in net.layer:
        own = _own_parameters(layer)
        _write_defaults(layer, LayerParameter.DESCRIPTOR, [own] if own else [])
    return NetParameter.FromString(
        net.SerializeToString() + ForkedNet(schema=bytes(schema)).SerializeToString()
    )


def schema_of(net: NetParameter) -> Schema | None:
    """The schema of the fork that a net was read with, if it was.

    Raises:
        ValueError: the net has fields of a fork and has lost its schema; it was made of another net's layers
            instead of being copied.
    """
    carried = ForkedNet.FromString(net.SerializeToString())
    if carried.HasField("schema"):
        return Schema(carried.schema)
    if _has_unknown(net):
        raise ValueError(f"net {net.name!r} has fields of a fork without the fork's schema")
    return None


def empty_like(net: NetParameter) -> NetParameter:
    """A net with nothing but the name of a net and what it has of its fork."""
    empty = NetParameter()
    empty.CopyFrom(net)
    for field in NetParameter.DESCRIPTOR.fields:
        if field.name != "name":
            empty.ClearField(field.name)
    return empty


def foreign_fields(net: NetParameter) -> list[str | None]:
    """For every layer of a net the first field that only its fork knows and that may change the results.

    Not counted are fields ``WITHOUT_EFFECT`` and those set to the fork's default.
    """
    schema = schema_of(net)
    if schema is None:
        return [None] * len(net.layer)
    forked = fork_class(schema).FromString(net.SerializeToString())
    return [next(_foreign(layer, LayerParameter.DESCRIPTOR), None) for layer in forked.layer]


def without_effectless(net: NetParameter) -> NetParameter:
    """A copy of a net without the fields ``WITHOUT_EFFECT`` that only its fork knows."""
    schema = schema_of(net)
    changed = (NetParameter if schema is None else fork_class(schema)).FromString(net.SerializeToString())
    if schema is not None:
        _drop_effectless(changed, NetParameter.DESCRIPTOR)
    return NetParameter.FromString(changed.SerializeToString())


def _drop_effectless(message: Message, ours: Any) -> None:
    for field, value in message.ListFields():
        known = None if ours is None else ours.fields_by_name.get(field.name)
        own = known if known is not None and known.number == field.number else None
        if _has_no_effect(field, value) and (own is None or _has_foreign_value(value, own)):
            message.ClearField(field.name)
        elif field.message_type is not None and own is not None:
            for each in _each(value):
                _drop_effectless(each, own.message_type)


def _has_foreign_value(value: Any, ours: Any) -> bool:
    """Whether an enum has a value that ours lacks."""
    return ours.enum_type is not None and value not in ours.enum_type.values_by_number


def foreign_field_text(field: str) -> str:
    """What there is to say of such a field."""
    return (
        f"{field} is a field of a fork of Caffe, which may change what the layer computes; take it out of "
        "the prototxt if it does not"
    )


def _foreign(message: Message, ours: Any) -> Iterator[str]:
    """The fields of a fork's message that ours lacks, fields of messages inside included."""
    for field, value in message.ListFields():
        known = ours.fields_by_name.get(field.name)
        if known is None or known.number != field.number:
            if not (
                _has_no_effect(field, value) or (field.message_type is None and value == field.default_value)
            ):
                yield field.name
        elif field.message_type is not None:
            for each in _each(value):
                yield from (f"{field.name}.{inner}" for inner in _foreign(each, known.message_type))
        elif field.enum_type is not None and field.name not in WITHOUT_EFFECT:
            for each in [value] if isinstance(value, int) else value:
                if each not in known.enum_type.values_by_number:
                    yield f"{field.name}: {field.enum_type.values_by_number[each].name}"


def _has_no_effect(field: Any, value: Any) -> bool:
    """Whether a field is one of ``WITHOUT_EFFECT``, or holds such fields and no others."""
    if field.name in WITHOUT_EFFECT:
        return True
    if field.message_type is None:
        return False
    held = [pair for each in _each(value) for pair in each.ListFields()]
    return bool(held) and all(_has_no_effect(*pair) for pair in held)


def _each(value: Any) -> Sequence[Any]:
    """A message, or the messages of a repeated field."""
    return [value] if isinstance(value, Message) else value


def _own_parameters(layer: LayerParameter) -> str | None:
    """The field with the parameters of a layer's type: ``batch_norm_param`` for BatchNorm."""
    wanted = f"{layer.type.lower()}param"
    names = (field.name for field in LayerParameter.DESCRIPTOR.fields)
    return next((name for name in names if name.replace("_", "") == wanted), None)


def _write_defaults(message: Any, ours: Any, also: Sequence[str] = ()) -> None:
    """Set the fields that are not set and have another default than ours.

    Args:
        message: of a fork; gone into are its messages that are set.
        ours: our descriptor of it.
        also: fields with messages that are gone into even where they are not set.
    """
    for field in message.DESCRIPTOR.fields:
        known = ours.fields_by_name.get(field.name)
        if known is None or known.number != field.number or field.default_value == []:  # repeated
            continue
        if field.message_type is not None:
            if message.HasField(field.name) or field.name in also:
                _write_defaults(getattr(message, field.name), known.message_type)
        elif field.default_value != known.default_value and not message.HasField(field.name):
            setattr(message, field.name, field.default_value)


def _has_unknown(message: Message) -> bool:
    inner = [
        each
        for field, value in message.ListFields()
        if field.message_type is not None
        for each in _each(value)
    ]
    return len(UnknownFieldSet(message)) > 0 or any(map(_has_unknown, inner))


# ---- Joining two schemas ----


def _compiled(path: Path) -> FileDescriptorSet:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "fork.desc"
        options = [f"-I{path.parent}", f"--descriptor_set_out={out}", "--include_imports"]
        command = [sys.executable, "-m", "grpc_tools.protoc", *options, path.name]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, check=False, timeout=COMPILE_SECONDS
            )
        except subprocess.TimeoutExpired:
            raise InputError(f"{path}: compiling it takes longer than {COMPILE_SECONDS} s") from None
        if done.returncode:
            here = f"{path.name}:"
            faults = [line.split(here, 1)[1] for line in done.stderr.splitlines() if here in line]
            fault = faults[0] if faults else done.stderr.strip().rpartition("\n")[2]
            raise InputError(f"{path}: cannot be compiled: {fault}")
        return FileDescriptorSet.FromString(out.read_bytes())


def _joined(files: FileDescriptorSet, forks: Sequence[FileDescriptorProto]) -> FileDescriptorSet:
    """Ours with what a fork's files have besides, behind the files of other packages that they import."""
    joined = descriptor_pb2.FileDescriptorProto()
    DESCRIPTOR.CopyToProto(joined)
    enums = {
        name: enum
        for file in forks
        for name, enum in (
            *((f".caffe.{enum.name}", enum) for enum in file.enum_type),
            *(pair for message in file.message_type for pair in _enums(f".caffe.{message.name}", message)),
        )
    }
    for file in forks:
        _join_types(joined.message_type, file.message_type, joined.enum_type, file.enum_type, enums)
    others = [file for file in files.file if file.package != "caffe"]
    joined.dependency.extend(file.name for file in others)
    return FileDescriptorSet(file=[*others, joined])


def _enums(prefix: str, message: DescriptorProto) -> Iterator[tuple[str, EnumDescriptorProto]]:
    """The enums in a message by their full names."""
    yield from ((f"{prefix}.{enum.name}", enum) for enum in message.enum_type)
    for inner in message.nested_type:
        yield from _enums(f"{prefix}.{inner.name}", inner)


def _join_types(
    messages: Any, more: Any, enums: Any, more_enums: Any, all_enums: Mapping[str, EnumDescriptorProto]
) -> None:
    """Join a fork's messages and enums of one scope with ours, which are changed."""
    known = {message.name: message for message in messages}
    for message in more:
        if message.name in known:
            _join_messages(known[message.name], message, all_enums)
        else:
            messages.add().CopyFrom(message)
    known_enums = {enum.name: enum for enum in enums}
    for enum in more_enums:
        if enum.name in known_enums:
            _join_values(known_enums[enum.name].value, enum.value)
        else:
            enums.add().CopyFrom(enum)


def _join_messages(
    ours: DescriptorProto, fork: DescriptorProto, enums: Mapping[str, EnumDescriptorProto]
) -> None:
    known = {field.name: field for field in ours.field}
    taken = {field.number for field in (*ours.field, *fork.field)}
    free = (number for number in count(FIRST_FREE_NUMBER) if number not in taken)
    our_numbers = {field.number for field in ours.field}
    for field in fork.field:
        same = known.get(field.name)
        if same is not None and _holds(same, field):
            if not _is_repeated(same):
                _take_default(same, field, enums)
            continue
        if same is not None:  # what the fork means by the name is what its nets mean
            ours.field.remove(same)
        new = ours.field.add()
        new.CopyFrom(field)
        new.ClearField("oneof_index")
        if field.number in our_numbers:
            new.number = next(free)
    _join_types(ours.nested_type, fork.nested_type, ours.enum_type, fork.enum_type, enums)


def _join_values(ours: Any, fork: Any) -> None:
    known = {value.name for value in ours}
    our_numbers = {value.number for value in ours}
    free = (n for n in count(FIRST_FREE_NUMBER) if all(n != value.number for value in fork))
    for value in fork:
        if value.name not in known:
            number = next(free) if value.number in our_numbers else value.number
            ours.add(name=value.name, number=number)


def _take_default(ours: FieldDescriptorProto, fork: FieldDescriptorProto, enums: Mapping[str, Any]) -> None:
    if fork.HasField("default_value"):
        ours.default_value = fork.default_value
    elif fork.type_name in enums:
        ours.default_value = enums[fork.type_name].value[0].name
    else:
        ours.ClearField("default_value")


def _holds(ours: FieldDescriptorProto, fork: FieldDescriptorProto) -> bool:
    """Whether our field can take what the fork's holds: the same type, and one value or several as it can.

    Old forks have one ``kernel_size`` where there is one for each axis now.
    """
    return (ours.type, ours.type_name) == (fork.type, fork.type_name) and _is_repeated(ours) >= _is_repeated(
        fork
    )


def _is_repeated(field: FieldDescriptorProto) -> bool:
    return field.label == FieldDescriptorProto.LABEL_REPEATED
