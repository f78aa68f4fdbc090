"""scripts/caffe_root: what it takes for finished, what it starts afresh, what it leaves alone.

Making a folder takes minutes and a network; here a stand-in for mmdebstrap shows what would be made.
"""

import fcntl
import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "caffe_root"
STAMP = ".labelfree-caffe-root"


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """A mirror of files and an mmdebstrap that writes down how it was called, then fails."""
    release = tmp_path / "mirror" / "dists" / "bullseye" / "Release"
    release.parent.mkdir(parents=True)
    release.write_text("Origin: Debian\nCodename: bullseye\n")
    commands = tmp_path / "bin"
    commands.mkdir()
    for name in ("mmdebstrap", "newuidmap"):
        (commands / name).write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/called\nexit 25\n')
        (commands / name).chmod(0o755)
    return {
        **os.environ,
        "PATH": f"{commands}:{os.environ['PATH']}",
        "LABELFREE_DEBIAN_MIRROR": f"file://{tmp_path}/mirror",
    }


def run(root: Path, environment: dict[str, str]) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([SCRIPT, root], env=environment, capture_output=True, text=True, timeout=60)


def test_a_finished_folder_is_not_made_again(
    caffe_root: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    done = run(caffe_root, environment)
    assert done.returncode == 0, done.stderr
    assert f"{caffe_root} is ready" in done.stdout
    assert not (tmp_path / "called").exists()


def test_a_half_made_folder_is_made_afresh(environment: dict[str, str], tmp_path: Path) -> None:
    unfinished = tmp_path / "caffe.unfinished"
    (unfinished / "usr").mkdir(parents=True)
    (unfinished / "usr" / "half").touch()

    done = run(tmp_path / "caffe", environment)

    assert done.returncode != 0
    called = (tmp_path / "called").read_text()
    assert f"bullseye {unfinished} file://{tmp_path}/mirror" in called or "bullseye - " in called
    assert not (unfinished / "usr" / "half").exists()
    assert not (tmp_path / "caffe").exists()


def test_a_folder_of_an_older_recipe_is_made_afresh(environment: dict[str, str], tmp_path: Path) -> None:
    root = tmp_path / "caffe"
    root.mkdir()
    (root / STAMP).write_text("0 bullseye caffe\n")
    assert run(root, environment).returncode != 0
    assert (tmp_path / "called").exists()
    assert (root / STAMP).exists()  # it goes when the new one is whole


def test_somebody_elses_folder_is_left_alone(environment: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "caffe").mkdir()
    (tmp_path / "caffe" / "thesis.tex").touch()
    done = run(tmp_path / "caffe", environment)
    assert done.returncode == 1
    assert "holds something else" in done.stderr
    assert (tmp_path / "caffe" / "thesis.tex").exists()
    assert not (tmp_path / "called").exists()


def test_a_second_run_waits_for_the_first(environment: dict[str, str], tmp_path: Path) -> None:
    with open(tmp_path / "caffe.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        second = subprocess.Popen(
            [SCRIPT, tmp_path / "caffe"],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert second.stdout is not None
        assert "Waiting for another run" in second.stdout.readline()
        assert not (tmp_path / "called").exists()
    assert "Making" in second.communicate(timeout=60)[0]
    assert (tmp_path / "called").exists()


def test_wrong_use(environment: dict[str, str]) -> None:
    done = subprocess.run([SCRIPT, "--help-me"], env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert "usage: scripts/caffe_root [DIR]" in done.stderr
