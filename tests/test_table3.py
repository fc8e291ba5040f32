"""Relearning a class: the smoke run's record, resuming, and every function of the experiment with planted answers."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from specdef.errors import SpecDefError
from specdef.experiments import table3
from specdef.experiments.lock_table import SCRATCH, UNLOCKED
from specdef.experiments.paper.locks import ABSORBED, COMPENSATED, DEFORMATION, LOCKS
from specdef.experiments.paper.runs import PAPER, SWEEP
from specdef.experiments.paper.verdicts import FAILED, HELD, ONLY_THERE
from specdef.experiments.table3 import SIZES, judged
from specdef.experiments.table3_data import (
    CAR,
    CLASSES,
    FILE,
    cars_of,
    first_rows,
    made_pictures,
    pictures,
)
from specdef.experiments.table3_report import (
    BEFORE,
    ORIGINAL,
    PAPERS,
    best_of_sweeps,
    comparisons,
    draw,
    means,
    paper_others,
    table,
)
from specdef.experiments.table3_setup import (
    CALLED,
    TOLD_APART,
    fresh,
    of_guesses,
    relearning,
    train,
    unlearn,
)

SMOKE = SIZES["smoke"][0]


@pytest.fixture
def drawn():
    return pictures(SMOKE, None, 0)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The smoke run: its record, its folder and its cache."""
    folder = tmp_path_factory.mktemp("table3")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPECDEF_CACHE", str(folder / "cache"))
        record = table3.run(folder / "out", size="smoke")
    return record, folder


def test_the_record(made):
    record, folder = made
    assert {"table3.json", "table3.png"} <= {path.name for path in (folder / "out").iterdir()}
    assert json.loads((folder / "out" / "table3.json").read_text()) == record
    assert not list((folder / "cache").rglob("table3*"))  # forgotten once it is written
    assert len(record["comparisons"]) == len(record["claims"]) == 4 + 3 * len(LOCKS)
    assert all(lock in str(record["comparisons"]) for lock in LOCKS)
    assert record["data"]["cells"] and str(folder) not in json.dumps(record)
    places = Counter((s["lock"], s["at"]) for s in record["data"]["states"])
    nets = (UNLOCKED, *LOCKS)
    assert set(places) == {(ORIGINAL, BEFORE), (SCRATCH, SWEEP), *itertools.product(nets, (BEFORE, PAPER, SWEEP))}  # fmt: skip
    assert sum(line.startswith("| *") for line in record["table"]) == len(PAPERS)


def test_what_the_smoke_run_shows(made):
    states = means(best_of_sweeps(made[0]["data"]["states"]))
    assert states[ORIGINAL, BEFORE]["car"] > 0.9
    assert states[UNLOCKED, BEFORE]["car"] == 0 and states[UNLOCKED, BEFORE]["others"] > 0.9
    assert states[UNLOCKED, PAPER]["car"] > 0.9
    for lock in (COMPENSATED, ABSORBED):  # keep the function
        assert states[lock, BEFORE] == pytest.approx(states[UNLOCKED, BEFORE], abs=0.02)


class Interrupted(Exception):
    pass


def test_an_interrupted_run_goes_on(made, cache, tmp_path, monkeypatch):
    said = []

    def until(text):
        def progress(line):
            said.append(line)
            if text in line:
                raise Interrupted

        return progress

    for text in ("unlearning: 40", "deformation, step 5", f"{ABSORBED}: full-sgd", f"{COMPENSATED}: full-adamw"):  # fmt: skip
        with pytest.raises(Interrupted):
            table3.run(tmp_path, size="smoke", progress=until(text))
        monkeypatch.setattr(table3, "train", lambda *_: pytest.fail("trained again"))
    assert not (tmp_path / "table3.json").exists()
    record = table3.run(tmp_path, size="smoke", progress=said.append)
    assert timeless(record) == timeless(made[0])
    assert record["seconds"] > 0
    runs = Counter(line for line in said if "full-sgd with" in line)
    assert (
        runs.pop(next(line for line in runs if f"{ABSORBED}:" in line)) == 2
    )  # interrupted before it began
    assert set(runs.values()) == {1}
    for once in ("unlearning: 80 steps", "deformation, step 10 of"):
        assert sum(once in line for line in said) == 1
    assert not list(cache.rglob("table3*"))


def timeless(value):
    """Leave out whatever is a time, and lines of tables that hold one."""
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items() if "seconds" not in k and k != "table"}
    return [timeless(v) for v in value] if isinstance(value, list) else value


