"""The plan of a sweep and the arena that keeps its frontiers."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantize.errors import InputError
from quantize.sweep.arena import Arena
from quantize.sweep.plan import RESERVE, Costs, Plan, Route, Step, in_flight, micro_batch_size, plan


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


def with_reserve(kept: int) -> int:
    """The memory that leaves so much for what is kept."""
    return -(-kept * RESERVE // (RESERVE - 1))


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
    # One image, so one route; twice the bound, for old and new frontier while it is run.
    found = plan(costs, steps, 1, with_reserve(max(2 * bound, 64)))
    (route,) = found.routes
    assert 2 * max(route.held_bytes) <= max(2 * bound, 64)
    assert route.work == pytest.approx(best_work(costs, steps, bound))


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
        if with_reserve((images + in_flight(found.micro_batch, images)) * bound) <= memory
    ]
    assert found.work <= min(single) + 1e-6
    for route in found.routes:
        assert_consistent(route, costs, steps)


def assert_consistent(route: Route, costs: Costs, steps: list[Step]) -> None:
    """Every step starts from what was kept last, at or before its cut; bytes and work are right."""
    held, work = None, 0.0
    for step, origin, keep, held_bytes in zip(steps, route.origin, route.keep, route.held_bytes, strict=True):
        assert origin == held
        assert origin is None or origin <= step.stop
        work += costs.work[step.stop] - (costs.work[held] if held is not None else -costs.source)
        if keep is not None:
            assert (held or 0) < keep <= step.stop
            held = keep
        assert step is steps[-1] or held_bytes == (0 if held is None else costs.live[held])
    assert route.held_bytes[-1] == 0
    assert route.work == work


def test_the_mixture_follows_the_sizes_along_the_net() -> None:
    """Where frontiers are wide some images are computed again, behind that none are."""
    costs = Costs(
        work=(0.0, 10.0, 20.0, 30.0, 40.0, 50.0, 60.0),
        source=0.0,
        live=(64, 192, 192, 64, 128, 128, 64),
        widest=20 * 64,
    )
    steps = [Step(stop, ()) for stop in (1, 2, 3, 4, 5, 6)]
    # The memory is for one image per micro-batch; behind the third step all 60 fit with 64 bytes each.
    found = plan(costs, steps, 60, with_reserve(101 * 64))
    bytes_held = [
        sum(route.images * route.held_bytes[number] for route in found.routes) for number in range(6)
    ]
    assert max(bytes_held) <= 101 * 64
    assert len(found.routes) == 3
    assert bytes_held[2] == 60 * 64
    constant_mixtures = [
        many * best_work(costs, steps, large) + (60 - many) * best_work(costs, steps, small)
        for small, large in itertools.combinations((0, 64, 128, 192), 2)
        for many in range(61)
        if many * large + (60 - many) * small <= 101 * 64
    ]
    assert found.work < 0.95 * min(constant_mixtures)


@given(problems(), st.integers(1, 40))
def test_without_a_bound_nothing_is_computed_twice(problem: tuple[Costs, list[Step]], images: int) -> None:
    costs, steps = problem
    found: Plan = plan(costs, steps, images, None)
    assert found.work == pytest.approx(found.plain_work)


def test_too_small_a_bound_names_the_least() -> None:
    with pytest.raises(InputError, match=r"memory: 1000 bytes is too small.*2000000 bytes \(2MiB\)"):
        micro_batch_size(2_000_000, 10, 1000)


@given(st.lists(st.tuples(st.integers(1, 40), st.integers(0, 9)), max_size=60))
def test_arrays_of_an_arena_do_not_share_memory(requests: list[tuple[int, int]]) -> None:
    """Arrays come and go at random; each keeps its content until it is given back."""
    arena = Arena(64 * 40)
    probe = arena.take((1,))
    start = probe.ctypes.data
    arena.give(probe)
    taken: list[np.ndarray] = []
    for number, (size, victim) in enumerate(requests):
        array = arena.take((size, 2))
        array[:] = number
        taken.append(array)
        while len(taken) > 5 or sum(a.nbytes for a in taken) > 64 * 20:
            arena.give(taken.pop(victim % len(taken)))
        for array in taken:
            assert (array == array[0, 0]).all()
        assert len({array[0, 0] for array in taken}) == len(taken)
    for array in taken:
        arena.give(array)
    whole = arena.take((64 * 50 // 4,))  # what has been given back is in one piece again
    assert whole.ctypes.data == start


def test_an_arena_uses_touched_memory_first() -> None:
    arena = Arena(64 * 8)
    first, second = arena.take((16,)), arena.take((16,))
    address = first.ctypes.data
    arena.give(first)
    assert arena.take((16,)).ctypes.data == address
    assert arena.take((16,)).ctypes.data == second.ctypes.data + 64


def test_a_full_arena_still_gives_arrays() -> None:
    arena = Arena(64)
    arrays = [arena.take((16,)) for _ in range(3)]
    for number, array in enumerate(arrays):
        array[:] = number
    assert [array[3] for array in arrays] == [0, 1, 2]
    for array in arrays:
        arena.give(array)
