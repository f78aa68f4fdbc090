"""Shape rules against values worked out by hand from Caffe's formulas, and weights against shapes."""

import numpy as np
import pytest
from google.protobuf import text_format
from hypothesis import given
from hypothesis import strategies as st

from quantize.caffenet import LayerParameter, NetParameter, Weights, check_weights, in_shape, infer_shapes
from quantize.errors import InputError


def infer(layer, *bottoms, tops=1):
    """The tops' shapes, the params' shapes and the macs of one layer given as prototxt."""
    net = NetParameter()
    text_format.Parse(layer, net.layer.add(name="x"))
    inputs = {f"in{i}": shape for i, shape in enumerate(bottoms)}
    net.layer[0].bottom.extend(inputs)
    net.layer[0].top.extend(f"out{i}" for i in range(tops))
    shapes = infer_shapes(net, inputs)
    return [shapes.blobs[f"out{i}"] for i in range(tops)], shapes.params["x"], shapes.macs["x"]


def top(layer, *bottoms):
    return infer(layer, *bottoms)[0][0]


IMAGE = (2, 6, 32, 32)


@pytest.mark.parametrize(
    ("param", "bottom", "out", "kernels"),
    [
        ("num_output: 8 kernel_size: 3", IMAGE, (2, 8, 30, 30), (8, 6, 3, 3)),
        ("num_output: 8 kernel_size: 3 pad: 1", IMAGE, (2, 8, 32, 32), (8, 6, 3, 3)),
        ("num_output: 8 kernel_size: 3 pad: 1 stride: 2", IMAGE, (2, 8, 16, 16), (8, 6, 3, 3)),
        ("num_output: 8 kernel_size: 1 stride: 2", IMAGE, (2, 8, 16, 16), (8, 6, 1, 1)),
        ("num_output: 96 kernel_size: 11 stride: 4", (1, 3, 227, 227), (1, 96, 55, 55), (96, 3, 11, 11)),
        (
            "num_output: 64 kernel_size: 7 stride: 2 pad: 3",
            (1, 3, 224, 224),
            (1, 64, 112, 112),
            (64, 3, 7, 7),
        ),
        ("num_output: 8 kernel_size: 3 dilation: 2", IMAGE, (2, 8, 28, 28), (8, 6, 3, 3)),
        ("num_output: 8 kernel_size: [3, 5] pad: [1, 0] stride: [1, 2]", IMAGE, (2, 8, 32, 14), (8, 6, 3, 5)),
        (
            "num_output: 8 kernel_h: 3 kernel_w: 5 pad_h: 1 stride_h: 1 stride_w: 3",
            IMAGE,
            (2, 8, 32, 10),
            (8, 6, 3, 5),
        ),
        ("num_output: 9 kernel_size: 3 group: 3", IMAGE, (2, 9, 30, 30), (9, 2, 3, 3)),
        ("num_output: 8 kernel_size: 3", (2, 6, 9), (2, 8, 7), (8, 6, 3)),
        ("num_output: 8 kernel_size: 3", (2, 6, 9, 9, 9), (2, 8, 7, 7, 7), (8, 6, 3, 3, 3)),
        ("num_output: 8 kernel_size: 3 axis: 2", IMAGE, (2, 6, 8, 30), (8, 32, 3)),
        ("num_output: 8 kernel_size: 3 axis: -3", IMAGE, (2, 8, 30, 30), (8, 6, 3, 3)),
    ],
)
def test_convolution(param, bottom, out, kernels):
    tops, params, macs = infer(f'type: "Convolution" convolution_param {{ {param} }}', bottom)
    assert tops == [out]
    assert params == [kernels, (kernels[0],)]
    assert macs == np.prod(out) * np.prod(kernels[1:])
    assert infer(f'type: "Convolution" convolution_param {{ {param} bias_term: false }}', bottom)[1] == [
        kernels
    ]


def test_convolution_of_several_bottoms():
    tops, params, macs = infer(
        'type: "Convolution" convolution_param { num_output: 8 kernel_size: 1 }', IMAGE, IMAGE, tops=2
    )
    assert tops == [(2, 8, 32, 32)] * 2
    assert params == [(8, 6, 1, 1), (8,)]
    assert macs == 2 * 2 * 8 * 32 * 32 * 6


