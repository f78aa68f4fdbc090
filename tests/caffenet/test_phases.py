"""Include and exclude rules, structural checks, and the part of a net that needs no labels."""

import pytest
from google.protobuf import text_format

from quantize.caffenet import (
    TEST,
    TRAIN,
    InferenceNet,
    NetParameter,
    at_state,
    check_net,
    dependent_layers,
    filter_net,
    inference_net,
    input_blobs,
    scores_blob,
)
from quantize.errors import InputError


def net_of(text):
    return text_format.Parse(text, NetParameter())


def names(net):
    return [layer.name for layer in net.layer]


def kept(rules, phase=TEST, stages=(), level=0):
    """Whether a layer with these rules is in the net, beside one that always is."""
    named = 'include { stage: "a" } include { stage: "b" } include { stage: "c" }'
    net = net_of(
        f'layer {{ name: "x" type: "Input" }} layer {{ name: "y" type: "Input" {rules} }}'
        f'layer {{ name: "z" type: "Input" {named} }}'
    )
    return "y" in names(filter_net(at_state(net, stages, level), phase))


@pytest.mark.parametrize(
    ("rules", "state", "expected"),
    [
        ("", {}, True),
        ("include { phase: TEST }", {}, True),
        ("include { phase: TEST }", {"phase": TRAIN}, False),
        ("exclude { phase: TEST }", {}, False),
        ("exclude { phase: TEST }", {"phase": TRAIN}, True),
        ("include {}", {}, True),
        ("exclude {}", {}, False),
        ("include { phase: TRAIN } include { phase: TEST }", {}, True),
        ("exclude { phase: TRAIN } exclude { phase: TEST }", {}, False),
        ('include { stage: "a" }', {}, False),
        ('include { stage: "a" }', {"stages": ["a", "b"]}, True),
        ('include { stage: "a" stage: "b" }', {"stages": ["a"]}, False),
        ('include { not_stage: "a" }', {}, True),
        ('include { not_stage: "a" }', {"stages": ["a"]}, False),
        ('exclude { stage: "a" not_stage: "b" }', {"stages": ["a"]}, False),
        ('exclude { stage: "a" not_stage: "b" }', {"stages": ["a", "b"]}, True),
        ("include { min_level: 0 }", {}, True),
        ("include { min_level: 1 }", {}, False),
        ("include { min_level: 1 max_level: 3 }", {"level": 3}, True),
        ("include { min_level: 1 max_level: 3 }", {"level": 4}, False),
        ("include { max_level: -1 }", {"level": -1}, True),
        ("include { phase: TEST min_level: 1 }", {}, False),
    ],
)
def test_rules(rules, state, expected):
    assert kept(rules, **state) is expected


def test_include_and_exclude_together_are_refused():
    with pytest.raises(InputError, match=r"layer 'y'.*include and exclude"):
        kept("include { phase: TEST } exclude { phase: TRAIN }")


def test_filter_gives_a_copy_with_all_else():
    net = net_of('name: "n" state { level: 3 } layer { name: "a" type: "Input" include { phase: TEST } }')
    before = net.SerializeToString()
    filtered = filter_net(net, TEST)
    assert filtered == net
    filtered.layer[0].name = "changed"
    assert net.SerializeToString() == before


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "no layers in this phase"),
        ('layer { name: "a" top: "a" }', "layer 'a'.*no type"),
        ('layer { name: "a" type: "ReLU" bottom: "x" top: "x" }', "layer 'a'.*reads 'x'"),
        (
            'layer { name: "a" type: "Input" top: "x" }layer { name: "a" type: "ReLU" bottom: "x" top: "x" }',
            "layer 'a'.*2 layers of one phase have this name",
        ),
        (
            'layer { name: "a" type: "Input" top: "x" } layer { name: "b" type: "Input" top: "x" }',
            "layer 'b'.*makes 'x'",
        ),
        ('layer { name: "a" type: "Input" top: "x" top: "x" }', "layer 'a'.*makes 'x'"),
        (
            'layer { name: "a" type: "Input" top: "x" top: "y" }'
            'layer { name: "b" type: "Eltwise" bottom: "x" bottom: "y" top: "y" }',
            "layer 'b'.*makes 'y'",
        ),
    ],
)
def test_nets_that_do_not_hang_together(text, expected):
    with pytest.raises(InputError, match=expected) as caught:
        check_net(net_of(text))
    assert "\n" not in str(caught.value)


