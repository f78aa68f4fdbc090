"""The caffe engine's process and frames, with a stand-in for pycaffe that misbehaves on demand."""

import ast
import os
import signal
import subprocess
import sys
import time
from importlib import resources
from pathlib import Path

import numpy as np
import pytest

from quantize.caffenet import LayerParameter, NetParameter, Weights
from quantize.engines.caffe.engine import CaffeEngine, Worker
from quantize.errors import InputError, LabelfreeError

FAKE_CAFFE = '''
"""One layer, `double`, between the blobs `data` and `double`; the net's name says how it misbehaves."""
import os, re, signal, sys, time
import numpy
from collections import OrderedDict

TEST = 1
print("text that would break the frames")
os.write(1, b"text from a library")

def set_mode_cpu():
    assert os.read(0, 1) == b"", "descriptor 0 is not free"

def misbehave(name, place):
    if name == place + " check":
        sys.stderr.write("I1124 18:30:01.1 1 net.cpp:1] noise\\n")
        sys.stderr.write("F1124 18:30:01.123456  1234 layer_factory.hpp:81] Check failed: "
                         "registry.count(type) == 1 (0 vs. 1) Unknown layer type: ActQuantize\\n")
        sys.stderr.write("*** Check failure stack trace: ***\\n    @ 0x7f  (unknown)\\n")
        sys.stderr.flush()
        os.abort()
    if name == place + " old layer":
        sys.stderr.write("\\nF1124 18:30:01.123456  1234 act_quantize.cpp:24] Check failed: levels >= 1 "
                         "ActQuantize layer x: the largest level, threshold_param.threshold, must be a whole "
                         "number from 1 to 255, or 0 for 127, not -127\\n")
        sys.stderr.flush()
        os.abort()
    if name == place + " killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if name == place + " hang":
        open(os.path.join(os.path.dirname(__file__), "hanging"), "w").close()
        time.sleep(1000)
    if name == place + " raise":
        raise RuntimeError("could not\\nfind it")
    if name == place + " print":
        os.write(1, b"x" * 1000)
    if name == place + " log":
        os.write(2, b"much to say\\n" * 100000)

class Blob(object):
    def __init__(self, *shape):
        self.reshape(*shape)
    def reshape(self, *shape):
        self.data = numpy.zeros(shape, "f4")
    shape = property(lambda self: self.data.shape)
    count = property(lambda self: self.data.size)

class Layer(object):
    type = "Scale"

class Net(object):
    def __init__(self, path, phase):
        text = open(path).read()
        self.name = re.search('name: "(.*)"', text).group(1)
        shape = [int(dim) for dim in re.findall(r"dim: (\\d+)", text)]
        self._layer_names = ["double"]
        self.top_names = {"double": ["double"]}
        self.layers = [Layer()]
        self.blobs = OrderedDict([("data", Blob(*shape)), ("double", Blob(*shape))])
        self.params = OrderedDict([("double", [Blob(shape[1])])])
        misbehave(self.name, "open")
    def reshape(self):
        self.blobs["double"].reshape(*self.blobs["data"].shape)
    def _forward(self, start, end):
        misbehave(self.name, "run")
        factor = self.params["double"][0].data[:, None, None]
        self.blobs["double"].data[...] = factor * self.blobs["data"].data
'''

SHAPE = (2, 3, 4)


@pytest.fixture
def fake_path(tmp_path):
    (tmp_path / "caffe").mkdir()
    (tmp_path / "caffe" / "__init__.py").write_text(FAKE_CAFFE)
    return str(tmp_path)


def net_named(name):
    net = NetParameter(name=name)
    layer = net.layer.add(name="double", type="Scale", bottom=["data"], top=["double"])
    layer.scale_param.bias_term = False
    weights = Weights()
    weights.add(layer, [np.full(SHAPE[0], 2, np.float32)])
    return net, weights


def open_net(name, fake_path, shape=SHAPE, timeout=60.0):
    net, weights = net_named(name)
    if shape != SHAPE:
        weights.replace("double", [np.full(shape[0], 2, np.float32)])
    return CaffeEngine(net, weights, {"data": shape}, [sys.executable], fake_path, threads=1, timeout=timeout)


def double(engine, batch=5):
    images = np.arange(batch * np.prod(SHAPE), dtype=np.float32).reshape(batch, *SHAPE)
    result = engine.compile(0, 1, ["double"]).run({"data": images})
    return images, result.blobs["double"]


@pytest.mark.parametrize("name", ["well-behaved", "open print", "run print", "open log", "run log"])
def test_runs_whatever_is_printed(name, fake_path):
    engine = open_net(name, fake_path)
    for batch in (5, 1, 7):
        images, doubled = double(engine, batch)
        np.testing.assert_array_equal(doubled, 2 * images)
    engine.close()
    assert not engine.worker.alive


