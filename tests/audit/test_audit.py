"""The audit end to end on a small net: known-broken locks are broken, damaged models flagged, controls checked."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import audit_toys as toys
from torch import nn

import specdef.audit
from specdef.attacks.attack import Attack, Prepared
from specdef.attacks.full import FullTraining
from specdef.attacks.task import Budget, Task
from specdef.audit.audit import audit
from specdef.audit.baseline import constant_guess, measure_baseline
from specdef.audit.fingerprint import model_digest, task_digest
from specdef.audit.render.pages import html_page, write_pages
from specdef.audit.report import AuditReport
from specdef.audit.suite import SUITES, entries, find_suite
from specdef.audit.sweeps import Progress
from specdef.curvature.losses import MSELoss
from specdef.errors import SpecDefError
from specdef.models.tiny import tiny_inputs

BUDGET = Budget(steps=16, evaluations=4)
RECIPE = FullTraining(learning_rates=(5e-5, 1e-4), tier=1, name="recipe")
TUNED = FullTraining(("adamw",))
MOMENTUM = FullTraining(("momentum",))


class Identity(Attack):
    """Edits nothing, in its own words."""

    name = "nothing"
    tier = 5
    source = "test"
    summary = "test"
    asked = 0

    def prepare(self, model: nn.Module, task: Task, *, original: Any, generator: Any) -> Prepared:
        type(self).asked += 1
        return Prepared(model=model, groups=[{"params": list(model.parameters())}])


class LockedOnly(Identity):
    name = "locked-only"

    def applies(self, model: nn.Module) -> str:
        return "" if isinstance(model[0], nn.Sequential) else "nothing was inserted"


def run(locked: nn.Module, original: nn.Module, task: Task, attacks: list[Attack], **options: Any) -> AuditReport:  # fmt: skip
    options = {"budget": BUDGET, "seeds": 1} | options
    return audit(locked, original, task, attacks=attacks, **options)


@pytest.fixture(scope="module")
def uniform() -> AuditReport:
    model, task = toys.problem()
    return run(toys.uniform(model), model, task, [TUNED, RECIPE, MOMENTUM], seeds=2)


def test_scaling_all_singular_values_falls_to_tier_2(uniform: AuditReport) -> None:
    tier = next(t for t in uniform.tiers if t.tier == 2)
    assert tier.status == "broken" and uniform.broken
    assert "Broken at tier 2" in uniform.verdict
    cell = next(c for c in uniform.cells if c.status == "broken" and c.tier == 2)
    assert cell.recovered is not None and cell.recovered > 0.5
    assert cell.seeds == 2 and cell.recovered_interval is not None
    assert cell.scratch is not None and cell.utility is not None


def test_the_cheapest_tier_comes_first_and_a_broken_one_is_left(uniform: AuditReport) -> None:
    assert [c.tier for c in uniform.cells] == [1, 2, 2]
    assert [c.status for c in uniform.cells[1:]] == ["broken", "pruned by tier"]
    assert any("was broken already" in line for line in uniform.not_tested)


def test_the_recipe_takes_the_rate_that_works_on_the_unlocked_model(uniform: AuditReport) -> None:
    recipe = uniform.cells[0]
    assert recipe.status != "invalid" and any("its best" in note for note in recipe.notes)
    locked = next(c for c in uniform.curves if c.attack == "recipe" and c.side == "locked")
    assert all(len(sweep.runs) == 1 for sweep in locked.sweeps)


def test_a_report_is_json_and_never_says_secure(uniform: AuditReport) -> None:
    text = json.dumps(uniform.to_dict(), allow_nan=False)
    back = json.loads(text)
    assert {"cells", "tiers", "verdict"} <= set(back)
    said = [text, *(p.read_text() for p in Path(specdef.audit.__path__[0]).rglob("*.py"))]
    assert not [s for s in said if re.search("secure", s, re.IGNORECASE)]


def test_an_unlocked_model_is_broken_and_recovers_all() -> None:
    model, task = toys.problem()
    cell = run(model, model, task, [TUNED]).cells[0]
    assert cell.status == "broken" and cell.recovered == pytest.approx(1, abs=0.05)


def test_a_lock_whose_gradients_are_no_numbers_is_no_pass() -> None:
    model, task = toys.problem()
    cell = run(toys.exploding(model), model, task, [TUNED]).cells[0]
    assert cell.status == "invalid" and "diverged-everywhere" in cell.flags


@pytest.mark.parametrize("retain", [True, False])
def test_a_damaged_model_is_flagged_and_not_passed(retain: bool) -> None:
    model, task = toys.problem(retain=retain)
    if not retain:  # without retain data, the task itself must be what the model can do
        own = model(task.heldout[0][0]).argmax(1)
        task = replace(task, heldout=[[task.heldout[0][0], own]])
    report = run(toys.damaged(model), model, task, [TUNED])
    assert report.useless and "does not do its own work" in report.verdict
    assert all("utility-already-lost" in c.flags for c in report.cells)
    assert report.cells[0].status in ("invalid", "broken")


def test_a_control_that_does_not_learn_makes_the_cell_invalid() -> None:
    model, task = toys.problem()
    noise = torch.randint(4, (64,), generator=torch.Generator().manual_seed(3))
    task = replace(task, train=[[b[0], torch.randint(4, (32,), generator=torch.Generator().manual_seed(i))] for i, b in enumerate(task.train)], heldout=[[task.heldout[0][0], noise]])  # fmt: skip
    report = run(toys.rescaled(model), model, task, [TUNED], budget=Budget(steps=2, evaluations=1))  # fmt: skip
    assert report.cells[0].status == "invalid" and "control-not-broken" in report.cells[0].flags
    assert report.tiers[1].status == "not tested" and report.tiers[1].reason
    assert "held" not in report.verdict.lower()
    assert not any(c.side == "locked" for c in report.curves)  # nothing is spent on it


def test_attacks_that_are_the_same_on_the_unlocked_model_share_a_control() -> None:
    model, task = toys.problem()
    told: list[Progress] = []
    locked = nn.Sequential(model, nn.Identity())
    report = run(locked, model, task, [TUNED, Identity(), LockedOnly()], progress=told.append, stop_when_broken=False)  # fmt: skip
    controls = [p.attack for p in told if p.side == "control"]
    assert set(controls) == {TUNED.name}
    assert [c.status for c in report.cells] == ["broken"] * 3
    assert len({c.control for c in report.cells}) == 1
    assert {p.cell for p in told if p.side == "locked"} == {1, 2, 3} and told[0].cells == 3


def test_what_does_not_apply_is_said() -> None:
    model, task = toys.problem()
    report = run(model, model, task, [LockedOnly()])
    assert report.cells[0].status == "not applicable"
    assert any("nothing was inserted" in line for line in report.not_tested)
    assert report.tiers[4].status == "not tested"


def test_an_audit_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    model, task = toys.problem()
    locked = toys.rescaled(model)
    before = model_digest(locked), model_digest(model)

    class Stop(Exception):
        pass

    def stop(progress: Progress) -> None:
        told.append(progress)
        if len(told) == 12:
            raise Stop

    told: list[Progress] = []
    storage = tmp_path / "audit.log"
    with pytest.raises(Stop):
        run(locked, model, task, [TUNED], storage=storage, progress=stop)
    first = {(p.side, p.seed, p.learning_rate) for p in told[:-1]}
    told.clear()
    resumed = run(locked, model, task, [TUNED], storage=storage, progress=lambda p: told.append(p))
    assert not first & {(p.side, p.seed, p.learning_rate) for p in told}
    whole = run(locked, model, task, [TUNED])
    assert (resumed.verdict, resumed.cells[0].recovered) == (
        whole.verdict,
        whole.cells[0].recovered,
    )
    assert (model_digest(locked), model_digest(model)) == before
    told.clear()
    run(toys.rescaled(model, 2e4), model, task, [TUNED], storage=storage, progress=told.append)
    assert {p.side for p in told} == {"locked"}  # another lock, the same control


def test_the_constant_guess_is_the_entropy_of_what_was_seen() -> None:
    model, task = toys.problem()
    counts = torch.bincount(torch.cat([b[1] for b in task.train]), minlength=4) + 1
    expected = -(counts / counts.sum()).double().log()[task.heldout[0][1]].mean()
    assert constant_guess(model, task) == pytest.approx(float(expected))
    y = torch.arange(8.0).view(4, 2)
    x = torch.zeros(4, toys.INPUTS)
    task = Task(name="r", train=[[x, y]], heldout=[[x, y]], loss=MSELoss())
    assert constant_guess(nn.Linear(toys.INPUTS, 2), task) == pytest.approx(5.0)


def test_gains_count_from_the_constant_guess_where_the_model_is_worse() -> None:
    model, task = toys.problem()
    with torch.no_grad():
        sure = nn.Sequential(model, nn.Linear(4, 4, bias=False))
        sure[1].weight.copy_(20 * torch.eye(4))
    baseline = measure_baseline(sure, sure, task)
    assert baseline.original > baseline.chance == baseline.start
    assert not baseline.useless


def test_a_model_that_is_broken_to_begin_with_is_refused() -> None:
    model, task = toys.problem()
    gone = toys.damaged(model)
    with torch.no_grad():
        gone[0].weight.fill_(math.nan)
    with pytest.raises(SpecDefError, match="unlocked model"):
        run(model, gone, task, [TUNED])
    assert run(gone, model, task, [TUNED]).useless


def test_digests_tell_models_and_tasks_apart() -> None:
    model, task = toys.problem()
    other, same = toys.rescaled(model), toys.problem()[0]
    assert model_digest(model) == model_digest(same) != model_digest(other)
    assert model_digest(nn.Sequential(model)) != model_digest(model)
    assert task_digest(task) == task_digest(toys.problem()[1]) != task_digest(toys.problem(seed=1)[1])  # fmt: skip
    assert task_digest(replace(task, heldout=task.train)) != task_digest(task)


@pytest.mark.parametrize("name", SUITES)
def test_suites_name_attacks_there_are(name: str) -> None:
    suite = find_suite(name)
    listed = entries(suite)
    assert [e.tier for e in listed] == sorted(e.tier for e in listed)
    assert {e.tier for e in listed} >= {1, 2, 3, 4, 5}
    assert len({(e.name, e.optimizer) for e in listed}) == len(listed)
    assert {e.tier for e in entries(suite, tiers=[2])} == {2}


@pytest.mark.parametrize(
    ("options", "error"),
    [({"suite": "2026"}, SpecDefError), ({"tiers": [7]}, ValueError), ({"seeds": 0}, ValueError), ({"attacks": ["lorra"]}, SpecDefError)],
)  # fmt: skip
def test_bad_arguments_are_refused(options: dict[str, Any], error: type[Exception]) -> None:
    model, task = toys.problem()
    with pytest.raises(error):
        audit(model, model, task, **options)


def test_the_package_is_the_function() -> None:
    model, task = toys.problem()
    with pytest.raises(ValueError, match="seeds must be at least 1"):
        specdef.audit(model, model, task, seeds=0)


def test_fresh_weights_are_compared_with_each_other() -> None:
    """Their start is far above the trained model's: low rates must still count as nothing, and slow runs be given up."""
    model, task = toys.problem()
    easy = replace(task, train=[[x, y] for x, y in task.retain * 8], heldout=task.retain, retain=())
    report = specdef.audit(
        model, model, easy, attacks=["full-adamw"], budget=Budget(steps=8, evaluations=4), seeds=1
    )
    (scratch,) = next(c for c in report.curves if c.side == "scratch").sweeps
    assert min(run.start for run in scratch.runs) > 2 * report.start["counted_from"]
    assert min(run.setting.learning_rate for run in scratch.runs) >= 1e-6
    assert any(run.status == "pruned" for run in scratch.runs)