def test_names_with_line_breaks_stay_on_one_line():
    with pytest.raises(InputError) as caught:
        check_net(net_of(r'name: "a\nb" layer { name: "c\nd" type: "ReLU" bottom: "e\nf" }'))
    assert "\n" not in str(caught.value)


CLASSIFIER = """
    layer { name: "data" type: "Data" top: "data" top: "label" }
    layer { name: "conv" type: "Convolution" bottom: "data" top: "conv" }
    layer { name: "relu" type: "ReLU" bottom: "conv" top: "conv" }
    layer { name: "aux" type: "InnerProduct" bottom: "conv" top: "aux" }
    layer { name: "aux_accuracy" type: "Accuracy" bottom: "aux" bottom: "label" top: "aux_accuracy" }
    layer { name: "fc" type: "InnerProduct" bottom: "conv" top: "fc" }
    layer { name: "accuracy" type: "Accuracy" bottom: "fc" bottom: "label" top: "accuracy" }
    layer { name: "loss" type: "SoftmaxWithLoss" bottom: "fc" bottom: "label" top: "loss" }
    layer { name: "half" type: "Power" bottom: "loss" top: "half" }
    layer { name: "quiet" type: "Silence" bottom: "half" }
"""


def test_inference_net_of_a_classifier():
    net = net_of(CLASSIFIER)
    part = inference_net(net, input_blobs(net))
    assert names(part) == ["conv", "relu", "aux", "fc"]
    assert len(net.layer) == 10


def test_inference_net_drops_what_a_missing_blob_would_change_in_place():
    net = net_of("""
        layer { name: "data" type: "Data" top: "data" top: "label" }
        layer { name: "mix" type: "Scale" bottom: "data" bottom: "label" top: "data" }
        layer { name: "conv" type: "Convolution" bottom: "data" top: "conv" }
    """)
    assert names(inference_net(net, ["data"])) == []


def test_inference_net_keeps_parameters_and_drops_losses_of_the_images_themselves():
    net = net_of("""
        layer { name: "data" type: "Input" top: "data" }
        layer { name: "w" type: "Parameter" top: "w" }
        layer { name: "add" type: "Bias" bottom: "data" bottom: "w" top: "add" }
        layer { name: "loss" type: "EuclideanLoss" bottom: "add" bottom: "data" top: "loss" }
    """)
    assert names(inference_net(net, ["data"])) == ["w", "add"]
    assert input_blobs(net) == ("data",)
    assert scores_blob(net) == "add"


def test_dummy_data_beside_the_images_stays_and_is_not_taken_for_them():
    net = net_of(
        """
        layer { name: "dummy" type: "DummyData" top: "dummy" }
        layer { name: "data" type: "Data" top: "data" top: "label" }
        layer { name: "sum" type: "Bias" bottom: "data" bottom: "dummy" top: "sum" }
        layer { name: "loss" type: "SoftmaxWithLoss" bottom: "sum" bottom: "label" top: "loss" }
        """
    )
    assert input_blobs(net) == ("data",)
    assert names(inference_net(net, ["data"])) == ["dummy", "sum"]
    only = net_of(
        'layer { name: "d" type: "DummyData" top: "d" } layer { name: "r" type: "ReLU" bottom: "d" top: "r" }'
    )
    assert input_blobs(only) == ("d",)
    assert names(inference_net(only, ["d"])) == ["r"]


