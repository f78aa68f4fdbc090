"""`labelfree layers`: the ActQuantize layer's sources, into a Caffe source tree or a folder of their own."""

from __future__ import annotations

import os
import re
from importlib.resources import files
from pathlib import Path

from quantize.errors import InputError, LabelfreeError
from quantize.files import PART_SUFFIX

SOURCES = files("quantize") / "caffe_layers"
IN_CAFFE = {
    "act_quantize.hpp": "include/caffe/layers/act_quantize.hpp",
    "act_quantize.cpp": "src/caffe/layers/act_quantize.cpp",
    "act_quantize.cu": "src/caffe/layers/act_quantize.cu",
    "test_act_quantize_layer.cpp": "src/caffe/test/test_act_quantize_layer.cpp",
}
"""By source, where Caffe's Makefile and CMake look for layers and tests."""
ALONE = {name: name for name in (*IN_CAFFE, "Makefile")}
BUILT = "build"
"""What that Makefile makes."""
CAFFE_HAS = (
    "include/caffe/layers",
    "src/caffe/layers",
    "src/caffe/test",
    "src/caffe/proto/caffe.proto",
    "include/caffe/layer_factory.hpp",
)
RIVAL = re.compile(rb"REGISTER_LAYER_(?:CLASS|CREATOR)\((?:ActQuantize|Quant)[,)]")


def put_layers(folder: Path, force: bool = False) -> list[str]:
    """Put the sources into a Caffe source tree, or with a Makefile into a folder of their own: all or none.

    Args:
        folder: a Caffe source tree, or a folder that is new, empty or of our making.
        force: replace files that differ from ours.

    Returns:
        What was done, file by file, and what to do next.

    Raises:
        InputError: the folder is neither, another layer of the tree has our names, or files are in the way.
        LabelfreeError: the files cannot be written.
    """
    in_caffe = _is_caffe(folder)
    if in_caffe:
        _refuse_rivals(folder)
    files = _places(folder, in_caffe, force)
    new = {name: place for name, place in files.items() if not _is_ours(name, place)}
    parts = {name: place.with_name(f".{place.name}{PART_SUFFIX}") for name, place in new.items()}
    try:
        if not in_caffe:
            folder.mkdir(parents=True, exist_ok=True)
        for name, part in parts.items():
            part.write_bytes((SOURCES / name).read_bytes())
        for name, part in parts.items():
            os.replace(part, new[name])
    except OSError as error:
        raise LabelfreeError(f"{folder}: cannot write: {error.strerror}; nothing was installed") from error
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)
    done = [f"{'installed' if name in new else 'already there'} {place}" for name, place in files.items()]
    if in_caffe:
        return [*done, "next: rebuild Caffe; its `make test` then builds the layer's tests too"]
    library = folder / BUILT / "libact_quantize.so"
    return [*done, f"next: make -C {folder} plugin; then LD_PRELOAD={library} caffe test ..."]


def remove_layers(folder: Path, force: bool = False) -> list[str]:
    """Take the sources out again.

    Args:
        folder: as for `put_layers`.
        force: remove files that differ from ours, too.

    Returns:
        What was done, file by file.

    Raises:
        InputError: the folder is neither, or files are not ours.
        LabelfreeError: a file cannot be removed.
    """
    files = _places(folder, _is_caffe(folder), force).values()
    try:
        for place in files:
            place.unlink(missing_ok=True)
    except OSError as error:
        raise LabelfreeError(f"{error.filename}: cannot remove: {error.strerror}") from error
    return [f"removed {place}" for place in files]


def _is_caffe(folder: Path) -> bool:
    """Whether a folder is a Caffe source tree, and not one that the sources have to themselves.

    Raises:
        InputError: it is neither.
    """
    if (folder / "include/caffe").exists() or (folder / "src/caffe").exists():
        for needed in CAFFE_HAS:
            if not (folder / needed).exists():
                raise InputError(
                    f"{folder}: not a Caffe source tree: it has no {needed}; for an installed Caffe name a "
                    "new folder and build the plug-in there"
                )
        return True
    if folder.exists() and not (folder.is_dir() and set(os.listdir(folder)) <= {*ALONE, BUILT}):
        raise InputError(
            f"{folder}: neither a Caffe source tree (it has no src/caffe) nor empty; name one or a new folder"
        )
    return False


def _refuse_rivals(caffe: Path) -> None:
    """Refuse a tree in which another layer has our type names."""
    for path in sorted((caffe / "src/caffe").rglob("*.c*")):
        if (
            path.suffix in (".cpp", ".cu")
            and path.name != "act_quantize.cpp"
            and RIVAL.search(path.read_bytes())
        ):
            raise InputError(
                f"{path}: registers layer type ActQuantize or Quant already; remove that layer first, Caffe "
                "does not start with a type registered twice"
            )


def _places(folder: Path, in_caffe: bool, force: bool) -> dict[str, Path]:
    """Where each source has its place.

    Raises:
        InputError: something that is not ours is there.
    """
    files = {name: folder / place for name, place in (IN_CAFFE if in_caffe else ALONE).items()}
    for place in files.values():
        if place.is_dir() and not place.is_symlink():
            raise InputError(f"{place}: a folder is in the way")
    differing = [str(at) for name, at in files.items() if os.path.lexists(at) and not _is_ours(name, at)]
    if differing and not force:
        raise InputError(f"not ours, or changed since: {', '.join(differing)}; --force goes on all the same")
    return files


def _is_ours(name: str, place: Path) -> bool:
    return place.is_file() and place.read_bytes() == (SOURCES / name).read_bytes()