@pytest.mark.parametrize("kind", ["ConvolutionDepthwise", "DepthwiseConvolution"])
@pytest.mark.parametrize("group", ["", "group: 6"])
def test_depthwise_convolution(kind, group):
    param = f"convolution_param {{ num_output: 6 kernel_size: 3 pad: 1 {group} }}"
    tops, params, macs = infer(f'type: "{kind}" {param}', IMAGE)
    assert tops == [IMAGE]
    assert params == [(6, 1, 3, 3), (6,)]
    assert macs == 2 * 6 * 32 * 32 * 9


@pytest.mark.parametrize(
    ("param", "out", "kernels"),
    [
        ("num_output: 4 kernel_size: 4 stride: 2 pad: 1", (2, 4, 64, 64), (6, 4, 4, 4)),
        ("num_output: 4 kernel_size: 3", (2, 4, 34, 34), (6, 4, 3, 3)),
        ("num_output: 4 kernel_size: 3 dilation: 2 group: 2", (2, 4, 36, 36), (6, 2, 3, 3)),
    ],
)
def test_deconvolution(param, out, kernels):
    tops, params, macs = infer(f'type: "Deconvolution" convolution_param {{ {param} }}', IMAGE)
    assert tops == [out]
    assert params == [kernels, (4,)]
    assert macs == np.prod(IMAGE) * np.prod(kernels[1:])


def test_im2col():
    layer = 'type: "Im2col" convolution_param { kernel_size: 3 stride: 2 }'
    assert top(layer, IMAGE) == (2, 54, 15, 15)


@pytest.mark.parametrize(
    ("param", "size", "out"),
    [
        ("kernel_size: 1 stride: 2", (32, 32), (17, 17)),  # ceil(31 / 2) + 1
        ("kernel_size: 2 stride: 2", (32, 32), (16, 16)),
        ("kernel_size: 3 stride: 2", (32, 32), (16, 16)),  # ceil(29 / 2) + 1
        ("kernel_size: 3 stride: 2", (112, 112), (56, 56)),  # ResNet's pool1
        ("kernel_size: 3 stride: 2", (55, 55), (27, 27)),  # AlexNet's pool1
        ("kernel_size: 2 stride: 2 pad: 1", (4, 5), (3, 3)),  # 3, clipped from 4
        ("kernel_size: 3 stride: 2 pad: 1", (32, 32), (17, 17)),  # ceil(31 / 2) + 1, its start 32 < 33
        ("kernel_size: 3 stride: 3 pad: 1", (32, 32), (11, 11)),  # ceil(31 / 3) + 1 = 12, and 33 >= 33
        ("kernel_size: 2 stride: 3 pad: 1", (32, 32), (11, 11)),  # ceil(32 / 3) + 1 = 12, and 33 >= 33
        ("kernel_size: 1 stride: 3", (32, 32), (12, 12)),  # no padding, no clipping
        ("kernel_h: 2 kernel_w: 2 stride: 3 pad_h: 1 pad_w: 0", (32, 32), (11, 11)),
        ("kernel_h: 3 kernel_w: 5 stride_h: 1 stride_w: 2", (32, 32), (30, 15)),
        ("global_pooling: true", (7, 9), (1, 1)),
        ("kernel_size: 3 stride: 2 round_mode: FLOOR", (32, 32), (15, 15)),
        ("kernel_size: 7 stride: 3", (5, 5), (1, 1)),
    ],
)
def test_pooling(param, size, out):
    for method in ("MAX", "AVE"):
        assert top(f'type: "Pooling" pooling_param {{ pool: {method} {param} }}', (2, 6, *size)) == (
            2,
            6,
            *out,
        )


def test_pooling_mask():
    tops, _, _ = infer('type: "Pooling" pooling_param { kernel_size: 2 stride: 2 }', IMAGE, tops=2)
    assert tops == [(2, 6, 16, 16)] * 2


@given(st.integers(1, 60), st.integers(1, 7), st.integers(1, 4), st.data())
def test_pooling_windows_cover_the_image_and_start_inside(size, kernel, stride, data):
    pad = data.draw(st.integers(0, kernel - 1))
    if size + 2 * pad < kernel:
        return
    param = f"kernel_size: {kernel} stride: {stride} pad: {pad}"
    count = top(f'type: "Pooling" pooling_param {{ {param} }}', (1, 1, size, size))[2]
    last_start = (count - 1) * stride - pad
    assert last_start < size or not pad
    assert last_start + kernel >= size or last_start + stride >= size


