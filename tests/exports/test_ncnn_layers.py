"""Every layer that the ncnn target translates, in ncnn itself against the formula in numpy."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

from quantize.caffenet import infer_shapes
from quantize.errors import InputError
from quantize.exports.integers import IntegerNet
from quantize.exports.ncnn import export_ncnn
from quantize.exports.ncnn_layers import TRANSLATORS
from tests.caffe.test_parity import CASES, Case, feeds_of, net_of, relative_error, weights_of
from tests.engines import fork_formulas
from tests.engines.layer_formulas import FORMULAS

ncnn = pytest.importorskip("ncnn")
TOLERANCE = 2e-5
"""Of the largest absolute value of a blob: ncnn computes exp, log and powers by polynomials."""
KNOWN = [
    case
    for case in (*CASES, *fork_formulas.CASES)
    if case.type in TRANSLATORS and not (case.tops > 1 and "Convolution" in case.type)
]
REFUSED = ("batch axis", "not over", "axis is not 1", "per channel", "second bottom", "second top")
REFUSED += ("more than 4 axes", "1 to 3 axes", "beta", "behind the image")


def run(
    files: Mapping[str, bytes], folder: Path, feeds: dict[str, np.ndarray], wanted: Sequence[str]
) -> list[np.ndarray]:
    """What ncnn makes of one image, in float32 arithmetic."""
    for name, content in files.items():
        (folder / name).write_bytes(content)
    net = ncnn.Net()
    net.opt.num_threads = 1
    net.opt.use_fp16_packed = net.opt.use_fp16_storage = net.opt.use_fp16_arithmetic = False
    assert net.load_param(str(folder / "net.param")) == 0
    assert net.load_model(str(folder / "net.bin")) == 0
    extractor = net.create_extractor()
    for name, feed in feeds.items():
        extractor.input(name, ncnn.Mat(np.ascontiguousarray(feed)).clone())
    found = []
    for name in wanted:
        code, mat = extractor.extract(name)
        assert code == 0, name
        found.append(np.array(mat))
    return found


def whole_net(case: Case) -> tuple[IntegerNet, dict[str, np.ndarray]]:
    """A net of one layer, in float, and one image for it."""
    rng = np.random.default_rng(len(str(case)))
    net = net_of(case)
    weights = weights_of(case, net, rng)
    feeds = {name: feed[:1] for name, feed in feeds_of(case, rng).items()}
    inputs = dict(zip(feeds, case.bottoms, strict=True))
    shapes = infer_shapes(net, {name: feed.shape for name, feed in feeds.items()})
    return IntegerNet("net", net, weights, inputs, tuple(net.layer[-1].top), shapes, {}, {}, {}), feeds


def exported(net: IntegerNet) -> Mapping[str, bytes] | None:
    """The files; None where it is refused, and the message is one of those that are meant to be."""
    try:
        return export_ncnn(net, "net").files
    except InputError as error:
        message = str(error)
    assert any(words in message for words in REFUSED), message
    return None


@pytest.mark.parametrize("case", KNOWN, ids=str)
def test_the_formula(case: Case, tmp_path: Path) -> None:
    whole, feeds = whole_net(case)
    layer = whole.net.layer[-1]
    files = exported(whole)
    if files is None:
        return
    blobs = dict(whole.weights.entries()).get("layer", [])
    bottoms = [feeds[name].astype(np.float64) for name in layer.bottom]
    wanted = FORMULAS[layer.type](layer, bottoms, [blob.astype(np.float64) for blob in blobs])
    found = run(files, tmp_path, {name: feed[0] for name, feed in feeds.items()}, list(layer.top))
    for own, value in zip(found, wanted, strict=True):
        assert own.shape == value.shape[1:]
        assert relative_error(own[None], value) <= TOLERANCE


def test_few_cases_are_refused() -> None:
    """What is refused is told; but of every type something works, and nearly all of what nets are made of."""
    computed: Counter[str] = Counter()
    for case in KNOWN:
        computed[case.type] += exported(whole_net(case)[0]) is not None
    assert +computed == computed
    assert computed.keys() == TRANSLATORS.keys()
    assert sum(computed.values()) > 0.85 * len(KNOWN)
