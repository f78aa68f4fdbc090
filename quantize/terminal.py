"""What a person sees while a command works: a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

from quantize.progress import Progress

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID


class Lines(Progress):
    """One line to standard error when work begins and when it ends."""

    def __init__(self) -> None:
        self._title = ""
        self._began = 0.0

    def start(self, title: str, total: float) -> None:  # noqa: ARG002 - lines show no share
        """End the work before and begin the next."""
        self.stop()
        self._title, self._began = title, time.monotonic()
        print(f"{title} ...", file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        """Show a line."""
        print(f"note: {text}", file=sys.stderr, flush=True)

    def stop(self) -> None:
        """Say how long the work took."""
        if self._title:
            print(f"{self._title}: {time.monotonic() - self._began:.1f} s", file=sys.stderr, flush=True)
        self._title = ""


class Bars(Lines):
    """A bar with the time passed and the time left."""

    def __init__(self) -> None:
        super().__init__()
        self._bars: RichProgress | None = None
        self._task: TaskID | None = None

    def start(self, title: str, total: float) -> None:
        """A full bar stays, a new one begins."""
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        if self._bars is None:
            self._bars = RichProgress(
                TextColumn("{task.description:<12}"),
                BarColumn(),
                TextColumn("{task.percentage:>3.0f} %"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
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
        """Show a line above the bar."""
        if self._bars is None:
            super().note(text)
        else:
            self._bars.console.print(f"note: {text}", markup=False, highlight=False)

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
