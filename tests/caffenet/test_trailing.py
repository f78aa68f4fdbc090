"""What detectors end in: which layers are carried over, and what is then scored."""

import pytest

from quantize.caffenet import InferenceNet, NetParameter
from quantize.measure.outputs import net_outputs
from tests.families import HEAD, act, conv, dense, layer
from tests.nets import parse


def of(text: str) -> tuple[set[str], list[str], str]:
    """The layers that are carried over, the outputs, and the blob of scores."""
    net: NetParameter = parse(HEAD + text)
    test = InferenceNet.of(net)
    assert [each.name for each in test.whole.layer if each.name not in test.trailing] == [
        each.name for each in test.net.layer
    ]
    return set(test.trailing), [output.blob for output in net_outputs(net)], test.scores


LABEL = layer("labels", "Input", "", "label", "input_param { shape { dim: 1 } }")
CASES = {
    "nothing": (dense("fc", "data", 3), set(), ["fc"], "fc"),
    "the last layer": (conv("c", "data", 3) + layer("out", "Detect", "c"), {"out"}, ["c"], "c"),
    "what depends on it": (
        conv("c", "data", 3) + layer("a", "PriorBox", "c data") + layer("b", "Concat", "a"),
        {"a", "b"},
        ["c"],
        "c",
    ),
    "in place": (conv("c", "data", 3) + layer("a", "Mine", "c", "c") + act("c"), {"a", "c/relu"}, ["c"], "c"),
    "weights behind it": (layer("a", "Roi", "data") + dense("fc", "a", 3), set(), ["fc"], "fc"),
    "one of two": (
        conv("c", "data", 3) + layer("a", "Mine", "c", "x y") + layer("b", "Mine", "x") + dense("fc", "y", 2),
        {"b"},
        ["x", "fc"],
        "fc",
    ),
    "its own weights": (conv("c", "data", 3) + layer("l", "LSTM", "c"), set(), ["l"], "l"),
    "class scores": (
        conv("c", "data", 3) + layer("s", "Mine", "c") + LABEL + layer("acc", "Accuracy", "s label"),
        set(),
        ["s"],
        "s",
    ),
    "a detector's measure": (
        LABEL + conv("c", "data", 3) + layer("d", "Detect", "c") + layer("e", "DetectionEvaluate", "d label"),
        {"d"},
        ["c"],
        "c",
    ),
    "two heads": (
        conv("c", "data", 3)
        + act("c")
        + conv("loc", "c", 4, 1, norm=False)
        + conv("conf", "c", 2, 1, norm=False)
        + layer("prob", "Softmax", "conf")
        + layer("out", "DetectionOutput", "loc prob"),
        {"out"},
        ["loc", "conf"],
        "conf",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_carried_over(case: str) -> None:
    text, trailing, outputs, scores = CASES[case]
    assert of(text) == (trailing, outputs, scores)
