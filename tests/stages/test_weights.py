"""Stage 1: the net it writes computes the quantized weights, and everything else is carried over."""

import io
from pathlib import Path

import numpy as np
import pytest

from quantize.caffenet import InferenceNet, LayerParameter, NetParameter, Weights
from quantize.caffenet.kernels import to_kernels
from quantize.caffenet.quantized import with_alpha_terms
from quantize.engines import engine_opener
from quantize.errors import InputError
from quantize.numerics.grids import make_grid
from quantize.settings import CaffeProcess, GridChoice, LayerChoice, WeightSettings
from quantize.stages.weights import check_kernels, choices, free_layers
from tests.nets import CROPPED, RESIDUAL, parse, quantized_weights, random_weights

OPEN = engine_opener("onnx", CaffeProcess(), 2)
QUANTIZED = ["conv1", "left", "right_a", "right_b", "fc1", "fc2"]


def quantized_residual(**settings: object) -> tuple[NetParameter, Weights, NetParameter, Weights, list[str]]:
    net = parse(RESIDUAL)
    test = InferenceNet.of(net).net
    weights = random_weights(test, {"data": CROPPED})
    chosen = choices(test, WeightSettings(**settings))  # type: ignore[arg-type]
    changed, quantized, layers = quantized_weights(net, weights, chosen, "optimal")
    return net, weights, changed, quantized, [layer.name for layer in layers]


def test_the_layers_and_their_grids() -> None:
    chosen = choices(InferenceNet.of(parse(RESIDUAL)).net, WeightSettings())
    assert list(chosen) == QUANTIZED
    eight, four = (8, "fixed_point"), (4, "power_of_two")
    assert [(c.bits, c.grid) for c in chosen.values()] == [eight, four, four, four, four, eight]
    assert {type(choice) for choice in chosen.values()} == {GridChoice}  # no whole section of settings


def test_overrides_and_skips() -> None:
    settings = WeightSettings.model_validate(
        {
            "bits": 3,
            "layers": {"left": {"skip": True}, "fc2": {"bits": 5}, "right_a": {"grid": "fixed_point"}},
        }
    )
    chosen = choices(InferenceNet.of(parse(RESIDUAL)).net, settings)
    assert "left" not in chosen
    assert (chosen["fc2"].bits, chosen["fc2"].grid) == (5, "power_of_two")
    assert (chosen["right_a"].bits, chosen["right_a"].grid) == (3, "fixed_point")
    assert chosen["right_b"].bits == 3


def test_an_override_for_no_layer_says_which_there_are() -> None:
    settings = WeightSettings.model_validate({"layers": {"conv9": {"bits": 3}}})
    with pytest.raises(InputError, match=r"weights.layers.conv9: .*conv1, left, right_a"):
        choices(InferenceNet.of(parse(RESIDUAL)).net, settings)


def test_a_net_with_nothing_to_quantize() -> None:
    net = parse('layer { name: "r" type: "ReLU" bottom: "data" top: "r" }')
    with pytest.raises(InputError, match="no layer to quantize"):
        choices(net, WeightSettings())


@pytest.mark.parametrize(
    ("blobs", "words"),
    [
        (None, "has no weights in the caffemodel"),
        ([np.ones((5, 3))], r"the shapes \(5, 3\), which are not weights and bias of num_output 4"),
        ([np.ones((4, 3)), np.ones(3)], r"the shapes \(4, 3\), \(3,\)"),
        ([np.ones((0, 3))], r"the shapes \(0, 3\)"),
        ([np.full((4, 3), np.inf)], "NaN or an infinity"),
    ],
)
def test_blobs_behind_a_type_that_is_not_known(blobs: list[np.ndarray] | None, words: str) -> None:
    net = parse(
        """
        layer { name: "odd" type: "Mystery" bottom: "data" top: "odd" }
        layer { name: "fc" type: "InnerProduct" bottom: "odd" top: "fc"
          inner_product_param { num_output: 4 } }
        """
    )
    weights = Weights()
    if blobs is not None:
        weights.add(net.layer[1], [blob.astype(np.float32) for blob in blobs])
    with pytest.raises(InputError, match=rf"layer 'fc' \(InnerProduct\).*{words}"):
        check_kernels(net, weights, ["fc"])