def test_outputs_go_where_asked_and_unchanged_blobs_pass(fake_path):
    engine = open_net("well-behaved", fake_path)
    images = np.random.default_rng(0).normal(size=(3, *SHAPE)).astype(np.float32)
    into = {"double": np.empty_like(images), "data": np.empty_like(images)}
    result = engine.compile(0, 1, ["double", "data"], ["double"]).run({"data": images}, into)
    assert result.blobs["double"] is into["double"]
    assert result.blobs["data"] is into["data"]
    np.testing.assert_array_equal(into["double"], 2 * images)
    np.testing.assert_array_equal(into["data"], images)
    moments = result.moments["double"]
    assert moments.count == 3 * 12
    np.testing.assert_allclose(moments.mean, 2 * images.mean((0, 2, 3), dtype=np.float64), rtol=1e-6)
    np.testing.assert_allclose(
        moments.m2 / moments.count, 4 * images.var((0, 2, 3), dtype=np.float64), rtol=1e-6
    )
    engine.close()


def test_an_empty_range_passes_its_blobs(fake_path):
    engine = open_net("well-behaved", fake_path)
    images = np.ones((3, *SHAPE), np.float32)
    nothing = engine.compile(0, 0, ["data"])
    assert nothing.inputs == ("data",)
    np.testing.assert_array_equal(nothing.run({"data": images}).blobs["data"], images)
    engine.close()


def test_arrays_larger_than_a_pipe_holds(fake_path):
    engine = open_net("well-behaved", fake_path, shape=(3, 300, 300))
    images = np.random.default_rng(0).normal(size=(4, 3, 300, 300)).astype(np.float32)
    result = engine.compile(0, 1, ["double"]).run({"data": images})
    np.testing.assert_array_equal(result.blobs["double"], 2 * images)
    engine.close()


def test_new_blobs_are_used_and_checked(fake_path):
    engine = open_net("well-behaved", fake_path)
    engine.set_blobs("double", [np.array([3, 4], np.float32)])
    images, scaled = double(engine)
    np.testing.assert_array_equal(scaled, images * np.float32([3, 4]).reshape(2, 1, 1))
    with pytest.raises(LabelfreeError, match=r"layer double has blobs of \[2\] values in Caffe, not \[3\]"):
        engine.worker.call(
            "setting", {"op": "set_blobs", "net": 1, "layer": "double"}, [np.ones(3, np.float32)]
        )
    engine.close()


def test_blobs_of_a_layer_that_the_net_lacks_are_kept(fake_path):
    net, weights = net_named("well-behaved")
    weights.add(LayerParameter(name="other", type="Scale"), [np.ones(9, np.float32)])
    engine = CaffeEngine(net, weights, {"data": SHAPE}, [sys.executable], fake_path, threads=1)
    engine.set_blobs("other", [np.zeros(9, np.float32)])
    np.testing.assert_array_equal(engine.weights["other"][0], np.zeros(9))
    engine.close()


def test_nets_share_a_worker(fake_path):
    worker = Worker([sys.executable], fake_path, threads=1)
    engines = [CaffeEngine(*net_named("shared"), {"data": SHAPE}, worker=worker) for _ in range(2)]
    engines[0].set_blobs("double", [np.zeros(2, np.float32)])
    engines[0].close()
    images, doubled = double(engines[1])
    np.testing.assert_array_equal(doubled, 2 * images)
    worker.close()
    engines[1].close()


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["/no/such/python"], "cannot start '/no/such/python'"),
        (["sh", "-c", "echo chroot: no such root >&2; exit 125"], "exit code 125.*chroot: no such root"),
        (["sh", "-c", "yes"], "it printed text instead of starting the worker"),
        (["sh", "-c", "echo labelfree pycaffe worker 1; yes"], "its answer is not a frame"),
        (["sh", "-c", "exec <&-; sleep 100"], "no answer within 1 s"),
        ([sys.executable, "-S", "-s", "-E"], "numpy"),
    ],
)
def test_a_command_that_is_no_pycaffe(command, words, tmp_path):
    with pytest.raises(InputError, match=words) as caught:
        Worker(command, str(tmp_path), timeout=1 if "sleep" in command[-1] else 30)
    assert str(caught.value).startswith("caffe.python: ")
    assert "\n" not in str(caught.value)


def test_an_interpreter_without_caffe(tmp_path):
    with pytest.raises(
        InputError, match=r"No module named 'caffe'; check caffe\.python, caffe\.pycaffe_path"
    ):
        Worker([sys.executable], str(tmp_path))


