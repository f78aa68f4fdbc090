"""A model goes to Caffe's files and comes back; quantized weights never run without their alphas."""

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from quantize.caffenet import InferenceNet, NetParameter, Weights, loaded
from quantize.caffenet.model import Model
from quantize.caffenet.quantized import Quantizer, become_quantizer, read_quantizer, with_alpha_terms
from quantize.errors import InputError
from quantize.numerics.grids import GRIDS, make_grid, smallest_grid
from quantize.settings import GridChoice
from quantize.stages.weights import weights_quan
from tests.conftest import Job
from tests.nets import parse, random_weights

IMAGE = (3, 8, 8)
CHOSEN = {
    "conv1": GridChoice(bits=8, grid="fixed_point"),
    "conv2": GridChoice(bits=4, grid="power_of_two"),
    "several": GridChoice(bits=4, grid="uniform"),
    "fc": GridChoice(bits=8, grid="uniform"),
}
TWISTED = """
name: "twisted"
layer { name: "data" type: "Data" top: "data" top: "label" include { phase: TRAIN }
  transform_param { mean_file: "mean.binaryproto" }
  data_param { source: "lmdb" batch_size: 2 backend: LMDB } }
layer { name: "data" type: "Input" top: "data" include { phase: TEST }
  input_param { shape { dim: [1, 3, 8, 8] } } }
layer { name: "conv1" type: "Convolution" bottom: "data" top: "conv1"
  convolution_param { num_output: 24 kernel_size: 3 pad: 1 } }
layer { name: "relu1" type: "ReLU" bottom: "conv1" top: "conv1" }
layer { name: "conv2" type: "Convolution" bottom: "conv1" top: "conv2" param { name: "w" }
  convolution_param { num_output: 24 kernel_size: 3 pad: 1 } }
layer { name: "bn" type: "BatchNorm" bottom: "conv2" top: "conv2"
  batch_norm_param { use_global_stats: false } }
layer { name: "again" type: "Convolution" bottom: "conv2" top: "again" param { name: "w" }
  convolution_param { num_output: 24 kernel_size: 3 pad: 1 } }
layer { name: "several" type: "Convolution" bottom: "conv2" bottom: "again" top: "left" top: "right"
  convolution_param { num_output: 24 kernel_size: 3 } }
layer { name: "sum" type: "Eltwise" bottom: "left" bottom: "right" top: "sum" }
layer { name: "fc" type: "InnerProduct" bottom: "sum" top: "fc"
  inner_product_param { num_output: 30 transpose: true bias_term: false } }
layer { name: "end" type: "ReLU" bottom: "fc" top: "end" }
"""
"""Shared weights, several tops, kernels in columns, layers without a bias, of TRAIN alone."""


def full_model() -> Model:
    net = parse(TWISTED)
    test = InferenceNet.of(net).net
    return Model(net, loaded(test, random_weights(test, {"data": IMAGE})))


def quantized_model() -> Model:
    """With all grids and quantizers of unsigned and of signed codes."""
    full = full_model()
    quantized, _ = weights_quan(full, CHOSEN, "optimal")
    net = quantized.net
    become_quantizer(layer_of(net, "relu1"), Quantizer(0.25, 0, 255))
    become_quantizer(layer_of(net, "end"), Quantizer(0.5, -63, 63))
    return quantized


def layer_of(net: NetParameter, name: str):
    return next(layer for layer in net.layer if layer.name == name)


def serialized(weights: Weights) -> bytes:
    file = io.BytesIO()
    weights.write(file)
    return file.getvalue()


def assert_same(one: Model, other: Model) -> None:
    assert [str(layer) for layer in one.layers] == [str(layer) for layer in other.layers]
    for a, b in zip(one.layers, other.layers, strict=True):
        for left, right in ((a.codes, b.codes), (a.alpha, b.alpha)):
            assert (left is None) == (right is None)
            if left is not None and right is not None:
                np.testing.assert_array_equal(left, right)
    assert serialized(one.weights) == serialized(other.weights)


@pytest.mark.parametrize("make", [full_model, quantized_model])
def test_a_model_comes_back_from_its_files(make: Callable[[], Model], tmp_path: Path) -> None:
    model = replace(make(), prototxt=tmp_path / "given.prototxt")
    reread = Model.load(*model.save(tmp_path / "out"))
    assert reread.prototxt == tmp_path / "out/twisted.prototxt"
    assert_same(model, reread)
    bn = layer_of(reread.net, "bn")
    assert not bn.batch_norm_param.HasField("use_global_stats")  # Caffe would ignore what is stored
    changed = NetParameter()
    changed.CopyFrom(reread.net)
    layer_of(changed, "bn").batch_norm_param.use_global_stats = False
    # Relative to the prototxt as before, wherever that lies now.
    assert changed.layer[0].transform_param.mean_file == str(tmp_path / "mean.binaryproto")
    changed.layer[0].transform_param.mean_file = "mean.binaryproto"
    assert changed == model.net


