"""Every translator against the formula in numpy, over the grid of cases that real Caffe is compared on."""

import numpy as np
import pytest

from quantize.arrays import FloatArray
from quantize.caffenet import NetParameter, Weights, infer_shapes
from quantize.engines.onnx.engine import OnnxEngine
from quantize.engines.onnx.layers import TRANSLATORS
from quantize.errors import InputError, LabelfreeError
from tests.caffe import test_parity
from tests.caffe.test_parity import Case, feeds_of, net_of, relative_error, weights_of
from tests.engines import fork_formulas
from tests.engines.layer_formulas import FORMULAS
from tests.nets import parse

TOLERANCE = 1e-5
"""Of the largest absolute value of a blob."""

BATCH = 3
CASES = [*test_parity.CASES, *fork_formulas.CASES]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_formula(case: Case) -> None:
    rng = np.random.default_rng(len(str(case)))
    net = net_of(case)
    layer = net.layer[-1]
    weights = weights_of(case, net, rng)
    feeds = feeds_of(case, rng)
    found = run(net, weights, feeds)
    blobs = weights["layer"] if weights.layers()[-1:] == ["layer"] else []
    given = feeds if case.table is None else {"table": weights["table"][0], **feeds}
    bottoms = [given[name].astype(np.float64) for name in layer.bottom]
    wanted = FORMULAS[layer.type](layer, bottoms, [blob.astype(np.float64) for blob in blobs])
    shapes = infer_shapes(net, {name: feed.shape for name, feed in feeds.items()}).blobs
    for name, value in zip(layer.top, wanted, strict=True):
        assert shapes[name] == value.shape
        assert relative_error(found[name], value) <= TOLERANCE


def run(net: NetParameter, weights: Weights, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    engine = OnnxEngine(net, weights, {name: feed.shape[1:] for name, feed in feeds.items()}, threads=1)
    return (
        engine.compile(0, len(net.layer), [top for layer in net.layer for top in layer.top]).run(feeds).blobs
    )


def test_every_translator_has_a_formula_and_cases() -> None:
    assert set(FORMULAS) == set(TRANSLATORS) == {case.type for case in CASES}


def test_the_last_of_equal_values_comes_first() -> None:
    """std::greater on pairs of value and place, as ArgMaxLayer sorts."""
    x = np.array([[1, 3, 3, 0, 3]], np.float32)
    net = parse('layer { name: "l" type: "ArgMax" bottom: "x" top: "y" argmax_param { axis: 1 top_k: 3 } }')
    np.testing.assert_array_equal(run(net, Weights(), {"x": x})["y"], [[4, 2, 1]])


def test_codes_round_half_up_and_stay_in_range() -> None:
    net = parse(
        'layer { name: "l" type: "ActQuantize" bottom: "x" top: "y" relu_param { negative_slope: 0.5 } }'
    )
    x = np.array([[-1, 0.24, 0.25, 0.74, 0.75, 1.25, 63.2, 63.3, 1e30]], np.float32)
    wanted = [[0, 0, 0.5, 0.5, 1, 1.5, 63, 63.5, 63.5]]
    np.testing.assert_array_equal(run(net, Weights(), {"x": x})["y"], wanted)


def test_signed_codes_round_half_up_and_stay_in_range() -> None:
    net = parse(
        'layer { name: "l" type: "ActQuantize" bottom: "x" top: "y" relu_param { negative_slope: 0.5 } '
        "threshold_param { threshold: -3 } }"
    )
    x = np.array([[-1e30, -1.74, -0.76, -0.75, -0.26, -0.25, 0.25, 1.6, 99]], np.float32)
    wanted = [[-1.5, -1.5, -1, -0.5, -0.5, 0, 0.5, 1.5, 1.5]]
    np.testing.assert_array_equal(run(net, Weights(), {"x": x})["y"], wanted)


def test_a_constant_power_of_infinity() -> None:
    net = parse(
        'layer { name: "l" type: "Power" bottom: "x" top: "y" power_param { scale: 0 shift: 3 power: 2 } }'
    )
    x = np.array([[np.inf, np.nan, 1]], np.float32)
    np.testing.assert_array_equal(run(net, Weights(), {"x": x})["y"], [[9, 9, 9]])


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ('type: "Pooling" pooling_param { pool: STOCHASTIC kernel_size: 2 }', "stochastic pooling"),
        ('type: "ActQuantize" relu_param { negative_slope: 0 }', "must be positive"),
        ('type: "ActQuantize"', "must be positive"),
        *(
            (
                'type: "ActQuantize" relu_param { negative_slope: 1 } '
                f"threshold_param {{ threshold: {L} }}",
                f"threshold_param.threshold is {L}; must be a whole number from -127 to 255",
            )
            for L in (-128, 256, 0.5)
        ),
        ('type: "Exp" exp_param { base: 0 }', "exp_param.base is 0.0; must be positive"),
        ('type: "Log" log_param { base: 1 }', "log_param.base is 1"),
        ('type: "Softmax" softmax_param { axis: 0 }', "along the batch axis"),
        ('type: "Reduction" reduction_param { axis: 0 }', "along the batch axis"),
        ('type: "ArgMax" argmax_param { axis: -4 }', "along the batch axis"),
        ('type: "Concat" concat_param { axis: 0 }', "along the batch axis"),
        ('type: "Tile" tile_param { axis: 0 tiles: 2 }', "along the batch axis"),
        (
            'type: "InnerProduct" inner_product_param { num_output: 2 axis: 0 }',
            "needs a fixed batch or mixes",
        ),
        ('type: "Scale" scale_param { axis: 0 }', "needs a fixed batch or mixes"),
        ('type: "Reshape" reshape_param { shape { dim: 3 dim: -1 } }', "needs a fixed batch or mixes"),
        (
            'type: "Convolution" convolution_param { axis: 2 num_output: 2 kernel_size: 1 }',
            "axis is 2; only 1",
        ),
    ],
)
def test_what_cannot_be_run_is_one_line_with_the_layer(fields: str, words: str) -> None:
    net = parse(f'layer {{ name: "odd" bottom: "x" top: "y" {fields} }}')
    weights = Weights()
    blobs = [np.ones(shape, np.float32) for shape in infer_shapes(net, {"x": (1, 3, 4, 4)}).params["odd"]]
    if blobs:
        weights.add(net.layer[0], blobs)
    with pytest.raises(InputError, match=words) as raised:
        OnnxEngine(net, weights, {"x": (3, 4, 4)}).compile(0, 1, ["y"])
    assert str(raised.value).startswith(f"layer 'odd' ({net.layer[0].type})")
    assert "\n" not in str(raised.value)


