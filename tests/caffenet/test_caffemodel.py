"""Weights: the wire format both ways, old formats, damage."""

import io
import os

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quantize.caffenet import BlobProto, LayerParameter, NetParameter, Weights, check_weights, infer_shapes
from quantize.caffenet.weights import MAX_BYTES
from quantize.errors import InputError, LabelfreeError


def blob(layer, array, legacy=False):
    proto = layer.blobs.add()
    if legacy:
        shape = (1,) * (4 - array.ndim) + array.shape
        proto.num, proto.channels, proto.height, proto.width = shape
    else:
        proto.shape.dim.extend(array.shape)
    proto.data.extend(array.reshape(-1).tolist())
    return proto


def small_net(legacy=False):
    rng = np.random.default_rng(0)
    net = NetParameter(name="small")
    conv = net.layer.add(name="conv", type="Convolution", bottom=["data"], top=["conv"])
    conv.convolution_param.num_output = 4
    blob(conv, rng.normal(size=(4, 3, 2, 2)).astype(np.float32), legacy)
    blob(conv, rng.normal(size=4).astype(np.float32), legacy)
    net.layer.add(name="relu", type="ReLU", bottom=["conv"], top=["conv"])
    fc = net.layer.add(name="fc", type="InnerProduct", bottom=["conv"], top=["fc"])
    blob(fc, rng.normal(size=(5, 7)).astype(np.float32), legacy)
    return net


def read(tmp_path, data, name="net.caffemodel"):
    path = tmp_path / name
    path.write_bytes(data)
    return Weights.read(path)


def written(weights):
    file = io.BytesIO()
    weights.write(file)
    return file.getvalue()


def varint(value):
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def record(number, payload):
    return varint(number << 3 | 2) + varint(len(payload)) + payload


def net_of_blob(blob_bytes):
    return record(100, record(1, b"conv") + record(7, blob_bytes))


def test_reads_names_and_blobs(tmp_path):
    net = small_net()
    weights = read(tmp_path, net.SerializeToString())
    assert weights.name == "small"
    assert weights.layers() == ["conv", "relu", "fc"]
    assert "fc" in weights
    assert "fc8" not in weights
    assert weights["relu"] == []
    for layer in net.layer:
        for array, proto in zip(weights[layer.name], layer.blobs, strict=True):
            assert array.dtype == np.float32
            assert array.shape == tuple(proto.shape.dim)
            assert not array.flags.writeable
            assert array.base is not None  # a view
            np.testing.assert_array_equal(array.reshape(-1), np.array(proto.data, np.float32))
    with pytest.raises(KeyError):
        weights["fc8"]


def test_untouched_file_is_written_byte_for_byte(tmp_path):
    data = small_net().SerializeToString()
    assert written(read(tmp_path, data)) == data


def test_legacy_shapes(tmp_path):
    net = small_net(legacy=True)
    weights = read(tmp_path, net.SerializeToString())
    assert [array.shape for array in weights["conv"]] == [(4, 3, 2, 2), (1, 1, 1, 4)]
    weights.reshape("conv", [(4, 3, 2, 2), (4,)])
    assert weights["conv"][1].shape == (4,)
    assert written(weights) == net.SerializeToString()  # seen in another shape is not touched


def test_double_data(tmp_path):
    net = NetParameter()
    proto = net.layer.add(name="fc").blobs.add()
    proto.shape.dim.extend([2, 1])
    proto.double_data.extend([0.1, 1e-3])
    weights = read(tmp_path, net.SerializeToString())
    np.testing.assert_array_equal(weights["fc"][0], np.array([[0.1], [1e-3]], np.float32))
    assert weights["fc"][0].dtype == np.float32
    assert written(weights) == net.SerializeToString()


