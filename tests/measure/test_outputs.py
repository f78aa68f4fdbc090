"""Which blobs a net is run for, and which of them hold class scores."""

import pytest

from quantize.caffenet import InferenceNet, single_assignment
from quantize.errors import InputError
from quantize.measure.outputs import Output, class_scores, net_outputs, tapped
from tests.nets import RESIDUAL, parse

INPUT = 'layer { name: "data" type: "Input" top: "data" input_param { shape { dim: [1, 3, 8, 8] } } }'
CONV = """layer { name: "%s" type: "Convolution" bottom: "%s" top: "%s"
  convolution_param { num_output: %d kernel_size: 3 } }"""


def layer(name: str, kind: str, bottom: str, top: str | None = None, more: str = "") -> str:
    tops = f'top: "{name if top is None else top}"' if top != "" else ""
    bottoms = " ".join(f'bottom: "{each}"' for each in bottom.split())
    return f'layer {{ name: "{name}" type: "{kind}" {bottoms} {tops} {more} }}\n'


def fc(name: str, bottom: str) -> str:
    return layer(name, "InnerProduct", bottom, more="inner_product_param { num_output: 4 }")


LABEL = 'layer { name: "label" type: "Input" top: "label" input_param { shape { dim: 1 } } }\n'
TARGET = 'layer { name: "label" type: "Input" top: "label" input_param { shape { dim: [1, 4] } } }\n'


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (fc("fc", "data"), [Output("fc", None, 1, presumed=True, is_main=True)]),
        (fc("fc", "data") + layer("prob", "Softmax", "fc"), [Output("fc", None, 1, is_main=True)]),
        (fc("fc", "data") + layer("prob", "Softmax", "fc", "fc"), [Output("fc", "prob", 1, is_main=True)]),
        (
            CONV % ("c", "data", "c", 4) + layer("prob", "Softmax", "c", more="softmax_param { axis: -3 }"),
            [Output("c", None, -3, is_main=True)],
        ),
        (CONV % ("c", "data", "c", 4), [Output("c")]),
        (fc("fc", "data") + layer("s", "Sigmoid", "fc"), [Output("s")]),
        # A detector: boxes and classes at every place; none of them is the main one.
        (
            CONV % ("c1", "data", "c1", 4)
            + CONV % ("c2", "data", "c2", 4)
            + CONV % ("box", "data", "box", 4)
            + layer("p1", "Softmax", "c1")
            + layer("p2", "Softmax", "c2"),
            [Output("c1", None, 1), Output("c2", None, 1), Output("box")],
        ),
        # One classifier beside boxes that come from an InnerProduct too.
        (
            fc("cls", "data") + fc("box", "data") + layer("p", "Softmax", "cls"),
            [Output("cls", None, 1, is_main=True), Output("box")],
        ),
        (fc("a", "data") + fc("b", "data"), [Output("a"), Output("b")]),
        # What losses and Accuracy look at.
        (
            LABEL + fc("fc", "data") + layer("loss", "SoftmaxWithLoss", "fc label"),
            [Output("fc", None, 1, is_main=True)],
        ),
        (
            LABEL
            + fc("aux", "data")
            + fc("fc", "data")
            + layer("loss", "SoftmaxWithLoss", "fc label")
            + layer("loss_aux", "SoftmaxWithLoss", "aux label"),
            [Output("aux", None, 1, is_main=True), Output("fc", None, 1)],
        ),
        (
            LABEL
            + fc("aux", "data")
            + fc("fc", "data")
            + layer("top", "Accuracy", "fc label")
            + layer("loss_aux", "SoftmaxWithLoss", "aux label"),
            [Output("aux", None, 1), Output("fc", None, 1, is_main=True)],
        ),
        (
            LABEL
            + fc("fc", "data")
            + layer("prob", "Softmax", "fc")
            + layer("top", "Accuracy", "prob label")
            + layer("also", "ReLU", "prob"),
            [Output("fc", None, 1, is_main=True), Output("also")],
        ),
        (TARGET + fc("marks", "data") + layer("loss", "EuclideanLoss", "marks label"), [Output("marks")]),
        (
            LABEL
            + CONV % ("c", "data", "c", 4)
            + layer("top", "Accuracy", "c label", more="accuracy_param { axis: 3 }"),
            [Output("c", None, 3, is_main=True)],
        ),
        # Scores that a later layer overwrites in place.
        (
            LABEL
            + fc("fc", "data")
            + layer("loss", "SoftmaxWithLoss", "fc label")
            + layer("relu", "ReLU", "fc", "fc"),
            [Output("fc", "relu", 1, is_main=True), Output("fc")],
        ),
        (
            fc("a", "data") + fc("b", "data") + layer("s", "Silence", "a", ""),
            [Output("b", None, 1, True, True)],
        ),
    ],
)
def test_outputs(text: str, expected: list[Output]) -> None:
    assert net_outputs(parse(INPUT + text)) == expected


def test_the_residual_net() -> None:
    assert net_outputs(parse(RESIDUAL)) == [Output("fc2", None, 1, is_main=True)]


@pytest.mark.parametrize(
    ("output", "shape", "axis"),
    [
        (Output("a", class_axis=1), (2, 5), 1),
        (Output("a", class_axis=1), (2, 5, 7, 7), 1),
        (Output("a", class_axis=-1), (2, 5, 7), 2),
        (Output("a", class_axis=1), (2, 1), None),  # one class is none
        (Output("a", class_axis=0), (2, 5), None),
        (Output("a", class_axis=4), (2, 5), None),
        (Output("a", class_axis=1, presumed=True), (2, 5, 7), None),
        (Output("a"), (2, 5), None),
    ],
)
def test_the_class_axis_of_a_shape(output: Output, shape: tuple[int, ...], axis: int | None) -> None:
    assert output.axis_of(shape) == axis


def test_outputs_are_read_before_they_are_overwritten() -> None:
    net = parse(
        INPUT
        + fc("fc", "data")
        + layer("fc_alpha_term", "Scale", "fc", "fc")  # as in a quantized net
        + layer("prob", "Softmax", "fc", "fc")
    )
    changed, names = tapped(InferenceNet.of(net).net, [Output("fc", "prob", 1)])
    flat = single_assignment(changed)
    tap = next(layer for layer in flat.layer if layer.top[0] == names[0])
    assert tap.type == "Power"
    assert list(tap.bottom) == ["fc_fc_alpha_term"]
    with pytest.raises(InputError, match="has no layer 'prob' any more"):
        tapped(parse(INPUT + fc("fc", "data")), [Output("fc", "prob", 1)])


def test_who_needs_class_scores_says_what_there_is() -> None:
    net = parse(INPUT + fc("a", "data") + fc("b", "data"))
    with pytest.raises(InputError, match=r"^weights.budget needs one output with class scores.*are: a, b$"):
        class_scores(net, "weights.budget")
