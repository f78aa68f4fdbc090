"""From a YAML file, command-line options and ``--set`` to the checked settings.

Whatever is wrong with them becomes an `InputError` of one line that names the key, the value and the remedy.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from quantize.errors import InputError
from quantize.files import read_file
from quantize.settings import MOVED, Config, LayerChoice

MAX_YAML_BYTES = 1 << 20
OPTIONS = {
    "model.prototxt": "--prototxt",
    "model.weights": "--weights",
    "data.calibration.source": "--calibration",
    "data.validation.source": "--validation",
    "output": "--output",
    "engine": "--engine",
    "threads": "--threads",
}
"""Keys with an option of their own."""


class _Loader(yaml.SafeLoader):
    """Safe YAML without aliases (they can grow a small file beyond all bounds) and without repeated keys."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not supported; write the value out")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key.value, str)):
            if key.value in seen:
                raise yaml.YAMLError(f"key {key.value!r} is given twice (line {key.start_mark.line + 1})")
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _yaml_fault(error: Exception) -> str:
    """What PyYAML says, in one line and without its name for text that is no file."""
    return " ".join(str(error).replace('in "<byte string>", ', "at ").split())[:300]


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        InputError: missing, unreadable, not YAML, or not a mapping.
    """
    data = read_file(path, "configuration", MAX_YAML_BYTES)
    try:
        content = yaml.load(data, Loader=_Loader)
    except (yaml.YAMLError, ValueError, RecursionError, OverflowError) as error:
        raise InputError(f"{path}: not valid YAML: {_yaml_fault(error)}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: not a configuration: expected keys such as name, model, data, output")
    return content


def load(
    path: Path | None, options: Mapping[str, object] | None = None, assignments: Sequence[str] = ()
) -> Config:
    """The checked configuration.

    Args:
        path: a YAML file, or None where the options say everything. Paths in it are relative to it.
        options: values by dotted key from the command line, None where not given; paths relative to the
            current folder.
        assignments: ``key=value`` texts of ``--set``; values are YAML.

    Raises:
        InputError: one line about the first thing that is wrong.
    """
    where = str(path) if path else "options"
    tree: dict[str, Any] = read_yaml(path) if path else {}
    _resolve_paths(tree, path.parent if path else Path(), where)
    for key, value in (options or {}).items():
        if value == "":
            raise InputError(f"{where}: {key} is empty; give it a value or leave the option out")
        if value is not None:
            _assign(tree, key, value, where)
    for text in assignments:
        key, equals, value = text.partition("=")
        key = key.strip()
        if not equals or not all(key.split(".")):
            raise InputError(f"--set {text}: expected key=value, for example --set weights.bits=3")
        try:
            parsed = yaml.load(value, Loader=_Loader)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise InputError(f"--set {text}: the value is not valid YAML") from error
        overlay: dict[str, Any] = {}
        _assign(overlay, key, parsed, "--set")
        _resolve_paths(overlay, Path(), "--set")
        _make_way(tree, overlay)
        _merge(tree, overlay)
    if path is None and "name" not in tree:
        model = tree.get("model")
        prototxt = Path(str(model.get("prototxt", "net")) if isinstance(model, dict) else "net")
        tree["name"] = re.sub(r"[^\w.+-]", "_", prototxt.stem)
    return checked(tree, where, path)


def checked(tree: Mapping[str, Any], where: str, path: Path | None = None) -> Config:
    """The configuration that a tree of sections and keys is.

    Args:
        tree: as in the YAML file.
        where: it comes from, for messages.
        path: the YAML file, if it comes from one.

    Raises:
        InputError: one line about the first thing that is wrong.
    """
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise InputError(_missing(error, path) or _first_line(error, where)) from error


def keys(model: type[BaseModel] = Config, prefix: str = "") -> Iterator[str]:
    """The dotted keys of the configuration; of a mapping with names of the user's only its own."""
    for name, field in model.model_fields.items():
        inner = _models_in(field.annotation)
        if inner:
            yield from keys(inner[0], f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


PATH_KEYS = (
    "model.prototxt",
    "model.weights",
    "model.caffe_proto",
    "data.calibration.source",
    "data.calibration.inputs.*",
    "data.validation.source",
    "data.validation.inputs.*",
    "data.transform.mean_file",
    "output",
)


def _resolve_paths(tree: dict[str, Any], base: Path, where: str) -> None:
    for key in PATH_KEYS:
        *parents, last = key.split(".")
        node: Any = tree
        for parent in parents:
            node = node.get(parent) if isinstance(node, dict) else None
        if isinstance(node, dict):
            for name in list(node) if last == "*" else [last]:
                if isinstance(node.get(name), str):
                    node[name] = str(base / expand(node[name], f"{where}: {key.replace('*', str(name))}"))


def expand(text: str, where: str) -> Path:
    """A path with ~ and $VARS expanded.

    Raises:
        InputError: an unset variable or a NUL byte.
    """
    expanded = os.path.expandvars(os.path.expanduser(text))
    unset = re.search(r"\$(\w+|\{[^}]*\})", expanded)
    if unset:
        raise InputError(f"{where}: {text!r} uses {unset[0]}, which is not set; set it or write the path out")
    if not text or "\0" in text:
        raise InputError(f"{where}: {text!r} is not a path")
    return Path(expanded)


def _assign(tree: dict[str, Any], key: str, value: object, where: str) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        tree = tree.setdefault(parent, {})
        if not isinstance(tree, dict):
            raise InputError(f"{where}: {key}: {parent} is not a section")
    tree[last] = value


ONE_OF_TWO = (
    ("weights.bits", "weights.budget"),
    *((f"renorm.{name}", place) for name, place in MOVED.items()),
)
"""Keys that exclude each other."""


def _make_way(tree: dict[str, Any], overlay: dict[str, Any]) -> None:
    """Of keys that exclude each other the one on the command line replaces the other one in the file."""
    for pair in ONE_OF_TWO:
        for given, other in (pair, pair[::-1]):
            if _found(overlay, given) is not None:
                *parents, last = other.split(".")
                section = _found(tree, ".".join(parents))
                if isinstance(section, dict):
                    section.pop(last, None)


def _found(tree: dict[str, Any], key: str) -> Any:
    """What stands under a dotted key, if anything."""
    node: Any = tree
    for name in key.split(".") if key else ():
        node = node.get(name) if isinstance(node, dict) else None
    return node


def _merge(tree: dict[str, Any], overlay: Mapping[str, Any]) -> None:
    for key, value in overlay.items():
        if isinstance(value, dict) and isinstance(tree.get(key), dict):
            _merge(tree[key], value)
        else:
            tree[key] = value


def _missing(error: ValidationError, path: Path | None) -> str | None:
    """One line about all that is missing, and how to give it; None: nothing is."""
    absent: list[str] = []
    for finding in error.errors(include_url=False):
        if finding["type"] == "missing":
            key = ".".join(str(part) for part in finding["loc"])
            absent += ["model.prototxt", "model.weights"] if key == "model" else [key]
    if not absent:
        return None
    options = _listed([OPTIONS.get(key, f"--set {key}=...") for key in absent])
    verb, pronoun = ("is", "it") if len(absent) == 1 else ("are", "them")
    if path is None:
        return f"options: {_listed(absent)} {verb} missing; give {options}, or a file with --config"
    return f"{path}: {_listed(absent)} {verb} missing; write {pronoun} in the file, or give {options}"


def _listed(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _first_line(error: ValidationError, where: str) -> str:
    """The first finding of pydantic as our one line."""
    first = error.errors(include_url=False)[0]
    location = [part for part in first["loc"] if isinstance(part, str)]
    key = ".".join(location)
    if first["type"] == "extra_forbidden":
        known = _keys_at(location[:-1])
        close = difflib.get_close_matches(location[-1], known, 1)
        hint = f"did you mean {close[0]}?" if close else f"known here: {', '.join(known)}"
        return f"{where}: {key}: unknown key; {hint}"
    value = first["input"]
    if value is None:
        leave = "" if _is_required(location) else " or leave it out"
        return f"{where}: {key} is empty; give it a value{leave}"
    if first["type"] == "dict_type":
        return f"{where}: {key} is a section with names as keys, as in fc8: {{...}}, not {str(value)[:40]!r}"
    if first["type"] in ("model_type", "model_attributes_type"):
        return f"{where}: {key} is a section{_section_hint(location, value)}"
    if first["type"] == "path_type":
        what = "a section" if isinstance(value, dict) else "a list" if isinstance(value, list) else value
        return f"{where}: {key}: expected a path, not {what}; write {location[-1]}: path/to/it"
    message = first["msg"].removeprefix("Value error, ")
    if isinstance(value, dict) and _keys_at(location):  # a section, in which the message says what is wrong
        return f"{where}: {key or 'configuration'}: {message[0].lower()}{message[1:]}"
    shown = repr(value) if len(repr(value)) <= 80 else repr(value)[:77] + "..."
    return f"{where}: {key}: {shown}: {message[0].lower()}{message[1:]}"


def _section_hint(location: Sequence[str], value: object) -> str:
    """What a section holds that something else was given for, and where a path given for it belongs."""
    keys = f" with the keys {', '.join(_keys_at(location))}"
    if isinstance(value, str) and location[-1] in ("data", "calibration", "validation"):
        source = f"{{source: {value}}}"
        right = f"{{calibration: {source}}}" if location[-1] == "data" else source
        return f"{keys}; write {location[-1]}: {right}"
    return f"{keys}, not {str(value)[:40]!r}"


def _is_required(location: Sequence[str]) -> bool:
    """Whether a key has no default."""
    section = _section(location[:-1])
    field = section.model_fields.get(location[-1]) if section is not None else None
    return field is not None and field.is_required()


def _keys_at(location: Sequence[str]) -> list[str]:
    section = _section(location)
    return sorted(section.model_fields) if section is not None else []


def _section(location: Sequence[str]) -> type[BaseModel] | None:
    """The section of the schema at a place; None where that is no section."""
    section: type[BaseModel] = Config
    for name in location:
        field = section.model_fields.get(name)
        inner = _models_in(field.annotation) if field is not None else []
        if inner:
            section = inner[0]
        elif section is not LayerChoice:  # whose place is layers.NAME
            return None
    return section


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    options = [annotation, *getattr(annotation, "__args__", ())]
    return [option for option in options if isinstance(option, type) and issubclass(option, BaseModel)]
