"""The onnx engine: ranges, buffers, moments, batches; the layers themselves are in test_onnx_layers."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantize.caffenet import NetParameter, Weights, filter_net, inference_net, live_blobs, single_assignment
from quantize.engines.onnx.engine import CACHE_BYTES, OnnxEngine, split
from quantize.engines.onnx.graph import Graph
from quantize.engines.onnx.layers import TRANSLATORS
from quantize.errors import InputError, LabelfreeError
from quantize.numerics.moments import Moments, moments_of
from tests.nets import CROPPED, RESIDUAL, parse, random_weights

SCORES = "fc2"
BATCH = 7


def residual() -> tuple[NetParameter, Weights]:
    net = inference_net(filter_net(parse(RESIDUAL), 1), ["data"])
    return net, random_weights(net, {"data": CROPPED})


def images(count: int = BATCH, shape: tuple[int, ...] = CROPPED) -> np.ndarray:
    return np.random.default_rng(3).normal(size=(count, *shape)).astype(np.float32)


def residual_engine(**options: int) -> OnnxEngine:
    net, weights = residual()
    return OnnxEngine(net, weights, {"data": CROPPED}, **options)


def whole(engine: OnnxEngine, feeds: dict[str, np.ndarray], *outputs: str) -> dict[str, np.ndarray]:
    return engine.compile(0, len(engine.net.layer), outputs).run(feeds).blobs


def close(found: np.ndarray, wanted: np.ndarray, tolerance: float = 1e-5) -> None:
    np.testing.assert_allclose(found, wanted, rtol=0, atol=tolerance * np.abs(wanted).max())


# ---- Ranges ----


@pytest.mark.parametrize("renamed", [False, True])
def test_a_net_cut_anywhere_gives_the_same(renamed: bool) -> None:
    engine = residual_engine()
    wanted = whole(engine, {"data": images()}, SCORES)[SCORES]
    if renamed:
        net, weights = residual()
        engine = OnnxEngine(single_assignment(net), weights, {"data": CROPPED})
    last = len(engine.net.layer)
    for place in range(1, last):
        live = live_blobs(engine.net, place, [SCORES])
        feeds = engine.compile(0, place, live).run({"data": images()}).blobs
        rest = engine.compile(place, last, [SCORES])
        assert set(rest.inputs) <= set(live)
        close(rest.run({name: feeds[name] for name in rest.inputs}).blobs[SCORES], wanted)


def test_layer_by_layer_gives_the_same() -> None:
    engine = residual_engine()
    feeds = {"data": images()}
    for place, following in pairwise(range(len(engine.net.layer) + 1)):
        outputs = live_blobs(engine.net, following, [SCORES])
        feeds = engine.compile(place, following, outputs).run(feeds).blobs
        for name in outputs:
            assert feeds[name].shape == (BATCH, *engine.shapes.blobs[name][1:])
    close(feeds[SCORES], whole(engine, {"data": images()}, SCORES)[SCORES])


def test_an_in_place_name_is_the_value_at_the_range_s_end() -> None:
    net = parse(
        'layer { name: "a" type: "Power" bottom: "x" top: "x" power_param { shift: 1 } }'
        'layer { name: "b" type: "Power" bottom: "x" top: "y" power_param { scale: 10 } }'
        'layer { name: "c" type: "Power" bottom: "x" top: "x" power_param { scale: -1 } }'
        'layer { name: "d" type: "Eltwise" bottom: "x" bottom: "y" top: "z" }'
    )
    engine = OnnxEngine(net, Weights(), {"x": (1,)})
    x = np.ones((2, 1), np.float32)
    found = engine.compile(0, 4, ["x", "y", "z"]).run({"x": x}).blobs
    assert [float(found[name][0, 0]) for name in "xyz"] == [-2, 20, 18]
    assert float(engine.compile(0, 2, ["x"]).run({"x": x}).blobs["x"][0, 0]) == 2
    assert float(engine.compile(2, 3, ["x"]).run({"x": x}).blobs["x"][0, 0]) == -1
    assert (x == 1).all()


def test_only_what_the_outputs_need_is_read_and_translated(monkeypatch: pytest.MonkeyPatch) -> None:
    net = parse(
        'layer { name: "a" type: "ReLU" bottom: "x" top: "y" }'
        'layer { name: "b" type: "TanH" bottom: "u" top: "v" }'
        'layer { name: "c" type: "Crop" bottom: "x" bottom: "v" top: "z" }'
    )
    monkeypatch.delitem(TRANSLATORS, "TanH")
    engine = OnnxEngine(net, Weights(), {"x": (1, 3, 3), "u": (1, 2, 2)})
    assert engine.compile(0, 3, ["y"]).inputs == ("x",)
    with pytest.raises(
        InputError, match=r"^layer 'b' \(TanH\): .* does not know this type.* Convolution, .*"
    ):
        engine.compile(0, 3, ["v"])
    monkeypatch.undo()
    assert engine.compile(0, 3, ["z"]).inputs == ("x",)  # of v only the sizes are needed


def test_blobs_that_no_layer_writes_are_passed_through() -> None:
    engine = residual_engine()
    x = images()
    run = engine.compile(0, 1, ["data", "conv1"], ["data"])
    found = run.run({"data": x})
    np.testing.assert_array_equal(found.blobs["data"], x)
    assert found.blobs["data"] is not x
    assert found.moments["data"].count == x.size // x.shape[1]
    empty = engine.compile(1, 1, ["data"])
    into = np.empty_like(x)
    assert empty.run({"data": x}, {"data": into}).blobs["data"] is into
    np.testing.assert_array_equal(into, x)


def test_two_names_for_one_value() -> None:
    net = parse(
        'layer { name: "s" type: "Split" bottom: "x" top: "a" top: "b" }'
        'layer { name: "r" type: "ReLU" bottom: "a" top: "c" }'
        'layer { name: "t" type: "Split" bottom: "c" top: "d" top: "e" }'
        'layer { name: "p" type: "DummyData" top: "f" '
        "dummy_data_param { shape { dim: 2 } data_filler { value: 3 } } }"
    )
    x = images(2, (3,))
    found = whole(OnnxEngine(net, Weights(), {"x": (3,)}), {"x": x}, *"xabcdef")
    for name in "xab":
        np.testing.assert_array_equal(found[name], x)
    for name in "cde":
        np.testing.assert_array_equal(found[name], np.maximum(x, 0))
    np.testing.assert_array_equal(found["f"], [3, 3])
    assert len({blob.ctypes.data for blob in found.values()}) == 7


def test_an_input_layer_is_fed() -> None:
    net = parse(
        'layer { name: "i" type: "Input" top: "x" input_param { shape { dim: 9 dim: 3 } } }'
        'layer { name: "r" type: "ReLU" bottom: "x" top: "y" }'
    )
    x = images(2, (3,))
    found = whole(OnnxEngine(net, Weights(), {"x": (3,)}), {"x": x}, "y")
    np.testing.assert_array_equal(found["y"], np.maximum(x, 0))


@pytest.mark.parametrize("name", ["a b", "ä/ö", 'quote"', "t1", " "])
def test_blobs_may_have_any_names(name: str) -> None:
    net = NetParameter()
    net.layer.add(name="l", type="ReLU", bottom=[name], top=[name + "'"])
    x = images(2, (3,))
    found = whole(OnnxEngine(net, Weights(), {name: (3,)}), {name: x}, name + "'")
    np.testing.assert_array_equal(found[name + "'"], np.maximum(x, 0))


# ---- Buffers ----


def test_outputs_are_written_into_the_arrays_given() -> None:
    engine = residual_engine()
    run = engine.compile(0, 6, ["conv1", "left"])
    wanted = run.run({"data": images()}).blobs
    arena = np.full(wanted["conv1"].size + wanted["left"].size, np.nan, np.float32)
    conv1 = arena[: wanted["conv1"].size].reshape(wanted["conv1"].shape)
    left = arena[wanted["conv1"].size :].reshape(wanted["left"].shape)
    found = run.run({"data": images()}, {"conv1": conv1, "left": left}).blobs
    assert found["conv1"] is conv1
    assert found["left"] is left
    np.testing.assert_array_equal(conv1, wanted["conv1"])
    np.testing.assert_array_equal(left, wanted["left"])


def test_feeds_are_left_as_they_are() -> None:
    engine = residual_engine()
    x = images()
    whole(engine, {"data": x}, SCORES)
    np.testing.assert_array_equal(x, images())
    conv1 = engine.compile(0, 1, ["conv1"]).run({"data": x}).blobs["conv1"]
    before = conv1.copy()
    engine.compile(1, 4, ["conv1"]).run({"conv1": conv1})
    np.testing.assert_array_equal(conv1, before)


def test_fresh_outputs_are_not_reused() -> None:
    run = residual_engine().compile(0, 1, ["conv1"])
    first = run.run({"data": images()}).blobs["conv1"]
    kept = first.copy()
    run.run({"data": images() * 2})
    np.testing.assert_array_equal(first, kept)


@pytest.mark.parametrize(
    "wrong",
    [
        images().astype(np.float64),
        images()[:, :, ::2],
        images()[:, :, :, :-1].copy(),
        images().transpose(0, 1, 3, 2),
        images()[:, 0],
    ],
    ids=["float64", "strided", "narrow", "transposed", "3-D"],
)
def test_arrays_of_the_wrong_kind_are_refused(wrong: np.ndarray) -> None:
    run = residual_engine().compile(0, 1, ["conv1"])
    with pytest.raises(ValueError, match="'data' must be C-contiguous float32 of the shape"):
        run.run({"data": wrong})
    with pytest.raises(ValueError, match="'conv1' must be C-contiguous float32 of the shape"):
        run.run({"data": images()}, {"conv1": wrong})


def test_unaligned_weights() -> None:
    """Blobs of a caffemodel may lie at any byte."""
    net, weights = residual()
    wanted = whole(OnnxEngine(net, weights, {"data": CROPPED}), {"data": images()}, SCORES)[SCORES]
    shifted = weights.copy()
    for layer in weights.layers():
        blobs = []
        for blob in weights[layer]:
            room = np.empty(blob.nbytes + 1, np.uint8)
            room[1:] = blob.reshape(-1).view(np.uint8)
            blobs.append(room[1:].view(np.float32).reshape(blob.shape))
        shifted.replace(layer, blobs)
        assert not any(blob.flags.aligned for blob in shifted[layer])
    found = whole(OnnxEngine(net, shifted, {"data": CROPPED}), {"data": images()}, SCORES)[SCORES]
    np.testing.assert_array_equal(found, wanted)


# ---- Batches, parts and threads ----


def test_results_do_not_depend_on_the_micro_batch() -> None:
    engine = residual_engine()
    last = len(engine.net.layer)
    outputs, measured = [SCORES, "conv1"], ["sum", SCORES]
    wanted = engine.compile(0, last, outputs, measured).run({"data": images()})
    run = residual_engine(part_bytes=1).compile(0, last, outputs, measured)
    found = run.run({"data": images()})
    for name in outputs:
        close(found.blobs[name], wanted.blobs[name], 1e-6)
    for name in measured:
        close(found.moments[name].mean, wanted.moments[name].mean, 1e-6)
        close(found.moments[name].m2, wanted.moments[name].m2, 1e-6)
        assert found.moments[name].count == wanted.moments[name].count
    one = np.concatenate([run.run({"data": images()[i : i + 1]}).blobs[SCORES] for i in range(BATCH)])
    close(one, wanted.blobs[SCORES], 1e-6)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_results_do_not_depend_on_threads(threads: int) -> None:
    wanted = whole(residual_engine(), {"data": images()}, SCORES)[SCORES]
    engine = residual_engine(threads=threads)
    assert engine.threads == threads
    close(whole(engine, {"data": images()}, SCORES)[SCORES], wanted, 1e-6)


def test_first_axes_that_are_multiples_of_the_batch() -> None:
    net = parse(
        'layer { name: "r" type: "Reshape" bottom: "x" top: "y" reshape_param { shape { dim: -1 dim: 3 } } }'
        'layer { name: "a" type: "AbsVal" bottom: "y" top: "z" }'
    )
    engine = OnnxEngine(net, Weights(), {"x": (2, 3)}, part_bytes=1)
    x = images(BATCH, (2, 3))
    y = engine.compile(0, 1, ["y"]).run({"x": x}).blobs["y"]
    found = engine.compile(1, 2, ["z"], ["z"]).run({"y": y})
    np.testing.assert_array_equal(found.blobs["z"], np.abs(x.reshape(-1, 3)))
    wanted = moments_of(found.blobs["z"])
    assert found.moments["z"].count == wanted.count
    close(found.moments["z"].mean, wanted.mean)
    close(found.moments["z"].m2, wanted.m2)


def test_blobs_set_serve_the_ranges_compiled_afterwards() -> None:
    engine = residual_engine()
    before = engine.compile(0, 1, ["conv1"])
    old = before.run({"data": images()}).blobs["conv1"]
    blobs = engine.weights["conv1"]
    engine.set_blobs("conv1", [2 * blob for blob in blobs])
    close(engine.compile(0, 1, ["conv1"]).run({"data": images()}).blobs["conv1"], 2 * old)
    close(before.run({"data": images()}).blobs["conv1"], old)
    with pytest.raises(ValueError, match="'conv1' needs blobs of the shapes"):
        engine.set_blobs("conv1", blobs[:1])


def test_failures_of_onnxruntime_are_one_line() -> None:
    net = parse(
        'layer { name: "e" type: "Embed" bottom: "x" top: "y" embed_param { num_output: 2 input_dim: 3 } }'
    )
    weights = random_weights(net, {"x": (1,)})
    with pytest.raises(LabelfreeError, match="running layers 'e' to 'e' in onnxruntime: ") as raised:
        whole(OnnxEngine(net, weights, {"x": (1,)}), {"x": np.full((1, 1), 5, np.float32)}, "y")
    assert "\n" not in str(raised.value)


# ---- Moments ----


def same(found: Moments, wanted: Moments) -> None:
    assert found.count == wanted.count
    scale = np.sqrt(np.square(wanted.mean) + wanted.m2 / wanted.count).max()
    np.testing.assert_allclose(found.mean, wanted.mean, rtol=0, atol=1e-6 * scale)
    np.testing.assert_allclose(found.m2, wanted.m2, rtol=1e-5, atol=1e-6 * wanted.count * scale**2)


@pytest.mark.parametrize("own", [CACHE_BYTES, 1])
@pytest.mark.parametrize("threads", [1, 3])
def test_moments_of_outputs_inputs_and_what_is_neither(own: int, threads: int) -> None:
    net = parse(
        'layer { name: "a" type: "Power" bottom: "x" top: "y" power_param { scale: 2 shift: 1 } }'
        'layer { name: "b" type: "AbsVal" bottom: "y" top: "z" }'
        'layer { name: "c" type: "Power" bottom: "z" top: "z" power_param { scale: -1 } }'
    )
    engine = OnnxEngine(net, Weights(), {"x": (3, 5, 4)}, threads, own)
    x = images(BATCH, (3, 5, 4))
    found = engine.compile(0, 3, ["z"], ["x", "y", "z"]).run({"x": x})
    assert set(found.blobs) == {"z"}
    y = 2 * x + 1
    for name, values in (("x", x), ("y", y), ("z", -np.abs(y))):
        same(found.moments[name], moments_of(values))
    only = engine.compile(0, 1, [], ["x"])
    assert only.inputs == ("x",)
    assert only.run({"x": x}).blobs == {}
    same(only.run({"x": x}).moments["x"], moments_of(x))


def test_moments_of_what_no_image_changes() -> None:
    """It is there once, however many parts and threads run the batch."""
    net = parse(
        'layer { name: "p" type: "DummyData" top: "f" '
        "dummy_data_param { shape { dim: 2 dim: 3 } data_filler { value: 3 } } }"
        'layer { name: "r" type: "ReLU" bottom: "x" top: "y" }'
    )
    engine = OnnxEngine(net, Weights(), {"x": (3,)}, 2)
    found = engine.compile(0, 2, ["y"], ["f", "y"]).run({"x": images(8, (3,))}).moments
    assert (found["f"].count, found["y"].count) == (2, 8)
    np.testing.assert_array_equal(found["f"].mean, [3, 3, 3])


def test_moments_of_a_blob_of_one_axis() -> None:
    net = parse('layer { name: "r" type: "Reduction" bottom: "x" top: "y" reduction_param { axis: 1 } }')
    x = images(BATCH, (3, 4))
    found = whole_moments(OnnxEngine(net, Weights(), {"x": (3, 4)}), x, "y")["y"]
    same(found, moments_of(x.sum(axis=(1, 2))))


def whole_moments(engine: OnnxEngine, x: np.ndarray, *measured: str) -> dict[str, Moments]:
    return engine.compile(0, len(engine.net.layer), [], measured).run({"x": x}).moments


# ---- A net of many kinds ----


def norm(name: str) -> str:
    return (
        f'layer {{ name: "{name}_bn" type: "BatchNorm" bottom: "{name}" top: "{name}" }}\n'
        f'layer {{ name: "{name}_scale" type: "Scale" bottom: "{name}" top: "{name}" '
        "scale_param { bias_term: true } }\n"
    )


def conv(name: str, bottom: str, param: str) -> str:
    return (
        f'layer {{ name: "{name}" type: "Convolution" bottom: "{bottom}" top: "{name}" '
        f"convolution_param {{ {param} }} }}\n"
    )


def layer(name: str, kind: str, bottoms: list[str], param: str = "") -> str:
    reads = " ".join(f'bottom: "{bottom}"' for bottom in bottoms)
    return f'layer {{ name: "{name}" type: "{kind}" {reads} top: "{name}" {param} }}\n'


def relu(name: str) -> str:
    return f'layer {{ name: "{name}_relu" type: "ReLU" bottom: "{name}" top: "{name}" }}\n'


MANY_SHAPE = (3, 8, 6)
MANY_KINDS = parse(
    conv("few", "data", "num_output: 32 kernel_size: 3 pad: 1")
    + norm("few")
    + relu("few")
    + conv("deep", "few", "num_output: 32 kernel_size: 3 pad: 1 group: 32 bias_term: false")
    + norm("deep")
    + relu("deep")
    + conv("groups", "deep", "num_output: 32 kernel_h: 3 kernel_w: 1 pad_h: 1 pad_w: 0 group: 2")
    + norm("groups")
    + layer("sum", "Eltwise", ["groups", "few"])
    + relu("sum")
    + layer("max", "Eltwise", ["sum", "deep"], "eltwise_param { operation: MAX }")
    + layer("odd", "Pooling", ["max"], "pooling_param { kernel_size: 3 stride: 2 }")
    + conv("uneven", "odd", "num_output: 20 kernel_size: 1")
    + relu("uneven")
    + conv("dilated", "odd", "num_output: 16 kernel_size: 3 pad: 2 dilation: 2")
    # No value lies near the middle between two steps, where a fused operator may round the other way.
    + layer(
        "act", "ActQuantize", ["dilated"], "relu_param { negative_slope: 1 } threshold_param { threshold: 9 }"
    )
    + layer("both", "Concat", ["act", "odd"])
    + layer("mixed", "Concat", ["both", "uneven"])
    + layer("average", "Pooling", ["both"], "pooling_param { pool: AVE kernel_size: 2 stride: 2 }")
    + layer("lrn", "LRN", ["average"])
    + conv("back", "lrn", "num_output: 16 kernel_size: 1")
    + layer("leaky", "ReLU", ["back"], "relu_param { negative_slope: 0.1 }")
    + layer("whole", "Pooling", ["leaky"], "pooling_param { pool: AVE global_pooling: true }")
    + layer("fc", "InnerProduct", ["whole"], "inner_product_param { num_output: 5 }")
)


@settings(max_examples=30)
@given(st.lists(st.integers(1, len(MANY_KINDS.layer) - 1), max_size=4), st.integers(1, 5))
def test_whatever_is_fused_or_cut_gives_the_same_blobs_and_moments(cuts: list[int], count: int) -> None:
    """onnxruntime fuses and reorders what it sees in one piece: layer by layer there is nothing to fuse."""
    net = single_assignment(MANY_KINDS)
    shapes = {"data": MANY_SHAPE}
    engine = OnnxEngine(net, random_weights(net, shapes), shapes, 2)
    expected = {"data": images(count, MANY_SHAPE)}
    for place, one in enumerate(net.layer):
        piece = engine.compile(place, place + 1, one.top)
        expected |= piece.run({name: expected[name] for name in piece.inputs}).blobs
    held = {"data": expected["data"]}
    for start, stop in pairwise([0, *sorted(set(cuts)), len(net.layer)]):
        written = [top for one in net.layer[start:stop] for top in one.top]
        piece = engine.compile(start, stop, written, written)
        found = piece.run({name: held[name] for name in piece.inputs})
        held |= found.blobs
        for name in written:
            close(found.blobs[name], expected[name], 1e-4)
            same(found.moments[name], moments_of(found.blobs[name]))


# ---- The graph ----


def test_affines_are_one_pass() -> None:
    """BatchNorm and two Scale layers around it: one operator, whichever of them is asked for."""
    text = "".join(
        f'layer {{ name: "{name}" type: "{kind}" bottom: "x" top: "x" scale_param {{ bias_term: true }} }}'
        for name, kind in (("alpha", "Scale"), ("norm", "BatchNorm"), ("scale", "Scale"))
    )
    net = parse(text)
    weights = random_weights(net, {"x": (3, 4, 4)})
    engine = OnnxEngine(net, weights, {"x": (3, 4, 4)})
    graph = Graph()
    x = graph.input((1, 3, 4, 4), True)
    first = graph.affine(x, (1, 3, 4, 4), [1, 2, 3], 1.0)
    second = graph.affine(first, (1, 3, 4, 4), 2.0, [0, 1, 0])
    graph.output(graph.affine(second, (1, 3, 4, 4), 1.0, 5.0))
    model, _, _ = graph.model()
    assert [node.op_type for node in model.graph.node] == ["BatchNormalization"]
    graph.output(first)
    model, _, _ = graph.model()
    assert len(model.graph.node) == 2
    values = images(2, (3, 4, 4))
    stepwise = values
    for place in range(3):
        stepwise = engine.compile(place, place + 1, ["x"]).run({"x": stepwise}).blobs["x"]
    close(whole(engine, {"x": values}, "x")["x"], stepwise)


def test_weights_are_not_copied_into_the_model() -> None:
    graph = Graph()
    x = graph.input((1, 1000), True)
    weights = np.ones((1000, 500), np.float32)
    graph.output(graph.op("MatMul", x, graph.floats(weights)))
    model, _, external = graph.model()
    assert model.ByteSize() < 1000
    (array,) = external.values()
    assert np.shares_memory(array, weights)


@given(st.integers(1, 300), st.integers(1, 40), st.integers(1, 9))
def test_threads_get_equal_shares(batch: int, most: int, threads: int) -> None:
    parts = split(batch, most, threads)
    assert [i for part in parts for i in range(batch)[part]] == list(range(batch))
    sizes = [part.stop - part.start for part in parts]
    assert min(sizes) >= 1
    assert max(sizes) <= min(most, min(sizes) + 1)
    assert len(parts) % threads == 0 or len(parts) == batch
