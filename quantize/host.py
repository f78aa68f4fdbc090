"""What this process may use of the machine, and what it has used: processors and memory."""

from __future__ import annotations

import math
import os
import re
import resource
from pathlib import Path

CGROUP_V2 = Path("/sys/fs/cgroup/cpu.max")
CGROUP_V1 = Path("/sys/fs/cgroup/cpu")
CLEAR_REFS = Path("/proc/self/clear_refs")
STATUS = Path("/proc/self/status")


def available_threads() -> int:
    """Processors this process may use: its affinity mask, and no more than the cgroup's processor quota."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _cgroup_quota()
    return max(1, min(cpus, math.ceil(quota))) if quota else cpus


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
        found = re.search(r"VmHWM:\s+(\d+) kB", STATUS.read_text())
    except OSError:
        found = None
    return 1024 * (int(found[1]) if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
