"""The tables of locks: their locks are what they say, seeds are put together rightly, and both run in their small size."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import torch

from specdef.attacks.full import FullTraining
from specdef.attacks.structural.rebalance import rebalance
from specdef.attacks.structural.sites import symmetric_sites
from specdef.cli.reproduce import Experiment
from specdef.experiments import smollm2_locks, toy_locks
from specdef.experiments.lock_table import (
    SCRATCH,
    UNLOCKED,
    cell_text,
    state_file,
    summarise,
    text_table,
    unique_rows,
)
from specdef.experiments.smollm2_locks import CONVEX, FULL, LORA, STAGGERED, UNIFORM
from specdef.experiments.toy_locks_setup import (
    LOCKS,
    Net,
    ToyLock,
    locked,
    output_difference,
    problem,
)

pytestmark = pytest.mark.usefixtures("cache")

NET = Net(hidden=12, depth=3, rows=256)


@pytest.fixture(scope="module")
def toy():
    return problem(NET, 3)


@pytest.mark.parametrize("name", LOCKS)
def test_a_lock_keeps_the_function(toy, name):
    model, task = toy
    difference = output_difference(model, locked(model, task, LOCKS[name]), task)
    assert difference < 1e-2 if LOCKS[name].compensated else difference == 0


def ratios(model, victim):
    """log2 of how much every channel of every hidden layer was raised, where it is made."""
    pairs = [(a.weight, b.weight) for a, b in zip(model, victim, strict=True) if hasattr(a, "weight")]  # fmt: skip
    made, before = [], torch.zeros(64)
    for a, b in pairs[:-1]:
        raised = (b.double() / a.double()).log2() + before[None, :]
        made.append(raised.nanmean(1).round().int())
        before = made[-1].double()
    return made


@pytest.mark.parametrize(
    ("lock", "expected"),
    [
        (ToyLock(low=10, high=10, channel="most active"), [10, 10, 10]),
        (ToyLock(low=4, high=20), [20, 12, 4]),
        (ToyLock(low=8, high=40), [40, 24, 8]),
    ],
)
def test_one_channel_of_every_site_is_scaled(toy, lock, expected):
    model, task = toy
    made = ratios(model, locked(model, task, lock))
    assert len(made) == len(symmetric_sites(model)) == 3
    assert all(int((channels != 0).sum()) == 1 for channels in made)
    assert sorted((int(channels.max()) for channels in made), reverse=True) == expected
    x = task.retain[0][0]
    for layer, channels in zip((0, 2, 4), made, strict=True):
        rms = model[: layer + 2](x).detach().square().mean(0).sqrt()
        alive = rms[rms > 0]
        limit = alive.max() if lock.channel == "most active" else alive.min()
        assert float(rms[channels.argmax()]) == pytest.approx(float(limit))


def test_every_channel_and_what_undoes_the_locks(toy):
    model, task = toy
    made = ratios(model, locked(model, task, LOCKS["every channel 2^10"]))
    assert all((channels == 10).all() for channels in made)
    victim = locked(model, task, LOCKS["staggered 2^8..2^40, least active"])
    assert max(float(p.detach().abs().max()) for p in victim.parameters()) > 1e9
    rebalance(victim)
    assert max(float(p.detach().abs().max()) for p in victim.parameters()) < 1e3


def test_compensation_is_made_of_plain_layers(toy):
    model, task = toy
    victim = locked(model, task, ToyLock(compensated=True, k=2, scale=100.0))
    linear = [module for module in victim if isinstance(module, torch.nn.Linear)]
    assert len(linear) == 2 * NET.depth + 1
    before, after = (torch.linalg.svdvals(w.detach()) for w in (model[0].weight, linear[0].weight))
    torch.testing.assert_close(after[:2], 100 * before[:2], rtol=1e-4, atol=0)


def test_seeds_differ_and_repeat(toy):
    model, task = toy
    again, same = problem(NET, 3)
    other, _ = problem(NET, 4)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))  # fmt: skip
    assert torch.equal(task.heldout[0][0], same.heldout[0][0])
    assert not torch.equal(model[0].weight, other[0].weight)
    new, own = task.heldout[0][0], task.retain[0][0]
    assert not torch.equal(new, own) and torch.equal(new.sort(1).values, own.sort(1).values)


def row(seed, lock, accuracy, *, recovered=None, attack="a"):
    return {
        "seed": seed, "lock": lock, "attack": attack, "optimizer": "adamw", "accuracy": accuracy, "loss": 1.0,
        "learning_rate": 1e-3, "recovered": recovered,
    }  # fmt: skip


def test_seeds_are_put_together():
    rows = [row(0, UNLOCKED, 0.9), row(0, "L", 0.2, recovered=0.1), row(0, UNLOCKED, 0.9), row(1, "L", 0.4)]  # fmt: skip
    kept = unique_rows(rows)
    assert len(kept) == 3
    unlocked, lock = summarise(kept)
    assert unlocked["accuracy"] == {"mean": 0.9, "interval": None, "values": [0.9]}
    low, high = lock["accuracy"]["interval"]  # 12.706 standard errors of 0.1
    assert (low, high) == pytest.approx((0.3 - 1.2706, 0.3 + 1.2706), rel=1e-4)
    assert lock["seeds"] == [0, 1] and lock["recovered"]["values"] == [0.1]
    assert unlocked["recovered"] is None
    lines = text_table([unlocked, lock], [UNLOCKED, "L", "M"], "accuracy", {("a", "L"): "0.47"})
    assert lines[-1] == "| a | 0.90 | 0.30 ± 1.27 [0.47] | – |"
    assert cell_text(None, "0.5") == "–"


def test_an_earlier_range_is_no_gap():
    assert toy_locks._gap(0.3, "0.14–0.47") == 0
    assert toy_locks._gap(0.5, "0.14–0.47") == pytest.approx(0.03)
    assert toy_locks._gap(0.1, "0.21") == pytest.approx(0.11)
    assert toy_locks._gap(0.1, None) is None


def test_earlier_numbers_belong_to_cells():
    attacks = {f"full-{name}" for name in toy_locks.OPTIMIZERS}
    assert {attack for attack, _ in toy_locks.EARLIER} <= attacks
    assert {lock for _, lock in toy_locks.EARLIER} <= {UNLOCKED, *LOCKS}
    assert {lock for _, lock in smollm2_locks.EARLIER} == {UNLOCKED, *smollm2_locks.LOCKS}
    assert {"toy-locks", "smollm2-locks"} <= {experiment.value for experiment in Experiment}


def test_toy_small_interrupted_and_taken_up(tmp_path, cache, monkeypatch):
    """Ctrl-C comes in the second lock; what was run is not run again, and the record is whole."""
    ran = Counter()
    prepare = FullTraining.prepare

    def counted(self, *arguments, **options):
        ran[self.name] += 1
        return prepare(self, *arguments, **options)

    def say(line):
        if "staggered" in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        toy_locks.run(tmp_path / "a", size="smoke", seeds=(1,), progress=say)
    assert not (tmp_path / "a").exists() and list(cache.rglob("*.journal"))
    monkeypatch.setattr(FullTraining, "prepare", counted)
    said = []
    record = toy_locks.run(tmp_path / "a", size="smoke", seeds=(1,), progress=said.append)
    assert not any("uniform" in line for line in said)
    assert not list(cache.rglob("*.journal*"))
    stored = json.loads((tmp_path / "a" / "toy-locks.json").read_text())
    assert stored["claims"] == record["claims"] and stored["table"] == record["table"]
    assert (tmp_path / "a" / "toy-locks.png").read_bytes().startswith(b"\x89PNG")
    locks = tuple(LOCKS)[:3:2]
    assert Counter(row["lock"] for row in record["data"]["rows"]) == {UNLOCKED: 2, SCRATCH: 1, **dict.fromkeys(locks, 2)}  # fmt: skip
    for found in record["data"]["rows"]:
        assert found["loss"] == pytest.approx(min(run[3] for run in found["runs"]), abs=1e-5)
        assert found["accuracy"] == pytest.approx(max(run[4] for run in found["runs"]), abs=1e-5)
        rates = [run[0] for run in found["runs"]]
        assert rates == sorted(set(rates)) and rates[-1] / rates[0] >= 1e3
    adamw = {c["lock"]: c["accuracy"]["mean"] for c in record["data"]["cells"] if c["attack"] == "full-adamw"}  # fmt: skip
    assert adamw[UNLOCKED] > adamw[locks[1]] + 0.1
    assert record["claims"][0]["held"]
    # what is left to run after the interrupt is less than everything
    assert sum(ran.values()) < sum(len(found["runs"]) for found in record["data"]["rows"])


def test_state_depends_on_the_settings(cache):
    names = {state_file("toy-locks", NET, seed) for seed in (0, 1)} | {state_file("toy-locks", Net(), 0)}  # fmt: skip
    assert len(names) == 3 and all(name.is_relative_to(cache) for name in names)


def test_smollm2_small(tmp_path):
    record = smollm2_locks.run(tmp_path / "a", size="smoke", seeds=(0,))
    stored = json.loads((tmp_path / "a" / "smollm2-locks.json").read_text())
    assert stored["claims"] == record["claims"]
    assert all(entry["logit_difference"] == 0 for entry in record["data"]["locks"])
    cells = {(c["attack"], c["lock"]): c for c in record["data"]["cells"]}
    losses = {lock: cells[FULL, lock]["loss"]["mean"] for lock in (UNLOCKED, UNIFORM, CONVEX)}
    start = record["data"]["locks"][0]["counted_from"]
    assert losses[UNLOCKED] < losses[UNIFORM] < losses[CONVEX] <= start
    share = (start - losses[CONVEX]) / (start - losses[UNLOCKED])
    assert cells[FULL, CONVEX]["recovered"]["mean"] == pytest.approx(share)
    assert (LORA, UNLOCKED) in cells and (LORA, UNIFORM) not in cells


def test_claims_follow_the_shares():
    def verdicts(shares):
        cells = [{"attack": a, "lock": UNLOCKED, "recovered": None, "loss": {"mean": loss}} for a, loss in ((FULL, 3.1), (LORA, 3.3))]  # fmt: skip
        cells += [{"attack": a, "lock": k, "recovered": {"mean": v}, "loss": {"mean": 3.5}} for (a, k), v in shares.items()]  # fmt: skip
        exact = [{"logit_difference": 0.0, "counted_from": 3.9}]
        return [claim["held"] for claim in smollm2_locks._claims(cells, exact)]

    before = {(FULL, UNIFORM): 0.76, (FULL, STAGGERED): 0.31, (FULL, CONVEX): 0.003, (LORA, CONVEX): 1.0}  # fmt: skip
    assert verdicts(before) == [True] * 6
    other = {(FULL, UNIFORM): 0.4, (FULL, STAGGERED): 0.6, (FULL, CONVEX): 0.06, (LORA, CONVEX): 0.2}  # fmt: skip
    assert verdicts(other) == [True] * 2 + [False] * 4
    assert verdicts({key: v for key, v in before.items() if key[0] == FULL})[-1] is False


def test_what_has_no_control_holds_no_claim():
    """K-FAC learned nothing unlocked, so it was not run on the locks: the record is made all the same."""
    rows = [row(0, UNLOCKED, 0.95, attack="full-adamw"), row(0, UNLOCKED, 0.13, attack="full-kfac-relative")]  # fmt: skip
    rows += [row(0, lock, 0.2, recovered=0.1, attack="full-adamw") for lock in LOCKS]
    exact = [{"lock": lock, "output_difference": 0.0} for lock in LOCKS]
    claims = toy_locks._claims(summarise(rows), {"mean": 0.95}, exact)
    held = {claim["claim"]: claim["held"] for claim in claims}
    assert [yes for text, yes in held.items() if "K-FAC" in text] == [False, False]
    assert held["From scratch AdamW learns as much as from the unlocked net, to 0.03: on this task weights are no head start."]  # fmt: skip
