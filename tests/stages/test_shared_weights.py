"""Layers that share their weights are quantized as one; layers of several tops have an alpha behind each."""

from pathlib import Path

import numpy as np
import pytest

from quantize.caffenet import TEST, InferenceNet, NetParameter, Weights, filter_net, loaded
from quantize.caffenet.model import Model
from quantize.caffenet.quantized import with_alpha_terms
from quantize.commands.config import load
from quantize.commands.inspect import inspect_net
from quantize.data import Transform
from quantize.data.feed import Feed
from quantize.engines import engine_opener
from quantize.errors import InputError
from quantize.job.run import Run
from quantize.record import RunRecord
from quantize.settings import CaffeProcess, GridChoice, WeightSettings
from quantize.stages.data_aware import CalibrationSweep, data_aware
from quantize.stages.weights import check_unquantized, choices, free_layers, unquantizable
from tests.nets import images_of, parse, quantized_weights, random_weights, write_images

OPEN = engine_opener("onnx", CaffeProcess(), 1)
IMAGE = (3, 8, 8)


def layer(name: str, bottom: str, *params: str, fields: str = "kernel_size: 3 pad: 1") -> str:
    """A Convolution of 6 kernels whose top has its name."""
    shared = " ".join(f'param {{ name: "{param}" }}' if param else "param { lr_mult: 1 }" for param in params)
    return (
        f'layer {{ name: "{name}" type: "Convolution" bottom: "{bottom}" top: "{name}" {shared} '
        f"convolution_param {{ num_output: 6 {fields} }} }}\n"
    )


INPUT = (
    'layer { name: "in" type: "Input" top: "data" input_param { shape { dim: 1 dim: 3 dim: 8 dim: 8 } } }\n'
)
CHAIN = (
    INPUT
    + layer("c1", "data")
    + layer("c2", "c1", "w", "b")
    + layer("c3", "c2", "w", "")
    + layer("c4", "c3")
    + layer("c5", "c4", "", "b")
    + 'layer { name: "fc" type: "InnerProduct" bottom: "c5" top: "fc" '
    "inner_product_param { num_output: 4 } }\n"
)


def settings(**given: object) -> WeightSettings:
    return WeightSettings.model_validate(given)


def chosen(text: str, **given: object) -> dict[str, int]:
    return {name: choice.bits for name, choice in choices(test_net(text), settings(**given)).items()}


def test_net(text: str) -> NetParameter:
    return InferenceNet.of(parse(text)).net


test_net.__test__ = False  # type: ignore[attr-defined]


def test_shared_weights_are_chosen_once() -> None:
    assert chosen(CHAIN) == {"c1": 8, "c2": 4, "c4": 4, "c5": 4, "fc": 8}
    assert free_layers(test_net(CHAIN), settings()) == ["c2", "c4", "c5"]


def test_weights_of_the_first_or_last_layer_are_so_wherever_they_are() -> None:
    first = CHAIN.replace('name: "c1" type: "Convolution" bottom: "data" top: "c1"', 'name: "c1" type: '
                          '"Convolution" bottom: "data" top: "c1" param { name: "v" }')  # fmt: skip
    text = INPUT + layer("c0", "data") + first.replace(INPUT, "").replace('bottom: "data"', 'bottom: "c0"')
    last = text + layer("c9", "c5", "v")
    assert chosen(last) == {"c0": 8, "c1": 8, "c2": 4, "c4": 4, "c5": 4, "fc": 4}
    assert free_layers(test_net(last), settings()) == ["c2", "c4", "c5", "fc"]


def test_overrides_of_any_of_them() -> None:
    assert chosen(CHAIN, layers={"c3": {"bits": 3}})["c2"] == 3
    assert chosen(CHAIN, layers={"c3": {"bits": 3}, "c2": {"bits": 3}})["c2"] == 3
    assert "c2" not in chosen(CHAIN, layers={"c3": {"skip": True}})
    assert free_layers(test_net(CHAIN), settings(layers={"c3": {"bits": 3}})) == ["c4", "c5"]
    with pytest.raises(InputError, match=r"weights\.layers\.c3: differs from weights\.layers\.c2"):
        chosen(CHAIN, layers={"c2": {"bits": 3}, "c3": {"bits": 5}})


