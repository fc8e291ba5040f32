"""Batch norms change a model at any learning rate, 0 included: a sweep must still see where nothing moves."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import specdef
from specdef.attacks.full import FullTraining
from specdef.attacks.task import Budget, Setting, Task
from specdef.attacks.trial import has_running_statistics
from specdef.audit.grid import Sweep as SweepOptions
from specdef.audit.grid import Tried, outcomes


def problem(shift: float) -> tuple[nn.Module, Task]:
    """Return a net with a batch norm that has seen its data as it is, and a task with inputs that lie elsewhere."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(320, 12, generator=generator)
    y = (x @ torch.randn(12, 4, generator=generator)).argmax(1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(12, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 4))
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        for _ in range(60):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    new = [[x[i : i + 32] + shift, (y[i : i + 32] + 1) % 4] for i in range(0, 320, 32)]
    return model.eval(), Task(name="toy", train=new[:8], heldout=new[8:])


@pytest.mark.parametrize("shift", [0.0, 2.0])
def test_a_sweep_ends_where_only_running_statistics_move(shift: float) -> None:
    model, task = problem(shift)
    report = specdef.audit(
        model, model, task, attacks=["full-adamw"], budget=Budget(steps=24, evaluations=4), seeds=1
    )
    for curve in report.curves:
        rates = [run.setting.learning_rate for run in curve.sweeps[0].runs]
        assert min(rates) >= 1e-8  # 1e-36 without
        assert len(rates) <= 16
    assert report.cells[0].recovered == pytest.approx(1.0)


def test_an_idle_run_moves_running_statistics_alone() -> None:
    model, task = problem(2.0)
    assert has_running_statistics(model) and not has_running_statistics(nn.Linear(2, 2))
    budget = Budget(steps=8, evaluations=8)
    idle = FullTraining()(model, task, Setting(), budget, idle=True)
    slow = FullTraining()(model, task, Setting(optimizer="sgd", learning_rate=1e-30), budget)
    assert idle.relative_change == 0 and idle.losses[-1] != idle.start
    assert idle.losses == slow.losses


def test_a_rate_is_judged_against_a_run_without_steps() -> None:
    sweep = SweepOptions(gain=1.0)
    drifted = Tried(rate=1e-6, start=1.0, initial=3.0, lowest=1.0, best=1.0, last=3.0)
    assert outcomes([drifted], sweep) == ["nothing"]
    worse = Tried(rate=1e-2, start=1.0, initial=3.0, lowest=1.0, best=1.0, last=5.0)
    assert outcomes([worse], sweep) == ["diverged"]
    better = Tried(rate=1e-3, start=1.0, initial=0.5, lowest=0.5, best=0.3, last=0.3)
    assert outcomes([better], sweep) == ["moved"]
