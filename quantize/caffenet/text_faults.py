"""What is wrong with a net's text, for the person who wrote it: where, what and what to do."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from google.protobuf.message import Message
from google.protobuf.text_format import ParseError

from quantize.caffenet.other_formats import FIRST_BYTES, is_text, not_but, other_format
from quantize.caffenet.schema import SolverParameter
from quantize.caffenet.strings import to_bytes
from quantize.caffenet.unknown_fields import Unknown

MAX_MESSAGE = 300
MOST_NAMED = 20
"""So many unknown fields are named."""
SCHEMA = "schema: model.caffe_proto (--caffe-proto)"
_TOKENS = re.compile(r"""\#[^\n]* | "(?:[^"\\\n]|\\.)*"? | '(?:[^'\\\n]|\\.)*'? | \w+ | [{}]""", re.VERBOSE)
_NO_FIELD = re.compile(r'Message type "caffe\.([\w.]+)" has no field named "(\w+)"')
_NO_VALUE = re.compile(r'Enum type "caffe\.([\w.]+)" has no value named "?([^".]+)"?')
_NAMED_NET = re.compile(r'^\s*(?:net|train_net)\s*:\s*"([^"\n]*)"', re.MULTILINE)


def no_prototxt(path: str | Path, start: bytes) -> str | None:
    """What a file that cannot be read as a prototxt seems to be, by its first bytes."""
    other = other_format(start)
    if other is not None:
        return f"{path}: " + not_but("a net's prototxt", other)
    if not is_text(start):
        return (
            f"{path}: a binary file, not a net's prototxt; if it is the caffemodel, model.prototxt and "
            "model.weights have changed places"
        )
    return None


def explain(path: str | Path, text: str, error: ParseError, message: Message) -> str:
    """One line for what protobuf says about a text.

    Args:
        path: the file.
        text: its text.
        error: what was raised.
        message: what the text was parsed into.
    """
    other = no_prototxt(path, to_bytes(text[:FIRST_BYTES]))
    if other is not None:
        return other
    line, column = error.GetLine(), error.GetColumn()
    what = " ".join(str(error).split()).removeprefix(f"{line}:{column} : ")
    braces = None if "ending quote" in what else unbalanced_brace(text)  # an open string swallows braces
    if line is None:
        return f"{path}: {_short(what)}"
    if braces is not None and braces[0] <= line:
        return f"{path}: line {braces[0]}: {braces[1]}"
    where = f"{path}: line {line}, column {column}"
    if field := _NO_FIELD.search(what):
        return _unknown_field(path, where, text, field[1], field[2], message)
    if value := _NO_VALUE.search(what):
        return _unknown_value(where, value[1], value[2], message)
    return f"{where}: {_short(what)}"


def explain_unknown(path: str | Path, text: str, unknown: Sequence[Unknown], message: Message) -> str:
    """One line for fields and values that a schema lacks: the first one in full, and where the others are.

    Args:
        path: the file.
        text: its text.
        unknown: at least one.
        message: of the schema that lacks them.
    """
    first, *others = unknown
    line, column = _line_and_column(text, first.place)
    where = f"{path}: line {line}, column {column}"
    owner = _short_name(first)
    if first.value is None:
        said = _unknown_field(path, where, text, owner, first.field, message)
    else:
        said = _unknown_value(where, owner, first.value, message)
    more: dict[str, int] = {}
    for each in others:
        name = f"{_short_name(each)}.{each.field}" if each.value is None else f"{each.field}: {each.value}"
        more.setdefault(name, each.place)
    shown = [
        f"{name} (line {_line_and_column(text, place)[0]})" for name, place in list(more.items())[:MOST_NAMED]
    ]
    if len(more) > MOST_NAMED:
        shown.append(f"{len(more) - MOST_NAMED} more")
    return f"{said}; and there are {', '.join(shown)}" if shown else said


def _short_name(unknown: Unknown) -> str:
    return unknown.owner.removeprefix("caffe.")


def _line_and_column(text: str, place: int) -> tuple[int, int]:
    return text.count("\n", 0, place) + 1, place - text.rfind("\n", 0, place)


def unbalanced_brace(text: str) -> tuple[int, str] | None:
    """The line of a brace without its counterpart, and what is wrong with it; None where all have one.

    A ``layer`` inside a ``layer`` shows that the first one is not closed.
    """
    line, last, word = 1, 0, ""
    opened: list[tuple[int, str]] = []
    for token in _TOKENS.finditer(text):
        line += text.count("\n", last, token.start())
        last = token.start()
        kind = token[0][0]
        if kind == "{":
            if word in ("layer", "layers") and any(word == before for _, before in opened):
                first, name = opened[0]
                return first, f"the brace of `{name} {{` is not closed before the next {word} (line {line})"
            opened.append((line, word))
        elif kind == "}":
            if not opened:
                return line, "a closing brace too many: none is open here"
            opened.pop()
        elif kind not in "#\"'":
            word = token[0]
    return (opened[0][0], f"the brace of `{opened[0][1]} {{` is never closed") if opened else None


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """``; did you mean X?`` for the nearest of the known words, or nothing."""
    by_lower = {name.lower(): name for name in known}
    close = difflib.get_close_matches(word.lower(), by_lower, 1, 0.75)
    return f"; did you mean {by_lower[close[0]]}?" if close else ""


def _unknown_field(
    path: str | Path, where: str, text: str, type_name: str, field: str, message: Message
) -> str:
    if type_name == "NetParameter" and field in SolverParameter.DESCRIPTOR.fields_by_name:
        net = _NAMED_NET.search(text)
        named = f', "{net[1]}"' if net else ""
        return f"{path}: a solver's prototxt; give the net that it names{named}"
    known = message.DESCRIPTOR.file.pool.FindMessageTypeByName(f"caffe.{type_name}").fields_by_name
    hint = did_you_mean(field, known)
    hint += " A field" if hint else "; a field"
    hint += f" of a fork of Caffe needs its {SCHEMA}"
    return f"{where}: {type_name} has no field {field}{hint}"


def _unknown_value(where: str, type_name: str, value: str, message: Message) -> str:
    if type_name == "V1LayerParameter.LayerType":
        return (
            f"{where}: {value} is no type of an old layer; `layers` has types such as CONVOLUTION, "
            'types in quotes, such as "Convolution", go with `layer`'
        )
    known = message.DESCRIPTOR.file.pool.FindEnumTypeByName(f"caffe.{type_name}").values_by_name
    hint = did_you_mean(value, known) or f"; it has {', '.join(known)}"
    return f"{where}: {type_name} has no value {value}{hint}"


def _short(text: str) -> str:
    return text if len(text) <= MAX_MESSAGE else text[:MAX_MESSAGE] + "..."