def test_blobs_are_on_the_grid_and_one_alpha_per_kernel_scales_them() -> None:
    _, weights, _, quantized, layers = quantized_residual()
    assert layers == QUANTIZED
    for name in QUANTIZED:
        q, *bias = quantized[name]
        alpha, *shift = quantized[f"{name}_alpha_term"]
        assert q.shape == weights[name][0].shape
        assert alpha.shape == (q.shape[0],)
        levels = 15 if name not in ("conv1", "fc2") else 256
        assert len(np.unique(q)) <= levels
        rebuilt = alpha.reshape(-1, *[1] * (q.ndim - 1)) * q
        error = np.square(rebuilt - weights[name][0]).sum() / np.square(weights[name][0]).sum()
        assert error < (0.05 if levels == 15 else 1e-3)
        for b, s in zip(bias, shift, strict=True):
            np.testing.assert_allclose(s, b * (1 - alpha), rtol=1e-5, atol=1e-7)


def test_the_net_computes_alpha_times_q() -> None:
    """The output is alpha * Qx + b: the same as of the old net with weights alpha * Q."""
    net, weights, changed, quantized, _ = quantized_residual()
    folded = weights.copy()
    for name in QUANTIZED:
        q, *bias = quantized[name]
        alpha = quantized[f"{name}_alpha_term"][0]
        folded.replace(name, [alpha.reshape(-1, *[1] * (q.ndim - 1)) * q, *bias])
    pixels = np.random.default_rng(1).normal(0, 1, (4, *CROPPED)).astype(np.float32)
    outputs = []
    for n, w in ((net, folded), (changed, quantized)):
        test = InferenceNet.of(n)
        engine = OPEN(test.net, w, {"data": CROPPED})
        runner = engine.compile(0, len(test.net.layer), [test.scores])
        outputs.append(runner.run({"data": pixels}).blobs[test.scores])
    np.testing.assert_allclose(outputs[1], outputs[0], rtol=1e-4, atol=1e-4 * np.abs(outputs[0]).max())


def test_everything_else_is_carried_over_byte_for_byte(tmp_path: Path) -> None:
    net = parse(RESIDUAL)
    test = InferenceNet.of(net).net
    weights = random_weights(test, {"data": CROPPED})
    strange = LayerParameter(name="from_a_fork", type="NobodyKnows", bottom=["fc2"], top=["x"])
    strange.MergeFromString(b"\xfa\x3f\x03abc")  # an unknown field
    weights.add(strange, [np.arange(6, dtype=np.float32).reshape(2, 3)])
    given = serialized(weights)
    _, quantized, _ = quantized_weights(net, weights, choices(test, WeightSettings()), "optimal")
    assert serialized(weights) == given
    (tmp_path / "out.caffemodel").write_bytes(serialized(quantized))
    reread = Weights.read(tmp_path / "out.caffemodel")
    before, after = layer_bytes(weights), layer_bytes(reread)
    for name in set(weights.layers()) - set(QUANTIZED):
        assert after[name] == before[name]
    assert b"\xfa\x3f\x03abc" in after["from_a_fork"]
    assert reread.layers() == quantized.layers()
    for name in quantized.layers():
        for written, read in zip(quantized[name], reread[name], strict=True):
            np.testing.assert_array_equal(written, read)


def test_alpha_layers_stand_right_behind_their_layers() -> None:
    _, _, changed, quantized, _ = quantized_residual()
    names = [layer.name for layer in changed.layer]
    for name in QUANTIZED:
        alpha = changed.layer[names.index(name) + 1]
        assert (alpha.name, alpha.type) == (f"{name}_alpha_term", "Scale")
        assert list(alpha.bottom) == list(alpha.top) == list(changed.layer[names.index(name)].top)
        assert alpha.scale_param.bias_term == (len(quantized[alpha.name]) == 2)
    assert with_alpha_terms(parse(RESIDUAL), quantized) == changed
    assert with_alpha_terms(changed, quantized) == changed


