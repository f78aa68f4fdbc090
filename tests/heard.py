"""What a person would be told while a command works."""

from quantize.progress import Progress


class Heard(Progress):
    """Keeps the notes and the last piece of work."""

    def __init__(self) -> None:
        self.title = ""
        self.total = self.done = 0.0
        self.notes: list[str] = []

    def start(self, title: str, total: float) -> None:
        self.title, self.total, self.done = title, total, 0.0

    def advance(self, amount: float = 1.0) -> None:
        self.done += amount

    def note(self, text: str) -> None:
        self.notes.append(text)