def test_labels_and_what_nobody_reads_are_no_inputs():
    assert input_blobs(net_of(CLASSIFIER)) == ("data",)
    labels_first = net_of("""
        layer { name: "l" type: "Data" top: "label" }
        layer { name: "d" type: "HDF5Data" top: "data" top: "unused" }
        layer { name: "fc" type: "InnerProduct" bottom: "data" top: "fc" }
        layer { name: "loss" type: "SoftmaxWithLoss" bottom: "fc" bottom: "label" top: "loss" }
    """)
    assert input_blobs(labels_first) == ("data",)
    assert input_blobs(net_of('layer { name: "i" type: "Input" top: "a" top: "b" }')) == ()


def test_scores_are_what_the_last_accuracy_reads():
    assert scores_blob(net_of(CLASSIFIER)) == "fc"


@pytest.mark.parametrize(
    ("tail", "expected"),
    [
        ("", "fc"),
        ('layer { name: "prob" type: "Softmax" bottom: "fc" top: "prob" }', "fc"),
        ('layer { name: "prob" type: "Softmax" bottom: "fc" top: "fc" }', "fc"),
        ('layer { name: "l" type: "SoftmaxWithLoss" bottom: "fc" bottom: "label" top: "l" }', "fc"),
        ('layer { name: "l" type: "HingeLoss" bottom: "fc" bottom: "label" top: "l" }', "fc"),
        (
            'layer { name: "p" type: "Softmax" bottom: "fc" top: "p" }'
            'layer { name: "a" type: "Accuracy" bottom: "p" bottom: "label" top: "a" }',
            "fc",
        ),
    ],
)
def test_scores_without_accuracy(tail, expected):
    net = net_of(
        'layer { name: "d" type: "Input" top: "data" top: "label" }'
        'layer { name: "fc" type: "InnerProduct" bottom: "data" top: "fc" }' + tail
    )
    assert scores_blob(net) == expected


def test_scores_of_nothing():
    with pytest.raises(InputError, match="no scores"):
        scores_blob(net_of('layer { name: "s" type: "Silence" bottom: "x" }'))


def test_a_net_without_input_is_told_how_to_get_one():
    layers = 'layer { name: "conv" type: "Convolution" bottom: "data" top: "conv" }'
    table = 'layer { name: "p" type: "Parameter" top: "p" }'
    for text in (layers, table):
        with pytest.raises(
            InputError, match=r'no input in this phase: put layer { name: "data" type: "Input"'
        ):
            InferenceNet.of(net_of(text))


def test_a_misspelt_bottom():
    relu = 'layer { name: "r" type: "ReLU" bottom: "dat" top: "r" }'
    text = f'layer {{ name: "d" type: "Input" top: "data" }} {relu}'
    with pytest.raises(InputError, match=r"reads 'dat', which no layer before it makes; did you mean data\?"):
        filter_net(net_of(text), TEST)


