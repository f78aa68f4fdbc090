"""Schemas of forks: joined by name, carried by the net, and the fields that only a fork knows."""

from pathlib import Path

import pytest

from quantize.caffenet import (
    InferenceNet,
    NetParameter,
    Weights,
    empty_like,
    foreign_fields,
    format_prototxt,
    infer_shapes,
    known_part,
    load_schema,
    read_prototxt,
    schema_of,
    single_assignment,
)
from quantize.caffenet import fork as fork_module
from quantize.data.feed import Feed
from quantize.errors import InputError
from quantize.settings import RenormSettings, WeightSettings
from quantize.stages.renorm import renorm
from quantize.stages.sites import plain_relus
from quantize.stages.weights import choices
from quantize.sweep.early_pooling import with_early_pooling
from tests.nets import model_of

pytest.importorskip("grpc_tools")

# As forks are: numbers that Caffe 1.0 uses for something else (148: clip_param, 13: round_mode), values in
# another order, another default, another type, messages of their own, an import.
FORK = """
syntax = "proto2";
package caffe;
import "more.proto";
enum Phase { TRAIN = 0; TEST = 1; }
message NetParameter { optional string name = 1; repeated LayerParameter layer = 100;
  optional int32 batch = 9; repeated V1LayerParameter layers = 2; }
message NetStateRule { optional Phase phase = 1; }
message LayerParameter {
  optional string name = 1;
  optional string type = 2;
  repeated string bottom = 3;
  repeated string top = 4;
  repeated NetStateRule include = 8;
  optional ConvolutionParameter convolution_param = 106;
  optional BatchNormParameter batch_norm_param = 139;
  optional PoolingParameter pooling_param = 121;
  optional ReLUParameter relu_param = 123;
  optional RotateParameter rotate_param = 202;
  optional SmoothL1LossParameter smooth_l1_loss_param = 148;
  optional string engine = 149 [default = ""];
  optional Phase where = 150;
}
message RotateParameter { repeated uint32 order = 1; }
message SmoothL1LossParameter { optional float sigma = 1; }
message BatchNormParameter { optional float eps = 3 [default = 0.001]; optional bool clip_variance = 7; }
message ReLUParameter { optional float negative_slope = 1; optional bool fuse = 3; }
message PoolingParameter {
  enum PoolMethod { SUM = 0; AVE = 1; MAX = 2; }
  optional PoolMethod pool = 1 [default = MAX];
  optional uint32 kernel_size = 2;
  optional uint32 stride = 3 [default = 1];
  optional bool ceil_mode = 13 [default = true];
}
message ConvolutionParameter {
  oneof of_the_fork { bool relu = 19; string other = 20; }
  optional uint32 num_output = 1;
  optional uint32 kernel_size = 4;
  optional string cudnn_convolution_algo_seeker = 21;
  optional More more = 22;
}
message V1LayerParameter {
  enum LayerType { NONE = 0; RELU = 18; INTERP = 50; }
  optional string name = 4;
  optional LayerType type = 5;
  repeated string bottom = 2;
  repeated string top = 3;
  optional float slope = 60;
}
"""
MORE = 'syntax = "proto2"; package caffe; message More { optional int32 what = 1; }'
NET = """
name: "net"
layer { name: "data" type: "Input" top: "data" input_param { shape { dim: 1 dim: 3 dim: 8 dim: 8 } } }
layer { name: "bn" type: "BatchNorm" bottom: "data" top: "data" }
layer { name: "pool" type: "Pooling" bottom: "data" top: "pool"
  pooling_param { pool: %s kernel_size: 3 stride: 2 } }
%s
"""


@pytest.fixture
def fork(tmp_path: Path) -> Path:
    (tmp_path / "more.proto").write_text(MORE)
    path = tmp_path / "fork.proto"
    path.write_text(FORK)
    return path


@pytest.fixture
def read(tmp_path: Path, fork: Path):
    schema = load_schema(fork)

    def read(text: str, with_schema: bool = True) -> NetParameter:
        path = tmp_path / "net.prototxt"
        path.write_text(text)
        return read_prototxt(path, schema if with_schema else None)

    return read


def layer(text: str, name: str = "x", kind: str = "Convolution") -> str:
    return f'layer {{ name: "{name}" type: "{kind}" bottom: "data" top: "{name}" {text} }}'