TIED = (
    INPUT + 'layer { name: "e1" type: "InnerProduct" bottom: "data" top: "e1" param { name: "u" } '
    "inner_product_param { num_output: 9 } }\n"
    'layer { name: "e2" type: "InnerProduct" bottom: "e1" top: "e2" inner_product_param { num_output: 9 } }\n'
    'layer { name: "d" type: "InnerProduct" bottom: "e2" top: "d" param { name: "u" } '
    "inner_product_param { num_output: 192 transpose: true } }\n"
)
DECONVOLVED = CHAIN + (
    'layer { name: "up" type: "Deconvolution" bottom: "c3" top: "up" param { name: "w" } '
    "convolution_param { num_output: 6 kernel_size: 3 } }\n"
)
AS_A_BIAS = (
    INPUT
    + 'layer { name: "a" type: "InnerProduct" bottom: "data" top: "a" inner_product_param { num_output: 1 } '
    'param { name: "v" share_mode: PERMISSIVE } }\n'
    'layer { name: "b" type: "InnerProduct" bottom: "a" top: "b" inner_product_param { num_output: 192 } '
    'param { lr_mult: 1 } param { name: "v" share_mode: PERMISSIVE } }\n'
)


@pytest.mark.parametrize(
    ("text", "left_out", "other"),
    [(TIED, ["e1", "d"], "d (InnerProduct)"), (DECONVOLVED, ["c2", "c3", "up"], "up (Deconvolution)"),
     (AS_A_BIAS, ["a"], "b (InnerProduct)")],
)  # fmt: skip
def test_weights_that_are_something_else_elsewhere_are_kept(
    text: str, left_out: list[str], other: str
) -> None:
    """The same numbers times another alpha, or none, would be wrong there."""
    net = test_net(text)
    assert list(unquantizable(net)) == left_out
    assert other in unquantizable(net)[left_out[0]]
    assert not set(left_out) & set(choices(net, settings()))
    assert list(choices(net, settings(layers={left_out[0]: {"skip": True}}))) == list(
        choices(net, settings())
    )
    with pytest.raises(
        InputError, match=rf"weights\.layers\.{left_out[0]}: cannot be quantized: its weights"
    ):
        choices(net, settings(layers={left_out[0]: {"bits": 3}}))
    plans = {row.name: row.plan for row in inspect_net(parse(text), {"data": IMAGE}, grids(text), None)}
    assert "kept: its weights are also in layer" in plans[left_out[0]]


def quantized(text: str, **given: object) -> tuple[NetParameter, Weights, NetParameter, Weights]:
    net = parse(text)
    test = InferenceNet.of(net).net
    weights = loaded(filter_net(net, TEST), random_weights(test, {"data": IMAGE}))
    changed, found, layers = quantized_weights(net, weights, choices(test, settings(**given)), "optimal")
    assert [layer.shared_by for layer in layers if layer.name == "c2"] in ([], [["c3"]])
    return net, weights, changed, found


def run(net: NetParameter, weights: Weights, blobs: list[str]) -> list[np.ndarray]:
    test = InferenceNet.of(net).net
    pixels = np.random.default_rng(1).normal(0, 1, (4, *IMAGE)).astype(np.float32)
    engine = OPEN(test, weights, {"data": IMAGE})
    found = engine.compile(0, len(test.layer), blobs).run({"data": pixels}).blobs
    engine.close()
    return [found[name] for name in blobs]


def folded(weights: Weights, found: Weights, names: list[str]) -> Weights:
    """Full precision with alpha * Q in the place of some weights."""
    result = weights.copy()
    for name in names:
        q, *bias = found[name]
        alpha = found[f"{name}_alpha_term"][0]
        result.replace(name, [alpha.reshape(-1, *[1] * (q.ndim - 1)) * q, *bias])
    return result


