"""Full disks, folders that cannot be written, inputs that vanish, interrupts: one line and no damage."""

import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from quantize import cli
from quantize.caffenet import Weights, read_prototxt
from quantize.cli import INTERRUPTED
from quantize.job.run import Run
from tests.conftest import Job
from tests.nets import write_images

NOBODY = 65534
COMMAND = [sys.executable, "-m", "quantize.cli", "--quiet", "quantize", "--config"]
ROOT = Path(__file__).parents[2]

ON_A_FULL_DISK = """
set -e
cd "$1"
results=$2 room=$3
shift 3
mount -t tmpfs -o size=4m none out
if [ "$results" = True ]; then "$@" --set weights.bits=3; fi
cp -r out before
dd if=/dev/zero of=out/filler bs=4k 2>/dev/null || true
truncate -s "-$room" out/filler
code=0
"$@" || code=$?
rm out/filler
cp -r out after
"$@" --resume
cp -r out resumed
exit $code
"""
"""A command in the folder ``$1`` whose output has ``$3`` bytes left, and again after there is room."""


def quantize(
    job: Job, *more: str, before: Callable[[], object] | None = None
) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [*COMMAND, str(job.yaml), *more],
        preexec_fn=before,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def assert_one_line(done: "subprocess.CompletedProcess[str]", code: int, *parts: str) -> None:
    assert done.returncode == code, done.stderr
    lines = done.stderr.strip().splitlines()  # click ends the line in which ^C stands
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("labelfree: ")
    for part in parts:
        assert part in done.stderr


def test_no_space_for_the_result(job: Job) -> None:
    """A limit on the size of files: what was there stays, nothing half written is left."""
    assert quantize(job).returncode == 0
    before = files(job.out)
    most = (job.out / "residual_quantized.caffemodel").stat().st_size // 2

    def small_files() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))

    done = quantize(job, "--set", "weights.bits=3", before=small_files)
    assert_one_line(done, 1, "residual_quantized.caffemodel", "cannot write", "unchanged")
    assert files(job.out) == before