def test_the_forks_fields_are_kept_and_belong_to_the_net(read) -> None:
    text = layer("rotate_param { order: 0 order: 2 } smooth_l1_loss_param { sigma: 3 }", "p", "Rotate")
    net = read(text)
    assert type(net) is NetParameter
    assert (net.layer[0].type, net.layer[0].HasField("clip_param")) == ("Rotate", False)
    copy = NetParameter()
    copy.CopyFrom(net)
    copy.layer.add(name="clip", type="Clip").clip_param.max = 6
    copy.layer[1].clip_param.min = 0
    written = format_prototxt(copy)
    assert "rotate_param {\n    order: 0\n    order: 2\n  }" in written
    assert "smooth_l1_loss_param {\n    sigma: 3.0\n  }" in written
    assert "clip_param {\n    min: 0.0\n    max: 6.0\n  }" in written
    assert read(written) == copy
    moved = empty_like(net)
    moved.layer.extend(net.layer)
    assert format_prototxt(moved) == format_prototxt(net)
    plain = read(layer("", kind="ReLU"), with_schema=False)
    assert schema_of(plain) is None


def test_layers_of_a_fork_in_a_net_without_its_schema_are_not_lost_silently(read) -> None:
    net = NetParameter(layer=read(layer("rotate_param { order: 1 }")).layer)
    for function in (format_prototxt, foreign_fields):
        with pytest.raises(ValueError, match="without the fork's schema"):
            function(net)


def test_numbers_order_and_defaults_of_the_fork(read) -> None:
    net = read(NET % ("MAX", ""))
    bn, pool = net.layer[1:]
    assert pool.pooling_param.pool == pool.pooling_param.MAX
    assert bn.batch_norm_param.eps == pytest.approx(0.001)
    assert not net.layer[0].HasField("batch_norm_param")
    text = NET.replace("pool: %s ", "") % ""
    assert read(text).layer[2].pooling_param.pool == pool.pooling_param.MAX


@pytest.mark.parametrize("with_schema", [True, False])
@pytest.mark.parametrize(("mode", "size"), [("", 4), ("ceil_mode: true", 4), ("ceil_mode: false", 3)])
def test_ceil_mode(read, with_schema: bool, mode: str, size: int) -> None:
    net = read(NET.replace("stride: 2", f"stride: 2 {mode}") % ("MAX", ""), with_schema)
    shapes = infer_shapes(net, {"data": (1, 3, 8, 8)})
    assert shapes.blobs["pool"] == (1, 3, size, size)
    assert mode in format_prototxt(net)


def test_ceil_mode_against_round_mode(read) -> None:
    for modes in ("ceil_mode: false round_mode: CEIL", "ceil_mode: true round_mode: FLOOR"):
        net = read(NET.replace("stride: 2", f"stride: 2 {modes}") % ("MAX", ""), with_schema=False)
        with pytest.raises(InputError, match=r"layer 'pool' \(Pooling\): .*say different things"):
            infer_shapes(net, {"data": (1, 3, 8, 8)})


FOREIGN = {
    "convolution_param.relu": "convolution_param { num_output: 4 kernel_size: 3 relu: true }",
    "convolution_param.more": "convolution_param { num_output: 4 kernel_size: 3 more { what: 1 } }",
    "where": "convolution_param { num_output: 4 kernel_size: 3 } where: TEST",
    "rotate_param": "convolution_param { num_output: 4 kernel_size: 3 } rotate_param { }",
}
WITHOUT_EFFECT = (
    'engine: "M" convolution_param { num_output: 4 kernel_size: 3 cudnn_convolution_algo_seeker: "GET" }',
    "convolution_param { num_output: 4 kernel_size: 3 relu: false }",  # the fork's default
)


@pytest.mark.parametrize("field", FOREIGN)
def test_a_foreign_field_of_an_executed_layer_is_an_error(read, field: str) -> None:
    net = read(NET % ("MAX", layer(FOREIGN[field])))
    assert foreign_fields(net) == [None, None, None, field]
    with pytest.raises(
        InputError, match=rf"layer 'x' \(Convolution\): {field} is a field of a fork.*engine: caffe"
    ):
        infer_shapes(net, {"data": (1, 3, 8, 8)})
    assert [each.name for each in known_part(net, ["data"]).layer] == ["data", "bn", "pool"]
    inference = InferenceNet.of(net).net
    with pytest.raises(InputError, match=rf"layer 'x' \(Convolution\): {field} is .*skip: true"):
        choices(inference, WeightSettings())


