"""Fields that no schema knows, found in a net's text: what they hold is read from how the text uses them.

There are hundreds of forks of Caffe, and a text says all that is needed to carry its fields along: their
names, whether they are numbers, words, strings or messages, and what is in those. So a schema is extended by
what a text has besides. Of what such fields mean nothing is known; who runs a layer that has any refuses it.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from google.protobuf.descriptor_pb2 import DescriptorProto, FieldDescriptorProto, FileDescriptorProto

FIRST_NUMBER = 70_000
"""Of fields and values that are made up; those of a fork's own schema are below."""
MOST_LEVELS = 64
"""Of messages within messages. Real nets have five."""
MOST_PLACES = 50_000
"""Where a text has something unknown. Real nets have some hundreds."""
LARGEST_INT = 2**63 - 1

_TOKENS = re.compile(
    r"""\#[^\n]* | (?P<string>"(?:[^"\\\n]|\\.)*" | '(?:[^'\\\n]|\\.)*')
    | (?P<word>[\w.+-]+) | (?P<sign>[^\s\w])""",
    re.VERBOSE,
)
_INT = re.compile(r"[-+]?(?:0[xX][0-9a-fA-F]+|\d+)")
_FLOAT = re.compile(r"[-+]?(?:(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?[fF]?|inf(?:inity)?|nan)", re.IGNORECASE)
_BOOL = frozenset({"true", "false", "True", "False"})
_OPENING = {"{": "}", "<": ">"}


_KINDS = {
    "message": "messages",
    "string": "strings",
    "word": "words",
    "bool": "true or false",
    "int": "numbers",
    "float": "numbers",
}


class MixedKindsError(Exception):
    """A field of a fork holds different kinds of things; the text says which."""


@dataclass(frozen=True)
class Unknown:
    """A field, or an enum's value, that a text has and its schema lacks.

    Attributes:
        owner: the full name of the message or the enum.
        field: the name of the field.
        value: the value; None: the field is what is unknown.
        place: where the text has it: characters from its beginning.
        layer: the number of the layer that has it, among the text's ``layer``; None: it is in none.
    """

    owner: str
    field: str
    value: str | None
    place: int
    layer: int | None


@dataclass
class _Use:
    """How a text uses a field that nobody knows."""

    kinds: set[str] = field(default_factory=set)
    words: dict[str, None] = field(default_factory=dict)
    integers: set[int] = field(default_factory=set)
    fields: dict[str, _Use] = field(default_factory=dict)


@dataclass
class Findings:
    """What a text has that its schema lacks.

    Attributes:
        unknown: every place.
        uses: by full name of a message that is known, its unknown fields.
        values: by full name of an enum, its unknown values.
    """

    unknown: list[Unknown] = field(default_factory=list)
    uses: dict[str, dict[str, _Use]] = field(default_factory=dict)
    values: dict[str, dict[str, None]] = field(default_factory=dict)

    def holds_only(self, unknown: Unknown, names: Container[str]) -> bool:
        """Whether an unknown field has one of some names, or holds fields of such names and no others."""
        use = self.uses.get(unknown.owner, {}).get(unknown.field)
        inner = [] if use is None or unknown.value is not None else list(use.fields)
        return unknown.field in names or (bool(inner) and all(name in names for name in inner))


@dataclass
class _Scope:
    """A message that is open: its descriptor, or None and the fields seen so far."""

    descriptor: Any
    fields: dict[str, _Use]
    closing: str = ""
    in_list: str = ""
    """The field in whose list it stands, if it does."""


def find_unknown(text: str, net: Any) -> Findings:
    """What a net's text has that its schema lacks; less, where it is no sound text: parsing says why.

    Args:
        text: the prototxt.
        net: the descriptor of NetParameter in the schema.
    """
    scanner = _Scanner(text, net)
    scanner.run()
    return scanner.found


