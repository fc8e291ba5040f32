"""The search for learning rates, on landscapes known in full: both ends are found, and the best of the fine grid or nearly."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specdef.audit.grid import (
    ABOVE,
    HIGHEST,
    LOWEST,
    Sweep,
    Tried,
    index_of,
    next_rate,
    outcomes,
    rate_at,
)

ORDINARY = Sweep(low=1e-5, high=1e-2)
Fields = dict[str, Any]
GONE: Fields = {"diverged": True, "last": math.inf}


def level(loss: float) -> Fields:
    return {"best": min(loss, 1.0), "last": loss}


def bowl(rate: float, centre: float = -3.2, edge: float = -2.1) -> Fields:
    x = math.log10(rate)
    return GONE if x > edge else level(1 - 0.8 * math.exp(-((x - centre) ** 2)))


def staircase(rate: float) -> Fields:
    """Gains fall in steps of two decades."""
    x = math.log10(rate)
    if x > -3.6:
        return GONE
    return level(1 - 0.8 * 0.1 ** (math.ceil((-3.6 - x) / 2) - 1))


def two_windows(rate: float) -> Fields:
    """A shallow window in the ordinary range, a deep one far below, divergence between them."""
    x = math.log10(rate)
    if -3.5 < x < -2.5:
        return level(0.9)
    if -9.6 < x < -8.4:
        return level(0.3)
    return GONE if x > -9 else level(1.0)


def locked(rate: float) -> Fields:
    """Diverges down to 1e-16, and learns a little below."""
    x = math.log10(rate)
    return GONE if x > -16.1 else level(1 - 0.3 * 10 ** min(0.0, x + 16.5))


def never_diverges(rate: float) -> Fields:
    return level(0.5 if rate > 1e-3 else 1.0)


def wrecked(rate: float) -> Fields:
    """Losses stay finite where training blows up."""
    x = math.log10(rate)
    return level(50.0) if x > -2.1 else bowl(rate)


def search(landscape: Callable[[float], Fields], sweep: Sweep = ORDINARY) -> dict[float, Tried]:
    trials: list[Tried] = []
    while (rate := next_rate(trials, sweep)) is not None:
        assert rate not in [t.rate for t in trials]
        trials.append(Tried(rate=rate, **landscape(rate)))
    return {t.rate: t for t in trials}


@pytest.mark.parametrize(
    "landscape", [bowl, staircase, two_windows, locked, wrecked, never_diverges], ids=lambda f: f.__name__
)  # fmt: skip
def test_both_ends_and_the_best_are_found(landscape: Callable[[float], Fields]) -> None:
    found = search(landscape)
    lowest, highest = min(found), max(found)
    kinds = dict(zip(found, outcomes(list(found.values()), ORDINARY), strict=True))
    assert kinds[lowest] == "nothing"
    assert kinds[highest] == "diverged" or highest == pytest.approx(ORDINARY.high * ABOVE)
    grid = [landscape(rate_at(i)) for i in range(index_of(lowest), index_of(highest) + 1, 2)]
    best = min(t.best for t in found.values())
    assert best <= min(g.get("best", 1.0) for g in grid) + 1e-9
    assert len(found) <= 0.75 * len(grid) + 4


@pytest.mark.parametrize("shallow", [-3.4, -3.0, -2.6])
@pytest.mark.parametrize("deep", [-10.5, -8.5, -6.4])
def test_a_deep_window_between_two_decades_is_found_below_a_shallow_one(
    shallow: float, deep: float
) -> None:
    def landscape(rate: float) -> Fields:
        x = math.log10(rate)
        if abs(x - shallow) < 0.5:
            return level(0.9)
        return level(0.3) if abs(x - deep) < 0.4 else GONE if x > deep else level(1.0)

    found = search(landscape)
    assert min(t.best for t in found.values()) == 0.3 and len(found) <= 16


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**20), workers=st.integers(1, 4), limit=st.sampled_from([3, 24, 10**6]))
def test_a_search_ends_whatever_its_runs_do(seed: int, workers: int, limit: int) -> None:
    dice = random.Random(seed)
    low = 10 ** dice.uniform(-8, 0)
    sweep = Sweep(
        low=low, high=low * 10 ** dice.uniform(0, 4), around=dice.choice([None, None, 10 ** dice.uniform(-20, 3)]),
        gain=dice.choice([None, 0.5, 0.0]), max_trials=limit,
    )  # fmt: skip
    done: list[Tried] = []
    running: list[float] = []
    while True:
        pending = [Tried(rate=rate, running=True) for rate in running]
        rate = next_rate([*done, *pending], sweep) if len(running) < workers else None
        if rate is not None:
            assert rate not in [t.rate for t in (*done, *pending)]
            running.append(rate)
        elif running:
            ended = running.pop(dice.randrange(len(running)))
            fields = {
                "initial": dice.choice([1.0, 5.0]), "best": dice.uniform(0, 2), "last": dice.uniform(0, 9),
                "diverged": dice.random() < 0.3, "still": dice.random() < 0.2, "share": dice.choice([0.25, 1.0]),
            }  # fmt: skip
            done.append(Tried(rate=ended, **fields))
        else:
            break
    assert len(done) <= min(limit, 80)


def test_it_refines_to_a_quarter_at_the_edge_of_stability() -> None:
    found = search(lambda rate: bowl(rate, centre=-1.0, edge=-2.6))  # the better the nearer
    best = min(found.values(), key=lambda t: t.best)
    above = min(t.rate for t in found.values() if t.diverged)
    assert index_of(above) - index_of(best.rate) == 1


def test_where_everything_diverges_it_walks_down_to_the_end_of_float32() -> None:
    found = search(lambda rate: GONE)
    assert min(found) == pytest.approx(LOWEST) and max(found) == ORDINARY.high
    assert len(found) == 39  # decades alone: nothing to refine


@pytest.mark.parametrize("stride", [2, 3, 4])
@pytest.mark.parametrize("low", [1e-6, 1e-5, 1e-4])
def test_a_stride_ends_where_float32_ends_too(low: float, stride: int) -> None:
    found = search(lambda rate: GONE, replace(ORDINARY, low=low, stride=stride))
    assert min(found) == pytest.approx(LOWEST)
    assert len(found) <= 6 + math.ceil(36 / stride)


@pytest.mark.parametrize("edge", range(-28, -6))
def test_a_stride_finds_what_single_decades_find(edge: int) -> None:
    def behind(rate: float) -> Fields:
        x = math.log10(rate) - edge
        return GONE if x > 0.3 else level(1 - 0.3 * 10 ** min(0.0, x))

    plain, strided = (search(behind, replace(ORDINARY, stride=stride)) for stride in (1, 3))
    assert min(t.best for t in strided.values()) == min(t.best for t in plain.values())
    assert len(strided) <= len(plain) + 3


def test_where_nothing_moves_it_looks_up_and_not_down() -> None:
    found = search(lambda rate: level(1.0) | {"still": True})
    assert max(found) == pytest.approx(HIGHEST)
    assert min(found) > ORDINARY.low / 10


def test_steps_that_change_no_weight_end_the_walk_down() -> None:
    found = search(lambda rate: bowl(rate) if rate > 1e-4 else level(0.97) | {"still": True})
    assert min(found) >= 1e-5


def test_a_gain_counts_against_the_controls() -> None:
    def small(rate: float) -> Fields:
        return level(1 - 0.004 * math.exp(-((math.log10(rate) + 3) ** 2))) if rate < 0.05 else GONE

    alone, beside = search(small), search(small, replace(ORDINARY, gain=0.8))
    assert min(beside) > min(alone)
    kinds = outcomes(list(beside.values()), replace(ORDINARY, gain=0.8))
    assert "moved" not in kinds


def test_a_loss_that_comes_down_to_a_constant_guess_is_movement_but_no_gain() -> None:
    kind = outcomes([Tried(rate=1e-3, start=2.3, initial=10.0, best=2.3, last=2.3)], ORDINARY)
    assert kind == ["moved"]
    assert outcomes([Tried(rate=1, start=2.3, initial=10.0, best=9.9, last=11.0)], ORDINARY) == ["diverged"]  # fmt: skip


def test_fixed_rates_are_run_in_order_and_no_others() -> None:
    assert list(search(bowl, Sweep(rates=(5e-5, 1e-4)))) == [5e-5, 1e-4]


@pytest.mark.parametrize("centre", [-3.2, -4.6, -2.5])
def test_around_a_known_best_it_climbs_as_far_as_it_gets_better(centre: float) -> None:
    found = search(lambda r: bowl(r, centre=centre), replace(ORDINARY, around=rate_at(-13)))
    best = min(found.values(), key=lambda t: t.best)
    assert abs(math.log10(best.rate) - centre) <= 0.25 + 1e-3
    assert len(found) <= 7


def test_around_a_rate_that_diverges_it_walks_down() -> None:
    found = search(lambda r: bowl(r, centre=-7, edge=-6), replace(ORDINARY, around=1e-3))
    assert min(t.best for t in found.values()) < 0.3


def test_the_number_of_trials_is_bounded() -> None:
    assert len(search(lambda rate: GONE, replace(ORDINARY, max_trials=5))) == 5


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**20), workers=st.integers(1, 4))
def test_any_number_of_workers_runs_each_rate_once_and_finds_the_same_best(
    seed: int, workers: int
) -> None:
    dice = random.Random(seed)
    landscape = dice.choice([bowl, staircase, two_windows, locked])
    done: list[Tried] = []
    running: list[Tried] = []
    while True:
        rate = next_rate([*done, *running], ORDINARY) if len(running) < workers else None
        if rate is not None:
            assert rate not in [t.rate for t in (*done, *running)]
            running.append(Tried(rate=rate, running=True))
        elif running:
            ended = running.pop(dice.randrange(len(running)))
            done.append(Tried(rate=ended.rate, **landscape(ended.rate)))
        else:
            break
    alone = min(t.best for t in search(landscape).values())
    assert min(t.best for t in done) <= alone + 0.02


def test_the_answer_does_not_depend_on_the_order_of_trials() -> None:
    trials = list(search(bowl).values())
    for count in range(1, len(trials)):
        some = trials[:count]
        assert next_rate(some, ORDINARY) == next_rate(some[::-1], ORDINARY)


@pytest.mark.parametrize("options", [{"low": 0.0}, {"low": 1.0, "high": 0.1}, {"max_trials": 0}])
def test_bad_configurations_are_refused(options: Fields) -> None:
    with pytest.raises(ValueError, match="must be"):
        Sweep(**options)
