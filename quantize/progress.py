"""How a stage tells how far it is. What is shown, and where, is the caller's business."""

from __future__ import annotations


class Progress:
    """Receives the advance of long work; this base class shows nothing."""

    def start(self, title: str, total: float) -> None:
        """A new piece of work of ``total`` units begins; the one before it is over."""

    def advance(self, amount: float = 1.0) -> None:
        """``amount`` more units are done."""

    def note(self, text: str) -> None:
        """Something the user should know: a guess that was made, a layer that was left alone."""

    def warn(self, text: str) -> None:
        """Something is probably wrong, and the result with it."""


SILENT = Progress()
