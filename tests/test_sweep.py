"""The plan of a sweep and the arena that keeps its frontiers."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantize.errors import InputError
from quantize.sweep import Arena, Costs, Plan, Route, Step, micro_batch_size, plan


def best_work(costs: Costs, steps: list[Step], bound: int) -> float:
    """The least work per image over every choice of what to keep after each step, by trying them all."""

    def least(number: int, held: int | None) -> float:
        if number == len(steps):
            return 0.0
        stop = steps[number].stop
        work = costs.work[stop] - (costs.work[held] if held is not None else -costs.source)
        allowed = [p for p in range(1, stop + 1) if (held or 0) < p and costs.live[p] <= bound]
        return work + min(least(number + 1, kept) for kept in [held, *allowed])

    return least(0, None)


@st.composite
def problems(draw: st.DrawFn) -> tuple[Costs, list[Step]]:
    layers = draw(st.integers(1, 7))
    per_layer = draw(st.lists(st.integers(1, 50), min_size=layers, max_size=layers))
    live = draw(st.lists(st.integers(1, 9), min_size=layers + 1, max_size=layers + 1))
    stops = draw(st.lists(st.integers(1, layers), min_size=1, max_size=4, unique=True).map(sorted))
    work = tuple(float(w) for w in itertools.accumulate(per_layer, initial=0))
    costs = Costs(work, float(draw(st.integers(0, 20))), tuple(64 * size for size in live), 64)
    return costs, [Step(stop, ()) for stop in stops]


@given(problems(), st.integers(0, 9))
def test_a_route_is_the_cheapest_for_its_bytes(problem: tuple[Costs, list[Step]], size: int) -> None:
    costs, steps = problem
    bound = 64 * size
    # One image and a bound with room for the micro-batch: the plan has one route.
    found = plan(costs, steps, 1, max(3 * bound, 64))
    route = found.routes[0]
    assert route.kept_bytes * 3 <= max(3 * bound, 64)
    assert route.work == pytest.approx(best_work(costs, steps, route.kept_bytes))


@given(problems(), st.integers(1, 40), st.integers(64, 64 * 400))
def test_a_plan_keeps_its_bound_and_never_loses_to_one_route(
    problem: tuple[Costs, list[Step]], images: int, memory: int
) -> None:
    costs, steps = problem
    found = plan(costs, steps, images, memory)
    assert sum(route.images for route in found.routes) == images
    assert found.kept_bytes <= memory
    bounds = {0, *costs.live}
    single = [
        images * best_work(costs, steps, bound)
        for bound in bounds
        if (images + 4 * found.micro_batch) * bound <= memory
    ]
    assert found.work <= min(single) + 1e-6
    for route in found.routes:
        assert_consistent(route, steps)


def assert_consistent(route: Route, steps: list[Step]) -> None:
    """Every step starts from what was kept last, at or before its cut."""
    held = None
    for step, origin, keep in zip(steps, route.origin, route.keep, strict=True):
        assert origin == held
        assert origin is None or origin <= step.stop
        if keep is not None:
            assert (held or 0) < keep <= step.stop
            held = keep


@given(problems(), st.integers(1, 40))
def test_without_a_bound_nothing_is_computed_twice(problem: tuple[Costs, list[Step]], images: int) -> None:
    costs, steps = problem
    found: Plan = plan(costs, steps, images, None)
    assert found.work == pytest.approx(found.plain_work)


def test_too_small_a_bound_names_the_least() -> None:
    with pytest.raises(InputError, match=r"renorm.memory: 1000 bytes is too small.*2000000 bytes \(2MiB\)"):
        micro_batch_size(2_000_000, 10, 1000)


@given(st.integers(1, 6), st.lists(st.integers(1, 4), min_size=2, max_size=6))
def test_the_arena_keeps_every_chunk_until_it_is_read(chunks: int, sizes: list[int]) -> None:
    slots = [64 * size for size in sizes]
    arena = Arena(chunks, max(slots))
    expected: dict[int, np.ndarray] = {}
    for version, slot in enumerate(slots):
        written = {}
        for chunk in list(arena.order()):
            if expected:
                np.testing.assert_array_equal(arena.old(chunk), expected[chunk])
            room = arena.new(chunk, slot)
            room[:] = (7 * version + chunk) % 256
            written[chunk] = room.copy()
        arena.advance(slot)
        expected = written
    for chunk, content in expected.items():
        np.testing.assert_array_equal(arena.old(chunk), content)
