"""caffe.proto, what is compiled of it, and the pool that it lives in."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from google.protobuf import descriptor_pb2

from quantize.caffenet import TEST, TRAIN, LayerParameter, NetParameter
from quantize.caffenet import schema as schema_module

ROOT = Path(__file__).resolve().parents[2]
CAFFENET = ROOT / "quantize" / "caffenet"


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    pytest.importorskip("grpc_tools")
    out = tmp_path_factory.mktemp("proto")
    runpy.run_path(str(ROOT / "scripts" / "compile_proto"))["compile_proto"](out)
    return out


def test_compiled_files_belong_to_the_source(compiled):
    def files(path):
        return descriptor_pb2.FileDescriptorSet.FromString(path.read_bytes())

    assert files(compiled / "caffe.desc") == files(CAFFENET / "caffe.desc")


def test_type_stub_belongs_to_the_source(compiled):
    """Compared by the names it declares, as the stub's text varies with the version of protoc."""

    def declared(path):
        return [
            line.split(":")[0].split("(")[0]
            for line in path.read_text().splitlines()
            if "_FIELD_NUMBER" in line
        ]

    assert declared(compiled / "schema.pyi") == declared(CAFFENET / "schema.pyi")


def test_no_source_info_in_the_descriptor():
    files = descriptor_pb2.FileDescriptorSet.FromString((CAFFENET / "caffe.desc").read_bytes())
    assert [file.name for file in files.file] == ["caffe.proto"]
    assert not files.file[0].HasField("source_code_info")


@pytest.mark.parametrize(
    ("message", "field", "number"),
    [
        ("NetParameter", "layer", 100),
        ("NetParameter", "layers", 2),
        ("LayerParameter", "blobs", 7),
        ("LayerParameter", "convolution_param", 106),
        ("LayerParameter", "batch_norm_param", 139),
        ("LayerParameter", "scale_param", 142),
        ("LayerParameter", "recurrent_param", 146),
        ("LayerParameter", "swish_param", 147),
        ("LayerParameter", "clip_param", 148),
        ("BlobProto", "double_data", 8),
        ("ConvolutionParameter", "dilation", 18),
        ("V1LayerParameter", "blobs", 6),
        ("V1LayerParameter", "loss_param", 42),
        ("V0LayerParameter", "hdf5_output_param", 1001),
        ("SolverParameter", "layer_wise_reduce", 41),
    ],
)
def test_field_numbers(message, field, number):
    assert getattr(schema_module, message).DESCRIPTOR.fields_by_name[field].number == number


def test_defaults():
    layer = LayerParameter()
    assert layer.batch_norm_param.eps == pytest.approx(1e-5)
    assert layer.batch_norm_param.moving_average_fraction == pytest.approx(0.999)
    assert layer.lrn_param.local_size == 5
    assert layer.crop_param.axis == 2
    assert layer.convolution_param.bias_term is True
    assert layer.scale_param.bias_term is False
    assert (TRAIN, TEST) == (0, 1)
    assert NetParameter().state.phase == TEST


def test_lives_beside_another_caffe_proto_in_the_default_pool():
    """As when pycaffe's caffe_pb2, of another version, is in the same process; in both orders."""
    code = """
from google.protobuf import descriptor_pb2, descriptor_pool
def other():
    file = descriptor_pb2.FileDescriptorProto(name="caffe.proto", package="caffe", syntax="proto2")
    net = file.message_type.add(name="NetParameter")
    net.field.add(name="other", number=1, label=1, type=5)
    descriptor_pool.Default().Add(file)
    assert descriptor_pool.Default().FindMessageTypeByName("caffe.NetParameter").fields_by_name["other"]
def ours():
    from quantize.caffenet import NetParameter
    assert NetParameter(name="n").name == "n"
ORDER
"""
    for order in ("other(); ours()", "ours(); other()"):
        subprocess.run([sys.executable, "-c", code.replace("ORDER", order)], check=True, cwd=ROOT)


def test_import_is_light():
    """No compiler, no onnx, no cv2: the command line's --help waits for this import."""
    code = "import sys, quantize.caffenet; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True, text=True)
    assert {"grpc_tools", "onnx", "onnxruntime", "cv2", "pydantic"}.isdisjoint(done.stdout.split())