@pytest.mark.parametrize("folder", [None, "absent"])
def test_missing_data_is_noticed_before_any_work(folder, cache, tmp_path):
    with pytest.raises(SpecDefError, match=FILE) as caught:
        table3.run(tmp_path / "out", size="cpu", data=folder and tmp_path / folder)
    assert "--data DIR" in caught.value.hint
    assert not cache.exists() and not (tmp_path / "out").exists()


def test_pictures_from_a_file(tmp_path):
    count = 100
    images = np.arange(count, dtype=np.uint8)[:, None, None, None] * np.ones((1, 8, 8, 3), np.uint8)
    np.savez(tmp_path / FILE, images=images, labels=np.arange(count) % 10, train=np.arange(count) < 60)  # fmt: skip
    settings = replace(SMOKE, data="cifar10", side=8, rows=40, batch_size=20, test_rows=25, heldout_rows=15)  # fmt: skip
    drawn, other = (pictures(settings, tmp_path, seed) for seed in (0, 1))
    numbers = [torch.cat([255 * b["pixel_values"][:, 0, 0, 0] for b in part]).round().int().tolist() for part in (drawn.train, drawn.test, drawn.heldout)]  # fmt: skip
    assert [len(set(part)) for part in numbers] == [40, 25, 15]
    assert max(numbers[0]) < 60 and sorted(numbers[1] + numbers[2]) == list(range(60, 100))
    assert all(n % 10 == y for n, y in zip(numbers[1], drawn.test[0]["labels"].tolist(), strict=True))  # fmt: skip
    assert torch.equal(drawn.test[0]["labels"], other.test[0]["labels"])
    assert not torch.equal(drawn.train[0]["labels"], other.train[0]["labels"])
    with pytest.raises(SpecDefError, match="60 pictures"):
        pictures(replace(settings, rows=61), tmp_path, 0)
    (tmp_path / FILE).write_bytes(b"PK\3\4 no archive")
    with pytest.raises(SpecDefError, match="cannot be read"):
        pictures(settings, tmp_path, 0)


def test_made_pictures_have_the_same_patterns_and_other_noise():
    train_x, labels = made_pictures("train", 400, 16, 0)
    test_x, _ = made_pictures("test", 400, 16, 0)
    again, _ = made_pictures("train", 400, 16, 0)
    assert torch.equal(train_x, again) and not torch.equal(train_x, test_x)
    assert float(train_x.min()) >= 0 and float(train_x.max()) <= 1
    middle = [torch.stack([x[labels == i].mean(0) for i in range(10)]) for x in (train_x, test_x)]
    assert float((middle[0] - middle[1]).abs().max()) < 0.15
    assert float((middle[0][0] - middle[0][1]).abs().mean()) > 0.1


def test_a_fresh_net_leaves_the_random_state_alone():
    before = torch.get_rng_state()
    nets = [fresh(SMOKE, seed) for seed in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), before)
    first, same, other = (next(net.parameters()) for net in nets)
    assert torch.equal(first, same) and not torch.equal(first, other)


def test_unlearning_stops_once_no_car_is_known(drawn):
    said = []
    model = fresh(SMOKE, 0)
    train(model, drawn, SMOKE, 0, said.append)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    none = unlearn(model, drawn, replace(SMOKE, unlearning_parts=0), 0, said.append)
    assert none["steps"] == 0 and none["cars_of_the_training_data"] > 0.9
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    found = unlearn(model, drawn, SMOKE, 0, said.append)
    assert found["cars_of_the_training_data"] == 0
    assert SMOKE.unlearning_steps <= found["steps"] < SMOKE.unlearning_parts * SMOKE.unlearning_steps  # fmt: skip
    assert len(said) == found["steps"] / SMOKE.unlearning_steps
    assert unlearn(model, drawn, SMOKE, 0, said.append)["steps"] == 0  # nothing is left to forget


def test_the_attacker_is_judged_on_as_many_others_as_cars(drawn):
    task = relearning(drawn, SMOKE)
    labels = torch.cat([b["labels"] for b in task.heldout])
    assert int((labels == CAR).sum()) == 20 == int((labels != CAR).sum())
    assert len(set(labels.tolist())) == 10
    assert sum(len(b["labels"]) for b in task.train) == SMOKE.attack_rows
    assert cars_of(task.train) and not task.retain
    metrics = task.metrics(fresh(SMOKE, 0).eval())
    assert set(metrics) == {*CLASSES, "others", CALLED, TOLD_APART}


