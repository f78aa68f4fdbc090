"""Stages and levels, against real Caffe: which layers there are, and what is written needs neither."""

import json
from collections.abc import Callable

from quantize.caffenet import TEST, NetParameter, at_state, filter_net, format_prototxt
from tests.nets import parse

NET = """
name: "all in one"
STATE
layer { name: "data_train" type: "DummyData" top: "data" include { stage: "train" }
  dummy_data_param { shape { dim: [2, 3, 8, 8] } } }
layer { name: "data_val" type: "DummyData" top: "data" include { stage: "val" not_stage: "deploy" }
  dummy_data_param { shape { dim: [2, 3, 8, 8] } } }
layer { name: "data_deploy" type: "Input" top: "data" include { stage: "deploy" }
  input_param { shape { dim: [1, 3, 8, 8] } } }
layer { name: "conv" type: "Convolution" bottom: "data" top: "conv"
  convolution_param { num_output: 4 kernel_size: 3 } }
layer { name: "deep" type: "Power" bottom: "conv" top: "deep" include { min_level: 1 max_level: 2 } }
layer { name: "train_only" type: "Power" bottom: "conv" top: "train_only"
  include { phase: TRAIN stage: "deploy" } include { phase: TRAIN min_level: 1 } }
layer { name: "no_val" type: "Power" bottom: "conv" top: "no_val"
  exclude { stage: "val" } exclude { phase: TEST min_level: 2 } }
layer { name: "prob" type: "Softmax" bottom: "conv" top: "prob"
  include { stage: "deploy" phase: TEST } include { min_level: 3 } }
"""
STATES = [
    ([], ["val"], 0),
    ([], ["deploy"], 0),
    ([], ["deploy"], 1),
    ([], ["deploy"], 2),
    ([], ["deploy"], 3),
    ([], ["val"], 3),
    (["deploy"], [], 0),
    (["deploy"], [], 1),
    (["unheard_of"], ["val"], 2),
]
"""Stages in the prototxt's state, stages given, level given."""


def net_of(stages: list[str]) -> NetParameter:
    state = " ".join(f'stage: "{stage}"' for stage in stages)
    return parse(NET.replace("STATE", f"state {{ level: 2 {state} }}"))


def test_the_layers_are_those_of_caffe(caffe_run: Callable[..., object]) -> None:
    script = (
        "import caffe, json\n"
        "for number, (stages, level) in enumerate(json.load(open('states.json'))):\n"
        "    read = caffe.Net('read%d.prototxt' % number, caffe.TEST, level=level, stages=stages)\n"
        "    written = caffe.Net('written%d.prototxt' % number, caffe.TEST)\n"
        "    print(json.dumps([list(read._layer_names), list(written._layer_names)]))\n"
    )
    files = {"states.json": json.dumps([[stages, level] for _, stages, level in STATES])}
    expected = []
    for number, (own, stages, level) in enumerate(STATES):
        chosen = at_state(net_of(own), stages, level)
        expected.append([layer.name for layer in filter_net(chosen, TEST).layer])
        files[f"read{number}.prototxt"] = format_prototxt(net_of(own))
        files[f"written{number}.prototxt"] = format_prototxt(chosen)
    done = caffe_run(["python3", "-c", script], files)
    assert done.returncode == 0, done.stderr  # type: ignore[attr-defined]
    for line, names in zip(done.stdout.splitlines(), expected, strict=True):  # type: ignore[attr-defined]
        read, written = ([n for n in found if "split" not in n] for found in json.loads(line))
        assert read == written == names
    assert len({tuple(names) for names in expected}) > 5