@pytest.mark.parametrize(
    "kind", ["ReLU", "Dropout", "Sigmoid", "TanH", "AbsVal", "Exp", "Power", "ELU", "Swish"]
)
def test_elementwise(kind):
    for shape in (IMAGE, (2, 5), (3,)):
        assert infer(f'type: "{kind}"', shape) == ([shape], [], 0)


@pytest.mark.parametrize(
    "kind", ["Log", "BNLL", "Threshold", "ActQuantize", "Quant", "LRN", "MVN", "Softmax"]
)
def test_elementwise_of_images(kind):
    assert infer(f'type: "{kind}"', IMAGE) == ([IMAGE], [], 0)


def test_clip():
    assert top('type: "Clip" clip_param { min: 0 max: 6 }', IMAGE) == IMAGE


@pytest.mark.parametrize(
    ("layer", "bottom", "params"),
    [
        ('type: "BatchNorm"', IMAGE, [(6,), (6,), (1,)]),
        ('type: "BatchNorm"', (2, 5), [(5,), (5,), (1,)]),
        ('type: "BatchNorm"', (7,), [(1,), (1,), (1,)]),
        ('type: "PReLU"', IMAGE, [(6,)]),
        ('type: "PReLU" prelu_param { channel_shared: true }', IMAGE, [()]),
        ('type: "Scale"', IMAGE, [(6,)]),
        ('type: "Scale" scale_param { bias_term: true }', (2, 5), [(5,), (5,)]),
        ('type: "Scale" scale_param { axis: 2 num_axes: 2 }', IMAGE, [(32, 32)]),
        ('type: "Scale" scale_param { axis: -1 }', IMAGE, [(32,)]),
        ('type: "Scale" scale_param { axis: 0 num_axes: -1 bias_term: true }', (2, 5), [(2, 5), (2, 5)]),
        ('type: "Scale" scale_param { num_axes: 0 }', IMAGE, [()]),
        ('type: "Bias"', IMAGE, [(6,)]),
        ('type: "Bias" bias_param { axis: 1 num_axes: -1 }', IMAGE, [(6, 32, 32)]),
    ],
)
def test_layers_with_vectors(layer, bottom, params):
    assert infer(layer, bottom) == ([bottom], params, 0)


@pytest.mark.parametrize(
    ("layer", "second", "params"),
    [
        ('type: "Scale"', (6,), []),
        ('type: "Scale" scale_param { axis: 0 bias_term: true }', (2, 6), [(2, 6)]),
        ('type: "Scale" scale_param { axis: 9 }', (), []),
        ('type: "Bias" bias_param { axis: 2 num_axes: 7 }', (32, 32), []),
    ],
)
def test_vectors_from_a_second_bottom(layer, second, params):
    assert infer(layer, IMAGE, second) == ([IMAGE], params, 0)


@pytest.mark.parametrize(
    ("param", "weights", "out"),
    [
        ("num_output: 10", (10, 6144), (2, 10)),
        ("num_output: 10 transpose: true", (6144, 10), (2, 10)),
        ("num_output: 10 axis: 2", (10, 1024), (2, 6, 10)),
        ("num_output: 10 axis: -1", (10, 32), (2, 6, 32, 10)),
    ],
)
def test_inner_product(param, weights, out):
    layer = f'type: "InnerProduct" inner_product_param {{ {param} }}'
    macs = int(np.prod(out)) * 6144 // int(np.prod(out[1:-1]))
    assert infer(layer, IMAGE) == ([out], [weights, (10,)], macs)


