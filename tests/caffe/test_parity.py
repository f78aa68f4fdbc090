"""Every layer type of the onnx engine against real Caffe, over grids of parameters and shapes.

The measure is the largest difference divided by the largest absolute value of Caffe's blob. The worst figure
of each type is printed at the end.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from google.protobuf import text_format

from quantize.caffenet import (
    TEST,
    NetParameter,
    Weights,
    filter_net,
    infer_shapes,
    inference_net,
    read_prototxt,
    single_assignment,
)
from quantize.caffenet.norms import norm_places
from quantize.data import Images, Transform, open_source
from quantize.engines.caffe.engine import CaffeEngine, Worker
from quantize.engines.onnx.engine import OnnxEngine
from quantize.engines.onnx.layers import TRANSLATORS
from quantize.numerics.moments import moments_of
from tests.caffe.test_engine import images, residual_net

DIGITS = Path(__file__).parents[2] / "configs" / "models" / "digits"
TOLERANCE = 1e-5
BATCH = 3
LACKING = {"DepthwiseConvolution": "Convolution", "ConvolutionDepthwise": "Convolution"}
"""Types that Caffe 1.0 lacks, and what they are there."""
FACTORS = {"wide": 4, "large": 60}
"""Of standard deviations that are not 1."""
WORST: dict[str, tuple[float, str]] = {}
COUNT: dict[str, int] = defaultdict(int)


@dataclass(frozen=True)
class Case:
    """One layer to compare.

    Attributes:
        type: the layer's type.
        fields: its other fields, in prototxt syntax.
        bottoms: shapes of its bottoms for one image.
        tops: how many it has.
        draw: how inputs are drawn.
        table: shape of a bottom before those, which a Parameter layer gives and no image changes.
    """

    type: str
    fields: str = ""
    bottoms: tuple[tuple[int, ...], ...] = ((4, 6, 5),)
    tops: int = 1
    draw: str = "normal"
    table: tuple[int, ...] | None = None

    def __str__(self) -> str:
        shapes = " ".join("x".join(map(str, shape)) for shape in self.bottoms)
        return f"{self.type} {' '.join(self.fields.split())} on {shapes}"


def block(name: str, **fields: object) -> str:
    """A message in prototxt syntax; a list is a repeated field, None is left out."""
    lines = [
        f"{key}: {str(item).lower() if isinstance(item, bool) else item}"
        for key, value in fields.items()
        for item in (value if isinstance(value, (list, tuple)) else [value])
        if item is not None
    ]
    return f"{name} {{ {' '.join(lines)} }}"


def convolutions() -> Iterator[Case]:
    for kernel, stride, pad, dilation in product(
        (1, 2, 3, (3, 2)), (1, 2, (2, 3)), (0, 1, (2, 1)), (1, 2, (1, 3))
    ):
        fields = block(
            "convolution_param", num_output=6, kernel_size=kernel, stride=stride, pad=pad, dilation=dilation
        )
        yield Case("Convolution", fields, ((4, 9, 8),))
    for group, bias, outputs in product((1, 2, 4), (True, False), (4, 8)):
        fields = block(
            "convolution_param", num_output=outputs, kernel_size=3, pad=1, group=group, bias_term=bias
        )
        yield Case("Convolution", fields, ((4, 7, 5),))
    sides = {"kernel_h": 3, "kernel_w": 1, "stride_h": 2, "stride_w": 1, "pad_h": 0, "pad_w": 1}
    yield Case("Convolution", block("convolution_param", num_output=3, **sides), ((4, 7, 5),))
    yield Case("Convolution", block("convolution_param", num_output=3, kernel_size=[7, 5]), ((4, 7, 5),))
    line = block("convolution_param", num_output=3, kernel_size=3, stride=2, pad=1)
    yield Case("Convolution", line, ((4, 9),))
    cube = block("convolution_param", num_output=3, kernel_size=[3, 2, 1], stride=[1, 2, 1], pad=[1, 0, 0])
    yield Case("Convolution", cube, ((4, 5, 6, 3),))
    yield Case(
        "Convolution", block("convolution_param", num_output=3, kernel_size=3), ((4, 7, 5),) * 2, tops=2
    )


def depthwise_convolutions() -> Iterator[Case]:
    for kernel, stride, pad, bias in product((1, 3), (1, 2), (0, 1), (True, False)):
        own = {"num_output": 4, "kernel_size": kernel, "stride": stride, "pad": pad, "bias_term": bias}
        for kind in LACKING:
            yield Case(kind, block("convolution_param", group=4, **own), ((4, 9, 8),))


def deconvolutions() -> Iterator[Case]:
    for kernel, stride, pad, dilation in product((1, 2, 3, (4, 2)), (1, 2, (2, 3)), (0, 1), (1, 2)):
        if pad and kernel in (1, 2):
            continue
        fields = block(
            "convolution_param", num_output=6, kernel_size=kernel, stride=stride, pad=pad, dilation=dilation
        )
        yield Case("Deconvolution", fields, ((4, 5, 6),))
    for group, bias in product((1, 2, 4), (True, False)):
        fields = block(
            "convolution_param", num_output=8, kernel_size=4, stride=2, pad=1, group=group, bias_term=bias
        )
        yield Case("Deconvolution", fields, ((4, 5, 6),))


def im2cols() -> Iterator[Case]:
    for kernel, stride, pad, dilation in product((1, 3, (3, 2)), (1, (2, 3)), (0, 1), (1, 2)):
        fields = block("convolution_param", kernel_size=kernel, stride=stride, pad=pad, dilation=dilation)
        yield Case("Im2col", fields, ((3, 9, 8),))


def inner_products() -> Iterator[Case]:
    for axis, bias, transpose in product((1, 2, 3, -1), (True, False), (True, False)):
        fields = block("inner_product_param", num_output=7, axis=axis, bias_term=bias, transpose=transpose)
        yield Case("InnerProduct", fields)
    for shape in ((9,), (9, 1, 1), (2, 3)):
        yield Case("InnerProduct", block("inner_product_param", num_output=7), (shape,))


def poolings() -> Iterator[Case]:
    sizes = ((2, 7, 6), (2, 8, 8), (2, 5, 9), (1, 4, 13))
    for method, kernel, stride, pad, size in product(
        ("MAX", "AVE"), (1, 2, 3, 4), (1, 2, 3, 5), (0, 1, 2, 3), sizes
    ):
        if pad < kernel and kernel <= min(size[1:]) + 2 * pad:
            fields = block("pooling_param", pool=method, kernel_size=kernel, stride=stride, pad=pad)
            yield Case("Pooling", fields, (size,))
    for method in ("MAX", "AVE"):
        sides = {"kernel_h": 3, "kernel_w": 2, "stride_h": 2, "stride_w": 3, "pad_h": 2, "pad_w": 0}
        for size in ((2, 7, 6), (2, 8, 8), (2, 6, 10)):
            yield Case("Pooling", block("pooling_param", pool=method, **sides), (size,))
            yield Case("Pooling", block("pooling_param", pool=method, global_pooling=True), (size,))
        yield Case("Pooling", block("pooling_param", pool=method, kernel_size=1, stride=2), ((2, 32, 32),))
        yield Case("Pooling", block("pooling_param", pool=method, kernel_size=7, stride=1), ((2, 7, 7),))
        yield Case("Pooling", block("pooling_param", pool=method, kernel_size=3, stride=2), ((2, 112, 112),))


def other_poolings() -> Iterator[Case]:
    for kernel, stride, pad, size in product((2, 3), (1, 2), (0, 1), ((2, 7, 6), (3, 8, 8))):
        fields = block("pooling_param", kernel_size=kernel, stride=stride, pad=pad)
        yield Case("Pooling", fields, (size,), tops=2)
    for method, kernel, stride, pad, size in product(
        ("MAX", "AVE"), (2, 3), (2, 3), (0, 1), ((2, 7, 6), (2, 8, 9))
    ):
        fields = block(
            "pooling_param", pool=method, kernel_size=kernel, stride=stride, pad=pad, round_mode="FLOOR"
        )
        yield Case("Pooling", fields, (size,))
    for method, height, size in product(("MAX", "AVE"), (1, 2, 3), ((3, 9, 8), (2, 13, 7), (2, 4, 4))):
        yield Case("SPP", block("spp_param", pool=method, pyramid_height=height), (size,))


def normalizations() -> Iterator[Case]:
    for shape, eps in product(((4, 6, 5), (7,), (4, 9), (3, 2, 3, 4), (4, 1, 1)), (None, 1e-3)):
        yield Case("BatchNorm", block("batch_norm_param", eps=eps), (shape,))
    yield Case("BatchNorm", block("batch_norm_param", use_global_stats=True))
    yield Case("BatchNorm", block("batch_norm_param", use_global_stats=False))
    yield Case("BatchNorm", block("batch_norm_param", use_global_stats=True), draw="zero factor")
    regions = ("ACROSS_CHANNELS", "WITHIN_CHANNEL")
    for region, size, alpha, beta in product(regions, (1, 3, 5), (1e-4, 0.5), (0.75, 0.5)):
        fields = block("lrn_param", norm_region=region, local_size=size, alpha=alpha, beta=beta)
        yield Case("LRN", fields, ((7, 6, 5),))
    yield Case("LRN", block("lrn_param", local_size=3, alpha=0.1, k=2), ((2, 6, 5),))
    for variance, across, shape in product((True, False), (True, False), ((4, 6, 5), (3, 1, 7))):
        fields = block("mvn_param", normalize_variance=variance, across_channels=across)
        yield Case("MVN", fields, (shape,))


def scales() -> Iterator[Case]:
    for axis, axes in ((1, 1), (1, 2), (1, 3), (1, -1), (2, 1), (2, 2), (3, 1), (-1, 1), (1, 0)):
        yield Case("Bias", block("bias_param", axis=axis, num_axes=axes))
        for bias in (True, False):
            yield Case("Scale", block("scale_param", axis=axis, num_axes=axes, bias_term=bias))
    for shape in ((7,), (4, 5)):
        yield Case("Scale", block("scale_param", bias_term=True), (shape,))
        yield Case("Bias", "", (shape,))
    # Factors from a second bottom, which here has the batch axis; a learned bias could not be that large.
    for second in ((4,), (4, 6), (4, 6, 5)):
        yield Case("Scale", block("scale_param", axis=0), ((4, 6, 5), second))
        yield Case("Bias", block("bias_param", axis=0), ((4, 6, 5), second))


def activations() -> Iterator[Case]:
    shapes = ((4, 6, 5), (7,))
    for shape in shapes:
        for kind in (
            "ReLU",
            "ELU",
            "Sigmoid",
            "TanH",
            "AbsVal",
            "BNLL",
            "Dropout",
            "Power",
            "Exp",
            "Threshold",
        ):
            yield Case(kind, "", (shape,))
        yield Case("Log", "", (shape,), draw="positive")
        for slope in (0.1, -0.5, 1.5):
            yield Case("ReLU", block("relu_param", negative_slope=slope), (shape,))
        for alpha in (0.3, 2):
            yield Case("ELU", block("elu_param", alpha=alpha), (shape,))
        for shared in (True, False):
            yield Case("PReLU", block("prelu_param", channel_shared=shared), (shape,))
        for threshold in (0.5, -0.2):
            yield Case("Threshold", block("threshold_param", threshold=threshold), (shape,))
    for power, scale, shift in product((0, 1, 2, 3), (1, -0.5, 0), (0, 2)):
        yield Case("Power", block("power_param", power=power, scale=scale, shift=shift))
    for power, scale in product((0.5, -1, 1.7), (1, 0.5)):
        yield Case("Power", block("power_param", power=power, scale=scale, shift=0.1), draw="positive")
    for base, scale, shift in product((-1, 2, 10), (1, 0.5), (0, 0.7)):
        yield Case("Exp", block("exp_param", base=base, scale=scale, shift=shift))
        yield Case("Log", block("log_param", base=base, scale=scale, shift=shift), draw="positive")
    yield Case("Dropout", block("dropout_param", dropout_ratio=0.9))
    for beta in (1, 0.5, 2):
        yield Case("Swish", block("swish_param", beta=beta))
    for low, high in ((-0.5, 1), (0, 0.25)):
        yield Case("Clip", block("clip_param", min=low, max=high))


def quantizations() -> Iterator[Case]:
    for step, shape in product((0.01, 0.3), ((4, 6, 5), (7,))):
        yield Case("ActQuantize", block("relu_param", negative_slope=step), (shape,))
        for threshold in (255, -127, -3):
            fields = block("relu_param", negative_slope=step) + block("threshold_param", threshold=threshold)
            yield Case("ActQuantize", fields, (shape,), draw="large")
    yield Case("Quant", block("relu_param", negative_slope=0.1))


def several_blobs() -> Iterator[Case]:
    for operation, count in product(("SUM", "PROD", "MAX"), (2, 3)):
        yield Case("Eltwise", block("eltwise_param", operation=operation), ((4, 6, 5),) * count)
    for coefficients in ((1, -1), (0.5, 2), (0, 1)):
        yield Case("Eltwise", block("eltwise_param", coeff=coefficients), ((4, 6, 5),) * 2)
    yield Case("Eltwise", "", ((7,),) * 2)
    for axis, shapes in (
        (1, ((4, 6, 5), (2, 6, 5), (1, 6, 5))),
        (2, ((4, 6, 5), (4, 1, 5))),
        (-1, ((4, 6, 5), (4, 6, 2))),
        (1, ((4,), (3,))),
        (1, ((4, 6, 5),)),
    ):
        yield Case("Concat", block("concat_param", axis=axis), shapes)
    yield Case("Concat", block("concat_param", concat_dim=1), ((4, 6, 5), (2, 6, 5)))
    for axis, points, tops in (
        (1, [1], 2),
        (1, [1, 3], 3),
        (1, [], 2),
        (2, [2, 3], 3),
        (-1, [4], 2),
        (1, [], 1),
    ):
        yield Case("Slice", block("slice_param", axis=axis, slice_point=points), tops=tops)
    yield Case("Slice", block("slice_param", slice_dim=1), tops=4)
    for axis, offsets in ((2, [1]), (2, [2, 1]), (3, [2]), (1, [1, 0, 2]), (-1, [1]), (2, [])):
        second = {1: (3, 5, 3)}.get(axis, (4, 4, 3) if axis == 2 else (4, 6, 3))
        yield Case("Crop", block("crop_param", axis=axis, offset=offsets), ((4, 6, 5), second))
    yield Case("Split", "", tops=2)


def shapes_changed() -> Iterator[Case]:
    for axis, end in ((1, -1), (2, -1), (1, 2), (2, 3), (-2, -1), (1, 1)):
        yield Case("Flatten", block("flatten_param", axis=axis, end_axis=end))
    for dims, axis, axes in (
        ([0, -1], 0, -1),
        ([0, 0, 30], 0, -1),
        ([0, 2, 2, -1], 0, -1),
        ([0, -1, 1, 1], 0, -1),
        ([-1], 1, -1),
        ([5, 6], 2, -1),
        ([2, 2], 1, 1),
        ([0, 3, 2, -1], 1, 2),
        ([1], -1, 0),
        ([0, 0, 0, 0], 0, -1),
    ):
        fields = f"reshape_param {{ {block('shape', dim=dims)} axis: {axis} num_axes: {axes} }}"
        yield Case("Reshape", fields)
    for axis, tiles in product((1, 2, 3, -1), (1, 2, 3)):
        yield Case("Tile", block("tile_param", axis=axis, tiles=tiles))
    yield Case("Tile", block("tile_param", tiles=3), ((4,),))
    for operation, axis, coefficient in product(("SUM", "ASUM", "SUMSQ", "MEAN"), (1, 2, 3, -1), (1, 0.5)):
        yield Case("Reduction", block("reduction_param", operation=operation, axis=axis, coeff=coefficient))


def classifications() -> Iterator[Case]:
    for axis, shape in product((1, -1), ((4, 6, 5), (7,), (7, 1, 1))):
        yield Case("Softmax", block("softmax_param", axis=axis), (shape,))
    yield Case("Softmax", block("softmax_param", axis=2))
    yield Case("Softmax", "", ((10,),), draw="large")
    for axis, top_k, values in product((1, 2, -1), (1, 3), (True, False)):
        yield Case("ArgMax", block("argmax_param", axis=axis, top_k=top_k, out_max_val=values))
        yield Case("ArgMax", block("argmax_param", axis=axis, top_k=top_k), draw="indices")
    for top_k, values, draw in product((1, 3), (True, False), ("normal", "indices")):
        yield Case("ArgMax", block("argmax_param", top_k=top_k, out_max_val=values), draw=draw)
    for bias in (True, False):
        fields = block("embed_param", num_output=5, input_dim=9, bias_term=bias)
        yield Case("Embed", fields, ((4,),), draw="indices")
        yield Case("Embed", fields, ((2, 3),), draw="indices")
    for table in ((9, 4), (9, 2, 3, 4), (9,)):
        yield Case("BatchReindex", "", ((),), draw="indices", table=table)


def sources() -> Iterator[Case]:
    shape = block("shape", dim=(BATCH, 4, 5))
    yield Case("Parameter", f"parameter_param {{ {shape} }}", ())
    for value in (0, 2.5):
        filler = block("data_filler", type='"constant"', value=value)
        yield Case("DummyData", f"dummy_data_param {{ {shape} {filler} }}", (), tops=2)
    yield Case("DummyData", f"dummy_data_param {{ {shape} }}", ())


def long_sums() -> Iterator[Case]:
    """Sizes of real nets: as many terms as rounding errors have to add up."""
    yield Case("Convolution", block("convolution_param", num_output=16, kernel_size=3, pad=1), ((512, 7, 7),))
    yield Case(
        "Deconvolution", block("convolution_param", num_output=8, kernel_size=4, stride=2), ((256, 5, 5),)
    )
    yield Case("InnerProduct", block("inner_product_param", num_output=20), ((256, 6, 6),))
    yield Case("Pooling", block("pooling_param", pool="AVE", global_pooling=True), ((16, 14, 14),))
    yield Case("LRN", block("lrn_param", alpha=1e-4), ((96, 13, 13),))
    yield Case("Softmax", "", ((1000,),))
    for operation in ("SUM", "ASUM", "SUMSQ", "MEAN"):
        yield Case("Reduction", block("reduction_param", operation=operation, axis=1), ((16, 28, 28),))
    for across in (True, False):
        yield Case("MVN", block("mvn_param", across_channels=across), ((16, 28, 28),))


CASES = [
    *convolutions(),
    *depthwise_convolutions(),
    *deconvolutions(),
    *im2cols(),
    *inner_products(),
    *poolings(),
    *other_poolings(),
    *normalizations(),
    *scales(),
    *activations(),
    *quantizations(),
    *several_blobs(),
    *shapes_changed(),
    *classifications(),
    *sources(),
    *long_sums(),
]


@pytest.fixture(scope="module")
def worker(caffe_python: list[str], caffe_plugin: str) -> Iterator[Worker]:
    worker = Worker(caffe_python, preload=caffe_plugin, threads=1)
    yield worker
    worker.close()


@pytest.fixture(scope="module", autouse=True)
def print_worst(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    capture = request.config.pluginmanager.get_plugin("capturemanager")
    with capture.global_and_fixture_disabled():
        print("\n\nworst difference from Caffe, relative to the blob's largest absolute value:")
        for kind, (error, case) in sorted(WORST.items()):
            print(f"  {kind:20} {error:7.1e} of {COUNT[kind]:3} blobs; {case}")


def net_of(case: Case) -> NetParameter:
    net = NetParameter(name=case.type)
    layer = net.layer.add(name="layer", type=case.type)
    if case.table is not None:
        source = NetParameter().layer.add(name="table", type="Parameter", top=["table"])
        source.parameter_param.shape.dim.extend(case.table)
        net.layer.insert(0, source)
        layer = net.layer[1]
        layer.bottom.append("table")
    layer.bottom.extend(f"in{i}" for i in range(len(case.bottoms)))
    layer.top.extend(f"out{i}" for i in range(case.tops))
    text_format.Merge(case.fields, layer)
    return net


def weights_of(case: Case, net: NetParameter, rng: np.random.Generator) -> Weights:
    inputs = {f"in{i}": (1, *shape) for i, shape in enumerate(case.bottoms)}
    weights = Weights()
    params = infer_shapes(net, inputs).params
    for layer in net.layer:
        blobs = [rng.normal(size=shape).astype(np.float32) for shape in params[layer.name]]
        places = norm_places(layer)
        if places is not None:
            blobs[places.variance] = np.abs(blobs[places.variance]) + np.float32(0.1)
            if places.factor is not None:
                blobs[places.factor] = np.array([0 if case.draw == "zero factor" else 1.7], np.float32)
        if blobs:
            weights.add(layer, blobs)
    return weights


def feeds_of(case: Case, rng: np.random.Generator) -> dict[str, np.ndarray]:
    feeds = {}
    for i, shape in enumerate(case.bottoms):
        blob = rng.normal(size=(BATCH, *shape))
        if case.draw == "positive":
            blob = np.abs(blob) + 0.2
        elif case.draw in FACTORS:
            blob *= FACTORS[case.draw]
        elif case.draw == "indices":
            blob = rng.integers(0, 9, size=blob.shape)
        feeds[f"in{i}"] = blob.astype(np.float32)
    return feeds


def note(kind: str, error: float, case: str) -> None:
    """Check an error and remember the worst of its kind."""
    COUNT[kind] += 1
    WORST[kind] = max(WORST.get(kind, (0.0, "")), (error, case))
    assert error <= TOLERANCE


def relative_error(found: np.ndarray, wanted: np.ndarray) -> float:
    """The measure; infinite where only one has a NaN (an average over no pixels is one in Caffe)."""
    assert found.shape == wanted.shape
    if not np.array_equal(np.isnan(found), np.isnan(wanted)):
        return np.inf
    largest = float(np.nanmax(np.abs(wanted), initial=0))
    difference = float(np.nanmax(np.abs(found.astype(np.float64) - wanted), initial=0))
    return difference / largest if largest else difference


@pytest.mark.parametrize("case", CASES, ids=str)
def test_layer(case: Case, worker: Worker) -> None:
    rng = np.random.default_rng(len(str(case)))
    net = net_of(case)
    weights = weights_of(case, net, rng)
    feeds = feeds_of(case, rng)
    inputs = dict(zip(feeds, case.bottoms, strict=True))
    layer = net.layer[-1]
    outputs = list(layer.top)
    onnx = OnnxEngine(net, weights, inputs)
    layer.type = LACKING.get(case.type, case.type)
    caffe = CaffeEngine(net, weights, inputs, worker=worker)
    found = onnx.compile(0, len(net.layer), outputs).run(feeds).blobs
    wanted = caffe.compile(0, len(net.layer), outputs).run(feeds).blobs
    caffe.close()
    shapes = infer_shapes(net_of(case), {name: feed.shape for name, feed in feeds.items()}).blobs
    for name in outputs:
        assert shapes[name] == wanted[name].shape
        note(case.type, relative_error(found[name], wanted[name]), str(case))


def test_every_translator_has_cases() -> None:
    """Those of forks are in tests/engines/fork_formulas.py: no Caffe here has them."""
    of_forks = {name for name, function in TRANSLATORS.items() if function.__module__.endswith("fork_layers")}
    assert {case.type for case in CASES} == TRANSLATORS.keys() - of_forks


def compare_all_blobs(
    kind: str, net: NetParameter, weights: Weights, feeds: dict[str, np.ndarray], worker: Worker
) -> None:
    """Compare every blob of a net, and its moments: differences add up over the layers."""
    net = single_assignment(net)
    inputs = {name: feed.shape[1:] for name, feed in feeds.items()}
    outputs = [top for layer in net.layer for top in layer.top]
    found = OnnxEngine(net, weights, inputs).compile(0, len(net.layer), outputs, outputs).run(feeds)
    caffe = CaffeEngine(net, weights, inputs, worker=worker)
    wanted = caffe.compile(0, len(net.layer), outputs, outputs).run(feeds)
    caffe.close()
    for name in outputs:
        note(kind, relative_error(found.blobs[name], wanted.blobs[name]), name)
        ours, theirs = found.moments[name], wanted.moments[name]
        size = np.sqrt(np.square(theirs.mean) + theirs.m2 / theirs.count).max()
        assert ours.count == theirs.count
        np.testing.assert_allclose(ours.mean, theirs.mean, rtol=0, atol=TOLERANCE * size)
        np.testing.assert_allclose(
            ours.m2 / ours.count, theirs.m2 / theirs.count, rtol=0, atol=TOLERANCE * size**2
        )


def test_moments_of_large_blobs_do_not_lose_digits() -> None:
    """Sums of many squares of one sign, as behind a ReLU of a photograph's size."""
    net = net_of(Case("ReLU", bottoms=((4, 224, 224),)))
    blob = np.random.default_rng(0).normal(size=(2, 4, 224, 224)).astype(np.float32)
    piece = OnnxEngine(net, Weights(), {"in0": (4, 224, 224)}).compile(0, 1, [], ["out0"])
    found, wanted = piece.run({"in0": blob}).moments["out0"], moments_of(np.maximum(blob, 0))
    np.testing.assert_allclose(found.mean, wanted.mean, rtol=2e-6)
    np.testing.assert_allclose(found.m2, wanted.m2, rtol=2e-6)


def test_a_net_with_branches(worker: Worker) -> None:
    net, weights = residual_net()
    compare_all_blobs("net with branches", net, weights, {"data": images(4)}, worker)


def test_the_digits_net(worker: Worker) -> None:
    net = filter_net(read_prototxt(DIGITS / "digits.prototxt"), TEST)
    data = next(layer for layer in net.layer if layer.type == "Data")
    source = open_source(DIGITS / "test_lmdb")
    digits, _ = next(Images(source, Transform.from_proto(data.transform_param, DIGITS), TEST).batches(100))
    source.close()
    weights = Weights.read(DIGITS / "digits.caffemodel")
    compare_all_blobs("digits net", inference_net(net, data.top[:1]), weights, {data.top[0]: digits}, worker)
