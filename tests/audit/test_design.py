"""The search for a design: its first trial is the base, it returns the best by its own measure, and a kill changes nothing."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from tests.audit_toys import problem

from specdef.attacks.task import Budget, Task
from specdef.audit import design
from specdef.audit.design import search_design
from specdef.audit.design_records import DesignTrial
from specdef.errors import SelectionError, SpecDefError
from specdef.lock.config import LockConfig
from specdef.lock.in_memory import lock_model
from specdef.models.tiny import tiny_inputs, tiny_model

BASE = LockConfig.preset("max")
BUDGET = Budget(steps=4, evaluations=1)


@pytest.fixture(scope="module")
def toy():
    model, task = problem(retain=False)
    # the attacker learns within a few steps: what is held out is what is trained on
    train = task.train[:2]
    return model, Task(name="toy", train=train, heldout=train), task.train[4:6]


def search(toy, trials=3, **options):
    model, task, calibration = toy
    base = options.pop("base", BASE)
    settings = {"attacks": ("full-adamw",), "budget": BUDGET, **options}
    return search_design(model, task, base, calibration=calibration, trials=trials, **settings)


def numbers(result):
    return [(t.number, t.config, dict(t.recovered), t.reason) for t in result.trials]


def shares(values):
    """Return a stand-in for the measurement: a function of the design to what every attack recovers."""

    def measure(self, config, watch):
        found = values(config)
        return (found, "") if isinstance(found, dict) else ({}, found)

    return measure


@pytest.fixture
def quick(monkeypatch):
    """Leave out everything that trains."""
    monkeypatch.setattr(design._Bench, "run_controls", lambda self, *_: self.controls.update(a=()))
    monkeypatch.setattr(design._Bench, "forecast", lambda self, config: ())
    return lambda values: monkeypatch.setattr(design._Bench, "measure", shares(values))


@pytest.fixture(scope="module")
def first(toy):
    """A search in which everything is run."""
    weights = copy.deepcopy(toy[0].state_dict())
    result = search(toy, trials=2, attacks=("full-adamw", "only-norms"))
    assert all(torch.equal(weights[name], t) for name, t in toy[0].state_dict().items())
    return result


def test_the_same_seed_finds_the_same_whatever_the_global_state(toy, first):
    torch.manual_seed(9)
    before = torch.get_rng_state()
    again = search(toy, trials=2, attacks=("full-adamw", "only-norms"))
    assert torch.equal(before, torch.get_rng_state())
    assert numbers(first) == numbers(again)
    assert first.forecast == again.forecast and first.forecast[0].part == "all"


def test_a_sequential_net_is_attacked(toy, first):
    assert first.trials[0].config == BASE
    assert set(first.recovered) == {"full-adamw"} == set(first.attacks)
    assert "normalisations" in first.left_out["only-norms"]
    assert 0 <= first.worst <= first.trials[0].worst < 0.9
    # what is returned locks, and by the same attack a lock in name only is worse
    assert lock_model(copy.deepcopy(toy[0]), first.best).certificate.bit_identical
    weak = search(toy, trials=1, base=replace(BASE, scale=2.0, min_scale=2.0, sides="readers"))
    assert weak.worst > first.worst


def test_a_language_model_is_attacked():
    task, calibration = llama_task()
    told = []
    result = search_design(
        tiny_model("llama"), task, BASE, calibration=calibration, trials=1,
        attacks=("only-norms",), budget=Budget(steps=2, evaluations=1), progress=told.append,
    )  # fmt: skip
    assert result.worst < 0.1 and result.best == BASE
    assert told[-1].trial == result.trials[0] and told[-1].ended == told[-1].trials == 1
    assert {p.run.side for p in told[:-1]} == {"control", "locked"}


def test_the_base_is_first_and_never_beats_what_is_returned(toy, quick):
    quick(lambda c: {"a": abs(c.gap - 4) / 10, "b": c.slack / 100})
    result = search(toy, trials=12)
    assert result.trials[0].config is BASE
    assert result.worst == min(t.worst for t in result.trials) < result.trials[0].worst
    assert result.best.schedule == "covering" and len({t.config for t in result.trials}) > 6
    quick(lambda c: {"a": float(c != BASE)})
    assert search(toy, trials=6).best is BASE


def test_ties_go_to_the_sum_and_then_to_the_lower_top(toy, quick):
    quick(lambda c: {"a": 0.5, "b": 0.1 if c.top == BASE.top else 0.0})
    result = search(toy, trials=8)
    assert sum(result.recovered.values()) == 0.5
    assert result.best.top == min(t.config.top for t in result.trials if t.recovered["b"] == 0)


def test_what_cannot_be_measured_is_passed_over_with_its_reason(toy, quick):
    quick(lambda c: "no room" if c == BASE else {"a": 0.2})
    result = search(toy, trials=3)
    assert result.trials[0].reason == "no room" and math.isinf(result.trials[0].worst)
    assert result.trials[0].to_dict()["worst"] is None
    assert result.worst == 0.2
    assert "1 of them not measured" in result.sentence() and "no room" in result.sentence()
    quick(lambda c: "no room")
    with pytest.raises(
        SelectionError, match="none of 2 designs can be measured; the first: no room"
    ):
        search(toy, trials=2)


def llama_task():
    inputs = [tiny_inputs("llama", seed=i, batch=1, length=8) for i in range(2)]
    calibration, proxy = ([x | {"labels": x["input_ids"]}] for x in inputs)
    return Task(name="p", train=proxy, heldout=proxy), calibration


def test_a_dtype_without_room_is_a_reason():
    task, calibration = llama_task()
    bench = design._Bench(tiny_model("llama").half(), task, calibration, BUDGET, None)
    recovered, reason = bench.measure(BASE, lambda _: None)
    assert not recovered and "exponent room" in reason


def test_a_lock_that_breaks_the_model_is_no_success(toy, monkeypatch):
    model, task, calibration = toy

    def broken(victim, config, *, calibration):
        locked = lock_model(victim, config, calibration=calibration)
        victim[0].weight.data.fill_(math.inf)
        return locked

    monkeypatch.setattr(design, "lock_model", broken)
    bench = design._Bench(model, task, calibration, BUDGET, None)
    recovered, reason = bench.measure(BASE, lambda _: None)
    assert not recovered and "changes what the model computes" in reason


def test_a_stopped_search_goes_on_as_if_it_had_not_been(toy, quick, tmp_path):
    def values(config):
        return {"a": abs(config.gap - 4) / 10 + config.slack / 100}

    quick(values)
    whole = search(toy, trials=14)
    for stop in (0, 3):
        measured = 0

        def until(config, stop=stop):
            nonlocal measured
            measured += 1
            if measured > stop:
                raise KeyboardInterrupt
            return values(config)

        quick(until)
        with pytest.raises(KeyboardInterrupt):
            search(toy, trials=14, storage=tmp_path / f"{stop}.journal")
        measured = -math.inf
        told = []
        resumed = search(toy, trials=14, storage=tmp_path / f"{stop}.journal", progress=told.append)
        assert numbers(resumed) == numbers(whole) and resumed.best == whole.best
        assert [p.ended for p in told] == list(range(1, 15))
    quick(lambda config: pytest.fail("everything is there already"))
    assert numbers(search(toy, trials=5, storage=tmp_path / "3.journal")) == numbers(whole)[:5]


def test_runs_of_a_stopped_trial_are_kept(toy, tmp_path, monkeypatch):
    told = []
    search(toy, trials=1, storage=tmp_path / "a.journal", progress=told.append)
    runs = [p.run for p in told if p.run]
    half = sum(r.side == "control" for r in runs) + 3

    def stop(progress):
        again.append(progress)
        if len(again) == half:
            raise KeyboardInterrupt

    again: list = []
    with pytest.raises(KeyboardInterrupt):
        search(toy, trials=1, storage=tmp_path / "b.journal", progress=stop)
    rest: list = []
    search(toy, trials=1, storage=tmp_path / "b.journal", progress=rest.append)
    # the run during which it was stopped is run again, the others are not
    assert len([p for p in rest if p.run]) == len(runs) - half + 1


def test_other_inputs_are_another_search(toy, quick, tmp_path):
    quick(lambda config: {"a": 0.5})
    search(toy, trials=1, storage=tmp_path / "j")
    told: list = []
    quick(lambda config: {"a": 0.25})
    for options in ({"seed": 1}, {"base": replace(BASE, gap=6)}, {"attacks": ("recipe",)}):
        assert search(toy, trials=1, storage=tmp_path / "j", **options).worst == 0.25
    kept = search(toy, trials=1, storage=tmp_path / "j", progress=told.append)
    assert kept.worst == 0.5 and len(told) == 1


def test_a_base_outside_the_ranges_is_tried_all_the_same(toy, quick):
    quick(lambda config: {"a": 1.0 if config.gap != 12 else 0.0})
    base = replace(BASE, gap=12, slack=30, scale=2.0**10)
    assert search(toy, trials=3, base=base).best is base


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"trials": 0}, ValueError, "trials must be at least 1"),
        ({"base": LockConfig.preset("convex")}, ValueError, "covering"),
        ({"base": LockConfig(method="compensated")}, ValueError, "covering"),
        ({"attacks": ("only-norms",)}, SpecDefError, "no attack can be counted .only-norms: "),
        ({"attacks": ()}, SpecDefError, "no attack can be counted"),
        ({"attacks": ("full-adanw",)}, SpecDefError, "nearest: full-adamw"),
        ({"attacks": ("full-adamw",), "budget": Budget(steps=1, evaluations=1), "still": True}, SpecDefError, "learns nothing"),
    ],
)  # fmt: skip
def test_what_cannot_be_searched_is_refused(toy, options, error, said):
    if options.pop("still", False):
        model, task, calibration = toy
        noise = [[x, y.flip(0)] for x, y in task.train]
        toy = model, replace(task, train=[noise[0]], heldout=[task.train[1]]), calibration
    with pytest.raises(error, match=said):
        search(toy, **options)


def test_a_trial_orders_by_its_worst_attack():
    low = DesignTrial(number=1, config=BASE, recovered={"a": 0.1, "b": 0.1})
    high = DesignTrial(number=0, config=BASE, recovered={"a": 0.2, "b": 0.0})
    assert low.rank < high.rank and low.worst == 0.1