def test_what_is_known_of_layers() -> None:
    layers = {layer.name: layer for layer in quantized_model().layers}
    assert not any(name.endswith(("_alpha_term", "_alpha_term_2")) for name in layers)
    full = {layer.name: layer for layer in full_model().layers}
    assert list(layers) == list(full)
    for name, choice in {**CHOSEN, "again": CHOSEN["conv2"]}.items():
        assert (layers[name].bits, layers[name].grid) == (choice.bits, choice.grid)
        assert (full[name].bits, full[name].grid, full[name].codes) == (None, None, None)
        assert layers[name].shape == full[name].shape
        codes, alpha = layers[name].codes, layers[name].alpha
        assert codes is not None
        assert alpha is not None
        assert len(codes) == len(alpha) == (30 if name == "fc" else 24)
        blob = full_model().weights[name][0]
        w = blob.reshape(-1, 30).T if name == "fc" else blob.reshape(24, -1)
        error = np.square(alpha[:, None] * codes - w).sum() / np.square(w).sum()
        assert error < (0.05 if choice.bits == 4 else 1e-3)
    assert layers["relu1"].quantizer == Quantizer(0.25, 0, 255)
    assert layers["end"].quantizer == Quantizer(0.5, -63, 63)
    assert layers["sum"].quantizer is None
    np.testing.assert_array_equal(layers["conv2"].codes, layers["again"].codes)


@pytest.mark.parametrize(
    "quantizer", [Quantizer(0.5, 0, 127), Quantizer(0.5, 0, 15), Quantizer(2, -127, 127)]
)
def test_quantizers_are_read_as_written(quantizer: Quantizer) -> None:
    layer = parse('layer { name: "relu" type: "ReLU" bottom: "x" top: "x" }').layer[0]
    assert read_quantizer(layer) is None
    become_quantizer(layer, quantizer)
    assert read_quantizer(layer) == quantizer
    assert (layer.threshold_param.threshold == 0) == (quantizer.highest == 127 and not quantizer.lowest)
    layer.type = "Quant"
    assert read_quantizer(layer) == quantizer


def test_quantized_weights_without_their_alphas_are_refused(tmp_path: Path) -> None:
    model = quantized_model()
    _, caffemodel = model.save(tmp_path)
    (tmp_path / "given.prototxt").write_text(TWISTED)
    with pytest.raises(
        InputError, match=r"twisted.caffemodel: layer 'conv1': .* no layer 'conv1_alpha_term'"
    ):
        Model.load(tmp_path / "given.prototxt", caffemodel)
    with pytest.raises(InputError, match="give the prototxt that was written with the caffemodel"):
        replace(model, net=parse(TWISTED))
    missing = with_alpha_terms(parse(TWISTED), model.weights)
    del missing.layer[[layer.name for layer in missing.layer].index("several_alpha_term_2")]
    with pytest.raises(InputError, match="several_alpha_term_2"):
        replace(model, net=missing)


def test_weights_that_are_on_no_grid_are_told(tmp_path: Path) -> None:
    model = quantized_model()
    weights = model.weights.copy()
    weights.replace("fc", [weights["fc"][0] * 0.3])
    reread = Model.load(*Model(model.net, weights).save(tmp_path))
    with pytest.raises(InputError, match=r"layer 'fc' .* on no grid"):
        _ = reread.layers


def test_blobs_of_another_net_are_refused(job: Job, tmp_path: Path) -> None:
    (tmp_path / "twisted.prototxt").write_text(TWISTED)
    with pytest.raises(InputError, match="conv1"):
        Model.load(tmp_path / "twisted.prototxt", job.folder / "net.caffemodel")


@pytest.mark.parametrize("name", ["", "../net", ".net", "a b", "a/b"])
def test_names_that_are_no_files(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="file's name"):
        full_model().save(tmp_path, name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", list(GRIDS))
def test_the_smallest_grid_is_the_one_that_made_the_codes(name: str) -> None:
    for bits in GRIDS[name].allowed_bits:
        grid = make_grid(name, bits)
        for variant in {grid.canonical, *grid.variants}:
            found = smallest_grid(grid.levels(variant).astype(np.float32))
            assert found is not None
            assert found.bits == bits
            assert any(np.isin(grid.levels(variant), found.levels(v)).all() for v in found.variants)
            if variant == grid.canonical and bits > 2:
                assert found.name == name


def test_codes_on_no_grid() -> None:
    assert smallest_grid(np.array([0.3, 1], np.float32)) is None
    assert smallest_grid(np.array([np.nan], np.float32)) is None
