"""Fields that no schema knows: carried along where nobody runs the layer, as they were."""

from pathlib import Path

import pytest

from quantize.caffenet import InferenceNet, foreign_fields, format_prototxt, read_prototxt
from quantize.caffenet.strings import to_bytes
from quantize.caffenet.unknown_fields import MOST_PLACES
from quantize.errors import InputError

DETECTOR = """
name: "detector"
default_forward_type: FLOAT16
layer { name: "data" type: "AnnotatedData" top: "data" top: "label"
  transform_param { mean_value: 104 resize_param { prob: 1 resize_mode: WARP interp_mode: [LINEAR, AREA] } }
  annotated_data_param { batch_sampler { max_trials: 50 sampler { min_scale: 0.3 } } batch_sampler { } } }
layer { name: "conv" type: "Convolution" bottom: "data" top: "conv" forward_type: FLOAT16
  convolution_param { num_output: 4 kernel_size: 3 engine: MKL2017 conv_algos_override: "1, 1, 1" }
  split_param { engine: MKLDNN } }
layer { name: "prior" type: "PriorBox" bottom: "conv" bottom: "data" top: "prior"
  prior_box_param { min_size: 30.0 aspect_ratio: 2 flip: true variance: 0.1 variance: 2e-1 offset: -5 } }
layer { name: "out" type: "DetectionOutput" bottom: "conv" bottom: "prior" top: "out"
  detection_output_param {
    nms_param { nms_threshold: 0.45 top_k: 400 } code_type: CENTER_SIZE save_output_param { name: "a\\261b" }
  } }
layer { name: "loss" type: "SoftmaxWithLoss" bottom: "conv" bottom: "label" top: "loss"
  loss_param { normalization: PRE_FIXED pre_fixed: 2 } }
"""
PRINTED = """\
layer {
  name: "prior"
  type: "PriorBox"
  bottom: "conv"
  bottom: "data"
  top: "prior"
  prior_box_param {
    min_size: 30.0
    aspect_ratio: 2
    flip: true
    variance: 0.1
    variance: 0.2
    offset: -5
  }
}
"""


@pytest.fixture
def read(tmp_path: Path):
    def read(text: str | bytes):
        path = tmp_path / "net.prototxt"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return read_prototxt(path)

    return read


def test_they_are_carried_along(read) -> None:
    net = read(DETECTOR)
    written = format_prototxt(net)
    assert PRINTED in written
    for part in (
        "default_forward_type: FLOAT16",
        "resize_mode: WARP\n      interp_mode: LINEAR\n      interp_mode: AREA",
        "batch_sampler {\n      max_trials: 50\n      sampler {\n        min_scale: 0.3",
        "batch_sampler {\n    }",
        "engine: MKL2017",
        "split_param {\n    engine: MKLDNN\n  }",
        "code_type: CENTER_SIZE",
        "normalization: PRE_FIXED\n    pre_fixed: 2",
    ):
        assert part in written, part
    again = read(to_bytes(written))
    assert format_prototxt(again) == written
    assert again == net


def test_what_has_no_effect_does_not_keep_a_layer_from_running(read) -> None:
    net = InferenceNet.of(read(DETECTOR)).net
    assert dict(zip((layer.name for layer in net.layer), foreign_fields(net), strict=True))["conv"] is None


def test_numbers_keep_their_digits(read) -> None:
    given = ("a: 9223372036854775807", "b: 1e+20", "c: 0.30000000000000004", "d: false", "e: -1.5", "f: 0.1")
    net = read(f'layer {{ type: "X" x_param {{ {" ".join(given)} }} }}')
    assert [line.strip() for line in format_prototxt(net).splitlines()[3:-2]] == list(given)


def test_values_of_one_field_may_differ_in_kind(read) -> None:
    net = read('layer { type: "X" x_param { a: 1 a: 0.5 b: 1 b: true c: [{ d: 1 }, { d: 2.5 }] } }')
    lines = [line.strip() for line in format_prototxt(net).splitlines()]
    assert lines[3:-2] == [
        "a: 1.0",
        "a: 0.5",
        "b: true",
        "b: true",
        "c {",
        "d: 1.0",
        "}",
        "c {",
        "d: 2.5",
        "}",
    ]


def test_hostile_texts_end_soon(read) -> None:
    for text in (
        'layer { type: "X" ' + "a { " * 10_000 + "}" * 10_001,
        'layer { type: "X" x_param { '
        + "".join(f"a{i}: 1 " for i in range(4)) * (MOST_PLACES // 4)
        + "} } }",
        'layer { type: "X" x_param [ { a: 1 } ] b: < c: 1 > d: [ } }',
        'layer { type: "X" TRAIN { a: 1 } OfFork0 { TEST: 2 } x: OfFork0 y: optional',
    ):
        with pytest.raises(InputError):
            read(text)
