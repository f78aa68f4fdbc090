"""Reading nets as text: upgrades of old nets, errors that say where, schemas of forks."""

import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quantize.caffenet import format_prototxt, prototxt, read_prototxt
from quantize.caffenet.strings import to_bytes, to_path, to_text
from quantize.errors import InputError


@pytest.fixture
def read(tmp_path):
    def read(text, **options):
        path = tmp_path / "net.prototxt"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return read_prototxt(path, **options)

    return read


def test_round_trip(read):
    text = """
        name: "net"  # a comment
        layer { name: "data" type: "Input" top: "data" input_param { shape { dim: 1 dim: 3 dim: 8 dim: 8 } } }
        layer { name: "bn" type: "BatchNorm" bottom: "data" top: "data" batch_norm_param { eps: 0.0001 } }
        layer { name: "\u5377\u7a4d" type: "ReLU" bottom: "data" top: "data"
                relu_param { negative_slope: 0.1 } }
    """
    net = read(text)
    written = format_prototxt(net)
    assert read(written) == net
    assert "negative_slope: 0.1\n" in written
    assert "\u5377\u7a4d" in written
    assert net.layer[0].type == "Input"


def test_byte_order_mark_and_windows_line_ends(read):
    assert read('\ufeffname: "n"\r\nlayer { type: "ReLU" }\r\n').name == "n"


def test_v1_layers(read):
    net = read("""
        name: "CaffeNet"
        layers { name: "data" type: DATA top: "data" top: "label"
                 data_param { source: "lmdb" batch_size: 50
                              scale: 0.5 mean_file: "mean" crop_size: 227 mirror: true }
                 include: { phase: TRAIN } }
        layers { name: "conv1" type: CONVOLUTION bottom: "data" top: "conv1" param: "w" param: "b"
                 blob_share_mode: PERMISSIVE blobs_lr: 1 blobs_lr: 2 weight_decay: 1 weight_decay: 0
                 convolution_param { num_output: 96 kernel_size: 11 stride: 4 } }
        layers { name: "loss" type: SOFTMAX_LOSS bottom: "conv1" bottom: "label" loss_weight: 0.3
                 exclude { stage: "deploy" } }
    """)
    assert not net.layers
    assert [layer.type for layer in net.layer] == ["Data", "Convolution", "SoftmaxWithLoss"]
    data, conv, loss = net.layer
    assert (data.transform_param.scale, data.transform_param.mean_file) == (0.5, "mean")
    assert (data.transform_param.crop_size, data.transform_param.mirror) == (227, True)
    assert not data.data_param.HasField("crop_size")
    assert data.data_param.batch_size == 50
    assert data.include[0].phase == 0
    assert [(p.name, p.lr_mult, p.decay_mult) for p in conv.param] == [("w", 1, 1), ("b", 2, 0)]
    assert conv.param[0].share_mode == 1
    assert not conv.param[1].HasField("share_mode")
    assert conv.convolution_param.kernel_size == [11]
    assert loss.loss_weight == pytest.approx([0.3])
    assert loss.exclude[0].stage == ["deploy"]


def test_every_v1_type_is_known(read):
    from quantize.caffenet.schema import V1LayerParameter

    for name in V1LayerParameter.LayerType.keys():  # noqa: SIM118 - an enum wrapper is no mapping
        net = read(f'layers {{ name: "l" type: {name} }}')
        assert net.layer[0].type.lower() in (
            name.replace("_", "").lower(),
            {"SOFTMAX_LOSS": "softmaxwithloss", "NONE": ""}.get(name),
        )


@pytest.mark.parametrize("data", ["data", "image_data", "window_data"])
def test_transform_fields_of_all_data_layers(read, data):
    net = read(f"layers {{ type: {data.upper()} top: 'd' {data}_param {{ crop_size: 3 mirror: false }} }}")
    assert net.layer[0].transform_param.crop_size == 3
    assert net.layer[0].transform_param.HasField("mirror")
    assert not getattr(net.layer[0], f"{data}_param").HasField("crop_size")


