"""Which blobs are one, as Caffe's Net::AppendParam decides."""

import pytest
from google.protobuf import text_format

from quantize.caffenet import BlobId, NetParameter, check_sharing, infer_shapes, owners, users
from quantize.errors import InputError


def net_of(text: str) -> NetParameter:
    return text_format.Parse(text, NetParameter())


def convolution(name: str, *params: str, outputs: int = 4, kernel: int = 1) -> str:
    shared = "".join(f"param {{ {param} }} " for param in params)
    return (
        f'layer {{ name: "{name}" type: "Convolution" bottom: "x" top: "{name}" {shared}'
        f"convolution_param {{ num_output: {outputs} kernel_size: {kernel} }} }}"
    )


def test_the_first_layer_that_names_a_blob_owns_it() -> None:
    net = net_of(
        convolution("a", 'name: "w"', 'name: "b"')
        + convolution("b", "lr_mult: 1", 'name: "b"')
        + convolution("c", 'name: "w"')
        + convolution("d")
        + convolution("e", 'name: "alone"')
    )
    assert owners(net) == {BlobId("b", 1): BlobId("a", 1), BlobId("c", 0): BlobId("a", 0)}
    assert users(net) == {"a": ["a", "c"]}
    assert users(net, 1) == {"a": ["a", "b"]}


def test_a_blob_may_be_another_place_of_the_same_or_another_layer() -> None:
    net = net_of(convolution("a", 'name: "v"', 'name: "v"') + convolution("b", "lr_mult: 1", 'name: "v"'))
    assert owners(net) == {BlobId("a", 1): BlobId("a", 0), BlobId("b", 1): BlobId("a", 0)}
    assert users(net) == users(net, 1) == {}


@pytest.mark.parametrize(
    ("second", "refused"),
    [
        (convolution("b", 'name: "w"'), None),
        (convolution("b", 'name: "w"', outputs=2), "(2, 8, 1, 1)"),
        (convolution("b", 'name: "w" share_mode: PERMISSIVE', outputs=2), "(2, 8, 1, 1)"),
        (
            'layer { name: "b" type: "InnerProduct" bottom: "x" top: "b" param { name: "w" share_mode: '
            "PERMISSIVE } inner_product_param { num_output: 4 axis: 1 } }",
            None,
        ),
        (
            'layer { name: "b" type: "InnerProduct" bottom: "x" top: "b" param { name: "w" } '
            "inner_product_param { num_output: 4 axis: 1 } }",
            "(4, 8)",
        ),
        (
            'layer { name: "b" type: "ReLU" bottom: "x" top: "b" param { lr_mult: 1 } }',
            "1 param for 0 blobs",
        ),
    ],
)
def test_shapes_of_shared_blobs(second: str, refused: str | None) -> None:
    net = net_of(convolution("a", 'name: "w"') + second)
    if refused is None:
        check_sharing(net, infer_shapes(net, {"x": (1, 8, 1, 1)}).params)
        return
    with pytest.raises(InputError) as caught:
        check_sharing(net, infer_shapes(net, {"x": (1, 8, 1, 1)}).params)
    assert "layer 'b'" in str(caught.value)
    assert refused in str(caught.value)