@pytest.mark.parametrize(
    ("layer", "bottoms", "out"),
    [
        ('type: "Eltwise"', [IMAGE, IMAGE, IMAGE], IMAGE),
        ('type: "Eltwise" eltwise_param { coeff: 1 coeff: -1 }', [(2, 5), (2, 5)], (2, 5)),
        ('type: "Concat"', [(2, 6, 4, 4), (2, 1, 4, 4), (2, 2, 4, 4)], (2, 9, 4, 4)),
        ('type: "Concat" concat_param { axis: -1 }', [(2, 6), (2, 1)], (2, 7)),
        ('type: "Concat" concat_param { concat_dim: 0 }', [(2, 6), (3, 6)], (5, 6)),
        ('type: "Flatten"', [IMAGE], (2, 6144)),
        ('type: "Flatten" flatten_param { axis: 1 end_axis: 2 }', [IMAGE], (2, 192, 32)),
        ('type: "Flatten" flatten_param { axis: 0 end_axis: -3 }', [IMAGE], (12, 32, 32)),
        ('type: "Reshape" reshape_param { shape { dim: 0 dim: -1 } }', [IMAGE], (2, 6144)),
        ('type: "Reshape" reshape_param { shape { dim: 2 dim: 4 } axis: 1 }', [(2, 8)], (2, 2, 4)),
        ('type: "Reshape" reshape_param { shape { dim: 2 dim: 4 } axis: -2 }', [(2, 8)], (2, 2, 4)),
        ('type: "Reshape" reshape_param { shape { dim: 1 } num_axes: 0 }', [(2, 8)], (1, 2, 8)),
        ('type: "Reshape" reshape_param { shape { dim: 1 } axis: 1 num_axes: 0 }', [(2, 8)], (2, 1, 8)),
        ('type: "Reshape" reshape_param { shape { dim: 0 dim: -1 dim: 4 } }', [(2, 8)], (2, 2, 4)),
        (
            'type: "Reshape" reshape_param { shape { dim: 0 dim: 3 dim: 2 } axis: 1 num_axes: 2 }',
            [(2, 3, 2, 5)],
            None,
        ),
        (
            'type: "Reshape" reshape_param { shape { dim: 0 dim: 2 } axis: 1 num_axes: 2 }',
            [(2, 3, 2, 5)],
            (2, 3, 2, 5),
        ),
        ('type: "Tile" tile_param { tiles: 3 }', [(2, 5)], (2, 15)),
        ('type: "Tile" tile_param { axis: 0 tiles: 3 }', [(2, 5)], (6, 5)),
        ('type: "Reduction"', [IMAGE], ()),
        ('type: "Reduction" reduction_param { axis: 2 }', [IMAGE], (2, 6)),
        ('type: "ArgMax"', [IMAGE], (2, 1, 1, 1)),
        ('type: "ArgMax"', [(2, 5)], (2, 1, 1)),
        ('type: "ArgMax" argmax_param { top_k: 3 out_max_val: true }', [(2, 5)], (2, 2, 3)),
        ('type: "ArgMax" argmax_param { top_k: 3 axis: 1 }', [IMAGE], (2, 3, 32, 32)),
        ('type: "SPP" spp_param { pyramid_height: 3 }', [IMAGE], (2, 6 * 21)),
        ('type: "SPP" spp_param { pyramid_height: 1 }', [IMAGE], (2, 6, 1, 1)),
        ('type: "BatchReindex"', [IMAGE, (5,)], (5, 6, 32, 32)),
        ('type: "Crop"', [IMAGE, (1, 1, 8, 9)], (2, 6, 8, 9)),
        ('type: "Crop" crop_param { axis: 1 offset: [1, 2, 24] }', [IMAGE, (9, 5, 9, 8)], (2, 5, 9, 8)),
    ],
)
def test_shapes_and_places(layer, bottoms, out):
    if out is None:
        with pytest.raises(InputError, match="differ in size"):
            infer(layer, *bottoms)
    else:
        assert infer(layer, *bottoms) == ([out], [], 0)


def test_embed():
    layer = 'type: "Embed" embed_param { num_output: 4 input_dim: 100 }'
    assert infer(layer, (2, 7)) == ([(2, 7, 4)], [(100, 4), (4,)], 0)


def test_slice_and_split():
    assert infer('type: "Slice"', IMAGE, tops=3)[0] == [(2, 2, 32, 32)] * 3
    points = 'type: "Slice" slice_param { axis: -1 slice_point: [1, 30] }'
    assert infer(points, IMAGE, tops=3)[0] == [(2, 6, 32, 1), (2, 6, 32, 29), (2, 6, 32, 2)]
    assert infer('type: "Slice" slice_param { slice_dim: 0 }', IMAGE, tops=2)[0] == [(1, 6, 32, 32)] * 2
    assert infer('type: "Split"', IMAGE, tops=3)[0] == [IMAGE] * 3
    assert infer('type: "Silence"', IMAGE, IMAGE, tops=0)[0] == []


