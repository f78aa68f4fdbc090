"""The rooms of the package: imports point one way, from the command line down to the mathematics."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = (
    ("arrays", "errors", "files", "progress", "host"),
    ("settings", "record"),
    ("numerics",),
    ("caffenet",),
    ("data",),
    ("engines",),
    ("sweep", "cluster"),
    ("measure",),
    ("stages", "exports", "report"),
    ("job",),
    ("commands",),
    ("api", "cli", "__main__"),
)
"""From the ground up; a room may import from rooms of its own floor and below."""
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
MODULES = sorted((ROOT / "quantize").rglob("*.py"))


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """Line and name of everything that a module imports from the package."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            if node.module == "quantize":
                yield from ((node.lineno, f"quantize.{alias.name}") for alias in node.names)
            else:
                yield node.lineno, node.module
        elif isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_arrows_point_down(path: Path) -> None:
    room = path.relative_to(ROOT / "quantize").parts[0].removesuffix(".py")
    if room == "__init__":
        return
    for line, name in imported(path):
        package, *rest = name.split(".")
        if package == "quantize" and rest and rest[0] != "__version__":
            assert FLOOR[rest[0]] <= FLOOR[room], f"{path}:{line}: {room} imports {name}, which is above it"


def test_only_the_engines_import_onnxruntime() -> None:
    for path in MODULES:
        if "onnxruntime" in {name.split(".")[0] for _, name in imported(path)}:
            assert path.is_relative_to(ROOT / "quantize" / "engines" / "onnx")