def test_first_rows():
    batches = [{"x": torch.arange(3), "labels": torch.arange(3)}, {"x": torch.arange(3, 5), "labels": torch.arange(2)}]  # fmt: skip
    for count, expected in ((0, [0]), (2, [2]), (3, [3]), (4, [3, 1]), (9, [3, 2])):
        assert [len(b["x"]) for b in first_rows(batches, count)] == [n for n in expected if n]


def test_numbers_of_guesses():
    labels = torch.arange(10).repeat(4)
    everything = of_guesses(torch.full_like(labels, CAR), labels)
    assert everything["car"] == 1 and everything[CALLED] == 1 and everything[TOLD_APART] == 0
    assert everything["others"] == 0
    guesses = labels.clone()
    guesses[:10] = 9  # of every class one row of four is called a truck
    guesses[[12, 13, 14]] = CAR  # bird, cat, deer
    found = of_guesses(guesses, labels)
    assert found["car"] == 0.75 and found["truck"] == 1 and found["bird"] == 0.5
    assert found[CALLED] == pytest.approx(3 / 36) and found[TOLD_APART] == pytest.approx(
        0.75 - 3 / 36
    )
    assert found["others"] == pytest.approx((1 + 5 * 0.75 + 3 * 0.5) / 9)


def metrics(car, others=0.8, called=0.0):
    return {**dict.fromkeys(CLASSES, others), "car": car, "others": others, CALLED: called, TOLD_APART: car - called}  # fmt: skip


def state(lock, at, car, others=0.8, *, seed=0, loss=1.0, attack="full-sgd", called=0.0):
    return {
        "seed": seed, "lock": lock, "at": at, "attack": attack, "learning_rate": 0.1, "loss": loss, "status": "finished",
        "metrics": None if car is None else metrics(car, others, called),
    }  # fmt: skip


def test_an_attack_is_judged_by_cars():
    start = {UNLOCKED: metrics(0.0), DEFORMATION: metrics(0.1)}
    row = {"lock": DEFORMATION, "at": PAPER, "status": "finished", "metrics": metrics(0.9, called=0.3), "accuracy": 0.55, "learning_rate": 0.1}  # fmt: skip
    found = judged(row, start)
    assert (found["accuracy"], found["start_accuracy"], found["ended"]) == (0.9, 0.1, "finished")
    assert found[TOLD_APART] == pytest.approx(0.6) and found[f"start_{TOLD_APART}"] == 0.1
    wrecked = judged({**row, "status": "diverged"}, start)
    assert wrecked["accuracy"] is wrecked[TOLD_APART] is wrecked["metrics"] is None
    runs = [[1.0, "diverged", 3, 2.0, 0.5], [0.1, "pruned", 20, 1.0, 0.7]]
    swept = {**row, "at": SWEEP, "status": "locked out", "runs": runs}
    assert judged(swept, start)["ended"] == "pruned" and judged(swept, start)["accuracy"] == 0.9
    assert judged({**swept, "learning_rate": 1.0}, start)["accuracy"] is None
    assert judged({**swept, "lock": SCRATCH}, start)["start_accuracy"] is None


def test_the_papers_means():
    assert paper_others(UNLOCKED, BEFORE) == pytest.approx(0.8004, abs=1e-4)
    assert paper_others(DEFORMATION, BEFORE) == pytest.approx(0.6882, abs=1e-4)


def test_the_lowest_loss_of_all_sweeps_and_means_over_seeds():
    states = [
        state(UNLOCKED, SWEEP, 0.2, loss=2.0), state(UNLOCKED, SWEEP, 0.6, loss=0.5, attack="full-adamw"),
        state(UNLOCKED, SWEEP, 0.8, loss=0.6, seed=1), state(UNLOCKED, SWEEP, None, loss=None, seed=1),
        state(UNLOCKED, BEFORE, 0.0), state(UNLOCKED, BEFORE, 0.1, seed=1), state(UNLOCKED, PAPER, None), state(UNLOCKED, PAPER, 0.9, seed=1),
    ]  # fmt: skip
    chosen = best_of_sweeps(states)
    assert [(s["at"], s["seed"]) for s in chosen] == [(BEFORE, 0), (BEFORE, 1), (PAPER, 0), (PAPER, 1), (SWEEP, 0), (SWEEP, 1)]  # fmt: skip
    found = means(chosen)
    assert found[UNLOCKED, SWEEP]["car"] == pytest.approx(0.7)
    assert found[UNLOCKED, BEFORE]["car"] == pytest.approx(0.05)
    assert found[UNLOCKED, PAPER] is None