@pytest.mark.parametrize(
    ("layer", "tops", "params"),
    [
        ('type: "Input" input_param { shape { dim: [1, 3] } shape { dim: 2 } }', [(1, 3), (2,)], []),
        ('type: "Input" input_param { shape { dim: [1, 3] } }', [(1, 3), (1, 3)], []),
        ('type: "DummyData" dummy_data_param { shape { dim: 4 } }', [(4,), (4,)], []),
        (
            'type: "DummyData" dummy_data_param { num: [1, 2] channels: [3, 4] '
            "height: [5, 6] width: [7, 8] }",
            [(1, 3, 5, 7), (2, 4, 6, 8)],
            [],
        ),
        (
            'type: "MemoryData" memory_data_param { batch_size: 2 channels: 3 height: 4 width: 5 }',
            [(2, 3, 4, 5), (2,)],
            [],
        ),
        ('type: "Parameter" parameter_param { shape { dim: [4, 5] } }', [(4, 5)], [(4, 5)]),
    ],
)
def test_sources(layer, tops, params):
    assert infer(layer, tops=len(tops)) == (tops, params, 0)


def test_measures():
    assert infer('type: "Accuracy"', (2, 10), (2,), tops=2)[0] == [(), (10,)]
    assert infer('type: "SoftmaxWithLoss"', (2, 10), (2,), tops=2)[0] == [(), (2, 10)]
    assert infer('type: "EuclideanLoss"', (2, 10), (2, 10))[0] == [()]


