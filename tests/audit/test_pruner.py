"""Runs are given up where they blew up or fell behind for good, and only there."""

from __future__ import annotations

import math

import pytest

from specdef.audit.pruner import hopeless

STEPS = 100


def curve(rate: float, floor: float = 0.2, upto: int = STEPS) -> dict[int, float]:
    return {t: floor + (2 - floor) * math.exp(-rate * t) for t in range(5, upto + 1, 5)}


def judge(losses: dict[int, float], best: list[dict[int, float]]) -> bool:
    return hopeless(losses, best, start=2.0, initial=2.0, steps=STEPS)


def given_up_at(losses: dict[int, float], best: list[dict[int, float]]) -> int | None:
    return next(
        (t for t in losses if judge({s: x for s, x in losses.items() if s <= t}, best)), None
    )


def test_a_slow_run_is_given_up_early_and_one_that_ends_lower_never() -> None:
    rival = [curve(0.05)]
    slow = given_up_at(curve(0.001), rival)
    assert slow is not None and slow <= 20
    assert given_up_at(curve(0.03, floor=0.0), rival) is None  # behind at first, lower at the end
    assert given_up_at(curve(0.05), rival) is None


def test_without_a_finished_rival_only_a_blow_up_is_given_up() -> None:
    assert given_up_at(curve(0.001), []) is None
    assert (
        given_up_at(curve(0.001), [curve(0.05, upto=50)]) is None
    )  # the rival was given up itself
    assert judge({5: math.inf}, [])


def test_a_run_that_blew_up_has_time_to_come_back() -> None:
    spike = {5: 900.0} | {t: 900.0 * 0.5 ** (t / 5) for t in range(10, STEPS + 1, 5)}
    assert given_up_at(spike, []) is None
    assert given_up_at({t: 900.0 for t in range(5, STEPS + 1, 5)}, [curve(0.05)]) == 25
    assert given_up_at(spike, [curve(0.05)]) is None  # while it falls so fast, it may yet arrive


def test_a_loss_that_an_attacks_edits_raised_has_time_to_fall() -> None:
    edited = {t: 0.2 + 18 * math.exp(-0.05 * t) for t in range(25, STEPS + 1, 25)}  # from 18
    rival = {25: 1.0, 50: 0.5, 75: 0.4, 100: 0.3}
    assert given_up_at(edited, []) is None and given_up_at(edited, [rival]) is None
    stuck = dict.fromkeys(range(25, STEPS + 1, 25), 18.0)
    assert given_up_at(stuck, []) == 50
    behind = {25: 3.9, 50: 3.8, 75: 3.7, 100: 3.6}
    assert given_up_at(behind, [rival]) == 50


def test_a_run_on_a_plateau_is_given_up() -> None:
    flat = {5: 1.9} | dict.fromkeys(range(10, STEPS + 1, 5), 1.8)
    assert given_up_at(flat, [curve(0.05)]) == 20


def test_nothing_is_given_up_at_the_end_or_against_a_sweep_that_gains_nothing() -> None:
    assert not judge(dict.fromkeys(range(5, STEPS + 1, 5), 1.99), [curve(0.05)])
    assert given_up_at(dict.fromkeys(range(5, STEPS + 1, 5), 2.1), [dict.fromkeys(range(5, STEPS + 1, 5), 2.0)]) is None  # fmt: skip


@pytest.mark.parametrize("start", [0.0, 1e-8])
def test_a_start_of_nothing_is_no_trouble(start: float) -> None:
    assert not hopeless({5: start}, [curve(0.05)], start=start, initial=start, steps=STEPS)