class _Scanner:
    """Goes through a text once, with what is open on a stack, for texts may be hostile."""

    def __init__(self, text: str, net: Any) -> None:
        self.found = Findings()
        self._tokens = (token for token in _TOKENS.finditer(text) if token.lastgroup)
        self._scopes = [_Scope(net, {})]
        self._layers = -1
        self._place = 0

    def run(self) -> None:
        name = ""
        """The field whose values come; none between two fields."""
        listed = False
        for token in self._tokens:
            kind, word = token.lastgroup, token[0]
            if kind == "sign" and word == self._scopes[-1].closing:
                name = self._scopes.pop().in_list
                listed = bool(name)
            elif kind == "sign" and word in _OPENING:
                if not name or len(self._scopes) > MOST_LEVELS or len(self.found.unknown) > MOST_PLACES:
                    return
                self._open(name, _OPENING[word], name if listed else "")
                name, listed = "", False
            elif kind == "sign" and word in "[]":
                listed = word == "["
                name = name if listed else ""
            elif kind == "sign":
                continue
            elif kind == "word" and not name:
                name, self._place = word, token.start()
            elif name:
                self._value(name, kind or "", word)
                name = name if listed else ""

    def _open(self, name: str, closing: str, in_list: str) -> None:
        scope = self._scopes[-1]
        if len(self._scopes) == 1 and name == "layer":
            self._layers += 1
        known = scope.descriptor.fields_by_name.get(name) if scope.descriptor is not None else None
        if known is not None:
            self._scopes.append(_Scope(known.message_type, {}, closing, in_list))
            return
        use = self._use(name)
        use.kinds.add("message")
        self._scopes.append(_Scope(None, use.fields, closing, in_list))

    def _value(self, name: str, kind: str, word: str) -> None:
        scope = self._scopes[-1]
        known = scope.descriptor.fields_by_name.get(name) if scope.descriptor is not None else None
        if known is not None:
            if known.enum_type is not None and kind == "word" and not _INT.fullmatch(word):
                self._enum_value(name, known.enum_type, word)
            return
        use = self._use(name)
        if kind == "string":
            use.kinds.add("string")
        elif _INT.fullmatch(word):
            use.kinds.add("int")
            use.integers.add(int(word, 0) if "x" in word.lower() else int(word))
        elif _FLOAT.fullmatch(word):
            use.kinds.add("float")
        elif word in _BOOL:
            use.kinds.add("bool")
        else:
            use.kinds.add("word")
            use.words[word] = None

    def _use(self, name: str) -> _Use:
        """The use of an unknown field of the open message."""
        scope = self._scopes[-1]
        if scope.descriptor is None:
            return scope.fields.setdefault(name, _Use())
        owner = scope.descriptor.full_name
        self.found.unknown.append(Unknown(owner, name, None, self._place, self._layer))
        return self.found.uses.setdefault(owner, {}).setdefault(name, _Use())

    def _enum_value(self, name: str, enum: Any, word: str) -> None:
        if word not in enum.values_by_name:
            self.found.unknown.append(Unknown(enum.full_name, name, word, self._place, self._layer))
            self.found.values.setdefault(enum.full_name, {})[word] = None

    @property
    def _layer(self) -> int | None:
        return self._layers if len(self._scopes) > 1 and self._layers >= 0 else None


def extend(file: FileDescriptorProto, found: Findings) -> None:
    """Add to a schema what a text has besides, under numbers that are made up.

    Every such field may come several times.

    Args:
        file: the schema, which is changed.
        found: in a text of it.

    Raises:
        MixedKindsError: a field holds what no one type holds.
    """
    messages = dict(_messages(f"{file.package}.", file.message_type))
    for owner, uses in sorted(found.uses.items()):
        _add_fields(file, messages[owner], uses)
    enums = {f"{file.package}.{enum.name}": enum for enum in file.enum_type}
    enums |= {f"{name}.{enum.name}": enum for name, each in messages.items() for enum in each.enum_type}
    for owner, values in sorted(found.values.items()):
        free = _free_numbers({value.number for value in enums[owner].value})
        for name in values:
            enums[owner].value.add(name=name, number=next(free))


def _messages(prefix: str, messages: Any) -> Iterator[tuple[str, DescriptorProto]]:
    for message in messages:
        yield f"{prefix}{message.name}", message
        yield from _messages(f"{prefix}{message.name}.", message.nested_type)


def _add_fields(file: FileDescriptorProto, message: DescriptorProto, uses: dict[str, _Use]) -> None:
    free = _free_numbers({each.number for each in message.field})
    for name, use in uses.items():
        kind = _type(name, use)
        new = message.field.add(name=name, number=next(free), type=kind)
        new.label = FieldDescriptorProto.LABEL_REPEATED
        if kind == FieldDescriptorProto.TYPE_MESSAGE:
            inner = file.message_type.add(name=f"{message.name}_{name}")
            new.type_name = f".{file.package}.{inner.name}"
            _add_fields(file, inner, use.fields)
        elif kind == FieldDescriptorProto.TYPE_ENUM:
            holder = file.message_type.add(name=f"{message.name}_{name}")
            enum = holder.enum_type.add(name="Words")
            new.type_name = f".{file.package}.{holder.name}.{enum.name}"
            for number, word in enumerate(use.words):
                enum.value.add(name=word, number=number)


def _type(name: str, use: _Use) -> FieldDescriptorProto.Type.ValueType:
    """The type that holds all that a field is given."""
    kinds = use.kinds
    if kinds == {"message"}:
        return FieldDescriptorProto.TYPE_MESSAGE
    if kinds == {"string"}:
        return FieldDescriptorProto.TYPE_STRING
    if kinds == {"word"}:
        return FieldDescriptorProto.TYPE_ENUM
    if kinds == {"bool"} or (kinds == {"bool", "int"} and use.integers <= {0, 1}):
        return FieldDescriptorProto.TYPE_BOOL
    if kinds == {"int"} and all(abs(number) <= LARGEST_INT for number in use.integers):
        return FieldDescriptorProto.TYPE_INT64
    if kinds <= {"int", "float"}:
        return FieldDescriptorProto.TYPE_DOUBLE
    raise MixedKindsError(f"{name} is given {' and '.join(sorted(map(_KINDS.__getitem__, kinds)))}")


def _free_numbers(taken: set[int]) -> Iterator[int]:
    return (number for number in count(FIRST_NUMBER) if number not in taken)