@pytest.mark.parametrize(("number", "wire", "dtype"), [(5, 5, "<f4"), (8, 1, "<f8")])
@pytest.mark.parametrize("count", [1, 63, 64, 65, 1000])
def test_unpacked_data(tmp_path, number, wire, dtype, count):
    values = np.random.default_rng(1).normal(size=count).astype(dtype)
    tag = bytes([number << 3 | wire])
    data = b"".join(tag + value.tobytes() for value in values)
    shape = record(7, record(1, varint(count)))
    for body in (shape + data, data + shape):
        weights = read(tmp_path, net_of_blob(body))
        np.testing.assert_array_equal(weights["conv"][0], values.astype(np.float32))


def test_data_in_several_records(tmp_path):
    """Protobuf joins them, packed or not; an overlong tag is as good as a short one."""
    a, b, c, d = (np.float32(x).tobytes() for x in (1, 2, 3, 4))
    body = (
        record(5, a + b) + b"\x2d" + c + b"\xad\x80\x00" + d + record(7, record(1, varint(2)) + b"\x08\x02")
    )
    np.testing.assert_array_equal(read(tmp_path, net_of_blob(body))["conv"][0], [[1, 2], [3, 4]])


def test_agrees_with_protobuf_on_odd_encodings(tmp_path):
    body = (
        record(5, np.float32([1, 2, 3]).tobytes()) + b"\x2d" + np.float32(4).tobytes() + b"\x08\x04\x10\x01"
    )
    body += b"\x18\x01\x20\x01" + record(77, b"kept")
    proto = NetParameter.FromString(net_of_blob(body)).layer[0].blobs[0]
    np.testing.assert_array_equal(read(tmp_path, net_of_blob(body))["conv"][0].reshape(-1), list(proto.data))


VALUES = np.array([[1.5, -0.25, 0], [2.0**-14, 65504, -7]])


def raw_net(values, kind, raw_type, blob=()):
    """A caffemodel with a blob in raw_data, as NVCaffe writes it."""
    net = NetParameter(name="net")
    layer = net.layer.add(name="fc", type="InnerProduct")
    layer.blobs.add(
        shape={"dim": values.shape}, raw_data_type=raw_type, raw_data=values.astype(kind).tobytes()
    )
    for own in blob:
        layer.blobs.add().CopyFrom(own)
    return net.SerializeToString()


@pytest.mark.parametrize(
    ("kind", "raw_type", "name"), [("<f8", 0, "float64"), ("<f4", 1, "float32"), ("<f2", 2, "float16")]
)
def test_raw_data_of_nvcaffe(tmp_path, kind, raw_type, name):
    plain = BlobProto(shape={"dim": [2]}, data=[1, 2])
    weights = read(tmp_path, raw_net(VALUES, kind, raw_type, [plain]))
    assert weights.raw_types == [name]
    np.testing.assert_array_equal(weights["fc"][0], VALUES.astype(np.float32))
    again = NetParameter.FromString(written(weights))
    wide, untouched = again.layer[0].blobs
    assert list(wide.data) == VALUES.ravel().tolist()
    assert not wide.HasField("raw_data")
    assert untouched == plain
    assert read(tmp_path, written(weights), "again.caffemodel").raw_types == []
    assert list(again.layer[0].blobs[0].shape.dim) == [2, 3]


def test_raw_data_wins_and_may_be_infinite(tmp_path):
    net = NetParameter.FromString(raw_net(np.array([np.inf, -np.inf, 1]), "<f2", 2))
    net.layer[0].blobs[0].data.extend([5, 5, 5])
    weights = read(tmp_path, net.SerializeToString())
    np.testing.assert_array_equal(weights["fc"][0], [np.inf, -np.inf, 1])
    checked = NetParameter(layer=[LayerParameter(name="fc", type="Parameter", top=["fc"])])
    checked.layer[0].parameter_param.shape.dim.append(3)
    with pytest.raises(InputError, match=r"layer 'fc' .*blob 0 holds a NaN or an infinity"):
        check_weights(checked, weights, infer_shapes(checked, {}))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (
            raw_net(VALUES, "<i4", 3),
            r"layer 'fc', blob 0: raw_data of type INT; weights are DOUBLE, FLOAT or",
        ),
        (raw_net(VALUES, "<f4", 2), "the shape .2, 3. does not stand for the 12 values"),
        (raw_net(VALUES, "<f2", 0), "packed data of 12 bytes at byte .* is no whole number of values"),
    ],
)
def test_raw_data_that_cannot_be(tmp_path, data, words):
    with pytest.raises(InputError, match=words):
        read(tmp_path, data)


