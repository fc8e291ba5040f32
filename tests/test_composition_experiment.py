"""The composition experiment: its locks are what they say, its claims follow from the numbers, and a small one runs."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from specdef.audit.grid import Sweep
from specdef.cli.reproduce import FULL, Experiment
from specdef.experiments import composition
from specdef.experiments.composition import SIZES, _claims
from specdef.experiments.composition_setup import (
    ABSORBED,
    BOTH,
    DEFORMATION,
    LOCKS,
    facts,
    key_of,
    resnet,
    toy,
)
from specdef.experiments.deformation_measure import places
from specdef.experiments.lock_table import UNLOCKED
from specdef.experiments.toy_locks_setup import Net
from specdef.lock.stack import locks

pytestmark = pytest.mark.usefixtures("cache")

NET = Net(hidden=24, depth=2, rows=256)


@pytest.fixture(scope="module")
def case():
    return toy(NET, 12, 0)


def test_the_small_net_is_locked_twice(case):
    found = facts(case)
    assert set(case.locked) == set(LOCKS)
    assert found["bit_identical"] == {ABSORBED: True, BOTH: True}
    assert found["sites"] == {"scaled": NET.depth, "all": NET.depth}
    raised, *balanced = (found["growth"][n] for n in (DEFORMATION, f"{DEFORMATION}, balanced", f"{BOTH}, balanced"))  # fmt: skip
    assert raised["median"] > 2 and balanced[1]["median"] == pytest.approx(balanced[0]["median"], rel=0.1)  # fmt: skip
    assert [lock.method for lock in locks(case.locked[BOTH])] == ["deformation", "absorbed"]
    largest = {name: max(float(p.detach().abs().max()) for p in model.parameters()) for name, model in case.locked.items()}  # fmt: skip
    assert largest[DEFORMATION] < 1e4 < 1e6 < min(largest[ABSORBED], largest[BOTH])


def test_what_is_wrong_with_a_lock_is_seen(case):
    """Of a deformation alone, taken for both locks, no site is scaled; of an absorbed lock alone, nothing was raised."""
    none = replace(case, locked={**case.locked, BOTH: case.locked[DEFORMATION]})
    assert facts(none)["sites"]["scaled"] == 0
    undone = facts(replace(case, locked={**case.locked, BOTH: case.locked[ABSORBED]}))
    assert undone["bit_identical"][BOTH] is False
    assert undone["growth"][f"{BOTH}, balanced"]["median"] == pytest.approx(1, rel=0.2)


def test_the_resnet_is_deformed_once_and_locked_on_top(tmp_path):
    vision = SIZES["smoke"].vision
    place, said = tmp_path / "state" / "deformed", []
    place.parent.mkdir()
    with places(vision.lock) as (data, models):
        first = resnet(vision, data, models, place, 0, said.append)
        assert key_of(place).exists() and any("deforming" in line for line in said)
        said.clear()
        again = resnet(vision, data, models, place, 0, said.append)
    assert not any("deforming" in line for line in said)
    for name, carried in ((DEFORMATION, 1), (ABSORBED, 1), (BOTH, 2)):
        assert len(locks(first.locked[name])) == carried
        weights = zip(first.locked[name].parameters(), again.locked[name].parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in weights)
    assert facts(first)["bit_identical"] == {ABSORBED: True, BOTH: True}
    turned, own = first.task.heldout[0]["pixel_values"], first.task.retain[0]["pixel_values"]
    assert torch.equal(torch.rot90(turned, -1, (2, 3)), own) and not torch.equal(turned, own)


def cell(attack, lock, recovered, accuracy=0.9):
    return {
        "attack": attack, "lock": lock, "accuracy": {"mean": accuracy}, "recovered": None if recovered is None else {"mean": recovered}
    }  # fmt: skip


def table(adamw, rebalance, clip):
    """Cells of three attacks: what each recovers from the locks, in order."""
    values = {"full-adamw": adamw, "rebalance": rebalance, "rebalance-clip": clip}
    cells = [cell(attack, UNLOCKED, None) for attack in values]
    return cells + [cell(a, lock, x) for a, v in values.items() for lock, x in zip(LOCKS, v, strict=True)]  # fmt: skip


KNOWN = {
    "bit_identical": {ABSORBED: True, BOTH: True}, "sites": {"scaled": 3, "all": 3},
    "growth": {DEFORMATION: {"median": 20.0}, f"{DEFORMATION}, balanced": {"median": 15.0}, f"{BOTH}, balanced": {"median": 14.5}},
}  # fmt: skip


def test_claims_follow_from_the_numbers():
    good = table((0.6, 0.1, 0.1), (0.6, 1.0, 0.55), (1.0, 1.0, 0.95))
    assert all(entry["held"] for entry in _claims("mlp", good, [KNOWN]))
    for cells, known, words in (
        (table((0.6, 0.1, 0.4), (0.6, 1.0, 0.55), (1.0, 1.0, 0.95)), KNOWN, "by training alone"),
        (table((0.6, 0.1, 0.1), (0.6, 0.5, 0.55), (1.0, 1.0, 0.95)), KNOWN, "undoes the absorbed"),
        (table((0.6, 0.1, 0.1), (0.6, 1.0, 0.9), (1.0, 1.0, 0.95)), KNOWN, "leaves of both"),
        (table((0.6, 0.1, 0.1), (0.6, 1.0, 0.55), (1.0, 1.0, 0.3)), KNOWN, "undoes both"),
        (good, {**KNOWN, "bit_identical": {ABSORBED: True, BOTH: False}}, "bit for bit"),
        (good, {**KNOWN, "sites": {"scaled": 2, "all": 3}}, "every site"),
        (good, {**KNOWN, "growth": {**KNOWN["growth"], f"{BOTH}, balanced": {"median": 2.0}}}, "as large"),
    ):  # fmt: skip
        failed = [entry["claim"] for entry in _claims("mlp", cells, [KNOWN, known]) if not entry["held"]]  # fmt: skip
        assert len(failed) == 1 and words in failed[0], failed


def test_it_runs_and_writes(tmp_path, cache, monkeypatch):
    plan = replace(SIZES["smoke"], attacks=("rebalance",), vision=None)
    monkeypatch.setitem(composition.SIZES, "smoke", plan)
    monkeypatch.setattr("specdef.audit.sweeps.Sweep", lambda **values: Sweep(**{**values, "max_trials": 3}))  # fmt: skip
    lines = []
    record = composition.run(tmp_path / "out", seeds=(0,), size="smoke", progress=lines.append)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {f"composition.{s}" for s in ("json", "md", "png")}  # fmt: skip
    written = json.loads((tmp_path / "out" / "composition.json").read_text())
    assert written == record and written["data"].keys() == {"mlp"}
    assert {row["lock"] for row in written["data"]["mlp"]["rows"]} >= {UNLOCKED, *LOCKS}
    page = (tmp_path / "out" / "composition.md").read_text()
    assert "| rebalance |" in page and all(claim["claim"] in page for claim in record["claims"])
    assert any("mlp, seed 0" in line for line in lines)
    assert not list((cache / "experiments").iterdir())  # nothing of a finished one is kept


def test_it_is_named_on_the_command_line():
    assert Experiment("composition") and "composition" in FULL and composition.SEEDS.keys() == SIZES.keys()  # fmt: skip
