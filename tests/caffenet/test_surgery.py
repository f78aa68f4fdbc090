"""Net surgery, and its properties on random nets with in-place layers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantize.caffenet import (
    LayerParameter,
    NetParameter,
    insert_after,
    layer_index,
    live_blobs,
    needed_layers,
    remove_layer,
    replace_layer,
    single_assignment,
)


def chain():
    net = NetParameter()
    net.layer.add(name="conv", type="Convolution", bottom=["data"], top=["conv"])
    net.layer.add(name="bn", type="BatchNorm", bottom=["conv"], top=["conv"])
    net.layer.add(name="relu", type="ReLU", bottom=["conv"], top=["conv"])
    net.layer.add(name="sum", type="Eltwise", bottom=["conv", "data"], top=["sum"])
    return net


def names(net):
    return [layer.name for layer in net.layer]


def test_insert_replace_remove():
    net = chain()
    scale = LayerParameter(name="scale", type="Scale", bottom=["conv"], top=["conv"])
    insert_after(net, "bn", scale)
    assert names(net) == ["conv", "bn", "scale", "relu", "sum"]
    insert_after(net, "sum", LayerParameter(name="end"))
    assert names(net)[-1] == "end"
    replace_layer(net, "scale", LayerParameter(name="bias", type="Bias"))
    assert net.layer[2] == LayerParameter(name="bias", type="Bias")
    assert scale.name == "scale"
    remove_layer(net, "bias")
    assert names(net) == ["conv", "bn", "relu", "sum", "end"]
    assert layer_index(net, "relu") == 2


def test_needed_layers():
    net = chain()
    net.layer.add(name="aside", type="ReLU", bottom=["data"], top=["aside"])
    kept = [layer.name for layer in needed_layers(net.layer, ["sum"])]
    assert kept == ["conv", "bn", "relu", "sum"]
    assert [layer.name for layer in needed_layers(net.layer[2:], ["conv"])] == ["relu"]
    assert [layer.name for layer in needed_layers(net.layer, ["aside", "none"])] == ["aside"]
    assert needed_layers(net.layer, ["data"]) == []


def test_layers_that_are_not_there():
    net = chain()
    for change in (
        lambda: layer_index(net, "x"),
        lambda: insert_after(net, "x", LayerParameter()),
        lambda: replace_layer(net, "x", LayerParameter()),
        lambda: remove_layer(net, "x"),
    ):
        with pytest.raises(KeyError):
            change()
    assert net == chain()


def test_live_blobs():
    net = chain()
    assert [live_blobs(net, i) for i in range(5)] == [
        ["data"],
        ["conv", "data"],
        ["conv", "data"],
        ["conv", "data"],
        [],
    ]
    assert live_blobs(net, 4, ["sum", "conv"]) == ["sum", "conv"]
    assert live_blobs(net, 3, ["sum"]) == ["conv", "data"]  # yet to be made
    assert live_blobs(net, 0, ["conv"]) == ["data"]


def test_single_assignment_of_a_chain():
    net = chain()
    flat = single_assignment(net)
    assert [list(layer.top) for layer in flat.layer] == [["conv"], ["conv_bn"], ["conv_relu"], ["sum"]]
    assert [list(layer.bottom) for layer in flat.layer] == [
        ["data"],
        ["conv"],
        ["conv_bn"],
        ["conv_relu", "data"],
    ]
    assert names(flat) == names(net)
    assert net == chain()


def test_single_assignment_finds_free_names():
    net = chain()
    net.layer.add(name="taken", type="ReLU", bottom=["sum"], top=["conv_bn"])
    assert single_assignment(net).layer[1].top == ["conv_bn_2"]


blob_names = st.sampled_from(["data", "a", "b", "c"])


@st.composite
def nets(draw):
    net, known = NetParameter(), ["data"]
    for index in range(draw(st.integers(1, 8))):
        layer = net.layer.add(name=f"layer{index}", type="Any")
        layer.bottom.extend(draw(st.lists(st.sampled_from(known), max_size=3)))
        layer.top.extend(draw(st.lists(blob_names, min_size=1, max_size=2, unique=True)))
        known += [top for top in layer.top if top not in known]
    return net


def run(net, blobs, start=0, stop=None):
    """A stand-in for running a net: a blob's value is the tree of the layers that made it."""
    blobs = dict(blobs)
    for layer in net.layer[start:stop]:
        read = tuple(blobs[bottom] for bottom in layer.bottom)
        blobs.update({top: (layer.name, index, read) for index, top in enumerate(layer.top)})
    return blobs


@given(nets())
def test_live_blobs_are_enough_to_go_on_and_all_are_needed(net):
    outputs = sorted(run(net, {"data": "data"}))
    whole = run(net, {"data": "data"})
    for place in range(len(net.layer) + 1):
        before = run(net, {"data": "data"}, stop=place)
        live = live_blobs(net, place, outputs)
        assert len(set(live)) == len(live)
        resumed = run(net, {name: before[name] for name in live}, start=place)
        assert {name: resumed[name] for name in outputs} == whole
        for left_out in live:
            part = {name: before[name] for name in live if name != left_out}
            try:
                resumed = run(net, part, start=place)
            except KeyError:
                continue
            assert any(name not in resumed for name in outputs)


@given(nets())
def test_single_assignment_computes_the_same(net):
    flat = single_assignment(net)
    written = [top for layer in flat.layer for top in layer.top]
    assert len(set(written)) == len(written)
    values = run(flat, {"data": "data"})
    state = {"data": "data"}
    for place, layer in enumerate(net.layer):
        state = run(net, state, start=place, stop=place + 1)
        for top, renamed in zip(layer.top, flat.layer[place].top, strict=True):
            assert values[renamed] == state[top]