def test_a_goals_own_numbers_are_in_the_report(tmp_path: Path) -> None:
    model, task = toys.problem(retain=False)

    def share(attacked: nn.Module) -> dict[str, float]:
        (x, y) = task.heldout[0]
        with torch.no_grad():
            return {"reached": float((attacked(x).argmax(1) == y).float().mean())}

    report = audit(
        model, model, replace(task, metrics=share), attacks=["full-adamw"], budget=Budget(steps=24, evaluations=2),
        seeds=1, suite="2026.1-quick",
    )  # fmt: skip
    (cell,) = report.cells
    assert cell.metrics is not None and report.metrics["original"] == share(model)
    assert cell.metrics["locked"]["reached"] > report.metrics["locked"]["reached"] + 0.2
    write_pages(tmp_path, report.to_dict())
    for name in ("audit.html", "audit.md"):
        assert (
            "Goal" in (tmp_path / name).read_text() and "reached" in (tmp_path / name).read_text()
        )
    assert json.loads((tmp_path / "audit.json").read_text())["metrics"] == report.metrics
    assert "Goal" not in html_page(audit(model, model, task, attacks=["recipe"], seeds=1).to_dict())


def test_folders_and_short_names_of_suites_will_do(
    tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    batch = tiny_inputs("llama", seed=0)
    task = Task(name="toy", train=[batch], heldout=[batch])
    specdef.lock_checkpoint(tiny_folder("llama"), tmp_path / "locked")
    report = audit(
        tmp_path / "locked", str(tiny_folder("llama")), task, attacks=["recipe"], suite="quick", seeds=1,
        budget=Budget(steps=1, evaluations=1),
    )  # fmt: skip
    assert report.suite.startswith("2026.1-quick") and report.cells[0].control is not None
    assert (
        find_suite("full") is SUITES["2026.1-full"] and find_suite("standard") is SUITES["2026.1"]
    )
