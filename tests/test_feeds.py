"""Which images a net is fed with."""

from pathlib import Path

import cv2
import numpy as np
import pytest

from quantize.caffenet import TEST
from quantize.config import load
from quantize.feeds import calibration_feed, effective_transform
from tests.nets import parse


@pytest.mark.parametrize(
    ("channels", "given", "gray"), [(1, "{}", True), (3, "{}", False), (3, "{force_gray: true}", True)]
)
def test_a_net_of_one_channel_gets_gray_images(tmp_path: Path, channels: int, given: str, gray: bool) -> None:
    net = parse(
        'layer { name: "in" type: "Input" top: "in" '
        f"input_param {{ shape {{ dim: [1, {channels}, 8, 8] }} }} }}"
        'layer { name: "relu" type: "ReLU" bottom: "in" top: "relu" }'
    )
    assert cv2.imwrite(str(tmp_path / "a.png"), np.full((8, 8, 3), (10, 20, 30), np.uint8))
    options = {
        "model.prototxt": "p",
        "model.weights": "w",
        "output": "o",
        "data.calibration.source": str(tmp_path),
    }
    config = load(None, options, [f"data.transform={given}"])
    assert effective_transform(net, TEST, config).force_gray is gray
    if channels == 1:
        assert calibration_feed(config, net, 1).images.shape == (1, 8, 8)