def test_a_transposed_inner_product_has_its_kernels_in_columns() -> None:
    net = parse(
        'layer { name: "fc" type: "InnerProduct" bottom: "data" top: "fc" '
        "inner_product_param { num_output: 3 transpose: true bias_term: false } }"
    )
    weights = random_weights(net, {"data": (5,)})
    w = to_kernels(net.layer[0], weights["fc"][0])
    assert w.shape == (3, 5)
    _, quantized, _ = quantized_weights(net, weights, {"fc": GridChoice(bits=4)}, "optimal")
    q, alpha = quantized["fc"][0], quantized["fc_alpha_term"][0]
    assert q.shape == (5, 3)
    assert np.square(alpha * q - weights["fc"][0]).sum() < 0.02 * np.square(weights["fc"][0]).sum()
    assert set(np.unique(np.abs(q))) <= set(np.abs(make_grid("power_of_two", 4).levels(0)))


def serialized(weights: Weights) -> bytes:
    file = io.BytesIO()
    weights.write(file)
    return file.getvalue()


def layer_bytes(weights: Weights) -> dict[str, bytes]:
    net = NetParameter.FromString(serialized(weights))
    return {layer.name: layer.SerializeToString() for layer in net.layer}


DEPTHWISE = """
  layer { name: "data" type: "Input" top: "data" input_param { shape { dim: 1 dim: 4 dim: 6 dim: 6 } } }
  layer { name: "dw_first" type: "Convolution" bottom: "data" top: "a"
    convolution_param { num_output: 4 kernel_size: 3 group: 4 } }
  layer { name: "dw" type: "Convolution" bottom: "a" top: "b"
    convolution_param { num_output: 4 kernel_size: 3 group: 4 } }
  layer { name: "dw_of_a_fork" type: "ConvolutionDepthwise" bottom: "b" top: "c"
    convolution_param { num_output: 4 kernel_size: 1 } }
  layer { name: "grouped" type: "Convolution" bottom: "c" top: "d"
    convolution_param { num_output: 4 kernel_size: 1 group: 2 } }
  layer { name: "one_output" type: "Convolution" bottom: "d" top: "e"
    convolution_param { num_output: 1 kernel_size: 1 } }
  layer { name: "dw_named" type: "Convolution" bottom: "d" top: "f"
    convolution_param { num_output: 4 kernel_size: 1 group: 4 } }
  layer { name: "fc" type: "InnerProduct" bottom: "f" top: "g" inner_product_param { num_output: 3 } }
"""


def test_depthwise_layers_may_have_a_setting_of_their_own() -> None:
    net = parse(DEPTHWISE)
    overrides = {"dw_named": LayerChoice(bits=3)}
    plain = choices(net, WeightSettings(layers=overrides))
    assert {choice.bits for choice in (plain["dw"], plain["dw_of_a_fork"])} == {4}
    settings = WeightSettings.model_validate(
        {"depthwise": {"bits": 6}, "layers": {"dw_named": {"bits": 3}}, "first_last": {"bits": 7}}
    )
    found = {name: (choice.bits, choice.grid) for name, choice in choices(net, settings).items()}
    assert found == {
        "dw_first": (7, "fixed_point"),
        "dw": (6, "fixed_point"),
        "dw_of_a_fork": (6, "fixed_point"),
        "grouped": (4, "power_of_two"),
        "one_output": (4, "power_of_two"),
        "dw_named": (3, "power_of_two"),
        "fc": (7, "fixed_point"),
    }
    # A budget leaves them their bits.
    assert free_layers(net, settings.model_copy(update={"budget": 3.0})) == ["grouped", "one_output"]
