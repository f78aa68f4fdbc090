"""The outputs of a net are those that Caffe lists, and agreement is what its Accuracy layer counts."""

import io
import json
import subprocess
from collections.abc import Callable

import numpy as np
import pytest
from google.protobuf import text_format

from quantize.caffenet import TEST, filter_net
from quantize.measure.closeness import Sums
from quantize.measure.outputs import net_outputs
from tests.measure.test_evaluate import CLASSIFIER, DETECTOR, IN_PLACE, SEGMENTATION, STEM, product
from tests.nets import parse

SILENT = STEM + product("a", 4) + product("b", 4) + 'layer { name: "s" type: "Silence" bottom: "a" }'
SLICED = STEM + 'layer { name: "slice" type: "Slice" bottom: "conv" top: "left" top: "right" }'
LIST = """
import caffe, json
net = caffe.Net('net.prototxt', caffe.TEST)
print(json.dumps(net.outputs))
"""
COUNT = """
import caffe, json, numpy
given = numpy.load('given.npz')
found = []
for i, axis in enumerate(json.load(open('axes.json'))):
    net = caffe.Net('net%d.prototxt' % i, caffe.TEST)
    net.blobs['own'].data[...] = given['own%d' % i]
    net.blobs['label'].data[...] = given['label%d' % i]
    found.append(float(net.forward()['accuracy']))
print(json.dumps(found))
"""
CaffeRun = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.mark.parametrize("text", [CLASSIFIER, IN_PLACE, DETECTOR, SEGMENTATION, SILENT, SLICED])
def test_outputs_are_those_that_caffe_lists(text: str, caffe_run: CaffeRun) -> None:
    net = parse(text)
    softmax = {
        layer.bottom[0]: layer.top[0] for layer in filter_net(net, TEST).layer if layer.type == "Softmax"
    }
    done = caffe_run(["python3", "-c", LIST], {"net.prototxt": text_format.MessageToString(net)})
    assert done.returncode == 0, done.stderr
    listed = json.loads(done.stdout.splitlines()[-1])
    assert sorted(softmax.get(output.blob, output.blob) for output in net_outputs(net)) == sorted(listed)


def test_agreement_is_the_accuracy_with_full_precision_as_the_label(caffe_run: CaffeRun) -> None:
    shapes = [((9, 6), 1), ((4, 5, 3, 2), 1), ((3, 2, 4, 6), 3), ((2, 3, 7), 2)]
    rng = np.random.default_rng(0)
    files: dict[str, str | bytes] = {"axes.json": json.dumps([axis for _, axis in shapes])}
    arrays, agreements = {}, []
    for i, (shape, axis) in enumerate(shapes):
        full = rng.normal(size=shape).astype(np.float32)
        own = (full + rng.normal(size=shape)).astype(np.float32)
        label = full.argmax(axis)
        arrays |= {f"own{i}": own, f"label{i}": label.astype(np.float32)}
        dims = [" ".join(f"dim: {size}" for size in each) for each in (shape, label.shape)]
        files[f"net{i}.prototxt"] = "".join(
            f'layer {{ name: "{name}" type: "Input" top: "{name}" input_param {{ shape {{ {dim} }} }} }}\n'
            for name, dim in zip(("own", "label"), dims, strict=True)
        ) + (
            'layer { name: "accuracy" type: "Accuracy" bottom: "own" bottom: "label" top: "accuracy" '
            f"accuracy_param {{ axis: {axis} }} }}\n"
        )
        sums = Sums(axis)
        sums.update(full, own)
        agreements.append(sums.closeness.agreement)
    packed = io.BytesIO()
    np.savez(packed, **arrays)
    done = caffe_run(["python3", "-c", COUNT], {**files, "given.npz": packed.getvalue()})
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert [100 * accuracy for accuracy in found] == pytest.approx(agreements, abs=1e-4)