CONV = 'type: "Convolution" convolution_param'
IMPOSSIBLE = [
    (
        'type: "PriorBox"',
        [IMAGE],
        "not know this type, and the run needs .*; use engine: caffe.* Known types are: .*Conv",
    ),
    ('type: "Filter"', [IMAGE, (2,)], "does not know this type"),
    (
        'type: "Convolutoin"',
        [IMAGE],
        r"not know this type; did you mean Convolution\?, and the .*; use engine: caffe",
    ),
    ('type: "relu"', [IMAGE], r"does not know this type; did you mean ReLU\?"),
    ('type: "ReLU"', [], "0 bottoms"),
    ('type: "ReLU"', [IMAGE, IMAGE], "2 bottoms"),
    ('type: "Eltwise"', [IMAGE], "1 bottoms"),
    (f"{CONV} {{ num_output: 8 }}", [IMAGE], "kernel_size"),
    (f"{CONV} {{ kernel_size: 3 }}", [IMAGE], "num_output"),
    (f"{CONV} {{ num_output: 8 kernel_size: 0 }}", [IMAGE], "kernel of 0"),
    (f"{CONV} {{ num_output: 8 kernel_size: 3 stride: 0 }}", [IMAGE], "stride of 0"),
    (f"{CONV} {{ num_output: 8 kernel_size: 3 stride_h: 2 }}", [IMAGE], "stride of 0"),
    (f"{CONV} {{ num_output: 8 kernel_size: 3 dilation: 0 }}", [IMAGE], "dilation of 0"),
    (f"{CONV} {{ num_output: 8 kernel_size: 3 kernel_h: 3 }}", [IMAGE], "kernel_size as well as"),
    (f"{CONV} {{ num_output: 8 kernel_h: 3 kernel_w: 3 }}", [(2, 6, 9)], "two spatial axes"),
    (f"{CONV} {{ num_output: 8 kernel_size: [3, 3, 3] }}", [IMAGE], "3 kernel_size"),
    (f"{CONV} {{ num_output: 8 kernel_size: 3 group: 4 }}", [IMAGE], "4 groups"),
    (f"{CONV} {{ num_output: 8 kernel_size: 3 group: 0 }}", [IMAGE], "0 groups"),
    (f"{CONV} {{ num_output: 8 kernel_size: 33 }}", [IMAGE], "33 pixels on 32"),
    (f"{CONV} {{ num_output: 8 kernel_size: 3 axis: 4 }}", [IMAGE], "axis 4"),
    (f"{CONV} {{ num_output: 8 kernel_size: 3 }}", [IMAGE, (1, 6, 3, 3)], "differ"),
    (f"{CONV} {{ num_output: 4294967295 kernel_size: 1 }}", [IMAGE], "larger than Caffe's"),
    (f"{CONV} {{ num_output: 4 kernel_size: 1 pad: 4294967295 }}", [IMAGE], "larger than Caffe's"),
    (
        'type: "Deconvolution" convolution_param { num_output: 2 kernel_size: 1 pad: 40 }',
        [IMAGE],
        "impossible shape",
    ),
    ('type: "Pooling"', [IMAGE], "kernel size is missing"),
    ('type: "Pooling" pooling_param { kernel_size: 2 }', [(2, 6)], "four axes"),
    ('type: "Pooling" pooling_param { kernel_size: 2 pad: 2 }', [IMAGE], "pad"),
    ('type: "Pooling" pooling_param { kernel_size: 2 stride: 0 }', [IMAGE], "stride of 0"),
    ('type: "Pooling" pooling_param { kernel_h: 2 }', [IMAGE], "kernel_h and kernel_w"),
    ('type: "Pooling" pooling_param { kernel_size: 2 kernel_h: 2 kernel_w: 2 }', [IMAGE], "as well as"),
    ('type: "Pooling" pooling_param { global_pooling: true kernel_size: 2 }', [IMAGE], "no kernel"),
    ('type: "Pooling" pooling_param { global_pooling: true stride: 2 }', [IMAGE], "no stride"),
    ('type: "Pooling" pooling_param { kernel_size: 40 }', [IMAGE], "a kernel of 40"),
    ('type: "LRN" lrn_param { local_size: 4 }', [IMAGE], "odd"),
    ('type: "PReLU"', [(2,)], "channel axis"),
    ('type: "Scale" scale_param { axis: 3 num_axes: 2 }', [IMAGE], "beyond the shape"),
    ('type: "Scale" scale_param { num_axes: -2 }', [IMAGE], "num_axes is -2"),
    ('type: "Scale"', [(2,)], "axis 1"),
    ('type: "Scale"', [IMAGE, (5,)], "does not fit"),
    ('type: "Eltwise"', [IMAGE, (2, 6, 32, 31)], "differ"),
    ('type: "Eltwise" eltwise_param { coeff: 1 }', [IMAGE, IMAGE], "1 coeff"),
    ('type: "Eltwise" eltwise_param { operation: PROD coeff: [1, 1] }', [IMAGE, IMAGE], "SUM only"),
    ('type: "InnerProduct"', [IMAGE], "num_output"),
    ('type: "InnerProduct" inner_product_param { num_output: 4294967295 }', [IMAGE], "larger than Caffe's"),
    ('type: "Concat"', [IMAGE, (2, 6, 31, 32)], "differ beyond axis 1"),
    ('type: "Concat"', [IMAGE, (2, 6, 32)], "differ"),
    ('type: "Concat" concat_param { axis: 1 concat_dim: 1 }', [IMAGE], "as well as"),
    ('type: "Slice" slice_param { slice_point: 1 }', [IMAGE], "1 slice_point for 1 tops"),
    ('type: "Softmax" softmax_param { axis: 2 }', [(2, 5)], "axis 2"),
    ('type: "Flatten" flatten_param { axis: 2 end_axis: 1 }', [IMAGE], "behind"),
    ('type: "Reshape" reshape_param { shape { dim: 7 } }', [IMAGE], "differ in size"),
    ('type: "Reshape" reshape_param { shape { dim: [-1, 7] } }', [IMAGE], "parted"),
    ('type: "Reshape" reshape_param { shape { dim: [-1, -1] } }', [IMAGE], "more than one"),
    ('type: "Reshape" reshape_param { shape { dim: -2 } }', [IMAGE], "below -1"),
    ('type: "Reshape" reshape_param { shape { dim: 0 } axis: 4 }', [IMAGE], "lacks"),
    ('type: "Reshape" reshape_param { axis: -6 }', [IMAGE], "axis -6"),
    ('type: "Reshape" reshape_param { axis: 1 num_axes: 4 }', [IMAGE], "beyond"),
    ('type: "Tile"', [IMAGE], "tiles"),
    ('type: "Tile" tile_param { tiles: 2147483647 }', [IMAGE], "larger than Caffe's"),
    ('type: "ArgMax" argmax_param { top_k: 6 }', [(2, 5)], "top_k is 6 of 5"),
    ('type: "SPP" spp_param { pyramid_height: 30 }', [IMAGE], "pyramid_height"),
    ('type: "BatchReindex"', [IMAGE, (2, 2)], "one axis"),
    ('type: "Crop"', [IMAGE, (1, 1, 33, 3)], "does not fit"),
    ('type: "Crop" crop_param { offset: [1, 2, 3] }', [IMAGE, IMAGE], "3 offset"),
    ('type: "Crop"', [IMAGE, (1, 1)], "differ in axes"),
    ('type: "Embed"', [(2,)], "num_output and input_dim"),
    ('type: "Input"', [], "0 shapes"),
    ('type: "Input" input_param { shape { dim: [1, -3] } }', [], "impossible shape"),
    ('type: "Input" input_param { shape { dim: [1, 3, 9223372036854775807] } }', [], "larger than Caffe's"),
    ('type: "DummyData" dummy_data_param { num: 1 }', [], "differing numbers"),
    ('type: "Data"', [], "does not know this type"),
]


