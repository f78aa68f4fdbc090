"""What this process may use of the machine, and what it has used: processors and memory."""

from __future__ import annotations

import math
import os
import re
import resource
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CGROUP_V2 = Path("/sys/fs/cgroup/cpu.max")
CGROUP_V1 = Path("/sys/fs/cgroup/cpu")
CLEAR_REFS = Path("/proc/self/clear_refs")
STATUS = Path("/proc/self/status")

_chosen: int | None = None
"""What `using_threads` was given."""


def available_threads() -> int:
    """Processors to use: what `using_threads` was given, else those that this process may use.

    These are its affinity mask, and no more than the cgroup's processor quota.
    """
    if _chosen is not None:
        return _chosen
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _cgroup_quota()
    return max(1, min(cpus, math.ceil(quota))) if quota else cpus


@contextmanager
def using_threads(threads: int | None) -> Iterator[None]:
    """Have everything in this process that computes use so many threads; None: as many as it may.

    Our own pools ask `available_threads`. The matrix products of numpy and OpenCV, which have pools of their
    own, are told; OpenCV gets one thread, for every image has one of ours. All this is the process's, not the
    calling thread's.
    """
    import cv2
    from threadpoolctl import threadpool_limits

    global _chosen
    before, of_opencv = _chosen, cv2.getNumThreads()
    _chosen = threads
    cv2.setNumThreads(1)
    try:
        with threadpool_limits(available_threads()):
            yield
    finally:
        _chosen = before
        cv2.setNumThreads(of_opencv)


def pool(threads: int, name: str) -> Executor:
    """Threads called ``name``; a single one is the caller's, so that it keeps no second processor busy."""
    return ThreadPoolExecutor(threads, thread_name_prefix=name) if threads > 1 else _Here()


class _Here(Executor):
    """Does at once, and in the calling thread, what is submitted."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        done: Future[Any] = Future()
        try:
            done.set_result(fn(*args, **kwargs))
        except Exception as error:
            done.set_exception(error)
        return done


def _cgroup_quota() -> float | None:
    """Processors by the cgroup's bandwidth limit; None where there is none (or it cannot be read)."""
    try:
        if CGROUP_V2.exists():
            limit, period = CGROUP_V2.read_text().split()
        else:
            limit = (CGROUP_V1 / "cpu.cfs_quota_us").read_text()
            period = (CGROUP_V1 / "cpu.cfs_period_us").read_text()
        return int(limit) / int(period) if int(limit) > 0 else None
    except (OSError, ValueError):
        return None


def reset_peak_memory() -> None:
    """Start measuring anew, where the kernel can; elsewhere the peak is the process's."""
    try:
        CLEAR_REFS.write_text("5")
    except OSError:
        return


def peak_memory() -> int:
    """Bytes of the largest resident set since the last reset."""
    try:
        peak = re.search(r"VmHWM:\s+(\d+) kB", STATUS.read_text())
    except OSError:
        peak = None
    return 1024 * (int(peak[1]) if peak else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