@pytest.fixture(scope="session")
def mounter(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What a command starts with that may mount, in a namespace of its own."""
    folder = tmp_path_factory.mktemp("mount")
    for command in (["unshare", "--mount"], ["unshare", "--map-root-user", "--mount"]):
        mount = shlex.join([*command, "mount", "-t", "tmpfs", "none", str(folder)])
        if subprocess.run(["sh", "-c", mount], capture_output=True, check=False).returncode == 0:
            return command
    pytest.skip("nobody may mount here; what a limit on file sizes does is tested")


@pytest.mark.parametrize(("results", "room"), [(True, 0), (False, 0), (False, 16384), (False, 24576)])
def test_a_full_disk(job: Job, mounter: list[str], results: bool, room: int) -> None:
    """With earlier results nothing changes; without, the run stops at a later file each time."""
    job.out.mkdir()
    command = [*COMMAND, str(job.yaml)]
    script = ["sh", "-c", ON_A_FULL_DISK, "sh", str(job.folder), str(results), str(room)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*mounter, *script, *command], env=environment, capture_output=True, text=True, check=False
    )
    assert_one_line(done, 1, "cannot write: No space left on device", "unchanged")
    before, after, resumed = (files(job.folder / name) for name in ("before", "after", "resumed"))
    assert len(before) == (6 if results else 0)
    if results or not room:
        assert after == before
    else:
        assert 0 < len(after) < 6
    for name in after:
        assert not name.startswith(".")
        if name.endswith(".caffemodel"):
            Weights.read(job.folder / "after" / name)
        elif name.endswith(".prototxt"):
            read_prototxt(job.folder / "after" / name)
    assert quantize(job).returncode == 0
    whole = files(job.out)
    assert resumed.keys() == whole.keys()
    for name in whole.keys() - {"report.json", "report.html"}:  # they hold times
        assert resumed[name] == whole[name], name


@pytest.mark.parametrize("room", [0, 4096, 16384, 200_000])
def test_make_lmdb_on_a_full_disk(job: Job, mounter: list[str], room: int) -> None:
    """With no room at all the memory that a lock file is mapped to would end the process."""
    job.out.mkdir()
    write_images(job.folder / "photos_lmdb", 300, (3, 32, 32))
    script = """
        cd "$1"
        mount -t tmpfs -o size=4m none out
        dd if=/dev/zero of=out/filler bs=4k 2>/dev/null
        truncate -s "-$2" out/filler
        shift 2
        code=0
        "$@" || code=$?
        ls -A out
        exit $code
    """
    make_lmdb = [sys.executable, "-m", "quantize.cli", "--quiet", "make-lmdb", "photos_lmdb", "out/lmdb"]
    done = subprocess.run(
        [*mounter, "sh", "-c", script, "sh", str(job.folder), str(room), *make_lmdb],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert_one_line(done, 1, "out/lmdb: cannot be written: No space left on device; make room there")
    assert done.stdout == "filler\n"


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_folder_that_one_may_not_write(
    job: Job, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in (job.folder, *job.folder.parents[:3]):
        folder.chmod(0o755)
    Run(job.config(f"output={job.folder / 'elsewhere'}")).quantize(("weights",))  # imports
    monkeypatch.setattr(sys, "argv", ["labelfree", "--quiet", "quantize", "--config", str(job.yaml)])
    job.out.mkdir(mode=0o555)
    user = os.geteuid()
    if user == 0:  # who may write everywhere
        os.seteuid(NOBODY)
    try:
        with pytest.raises(SystemExit) as end:
            cli.main()
    finally:
        os.seteuid(user)
    done = subprocess.CompletedProcess([], int(end.value.code or 0), "", capsys.readouterr().err)
    assert_one_line(done, 2, "cannot write here")
    assert not list(job.out.iterdir())


def started(job: Job, *more: str) -> "subprocess.Popen[str]":
    """A run whose first stage is over."""
    command = [*COMMAND, str(job.yaml), *more]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (job.out / "report.json").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return process


def finished(process: "subprocess.Popen[str]") -> "subprocess.CompletedProcess[str]":
    _, err = process.communicate(timeout=120)
    return subprocess.CompletedProcess(process.args, process.returncode, "", err)


@pytest.mark.parametrize("removed", ["train_lmdb", "net.caffemodel"])
def test_inputs_that_vanish_while_running(job: Job, removed: str) -> None:
    process = started(job)
    path = job.folder / removed
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    done = finished(process)
    if done.returncode:
        assert_one_line(done, done.returncode, removed)
    for written in job.out.glob("*.caffemodel"):
        Weights.read(written)
    assert not list(job.out.glob(".*"))


@pytest.mark.parametrize("shortened", ["train_lmdb/data.mdb", "net.caffemodel"])
def test_inputs_that_shrink_while_running(job: Job, shortened: str) -> None:
    """Where a mapped file would kill the process."""
    process = started(job)
    os.truncate(job.folder / shortened, 100)
    done = finished(process)
    if done.returncode:
        assert_one_line(done, 2, shortened.split("/", maxsplit=1)[0])
    assert not list(job.out.glob(".*"))


def test_ctrl_c_in_the_middle(job: Job) -> None:
    process = started(job, "--set", "memory=40kB")
    process.send_signal(signal.SIGINT)
    done = finished(process)
    assert_one_line(done, INTERRUPTED, "interrupted")
    assert not list(job.out.glob(".*"))
    assert quantize(job, "--resume").returncode == 0


def test_two_runs_at_once(job: Job) -> None:
    first = started(job)
    second = quantize(job)
    assert finished(first).returncode == 0
    if second.returncode:
        assert_one_line(second, 2, "another labelfree run is writing here")
    assert not list(job.out.glob(".*"))