@pytest.mark.parametrize(
    "inputs",
    [
        'input: "a" input: "b" input_dim: [1, 3, 8, 8, 1, 1, 1, 2]',
        'input: "a" input: "b" input_shape { dim: [1, 3, 8, 8] } input_shape { dim: [1, 1, 1, 2] }',
    ],
)
def test_top_level_inputs(read, inputs):
    net = read(inputs + ' layer { name: "r" type: "ReLU" bottom: "a" top: "a" }')
    assert not any([net.input, net.input_dim, net.input_shape])
    assert [layer.name for layer in net.layer] == ["input", "r"]
    assert (net.layer[0].type, list(net.layer[0].top)) == ("Input", ["a", "b"])
    assert [list(shape.dim) for shape in net.layer[0].input_param.shape] == [[1, 3, 8, 8], [1, 1, 1, 2]]


@pytest.mark.parametrize(
    "dims", ["input_dim: [1, 3, 8]", "input_dim: [1, 3, 8, 8, 1]", "input_shape {} input_shape {}"]
)
def test_inputs_that_do_not_add_up(read, dims):
    with pytest.raises(InputError, match=r"net\.prototxt: .*input_dim"):
        read(f'input: "a" {dims} layer {{ type: "ReLU" }}')


def test_batch_norm_with_explicit_params(read):
    net = read("""
        layer { type: "BatchNorm" param { lr_mult: 1 } param { } param { name: "f" decay_mult: 2 } }
        layer { type: "BatchNorm" param { lr_mult: 1 } }
    """)
    assert [(p.lr_mult, p.decay_mult) for p in net.layer[0].param] == [(0, 0)] * 3
    assert net.layer[0].param[2].name == "f"
    assert net.layer[1].param[0].lr_mult == 1


BAD = {
    "empty": ("", "no layers"),
    "no layers": ('name: "x"', "no layers"),
    "unknown field": (
        'layer {\n  name: "a"\n  type: "ReLU"\n  rotate_param { order: 0 }\n}',
        r"line 4, column 3: .*rotate_param.*model\.caffe_proto",
    ),
    "unknown fields": (
        'layer { type: "ReLU" relu_param { fuse: true slop: 1 } }\nnam: "x"\n'
        "layer { pooling_param { pool: A } }",
        r"line 1, column 35: ReLUParameter has no field fuse; .*; and there are ReLUParameter\.slop "
        r"\(line 1\), NetParameter\.nam \(line 2\), pool: A \(line 3\)$",
    ),
    "an unknown field of words and numbers": (
        'layer { type: "X" x_param { a: 1 a: "b" } }',
        "field a is given numbers and strings; correct it, or give",
    ),
    "an unknown phase": (
        'layer { type: "X" include { phase: VAL } }',
        "Phase has no value VAL; it has TRAIN",
    ),
    "unknown value": ("layer { pooling_param { pool: SUM } }", r"line 1, column \d+: .*SUM"),
    "wrong type": ('layer {\n convolution_param { num_output: "x" } }', r"line 2, column \d+"),
    "negative": ("layer { convolution_param { num_output: -1 } }", r"line 1, column \d+"),
    "unclosed": ('\nlayer { name: "a"', r"line 2: the brace of `layer {` is never closed"),
    "unclosed before the next layer": (
        'name: "n"\nlayer {\n  name: "a" # }\n  convolution_param { num_output: 1\n}\nlayer { name: "}" }\n',
        r"line 2: the brace of `layer {` is not closed before the next layer \(line 6\)",
    ),
    "a brace too many": ('layer { name: "a" }\n}\nlayer {}', "line 2: a closing brace too many"),
    "misspelt field": (
        "layer { convolution_param { kernal_size: 3 } }",
        r"line 1, column \d+: ConvolutionParameter has no field kernal_size; did you mean kernel_size\?",
    ),
    "misspelt value": ("layer { pooling_param { pool: AVG } }", r"no value AVG; it has MAX, AVE, STOCHASTIC"),
    "misspelt value, nearly": ("layer { pooling_param { pool: max } }", r"no value max; did you mean MAX\?"),
    "old word, new type": ('layers { type: "Convolution" }', "no type of an old layer.*CONVOLUTION"),
    "solver": (
        'net: "models/train_val.prototxt"\nbase_lr: 0.1\n',
        'a solver\'s prototxt; give the net that it names, "models/train_val.prototxt"',
    ),
    "unclosed string": ('layer { name: "a }', r"line 1, column \d+"),
    "twice": ('layer { name: "a" name: "b" }', r"line 1, column \d+.*name"),
    "required field": (
        'layer { type: "Clip" clip_param { min: 0 } }',
        r"layer\[0\]\.clip_param\.max is missing",
    ),
    "binary": (b"\x0a\x04name\xa2\x06\x80\xff\xfe", "a binary file.*caffemodel.*changed places"),
    "nulls": (b"\x00" * 64, "a binary file"),
    "deep": ("layer { a { " * 100_000, "line 1"),
    "v0": ('layers { layer { name: "conv1" type: "conv" } }', "conv1.*upgrade_net_proto_text"),
    "two ages": ('layers { name: "a" type: RELU } layer { name: "b" type: "ReLU" }', "both old"),
}


