"""Positive controls: locks that are known to be broken are reported broken, by the attack that is known to do it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import specdef
from specdef.attacks.full import FullTraining
from specdef.attacks.task import Budget, Setting, Task
from specdef.audit.baseline import measure_baseline
from specdef.audit.report import AuditReport
from specdef.audit.sweeps import Sweeps
from specdef.curvature.losses import model_outputs
from specdef.lock.config import LockConfig
from specdef.lock.in_memory import lock_model
from specdef.models.tiny import tiny_inputs, tiny_model

torch.set_num_threads(1)

FAMILIES = ("llama", "gpt2", "bert", "vit", "resnet")
BUDGET = Budget(steps=4, evaluations=1)
ABSORBED = LockConfig(scale=2.0**30)
COMPENSATED = LockConfig(method="compensated", scale=1e4, k=4, num_layers=2)
EVERY_VALUE = 10**6


@pytest.fixture(autouse=True)
def no_scratch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the from-scratch reference out: it takes a third of the time, and is not asked about here."""
    monkeypatch.setattr(Sweeps, "scratch", lambda _: [])


def problem(family: str, *, retain: bool = False) -> tuple[nn.Module, Task]:
    """A tiny model, and a batch to learn by heart; what it is to retain is what it answers itself."""
    model, inputs = tiny_model(family), tiny_inputs(family, batch=4)
    ids = inputs.get("input_ids") if family in ("llama", "gpt2") else None
    batch = {**inputs, "labels": torch.arange(4) % 3 if ids is None else ids}
    kept = []
    if retain:
        with torch.no_grad():
            kept = [{**inputs, "labels": model_outputs(model, batch).argmax(-1)}]
    return model, Task(name="by heart", train=[batch], heldout=[batch], retain=kept)


def locked(model: nn.Module, config: LockConfig) -> nn.Module:
    return lock_model(copy.deepcopy(model), config).model


def audited(lock: nn.Module, model: nn.Module, task: Task, *attacks: str) -> AuditReport:
    return specdef.audit(
        lock, model, task, attacks=attacks, budget=BUDGET, seeds=1, suite="2026.1-quick"
    )


def bites(lock: nn.Module, task: Task, report: AuditReport) -> bool:
    """Tell whether the lock keeps plain training at the control's best rate from half of the control's gain."""
    control = next(c for c in report.curves if c.side == "control").sweeps[0].best
    start = report.cells[0].start
    assert start is not None
    rate = Setting(learning_rate=control.setting.learning_rate)
    run = FullTraining()(lock, task, rate, BUDGET)
    return run.best > start - 0.5 * (start - control.best)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_absorbed_lock_falls_to_rebalancing_without_its_key(family: str) -> None:
    model, task = problem(family)
    lock = locked(model, ABSORBED)
    report = audited(lock, model, task, "rebalance")
    assert report.broken and report.cells[0].status == "broken"
    assert report.cells[0].recovered == pytest.approx(1, abs=0.1)
    assert "Broken at tier 5" in report.verdict and "rebalance" in report.verdict
    assert bites(lock, task, report)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_compensated_lock_falls_to_merging_and_freezing(family: str) -> None:
    model, task = problem(family)
    lock = locked(model, COMPENSATED)
    report = audited(lock, model, task, "freeze-inserted", "merge")
    assert [(c.attack, c.tier, c.status) for c in report.cells] == [("freeze-inserted", 3, "broken"), ("merge", 5, "broken")]  # fmt: skip
    assert all(c.recovered is not None and c.recovered > 0.8 for c in report.cells)
    # four images can be learned by heart with the scaled directions alone
    assert family == "vit" or bites(lock, task, report)


@pytest.mark.parametrize(
    ("family", "method", "attack"),
    [
        ("vit", "scaled", "full-adamw"),
        ("vit", "compensated", "full-adamw"),
        ("llama", "compensated", "full-sgd"),
    ],
)
def test_scaling_every_singular_value_falls_to_a_sweep(
    family: str, method: str, attack: str
) -> None:
    model, task = problem(family)
    lock = locked(model, LockConfig(method=method, scale=1e4, k=EVERY_VALUE, num_layers=2))  # type: ignore[arg-type]
    report = audited(lock, model, task, attack)
    assert report.tiers[1].status == "broken" and "Broken at tier 2" in report.verdict


def test_a_lock_that_ruined_its_model_is_flagged_and_not_passed() -> None:
    model, task = problem("vit", retain=True)
    ruined = locked(model, LockConfig(method="scaled", scale=1e8, k=1, num_layers=2))
    report = audited(ruined, model, task, "full-sgd")
    assert report.useless and "does not do its own work" in report.verdict
    assert "utility-already-lost" in report.cells[0].flags
    assert report.cells[0].status in ("invalid", "broken")
    assert "held" not in report.verdict.lower()
    assert not measure_baseline(locked(model, COMPENSATED), model, task).useless
