"""Nets as text: reading, with errors that say where, and writing."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from google.protobuf import text_format

from quantize.caffenet.batch import free_batch
from quantize.caffenet.bvlc import LayerForms, in_bvlc_forms
from quantize.caffenet.fork import (
    WITHOUT_EFFECT,
    Schema,
    fork_class,
    from_fork,
    load_schema,
    schema_of,
    with_unknown,
)
from quantize.caffenet.phases import at_state, name_apart
from quantize.caffenet.schema import NetParameter
from quantize.caffenet.shape_rules import has_rule
from quantize.caffenet.strings import to_text
from quantize.caffenet.text_faults import SCHEMA, explain, explain_unknown, no_prototxt
from quantize.caffenet.traits import Trait, traits_of
from quantize.caffenet.unknown_fields import MixedKindsError, Unknown, find_unknown
from quantize.caffenet.upgrade import UnsupportedLayerError, upgrade_net
from quantize.errors import InputError
from quantize.files import read_start

MAX_PROTOTXT_BYTES = 16 << 20
"""A prototxt has no weights; the largest known are below 1 MiB."""

_ESCAPES = re.compile(rb"\\(?:([23][0-7]{2})|[xX]([89a-fA-F][0-9a-fA-F])|.)", re.DOTALL)


def read_net(
    path: str | Path,
    caffe_proto: str | Path | None = None,
    stages: Sequence[str] = (),
    level: int = 0,
    write: LayerForms = "as_read",
) -> NetParameter:
    """Read the net of a model: one that has no stages and levels any more and takes batches of any size.

    Args:
        path: the prototxt.
        caffe_proto: the schema of the fork of Caffe that it is for, if any.
        stages: the stages that are set (see `at_state`).
        level: the level.
        write: the forms of a fork's layers that are wanted (see `in_bvlc_forms`).

    Raises:
        InputError: as `read_prototxt`, `load_schema` and `at_state`.
    """
    schema = None if caffe_proto is None else load_schema(caffe_proto)
    net = at_state(read_prototxt(path, schema), stages, level)
    free_batch(net)
    return in_bvlc_forms(net) if write == "bvlc" else net


def read_prototxt(path: str | Path, schema: Schema | None = None) -> NetParameter:
    """Read a net's prototxt, upgrade it to the form of Caffe 1.0 and name its layers apart.

    Bytes that are not UTF-8 are kept (see ``strings``).

    Args:
        path: the file.
        schema: of the fork of Caffe that the net is for (see ``load_schema``). The net carries it along, and
            the fork's own fields as unknown fields, wherever it is copied.

    Raises:
        InputError: one line with the file and, for faults in the text, line, column and field.
    """
    net = _parse(path, _read_text(path), schema)
    try:
        upgrade_net(net)
    except UnsupportedLayerError as error:
        raise InputError(f"{path}: {error}") from None
    if not net.layer:
        raise InputError(f"{path}: the net has no layers; is this a net's prototxt?")
    name_apart(net)
    return net


def format_prototxt(net: NetParameter) -> str:
    """The net as prototxt, with the fields of its fork; ``read_prototxt`` of it gives an equal net.

    The bytes for a file are ``strings.to_bytes`` of it.
    """
    schema = schema_of(net)
    message = net if schema is None else fork_class(schema).FromString(net.SerializeToString())
    return text_format.MessageToString(message, as_utf8=True)


def _parse(path: str | Path, text: str, schema: Schema | None) -> NetParameter:
    message = NetParameter() if schema is None else fork_class(schema)()
    try:
        text_format.Parse(text, message)
    except text_format.ParseError as error:
        message, schema = _parse_unknown(path, text, error, message, schema)
    except RecursionError:
        raise InputError(f"{path}: braces are nested too deeply for a net") from None
    missing: list[str] = message.FindInitializationErrors()  # type: ignore[attr-defined]
    if missing:
        raise InputError(f"{path}: {missing[0]} is missing; the layer needs it")
    try:
        return message if schema is None else from_fork(message, schema)
    except UnsupportedLayerError as error:
        raise InputError(f"{path}: {error}") from None


def _parse_unknown(
    path: str | Path, text: str, error: text_format.ParseError, message: NetParameter, schema: Schema | None
) -> tuple[NetParameter, Schema]:
    """Parse a text that may have fields which no schema knows, where nobody needs to know what they mean.

    Args:
        error: what parsing it with the schema said.
        message: of the schema's class.

    Raises:
        InputError: the text is no prototxt, or has such fields where it matters: all are named.
    """
    found = find_unknown(text, message.DESCRIPTOR)
    try:
        extended = with_unknown(schema, found)
        parsed = fork_class(extended)()
        text_format.Parse(text, parsed)
    except MixedKindsError as mixed:
        raise InputError(f"{path}: field {mixed}; correct it, or give the fork's {SCHEMA}") from None
    except (text_format.ParseError, TypeError):  # the second where the schema itself became impossible
        raise InputError(explain(path, text, error, message)) from None
    matter = [each for each in found.unknown if not found.holds_only(each, WITHOUT_EFFECT)]
    matter = [each for each in matter if _matters(each, parsed)]
    if matter:
        raise InputError(explain_unknown(path, text, matter, message))
    return parsed, extended


def _matters(unknown: Unknown, net: NetParameter) -> bool:
    """Whether something unknown stands where it may change what is computed, or is a slip of the pen."""
    if unknown.layer is None or unknown.owner in ("caffe.Phase", "caffe.NetStateRule"):
        return True
    layer = net.layer[unknown.layer]
    is_run = has_rule(layer.type) and not traits_of(layer) & (Trait.IMAGES | Trait.COMPARES)
    return not layer.type or is_run


def _read_text(path: str | Path) -> str:
    data = read_start(path, "prototxt", MAX_PROTOTXT_BYTES + 1)
    if len(data) > MAX_PROTOTXT_BYTES:
        too_large = f"{path}: larger than {MAX_PROTOTXT_BYTES >> 20} MiB; is this a net's prototxt?"
        raise InputError(no_prototxt(path, data) or too_large)
    return to_text(_ESCAPES.sub(_unescaped, data.removeprefix(b"\xef\xbb\xbf")))


def _unescaped(escape: re.Match[bytes]) -> bytes:
    """A byte above 127 that is written as ``\\261`` or ``\\xb1``; other escapes stay."""
    if escape[1]:
        return bytes([int(escape[1], 8)])
    return bytes([int(escape[2], 16)]) if escape[2] else escape[0]