FC = 'layer {{ name: "{0}" type: "InnerProduct" bottom: "{1}" top: "{0}" }}'
DATA = 'layer { name: "data" type: "Data" top: "data" top: "label" }'


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # An encoder whose loss compares with the images themselves.
        (
            'layer { name: "d" type: "Data" top: "data" }'
            + FC.format("fc", "data")
            + 'layer { name: "l" type: "EuclideanLoss" bottom: "fc" bottom: "data" top: "l" }',
            ("data",),
        ),
        # Two images and whether they show the same.
        (
            'layer { name: "d" type: "Data" top: "left" top: "same" }'
            'layer { name: "e" type: "Data" top: "right" }'
            + FC.format("a", "left")
            + FC.format("b", "right")
            + 'layer { name: "l" type: "ContrastiveLoss" bottom: "a" bottom: "b" bottom: "same" top: "l" }',
            ("left", "right"),
        ),
        # Labels in parts, one of which nobody reads; labels as images have them.
        (
            DATA
            + FC.format("fc", "data")
            + 'layer { name: "s" type: "Slice" bottom: "label" top: "x" top: "y" }'
            'layer { name: "l" type: "SoftmaxWithLoss" bottom: "fc" bottom: "x" top: "l" }',
            ("data",),
        ),
        # What forks and scripts compare with labels.
        (
            DATA
            + FC.format("fc", "data")
            + 'layer { name: "l" type: "SoftmaxWithLossOHEM" bottom: "fc" bottom: "label" top: "l" }'
            'layer { name: "e" type: "DetectionEvaluate" bottom: "fc" bottom: "label" top: "e" }'
            'layer { name: "p" type: "Python" bottom: "fc" bottom: "label" top: "p" loss_weight: 1 }'
            'layer { name: "m" type: "Python" bottom: "fc" bottom: "label" top: "m" }',
            ("data",),
        ),
        # What is called a label and is none: the net computes with it.
        (
            DATA + FC.format("fc", "data") + 'layer { name: "w" type: "Embed" bottom: "label" top: "w" }'
            'layer { name: "c" type: "Concat" bottom: "fc" bottom: "w" top: "c" }',
            ("data", "label"),
        ),
        # HDF5Data makes anything; the loss says which is the label.
        (
            'layer { name: "h" type: "HDF5Data" top: "truth" top: "state" top: "data" }'
            + FC.format("a", "data")
            + FC.format("b", "state")
            + 'layer { name: "c" type: "Concat" bottom: "a" bottom: "b" top: "c" }'
            'layer { name: "l" type: "EuclideanLoss" bottom: "c" bottom: "truth" top: "l" }',
            ("state", "data"),
        ),
        # Images first; what is behind a type that nobody knows needs its inputs too.
        (
            'layer { name: "i" type: "Input" top: "im_info" top: "data" '
            "input_param { shape { dim: [1, 3] } shape { dim: [1, 3, 8, 8] } } }"
            'layer { name: "p" type: "Python" bottom: "data" bottom: "im_info" top: "rois" }'
            + FC.format("fc", "rois"),
            ("data", "im_info"),
        ),
    ],
)
def test_what_has_to_be_fed(text, expected):
    net = net_of(text)
    check_net(net)
    assert input_blobs(net) == expected
    kept = names(inference_net(net, expected))
    weighted = [layer.name for layer in net.layer if layer.type in ("InnerProduct", "Embed")]
    assert set(weighted) <= set(kept)


def test_dependents():
    net = net_of("""
        layer { name: "i" type: "Input" top: "a" top: "b" }
        layer { name: "x" type: "ReLU" bottom: "a" top: "x" }
        layer { name: "y" type: "ReLU" bottom: "b" top: "y" }
        layer { name: "z" type: "Eltwise" bottom: "x" bottom: "y" top: "z" }
        layer { name: "w" type: "ReLU" bottom: "z" top: "z" }
        layer { name: "v" type: "ReLU" bottom: "x" top: "v" }
    """)
    assert [layer.name for layer in dependent_layers(net.layer, ["b"])] == ["y", "z", "w"]
    assert [layer.name for layer in dependent_layers(net.layer, ["a"])] == ["x", "z", "w", "v"]


def test_inputs_of_different_numbers_of_rows():
    net = net_of("""
        layer { name: "i" type: "Input" top: "data" input_param { shape { dim: [1, 3, 8, 8] } } }
        layer { name: "r" type: "Input" top: "rois" input_param { shape { dim: [300, 5] } } }
        layer { name: "p" type: "ROIPooling" bottom: "data" bottom: "rois" top: "p" }
    """)
    with pytest.raises(InputError, match=r"different numbers of rows \('data' 1, 'rois' 300\)"):
        InferenceNet.of(net)


def test_layers_of_one_name_in_two_stages():
    """The one of the stage that is set keeps its name, and so its weights."""
    net = net_of("""
        layer { name: "d" type: "Input" top: "data" }
        layer { name: "fc" type: "InnerProduct" bottom: "data" top: "fc" include { stage: "a" }
          inner_product_param { num_output: 3 } }
        layer { name: "fc" type: "InnerProduct" bottom: "data" top: "fc" include { stage: "b" }
          inner_product_param { num_output: 4 } }
    """)
    chosen = at_state(net, ["b"], 0)
    assert [(layer.name, layer.inner_product_param.num_output) for layer in chosen.layer] == [
        ("d", 0),
        ("fc", 4),
    ]
    assert at_state(net_of(CLASSIFIER), [], 0) == net_of(CLASSIFIER)