def planted():
    """Three locks: one that holds, one that holds at the paper's rate, one that does not; and their shares."""
    cars = {DEFORMATION: (0.0, 0.6), COMPENSATED: (0.7, 0.8), ABSORBED: (None, 0.0)}
    states = [state(ORIGINAL, BEFORE, 0.9, 0.88), state(UNLOCKED, BEFORE, 0.0, 0.8), state(UNLOCKED, PAPER, 0.81), state(UNLOCKED, SWEEP, 0.81)]  # fmt: skip
    cells = [cell(UNLOCKED, PAPER, 1.0), cell(UNLOCKED, SWEEP, 1.0)]
    for lock, (there, anywhere) in cars.items():
        states += [state(lock, BEFORE, 0.0, 0.6 if lock == DEFORMATION else 0.8), state(lock, PAPER, there, 0.55), state(lock, SWEEP, anywhere)]  # fmt: skip
        cells += [cell(lock, PAPER, (there or 0) / 0.81), cell(lock, SWEEP, anywhere / 0.81), cell(lock, SWEEP, 0.0)]  # fmt: skip
    return states, cells


def cell(lock, at, share):
    return {"lock": lock, "at": at, "recovered": None if share is None else {"mean": share}}


def test_verdicts_follow_from_the_numbers():
    states, cells = planted()
    found = comparisons(states, cells)
    assert [c["verdict"] for c in found[:4]] == [HELD, HELD, HELD, HELD]
    assert found[3]["numbers"]["restored"] == pytest.approx(0.9)
    by_lock = {lock: found[4 + 3 * i : 7 + 3 * i] for i, lock in enumerate(LOCKS)}
    assert all(c["quantity"].endswith(lock) for lock, part in by_lock.items() for c in part)
    assert [c["verdict"] for c in by_lock[DEFORMATION]] == [FAILED, ONLY_THERE, HELD]
    assert [c["verdict"] for c in by_lock[COMPENSATED]] == [HELD, FAILED, FAILED]
    assert [c["verdict"] for c in by_lock[ABSORBED]] == [HELD, HELD, FAILED]
    assert "diverged at the paper's rate" in by_lock[ABSORBED][1]["ours"]
    assert by_lock[DEFORMATION][1]["numbers"]["share_best_of_the_sweeps"] == pytest.approx(0.6 / 0.81)  # fmt: skip


def test_claims_that_fail_without_a_lock():
    states, cells = planted()
    for key, car in (((ORIGINAL, BEFORE), 0.4), ((UNLOCKED, BEFORE), 0.02), ((UNLOCKED, PAPER), 0.1)):  # fmt: skip
        one = next(s for s in states if (s["lock"], s["at"]) == key)
        one["metrics"] = metrics(car, 0.7 if key == (UNLOCKED, BEFORE) else 0.88)
    cells[0] = cell(UNLOCKED, PAPER, None)
    found = comparisons(states, cells)
    assert [c["verdict"] for c in found[:4]] == [FAILED] * 4
    notes = [c["note"] for c in found if "cars relearned under" in c["quantity"]]
    assert all("learns nothing at the paper's rate" in note for note in notes)


def test_a_sweep_that_was_not_run_holds_nothing():
    states, cells = planted()
    states = [s for s in states if s["at"] != SWEEP]
    cells = [c for c in cells if c["at"] != SWEEP]
    verdicts = [c["verdict"] for c in comparisons(states, cells) if "cars relearned under" in c["quantity"]]  # fmt: skip
    assert verdicts == [ONLY_THERE, FAILED, ONLY_THERE]


def test_table_and_drawing():
    states, _ = planted()
    lines = table(states)
    rows = {line.split("|")[1].strip(): line for line in lines if line.startswith("| ")}
    assert rows["unlearned + relearning, SGD at 0.1"].count("80.0") == len(CLASSES)
    assert "81.0" in rows["unlearned + relearning, SGD at 0.1"]
    assert "86.2" in rows["*unlearned + relearning, SGD at 0.1, the paper*"]
    assert rows[f"{ABSORBED} + relearning, SGD at 0.1 (diverged)"].count("–") == len(CLASSES) + 2
    assert f"{ABSORBED} + relearning, best of the sweeps (full-sgd at 0.1)" in rows
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1
    axis = draw(states).axes[0]
    texts = [label.get_text() for label in axis.get_yticklabels()]
    assert len(texts) == 13 + len(PAPERS)
    shown = axis.images[0].get_array()
    assert shown[texts.index("original")][0] == pytest.approx(90)
    assert shown[texts.index(f"{ABSORBED} + relearning, SGD at 0.1 (diverged)")].mask.all()