def test_a_wrapper_may_print_first(fake_path):
    worker = Worker(["sh", "-c", f'echo welcome; {sys.executable} "$@"', "sh"], fake_path)
    assert worker.versions["numpy"] == np.__version__
    worker.close()


def test_preload_loads_a_library_or_says_why_not(fake_path):
    Worker([sys.executable], fake_path, preload="libm.so.6").close()
    with pytest.raises(InputError, match=r"/no/such/lib\.so: cannot open.*caffe\.preload"):
        Worker([sys.executable], fake_path, preload="/no/such/lib.so")


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (
            "check",
            r"\(SIGABRT\): Check failed: .* type: ActQuantize \(layer_factory.hpp:81\); .*labelfree layers",
        ),
        ("old layer", r"not -127 \(act_quantize.cpp:24\); its ActQuantize is older than codes of both signs"),
        ("killed", r"\(SIGKILL\)"),
        ("hang", r"no answer within 2 s"),
        ("raise", r"RuntimeError: could not find it"),
    ],
)
@pytest.mark.parametrize("place", ["open", "run"])
def test_a_worker_that_fails(place, fault, words, fake_path):
    timeout = 2.0 if fault == "hang" else 60.0
    error = InputError if place == "open" else LabelfreeError
    with pytest.raises(error, match=words) as caught:
        double(open_net(f"{place} {fault}", fake_path, timeout=timeout))
    assert "\n" not in str(caught.value)


def test_a_dead_worker_stays_dead(fake_path):
    engine = open_net("run check", fake_path)
    for _ in range(2):
        with pytest.raises(LabelfreeError, match="ActQuantize"):
            double(engine)
    engine.close()


def test_a_hanging_child_of_a_wrapper_is_ended(fake_path, tmp_path):
    pid_file = tmp_path / "pid"
    script = f'{sys.executable} "$@" & echo $! > {pid_file}; wait'
    net, weights = net_named("run hang")
    # `&` gives the child no input, hence the copy of descriptor 0
    script = script.replace('"$@" &', '"$@" <&3 &')
    command = ["sh", "-c", f"exec 3<&0; {script}", "sh"]
    engine = CaffeEngine(net, weights, {"data": SHAPE}, command, fake_path, timeout=3)
    with pytest.raises(LabelfreeError, match="no answer within 3 s"):
        double(engine)
    assert gone(int(pid_file.read_text()))


PARENT = """
import sys
sys.path.insert(0, {tests!r})
from test_caffe_engine import open_net, double
engine = open_net("run hang", {fake_path!r})
print(engine.worker._process.pid, flush=True)
double(engine)
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_child_outlives_its_parent(how, fake_path):
    # A worker in the middle of a forward pass notices at its end that nobody listens: hence the short one.
    module = Path(fake_path) / "caffe" / "__init__.py"
    module.write_text(
        FAKE_CAFFE.replace("time.sleep(1000)", f"time.sleep({1000 if how == signal.SIGINT else 3})")
    )
    source = PARENT.format(tests=str(Path(__file__).parent), fake_path=fake_path)
    parent = subprocess.Popen([sys.executable, "-c", source], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    child = int(parent.stdout.readline())
    assert waited(module.with_name("hanging").exists)
    parent.send_signal(how)
    _, errors = parent.communicate(timeout=20)
    assert parent.returncode != 0
    assert how != signal.SIGINT or b"KeyboardInterrupt" in errors
    assert gone(child)


def waited(condition, seconds=10):
    """Whether a condition becomes true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def gone(pid):
    """Whether a process ends in time (a zombie counts as ended)."""
    status = Path(f"/proc/{pid}/stat")

    def ended():
        return not status.exists() or status.read_text().rsplit(")", 1)[1].split()[0] == "Z"

    if waited(ended):
        return True
    os.kill(pid, signal.SIGKILL)
    return False


def test_the_worker_keeps_to_what_python_2_understands():
    source = resources.files("quantize.engines.caffe").joinpath("worker.py").read_text("utf-8")
    assert source.isascii()
    newer = (ast.JoinedStr, ast.AnnAssign, ast.NamedExpr, ast.Nonlocal, ast.YieldFrom, ast.Match, ast.MatMult)
    for node in ast.walk(ast.parse(source)):
        assert not isinstance(node, newer), ast.dump(node)
        assert not isinstance(node, ast.arg) or node.annotation is None
        assert not isinstance(node, ast.FunctionDef) or (node.returns is None and not node.args.kwonlyargs)
        assert not isinstance(node, ast.Raise) or node.cause is None
        assert not isinstance(node, ast.Call) or not (
            getattr(node.func, "id", "") == "super" and not node.args
        )
