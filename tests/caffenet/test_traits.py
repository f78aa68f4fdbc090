"""Traits against what the layers compute."""

from pathlib import Path

import numpy as np
import pytest

from quantize.caffenet import LayerParameter, NetParameter, infer_shapes
from quantize.caffenet.shape_rules import _rules
from quantize.caffenet.traits import _ROWS, Trait, passed_on, traits_of, types_with
from quantize.engines.onnx.engine import OnnxEngine
from quantize.engines.onnx.layers import TRANSLATORS
from tests.nets import parse, random_weights

DOCS = Path(__file__).parents[2] / "docs"
SHAPE = (4, 6, 5)
CONVOLUTION = "convolution_param { num_output: 4 kernel_size: 3 }"
CASES = {
    "Convolution": [CONVOLUTION],
    "ConvolutionDepthwise": [CONVOLUTION],
    "DepthwiseConvolution": [CONVOLUTION],
    "Deconvolution": [CONVOLUTION],
    "InnerProduct": ["inner_product_param { num_output: 4 }"],
    "Scale": ["scale_param { bias_term: true }", "scale_param { axis: 2 }", "scale_param { num_axes: 0 }"],
    "ReLU": ["", "relu_param { negative_slope: 0.1 }", "relu_param { negative_slope: -0.5 }"],
    "ELU": ["", "elu_param { alpha: -0.7 }"],
    "Clip": ["clip_param { min: -0.3 max: 0.4 }"],
    "Threshold": ["threshold_param { threshold: 0.2 }"],
    "Exp": ["", "exp_param { base: 2 scale: -1 }"],
    "Log": ["log_param { base: 2 shift: 20 }"],
    "Power": ["", "power_param { power: 2 scale: 0.5 shift: 1 }", "power_param { scale: -1 }"],
    "ActQuantize": ["relu_param { negative_slope: 0.2 }"],
    "Quant": ["relu_param { negative_slope: 0.2 } threshold_param { threshold: -3 }"],
    "Pooling": ["pooling_param { kernel_size: 2 stride: 2 }", "pooling_param { pool: AVE kernel_size: 2 }"],
    "SPP": ["spp_param { pyramid_height: 2 pool: MAX }"],
    "Im2col": ["convolution_param { kernel_size: 2 }"],
    "Reshape": ["reshape_param { shape { dim: 0 dim: -1 } }"],
    "Tile": ["tile_param { tiles: 2 }"],
    "Reduction": ["reduction_param { axis: 1 }"],
    "BatchNorm": ["", "batch_norm_param { scale_bias: true }"],
    "BN": ["", "bn_param { bn_mode: INFERENCE }"],
    "Normalize": ["", "norm_param { across_spatial: false }"],
    "HardSigmoid": ["", "hard_sigmoid_param { alpha: -1 }"],
    "Permute": ["permute_param { order: 0 order: 2 }"],
    "ShuffleChannel": ["shuffle_channel_param { group: 2 }"],
    "Reorg": ["reorg_param { stride: 2 reverse: true }"],
    "Upsample": ["upsample_param { scale: 2 }"],
    "Interp": ["interp_param { zoom_factor: 2 }"],
}
"""Parameters to try; none for the other types."""
OF_TWO = {
    "Scale": "scale_param { axis: 0 }",
    "Bias": "bias_param { axis: 0 }",
    "Eltwise": "",
    "Concat": "",
    "Crop": "",
}
"""Types that may have two bottoms, and with which parameters."""
SOURCES = ("Parameter", "DummyData", "Input", "MemoryData")
ODD = ("Embed", "BatchReindex", "Silence", "Accuracy", "Axpy")
"""They take no values of pixels, or make none, or take several bottoms of different shapes."""
TYPES = sorted(set(TRANSLATORS) - {*SOURCES, *ODD})


LEFT_OUT = {
    *(
        "Scale",
        "Bias",
        "PReLU",
        "BN",
        "CuDNNBatchNorm",
        "BatchNorm",
    ),  # what they are depends on their blobs as well
    *("Exp", "Log", "Power"),  # they may rise or fall: nobody has needed to know
    *("Split", "Slice", "Concat", "Crop", "Eltwise"),  # with one bottom and one top they may change nothing
}


def layer(kind: str, text: str, bottoms: int = 1) -> LayerParameter:
    reads = " ".join(f'bottom: "x{i}"' for i in range(bottoms))
    return parse(f'layer {{ name: "l" type: "{kind}" {reads} top: "y" {text} }}').layer[0]


def cases(kind: str) -> list[LayerParameter]:
    alone = [] if kind in ("Eltwise", "Crop") else [layer(kind, text) for text in CASES.get(kind, [""])]
    return [*alone, *([layer(kind, OF_TWO[kind], 2)] if kind in OF_TWO else [])]


ALL = [pytest.param(each, id=f"{each.type}-{i}") for kind in TYPES for i, each in enumerate(cases(kind))]


class Run:
    """A layer with random blobs, to be run on values."""

    def __init__(self, one: LayerParameter) -> None:
        net = NetParameter(layer=[one])
        shapes = dict.fromkeys(one.bottom, SHAPE)
        self.engine = OnnxEngine(net, random_weights(net, shapes), shapes, 1)
        self.piece = self.engine.compile(0, 1, ["y"])
        self.others = {name: draw(i) for i, name in enumerate(one.bottom) if i}

    def __call__(self, x: np.ndarray) -> np.ndarray:
        feeds = {"x0": np.ascontiguousarray(x), **self.others}
        return self.piece.run({name: feeds[name] for name in self.piece.inputs}).blobs["y"]


