"""Wall time, processor time and peak memory of a piece of work, each in a process of its own."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

from quantize.host import peak_memory, reset_peak_memory


@dataclass
class Measurement:
    """What a piece of work took.

    Attributes:
        seconds: wall time.
        cpu_seconds: processor time of all threads; says more where others use the machine as well.
        peak: bytes of the largest resident set of the process.
    """

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    peak: int = 0

    def __str__(self) -> str:
        return f"{self.seconds:.1f} s, processor time {self.cpu_seconds:.1f} s, peak {self.peak >> 20} MiB"


@contextmanager
def measured() -> Iterator[Measurement]:
    """Measure the body of the ``with`` statement."""
    found = Measurement()
    reset_peak_memory()
    cpu, start = _cpu_seconds(), time.monotonic()
    yield found
    found.seconds = time.monotonic() - start
    found.cpu_seconds = _cpu_seconds() - cpu
    found.peak = peak_memory()


def in_new_process(work: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function of a module in a fresh process, so that memory of earlier work does not count."""
    with get_context("spawn").Pool(1) as pool:
        return pool.apply(work, arguments)


def spread(values: Sequence[float], form: str = ".2f") -> str:
    """Median and range: ``1.23 (1.20-1.30)``."""
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:{form}} ({low:{form}}-{high:{form}})"


def _cpu_seconds() -> float:
    times = os.times()
    return times.user + times.system
