"""What a person sees while a command works: a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, TextIO

from quantize.progress import Progress

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import Task, TaskID

UNITS = {
    "budget": "MAC",
    "weights": "weights",
    "renorm": "MAC",
    "activations": "images",
    "report": "images",
    "evaluate": "images",
    "make-lmdb": "images",
}
"""What a title's work is counted in; MAC: multiply-accumulates."""
PREFIXES = ("", "k", "M", "G", "T")
SECONDS_BETWEEN_LINES = 10.0
LEAST_COLUMNS = 72
"""Of a terminal for bars and tables with rules."""


def is_wide(stream: TextIO) -> bool:
    """Whether a stream is a terminal on which bars and tables have room."""
    if not stream.isatty():
        return False
    from rich.console import Console

    return Console(file=stream).width >= LEAST_COLUMNS


def rate_text(title: str, rate: float | None) -> str:
    """``1.2 Mweights/s``; empty where the rate or the unit is not known."""
    if rate is None or rate <= 0 or title not in UNITS:
        return ""
    power = 0
    while rate >= 1000 and power < len(PREFIXES) - 1:
        rate, power = rate / 1000, power + 1
    return f"{rate:.3g} {PREFIXES[power]}{UNITS[title]}/s"


class Lines(Progress):
    """Lines to standard error: when work begins, every ten seconds, and when it ends."""

    def __init__(self) -> None:
        self._title = ""
        self._began = 0.0
        self._spoke = 0.0
        self._done = 0.0
        self._total = 0.0
        self._notes: set[str] = set()

    def start(self, title: str, total: float) -> None:
        """End the work before and begin the next."""
        self.stop()
        self._title, self._total, self._done = title, total, 0.0
        self._began = self._spoke = time.monotonic()
        self._say(f"{title} ...")

    def advance(self, amount: float = 1.0) -> None:
        """Say every ten seconds how far the work is."""
        self._done += amount
        now = time.monotonic()
        if now - self._spoke >= SECONDS_BETWEEN_LINES and 0 < self._done < self._total:
            self._spoke = now
            rate = self._done / (now - self._began)
            left = (self._total - self._done) / rate
            share = 100 * self._done / self._total
            self._say(f"{self._title}: {share:.0f} %, {rate_text(self._title, rate)}, {left:.0f} s left")

    def note(self, text: str) -> None:
        """Show a line; what several stages say is shown once."""
        self._say_once(f"note: {text}")

    def warn(self, text: str) -> None:
        """Show a warning."""
        self._say_once(f"warning: {text}")

    def _say_once(self, text: str) -> None:
        if text not in self._notes:
            self._notes.add(text)
            self._say(text)

    def stop(self) -> None:
        """Say how long the work took and how fast it was."""
        if self._title:
            took = time.monotonic() - self._began
            rate = rate_text(self._title, self._done / took if took > 0 else None)
            self._say(f"{self._title}: {took:.1f} s{f', {rate}' if rate else ''}")
        self._title = ""

    def _say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)


class Bars(Progress):
    """A bar with the rate, the time passed and the time left."""

    def __init__(self) -> None:
        self._bars: RichProgress | None = None
        self._task: TaskID | None = None
        self._notes: set[str] = set()

    def start(self, title: str, total: float) -> None:
        """A full bar stays, a new one begins."""
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            ProgressColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )
        from rich.progress import Progress as RichProgress
        from rich.text import Text

        class Rate(ProgressColumn):
            def render(self, task: Task) -> Text:
                return Text(
                    rate_text(task.description, task.finished_speed or task.speed), "progress.data.speed"
                )

        if self._bars is None:
            self._bars = RichProgress(
                TextColumn("{task.description:<12}"),
                BarColumn(),
                TextColumn("{task.percentage:>3.0f} %"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                Rate(),
                console=Console(stderr=True),
            )
            self._bars.start()
        self._fill()
        self._task = self._bars.add_task(title, total=total)

    def advance(self, amount: float = 1.0) -> None:
        """Move the bar."""
        if self._bars is not None and self._task is not None:
            self._bars.advance(self._task, amount)

    def note(self, text: str) -> None:
        """Show a line above the bar; what several stages say is shown once."""
        self._say_once(f"note: {text}")

    def warn(self, text: str) -> None:
        """Show a warning above the bar."""
        self._say_once(f"warning: {text}")

    def _say_once(self, text: str) -> None:
        if text in self._notes:
            return
        self._notes.add(text)
        if self._bars is None:
            print(text, file=sys.stderr, flush=True)
        else:
            self._bars.console.print(text, markup=False, highlight=False)

    def stop(self) -> None:
        """Leave the terminal as it was."""
        if self._bars is not None:
            self._fill()
            self._bars.stop()
            self._bars = None

    def _fill(self) -> None:
        """Fill the bar of work that is over: costs are estimates."""
        if self._bars is not None and self._task is not None:
            total = self._bars.tasks[-1].total
            self._bars.update(self._task, completed=total or 0)
