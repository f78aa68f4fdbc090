"""The tables of ranges, read back as their clients read them."""

import json
import struct

import numpy as np
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format

from quantize.caffenet.model import Model
from quantize.caffenet.quantized import Quantizer
from quantize.errors import InputError
from quantize.exports.caffe import plain_net
from quantize.exports.integers import IntegerNet, whole_codes
from quantize.exports.ranges import export_ranges
from tests.families import FAMILIES, family
from tests.stages.test_sites import quantized_net

Made = tuple[IntegerNet, dict[str, Quantizer], dict[str, str]]


def made(name: str, **values: object) -> Made:
    net, weights, _ = quantized_net(family(name), **values)
    integers = IntegerNet.of(Model(net, weights))
    files = export_ranges(integers, "net").files
    return integers, plain_net(integers)[1], {file: content.decode() for file, content in files.items()}


@pytest.fixture(params=[{}, {"levels": 255, "sums": True, "input": True}], ids=["127", "255"])
def mobilenet(request: pytest.FixtureRequest) -> Made:
    return made("mobilenet_v2", **request.param)


def test_the_calibration_table_of_tpu_mlir(mobilenet: Made) -> None:
    _, quantizers, files = mobilenet
    rows = [line.split(" ") for line in files["net_tpu_mlir.table"].splitlines() if not line.startswith("#")]
    assert [row[0] for row in rows] == list(quantizers)
    for (_, *numbers), quantizer in zip(rows, quantizers.values(), strict=True):
        highest, lowest = (code * quantizer.step for code in (quantizer.highest, quantizer.lowest))
        assert list(map(float, numbers)) == pytest.approx([highest, lowest, highest], abs=1e-6)
    assert any(quantizer.lowest < 0 for quantizer in quantizers.values())


def test_the_calibration_cache_of_tensorrt(mobilenet: Made) -> None:
    _, quantizers, files = mobilenet
    head, *lines = files["net_tensorrt.cache"].splitlines()
    assert head == "TRT-8601-EntropyCalibration2"
    for line, (blob, quantizer) in zip(lines, quantizers.items(), strict=True):
        name, digits = line.split(": ")
        [step] = struct.unpack("!f", bytes.fromhex(digits))
        assert name == blob
        assert 127 * step == pytest.approx(quantizer.highest * quantizer.step)


def record_class() -> type:
    """ScaleOffsetRecord as AMCT's documentation defines it."""
    file = descriptor_pb2.FileDescriptorProto(name="record.proto", syntax="proto2")
    kinds = descriptor_pb2.FieldDescriptorProto
    layer = file.message_type.add(name="SingleLayerRecord")
    for number, (name, kind, label) in enumerate(
        [
            ("scale_d", kinds.TYPE_FLOAT, kinds.LABEL_OPTIONAL),
            ("offset_d", kinds.TYPE_INT32, kinds.LABEL_OPTIONAL),
            ("scale_w", kinds.TYPE_FLOAT, kinds.LABEL_REPEATED),
            ("offset_w", kinds.TYPE_INT32, kinds.LABEL_REPEATED),
        ],
        1,
    ):
        layer.field.add(name=name, number=number, type=kind, label=label)
    record = file.message_type.add(name="ScaleOffsetRecord")
    entry = record.nested_type.add(name="MapFiledEntry")
    entry.field.add(name="key", number=1, type=kinds.TYPE_STRING, label=kinds.LABEL_OPTIONAL)
    entry.field.add(
        name="value",
        number=2,
        type=kinds.TYPE_MESSAGE,
        label=kinds.LABEL_OPTIONAL,
        type_name=".SingleLayerRecord",
    )
    record.field.add(
        name="record",
        number=1,
        type=kinds.TYPE_MESSAGE,
        label=kinds.LABEL_REPEATED,
        type_name=".ScaleOffsetRecord.MapFiledEntry",
    )
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("ScaleOffsetRecord"))


def test_the_record_of_amct(mobilenet: Made) -> None:
    net, quantizers, files = mobilenet
    records = text_format.Parse(files["net_amct.txt"], record_class()()).record
    plain, _ = plain_net(net)
    reads = {layer.name: layer.bottom[0] for layer in plain.layer if layer.bottom}
    assert [record.key for record in records] == [name for name in net.layers if reads[name] in quantizers]
    for record in records:
        quantizer, value = quantizers[reads[record.key]], record.value
        lowest, highest = (
            value.scale_d * (code - value.offset_d)
            for code in (quantizer.lowest + value.offset_d, quantizer.highest + value.offset_d)
        )
        assert -128 <= quantizer.lowest + value.offset_d < quantizer.highest + value.offset_d <= 127
        wanted = [code * quantizer.step for code in (quantizer.lowest, quantizer.highest)]
        assert [lowest, highest] == pytest.approx(wanted)
        kernels = net.weights[record.key][0].astype(np.float64)
        kernels = kernels.reshape(len(kernels), -1)
        scales = np.array(value.scale_w)[:, None]
        assert list(value.offset_w) == [0] * len(value.scale_w)
        codes = np.rint(kernels / scales).clip(-128, 127)
        if len(scales) > 1:  # ours exactly, but for -128 times a negative scale
            away = abs(codes * scales - kernels) / scales
            assert (away > 1e-4).sum() <= (whole_codes(net.layers[record.key]).codes == -128).sum()
            assert away.max() < 1.0001
        else:
            assert abs(codes).max() == 127
            assert abs(codes * scales - kernels).max() <= scales.item() * 0.5001


def test_the_encodings_of_qnn(mobilenet: Made) -> None:
    _, quantizers, files = mobilenet
    encodings = json.loads(files["net_qnn.json"])["activation_encodings"]
    assert list(encodings) == list(quantizers)
    for (found,), quantizer in zip(encodings.values(), quantizers.values(), strict=True):
        values = found["scale"] * (np.arange(256) + found["offset"])
        assert [found["min"], found["max"]] == pytest.approx([values[0], values[-1]])
        for code in (quantizer.lowest, 0, 1, quantizer.highest):
            assert np.abs(values - code * quantizer.step).min() < 1e-6 * quantizer.step


@pytest.mark.parametrize("name", FAMILIES)
def test_every_range_is_of_a_blob_of_the_plain_pair(name: str) -> None:
    net, quantizers, _ = made(name, sums=True)
    plain, _ = plain_net(net)
    blobs = [top for layer in plain.layer for top in layer.top]
    assert len(blobs) == len(set(blobs))
    assert set(quantizers) <= set(blobs)
    read = {bottom for layer in plain.layer if layer.name in net.layers for bottom in layer.bottom}
    assert read - set(quantizers) <= {"data"}


def test_what_clients_do_with_weights_is_said_and_true() -> None:
    _, _, files = made("resnet")
    about = files["net_ranges.txt"]
    assert all(file in about for file in files if file != "net_ranges.txt")
    assert files["net_tpu_mlir.table"].splitlines()[0].removeprefix("# ") in about
    levels = 2.0 ** np.arange(7)
    step = 64 / 127
    away = abs(np.rint(levels / step) * step / levels - 1)
    assert "up to 0.8 %" in about
    assert away.max() == pytest.approx(0.008, abs=0.0005)


def test_a_name_with_a_blank_is_refused() -> None:
    net, weights, _ = quantized_net(family("resnet"))
    for layer in net.layer:
        for names in (layer.bottom, layer.top):
            names[:] = [name.replace("right_a", "right a") for name in names]
    with pytest.raises(InputError, match="blob 'right a': names with blanks or colons cannot stand"):
        export_ranges(IntegerNet.of(Model(net, weights)), "net")
