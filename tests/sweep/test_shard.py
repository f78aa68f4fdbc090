"""Images on their way through a net: what is shown, what is computed again, what more memory would save."""

import re

import numpy as np
import pytest

from quantize.caffenet import TRAIN, InferenceNet, NetParameter, Weights, layer_index, single_assignment
from quantize.data import Transform
from quantize.data.feed import Feed
from quantize.engines import engine_opener
from quantize.engines.base import Engine
from quantize.numerics.moments import moments_of
from quantize.settings import CaffeProcess, parse_size
from quantize.sweep.pair import beside, both_weights, full_layers, of_layers
from quantize.sweep.plan import Costs, Step
from quantize.sweep.run import Shard
from tests.heard import Heard
from tests.nets import CROPPED, RESIDUAL, images_of, parse, random_weights, write_images

COUNT = 23
OPEN = engine_opener("onnx", CaffeProcess(), 2)


@pytest.fixture(scope="module")
def feed(tmp_path_factory: pytest.TempPathFactory) -> Feed:
    path = write_images(tmp_path_factory.mktemp("images") / "lmdb", COUNT)
    transform = Transform(crop_size=9, mirror=True, scale=0.02, mean_value=(100.0,))
    return Feed({"data": images_of(path, transform, TRAIN)})


@pytest.fixture(scope="module")
def net() -> NetParameter:
    return single_assignment(InferenceNet.of(parse(RESIDUAL)).net)


@pytest.fixture(scope="module")
def weights(net: NetParameter) -> Weights:
    return random_weights(net, {"data": CROPPED})


def in_one_batch(net: NetParameter, weights: Weights, feed: Feed, blob: str) -> np.ndarray:
    pixels = next(feed.batches(COUNT)).feeds["data"]
    engine = OPEN(net, weights, {"data": CROPPED})
    return engine.compile(0, len(net.layer), [blob]).run({"data": pixels}).blobs[blob]


@pytest.mark.parametrize("memory", [None, 80_000, 30_000])
def test_every_image_is_shown_once_at_every_step(
    net: NetParameter, weights: Weights, feed: Feed, memory: int | None
) -> None:
    """Outputs made in the step, kept from before it, and seen twice at one place; and their moments."""
    left, scores = layer_index(net, "left"), layer_index(net, "fc2") + 1
    relu = net.layer[left].bottom[0]
    steps = [
        Step(left, (relu,), (relu,)),
        Step(left, (), (relu,)),
        Step(left + 1, ("left",), (relu, "left")),
        Step(scores, (), ("fc2",)),
    ]
    shard = Shard(OPEN(net, weights, {"data": CROPPED}), feed, steps, memory)
    heard = Heard()
    for step in steps:
        shown = {name: np.full((COUNT, *shape_of(shard.engine, name)), np.nan) for name in step.outputs}

        def visit(images: range, blobs: dict[str, np.ndarray], shown: dict = shown) -> None:
            assert set(blobs) == set(shown)
            for name, blob in blobs.items():
                assert np.isnan(shown[name][images.start : images.stop]).all()
                shown[name][images.start : images.stop] = blob

        moments = shard.advance(visit=visit, progress=heard)
        for name in step.outputs:
            wanted = in_one_batch(net, weights, feed, name)
            np.testing.assert_allclose(shown[name], wanted, rtol=1e-4, atol=1e-4)
        for name in step.measured:
            exact = moments_of(in_one_batch(net, weights, feed, name))
            np.testing.assert_allclose(moments[name].mean, exact.mean, rtol=1e-4, atol=1e-5)
    assert heard.done[""] == pytest.approx(shard.plan.work)
    assert (shard.plan.work > shard.plan.plain_work) == (memory is not None)


def shape_of(engine: Engine, blob: str) -> tuple[int, ...]:
    return engine.blob_shape(blob, 1)[1:]


def test_the_memory_that_is_named_is_enough(net: NetParameter, weights: Weights, feed: Feed) -> None:
    steps = [Step(place, ()) for place in range(2, len(net.layer), 2)]

    def shard(memory: int | None) -> Shard:
        return Shard(OPEN(net, weights, {"data": CROPPED}), feed, steps, memory)

    assert shard(None).advice() is None
    tight = shard(30_000)
    advice = tight.advice()
    assert advice is not None
    times, enough = re.search(r"takes (\S+) times .*; (\S+) would do with one", advice).groups()  # type: ignore[union-attr]
    assert float(times) == pytest.approx(tight.plan.work / tight.plan.plain_work, abs=0.05)
    generous = shard(parse_size(enough))
    assert generous.plan.work == pytest.approx(generous.plan.plain_work)
    assert generous.advice() is None


def test_what_only_the_first_step_needs_is_done_once(net: NetParameter, weights: Weights, feed: Feed) -> None:
    """A whole net in front of another: computing again from the images does not run it again."""
    front = full_layers(net.layer, ["data"])
    both = of_layers(net, [*front, *net.layer])
    alone = [Step(place, ()) for place in (2, 6, 12, 20)]
    steps = [Step(len(front) + step.stop, (beside("fc2"),) if step.stop == 2 else ()) for step in alone]
    steps = [Step(s.stop, s.measured, (both.layer[s.stop - 1].top[0],)) for s in steps]
    engine = OPEN(both, both_weights(weights, weights, net.layer), {"data": CROPPED})
    behind = Shard(engine, feed, steps, 30_000)
    single = Costs.of(net, engine.shapes, ["data"], ())
    first = Costs.of(of_layers(net, front), engine.shapes, ["data"], ())
    assert behind.costs.once == pytest.approx(first.work[layer_index(net, "fc2") + 1])
    assert behind.costs.between(None, steps[-1].stop) == pytest.approx(single.between(None, 20), rel=0.2)
    wanted = moments_of(in_one_batch(net, weights, feed, "fc2"))
    np.testing.assert_allclose(behind.advance()[beside("fc2")].mean, wanted.mean, rtol=1e-4, atol=1e-5)
