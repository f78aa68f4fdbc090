"""Processors: the one setting for them is obeyed by everything that computes."""

import subprocess
import sys
from concurrent.futures import Future
from pathlib import Path

import cv2
import numpy as np
import pytest
from threadpoolctl import threadpool_info

from quantize.host import available_threads, pool, using_threads

ROOT = Path(__file__).resolve().parents[1]
MOST_OF_ALL_WORK = 0.9
"""Of the processor time of all threads, what the main one must have: with two busy ones it has about half. So
the processor time is at most 1.1 times the time passed, however busy the machine is with other programs."""
SHARE = """
import sys, time
import cv2, numpy, onnxruntime
from quantize import cli

def others():
    return time.process_time() - time.thread_time()

# On an idle machine the threads that these libraries start when they are loaded spin for a moment.
spun = -1.0
while others() - spun > 0.001:
    spun = others()
    time.sleep(0.05)
before = time.thread_time(), time.process_time()
sys.argv = ["labelfree", "--quiet", *sys.argv[1:]]
code = 0
try:
    cli.main()
except SystemExit as end:
    code = end.code
print((time.thread_time() - before[0]) / (time.process_time() - before[1]), file=sys.stderr)
sys.exit(code)
"""


def share_of_the_main_thread(*arguments: str | Path) -> float:
    command = [sys.executable, "-c", SHARE, *map(str, arguments), "--threads", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return float(done.stderr.splitlines()[-1])


@pytest.mark.parametrize("quality", ["fast", "best"])
def test_one_thread_is_one_processor_for_every_stage(tmp_path: Path, quality: str) -> None:
    job = ("--config", "configs/digits.yaml", "--output", tmp_path / "out")
    assert share_of_the_main_thread("quantize", *job, "--quality", quality) > MOST_OF_ALL_WORK
    assert share_of_the_main_thread("evaluate", *job) > MOST_OF_ALL_WORK


def test_one_thread_is_one_processor_for_make_lmdb(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    picture = np.random.default_rng(0).integers(0, 256, (900, 1200, 3)).astype(np.uint8)
    for index in range(12):
        assert cv2.imwrite(str(tmp_path / "photos" / f"{index}.jpg"), picture)
    arguments = ("make-lmdb", tmp_path / "photos", tmp_path / "lmdb", "--resize-short", "512")
    assert share_of_the_main_thread(*arguments) > MOST_OF_ALL_WORK


def test_everything_is_told_and_set_back() -> None:
    def seen() -> tuple[int, int, list[int]]:
        return available_threads(), cv2.getNumThreads(), [blas["num_threads"] for blas in threadpool_info()]

    before = seen()
    with using_threads(3):
        assert seen()[:2] == (3, 1)
        with using_threads(1):
            assert seen() == (1, 1, [1] * len(before[2]))
        assert available_threads() == 3
    assert seen() == before
    with using_threads(None):
        assert available_threads() == before[0]


@pytest.mark.parametrize("threads", [1, 2])
def test_a_pool_gives_results_and_errors_when_they_are_asked_for(threads: int) -> None:
    with pool(threads, "labelfree-test") as executor:
        good: Future[int] = executor.submit(int, "7")
        bad: Future[int] = executor.submit(int, "seven")
        assert good.result() == 7
        with pytest.raises(ValueError, match="seven"):
            bad.result()
        assert list(executor.map(abs, [-1, 2])) == [1, 2]
