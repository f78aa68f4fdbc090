"""Folders of images for the tests of quantize.data, made on the spot."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import cv2
import pytest
from pictures import photograph


@pytest.fixture
def image_folder(tmp_path: Path) -> Callable[..., Path]:
    """Make a folder of ``count`` images; sizes vary unless one is given."""

    def make(count: int, size: tuple[int, int] | None = None, suffix: str = ".png") -> Path:
        folder = tmp_path / "images"
        folder.mkdir()
        for i in range(count):
            height, width = size or (40 + 3 * i, 50 + 7 * (i % 3))
            assert cv2.imwrite(str(folder / f"image{i:02d}{suffix}"), photograph(i, height, width))
        return folder

    return make