def test_all_that_cannot_be_run_is_named_and_who_needs_it() -> None:
    text = """
      layer { name: "a" type: "LSTM" bottom: "x" top: "a" }
      layer { name: "b" type: "MyPooling" bottom: "a" top: "b" }
      layer { name: "fc" type: "InnerProduct" bottom: "b" top: "b" inner_product_param { num_output: 2 } }
    """
    wanted = (
        r"^layer 'a' \(LSTM\): the onnx engine does not know this type, and layer 'fc' \(InnerProduct\) "
        r"behind it needs what it makes; use engine: caffe[^.]*\. So it is with the layers 'b' \(MyPooling\)"
        r"\. Known types"
    )
    with pytest.raises(InputError, match=wanted):
        infer_shapes(text_format.Parse(text, NetParameter()), {"x": (1, 3)})


@pytest.mark.parametrize(("layer", "bottoms", "expected"), IMPOSSIBLE)
def test_what_caffe_refuses(layer, bottoms, expected):
    with pytest.raises(InputError, match=expected) as caught:
        infer(layer, *bottoms)
    assert str(caught.value).startswith("layer 'x' (")
    assert "\n" not in str(caught.value)


def test_number_of_tops():
    with pytest.raises(InputError, match="2 tops; the type makes 1"):
        infer('type: "ReLU"', IMAGE, tops=2)


def test_unknown_bottom():
    net = NetParameter()
    net.layer.add(name="x", type="ReLU", bottom=["y"], top=["y"])
    with pytest.raises(InputError, match="'y'"):
        infer_shapes(net, {})


def test_inputs_win_over_the_input_layer_and_labels_follow_the_batch():
    net = NetParameter()
    layer = net.layer.add(name="data", type="Input", top=["data", "label"])
    layer.input_param.shape.add().dim.extend([1, 3, 4, 4])
    net.layer.add(name="read", type="Data", top=["other", "other_label"])
    shapes = infer_shapes(net, {"data": (7, 3, 4, 4), "other": (5, 1)})
    assert shapes.blobs["data"] == (7, 3, 4, 4)
    assert shapes.blobs["label"] == (7,)
    assert shapes.blobs["other_label"] == (5,)
    assert infer_shapes(net, {"other": (5, 1)}).blobs["data"] == (1, 3, 4, 4)


def test_batches_are_not_bounded_by_caffes_blob_size():
    assert top('type: "ReLU"', (10**6, 64, 224, 224)) == (10**6, 64, 224, 224)


def residual_net():
    """A stem and two blocks, the second with a projection, as ResNet-50 has them."""
    net = NetParameter(name="residual")

    def conv(name, bottom, outputs, kernel, stride=1, pad=0):
        layer = net.layer.add(name=name, type="Convolution", bottom=[bottom], top=[name])
        param = layer.convolution_param
        param.num_output, param.bias_term = outputs, False
        param.kernel_size.append(kernel)
        param.stride.append(stride)
        param.pad.append(pad)
        net.layer.add(name=f"bn_{name}", type="BatchNorm", bottom=[name], top=[name])
        scale = net.layer.add(name=f"scale_{name}", type="Scale", bottom=[name], top=[name])
        scale.scale_param.bias_term = True

    conv("conv1", "data", 64, 7, 2, 3)
    pool = net.layer.add(name="pool1", type="Pooling", bottom=["conv1"], top=["pool1"])
    pool.pooling_param.kernel_size, pool.pooling_param.stride = 3, 2
    conv("a1", "pool1", 128, 1, 2)
    conv("a2", "pool1", 64, 1)
    conv("a3", "a2", 128, 3, 2, 1)
    net.layer.add(name="sum", type="Eltwise", bottom=["a1", "a3"], top=["sum"])
    net.layer.add(name="relu", type="ReLU", bottom=["sum"], top=["sum"])
    last = net.layer.add(name="pool", type="Pooling", bottom=["sum"], top=["pool"])
    last.pooling_param.global_pooling = True
    fc = net.layer.add(name="fc", type="InnerProduct", bottom=["pool"], top=["fc"])
    fc.inner_product_param.num_output = 1000
    return net


def weights_for(shapes):
    rng = np.random.default_rng(0)
    weights = Weights()
    for name, params in shapes.params.items():
        weights.add(
            LayerParameter(name=name), [rng.normal(size=shape).astype(np.float32) for shape in params]
        )
    return weights


