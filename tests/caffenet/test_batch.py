"""The number of images that a Reshape names becomes whatever the batch is, and nothing else does."""

from pathlib import Path

import pytest

from quantize.caffenet import read_net

INPUT = (
    'layer {{ name: "in" type: "Input" top: "data" input_param {{ shape {{ dim: {} dim: 4 dim: 6 }} }} }}\n'
)
OLD = 'input: "data"\n{}'
DATA = 'layer {{ name: "d" type: "Data" top: "data" data_param {{ batch_size: {} }} }}\n'


def dims_of(folder: Path, head: str, reshape: str, behind: str = "data") -> list[int]:
    text = head + (
        f'layer {{ name: "r" type: "Reshape" bottom: "{behind}" top: "r" reshape_param {{ {reshape} }} }}\n'
    )
    (folder / "net.prototxt").write_text(text)
    return list(read_net(folder / "net.prototxt").layer[-1].reshape_param.shape.dim)


def shape(*dims: int) -> str:
    return f"shape {{ {' '.join(f'dim: {dim}' for dim in dims)} }}"


FLAT = (
    f'layer {{ name: "flat" type: "Reshape" bottom: "data" top: "flat" reshape_param {{ {shape(4, 6)} }} }}\n'
)


@pytest.mark.parametrize(
    ("head", "reshape", "wanted"),
    [
        (INPUT.format(1), shape(1, -1), [0, -1]),
        (INPUT.format(1), shape(1, 24), [0, 24]),
        (INPUT.format(1), shape(1, 1, 4, 6), [0, 1, 4, 6]),
        (INPUT.format(1), shape(1, -1) + " num_axes: 2", [0, -1]),
        (INPUT.format(10), shape(10, 6, -1), [0, 6, -1]),
        (OLD.format("input_dim: 10 input_dim: 1 input_dim: 4 input_dim: 6\n"), shape(10, -1), [0, -1]),
        (OLD.format(""), shape(1, -1), [0, -1]),
        (DATA.format(50), shape(50, -1), [0, -1]),
        # not the batch
        (INPUT.format(10), shape(1, -1), [1, -1]),
        (INPUT.format(10), shape(5, -1), [5, -1]),
        (DATA.format(50), shape(1, -1), [1, -1]),
        (INPUT.format(1), shape(1, -1) + " axis: 1", [1, -1]),
        (INPUT.format(1), shape(1) + " num_axes: 0", [1]),
        (INPUT.format(1), shape(-1, 24), [-1, 24]),
        (INPUT.format(1), shape(0, 24), [0, 24]),
    ],
)
def test_what_is_the_batch(head: str, reshape: str, wanted: list[int], tmp_path: Path) -> None:
    assert dims_of(tmp_path, head, reshape) == wanted


def test_a_first_axis_that_is_not_the_batch_is_not_copied(tmp_path: Path) -> None:
    assert dims_of(tmp_path, INPUT.format(1) + FLAT, shape(1, 4, 6), "flat") == [1, 4, 6]


def test_behind_a_type_that_is_not_known_the_number_decides(tmp_path: Path) -> None:
    odd = 'layer { name: "odd" type: "Mystery" bottom: "data" top: "odd" }\n'
    assert dims_of(tmp_path, INPUT.format(1) + odd, shape(1, -1), "odd") == [0, -1]
    assert dims_of(tmp_path, INPUT.format(8) + odd, shape(1, -1), "odd") == [1, -1]
