"""The ActQuantize layer as pycaffe and `caffe test` run it, with the plug-in."""

import io
import json
import signal
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

FloatArray = npt.NDArray[np.float32]

PASS = """
import json, os
os.environ["GLOG_minloglevel"] = "2"
import caffe, numpy as np
net = caffe.Net("net.prototxt", caffe.TEST)
net.blobs["data"].data[...] = np.load("values.npy")
net.forward()
top = net.blobs[net.outputs[0]]
values = top.data.tolist()
top.diff[...] = np.load("gradients.npy")
net.backward(start="quantize", end="quantize")
print(json.dumps([values, net.blobs["data"].diff.tolist()]))
"""
SHAPE = (2, 3, 20, 25)


def prototxt(params: str, in_place: bool = False, type_name: str = "ActQuantize") -> str:
    """One layer behind an input of SHAPE."""
    dims = " ".join(f"dim: {size}" for size in SHAPE)
    top = "data" if in_place else "quantized"
    return (
        "force_backward: true\n"
        f'layer {{ name: "data" type: "Input" top: "data" input_param {{ shape {{ {dims} }} }} }}\n'
        f'layer {{ name: "quantize" type: "{type_name}" bottom: "data" top: "{top}" {params} }}\n'
    )


def npy(array: FloatArray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def quantized(x: FloatArray, step: float, levels: int) -> FloatArray:
    """The layer's formula in float32; levels below 0: codes of both signs."""
    a = np.float32(step)
    lowest = np.float32(min(levels, 0))
    return a * np.clip(np.floor(x / a + np.float32(0.5)), lowest, np.float32(abs(levels)))


@pytest.mark.parametrize(
    ("type_name", "threshold", "levels", "in_place"),
    [
        ("ActQuantize", "", 127, False),
        ("ActQuantize", "threshold_param { threshold: 0 }", 127, True),
        ("ActQuantize", "threshold_param { threshold: 255 }", 255, False),
        ("ActQuantize", "threshold_param { threshold: -127 }", -127, False),
        ("ActQuantize", "threshold_param { threshold: -7 }", -7, True),
        ("Quant", "", 127, True),
        ("Quant", "threshold_param { threshold: 255 }", 255, True),
    ],
)
def test_forward_and_backward_are_the_formula(
    type_name: str, threshold: str, levels: int, in_place: bool, caffe_plugin, caffe_run
) -> None:
    step = 0.0371
    rng = np.random.default_rng(0)
    values = rng.normal(scale=step * abs(levels), size=SHAPE).astype(np.float32)
    ties = np.float32(step) * (
        np.arange(min(levels, 0) - 2, abs(levels) + 3, dtype=np.float32) + np.float32(0.5)
    )
    values.flat[: len(ties)] = ties
    gradients = rng.normal(size=SHAPE).astype(np.float32)
    net = prototxt(f"relu_param {{ negative_slope: {step} }} {threshold}", in_place, type_name)

    done = caffe_run(
        ["env", f"LD_PRELOAD={caffe_plugin}", "python3", "-c", PASS],
        {"net.prototxt": net, "values.npy": npy(values), "gradients.npy": npy(gradients)},
    )

    assert done.returncode == 0, done.stderr
    top, bottom_diff = (np.array(array, np.float32) for array in json.loads(done.stdout))
    np.testing.assert_array_equal(top, quantized(values, step, levels))
    a = np.float32(step)
    if levels < 0:
        inside = np.abs(values) < a * np.float32(-levels) + a / 2
    else:
        inside = (values > 0) & (values <= a * np.float32(levels))
    np.testing.assert_array_equal(bottom_diff, np.where(inside, gradients, 0))


OPEN = 'import caffe; caffe.Net("net.prototxt", caffe.TEST)'


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ("", "layer quantize: the step, relu_param.negative_slope, must be positive and finite, not 0"),
        ("relu_param { negative_slope: -0.1 }", "must be positive and finite, not -0.1"),
        ("relu_param { negative_slope: inf }", "must be positive and finite, not inf"),
        ("relu_param { negative_slope: nan }", "must be positive and finite, not nan"),
        (
            "relu_param { negative_slope: 0.1 } threshold_param { threshold: 256 }",
            "layer quantize: the largest level, threshold_param.threshold, must be a whole number "
            "from 1 to 255, or 0 for 127, or for signed codes from -1 to -127, not 256",
        ),
        ("relu_param { negative_slope: 0.1 } threshold_param { threshold: 0.5 }", "from -1 to -127, not 0.5"),
        ("relu_param { negative_slope: 0.1 } threshold_param { threshold: -128 }", "-1 to -127, not -128"),
        ("relu_param { negative_slope: 0.1 } threshold_param { threshold: -0.5 }", "-1 to -127, not -0.5"),
    ],
)
def test_impossible_parameters_end_caffe(params: str, message: str, caffe_plugin, caffe_run) -> None:
    command = ["env", f"LD_PRELOAD={caffe_plugin}", "python3", "-c", OPEN]
    done = caffe_run(command, {"net.prototxt": prototxt(params)})
    assert done.returncode == -signal.SIGABRT
    assert message in done.stderr


def test_without_the_plugin_caffe_says_what_docs_say(caffe_run) -> None:
    done = caffe_run(["python3", "-c", OPEN], {"net.prototxt": prototxt("relu_param { negative_slope: 1 }")})
    assert done.returncode == -signal.SIGABRT
    message = (
        "Check failed: registry.count(type) == 1 (0 vs. 1) Unknown layer type: ActQuantize (known types:"
    )
    assert message in done.stderr
    assert message in (Path(__file__).parents[2] / "docs" / "caffe.md").read_text(encoding="utf-8")


def test_a_caffe_that_has_the_layer_refuses_the_plugin_as_docs_say(caffe_plugin, caffe_run) -> None:
    twice = f"cp {caffe_plugin} again.so && LD_PRELOAD='{caffe_plugin} ./again.so' caffe device_query"
    done = caffe_run(["sh", "-c", twice], {})
    message = "Layer type ActQuantize already registered"
    assert done.returncode != 0
    assert message in done.stderr
    assert message in (Path(__file__).parents[2] / "docs" / "caffe.md").read_text(encoding="utf-8")


def test_caffe_test_runs_it(caffe_plugin, caffe_run) -> None:
    net = """
    layer { name: "data" type: "DummyData" top: "data"
            dummy_data_param { shape { dim: 1 dim: 1 } data_filler { type: "constant" value: 1.3 } } }
    layer { name: "quantize" type: "ActQuantize" bottom: "data" top: "data"
            relu_param { negative_slope: 0.25 } }
    """
    preload = f"LD_PRELOAD={caffe_plugin.rsplit('/', 1)[1]}"  # found by its name alone
    weights = b"\n\x01n"  # a NetParameter named n
    done = caffe_run(
        ["env", preload, "caffe", "test", "-model=net.prototxt", "-weights=n.caffemodel", "-iterations=1"],
        {"net.prototxt": net, "n.caffemodel": weights},
    )
    assert done.returncode == 0, done.stderr
    assert "data = 1.25" in done.stderr