@pytest.mark.parametrize(
    ("norm", "pool", "moves"),
    [("eps: 0.1", "MAX", True), ("clip_variance: true", "MAX", False), ("eps: 0.1", "SUM", False)],
)
def test_pooling_is_not_moved_over_what_only_the_fork_knows(read, norm: str, pool: str, moves: bool) -> None:
    text = NET.replace('"BatchNorm"', f'"BatchNorm" batch_norm_param {{ {norm} }}') % (pool, "")
    moved, _ = with_early_pooling(single_assignment(read(text)), Weights())
    assert ([each.name for each in moved.layer][1:] == ["pool", "bn"]) == moves


def test_a_value_that_only_the_fork_has(read) -> None:
    net = read(NET % ("SUM", ""))
    with pytest.raises(
        InputError, match=r"layer 'pool' \(Pooling\): pooling_param.pool: SUM is a field of a fork"
    ):
        infer_shapes(net, {"data": (1, 3, 8, 8)})


@pytest.mark.parametrize("text", WITHOUT_EFFECT)
def test_fields_without_effect_are_kept_and_run(read, text: str) -> None:
    net = read(NET % ("MAX", layer(text)))
    assert infer_shapes(net, {"data": (1, 3, 8, 8)}).blobs["x"] == (1, 4, 6, 6)
    assert list(choices(InferenceNet.of(net).net, WeightSettings())) == ["x"]
    assert read(format_prototxt(net)) == net


def test_a_relu_that_does_more_is_left_alone(read) -> None:
    net = read(NET % ("MAX", layer("relu_param { fuse: true }", kind="ReLU") + layer("", "y", "ReLU")))
    assert plain_relus(InferenceNet.of(net).net) == ["y"]


def test_statistics_of_a_batch_norm_that_does_more_are_not_measured(read) -> None:
    net = read(layer("batch_norm_param { clip_variance: true }", "bn", "BatchNorm"))
    with pytest.raises(
        InputError, match=r"layer 'bn' \(BatchNorm\): batch_norm_param.clip_variance is a field of a fork"
    ):
        renorm(model_of(net, Weights()), Feed({}), RenormSettings(), None, None)  # type: ignore[arg-type]


def test_old_layers_with_fields_of_a_fork(read) -> None:
    old = 'layers {{ name: "r" type: {} bottom: "data" top: "r" {} }}'
    assert read(old.format("RELU", "")).layer[0].type == "ReLU"
    for kind, field, named in (("RELU", "slope: 2", "slope"), ("INTERP", "", "type: INTERP")):
        with pytest.raises(InputError, match=f"layer 'r' .*has {named} of a fork.*upgrade_net_proto_text"):
            read(old.format(kind, field))


def test_schemas_that_cannot_be_used(tmp_path: Path, fork: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="No such file"):
        load_schema(tmp_path / "nothing.proto")
    with pytest.raises(InputError, match="/dev/zero: a device, not a file"):
        load_schema("/dev/zero")
    (tmp_path / "large.proto").write_bytes(b" " * (5 << 20))
    with pytest.raises(InputError, match="larger than 4 MiB"):
        load_schema(tmp_path / "large.proto")
    fork.write_text("message {")
    with pytest.raises(InputError, match=r"fork\.proto: cannot be compiled: .*1:9"):
        load_schema(fork)
    fork.write_text('syntax = "proto2"; package caffe; message Net {}')
    with pytest.raises(InputError, match=r"no message caffe\.NetParameter"):
        load_schema(fork)
    fork.write_text(
        'syntax = "proto2"; package caffe; message NetParameter {} enum LayerParameter { A = 0; }'
    )
    with pytest.raises(InputError, match=r"cannot be joined with the caffe\.proto of Caffe 1\.0"):
        load_schema(fork)
    monkeypatch.setattr(fork_module, "find_spec", lambda _: None)
    with pytest.raises(InputError, match="pip install grpcio-tools"):
        load_schema(fork)


def test_ours_joined_with_itself_is_ours() -> None:
    ours = Path(fork_module.__file__).with_name("caffe.proto")
    schema = load_schema(ours)
    joined = fork_module.fork_class(schema).DESCRIPTOR.file
    assert joined.message_types_by_name.keys() == NetParameter.DESCRIPTOR.file.message_types_by_name.keys()
    for name, message in NetParameter.DESCRIPTOR.file.message_types_by_name.items():
        there = joined.message_types_by_name[name]
        assert [(f.name, f.number, f.default_value) for f in there.fields] == [
            (f.name, f.number, f.default_value) for f in message.fields
        ]