def test_replaced_layer_keeps_its_other_fields(tmp_path):
    data = record(
        100, record(1, b"conv") + record(7, record(7, b"") + record(5, b"\0\0\0\0")) + record(2000, b"x")
    )
    weights = read(tmp_path, data)
    weights.replace("conv", [np.arange(6, dtype=np.float64).reshape(2, 3)])
    net = NetParameter.FromString(written(weights))
    assert list(net.layer[0].blobs[0].data) == [0, 1, 2, 3, 4, 5]
    assert list(net.layer[0].blobs[0].shape.dim) == [2, 3]
    assert record(2000, b"x") in written(weights)


def test_insert_add_and_copy(tmp_path):
    weights = read(tmp_path, small_net().SerializeToString())
    other = weights.copy()
    scale = LayerParameter(name="scale", type="Scale", bottom=["conv"], top=["conv"])
    other.insert_after("conv", scale, [np.ones(4, np.float32)])
    other.add(LayerParameter(name="end", type="Bias"), [np.float32(2)])
    other.name = "changed"
    assert weights.layers() == ["conv", "relu", "fc"]
    assert other.layers() == ["conv", "scale", "relu", "fc", "end"]
    net = NetParameter.FromString(written(other))
    assert net.name == "changed"
    assert [layer.name for layer in net.layer] == other.layers()
    assert net.layer[1].type == "Scale"
    assert list(net.layer[1].blobs[0].shape.dim) == [4]
    assert list(net.layer[4].blobs[0].shape.dim) == []
    assert list(net.layer[4].blobs[0].data) == [2]
    assert net.layer[0] == small_net().layer[0]
    with pytest.raises(KeyError):
        weights.replace("nothing", [])
    with pytest.raises(KeyError):
        weights.insert_after("nothing", scale, [])


def test_fields_of_the_net_are_kept(tmp_path):
    net = small_net()
    net.input.append("data")
    net.input_dim.extend([1, 3, 4, 4])
    data = net.SerializeToString() + record(3000, b"a fork's field")
    weights = read(tmp_path, data)
    assert NetParameter.FromString(written(weights)).input_dim == net.input_dim
    assert record(3000, b"a fork's field") in written(weights)


def test_v1_layers_are_upgraded(tmp_path):
    net = NetParameter(name="old")
    conv = net.layers.add(name="conv1", type=4, bottom=["data"], top=["conv1"], blobs_lr=[1, 2])
    conv.convolution_param.num_output = 2
    blob(conv, np.ones((2, 1, 1, 1), np.float32), legacy=True)
    blob(conv, np.zeros(2, np.float32), legacy=True)
    net.layers.add(name="prob", type=20, bottom=["conv1"], top=["prob"])
    weights = read(tmp_path, net.SerializeToString())
    assert weights.layers() == ["conv1", "prob"]
    new = NetParameter.FromString(written(weights))
    assert not new.layers
    assert [layer.type for layer in new.layer] == ["Convolution", "Softmax"]
    assert [param.lr_mult for param in new.layer[0].param] == [1, 2]
    assert new.layer[0].convolution_param.num_output == 2
    assert new.layer[0].blobs[1] == conv.blobs[1]  # legacy shapes stay, or Caffe would refuse them


def test_v0_is_refused_with_the_remedy(tmp_path):
    net = NetParameter()
    net.layers.add().layer.name = "conv1"
    with pytest.raises(InputError, match=r"net\.caffemodel: layer 'conv1'.*upgrade_net_proto_binary"):
        read(tmp_path, net.SerializeToString())