def test_shared_weights_have_one_q_and_one_alpha() -> None:
    net, weights, changed, found = quantized(CHAIN)
    np.testing.assert_array_equal(found["c2"][0], found["c3"][0])
    np.testing.assert_array_equal(found["c2_alpha_term"][0], found["c3_alpha_term"][0])
    names = ["c1", "c2", "c3", "c4", "c5", "fc"]
    wanted = run(net, folded(weights, found, names), ["c3", "fc"])
    for one, other in zip(run(changed, found, ["c3", "fc"]), wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * np.abs(other).max())
    params = {layer.name: [p.name for p in layer.param] for layer in changed.layer if layer.type == "Scale"}
    assert {name for name, named in params.items() if named == ["c2_alpha_term"]} == {
        "c2_alpha_term",
        "c3_alpha_term",
    }
    assert sum(map(len, params.values())) == 2
    assert with_alpha_terms(changed, found) == changed


TOPS = INPUT + (
    'layer { name: "cut" type: "Slice" bottom: "data" top: "l" top: "r" slice_param { axis: 3 } }\n'
    'layer { name: "both" type: "Convolution" bottom: "l" bottom: "r" top: "x" top: "y" '
    "convolution_param { num_output: 6 kernel_size: 3 } }\n"
    'layer { name: "sum" type: "Eltwise" bottom: "x" bottom: "y" top: "s" }\n'
    'layer { name: "fc" type: "InnerProduct" bottom: "s" top: "fc" inner_product_param { num_output: 4 } }\n'
)


@pytest.mark.parametrize("bias", [True, False])
def test_every_top_has_an_alpha(bias: bool) -> None:
    text = TOPS if bias else TOPS.replace("kernel_size: 3", "kernel_size: 3 bias_term: false")
    net, weights, changed, found = quantized(text)
    names = [layer.name for layer in changed.layer]
    assert names == [
        "in",
        "cut",
        "both",
        "both_alpha_term",
        "both_alpha_term_2",
        "sum",
        "fc",
        "fc_alpha_term",
    ]
    assert [(l.bottom[0], l.top[0]) for l in changed.layer[3:5]] == [("x", "x"), ("y", "y")]  # noqa: E741
    wanted = run(net, folded(weights, found, ["both", "fc"]), ["x", "y", "fc"])
    for one, other in zip(run(changed, found, ["x", "y", "fc"]), wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * np.abs(other).max())


def test_a_layer_of_both_phases_has_its_alpha_in_both() -> None:
    """Two layers of one name, one for each phase, are one layer to the caffemodel."""
    train, test = (
        layer("c1", "data", fields=f"kernel_size: 3 pad: 1 {fill}").replace(
            "top", f"include {{ phase: {phase} }} top"
        )
        for phase, fill in (("TRAIN", 'weight_filler { type: "xavier" }'), ("TEST", ""))
    )
    _, _, changed, _ = quantized(CHAIN.replace(layer("c1", "data"), train + test))
    for phase in (0, 1):
        names = [layer.name for layer in filter_net(changed, phase).layer]
        assert names[:4] == ["in", "c1", "c1_alpha_term", "c2"]


def test_a_layer_behind_the_labels_that_has_the_weights_too() -> None:
    """It is not needed to quantize, but `caffe test` runs it."""
    text = CHAIN.replace(INPUT, 'layer { name: "d" type: "Data" top: "data" top: "label" }\n') + (
        'layer { name: "loss" type: "EuclideanLoss" bottom: "fc" bottom: "label" top: "loss" }\n'
        + layer("behind", "loss", "w", "b")
    )
    net = parse(text)
    drawn = random_weights(InferenceNet.of(net).net, {"data": IMAGE, "label": ()})
    weights = loaded(filter_net(net, TEST), drawn)
    changed, found, layers = quantized_weights(
        net, weights, choices(InferenceNet.of(net).net, settings()), "optimal"
    )
    assert next(layer for layer in layers if layer.name == "c2").shared_by == ["c3", "behind"]
    names = [layer.name for layer in filter_net(changed, TEST).layer]
    assert names[names.index("behind") + 1] == "behind_alpha_term"
    np.testing.assert_array_equal(found["behind"][0], found["c2"][0])


