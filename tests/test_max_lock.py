"""The tables of lock designs: nets without a configuration are locked, small sizes run, numbers are put together rightly."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from torch import nn

from specdef.attacks.partial.freeze import TrainOnly
from specdef.attacks.registry import ATTACKS
from specdef.attacks.task import Budget, Setting, Task
from specdef.audit.suite import Suite, find_suite
from specdef.cli.reproduce import Experiment
from specdef.curvature.losses import LMLoss
from specdef.errors import SelectionError, SpecDefError
from specdef.experiments import max_lock_mlp, max_lock_resnet, max_lock_smollm2
from specdef.experiments.lock_table import UNLOCKED
from specdef.experiments.max_lock import DESIGNS, MAIN
from specdef.experiments.max_lock_report import FLOOR, GOALS, RESISTING, claims, correlations, table
from specdef.experiments.mixed_precision import MixedPrecision
from specdef.lock.config import LockConfig
from specdef.lock.in_memory import lock_model
from specdef.models.tiny import tiny_model

pytestmark = pytest.mark.usefixtures("cache")

TARGETS = (max_lock_mlp, max_lock_resnet, max_lock_smollm2)


def net(depth=3):
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        layers = [layer for _ in range(depth) for layer in (nn.Linear(8, 8), nn.ReLU())]
        return nn.Sequential(*layers, nn.Linear(8, 3))


@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("calibrated", [False, True])
def test_a_net_without_configuration_is_locked(design, calibrated):
    model = net()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(32, 8, generator=generator)
    y = torch.randint(3, (32,), generator=generator)
    made = lock_model(copy.deepcopy(model), DESIGNS[design], calibration=[[x, y]] if calibrated else None)  # fmt: skip
    assert torch.equal(model(x), made.model(x))
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, made.model.get_parameter(n))}  # fmt: skip
    assert changed == set(made.key.scalings) and "6.weight" in changed
    assert all(max(abs(e.exponent) for e in edits) >= 2 for edits in made.key.scalings.values())
    assert sum(made.certificate.uncovered.values()) == 1  # what reads the input itself


def test_a_net_without_symmetries_is_refused():
    with pytest.raises(SelectionError):
        lock_model(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)), LockConfig())
    with pytest.raises(SpecDefError, match="no transformers configuration"):
        lock_model(net(), LockConfig(method="compensated"))


def test_the_last_four_blocks_need_more_than_four():
    attack = TrainOnly("last-four")
    assert attack.applies(net(3)) and not attack.applies(net(4))
    assert set(attack.trained(net(5))) == {f"{i}.{w}" for i in (4, 6, 8, 10) for w in ("weight", "bias")}  # fmt: skip


def test_rows_and_columns_exist():
    for module in TARGETS:
        for _, plan in module.SIZES.values():
            assert {*plan.attacks, *plan.left_out} <= set(ATTACKS) and set(plan.designs) <= set(DESIGNS)  # fmt: skip
            assert set(plan.attacks) <= {*GOALS, *RESISTING} and not set(plan.attacks) & set(plan.left_out)  # fmt: skip
        assert module.__name__.rpartition(".")[2].replace("_", "-") in {e.value for e in Experiment}
    assert set(MAIN) < set(DESIGNS)
    own = Suite(name="own", refine=False)
    assert find_suite(own) is own


def test_mlp_small_by_rows(tmp_path, cache):
    """A run of one row leaves its state; the whole table is then put together from it."""
    part = max_lock_mlp.run(tmp_path / "a", size="smoke", seeds=(0,), attacks=("full-adamw",))
    assert {row["attack"] for row in part["data"]["rows"]} == {"full-adamw", "scratch"}
    assert list(cache.rglob("*.journal"))
    record = max_lock_mlp.run(tmp_path / "b", size="smoke", seeds=(0,))
    assert not list(cache.rglob("*.journal*"))
    stored = json.loads((tmp_path / "b" / "max-lock-mlp.json").read_text())
    assert stored["claims"] == record["claims"] and stored["table"] == record["table"]
    assert (tmp_path / "b" / "max-lock-mlp.png").read_bytes().startswith(b"\x89PNG")
    assert all(lock["output_difference"] == 0 for lock in record["data"]["locks"])
    cells = {(c["attack"], c["lock"]): c for c in record["data"]["cells"]}
    first = {(c["attack"], c["lock"]): c for c in part["data"]["cells"]}
    assert cells["full-adamw", "max"]["loss"] == first["full-adamw", "max"]["loss"]
    assert cells["rebalance", "max"]["recovered"]["mean"] > 0.5 > cells["full-adamw", "max"]["recovered"]["mean"]  # fmt: skip
    assert cells["full-adamw", "max"]["predicted"] > 1 > cells["full-adamw", UNLOCKED]["prepare_seconds"]  # fmt: skip
    lines = "\n".join(record["table"])
    assert "Tier 5, permuted digits, max: re-balancing takes" in lines
    assert "full-muon: not at this size" in lines and "only-embeddings: the model has none" in lines
    with pytest.raises(SpecDefError, match="no row is called nonsense"):
        max_lock_mlp.run(tmp_path / "c", size="smoke", attacks=("nonsense",))


@pytest.mark.parametrize("module", TARGETS[1:])
def test_the_others_small(tmp_path, module):
    record = module.run(tmp_path / "a", size="smoke", seeds=(0,))
    assert all(lock["output_difference"] == 0 for lock in record["data"]["locks"])
    cells = {(c["attack"], c["lock"]): c for c in record["data"]["cells"]}
    held, usual, undone = (cells[a, d]["recovered"]["mean"] for a, d in (("full-adamw", "max"), ("full-adamw", "uniform"), ("rebalance", "max")))  # fmt: skip
    assert held < usual < 0.7 < undone


def test_fashion_mnist_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(max_lock_resnet, "FASHION", tmp_path)
    with pytest.raises(SpecDefError, match="Fashion-MNIST is not in") as caught:
        max_lock_resnet.run(tmp_path / "a")
    assert "apt-get" in caught.value.hint


def cell(attack, lock, recovered, *, predicted=None, slowdown=None, task="t"):
    share = None if recovered is None else {"mean": recovered, "interval": None, "values": [recovered]}  # fmt: skip
    return {
        "task": task, "attack": attack, "lock": lock, "recovered": share, "predicted": predicted, "slowdown": slowdown,
        "loss": None, "steps": 8, "prepare_seconds": 0.5,
    }  # fmt: skip


def test_the_forecast_is_correlated_in_logarithms():
    cells = [cell("full-adamw", str(i), 10.0**-i, predicted=10.0 ** (2 * i)) for i in range(3)]
    found = correlations(cells)["1/recovered"]
    assert found["spearman"] == pytest.approx(1) and found["pearson"] == pytest.approx(1)
    assert correlations(cells)["slowdown"]["spearman"] is None
    (point,) = correlations([cell("a", "b", 0.0, predicted=2.0)])["1/recovered"]["points"]
    assert point["measured"] == 1 / FLOOR
    assert correlations([cell("a", "b", None, predicted=2.0)])["1/recovered"]["cells"] == 0


def verdicts(cells):
    numbers = correlations(cells)
    return {c["claim"].split(":")[0]: c["held"] for c in claims(cells, [{"lock": "max", "output_difference": 0.0}], numbers)}  # fmt: skip


def test_claims_follow_the_shares():
    rows = [("full-adamw", 0.001, 0.7), ("lora", 0.01, 0.8), ("ia3", 0.9, 0.9), ("rebalance", 1.0, 1.0)]  # fmt: skip
    good = [cell(a, d, s) for a, own, other in rows for d, s in (("max", own), ("uniform", other))]
    said = claims(good, [{"lock": "max", "output_difference": 0.0}], correlations(good))
    assert len(said) == 6 and all(c["held"] for c in said)
    bad = [cell(c["attack"], c["lock"], 0.02 if c["lock"] == "uniform" else 0.06) for c in good]
    said = claims(bad, [{"lock": "max", "output_difference": 1e-6}], correlations(bad))
    assert [c["held"] for c in said] == [False] * 4 + [True, False]


def test_reasons_are_told_once():
    lines = table([cell("lora", "max", 0.1)], ["t"], ["uniform", "max"], {("ia3", "uniform"): "why", ("ia3", "max"): "why", ("lora", "uniform"): "other", ("full-muon", ""): "dear"})  # fmt: skip
    assert lines[-3:] == ["not run: ia3: why", "not run on uniform: lora: other", "not run: full-muon: dear"]  # fmt: skip


def test_mixed_precision_is_close_and_gives_float32():
    model = tiny_model("llama", seed=0)
    ids = torch.randint(4, 90, (2, 12), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "labels": ids}
    exact, mixed = LMLoss(), MixedPrecision(LMLoss())
    with torch.no_grad():
        a, b = (loss.outputs(model, batch) for loss in (exact, mixed))
    assert b.dtype is torch.float32 and not torch.equal(a, b)
    torch.testing.assert_close(a, b, atol=0.05, rtol=0.05)
    targets = mixed.targets(batch)
    assert mixed.count(targets) == 22 and math.isfinite(float(mixed.terms(b, targets).sum()))


@pytest.mark.parametrize(
    ("attack", "tied"), [("only-embeddings", False), ("only-embeddings", True), ("prompt-tuning", False), ("ia3", False)]
)  # fmt: skip
def test_what_a_lock_cannot_reach_trains_as_if_there_were_none(attack, tied):
    model = tiny_model("llama", seed=0, tie=tied)
    locked = lock_model(copy.deepcopy(model), LockConfig.preset("max", scale=2.0**20)).model
    ids = torch.randint(4, 90, (3, 2, 12), generator=torch.Generator().manual_seed(0))
    batches = [{"input_ids": x, "labels": x, "attention_mask": torch.ones_like(x)} for x in ids]
    task = Task(name="ids", train=batches[:2], heldout=batches[2:])
    free, held = (
        ATTACKS[attack](m, task, Setting(learning_rate=1e-2), Budget(steps=4, evaluations=2))
        for m in (model, locked)
    )
    assert free.losses == held.losses and free.losses[-1] != free.losses[0]
