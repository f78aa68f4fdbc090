"""The peak memory of this process, measured for one piece of work after another."""

from __future__ import annotations

import re
import resource
from pathlib import Path

CLEAR_REFS = Path("/proc/self/clear_refs")
STATUS = Path("/proc/self/status")


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