def test_a_net_that_has_been_quantized_is_refused() -> None:
    net, _, changed, _ = quantized(CHAIN)
    check_unquantized(net)
    with pytest.raises(InputError, match="'c1_alpha_term': it has been quantized; give the net from before"):
        check_unquantized(changed)


def test_a_shared_bias_stays_and_its_alpha_terms_make_up_for_it(tmp_path: Path) -> None:
    """c2 and c5 have one bias and different weights, so the data-aware solver wants two."""
    net = parse(CHAIN)
    test = InferenceNet.of(net).net
    weights = loaded(filter_net(net, TEST), random_weights(test, {"data": IMAGE}))
    images = images_of(write_images(tmp_path / "lmdb", 12, IMAGE), Transform(scale=0.01), TEST)
    calibration = CalibrationSweep(Feed({"data": images}), OPEN, None)
    found = choices(test, settings())
    wanted = data_aware(Model(net, weights), found, calibration)
    _, quantized, _ = quantized_weights(net, weights, found, "data_aware", calibration=calibration)
    for name in ("c2", "c5"):
        bias = wanted[name].bias
        assert bias is not None
        assert np.abs(bias - weights[name][1]).max() > 1e-3
        np.testing.assert_array_equal(quantized[name][1], weights[name][1])
        alpha, shift = quantized[f"{name}_alpha_term"]
        np.testing.assert_allclose(alpha * quantized[name][1] + shift, bias, atol=1e-6)
    np.testing.assert_array_equal(quantized["c4"][1], wanted["c4"].bias)


def grids(text: str) -> dict[str, GridChoice]:
    """The grids of a net's layers."""
    return choices(InferenceNet.of(parse(text)).net, settings())


def run_job(folder: Path, text: str) -> RunRecord:
    """The report of the three stages."""
    (folder / "net.prototxt").write_text(text)
    with open(folder / "net.caffemodel", "wb") as file:
        random_weights(InferenceNet.of(parse(text)).net, {"data": IMAGE}).write(file)
    write_images(folder / "images", 12, IMAGE)
    given = {
        "name": "job",
        "model.prototxt": str(folder / "net.prototxt"),
        "model.weights": str(folder / "net.caffemodel"),
        "data.calibration.source": str(folder / "images"),
        "output": str(folder / "out"),
    }
    return Run(load(None, given, ["renorm.images=12", "activations.images=12"])).quantize()


def test_what_is_shared_counts_once(tmp_path: Path) -> None:
    rows = {row.name: row for row in inspect_net(parse(CHAIN), {"data": IMAGE}, grids(CHAIN), None)}
    assert [rows[name].parameters for name in ("c2", "c3", "c5")] == [6 * 6 * 9 + 6, 6, 6 * 6 * 9]
    assert rows["c3"].plan.startswith("weights: 4 bits power_of_two, those of c2")
    record = run_job(tmp_path, CHAIN)
    packed = {
        "c1": 6 * 3 * 9,
        "c2": 6 * 6 * 9 / 2,
        "c4": 6 * 6 * 9 / 2,
        "c5": 6 * 6 * 9 / 2,
        "fc": 4 * 6 * 64,
    }
    alphas, biases = 6 * 4 + 4, 6 * 4 + 4  # c1, c2, c4 and c5, and fc; b of c2 and c5 is one, c3 has its own
    assert record.sizes.packed == sum(packed.values()) + 4 * (alphas + biases)
    assert record.output_sqnr is not None
    assert [layer.name for layer in record.output_sqnr.layers] == [
        "c1",
        "c2",
        "c3",
        "c4",
        "c5",
        "fc",
    ]
    assert "<td>as c2</td>" in (tmp_path / "out/report.html").read_text()


def test_the_output_of_several_tops_is_measured_behind_alpha(tmp_path: Path) -> None:
    measured = run_job(tmp_path, TOPS).output_sqnr
    assert measured is not None
    assert [layer.name for layer in measured.layers] == ["both", "fc"]
    found = measured.layers[0].sqnr_db["quantized"]
    assert found is not None
    assert found > 40  # 8 bits
