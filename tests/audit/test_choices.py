"""What a user chooses for an audit: attacks with the suite's recipes, the precision, the key; and what studies depend on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests import audit_toys as toys

import specdef
import specdef.audit.audit as module
from specdef.attacks.attack import Attack, Prepared
from specdef.attacks.full import FullTraining
from specdef.attacks.registry import ATTACKS
from specdef.attacks.structural.known_scale import KnownScale
from specdef.attacks.task import Budget
from specdef.audit.audit import audit
from specdef.audit.baseline import measure_baseline
from specdef.audit.suite import SUITES, entries, with_key
from specdef.audit.sweeps import Progress
from specdef.errors import SpecDefError

BUDGET = Budget(steps=4, evaluations=2)
TUNED = FullTraining(("adamw",))


def names(suite: str, attacks: list[str | Attack]) -> list[str]:
    return [entry.name for entry in entries(SUITES[suite], attacks)]


def test_chosen_attacks_keep_the_suites_recipes() -> None:
    assert names("2026.1", ["full-adamw", "lora"]) == [
        "full-adamw", "full-adamw, clipped", ATTACKS["lora"].name,
    ]  # fmt: skip
    assert names("2026.1-full", [ATTACKS["full-momentum"]]) == ["full-momentum", "full-momentum, clipped"]  # fmt: skip
    assert names("2026.1-quick", ["full-adamw"]) == ["full-adamw"]
    assert names("2026.1", [TUNED]) == ["full-adamw"]  # the caller's own, though it has the name


@pytest.mark.parametrize("attacks", [None, ["known-scale", "lora"], ["lora"]])
def test_a_key_brings_its_attack_once(
    tiny_folder: Callable[..., Path], tmp_path: Path, attacks: list[str] | None
) -> None:
    certificate = specdef.lock_checkpoint(tiny_folder("llama"), tmp_path / "locked")
    found = with_key(SUITES["2026.1"], attacks, str(certificate.key))
    assert [a.name for a in found].count("known-scale") == 1
    assert isinstance(found[-1], KnownScale)
    assert not found[-1].applies(specdef.load_model(tmp_path / "locked"))
    assert len(found) == (len(ATTACKS) if attacks is None else 2)


def test_a_key_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    model, task = toys.problem()
    with pytest.raises(SpecDefError, match=r"none\.safetensors"):
        audit(model, model, task, key=tmp_path / "none.safetensors")


def test_both_sides_train_in_the_precision_asked_for(tmp_path: Path) -> None:
    model, task = toys.problem()
    storage = tmp_path / "audit.journal"
    told: list[Progress] = []

    def run(**options: Any) -> Any:
        told.clear()
        return audit(
            model, model, task, attacks=[TUNED], tiers=[2], budget=Budget(steps=16, evaluations=2), seeds=1,
            suite="2026.1-quick", storage=storage, progress=told.append, **options,
        )  # fmt: skip

    report = run(dtype="float64")
    assert report.dtype == report.to_dict()["dtype"] == "float64"
    runs = [run for curve in report.curves for sweep in curve.sweeps for run in sweep.runs]
    assert {run.setting.dtype for run in runs} == {"float64"}
    assert {c.side for c in report.curves} >= {"locked", "control"}
    run(dtype="float64")
    assert not told
    assert run().dtype == "float32" and told  # another study
    with pytest.raises(Exception, match="dtype"):  # under the tests, by the check of types
        run(dtype="float16")


def test_machines_whose_last_digits_differ_share_a_study(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, task = toys.problem()
    told: list[Progress] = []

    def run() -> None:
        told.clear()
        audit(
            toys.rescaled(model), model, task, attacks=[TUNED], tiers=[2], budget=BUDGET, seeds=1, suite="2026.1-quick",
            storage=tmp_path / "audit.journal", progress=told.append,
        )  # fmt: skip

    run()
    assert told

    def elsewhere(*arguments: Any) -> Any:
        found = measure_baseline(*arguments)
        return replace(found, original=found.original * (1 + 1e-7), chance=found.chance * (1 + 1e-7))  # fmt: skip

    monkeypatch.setattr(module, "measure_baseline", elsewhere)
    run()
    assert not told


class Unfit(Attack):
    """Cannot be carried out, which shows only once it runs."""

    name = "unfit"
    tier = 2
    source = summary = "test"

    def prepare(self, model: Any, task: Any, *, original: Any, generator: Any) -> Prepared:
        raise SpecDefError("no memory for it", hint="x")


def test_an_attack_that_cannot_be_carried_out_does_not_end_the_audit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, task = toys.problem()
    monkeypatch.setattr("specdef.audit.sweeps.Sweeps._edits", lambda self, attack: repr(attack))
    report = audit(model, model, task, attacks=[Unfit(), TUNED], tiers=[2], budget=BUDGET, seeds=1, suite="2026.1-quick")  # fmt: skip
    assert report.cells[0].status == "not applicable"
    assert report.cells[0].notes == ("no memory for it",) and report.cells[1].control is not None
    assert any("unfit with adamw: no memory" in line for line in report.not_tested)