def test_residual_net():
    shapes = infer_shapes(residual_net(), {"data": (1, 3, 224, 224)})
    sizes = {name: shape[1:] for name, shape in shapes.blobs.items()}
    assert sizes["conv1"] == (64, 112, 112)
    assert sizes["pool1"] == (64, 56, 56)
    assert sizes["a1"] == sizes["a3"] == sizes["sum"] == (128, 28, 28)
    assert sizes["pool"] == (128, 1, 1)
    assert sizes["fc"] == (1000,)
    assert shapes.macs["conv1"] == 118_013_952  # as in the tables of ResNet's cost
    assert shapes.macs["fc"] == 128_000
    assert shapes.params["fc"] == [(1000, 128), (1000,)]
    assert shapes.params["relu"] == []


def test_shortcuts_of_different_sizes_are_found():
    """A 1x1 stride-2 pooling of 32 gives 17, a convolution gives 16."""
    net = NetParameter()
    pool = net.layer.add(name="pool", type="Pooling", bottom=["data"], top=["pool"])
    pool.pooling_param.kernel_size, pool.pooling_param.stride = 1, 2
    conv = net.layer.add(name="conv", type="Convolution", bottom=["data"], top=["conv"])
    conv.convolution_param.num_output = 3
    conv.convolution_param.kernel_size.append(1)
    conv.convolution_param.stride.append(2)
    net.layer.add(name="sum", type="Eltwise", bottom=["pool", "conv"], top=["sum"])
    with pytest.raises(InputError, match=r"layer 'sum' \(Eltwise\).*17, 17.*16, 16"):
        infer_shapes(net, {"data": (1, 3, 32, 32)})


def test_weights_that_fit():
    net = residual_net()
    shapes = infer_shapes(net, {"data": (1, 3, 224, 224)})
    weights = weights_for(shapes)
    weights.add(LayerParameter(name="of another net"), [np.float32(np.nan)])
    check_weights(net, weights, shapes)


def test_legacy_shapes_fit_and_are_changed_in_a_copy():
    net = residual_net()
    shapes = infer_shapes(net, {"data": (1, 3, 224, 224)})
    weights = weights_for(shapes)
    fc = [blob.reshape((1,) * (4 - blob.ndim) + blob.shape) for blob in weights["fc"]]
    weights.replace("fc", fc)
    check_weights(net, weights, shapes)
    changed = in_shape(weights, shapes)
    assert [blob.shape for blob in changed["fc"]] == [(1000, 128), (1000,)]
    assert [blob.shape for blob in weights["fc"]] == [(1, 1, 1000, 128), (1, 1, 1, 1000)]
    assert all(np.shares_memory(one, other) for one, other in zip(changed["fc"], fc, strict=True))
    assert in_shape(changed, shapes) is changed
    weights.replace("fc", [fc[0].reshape(1, 1000, 128), fc[1]])
    with pytest.raises(InputError, match=r"layer 'fc'.*blob 0"):
        check_weights(net, weights, shapes)


@pytest.mark.parametrize(
    ("layer", "change", "expected"),
    [
        ("fc", lambda blobs: blobs[:1], "needs 2 blobs but has 1"),
        ("relu", lambda _: [np.zeros(1)], "needs 0 blobs but has 1"),
        (
            "fc",
            lambda blobs: [blobs[0].T, blobs[1]],
            r"blob 0 must have the shape \(1000, 128\) but has \(128, 1000\)",
        ),
        ("fc", lambda blobs: [blobs[0], blobs[1] * np.nan], "blob 1 holds a NaN"),
        ("conv1", lambda blobs: [blobs[0] - np.inf], "infinity"),
    ],
)
def test_weights_that_do_not_fit(layer, change, expected):
    net = residual_net()
    shapes = infer_shapes(net, {"data": (1, 3, 224, 224)})
    weights = weights_for(shapes)
    weights.replace(layer, change(weights[layer]))
    with pytest.raises(InputError, match=f"layer '{layer}'.*{expected}") as caught:
        check_weights(net, weights, shapes)
    assert "\n" not in str(caught.value)


def test_missing_layers():
    net = residual_net()
    shapes = infer_shapes(net, {"data": (1, 3, 224, 224)})
    weights = Weights()
    with pytest.raises(InputError, match=r"layer 'conv1'.*no weights in the caffemodel"):
        check_weights(net, weights, shapes)