def draw(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(2, *SHAPE)).astype(np.float32)


def is_local(run: Run) -> bool:
    """Whether what one value changes is the value at its place."""
    x = draw(0)
    y, one = run(x), x.copy()
    one[:, 1, 2, 3] += 1
    changed = np.abs(run(one) - y) > 1e-6
    if changed.shape != x.shape:
        return False
    changed[:, 1, 2, 3] = False
    return not changed.any()


def is_elementwise(run: Run) -> bool:
    """Whether values that change places within their channel change them in y, and nothing else happens."""
    order = np.random.default_rng(1).permutation(SHAPE[1] * SHAPE[2])

    def shuffled(values: np.ndarray) -> np.ndarray:
        return values.reshape(2, SHAPE[0], -1)[..., order].reshape(values.shape)

    return is_local(run) and np.allclose(shuffled(run(draw(0))), run(shuffled(draw(0))), rtol=1e-5, atol=1e-5)


def is_rising(run: Run) -> bool:
    x = np.linspace(-3, 3, 400, dtype=np.float32)
    image = np.zeros((len(x), *SHAPE), np.float32) + x.reshape(-1, 1, 1, 1)
    return bool((np.diff(run(image), axis=0) >= -1e-6).all())


def is_affine(run: Run) -> bool:
    """Whether it is a * x + b at each place: halfway between two x lies halfway between their y."""
    x, z = draw(0), draw(1)
    return is_local(run) and np.allclose(run((x + z) / 2), (run(x) + run(z)) / 2, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("one", ALL)
def test_a_layer_has_the_traits_that_it_is_said_to_have(one: LayerParameter) -> None:
    traits = traits_of(one)
    run = Run(one)
    assert (Trait.BLOBS in traits) >= bool(run.engine.shapes.params["l"])
    if Trait.ELEMENTWISE in traits:
        assert is_elementwise(run)
    if Trait.RISING in traits:
        assert is_elementwise(run)
        assert is_rising(run)
    if Trait.AFFINE in traits:
        assert is_affine(run)
    if Trait.PASSING in traits:
        given = {"x0": draw(0), **run.others}
        held = np.concatenate([given[name].ravel() for name in passed_on(one)])
        assert np.isin(run(given["x0"]), held).all()


@pytest.mark.parametrize("one", [param for param in ALL if param.values[0].type not in LEFT_OUT])
def test_a_layer_has_no_other_traits(one: LayerParameter) -> None:
    traits, run = traits_of(one), Run(one)
    assert (Trait.ELEMENTWISE in traits) == is_elementwise(run)
    assert (Trait.RISING in traits) == (is_elementwise(run) and is_rising(run))
    assert (Trait.AFFINE in traits) == is_affine(run) or one.type == "Dropout"


@pytest.mark.parametrize(
    ("one", "trait", "has"),
    [
        (layer("ReLU", "relu_param { negative_slope: -0.1 }"), Trait.RISING, False),
        (layer("Scale", "", 2), Trait.AFFINE, False),
        (layer("Scale", "", 1), Trait.AFFINE, True),
        (layer("Pooling", "pooling_param { pool: AVE }"), Trait.PASSING, False),
        (layer("Pooling", 'top: "mask" pooling_param { pool: MAX }'), Trait.PASSING, False),
        (layer("SoftmaxWithLoss", "", 2), Trait.COMPARES, True),
        (layer("SoftmaxWithLoss", "", 2), Trait.SCORES, True),
        (layer("InfogainLoss", "", 2), Trait.SCORES, True),
        (layer("EuclideanLoss", "", 2), Trait.SCORES, False),
        (layer("DetectionEvaluate", "", 2), Trait.COMPARES, True),
        (layer("CenterLossOfAFork", "", 2), Trait.COMPARES, True),
        (layer("Python", "loss_weight: 1", 2), Trait.COMPARES, True),
        (layer("Python", "loss_weight: 0", 2), Trait.COMPARES, False),
        (layer("Python", ""), Trait.ELEMENTWISE, False),
    ],
    ids=str,
)
def test_traits_of_some_layers(one: LayerParameter, trait: Trait, has: bool) -> None:
    assert (trait in traits_of(one)) == has


def test_every_type_with_a_shape_rule_stands_in_the_table_or_compares_with_labels() -> None:
    for kind in _rules:
        assert kind in _ROWS or Trait.COMPARES in traits_of(layer(kind, "")), kind


def test_layers_with_kernels_have_a_blob_for_them() -> None:
    assert sorted(types_with(Trait.KERNELS)) == sorted(
        kind for kind in types_with(Trait.BLOBS) if kind.startswith(("Conv", "Deconv", "Depthwise", "Inner"))
    )
    for kind in types_with(Trait.KERNELS):
        [one] = cases(kind)
        shapes = infer_shapes(NetParameter(layer=[one]), {"x0": (1, *SHAPE)})
        assert len(shapes.params["l"][0]) in (2, 4)


def test_the_documentation_names_the_types_that_are_quantized() -> None:
    rows = (DOCS / "layers.md").read_text().splitlines()
    [row] = [row for row in rows if row.startswith("| weights are quantized |")]
    assert all(f"`{kind}`" in row for kind in types_with(Trait.KERNELS))
