"""What a person would be told while a command works."""

from collections import defaultdict

from quantize.progress import Progress


class Heard(Progress):
    """Keeps what is said, and by title how much there is to do and has been done."""

    def __init__(self) -> None:
        self.title = ""
        self.total: dict[str, float] = {}
        self.done: defaultdict[str, float] = defaultdict(float)
        self.notes: list[str] = []
        self.warnings: list[str] = []

    def start(self, title: str, total: float) -> None:
        assert total > 0
        self.title, self.total[title], self.done[title] = title, total, 0.0

    def advance(self, amount: float = 1.0) -> None:
        self.done[self.title] += amount

    def note(self, text: str) -> None:
        self.notes.append(text)

    def warn(self, text: str) -> None:
        self.warnings.append(text)