def test_one_name_for_a_layer_with_and_one_without_weights(tmp_path):
    net = NetParameter()
    net.layer.add(name="data", type="Data")
    net.layer.add(name="data", type="Data")
    net.layer.add(name="fc")
    blob(net.layer.add(name="fc"), np.ones(3, np.float32))
    weights = read(tmp_path, net.SerializeToString())
    assert weights.layers() == ["data", "fc"]
    np.testing.assert_array_equal(weights["fc"][0], [1, 1, 1])


def test_of_several_layers_of_one_name_the_last_counts_and_all_are_written(tmp_path):
    net = small_net()
    blob(net.layer.add(name="fc"), np.full(3, 2, np.float32))
    data = net.SerializeToString()
    weights = read(tmp_path, data)
    assert weights.layers() == ["conv", "relu", "fc"]
    assert [name for name, _ in weights.entries()] == ["conv", "relu", "fc", "fc"]
    np.testing.assert_array_equal(weights["fc"][0], [2, 2, 2])
    assert NetParameter.FromString(written(weights)) == net
    weights.replace("fc", [np.zeros(3)])
    assert [name for name, _ in weights.entries()] == ["conv", "relu", "fc"]


HUGE = varint(10**12)
HOSTILE = {
    "empty": (b"", "empty"),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + bytes(50), "HDF5"),
    "text": (b'name: "net"\nlayer { name: "a" }\n', "text, not a caffemodel.*changed places"),
    "no layers": (record(1, b"name"), "has no layers"),
    "truncated varint": (b"\xff", "ends in the middle"),
    "endless varint": (b"\xff" * 20, "more than 64 bits"),
    "field number 0": (b"\x00\x00", "field number 0"),
    "group": (net_of_blob(b"\x0b\x0c"), "wire type 3"),
    "end of a group": (record(1, b"\x01") + b"\x0c", "wire type 4"),
    "wire type 7": (b"\x0f", "wire type 7"),
    "length beyond the file": (varint(100 << 3 | 2) + HUGE, "claims to reach"),
    "layer as a number": (varint(100 << 3) + b"\x01", "wire type 0"),
    "name as a number": (record(100, b"\x08\x01"), "wire type 0"),
    "blob as a number": (record(100, b"\x38\x01"), "wire type 0"),
    "10^12 values in shape": (net_of_blob(record(7, record(1, HUGE))), "impossible dimension"),
    "10^12 values in a product": (
        net_of_blob(record(7, record(1, varint(10**6) * 2))),
        "holds",
    ),
    "10^12 values, legacy": (net_of_blob(b"\x08" + HUGE), "impossible dimension"),
    "product beyond 64 bits": (
        net_of_blob(record(7, record(1, varint(2**31 - 1) * 30))),
        "the 0 values that the file holds",
    ),
    "negative dimension": (net_of_blob(record(7, record(1, varint(2**64 - 1)))), "impossible dimension"),
    "too many axes": (net_of_blob(record(7, record(1, b"\x01" * 33))), "dimensions"),
    "a million axes": (net_of_blob(record(7, record(1, b"\x01" * 10**6))), "dimensions"),
    "shape as a number": (net_of_blob(b"\x38\x01"), "the 0 values that the file holds"),
    "shape shorter than data": (
        net_of_blob(record(5, bytes(8)) + record(7, record(1, b"\x01"))),
        "the 2 values that the file holds",
    ),
    "data without shape": (net_of_blob(record(5, bytes(8))), "the 2 values that the file holds"),
    "no data": (net_of_blob(b""), "the 0 values that the file holds"),
    "half a float": (net_of_blob(record(5, bytes(6)) + record(7, record(1, b"\x01"))), "whole number"),
    "data as varints": (net_of_blob(b"\x28\x01"), "the 0 values that the file holds"),
    "truncated float": (net_of_blob(b"\x2d\x00\x00"), "claims to reach"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_damage_is_one_line(tmp_path, case):
    data, expected = HOSTILE[case]
    with pytest.raises(InputError, match=expected) as caught:
        read(tmp_path, data)
    message = str(caught.value)
    assert message.startswith(str(tmp_path / "net.caffemodel"))
    assert "\n" not in message
    assert len(message) < 600


def test_deep_nesting_in_an_old_layer_is_one_line(tmp_path):
    deep = b"\x08\x01"
    for _ in range(5000):
        deep = record(1, deep)
    with pytest.raises(InputError):
        read(tmp_path, record(2, deep))


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(InputError, match="No such file"):
        Weights.read(tmp_path / "nothing.caffemodel")
    with pytest.raises(InputError, match="directory"):
        Weights.read(tmp_path)


def test_a_file_that_shrinks_after_it_was_read_does_no_harm(tmp_path):
    """A mapped file would kill the process here."""
    path = tmp_path / "net.caffemodel"
    values = np.arange(1 << 16, dtype=np.float32)
    original = Weights()
    original.add(LayerParameter(name="ip", type="InnerProduct"), [values])
    with open(path, "wb") as file:
        original.write(file)
    weights = Weights.read(path)
    os.truncate(path, 10)
    np.testing.assert_array_equal(weights["ip"][0], values)


def test_a_pipe_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="not a file"):
        Weights.read(tmp_path / "pipe")


