"""Reading nets as text: upgrades of old nets, errors that say where, schemas of forks."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quantize.caffenet import NetParameter, format_prototxt, load_schema, prototxt, read_prototxt
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
        'layer {\n  name: "a"\n  permute_param { order: 0 }\n}',
        r"line 3, column 3: .*permute_param.*model\.caffe_proto",
    ),
    "unknown value": ("layer { pooling_param { pool: SUM } }", r"line 1, column \d+: .*SUM"),
    "wrong type": ('layer {\n convolution_param { num_output: "x" } }', r"line 2, column \d+"),
    "negative": ("layer { convolution_param { num_output: -1 } }", r"line 1, column \d+"),
    "unclosed": ('layer { name: "a"', r"line 1, column \d+"),
    "unclosed string": ('layer { name: "a }', r"line 1, column \d+"),
    "twice": ('layer { name: "a" name: "b" }', r"line 1, column \d+.*name"),
    "required field": (
        'layer { type: "Clip" clip_param { min: 0 } }',
        r"layer\[0\]\.clip_param\.max is missing",
    ),
    "binary": (b"\x0a\x04name\xa2\x06\x80\xff\xfe", "not UTF-8.*caffemodel"),
    "latin-1": ('name: "caf\u00e9"\n\n'.encode("latin-1"), "line 1: not UTF-8"),
    "nulls": (b"\x00" * 64, "line 1"),
    "deep": ("layer { " * 100_000, r"line 1, column \d+"),
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


def test_files_that_cannot_be_read(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="No such file"):
        read_prototxt(tmp_path / "nothing.prototxt")
    with pytest.raises(InputError, match="directory"):
        read_prototxt(tmp_path)
    monkeypatch.setattr(prototxt, "MAX_PROTOTXT_BYTES", 1 << 20)
    (tmp_path / "large").write_bytes(b" " * (2 << 20))
    with pytest.raises(InputError, match="larger than 1 MiB"):
        read_prototxt(tmp_path / "large")


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


FORK = """
syntax = "proto2";
package caffe;
message NetParameter { optional string name = 1; repeated LayerParameter layer = 100; }
message LayerParameter {
  optional string name = 1;
  optional string type = 2;
  repeated string bottom = 3;
  repeated string top = 4;
  optional PermuteParameter permute_param = 202;
}
message PermuteParameter { repeated uint32 order = 1; }
"""


@pytest.fixture
def fork(tmp_path, monkeypatch):
    pytest.importorskip("grpc_tools")
    monkeypatch.setattr(prototxt, "_fork", None)
    path = tmp_path / "fork.proto"
    path.write_text(FORK)
    return path


def test_fields_of_a_fork_are_kept(read, fork):
    text = 'layer { name: "p" type: "Permute" permute_param { order: 0 order: 2 } }'
    net = read(text, schema=load_schema(fork))
    assert type(net) is NetParameter
    assert net.layer[0].type == "Permute"
    copy = NetParameter()
    copy.layer.add().CopyFrom(net.layer[0])
    written = format_prototxt(copy)
    assert "permute_param {\n    order: 0\n    order: 2\n  }" in written
    assert read(written) == copy


def test_schemas_that_cannot_be_used(tmp_path, fork, monkeypatch):
    with pytest.raises(InputError, match="no such file"):
        load_schema(tmp_path / "nothing.proto")
    fork.write_text("message {")
    with pytest.raises(InputError, match=r"fork\.proto: cannot be compiled: .*1:9"):
        load_schema(fork)
    fork.write_text('syntax = "proto2"; package caffe; message Net {}')
    with pytest.raises(InputError, match=r"no message caffe\.NetParameter"):
        load_schema(fork)
    monkeypatch.setattr(prototxt, "find_spec", lambda _: None)
    with pytest.raises(InputError, match="pip install grpcio-tools"):
        load_schema(fork)