@pytest.mark.parametrize("case", BAD)
def test_faults_are_one_line(read, case):
    text, expected = BAD[case]
    with pytest.raises(InputError, match=expected) as caught:
        read(text)
    message = str(caught.value)
    assert "net.prototxt: " in message
    assert "\n" not in message
    assert len(message) < 700


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(InputError, match="No such file"):
        read_prototxt(tmp_path / "nothing.prototxt")
    with pytest.raises(InputError, match="directory"):
        read_prototxt(tmp_path)
    (tmp_path / "large").write_bytes(b" " * (prototxt.MAX_PROTOTXT_BYTES + 1))
    with pytest.raises(InputError, match="larger than 16 MiB"):
        read_prototxt(tmp_path / "large")
    os.truncate(tmp_path / "large", 0)
    (tmp_path / "large").write_bytes(b"\x0a\x04name\xa2\x06")
    os.truncate(tmp_path / "large", prototxt.MAX_PROTOTXT_BYTES + 1)
    with pytest.raises(InputError, match=r"a binary file.*changed places"):
        read_prototxt(tmp_path / "large")
    os.mkfifo(tmp_path / "pipe")
    for endless in (tmp_path / "pipe", "/dev/zero"):
        with pytest.raises(InputError, match=f"{endless}: a (pipe|device), not a file"):
            read_prototxt(endless)


def test_bytes_in_comments_and_strings_are_carried_through(read):
    gbk, latin = "\u5377\u79ef".encode("gbk"), "caf\u00e9".encode("latin-1")
    utf8 = "\u5377 \U0010fe80".encode()
    text = b'# %b %b\nname: "%b" layer { name: "%b" type: "ReLU" top: "%b" top: "\\261\\xED\\\\261" }'
    net = read(text % (gbk, latin, latin, gbk, utf8))
    layer = net.layer[0]
    assert [to_bytes(each) for each in (net.name, layer.name, *layer.top)] == [
        *(latin, gbk, utf8),
        b"\xb1\xed\\261",
    ]
    written = to_bytes(format_prototxt(net))
    assert read(written) == net
    assert all(b'"%b"' % each in written for each in (latin, gbk, utf8))


@given(st.binary(max_size=20))
def test_every_string_of_bytes_has_a_text_of_its_own(data):
    assert to_bytes(to_text(data)) == data
    assert os.fsencode(to_path(to_text(data))) == data
    to_text(data).encode()


@given(st.text(max_size=100), st.integers(0, 200))
@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_text_gives_a_net_or_one_line(read, junk, place):
    good = 'name: "n" layer { name: "conv" type: "Convolution" convolution_param { pad: [3] } }'
    try:
        read(good[:place] + junk + good[place:])
    except InputError as error:
        message = str(error)
    else:
        return
    assert "\n" not in message