def test_every_truncation_is_found(tmp_path):
    data = small_net().SerializeToString()
    whole = read(tmp_path, data).layers()
    for end in range(len(data)):
        try:
            weights = read(tmp_path, data[:end])
        except InputError:
            continue
        assert len(weights.layers()) < len(whole)  # cut between two layers


def test_more_than_caffe_reads_is_not_written(tmp_path):
    weights = read(tmp_path, small_net().SerializeToString())
    weights.replace(weights.layers()[0], [np.zeros(MAX_BYTES // 4, np.float32)])  # pages nobody touches
    file = io.BytesIO()
    with pytest.raises(LabelfreeError, match="Caffe reads no more"):
        weights.write(file)
    assert not file.getvalue()


shapes = st.lists(st.integers(0, 4), max_size=5).map(tuple)
standing_for_bytes = "".join(map(chr, range(0x10FE80, 0x10FF00)))
names = st.text(st.characters(codec="utf-8", exclude_characters=standing_for_bytes), max_size=8)


@given(st.dictionaries(names, st.lists(shapes, max_size=3), min_size=1, max_size=5), names)
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_round_trip(tmp_path, layers, net_name):
    rng = np.random.default_rng(0)
    arrays = {
        name: [rng.normal(size=shape).astype(np.float32) for shape in each] for name, each in layers.items()
    }
    weights = Weights()
    weights.name = net_name
    for name, each in arrays.items():
        weights.add(LayerParameter(name=name, type="Any"), each)
    data = written(weights)
    parsed = NetParameter.FromString(data)
    assert [layer.name for layer in parsed.layer] == list(arrays)
    again = read(tmp_path, data)
    assert again.name == net_name
    assert again.layers() == list(arrays)
    for name, each in arrays.items():
        assert [array.shape for array in again[name]] == [array.shape for array in each]
        for array, expected in zip(again[name], each, strict=True):
            np.testing.assert_array_equal(array, expected)
    assert written(again) == data


def read_or_one_line(tmp_path, data):
    """The weights, or none where the file was refused as it should be."""
    try:
        return read(tmp_path, data)
    except InputError as error:
        message = str(error)
    assert "\n" not in message
    return Weights()


@given(st.data())
@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_mutations_give_weights_or_one_line(tmp_path, data):
    original = bytearray(small_net(data.draw(st.booleans())).SerializeToString())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(original) - 1))
        piece = data.draw(st.binary(max_size=3))
        original[place : place + data.draw(st.integers(0, 3))] = piece
    weights = read_or_one_line(tmp_path, bytes(original))
    for name in weights.layers():
        for array in weights[name]:
            assert array.size < len(original)
    written(weights)


@given(st.binary(max_size=200))
@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_give_weights_or_one_line(tmp_path, junk):
    for data in (junk, record(100, junk), net_of_blob(junk), record(2, junk)):
        written(read_or_one_line(tmp_path, data))