def test_rows_of_what_images_gave_are_refused() -> None:
    net = parse('layer { name: "odd" type: "BatchReindex" bottom: "x" bottom: "i" top: "y" }')
    with pytest.raises(InputError, match=r"layer 'odd' \(BatchReindex\): picks images out of the batch"):
        OnnxEngine(net, Weights(), {"x": (3,), "i": ()}).compile(0, 1, ["y"])


@pytest.mark.parametrize("index", [-1, 4, 1e30, np.nan])
def test_rows_that_are_not_there_are_refused(index: float) -> None:
    case = Case("BatchReindex", "", ((),), table=(4, 2))
    net = net_of(case)
    weights = weights_of(case, net, np.random.default_rng(0))
    with pytest.raises(LabelfreeError, match=r"running layers .table. to .layer. in onnxruntime: .*out of"):
        run(net, weights, {"in0": np.array([0, index, 3], np.float32)})


def test_places_of_maxima_need_a_pixel_in_every_window() -> None:
    """5 pixels under windows of 1 every 3 pixels: Caffe rounds up, so the third window lies behind them."""
    param = "pooling_param { pool: MAX kernel_size: 1 stride: 3 %s }"
    layer = 'layer { name: "odd" type: "Pooling" bottom: "x" top: "y" top: "places" ' + param + " }"
    x = np.arange(25, dtype=np.float32).reshape(1, 1, 5, 5)
    with pytest.raises(InputError, match=r"outside the image wholly, .*; use engine: caffe$") as raised:
        run(parse(layer % ""), Weights(), {"x": x})
    assert str(raised.value).startswith("layer 'odd' (Pooling): ")
    assert "\n" not in str(raised.value)
    found = run(parse(layer % "round_mode: FLOOR"), Weights(), {"x": x})
    np.testing.assert_array_equal(found["places"], [[[[0, 3], [15, 18]]]])


@pytest.mark.parametrize("param", ["pool: MAX", "pool: AVE pad: 1", "pool: AVE"])
def test_ceil_mode_of_the_forks_is_round_mode(param: str) -> None:
    """What round_mode gives is compared with Caffe (tests/caffe/test_parity.py)."""
    layer = 'layer { name: "pool" type: "Pooling" bottom: "x" top: "y" pooling_param { %s } }'
    x = np.random.default_rng(0).normal(size=(2, 3, 8, 11)).astype(np.float32)

    def pooled(mode: str) -> FloatArray:
        return run(parse(layer % f"{param} kernel_size: 3 stride: 2 {mode}"), Weights(), {"x": x})["y"]

    np.testing.assert_array_equal(pooled("ceil_mode: false"), pooled("round_mode: FLOOR"))
    np.testing.assert_array_equal(pooled("ceil_mode: true"), pooled(""))
    assert pooled("ceil_mode: false").shape[2:] == (4 if "pad" in param else 3, 6 if "pad" in param else 5)


def test_dummy_data_must_be_constant() -> None:
    text = 'dummy_data_param { shape { dim: 1 dim: 2 } data_filler { type: "gaussian" } }'
    net = parse(f'layer {{ name: "odd" type: "DummyData" top: "y" {text} }}')
    with pytest.raises(InputError, match="must be of type 'constant'"):
        OnnxEngine(net, Weights(), {}).compile(0, 1, ["y"])
