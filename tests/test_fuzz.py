"""A few damaged inputs of every kind; ``scripts/fuzz`` runs many more."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from quantize import cli
from quantize.files import PART_SUFFIX
from tests import fuzzing
from tests.fuzzing import KINDS

FUZZ = Path(__file__).resolve().parents[1] / "scripts" / "fuzz"
CASES = 5


def test_damaged_input_is_work_done_or_one_clear_line(tmp_path: Path) -> None:
    command = [sys.executable, FUZZ, "--count", str(CASES), "--keep", tmp_path / "case"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    table = done.stdout.splitlines()
    assert [line.split()[0] for line in table] == ["kind", *KINDS]
    for line in table[1:]:
        assert sum(map(int, line.split()[1:-2])) == CASES


MISBEHAVIOURS: dict[str, Callable[[], object]] = {
    "traceback": lambda: 1 // 0,
    "unexpected error": lambda: cli.fail("unexpected KeyError: 'x'", 1),
    "not one line": lambda: cli.fail("first", 2) if print("another", file=sys.stderr) else cli.fail("", 2),
    "warnings": lambda: print("careful", file=sys.stderr),
    "wrote outside": lambda: Path("../outside").write_text(""),
    "memory": lambda: np.ones((2 << 30) + 1, np.uint8) is None,
    "signal 11": lambda: os.kill(os.getpid(), signal.SIGSEGV),
    "half a file left": lambda: Path("out").mkdir() or Path(f"out/.x{PART_SUFFIX}").touch(),
    "exit code 3": lambda: cli.fail("no", 3),
}


@pytest.mark.parametrize("name", MISBEHAVIOURS)
def test_a_bug_would_be_seen(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The judge itself, on commands that misbehave."""
    (tmp_path / "seed").mkdir()
    monkeypatch.setitem(fuzzing.KINDS, "nothing", lambda _rng, _job: [["quantize"]])
    monkeypatch.setattr(cli, "main", MISBEHAVIOURS[name])
    outcome, _ = fuzzing.run_case("nothing", 0, tmp_path / "seed", tmp_path / "case")
    # Where the address space is used up before, too much memory is a MemoryError that nobody caught.
    names = {name, "traceback"} if name == "memory" else {name}
    assert outcome.is_bug
    assert outcome.name in names
