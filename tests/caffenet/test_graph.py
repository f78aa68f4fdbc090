"""Makers and readers of blobs, and what follows from them, on random nets with in-place layers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantize.caffenet import (
    NetGraph,
    NetParameter,
    dependent_layers,
    layer_index,
    live_blobs,
    needed_layers,
    single_assignment,
)
from quantize.caffenet.graph import Bottom
from quantize.caffenet.traits import Trait
from tests.nets import parse


def chain():
    net = NetParameter()
    net.layer.add(name="conv", type="Convolution", bottom=["data"], top=["conv"])
    net.layer.add(name="bn", type="BatchNorm", bottom=["conv"], top=["conv"])
    net.layer.add(name="relu", type="ReLU", bottom=["conv"], top=["conv"])
    net.layer.add(name="sum", type="Eltwise", bottom=["conv", "data"], top=["sum"])
    return net


def names(net):
    return [layer.name for layer in net.layer]


def test_needed_layers():
    net = chain()
    net.layer.add(name="aside", type="ReLU", bottom=["data"], top=["aside"])
    kept = [layer.name for layer in needed_layers(net.layer, ["sum"])]
    assert kept == ["conv", "bn", "relu", "sum"]
    assert [layer.name for layer in needed_layers(net.layer[2:], ["conv"])] == ["relu"]
    assert [layer.name for layer in needed_layers(net.layer, ["aside", "none"])] == ["aside"]
    assert needed_layers(net.layer, ["data"]) == []


def test_the_place_of_a_layer():
    net = chain()
    assert [layer_index(net, name) for name in names(net)] == [0, 1, 2, 3]
    with pytest.raises(KeyError):
        layer_index(net, "x")


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


@given(nets())
def test_who_makes_and_reads_a_blob(net):
    graph = NetGraph(net)
    assert graph.net == single_assignment(net)
    values = run(graph.net, {"data": "data"})
    for blob, maker in graph.makers.items():
        assert values[blob][:2] == (maker.name, list(maker.top).index(blob))
    assert values.keys() == {"data", *graph.makers}
    for (number, layer), flat in zip(enumerate(net.layer), graph.net.layer, strict=True):
        before = run(net, {"data": "data"}, stop=number)
        for at, name in enumerate(layer.bottom):
            blob = graph.read[Bottom(layer.name, at)]
            assert flat.bottom[at] == blob
            assert values[blob] == before[name]
            assert graph.given_names[blob] == name
            assert Bottom(layer.name, at) in graph.readers_of(blob)
    bottoms = [reader for blob in values for reader in graph.readers_of(blob)]
    assert len(bottoms) == len(graph.read) == sum(len(layer.bottom) for layer in net.layer)
    order = list(graph.read)
    for blob in values:
        assert graph.readers_of(blob) == sorted(graph.readers_of(blob), key=order.index)


@given(nets())
def test_who_overwrites_a_blob(net):
    graph = NetGraph(net)
    for number, (layer, flat) in enumerate(zip(net.layer, graph.net.layer, strict=True)):
        for name, blob in zip(layer.top, flat.top, strict=True):
            later = [other.name for other in net.layer[number + 1 :] if name in other.top]
            assert graph.overwriter(blob) == (later[0] if later else None)
    if "data" in graph.given_names.keys() - graph.makers.keys():
        later = [layer.name for layer in net.layer if "data" in layer.top]
        assert graph.overwriter("data") == (later[0] if later else None)


@given(nets(), st.sampled_from(["a", "b", "c", "data"]))
def test_dependent_layers_are_those_that_make_something_else_of_another_blob(net, name):
    flat = single_assignment(net)
    made = {top for layer in flat.layer for top in layer.top}
    blobs = {"data": "data", name: "one"}
    changed = {**blobs, name: "another"}
    if name in made:
        return
    before, after = run(flat, blobs), run(flat, changed)
    differ = [layer.name for layer in flat.layer if any(before[top] != after[top] for top in layer.top)]
    assert [layer.name for layer in dependent_layers(flat.layer, [name])] == differ


passing = st.sampled_from(["Split", "Concat", "Dropout", "Flatten", "ReLU", "ActQuantize", "Eltwise"])


@given(nets(), st.data())
def test_blobs_that_hold_the_values_of_others(net, data):
    for layer in net.layer:
        layer.type = data.draw(passing)
    graph = NetGraph(net)
    held = {"data": {"data"}}
    """Which of the values that were computed somewhere are in a blob."""
    for layer in graph.net.layer:
        read = [held[bottom] for bottom in layer.bottom]
        for top in layer.top:
            if not read or layer.type in ("ReLU", "ActQuantize", "Eltwise"):
                held[top] = {top}
            else:
                held[top] = set().union(*read) if layer.type == "Concat" else read[0]
    for blob, values in held.items():
        origin = graph.origin(blob)
        assert held[origin] == values
        assert graph.origin(origin) == origin
        if len(values) == 1:
            assert {origin} == values
        coder = graph.coder(blob)
        assert (coder is not None) == (origin in graph.makers and graph.makers[origin].type == "ActQuantize")
        if coder is not None:
            assert origin in coder.top


CHAIN = """
    layer { name: "conv" type: "Convolution" bottom: "data" top: "x" }
    layer { name: "bn" type: "BatchNorm" bottom: "x" top: "x" }
    layer { name: "scale" type: "Scale" bottom: "x" top: "x" }
    layer { name: "relu" type: "ReLU" bottom: "x" top: "x" }
    layer { name: "pool" type: "Pooling" bottom: "x" top: "y" }
"""


@pytest.mark.parametrize(
    ("more", "traits", "expected"),
    [
        ("", Trait.AFFINE, ["bn", "scale"]),
        ("", Trait.AFFINE | Trait.ELEMENTWISE, ["bn", "scale", "relu"]),
        ("", Trait.COMPARES, []),
        ('layer { name: "f" type: "ReLU" bottom: "z" top: "v" }', Trait.AFFINE, ["bn", "scale"]),
    ],
)
def test_followers(more, traits, expected):
    assert [each.name for each in NetGraph(parse(CHAIN + more)).followers("conv", traits)] == expected


def test_followers_end_where_there_is_another_reader():
    branches = CHAIN.replace(
        '"relu" type: "ReLU" bottom: "x" top: "x"', '"relu" type: "ReLU" bottom: "x" top: "r"'
    )
    graph = NetGraph(parse(branches))
    assert [each.name for each in graph.followers("conv", Trait.AFFINE | Trait.ELEMENTWISE)] == [
        "bn",
        "scale",
    ]
    twice = CHAIN.replace('type: "Scale" bottom: "x"', 'type: "Scale" bottom: "x" bottom: "x"')
    assert [each.name for each in NetGraph(parse(twice)).followers("conv", Trait.AFFINE)] == ["bn"]
    end = NetGraph(parse(CHAIN)).followers("relu", Trait.ELEMENTWISE)
    assert end == []
