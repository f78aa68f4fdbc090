"""What every target gives back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from quantize.files import made_folder, whole_file


@dataclass(frozen=True)
class Exported:
    """Files of a target, whole in memory before any is written.

    Attributes:
        files: their content by name.
        floats: the layers with weights that stay in float there, and why.
        notes: what else the user is to know, in sentences.
    """

    files: Mapping[str, bytes]
    floats: Mapping[str, str]
    notes: tuple[str, ...] = ()

    def write(self, folder: str | Path) -> list[Path]:
        """Write the files into a folder, which is made where it is not there; their paths.

        Raises:
            InputError: the folder cannot be made.
            LabelfreeError: a file could not be written.
        """
        paths = [made_folder(folder) / name for name in self.files]
        for path, content in zip(paths, self.files.values(), strict=True):
            with whole_file(path) as file:
                file.write(content)
        return paths
