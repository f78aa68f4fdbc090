"""BatchNorms whose stored statistics cannot be meant are named, in one line."""

import numpy as np
import pytest

from quantize.caffenet import NetParameter, Weights, doubtful_norms, stored_statistics

CHANNELS = 3


def net_of(*names: str) -> NetParameter:
    net = NetParameter()
    for name in names:
        net.layer.add(name=name, type="BatchNorm", bottom=["x"], top=["x"])
    return net


def norm(mean: float, variance: float, factor: float) -> list[np.ndarray]:
    return [np.full(CHANNELS, mean), np.full(CHANNELS, variance), np.array([factor])]


@pytest.mark.parametrize(
    ("blobs", "words"),
    [
        (norm(1, 2, 1), None),
        (norm(0, 1, 999), None),
        (norm(1, 0, 0), "the third blob is 0"),
        (norm(0, 2, 0), "the third blob is 0"),
        (norm(0, 0, 0), "the stored variance is 0"),
        (norm(0, 0, 1), "the stored variance is 0"),
        (norm(3, 0, 1), "the stored variance is 0"),
        ([np.zeros(CHANNELS), np.array([0, 0, 1.0]), np.ones(1)], None),
    ],
)
def test_what_is_doubtful(blobs: list[np.ndarray], words: str | None) -> None:
    net = net_of("bn", "well")
    weights = Weights()
    weights.add(net.layer[0], blobs)
    weights.add(net.layer[1], norm(1, 1, 1))
    lines = doubtful_norms(net, weights)
    assert len(lines) == (words is not None)
    if words is not None:
        assert lines[0].startswith(f"BatchNorm bn: {words}")


def test_many_layers_are_one_line() -> None:
    names = [f"bn{number}" for number in range(7)]
    net, weights = net_of(*names, "absent"), Weights()
    for layer in net.layer[:7]:
        weights.add(layer, norm(1, 1, 0))
    assert [line.split(":")[0] for line in doubtful_norms(net, weights)] == [
        "BatchNorm bn0, bn1, bn2, bn3, bn4 and 2 more"
    ]


def test_statistics_are_divided_by_the_third_blob() -> None:
    mean, variance = stored_statistics([blob.astype(np.float32) for blob in norm(3, 5, 4)])
    np.testing.assert_array_equal(mean, 0.75)
    np.testing.assert_array_equal(variance, 1.25)
    assert not np.any(stored_statistics([blob.astype(np.float32) for blob in norm(3, 5, 0)]))
